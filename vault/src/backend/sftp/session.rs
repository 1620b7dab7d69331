//! A conversation with an SFTP server: many requests in flight, each answered by its number.
//!
//! One task writes, one reads. When either ends, whoever waits is told so at once, and the session is never used again.
//! A request whose caller has gone is answered to nobody; a handle is therefore opened and closed by a task of its own
//! ([`super::Sftp`]), which nobody cancels.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};

use super::protocol::{self, Attributes, LONGEST, OK, Reply, Request, Verb};

/// Requests that wait to be written: so many parts of objects are in memory twice.
const QUEUE: usize = 64;
/// How long a server may take for one request. It may be syncing a slow disk, and `ssh` notices by itself when it is gone.
const PATIENCE: Duration = Duration::from_secs(300);

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// The server said so.
    #[error("the server says {message:?} ({code})")]
    Status { code: u32, message: String },
    /// The session has ended; whether the request was done is not known.
    #[error("{0}")]
    Ended(String),
}

impl Failure {
    /// The server's code, if it is its answer.
    pub(super) fn code(&self) -> Option<u32> {
        match self {
            Self::Status { code, .. } => Some(*code),
            Self::Ended(_) => None,
        }
    }
}

pub(super) type Outcome<T> = Result<T, Failure>;

/// What is free on the server's disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Free {
    pub(super) bytes: u64,
    /// `false` if there is no room for another file, however small.
    pub(super) files: bool,
}

#[derive(Debug)]
pub(super) struct Session {
    requests: mpsc::Sender<Bytes>,
    waiting: Arc<Mutex<Waiting>>,
    next: AtomicU32,
    extensions: Vec<(Bytes, Bytes)>,
    /// The longest read and write.
    pub(super) part: u32,
    /// Files that may be open at once.
    pub(super) handles: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    replies: HashMap<u32, oneshot::Sender<Reply>>,
    ended: Option<String>,
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end(waiting: &Mutex<Waiting>, cause: &str) {
    let mut waiting = lock(waiting);
    waiting.ended.get_or_insert_with(|| cause.to_owned());
    // Their callers see that nobody will answer.
    waiting.replies.clear();
}

impl Session {
    /// Begins a conversation.
    pub(super) async fn begin(
        mut from: impl AsyncRead + Unpin + Send + 'static,
        mut to: impl AsyncWrite + Unpin + Send + 'static,
    ) -> Outcome<Self> {
        let ended = |error: std::io::Error| Failure::Ended(error.to_string());
        let greeting = async {
            to.write_all(&Request::init()).await?;
            to.flush().await?;
            packet(&mut from).await
        };
        let greeting = tokio::time::timeout(PATIENCE, greeting).await.map_err(|_| late())?;
        let extensions = protocol::version(greeting.map_err(ended)?);
        let extensions = extensions.map_err(|error| Failure::Ended(error.to_string()))?;
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let (requests, queue) = mpsc::channel(QUEUE);
        tokio::spawn(write(to, queue, waiting.clone()));
        tokio::spawn(read(from, waiting.clone()));
        // What every server takes.
        let (part, handles) = (32 * 1024, 64);
        let mut session = Self { requests, waiting, next: AtomicU32::new(0), extensions, part, handles };
        session.ask_limits().await?;
        Ok(session)
    }

    async fn ask_limits(&mut self) -> Outcome<()> {
        if !self.has("limits@openssh.com") {
            return Ok(());
        }
        let answer = self.call(Verb::Extended, |request| request.bytes(b"limits@openssh.com")).await?;
        let [_packet, read, write, handles] = self.numbers(answer)?;
        let given = |limit: u64, most: u64| if limit == 0 { most } else { limit.min(most) };
        let part = given(read, 255 * 1024).min(given(write, 255 * 1024));
        self.part = u32::try_from(part).unwrap_or(self.part).max(1024);
        self.handles = usize::try_from(given(handles, 64)).unwrap_or(64).max(1);
        Ok(())
    }

    /// Whether the server has an extension.
    pub(super) fn has(&self, extension: &str) -> bool {
        self.extensions.iter().any(|(name, _)| name == extension.as_bytes())
    }

    pub(super) fn has_ended(&self) -> bool {
        lock(&self.waiting).ended.is_some()
    }

    fn ended(&self) -> Failure {
        let cause = lock(&self.waiting).ended.clone();
        Failure::Ended(cause.unwrap_or_else(|| "the connection has ended".to_owned()))
    }

    async fn call(&self, verb: Verb, fill: impl FnOnce(Request) -> Request) -> Outcome<Reply> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        {
            let mut waiting = lock(&self.waiting);
            if waiting.ended.is_none() {
                waiting.replies.insert(id, answer);
            }
        }
        let done = async {
            self.requests.send(fill(Request::new(verb, id)).finish()).await.ok()?;
            answered.await.ok()
        };
        match tokio::time::timeout(PATIENCE, done).await {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(self.ended()),
            Err(_) => {
                // A server that is silent for so long will not be asked again.
                end(&self.waiting, &late().to_string());
                Err(late())
            }
        }
    }

    /// An answer that does not fit its request: nothing that follows can be believed.
    fn strange<T>(&self) -> Outcome<T> {
        end(&self.waiting, &protocol::Malformed.to_string());
        Err(self.ended())
    }

    fn numbers<const N: usize>(&self, reply: Reply) -> Outcome<[u64; N]> {
        match reply {
            Reply::Extended(bytes) => protocol::numbers(bytes).or_else(|_| self.strange()),
            Reply::Status { code, message } if code != OK => Err(Failure::Status { code, message }),
            _ => self.strange(),
        }
    }

    fn done(&self, reply: Reply) -> Outcome<()> {
        match reply {
            Reply::Status { code: OK, .. } => Ok(()),
            Reply::Status { code, message } => Err(Failure::Status { code, message }),
            _ => self.strange(),
        }
    }

    fn handle(&self, reply: Reply) -> Outcome<Bytes> {
        match reply {
            Reply::Handle(handle) => Ok(handle),
            Reply::Status { code, message } if code != OK => Err(Failure::Status { code, message }),
            _ => self.strange(),
        }
    }

    fn attributes(&self, reply: Reply) -> Outcome<Attributes> {
        match reply {
            Reply::Attributes(attributes) => Ok(attributes),
            Reply::Status { code, message } if code != OK => Err(Failure::Status { code, message }),
            _ => self.strange(),
        }
    }

    pub(super) async fn open(&self, path: &str, how: u32, mode: Option<u32>) -> Outcome<Bytes> {
        let fill = |request: Request| {
            let request = request.bytes(path.as_bytes()).u32(how);
            // Without a mode: no attributes at all.
            if let Some(mode) = mode { request.mode(mode) } else { request.u32(0) }
        };
        self.handle(self.call(Verb::Open, fill).await?)
    }

    pub(super) async fn opendir(&self, path: &str) -> Outcome<Bytes> {
        self.handle(self.call(Verb::Opendir, |request| request.bytes(path.as_bytes())).await?)
    }

    pub(super) async fn close(&self, handle: &Bytes) -> Outcome<()> {
        self.done(self.call(Verb::Close, |request| request.bytes(handle)).await?)
    }

    pub(super) async fn set_mode(&self, handle: &Bytes, mode: u32) -> Outcome<()> {
        self.done(self.call(Verb::Fsetstat, |request| request.bytes(handle).mode(mode)).await?)
    }

    /// Bytes from a place on, maybe fewer than asked for; none at the end.
    pub(super) async fn read(&self, handle: &Bytes, offset: u64, length: u32) -> Outcome<Bytes> {
        let fill = |request: Request| request.bytes(handle).u64(offset).u32(length);
        match self.call(Verb::Read, fill).await? {
            Reply::Data(data) if !data.is_empty() && data.len() <= length as usize => Ok(data),
            Reply::Status { code: protocol::EOF, .. } => Ok(Bytes::new()),
            Reply::Status { code, message } if code != OK => Err(Failure::Status { code, message }),
            _ => self.strange(),
        }
    }

    pub(super) async fn write(&self, handle: &Bytes, offset: u64, bytes: &[u8]) -> Outcome<()> {
        self.done(self.call(Verb::Write, |request| request.bytes(handle).u64(offset).bytes(bytes)).await?)
    }

    pub(super) async fn fsync(&self, handle: &Bytes) -> Outcome<()> {
        let fill = |request: Request| request.bytes(b"fsync@openssh.com").bytes(handle);
        self.done(self.call(Verb::Extended, fill).await?)
    }

    pub(super) async fn fstat(&self, handle: &Bytes) -> Outcome<Attributes> {
        self.attributes(self.call(Verb::Fstat, |request| request.bytes(handle)).await?)
    }

    /// What a name is, or what it leads to.
    pub(super) async fn stat(&self, path: &str, follow: bool) -> Outcome<Attributes> {
        let verb = if follow { Verb::Stat } else { Verb::Lstat };
        self.attributes(self.call(verb, |request| request.bytes(path.as_bytes())).await?)
    }

    /// The next names in a folder; none at the end.
    pub(super) async fn readdir(&self, handle: &Bytes) -> Outcome<Vec<(Bytes, Attributes)>> {
        match self.call(Verb::Readdir, |request| request.bytes(handle)).await? {
            Reply::Names(names) if !names.is_empty() => Ok(names),
            Reply::Status { code: protocol::EOF, .. } => Ok(Vec::new()),
            Reply::Status { code, message } if code != OK => Err(Failure::Status { code, message }),
            _ => self.strange(),
        }
    }

    /// Refused by the server if the new name is taken.
    pub(super) async fn rename(&self, from: &str, to: &str) -> Outcome<()> {
        let fill = |request: Request| request.bytes(from.as_bytes()).bytes(to.as_bytes());
        self.done(self.call(Verb::Rename, fill).await?)
    }

    pub(super) async fn remove(&self, path: &str) -> Outcome<()> {
        self.done(self.call(Verb::Remove, |request| request.bytes(path.as_bytes())).await?)
    }

    pub(super) async fn rmdir(&self, path: &str) -> Outcome<()> {
        self.done(self.call(Verb::Rmdir, |request| request.bytes(path.as_bytes())).await?)
    }

    pub(super) async fn mkdir(&self, path: &str, mode: u32) -> Outcome<()> {
        self.done(self.call(Verb::Mkdir, |request| request.bytes(path.as_bytes()).mode(mode)).await?)
    }

    /// What is free; `None` if the server can't say.
    pub(super) async fn free(&self, path: &str) -> Outcome<Option<Free>> {
        if !self.has("statvfs@openssh.com") {
            return Ok(None);
        }
        let fill = |request: Request| request.bytes(b"statvfs@openssh.com").bytes(path.as_bytes());
        let [_, fragment, _, _, blocks, files, _, left, ..]: [u64; 11] =
            self.numbers(self.call(Verb::Extended, fill).await?)?;
        Ok(Some(Free { bytes: blocks.saturating_mul(fragment), files: files == 0 || left > 0 }))
    }
}

fn late() -> Failure {
    Failure::Ended(format!("no answer within {} s", PATIENCE.as_secs()))
}

/// Ends with the queue, that is with the session.
async fn write(
    mut to: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Bytes>,
    waiting: Arc<Mutex<Waiting>>,
) {
    while let Some(request) = queue.recv().await {
        if let Err(error) = to.write_all(&request).await {
            end(&waiting, &format!("the connection has ended: {error}"));
            return;
        }
        if queue.is_empty()
            && let Err(error) = to.flush().await
        {
            end(&waiting, &format!("the connection has ended: {error}"));
            return;
        }
    }
}

async fn read(mut from: impl AsyncRead + Unpin, waiting: Arc<Mutex<Waiting>>) {
    let cause = loop {
        match packet(&mut from).await {
            Ok(bytes) => match protocol::reply(bytes) {
                Ok((id, reply)) => {
                    let waiter = lock(&waiting).replies.remove(&id);
                    // Its caller may have gone.
                    let _ = waiter.map(|waiter| waiter.send(reply));
                }
                Err(malformed) => break malformed.to_string(),
            },
            Err(error) => break format!("the connection has ended: {error}"),
        }
    };
    end(&waiting, &cause);
}

async fn packet(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Bytes> {
    let length = from.read_u32().await? as usize;
    if length > LONGEST {
        return Err(std::io::Error::other(protocol::Malformed));
    }
    let mut packet = vec![0; length];
    from.read_exact(&mut packet).await?;
    Ok(packet.into())
}

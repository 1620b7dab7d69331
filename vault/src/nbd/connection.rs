//! One connection: requests go out, replies come in, each finds its request by its cookie.
//!
//! One task does both, and owns the stream. A request is admitted (with a place among those in flight, which its reply gives
//! back, not its caller), and handed to the task as a whole: a caller who is gone in between changes nothing on the wire.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::address::{Address, Stream};
use super::assemble::Assembly;
use super::client::Peer;
use super::error::NbdError;
use super::handshake::{Agreed, handshake};
use super::proto::{CMD_BLOCK_STATUS, CMD_DISC, CMD_READ, request};
use super::receive::{Counted, Receiver};
use super::status::{Extents, Statuses};

/// Small: only heads of replies shall pass through it.
const BUFFER: usize = 4 << 10;

/// A connection that has been agreed upon.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    agreed: Agreed,
    peer: Option<Peer>,
    send: mpsc::UnboundedSender<[u8; 28]>,
    places: Arc<Semaphore>,
    task: Ending,
}

/// What the task and those who ask have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) address: String,
    received: Arc<AtomicU64>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pending: HashMap<u64, Pending>,
    next: u64,
    /// Why it ended.
    dead: Option<NbdError>,
}

/// A request whose reply has not come to its end.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) kind: Kind,
    /// What went wrong, so far.
    pub(super) error: Option<NbdError>,
    /// Chunks of the reply that have come.
    pub(super) chunks: usize,
    _place: OwnedSemaphorePermit,
}

/// What is asked for, as far as it has come, and who waits for it: perhaps nobody any more.
#[derive(Debug)]
pub(super) enum Kind {
    Read(Assembly, oneshot::Sender<Result<Bytes, NbdError>>),
    Status(Statuses, oneshot::Sender<Result<Vec<Extents>, NbdError>>),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in it is left half done by a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out a request whose reply goes on.
    pub(super) fn take(&self, cookie: u64) -> Option<Pending> {
        self.state().pending.remove(&cookie)
    }

    /// Puts it back: more is to come.
    pub(super) fn put_back(&self, cookie: u64, pending: Pending) {
        self.state().pending.insert(cookie, pending);
    }

    pub(super) fn protocol(&self, cause: impl Into<String>) -> NbdError {
        NbdError::Protocol { address: self.address.clone(), cause: cause.into() }
    }

    pub(super) fn lost(&self, cause: &std::io::Error) -> NbdError {
        let cause = match cause.kind() {
            std::io::ErrorKind::UnexpectedEof => "the server ended it".to_owned(),
            _ => cause.to_string(),
        };
        NbdError::Lost { address: self.address.clone(), cause }
    }

    /// Why it ended.
    fn cause(&self) -> NbdError {
        let address = self.address.clone();
        self.state().dead.clone().unwrap_or(NbdError::Lost { address, cause: "it was closed".into() })
    }
}

impl Connection {
    /// Connects, and agrees upon `contexts` as far as the server grants them.
    pub(super) async fn open(
        address: &Address,
        contexts: &[String],
        in_flight: usize,
        received: Arc<AtomicU64>,
    ) -> Result<Self, NbdError> {
        let (stream, peer) = address.connect().await?;
        let (stream, agreed) = handshake(address, stream, contexts).await?;
        let state = State { pending: HashMap::new(), next: 1, dead: None };
        let shared = Arc::new(Shared { address: address.to_string(), received, state: Mutex::new(state) });
        let places = Arc::new(Semaphore::new(in_flight));
        let (send, requests) = mpsc::unbounded_channel();
        let work = work(shared.clone(), agreed.structured, stream, requests, places.clone());
        Ok(Self { shared, agreed, peer, send, places, task: Ending(tokio::spawn(work)) })
    }

    pub(super) fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    pub(super) fn peer(&self) -> Option<Peer> {
        self.peer
    }

    pub(super) fn is_alive(&self) -> bool {
        self.shared.state().dead.is_none()
    }

    /// Requests that may still be admitted at once.
    pub(super) fn free(&self) -> usize {
        self.places.available_permits()
    }

    /// Bytes of the export: within its size, aligned, not more than the server allows, and not none.
    pub(super) async fn read(&self, offset: u64, length: u32) -> Result<Bytes, NbdError> {
        let (tell, told) = oneshot::channel();
        self.submit(CMD_READ, offset, length, Kind::Read(Assembly::new(offset, length), tell)).await?;
        told.await.unwrap_or_else(|_| Err(self.shared.cause()))
    }

    /// What each context that was granted says, for the beginning of what was asked for.
    pub(super) async fn status(&self, offset: u64, length: u32) -> Result<Vec<Extents>, NbdError> {
        let (tell, told) = oneshot::channel();
        let statuses = Statuses::new(offset, length, &self.agreed.contexts);
        self.submit(CMD_BLOCK_STATUS, offset, length, Kind::Status(statuses, tell)).await?;
        told.await.unwrap_or_else(|_| Err(self.shared.cause()))
    }

    async fn submit(&self, command: u16, offset: u64, length: u32, kind: Kind) -> Result<(), NbdError> {
        let place = self.places.clone().acquire_owned().await.map_err(|_| self.shared.cause())?;
        let cookie = {
            let mut state = self.shared.state();
            if let Some(dead) = &state.dead {
                return Err(dead.clone());
            }
            let cookie = state.next;
            state.next = state.next.wrapping_add(1);
            state.pending.insert(cookie, Pending { kind, error: None, chunks: 0, _place: place });
            cookie
        };
        self.send.send(request(command, cookie, offset, length)).map_err(|_| self.shared.cause())
    }

    /// Tells the server that this is the end, and waits until the connection is closed.
    pub(super) async fn close(self) {
        let Self { send, mut task, .. } = self;
        drop(send);
        if let Err(error) = (&mut task.0).await {
            tracing::warn!(%error, "the task of an NBD connection");
        }
    }
}

/// A task that ends with its owner.
#[derive(Debug)]
struct Ending(JoinHandle<()>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn work(
    shared: Arc<Shared>,
    structured: bool,
    stream: Stream,
    requests: mpsc::UnboundedReceiver<[u8; 28]>,
    places: Arc<Semaphore>,
) {
    let (from, to) = tokio::io::split(stream);
    let from = BufReader::with_capacity(BUFFER, Counted { from, received: shared.received.clone() });
    let receiver = Receiver { shared: &shared, structured, from };
    let mut receiving = std::pin::pin!(receiver.receive());
    let mut sending = std::pin::pin!(send(&shared, to, requests));
    let error = tokio::select! {
        error = &mut receiving => error,
        error = &mut sending => error,
    };
    // First why, then whatever still waits is let go, so that nobody wakes and finds no reason.
    places.close();
    let mut state = shared.state();
    state.dead = Some(error);
    let pending = std::mem::take(&mut state.pending);
    drop(state);
    drop(pending);
}

/// Sends requests until there is a failure, or nobody is left who could have any.
async fn send(
    shared: &Shared,
    mut to: impl AsyncWrite + Unpin,
    mut requests: mpsc::UnboundedReceiver<[u8; 28]>,
) -> NbdError {
    let mut bytes = Vec::new();
    let sent = async {
        while let Some(first) = requests.recv().await {
            bytes.clear();
            bytes.extend_from_slice(&first);
            while let Ok(next) = requests.try_recv() {
                bytes.extend_from_slice(&next);
            }
            to.write_all(&bytes).await?;
            to.flush().await?;
        }
        to.write_all(&request(CMD_DISC, 0, 0, 0)).await?;
        to.shutdown().await
    };
    match sent.await {
        Ok(()) => NbdError::Lost { address: shared.address.clone(), cause: "it was closed".into() },
        Err(error) => shared.lost(&error),
    }
}

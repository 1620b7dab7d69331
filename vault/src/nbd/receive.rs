//! Taking in replies. This is where a server is believed or not.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use super::connection::{Kind, Pending, Shared};
use super::error::NbdError;
use super::proto::*;
use super::status::Statuses;

/// Takes in what comes on a connection.
pub(super) struct Receiver<'a, R> {
    pub(super) shared: &'a Shared,
    pub(super) structured: bool,
    pub(super) from: R,
}

/// The head of a chunk.
#[derive(Clone, Copy)]
struct Head {
    flags: u16,
    kind: u16,
    cookie: u64,
    length: u32,
}

impl<R: AsyncRead + Unpin> Receiver<'_, R> {
    /// Takes in replies for as long as it can, and says what ended that.
    pub(super) async fn receive(mut self) -> NbdError {
        loop {
            if let Err(error) = self.reply().await {
                return error;
            }
        }
    }

    async fn take<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        match self.from.read_exact(&mut bytes).await {
            Ok(_) => Ok(bytes),
            Err(error) => Err(self.shared.lost(&error)),
        }
    }

    async fn u16(&mut self) -> Result<u16, NbdError> {
        self.take().await.map(u16::from_be_bytes)
    }

    async fn u32(&mut self) -> Result<u32, NbdError> {
        self.take().await.map(u32::from_be_bytes)
    }

    async fn u64(&mut self) -> Result<u64, NbdError> {
        self.take().await.map(u64::from_be_bytes)
    }

    fn pending(&self, cookie: u64) -> Result<Pending, NbdError> {
        self.shared.take(cookie).ok_or_else(|| self.shared.protocol("a reply to nothing that was asked for"))
    }

    async fn reply(&mut self) -> Result<(), NbdError> {
        match self.u32().await? {
            SIMPLE_REPLY => {
                let errno = self.u32().await?;
                let cookie = self.u64().await?;
                let mut pending = self.pending(cookie)?;
                match self.simple(&mut pending, errno).await {
                    Ok(()) => self.finish(pending),
                    Err(error) => Err(self.keep(cookie, pending, error)),
                }
            }
            STRUCTURED_REPLY if self.structured => {
                let head = Head {
                    flags: self.u16().await?,
                    kind: self.u16().await?,
                    cookie: self.u64().await?,
                    length: self.u32().await?,
                };
                let mut pending = self.pending(head.cookie)?;
                match self.chunk(&mut pending, head).await {
                    Ok(()) if head.flags & REPLY_DONE != 0 => self.finish(pending),
                    Ok(()) => {
                        self.shared.put_back(head.cookie, pending);
                        Ok(())
                    }
                    Err(error) => Err(self.keep(head.cookie, pending, error)),
                }
            }
            other => Err(self.shared.protocol(format!("a reply that begins with {other:#010x}"))),
        }
    }

    /// Whoever waits for a request must not be woken before it is noted why the connection ends.
    fn keep(&self, cookie: u64, pending: Pending, error: NbdError) -> NbdError {
        self.shared.put_back(cookie, pending);
        error
    }

    async fn simple(&mut self, pending: &mut Pending, errno: u32) -> Result<(), NbdError> {
        if errno != 0 {
            pending.error = Some(self.failed(pending, errno, None, String::new()));
            return Ok(());
        }
        let lie = match &mut pending.kind {
            Kind::Read(assembly, _) if !self.structured => {
                let taken = assembly.data(assembly.offset(), assembly.length(), &mut self.from).await;
                taken.map_err(|error| self.shared.lost(&error))?.err()
            }
            _ => Some("a simple reply where a structured one is due".to_owned()),
        };
        lie.map_or(Ok(()), |lie| Err(self.shared.protocol(lie)))
    }

    async fn chunk(&mut self, pending: &mut Pending, head: Head) -> Result<(), NbdError> {
        pending.chunks += 1;
        let most = match &pending.kind {
            Kind::Read(assembly, _) => assembly.most_chunks(),
            Kind::Status(statuses, _) => statuses.most_chunks(),
        };
        if pending.chunks > most {
            return Err(self.shared.protocol("a reply of more chunks than there can be"));
        }
        if head.kind & REPLY_ERROR_BIT != 0 {
            return self.error(pending, head).await;
        }
        let said = match (head.kind, &mut pending.kind) {
            (REPLY_NONE, _) if head.length == 0 && head.flags & REPLY_DONE != 0 => Ok(()),
            (REPLY_NONE, _) => Err("a chunk of nothing that is not the last, or not nothing".to_owned()),
            (REPLY_OFFSET_DATA, Kind::Read(assembly, _)) => match head.length.checked_sub(8) {
                None => Err("a chunk of data without a place".to_owned()),
                Some(length) => {
                    let offset = self.u64().await?;
                    let taken = assembly.data(offset, length as usize, &mut self.from).await;
                    taken.map_err(|error| self.shared.lost(&error))?
                }
            },
            (REPLY_OFFSET_HOLE, Kind::Read(assembly, _)) if head.length == 12 => {
                let offset = self.u64().await?;
                let length = self.u32().await?;
                assembly.hole(offset, length as usize)
            }
            (REPLY_BLOCK_STATUS, Kind::Status(statuses, _)) => self.status(statuses, head.length).await?,
            (kind, _) => Err(format!("a chunk of kind {kind} that does not answer what was asked for")),
        };
        said.map_err(|lie| self.shared.protocol(lie))
    }

    async fn status(&mut self, statuses: &mut Statuses, length: u32) -> Result<Result<(), String>, NbdError> {
        let count = match Statuses::extents_in(length) {
            Ok(count) => count,
            Err(lie) => return Ok(Err(lie)),
        };
        let context = self.u32().await?;
        let mut extents = match statuses.begin(context) {
            Ok(extents) => extents,
            Err(lie) => return Ok(Err(lie)),
        };
        let mut so_far = 0;
        for _ in 0..count {
            let length = self.u32().await?;
            let flags = self.u32().await?;
            if let Err(lie) = statuses.extent(&mut extents, &mut so_far, length, flags) {
                return Ok(Err(lie));
            }
        }
        statuses.end(context, extents);
        Ok(Ok(()))
    }

    async fn error(&mut self, pending: &mut Pending, head: Head) -> Result<(), NbdError> {
        if !(6..=6 + 8 + MOST_STRING as u32).contains(&head.length) {
            return Err(self.shared.protocol(format!("an error of {} bytes", head.length)));
        }
        let errno = self.u32().await?;
        let told = self.u16().await?;
        let mut rest = vec![0; head.length as usize - 6];
        let taken = self.from.read_exact(&mut rest).await;
        taken.map_err(|error| self.shared.lost(&error))?;
        let Some((message, rest)) = rest.split_at_checked(usize::from(told)) else {
            return Err(self.shared.protocol("an error whose message is longer than itself"));
        };
        let at = match (head.kind, <[u8; 8]>::try_from(rest)) {
            (REPLY_ERROR_OFFSET, Ok(at)) => Some(u64::from_be_bytes(at)),
            (REPLY_ERROR_OFFSET, Err(_)) => return Err(self.shared.protocol("an error without its place")),
            // What kinds that came later say beyond that is theirs.
            _ => None,
        };
        if errno == 0 {
            return Err(self.shared.protocol("an error that is none"));
        }
        let message = String::from_utf8_lossy(message).chars().filter(|c| !c.is_control()).collect();
        let error = self.failed(pending, errno, at, message);
        pending.error.get_or_insert(error);
        Ok(())
    }

    fn failed(&self, pending: &Pending, errno: u32, at: Option<u64>, message: String) -> NbdError {
        let (offset, length) = match &pending.kind {
            Kind::Read(assembly, _) => (assembly.offset(), assembly.length() as u64),
            Kind::Status(statuses, _) => (statuses.offset, u64::from(statuses.length)),
        };
        NbdError::Server { address: self.shared.address.clone(), offset, length, errno, at, message }
    }

    /// Hands over a reply that has come to its end. Whoever asked may be gone.
    fn finish(&self, pending: Pending) -> Result<(), NbdError> {
        let Pending { kind, error, .. } = pending;
        match (kind, error) {
            (Kind::Read(_, tell), Some(error)) => drop(tell.send(Err(error))),
            (Kind::Status(_, tell), Some(error)) => drop(tell.send(Err(error))),
            (Kind::Read(assembly, tell), None) => match assembly.finish() {
                Ok(bytes) => drop(tell.send(Ok(bytes))),
                Err(lie) => {
                    let lie = self.shared.protocol(lie);
                    drop(tell.send(Err(lie.clone())));
                    return Err(lie);
                }
            },
            (Kind::Status(statuses, tell), None) => match statuses.finish() {
                Ok(said) => drop(tell.send(Ok(said))),
                Err(lie) => {
                    let lie = self.shared.protocol(lie);
                    drop(tell.send(Err(lie.clone())));
                    return Err(lie);
                }
            },
        }
        Ok(())
    }
}

/// Counts what comes.
pub(super) struct Counted<R> {
    pub(super) from: R,
    pub(super) received: Arc<AtomicU64>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Counted<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.from).poll_read(cx, buf);
        self.received.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        polled
    }
}

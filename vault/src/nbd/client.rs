//! An export, read over one connection or several.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use tokio::time::{Instant, timeout_at};

use super::MOST_AT_ONCE;
use super::address::Address;
use super::connection::Connection;
use super::error::NbdError;
use super::handshake::{Agreed, Export};
use super::status::Extents;

/// The most that one question for block status asks for.
const MOST_STATUS: u64 = 1 << 31;

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// The meta contexts that are asked for.
    pub contexts: Vec<String>,
    /// Connections, if the server says that several see the same; one otherwise. A server that lets no more in than there
    /// are may keep a further one waiting for ever.
    pub connections: usize,
    /// Requests in flight on each.
    pub in_flight: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { contexts: Vec::new(), connections: 1, in_flight: 16 }
    }
}

/// The process at the other end of a Unix socket: the one that made the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process id, if it is to be seen from here.
    pub process: Option<i32>,
    /// Its user id.
    pub user: u32,
}

/// An export that can be read.
#[derive(Debug)]
pub struct Client {
    address: String,
    asked: usize,
    connections: Vec<Connection>,
    export: Export,
    granted: Vec<bool>,
    received: Arc<AtomicU64>,
}

impl Client {
    /// Connects. Further connections that are refused are done without, unless they show another export than the first.
    ///
    /// # Errors
    /// Whatever keeps the first connection from being made or agreed upon; [`NbdError::Protocol`] if connections differ.
    pub async fn connect(
        address: &Address,
        options: &Options,
        deadline: Option<Instant>,
    ) -> Result<Self, NbdError> {
        let text = address.to_string();
        let connecting = Box::pin(Self::connect_all(address, &text, options));
        within(deadline, &text, || "connecting".into(), connecting).await
    }

    async fn connect_all(address: &Address, text: &str, options: &Options) -> Result<Self, NbdError> {
        let received = Arc::new(AtomicU64::new(0));
        let open =
            || Connection::open(address, &options.contexts, options.in_flight.max(1), received.clone());
        let first = open().await?;
        let export = first.agreed().export;
        let granted = granted(first.agreed(), options.contexts.len());
        let mut connections = vec![first];
        while export.multi_conn && connections.len() < options.connections {
            match open().await {
                Ok(next) if next.agreed().export == export => {
                    if self::granted(next.agreed(), options.contexts.len()) != granted {
                        return Err(differs(text));
                    }
                    connections.push(next);
                }
                Ok(_) => return Err(differs(text)),
                Err(error) => {
                    tracing::warn!(%error, have = connections.len(), "no further NBD connection");
                    break;
                }
            }
        }
        let asked = options.contexts.len();
        Ok(Self { address: text.to_owned(), asked, connections, export, granted, received })
    }

    /// What the server said of the export.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Whether a context was granted, by its place in [`Options::contexts`].
    #[must_use]
    pub fn granted(&self, context: usize) -> bool {
        self.granted.get(context).copied().unwrap_or(false)
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether every connection still stands, as far as is known.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.connections.iter().all(Connection::is_alive)
    }

    /// Who listens at a Unix socket, as each connection has seen it.
    pub fn peers(&self) -> impl Iterator<Item = Option<Peer>> {
        self.connections.iter().map(Connection::peer)
    }

    /// Bytes that have come so far: for a caller who wants to know whether the server still answers.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Where the server is.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Reads a part of the export, of at most [`MOST_AT_ONCE`] bytes.
    ///
    /// # Errors
    /// What the server could not do; nothing of the part is told then. [`NbdError::Deadline`] leaves the connection as it is.
    pub async fn read(&self, part: Range<u64>, deadline: Option<Instant>) -> Result<Bytes, NbdError> {
        let aligned = self.aligned(&part)?;
        if part.end - part.start > MOST_AT_ONCE {
            return Err(NbdError::Contract(format!("more than {MOST_AT_ONCE} bytes at once")));
        }
        let what = || format!("reading {} bytes at {}", part.end - part.start, part.start);
        let head = (part.start - aligned.start) as usize;
        let length = (part.end - part.start) as usize;
        let bytes = within(deadline, &self.address, what, self.read_aligned(aligned)).await?;
        Ok(bytes.slice(head..head + length))
    }

    async fn read_aligned(&self, part: Range<u64>) -> Result<Bytes, NbdError> {
        let most = u64::from(self.export.maximum).min(MOST_AT_ONCE);
        let pieces: Vec<u64> = (part.start..part.end).step_by(most as usize).collect();
        let read = |at: u64| {
            // At most `MOST_AT_ONCE`.
            let length = most.min(part.end - at) as u32;
            async move { self.connection()?.read(at, length).await }
        };
        match pieces.as_slice() {
            [] => Ok(Bytes::new()),
            [one] => read(*one).await,
            many => {
                let pieces = try_join_all(many.iter().map(|at| read(*at))).await?;
                let mut bytes = BytesMut::with_capacity((part.end - part.start) as usize);
                pieces.iter().for_each(|piece| bytes.extend_from_slice(piece));
                Ok(bytes.freeze())
            }
        }
    }

    /// What each context says of a part of the export, in the order of [`Options::contexts`]: nothing from those that were
    /// not granted; all of the part, to the byte, from the others. A server that answers short is asked again. The deadline is
    /// for each of those questions.
    ///
    /// # Errors
    /// What the server could not do.
    pub async fn status(
        &self,
        part: Range<u64>,
        deadline: impl Fn() -> Option<Instant> + Send,
    ) -> Result<Vec<Option<Extents>>, NbdError> {
        let aligned = self.aligned(&part)?;
        let mut all: Vec<Option<Extents>> =
            (0..self.asked).map(|place| self.granted(place).then(Extents::default)).collect();
        let mut at = if all.iter().any(Option::is_some) { aligned.start } else { aligned.end };
        while at < aligned.end {
            let connection = self.connection()?;
            // Below 2^32.
            let length = (aligned.end - at).min(MOST_STATUS) as u32;
            let what = || format!("asking for the status of {length} bytes at {at}");
            let said = within(deadline(), &self.address, what, connection.status(at, length)).await?;
            // All of them say the same length, and more than nothing.
            at += said.first().map_or(0, Extents::len);
            for ((_, place), extents) in connection.agreed().contexts.iter().zip(&said) {
                if let Some(Some(so_far)) = all.get_mut(*place) {
                    so_far.append(extents);
                }
            }
        }
        for extents in all.iter_mut().flatten() {
            extents.skip(part.start - aligned.start);
            extents.cut(part.end - part.start);
        }
        Ok(all)
    }

    /// Takes leave of the server.
    pub async fn close(self) {
        for connection in self.connections {
            connection.close().await;
        }
    }

    /// The blocks that a part lies in.
    fn aligned(&self, part: &Range<u64>) -> Result<Range<u64>, NbdError> {
        let size = self.export.size;
        if part.start > part.end || part.end > size {
            return Err(NbdError::Contract(format!("{} to {} of an export of {size}", part.start, part.end)));
        }
        let minimum = u64::from(self.export.minimum);
        let start = part.start - part.start % minimum;
        // A size below 2^63, and a minimum of at most 64 KiB. What follows the last whole block ends where the export does.
        Ok(start..part.end.next_multiple_of(minimum).min(size))
    }

    /// The connection with the most room, of those that stand.
    fn connection(&self) -> Result<&Connection, NbdError> {
        let best = self.connections.iter().filter(|one| one.is_alive()).max_by_key(|one| one.free());
        best.or(self.connections.first())
            .ok_or_else(|| NbdError::Contract("a client without connections".into()))
    }
}

fn granted(agreed: &Agreed, asked: usize) -> Vec<bool> {
    (0..asked).map(|place| agreed.contexts.iter().any(|(_, granted)| *granted == place)).collect()
}

fn differs(address: &str) -> NbdError {
    let cause = "two connections show different exports".to_owned();
    NbdError::Protocol { address: address.to_owned(), cause }
}

async fn within<T>(
    deadline: Option<Instant>,
    address: &str,
    what: impl Fn() -> String,
    work: impl Future<Output = Result<T, NbdError>>,
) -> Result<T, NbdError> {
    match deadline {
        None => work.await,
        Some(deadline) => timeout_at(deadline, work)
            .await
            .unwrap_or_else(|_| Err(NbdError::Deadline { address: address.to_owned(), what: what() })),
    }
}

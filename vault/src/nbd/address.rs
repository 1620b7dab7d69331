//! Where a server is.

use std::fmt;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::client::Peer;
use super::error::NbdError;
use super::tls::Tls;

/// An export of a server.
#[derive(Clone, Debug)]
pub struct Address {
    /// Where the server is.
    pub endpoint: Endpoint,
    /// The export's name; empty for the server's default.
    pub export: String,
}

/// Where a server is.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// A Unix socket: the folder that it lies in guards it.
    Unix(PathBuf),
    /// A host: with TLS, always.
    Tcp {
        /// Its name or address.
        host: String,
        /// Mostly 10809.
        port: u16,
        /// Whom to believe, and as whom to come.
        tls: Tls,
    },
}

impl Address {
    /// An export on a Unix socket.
    #[must_use]
    pub fn unix(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Self { endpoint: Endpoint::Unix(socket.into()), export: export.into() }
    }

    /// An export on another host.
    #[must_use]
    pub fn tcp(host: impl Into<String>, port: u16, tls: Tls, export: impl Into<String>) -> Self {
        Self { endpoint: Endpoint::Tcp { host: host.into(), port, tls }, export: export.into() }
    }

    /// A connection, not yet secured.
    pub(super) async fn connect(&self) -> Result<(Stream, Option<Peer>), NbdError> {
        let lost =
            |cause: std::io::Error| NbdError::Lost { address: self.to_string(), cause: cause.to_string() };
        match &self.endpoint {
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(lost)?;
                let peer = stream.peer_cred().map_err(lost)?;
                Ok((Box::new(stream), Some(Peer { process: peer.pid(), user: peer.uid() })))
            }
            Endpoint::Tcp { host, port, .. } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(lost)?;
                stream.set_nodelay(true).map_err(lost)?;
                Ok((Box::new(stream), None))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = &self.export;
        match &self.endpoint {
            Endpoint::Unix(path) => write!(f, "nbd+unix:///{export}?socket={}", path.display()),
            Endpoint::Tcp { host, port, .. } => write!(f, "nbds://{host}:{port}/{export}"),
        }
    }
}

/// Bytes to and from a server.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}
pub(super) type Stream = Box<dyn Duplex>;

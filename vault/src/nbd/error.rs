//! Why something could not be read over NBD.

use super::proto::errno_name;

/// Why a server was not reached, or did not give what it was asked for. The object is its address, with the export.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// There is no connection, or it ended.
    #[error("{address}: the connection was lost: {cause}")]
    Lost {
        /// The server.
        address: String,
        /// In the system's words.
        cause: String,
    },
    /// No secure connection.
    #[error("{address}: TLS: {cause}")]
    Tls {
        /// The server.
        address: String,
        /// A file that cannot be used, or what does not fit.
        cause: String,
    },
    /// The server refused an option of the handshake.
    #[error("{address}: {option} was refused: {cause}")]
    Refused {
        /// The server.
        address: String,
        /// Which option.
        option: &'static str,
        /// What the refusal means, and the server's words.
        cause: String,
    },
    /// The server said something that it must not say. The connection is ended.
    #[error("{address}: the server breaks the protocol: {cause}")]
    Protocol {
        /// The server.
        address: String,
        /// What does not fit.
        cause: String,
    },
    /// The server could not do what it was asked for. The connection goes on.
    #[error("{address}: {length} bytes at {offset}: {} ({errno}){}", named(.errno), said(.message, .at))]
    Server {
        /// The server.
        address: String,
        /// Where the request began, bytes.
        offset: u64,
        /// How much it asked for, bytes.
        length: u64,
        /// The protocol's number, which is that of Linux.
        errno: u32,
        /// Where exactly it failed, if it says so, bytes.
        at: Option<u64>,
        /// The server's words, if it has any.
        message: String,
    },
    /// The caller's deadline passed.
    #[error("{address}: {what}: no answer in the time allowed")]
    Deadline {
        /// The server.
        address: String,
        /// What was asked for.
        what: String,
    },
    /// The caller asked for what cannot be asked for.
    #[error("{0}")]
    Contract(String),
}

fn named(errno: &u32) -> &'static str {
    errno_name(*errno)
}

fn said(message: &str, at: &Option<u64>) -> String {
    let place = at.map(|at| format!(" at {at}")).unwrap_or_default();
    if message.is_empty() { place } else { format!("{place}: {message}") }
}

impl NbdError {
    /// A stable name of the kind of failure.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Lost { .. } => "NBD_LOST",
            Self::Tls { .. } => "NBD_TLS",
            Self::Refused { .. } => "NBD_REFUSED",
            Self::Protocol { .. } => "NBD_PROTOCOL",
            Self::Server { .. } => "NBD_SERVER",
            Self::Deadline { .. } => "NBD_DEADLINE",
            Self::Contract(_) => "NBD_CONTRACT",
        }
    }

    /// What somebody can do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Lost { .. } => {
                "see whether the server still runs; a guest that has shut down has ended its export"
            }
            Self::Tls { .. } => "check the certificates, and the name in the server's",
            Self::Refused { .. } => "see whether the export is there, and what the server requires",
            Self::Protocol { .. } => "report this with the server's name and version; nothing of it was used",
            Self::Server { .. } => "see to the disk that the server reads",
            Self::Deadline { .. } => "see to the server and the medium it reads, or allow more time",
            Self::Contract(_) => "report this: it is a fault of vmkeep",
        }
    }
}

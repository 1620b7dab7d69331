//! What can go wrong with a vault, each with a stable code and a remedy.
//!
//! One rule above all: *absent* is never said of what merely could not be read (`FORMAT.md`, §1 and §3). A damaged object
//! is [`VaultError::Damaged`], one that its backend did not give is [`VaultError::Backend`], and only a certain answer
//! becomes [`VaultError::Missing`].

use crate::backend::{BackendError, BackendErrorKind};
use crate::ids::VaultId;

/// Why something could not be done with a vault.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The place did not do what it was asked for.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// An object is there, and its bytes are not those that were put.
    #[error("{object} is damaged: {cause}")]
    Damaged {
        /// Its name.
        object: String,
        /// What does not fit.
        cause: String,
    },
    /// An object that must be there certainly is not.
    #[error("{object} is missing")]
    Missing {
        /// Its name, or what it is.
        object: String,
    },
    /// There is no header.
    #[error("{place} holds no vault")]
    NoVault {
        /// The backend.
        place: String,
    },
    /// There is a header already, or there are two.
    #[error("{place} holds {}", describe(.found))]
    Occupied {
        /// The backend.
        place: String,
        /// The vaults whose headers are there.
        found: Vec<VaultId>,
    },
    /// The header is not the one that this host has known since it was attached.
    #[error("the header of vault {vault} differs from the one that this host knows")]
    HeaderChanged {
        /// The vault.
        vault: VaultId,
    },
    /// A key was given, and the header says that there is no encryption.
    #[error("a key was given, but vault {vault} says that it has no encryption")]
    NotEncrypted {
        /// The vault.
        vault: VaultId,
    },
    /// No key was given for an encrypted vault.
    #[error("vault {vault} is encrypted and no key was given")]
    KeyNeeded {
        /// The vault.
        vault: VaultId,
    },
    /// The key does not open this vault.
    #[error("the key does not open vault {vault}")]
    WrongKey {
        /// The vault.
        vault: VaultId,
    },
    /// Something about a key that is to be made or read.
    #[error("key: {0}")]
    Key(#[from] crate::keys::KeyError),
    /// The vault, or an object, is of a format that came later.
    #[error("{object} needs a newer version of vmkeep: it is of format {found}, known is {known}")]
    Newer {
        /// The object.
        object: String,
        /// What it asks for.
        found: u32,
        /// What this program knows.
        known: u32,
    },
    /// The vault may be read only: it is newer, or a key for more is lacking.
    #[error("vault {vault} can only be read: {cause}")]
    ReadOnly {
        /// The vault.
        vault: VaultId,
        /// Why.
        cause: String,
    },
    /// Nothing may be copied from this vault into that.
    #[error("nothing is copied: {cause}")]
    CopyRefused {
        /// Why.
        cause: &'static str,
    },
    /// The lease was revoked: others no longer wait for what was under way.
    #[error("the lease {lease} was revoked")]
    Revoked {
        /// The lease.
        lease: crate::ids::LeaseId,
    },
    /// What a caller handed over does not fit its contract.
    #[error("{0}")]
    Contract(String),
    /// Blobs that are bad or missing in every place, so that something could not be read.
    #[error("{lost} of the blobs needed are bad or missing, first {first}")]
    Lost {
        /// How many.
        lost: u64,
        /// The first of them.
        first: String,
    },
    /// The source of data, or the sink, failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// A task of this program ended before its time.
    #[error("a task of the vault ended before its time: {0}")]
    Task(#[from] tokio::task::JoinError),
}

fn describe(found: &[VaultId]) -> String {
    match found {
        [one] => format!("the vault {one} already"),
        many => {
            let names: Vec<String> = many.iter().map(ToString::to_string).collect();
            format!("the headers of several vaults, which met when they were made: {}", names.join(", "))
        }
    }
}

impl VaultError {
    /// A stable name of the kind of failure.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Backend(error) => match error.kind {
                BackendErrorKind::Transient => "VAULT_UNREACHABLE",
                BackendErrorKind::Full => "VAULT_FULL",
                BackendErrorKind::Denied => "VAULT_DENIED",
                BackendErrorKind::Broken => "VAULT_BROKEN",
            },
            Self::Damaged { .. } => "VAULT_OBJECT_DAMAGED",
            Self::Missing { .. } => "VAULT_OBJECT_MISSING",
            Self::NoVault { .. } => "VAULT_NOT_FOUND",
            Self::Occupied { .. } => "VAULT_OCCUPIED",
            Self::HeaderChanged { .. } => "VAULT_HEADER_CHANGED",
            Self::NotEncrypted { .. } => "VAULT_NOT_ENCRYPTED",
            Self::KeyNeeded { .. } => "VAULT_KEY_NEEDED",
            Self::WrongKey { .. } => "VAULT_WRONG_KEY",
            Self::Key(_) => "VAULT_KEY",
            Self::Newer { .. } => "VAULT_NEWER",
            Self::ReadOnly { .. } => "VAULT_READ_ONLY",
            Self::CopyRefused { .. } => "VAULT_COPY_REFUSED",
            Self::Revoked { .. } => "VAULT_LEASE_REVOKED",
            Self::Contract(_) => "VAULT_CONTRACT",
            Self::Lost { .. } => "VAULT_DATA_LOST",
            Self::Io(_) => "VAULT_SOURCE_OR_SINK",
            Self::Task(_) => "VAULT_TASK",
        }
    }

    /// What somebody can do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Backend(error) => match error.kind {
                BackendErrorKind::Transient => {
                    "see whether the place can be reached; the job goes on from there"
                }
                BackendErrorKind::Full => "make room, or prune and collect; what was put stays and is reused",
                BackendErrorKind::Denied => "check the credentials and the rights of the folder",
                BackendErrorKind::Broken => "run `vmkeep vault check --backend`",
            },
            Self::Damaged { .. } | Self::Lost { .. } => {
                "run `vmkeep vault check`, then `vmkeep vault repair`; the next backup writes anew what it still has"
            }
            Self::Missing { .. } => "run `vmkeep vault check`: it names the backups that are hurt",
            Self::NoVault { .. } => "see whether the folder is mounted, or run `vmkeep vault init`",
            Self::Occupied { .. } => {
                "attach the vault that is there; of two that met remove the one that you do not want"
            }
            Self::HeaderChanged { .. } | Self::NotEncrypted { .. } => {
                "somebody exchanged the vault: look at the place; `vmkeep vault repair --header` puts the known one back"
            }
            Self::KeyNeeded { .. } | Self::WrongKey { .. } | Self::Key(_) => {
                "give the passphrase, the key file or the 24 words of this vault"
            }
            Self::Newer { .. } => "use a newer version of vmkeep",
            Self::ReadOnly { .. } => "use a newer version of vmkeep, or a host that holds the full key",
            Self::CopyRefused { .. } => {
                "copy into another vault, and into an encrypted one unless the copy may lie in the open"
            }
            Self::Revoked { .. } => "nothing: the backup is settled, or made again",
            Self::Contract(_) | Self::Task(_) => "report this: it is a fault of vmkeep",
            Self::Io(_) => "see to the disk that was read or written",
        }
    }

    /// An object whose bytes do not fit.
    #[expect(clippy::needless_pass_by_value, reason = "names and causes are made for the call")]
    pub(crate) fn damaged(object: impl ToString, cause: impl ToString) -> Self {
        Self::Damaged { object: object.to_string(), cause: cause.to_string() }
    }
}

//! What a refusal of an SFTP server means. Version 3 has few words: a full disk is a "failure" like any other, so after one
//! the server is asked what is free.

use std::fmt;

use super::protocol::{EXISTS, FAILURE, NO_SPACE, PERMISSION_DENIED, QUOTA, READ_ONLY};
use super::session::Failure;
use super::{Connected, Inner};
use crate::backend::BackendErrorKind;

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Reason {
    Sftp(Failure),
    Other(BackendErrorKind, String),
}

impl Reason {
    pub(super) fn broken(cause: impl Into<String>) -> Self {
        Self::Other(BackendErrorKind::Broken, cause.into())
    }

    pub(super) fn kind(&self) -> BackendErrorKind {
        match self {
            Self::Other(kind, _) => *kind,
            Self::Sftp(Failure::Ended(_)) => BackendErrorKind::Transient,
            Self::Sftp(Failure::Status { code, .. }) => match *code {
                PERMISSION_DENIED | READ_ONLY => BackendErrorKind::Denied,
                NO_SPACE | QUOTA => BackendErrorKind::Full,
                _ => BackendErrorKind::Broken,
            },
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sftp(failure) => failure.fmt(f),
            Self::Other(_, cause) => f.write_str(cause),
        }
    }
}

impl From<Failure> for Reason {
    fn from(failure: Failure) -> Self {
        Self::Sftp(failure)
    }
}

impl Failure {
    /// The name may be taken: in version 3 that is a failure like any other.
    pub(super) fn may_be_taken(&self) -> bool {
        matches!(self.code(), Some(FAILURE | EXISTS))
    }
}

impl Inner {
    /// A refusal to take so many bytes: is it for want of room?
    pub(super) async fn full_or(&self, connected: &Connected, failure: Failure, bytes: u64) -> Reason {
        if failure.code() != Some(FAILURE) {
            return failure.into();
        }
        match connected.free(&self.root).await {
            Ok(Some(free)) if free.bytes <= bytes || !free.files => {
                let cause = format!("{} bytes are free there, and {bytes} were to be put", free.bytes);
                Reason::Other(BackendErrorKind::Full, cause)
            }
            _ => failure.into(),
        }
    }
}

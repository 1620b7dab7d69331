//! What can go wrong in the test bed itself. A test usually just unwraps these: the text says what to look at.

use std::{io, path::PathBuf, time::Duration};

/// The result of everything in the test bed.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of the test bed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("{doing} {path}: {source}")]
    Io {
        /// What was being done, as a verb.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}: {source} (scripts/install-deps installs what the test bed needs)")]
    Spawn {
        /// Its name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program ended with a failure.
    #[error("{command}: {status}: {output}")]
    Command {
        /// Program and arguments.
        command: String,
        /// The exit status.
        status: String,
        /// What it wrote to both outputs.
        output: String,
    },
    /// Something did not come about in time.
    #[error("waited {} s for {what}; last seen: {seen}", after.as_secs())]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
        /// What was there instead.
        seen: String,
    },
    /// A program's answer was not understood.
    #[error("{what} is not understood: {answer}")]
    Unclear {
        /// Which answer.
        what: String,
        /// The answer, or the part that is wrong.
        answer: String,
    },
    /// The guest refused a command.
    #[error("the guest answered {command:?} with: {answer}")]
    Refused {
        /// The command.
        command: String,
        /// The answer.
        answer: String,
    },
    /// The kernel or the RAM disk of the test guest is missing or outdated.
    #[error("no current test guest in {looked}: run scripts/install-deps --guest")]
    NoGuestParts {
        /// The folders that were looked at.
        looked: String,
    },
    /// Run as root, and the unprivileged user does not exist.
    #[error("the user {user} does not exist: run scripts/install-deps --user")]
    NoUser {
        /// Its name.
        user: String,
    },
    /// The folder cannot be used.
    #[error("{path}: {why}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// There is no such domain, disk, process or file.
    #[error("there is no {what}")]
    Missing {
        /// What is missing.
        what: String,
    },
}

/// Adds what was being done, and to which path, to an `io::Error`.
pub(crate) trait IoContext<T> {
    fn doing(self, doing: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn doing(self, doing: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| Error::Io { doing, path: path.into(), source })
    }
}

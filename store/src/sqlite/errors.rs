//! What SQLite's failures mean for an append.
//!
//! The question is always the same: may the records be there after the next start? In WAL mode a transaction is there if
//! all its frames, the last of which carries the commit mark, reached the log; only then does SQLite count it in the
//! index. So:
//!
//! - Anything that fails *before* `COMMIT` wrote no commit mark: nothing was written.
//! - `SQLITE_FULL` at `COMMIT` comes from the write of a frame that did not fit, so the commit mark is not there either.
//!   A spent quota and a file size limit are the same thing under another name (`SQLITE_IOERR_WRITE`), told apart by trying
//!   out a write.
//! - A failed fsync ([`Kind::Sync`]): the kernel may have dropped the pages and marked them clean; a second fsync would
//!   lie. The process must end; the next one reads what is there.
//! - Any other failure at `COMMIT` (no memory or no shared memory for the index, an I/O error) may come after the
//!   complete frames were written: this process will not see them, the next one may. *Unknown.*
//! - A damaged database ([`Kind::Damage`]) is not written to any more.

use rusqlite::{Error, ErrorCode, ffi};
use vmkeep_workflow::journal::{AppendError, StoreError};

/// What a failure of SQLite is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// There is no room, and what was to be written is not complete.
    Full,
    /// A write failed. It may be for want of room, under a name that SQLite does not know.
    Write,
    /// The index in shared memory could not grow. Mostly for want of room; the frames themselves may be written.
    Index,
    /// An fsync failed.
    Sync,
    /// The file is not what it should be.
    Damage,
    /// Anything else.
    Other,
}

/// What a failure is about.
pub(super) fn kind(error: &Error) -> Kind {
    let Error::SqliteFailure(failure, _) = error else {
        // The rest are values of a type that the schema does not allow, or our own mistakes.
        return if matches!(error, Error::FromSqlConversionFailure(..) | Error::InvalidColumnType(..)) {
            Kind::Damage
        } else {
            Kind::Other
        };
    };
    match failure.extended_code {
        ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC => Kind::Sync,
        ffi::SQLITE_IOERR_WRITE => Kind::Write,
        ffi::SQLITE_IOERR_SHMSIZE | ffi::SQLITE_IOERR_SHMOPEN => Kind::Index,
        _ => match failure.code {
            ErrorCode::DiskFull => Kind::Full,
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => Kind::Damage,
            _ => Kind::Other,
        },
    }
}

/// A failure of reading, with what was being done.
pub(super) fn unread(doing: &str, error: &Error) -> StoreError {
    match kind(error) {
        Kind::Damage => StoreError::Damaged(format!("could not {doing}: {error}")),
        _ => StoreError::Io(format!("could not {doing}: {error}")),
    }
}

/// A transaction that failed and was rolled back.
#[derive(Debug)]
pub(super) struct Failed {
    /// Whether `COMMIT` had been attempted.
    pub(super) at_commit: bool,
    /// The failure.
    pub(super) error: Error,
    /// Whether the rollback failed as well, so that the connection is of no more use.
    pub(super) stuck: bool,
}

impl Failed {
    /// Whether more room may help. `lacks_room` tries whether writes fail for want of room.
    pub(super) fn wants_room(&self, lacks_room: impl FnOnce() -> bool) -> bool {
        match kind(&self.error) {
            Kind::Full => true,
            Kind::Write | Kind::Index => lacks_room(),
            _ => false,
        }
    }

    /// Whether the appends of a group may fare differently one by one.
    pub(super) fn may_differ_alone(&self) -> bool {
        let doubtful = self.at_commit && !matches!(kind(&self.error), Kind::Full | Kind::Write);
        !(self.is_fatal() || doubtful)
    }

    /// Whether the process must end.
    pub(super) fn is_fatal(&self) -> bool {
        self.stuck || matches!(kind(&self.error), Kind::Sync | Kind::Damage)
    }

    /// What the caller is told.
    pub(super) fn answer(&self, lacks_room: impl Fn() -> bool) -> AppendError {
        let text = self.error.to_string();
        if self.is_fatal() {
            return AppendError::Fatal(text);
        }
        match kind(&self.error) {
            Kind::Full => AppendError::Full(text),
            Kind::Write if lacks_room() => AppendError::Full(text),
            _ if self.at_commit => AppendError::Unknown(text),
            Kind::Index if lacks_room() => AppendError::Full(text),
            _ => AppendError::Rejected(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(at_commit: bool, code: i32) -> Failed {
        Failed { at_commit, error: Error::SqliteFailure(ffi::Error::new(code), None), stuck: false }
    }

    #[test]
    fn before_the_commit_nothing_was_written_and_no_answer_says_otherwise() {
        for code in [ffi::SQLITE_IOERR_READ, ffi::SQLITE_NOMEM, ffi::SQLITE_BUSY, ffi::SQLITE_IOERR_WRITE] {
            let answer = failed(false, code).answer(|| false);
            assert!(matches!(answer, AppendError::Rejected(_)), "{code}: {answer:?}");
        }
    }

    #[test]
    fn at_the_commit_only_want_of_room_is_known_not_to_have_written() {
        for code in [ffi::SQLITE_IOERR_WRITE, ffi::SQLITE_IOERR_SHMSIZE, ffi::SQLITE_NOMEM, ffi::SQLITE_IOERR]
        {
            let answer = failed(true, code).answer(|| false);
            assert!(matches!(answer, AppendError::Unknown(_)), "{code}: {answer:?}");
        }
        assert!(matches!(failed(true, ffi::SQLITE_FULL).answer(|| false), AppendError::Full(_)));
        assert!(matches!(failed(true, ffi::SQLITE_IOERR_WRITE).answer(|| true), AppendError::Full(_)));
        // The index grows after the frames were written.
        assert!(matches!(failed(true, ffi::SQLITE_IOERR_SHMSIZE).answer(|| true), AppendError::Unknown(_)));
    }

    #[test]
    fn a_failed_fsync_and_a_damaged_file_are_fatal_at_any_time() {
        for code in
            [ffi::SQLITE_IOERR_FSYNC, ffi::SQLITE_IOERR_DIR_FSYNC, ffi::SQLITE_CORRUPT, ffi::SQLITE_NOTADB]
        {
            for at_commit in [false, true] {
                let failed = failed(at_commit, code);
                assert!(matches!(failed.answer(|| true), AppendError::Fatal(_)), "{code}");
                assert!(!failed.may_differ_alone(), "a fatal failure is never tried again");
            }
        }
    }
}

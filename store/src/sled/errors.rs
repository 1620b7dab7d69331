//! What sled's failures mean.

use std::io::ErrorKind;

use sled::Error;
use vmkeep_workflow::journal::StoreError;

use crate::files;

/// A failure of reading, with what was being done.
pub(super) fn unread(doing: &str, error: &Error) -> StoreError {
    match error {
        // It reads what it knows to have written: where a file ends too early, the medium is sound and the file is not.
        Error::Io(io) if io.kind() == ErrorKind::UnexpectedEof => {
            StoreError::Damaged(format!("could not {doing}: its files are too short ({error})"))
        }
        Error::Io(_) => StoreError::Io(format!("could not {doing}: {error}")),
        // What it calls unsupported or a bug is what it finds in its files; what it calls a collection is a tree.
        _ => StoreError::Damaged(format!("could not {doing}: {error}")),
    }
}

/// Whether there was no room.
pub(super) fn is_full(error: &Error) -> bool {
    // sled hands its first failure on as a copy that keeps the kind.
    matches!(error, Error::Io(error) if files::is_lack_of_room(error))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_file_that_ends_too_early_is_damage_and_a_disk_that_fails_is_not() {
        let torn = Error::Io(io::Error::from(ErrorKind::UnexpectedEof));
        assert!(matches!(unread("read", &torn), StoreError::Damaged(_)));
        let broken = Error::Io(io::Error::from_raw_os_error(5));
        assert!(matches!(unread("read", &broken), StoreError::Io(_)));
    }
}

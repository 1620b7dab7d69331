//! What sled's failures mean.

use sled::Error;
use vmkeep_workflow::journal::StoreError;

use crate::files;

/// A failure of reading, with what was being done.
pub(super) fn unread(doing: &str, error: &Error) -> StoreError {
    match error {
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

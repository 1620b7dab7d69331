//! Which backups there are: found by looking for manifests below a root, and by nothing else.
//!
//! Not a link is followed, and not more than a few levels are descended. A folder that has a manifest is a backup and is
//! not searched further. A manifest that cannot be read is reported with its reason: a backup that became unreadable must
//! be seen, not vanish from the list.

use std::path::PathBuf;

use rustix::fs::FileType;

use super::file::{ManifestError, Stored, read};
use super::folder::{MANIFEST, job_of};
use crate::image::root::{Component, Folder, RelPath, RootError, TargetRoot};

/// How deep backups may lie below a root: target, domain, backup, and one to spare.
const DEEPEST: usize = 4;

/// A folder that holds something of ours.
#[derive(Debug)]
pub enum Entry {
    /// A backup.
    Backup {
        /// Its folder.
        path: PathBuf,
        /// Its manifest.
        stored: Box<Stored>,
    },
    /// A backup whose manifest cannot be read.
    Unreadable {
        /// Its folder.
        path: PathBuf,
        /// Why.
        error: ManifestError,
    },
    /// A folder of a job that has not published anything (yet).
    Unpublished {
        /// The folder.
        path: PathBuf,
        /// The short id of the job.
        job: String,
    },
}

impl Entry {
    /// The backup, if it is one.
    #[must_use]
    pub fn stored(&self) -> Option<&Stored> {
        match self {
            Self::Backup { stored, .. } => Some(stored),
            Self::Unreadable { .. } | Self::Unpublished { .. } => None,
        }
    }
}

/// Everything of ours below a root, by path. Blocks.
pub fn scan(root: &TargetRoot) -> Result<Vec<Entry>, RootError> {
    let mut found = Vec::new();
    descend(root.folder(), None, DEEPEST, &mut found)?;
    Ok(found)
}

fn descend(
    folder: &Folder,
    name: Option<&Component>,
    levels: usize,
    found: &mut Vec<Entry>,
) -> Result<(), RootError> {
    let entries = folder.entries()?;
    let path = folder.path().to_owned();
    if entries.iter().any(|(name, _)| name.as_str() == MANIFEST) {
        match read(folder) {
            Ok(stored) => found.push(Entry::Backup { path, stored: Box::new(stored) }),
            // Somebody else's file of that name.
            Err(ManifestError::Foreign) if name.and_then(job_of).is_none() => {}
            Err(error) => found.push(Entry::Unreadable { path, error }),
        }
        return Ok(());
    }
    if let Some(job) = name.and_then(job_of) {
        found.push(Entry::Unpublished { path, job: job.to_owned() });
        return Ok(());
    }
    if levels == 0 {
        return Ok(());
    }
    for (name, kind) in entries {
        if kind != FileType::Directory {
            continue;
        }
        match folder.open_folder(&RelPath::from(name.clone())) {
            Ok(below) => descend(&below, Some(&name), levels - 1, found)?,
            // Gone meanwhile, not ours to enter, or swapped for a link: nothing of ours is in there.
            Err(RootError::Missing { .. } | RootError::Escapes { .. } | RootError::WrongKind { .. }) => {}
            Err(RootError::Io { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {}
            Err(other) => return Err(other),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tests/catalogue.rs"]
mod tests;

//! Which backups there are: found by looking for manifests below a root, and by nothing else.
//!
//! Not a link is followed, and not more than a few levels are descended. A folder that has a manifest is a backup and is
//! not searched further. A manifest that cannot be read is reported with its reason: a backup that became unreadable must
//! be seen, not vanish from the list. So must a folder that cannot be entered: nobody knows what lies in it.
//!
//! [`walk`] does not read again what its caller knows: a manifest whose [`Stamp`] is the same is the same. Published
//! manifests are never written to, and a new one is a new file, so what could deceive it is somebody who edits one in
//! place within the same tick of the file system's clock as it was read, and keeps its length; the hash, which every
//! step that relies on a manifest compares, is what finds that.

use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};
use serde::{Deserialize, Serialize};

use super::file::{ManifestError, Stored, read, read_withdrawn};
use super::folder::{MANIFEST, PROTECTION, WITHDRAWN, fixed, job_of};
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
    /// A folder that cannot be looked into, whatever is in it.
    Barred {
        /// The folder.
        path: PathBuf,
        /// Why.
        error: RootError,
    },
    /// What is left of a backup whose deletion was begun.
    Withdrawn {
        /// Its folder.
        path: PathBuf,
        /// Its manifest, if it can be read.
        stored: Option<Box<Stored>>,
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
            Self::Unreadable { .. }
            | Self::Barred { .. }
            | Self::Withdrawn { .. }
            | Self::Unpublished { .. } => None,
        }
    }
}

/// Which file it is and when it was last changed in any way, as far as its file system can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last change of the content, in nanoseconds since 1970.
    pub mtime: i64,
    /// Last change of the inode, in nanoseconds since 1970.
    pub ctime: i64,
}

impl FileStamp {
    fn of(stat: &Stat) -> Self {
        let instant =
            |s: i64, ns| s.saturating_mul(1_000_000_000).saturating_add(i64::try_from(ns).unwrap_or(0));
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: instant(stat.st_mtime, stat.st_mtime_nsec),
            ctime: instant(stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

/// What tells whether a backup's manifest, or its protection, has changed since it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// The manifest.
    pub manifest: FileStamp,
    /// The note that protects it, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protection: Option<FileStamp>,
}

/// What a walk came upon.
#[derive(Debug)]
pub enum Met {
    /// A backup that the caller knows, as it knows it.
    Known(PathBuf, Stamp),
    /// A backup with a manifest that was read, and its stamp from before it was read.
    Read(Box<Stored>, PathBuf, Stamp),
    /// Anything else.
    Other(Entry),
}

/// Everything of ours below a root, by path. Blocks.
pub fn scan(root: &TargetRoot) -> Result<Vec<Entry>, RootError> {
    let entry = |met| match met {
        Met::Known(..) => None,
        Met::Read(stored, path, _) => Some(Entry::Backup { path, stored }),
        Met::Other(entry) => Some(entry),
    };
    Ok(walk(root.folder(), &|_, _| false)?.into_iter().filter_map(entry).collect())
}

/// Everything of ours in a folder and below it, by path. Neither the manifest nor the folder of a backup that the caller
/// knows by path and stamp is opened. Blocks.
pub fn walk(folder: &Folder, known: &dyn Fn(&Path, &Stamp) -> bool) -> Result<Vec<Met>, RootError> {
    let mut found = Vec::new();
    descend(folder, None, DEEPEST, known, &mut found)?;
    Ok(found)
}

/// The stamp of a backup's folder by its path; nothing if there is no manifest. For a folder below no root.
#[must_use]
pub fn stamp_at(path: &Path) -> Option<Stamp> {
    let look = |name: &str| rustix::fs::lstat(path.join(name)).ok();
    let manifest = look(MANIFEST)?;
    Some(Stamp {
        manifest: FileStamp::of(&manifest),
        protection: look(PROTECTION).map(|stat| FileStamp::of(&stat)),
    })
}

/// The stamp of a backup's open folder; nothing if there is no manifest.
fn stamp(folder: &Folder) -> Result<Option<Stamp>, RootError> {
    let Some(manifest) = folder.stat(&fixed(MANIFEST))? else { return Ok(None) };
    let protection = folder.stat(&fixed(PROTECTION))?;
    Ok(Some(Stamp {
        manifest: FileStamp::of(&manifest),
        protection: protection.map(|stat| FileStamp::of(&stat)),
    }))
}

fn descend(
    folder: &Folder,
    name: Option<&Component>,
    levels: usize,
    known: &dyn Fn(&Path, &Stamp) -> bool,
    found: &mut Vec<Met>,
) -> Result<(), RootError> {
    let path = folder.path().to_owned();
    // Before the manifest is read: one that is replaced in between is then read again the next time.
    if let Some(stamp) = stamp(folder)? {
        match read(folder) {
            Ok(stored) => found.push(Met::Read(Box::new(stored), path, stamp)),
            // Somebody else's file of that name.
            Err(ManifestError::Foreign) if name.and_then(job_of).is_none() => {}
            Err(error) => found.push(Met::Other(Entry::Unreadable { path, error })),
        }
        return Ok(());
    }
    if folder.stat(&fixed(WITHDRAWN))?.is_some() {
        let stored = read_withdrawn(folder).ok().map(Box::new);
        found.push(Met::Other(Entry::Withdrawn { path, stored }));
        return Ok(());
    }
    if let Some(job) = name.and_then(job_of) {
        found.push(Met::Other(Entry::Unpublished { path, job: job.to_owned() }));
        return Ok(());
    }
    if levels == 0 {
        return Ok(());
    }
    for (name, kind) in folder.entries()? {
        if kind != FileType::Directory {
            continue;
        }
        let below = path.join(name.as_str());
        // By path: a link that somebody puts in the place of the folder now leads to another file, with another stamp.
        if let Some(stamp) = stamp_at(&below).filter(|stamp| known(&below, stamp)) {
            found.push(Met::Known(below, stamp));
            continue;
        }
        let opened = folder.open_folder(&RelPath::from(name.clone()));
        match opened.and_then(|folder| descend(&folder, Some(&name), levels - 1, known, found)) {
            Ok(()) => {}
            // Gone meanwhile, or swapped for a link: nothing of ours is in there.
            Err(RootError::Missing { .. } | RootError::Escapes { .. } | RootError::WrongKind { .. }) => {}
            // The file system's own, which only root may enter.
            Err(_) if name.as_str() == "lost+found" => {}
            Err(error) => found.push(Met::Other(Entry::Barred { path: below, error })),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "tests/catalogue.rs"]
mod tests;

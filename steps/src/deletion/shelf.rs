//! The backups of a domain as they are now: from their folders, never from a cache. What is removed is decided by what
//! this finds.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use uuid::Uuid;
use vmkeep_workflow::{Code, Fault};

use super::options::{Chosen, Doomed};
use super::rule::{Candidate, Standing};
use crate::codes;
use crate::image::qemu_img::QemuImg;
use crate::image::root::{Folder, RelPath, RootError};
use crate::manifest::catalogue::{Entry, scan};
use crate::manifest::folder::{WITHDRAWN, fixed};
use crate::manifest::{self, Depth, ManifestError, Stored, protection};
use crate::snapshot::Places;
use crate::snapshot::copy::place_fault;

/// A backup that was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// What the rule needs to know.
    pub candidate: Candidate,
    /// Its folder.
    pub folder: PathBuf,
    /// Its manifest.
    pub stored: Stored,
}

impl Found {
    /// As one that is going to be removed.
    #[must_use]
    pub fn doomed(&self) -> Doomed {
        doomed(self.folder.clone(), &self.stored)
    }
}

fn doomed(folder: PathBuf, stored: &Stored) -> Doomed {
    let manifest = &stored.manifest;
    Doomed {
        backup: manifest.backup,
        folder,
        manifest: stored.hash,
        files: manifest.files.len() as u64,
        bytes: manifest.size(),
    }
}

/// The backups of a domain below all roots, each once, and what could not be looked at. Blocks.
#[must_use]
pub fn of_domain(places: &Places, domain: Uuid, now: Timestamp) -> (Vec<Found>, Vec<String>) {
    let (mut found, mut notes) = (Vec::<Found>::new(), Vec::new());
    for root in places.roots.iter() {
        let path = root.folder().path();
        let entries = match scan(root) {
            Ok(entries) => entries,
            Err(error) => {
                notes.push(format!("{} could not be searched: {error}", path.display()));
                continue;
            }
        };
        for entry in entries {
            match entry {
                Entry::Backup { path: folder, stored } if stored.manifest.domain.uuid == domain => {
                    // Of roots within each other the deepest counts.
                    match found.iter_mut().find(|one| one.folder == folder) {
                        Some(one) if path.starts_with(&one.candidate.root) => {
                            one.candidate.root = path.to_owned();
                        }
                        Some(_) => {}
                        None => found.push(judge(places, path, folder, *stored, now)),
                    }
                }
                Entry::Unreadable { path, error } => {
                    notes.push(format!("{} cannot be read and does not count: {error}", path.display()));
                }
                Entry::Barred { path, error } => {
                    notes.push(format!("{} cannot be looked into: {error}", path.display()));
                }
                _ => {}
            }
        }
    }
    (found, notes)
}

fn judge(places: &Places, root: &Path, folder: PathBuf, stored: Stored, now: Timestamp) -> Found {
    let standing = match places.roots.open_folder(&folder) {
        Ok(open) => standing(&open, &stored, now),
        Err(error) => Standing::Damaged(error.to_string()),
    };
    let manifest = &stored.manifest;
    let candidate =
        Candidate { backup: manifest.backup, root: root.to_owned(), at: manifest.point_in_time, standing };
    Found { candidate, folder, stored }
}

/// How a backup stands: every file that the manifest names is looked at.
#[must_use]
pub fn standing(folder: &Folder, stored: &Stored, now: Timestamp) -> Standing {
    match manifest::verify(folder, stored, Depth::Quick, &QemuImg::default(), None, &()) {
        Err(error) => return Standing::Damaged(error.to_string()),
        Ok(findings) => {
            let serious: Vec<_> =
                findings.iter().filter(|f| f.problem.serious()).map(ToString::to_string).collect();
            if !serious.is_empty() {
                return Standing::Damaged(serious.join("; "));
            }
        }
    }
    match protection::read(folder) {
        Ok(Some(note)) if note.in_force(now) => Standing::Protected(note.words()),
        Ok(_) => Standing::Whole,
        Err(error) => Standing::Protected(format!("whether it is protected cannot be read: {error}")),
    }
}

/// A backup that somebody chose for deletion, with every suspicion. `None` in the second place for one whose deletion was
/// begun before: it is no backup any more, and is only to be finished. Blocks.
///
/// # Errors
/// When it cannot or must not be deleted.
pub fn chosen(
    places: &Places,
    chosen: &Chosen,
    domain: Uuid,
    now: Timestamp,
) -> Result<(Doomed, bool), Fault> {
    let doing = "delete the backup";
    let object = chosen.folder.display().to_string();
    let fail = |code: Code, cause: &dyn std::fmt::Display| Fault::permanent(code, doing, &object, cause);
    let place = |e: &RootError| match e {
        RootError::Missing { .. } => fail(codes::NO_SUCH_BACKUP, e).remedy("vmkeep list"),
        e => place_fault(e, codes::CANNOT_REMOVE_FILE, doing, &object)
            .remedy("Give the folder's real path below a configured root, or the backup's id: vmkeep list"),
    };
    if matches!(places.roots.locate(&chosen.folder), Ok((_, None))) {
        return Err(fail(codes::UNSAFE_PATH, &"it is a configured root and not a folder below one")
            .remedy("Move the backup into a folder of its own, or remove it by hand"));
    }
    let folder = places.roots.open_folder(&chosen.folder).map_err(|e| place(&e))?;
    let (stored, whole) = match manifest::read(&folder) {
        Ok(stored) => (stored, true),
        Err(ManifestError::Place(RootError::Missing { .. })) => match manifest::read_withdrawn(&folder) {
            Ok(stored) => (stored, false),
            Err(ManifestError::Place(e)) => return Err(place(&e)),
            Err(e) => return Err(unknown(&chosen.folder, &e)),
        },
        Err(ManifestError::Place(e)) => return Err(place(&e)),
        Err(e) => return Err(unknown(&chosen.folder, &e)),
    };
    let manifest = &stored.manifest;
    if manifest.backup != chosen.backup || manifest.domain.uuid != domain {
        return Err(fail(codes::MANIFEST_MISMATCH, &"another backup lies in its folder")
            .remedy("Look again: vmkeep list"));
    }
    if whole && folder.stat(&fixed(WITHDRAWN)).map_err(|e| place(&e))?.is_some() {
        return Err(fail(codes::MANIFEST_MISMATCH, &"it has a withdrawn manifest beside its manifest")
            .remedy("Find out which of the two is right, and remove the other by hand"));
    }
    for entry in &manifest.files {
        match folder.open_file(&RelPath::from(entry.name.clone())) {
            Ok(_) | Err(RootError::Missing { .. }) => {}
            Err(RootError::WrongKind { .. } | RootError::Escapes { .. }) => {
                let cause =
                    format!("{} is no regular file: somebody put a link or a folder there", entry.name);
                return Err(
                    fail(codes::UNSAFE_PATH, &cause).remedy("Look at the folder, and mend it by hand")
                );
            }
            Err(e) => return Err(place(&e)),
        }
    }
    if whole {
        allowed(&folder, now).map_err(|why| must_stay(&object, &why))?;
    }
    Ok((doomed(folder.path().to_owned(), &stored), whole))
}

/// Whether no protection forbids a deletion; else the reason.
pub(super) fn allowed(folder: &Folder, now: Timestamp) -> Result<(), String> {
    match protection::read(folder) {
        Ok(Some(note)) if note.in_force(now) => Err(note.words()),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("whether it is protected cannot be read: {error}")),
    }
}

/// The refusal to delete a protected backup.
pub(super) fn must_stay(object: &str, why: &str) -> Fault {
    Fault::permanent(codes::INVALID_STATE, "delete the backup", object, why)
        .remedy("If it may go after all: vmkeep unprotect BACKUP")
}

fn unknown(folder: &Path, error: &ManifestError) -> Fault {
    let code = match error {
        ManifestError::TooNew { .. } => codes::MANIFEST_TOO_NEW,
        _ => codes::MANIFEST_MISMATCH,
    };
    let cause = format!("which files belong to it is not known: {error}");
    Fault::permanent(code, "delete the backup", folder.display().to_string(), cause)
        .remedy("Look at the folder, and remove it by hand if it may go")
}

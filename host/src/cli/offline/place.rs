//! The folder of a restore without a daemon, and what it says of itself.
//!
//! There is no journal, so the folder itself has to tell whoever comes next what it is. A *note* is durable in it before
//! anything else is: which backup it is of, the new domain's name and UUID, the files that belong there and their roots.
//! With it the same command goes on after whatever ended the last one, and any other is refused. When all is done the note
//! changes its name, and from then on the folder is a restored machine, which nothing writes into. A folder that holds
//! anything without a note is somebody's.
//!
//! Whoever works in the folder holds it locked, and a process that dies lets go of it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmkeep_steps::image::root::{Component, Folder, RelPath, RootError};
use vmkeep_vault::ids::{BackupId, BlobId, VaultId};
use vmkeep_workflow::Fault;

use crate::cli::vault::export::{folder, place_fault, root_error};
use crate::codes;
use crate::text::safe;

const DOING: &str = "prepare the folder of the restore";
/// The note while something is still to be done, and after that.
const UNFINISHED: &str = "vmkeep-restore.unfinished";
const FINISHED: &str = "vmkeep-restore.json";
const NEW: &str = "vmkeep-restore.new";
/// No note is longer.
const LONGEST: u64 = 1 << 20;
/// Others may pass through the folder, as QEMU's user must, and cannot list it.
const PASSABLE: u32 = 0o711;

/// What a folder says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// Of this description.
    version: u32,
    /// The vault.
    pub(super) vault: VaultId,
    /// The backup.
    pub(super) backup: BackupId,
    /// The new domain's name.
    pub(super) name: String,
    /// Its UUID.
    pub(super) uuid: Uuid,
    /// The files.
    pub(super) files: Vec<Noted>,
}

/// A file that belongs there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Noted {
    /// Its name.
    pub(super) file: Component,
    /// A disk's target or a stream's name.
    pub(super) what: String,
    /// `raw` or `qcow2`.
    pub(super) format: String,
    /// Its content's root.
    pub(super) root: BlobId,
}

impl Note {
    /// Of a new domain, whose UUID is made here.
    pub(super) fn new(vault: VaultId, backup: BackupId, name: &str, files: Vec<Noted>) -> Self {
        Self { version: 1, vault, backup, name: name.to_owned(), uuid: Uuid::new_v4(), files }
    }

    fn is_of_the_same(&self, other: &Self) -> bool {
        *self == Self { uuid: self.uuid, ..other.clone() }
    }
}

/// What a folder is found to be.
pub(super) enum Taken {
    /// To be worked in.
    Ours(Place),
    /// An equal restore is finished there.
    Finished(Folder, Note),
}

/// A folder that this process alone works in.
pub(super) struct Place {
    pub(super) folder: Folder,
    pub(super) note: Note,
    /// Whether it goes on with what another process has begun.
    pub(super) resumed: bool,
}

/// The UUID of the domain of a restore that was begun or finished there; nothing if there is none. Only a look, so that a
/// folder's own domain is not taken for another's: [`Place::take`] decides.
pub(super) fn begun(path: &Path) -> Option<Uuid> {
    let note = |file: &str| {
        let text = std::fs::read(path.join(file)).ok()?;
        serde_json::from_slice::<Note>(&text).ok()
    };
    note(UNFINISHED).or_else(|| note(FINISHED)).map(|note| note.uuid)
}

fn name(text: &str) -> Component {
    Component::encoded(text)
}

/// The refusal of a folder in which a restore is finished.
pub(super) fn finished(folder: &Folder, done: &Result<Note, serde_json::Error>, more: &str) -> Fault {
    let cause = format!("{} was restored there, and is finished{more}", described(done));
    refused(folder, cause, "Take another folder: `--folder`")
}

fn refused(folder: &Folder, cause: impl Into<String>, remedy: impl Into<String>) -> Fault {
    let path = folder.path().display().to_string();
    Fault::permanent(codes::BACKUP_EXISTS, DOING, path, cause.into()).remedy(remedy.into())
}

impl Place {
    /// Makes the folder, or takes up one that an equal restore has left unfinished, or finished.
    pub(super) fn take(path: &Path, wanted: Note) -> Result<Taken, Fault> {
        let placed = |error: &RootError| place_fault(error);
        let made = !path.exists();
        let folder = folder(path)?;
        if made {
            let mode = rustix::fs::Mode::from_raw_mode(PASSABLE);
            rustix::fs::fchmod(&folder, mode)
                .map_err(|e| placed(&root_error("set the mode of", path.to_owned(), e.into())))?;
        }
        if rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).is_err() {
            let cause = "another process works in that folder";
            let path = path.display().to_string();
            return Err(Fault::permanent(codes::INVALID_STATE, DOING, path, cause)
                .remedy("Wait until it has ended, or take another folder: `--folder`"));
        }
        if let Some(done) = read(&folder, FINISHED)? {
            return match done {
                Ok(note) if wanted.is_of_the_same(&note) => Ok(Taken::Finished(folder, note)),
                other => Err(finished(&folder, &other, "")),
            };
        }
        if let Some(note) = read(&folder, UNFINISHED)? {
            let Ok(note) = note else {
                let cause = "a restore was begun there by another release of vmkeep";
                return Err(refused(&folder, cause, "Take another folder: `--folder`; or remove that one"));
            };
            if !wanted.is_of_the_same(&note) {
                let cause = format!("the restore of {} is unfinished there", described(&Ok(note)));
                let remedy = "Do that again to finish it, remove the folder, or take another one: `--folder`";
                return Err(refused(&folder, cause, remedy));
            }
            return Ok(Taken::Ours(Self { folder, note, resumed: true }));
        }
        let names = folder.names().map_err(|error| placed(&error))?;
        if let Some(other) = names.iter().find(|name| *name != NEW) {
            let cause = format!("it holds {}, and no restore has begun there", safe(other));
            return Err(refused(&folder, cause, "Take a new or an empty folder: `--folder`"));
        }
        let place = Self { folder, note: wanted, resumed: false };
        let text = serde_json::to_vec_pretty(&place.note)
            .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, DOING, "", e))?;
        place.put(&name(UNFINISHED), &name(NEW), &text)?;
        Ok(Taken::Ours(place))
    }

    /// Writes a small file of the restore's own, in place of an earlier one. Durable on return.
    pub(super) fn put(&self, file: &Component, aside: &Component, bytes: &[u8]) -> Result<(), Fault> {
        let write = || {
            self.folder.remove_file(aside)?;
            let mut new = self.folder.create_file(aside)?;
            let failed = |error| root_error("write", self.folder.path_of(file), error);
            new.write_all(bytes).and_then(|()| new.sync_all()).map_err(failed)?;
            self.folder.replace(aside, file)?;
            self.folder.sync()
        };
        write().map_err(|error| place_fault(&error))
    }

    /// Says that all is done. Durable on return.
    pub(super) fn finish(&self) -> Result<(), Fault> {
        let renamed = self.folder.rename(&name(UNFINISHED), &name(FINISHED));
        renamed.and_then(|()| self.folder.sync()).map_err(|error| place_fault(&error))
    }

    /// Whether those who are not its owner may pass through the folder.
    pub(super) fn is_passable(&self) -> bool {
        rustix::fs::fstat(&self.folder).is_ok_and(|stat| stat.st_mode & 0o001 != 0)
    }
}

type Read = Option<Result<Note, serde_json::Error>>;

fn read(folder: &Folder, file: &str) -> Result<Read, Fault> {
    let opened: Result<File, RootError> = folder.open_file(&RelPath::from(name(file)));
    let file = match opened {
        Ok(file) => file,
        Err(RootError::Missing { .. }) => return Ok(None),
        Err(error) => return Err(place_fault(&error)),
    };
    let mut bytes = Vec::new();
    let read = file.take(LONGEST).read_to_end(&mut bytes);
    read.map_err(|e| place_fault(&root_error("read", folder.path().to_owned(), e)))?;
    Ok(Some(serde_json::from_slice(&bytes)))
}

fn described(note: &Result<Note, serde_json::Error>) -> String {
    match note {
        Ok(note) => format!("the backup {} as {}", note.backup, safe(&note.name)),
        Err(_) => "a backup".to_owned(),
    }
}

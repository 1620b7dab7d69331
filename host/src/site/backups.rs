//! The backups of this host: found through the catalogue, and read from their folders whenever anything depends on it.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use vmkeep_steps::deletion::options::Chosen;
use vmkeep_steps::image::root::{Folder, RootError, Roots, TargetRoot};
use vmkeep_steps::manifest::{self, BackupId, ManifestError, Memory, Stored};
use vmkeep_workflow::{Fault, JobId};

use crate::api::prefix::{self, Found, Shortened, Shorts};
use crate::api::types::{BackupDetail, BackupRow, Backups, MissingRow, ProtectionRow, VerifiedRow};
use crate::catalogue::{Listed, Place, View};
use crate::codes;

impl Shortened for BackupId {
    fn forms(&self) -> Vec<String> {
        JobId::from(self.0).forms()
    }
}

/// A backup that was found.
#[derive(Clone, Debug)]
pub(super) struct Backup {
    pub(super) path: PathBuf,
    /// It lies below no root: the requester has named its folder.
    pub(super) outside: bool,
    pub(super) stored: Stored,
    /// It is one whose deletion was begun: no backup any more.
    pub(super) withdrawn: bool,
}

impl Backup {
    pub(super) fn chosen(&self) -> Chosen {
        Chosen { backup: self.stored.manifest.backup, folder: self.path.clone() }
    }
}

/// Everything as rows, newest first.
pub(super) fn rows(view: &View, now: Timestamp) -> Backups {
    let shorts = Shorts::of(&ids(view));
    Backups {
        backups: view.backups.iter().map(|one| listed(one, &shorts, now)).collect(),
        missing: view
            .missing
            .iter()
            .map(|one| MissingRow { backup: row(&one.place, &shorts, now), why: one.why.clone() })
            .collect(),
        in_vaults: Vec::new(),
        warnings: view.warnings.clone(),
        partial: view.partial,
    }
}

/// The row of a backup that is there.
fn listed(one: &Listed, shorts: &Shorts, now: Timestamp) -> BackupRow {
    let verified = one.check.as_ref().map(|check| VerifiedRow {
        at: check.at,
        job: check.job.clone(),
        problem: check.problem.clone(),
    });
    BackupRow { verified, copies: one.copies.clone(), ..row(&one.place, shorts, now) }
}

fn ids(view: &View) -> Vec<BackupId> {
    let mut ids: Vec<_> = view
        .backups
        .iter()
        .map(|one| one.place.backup)
        .chain(view.missing.iter().map(|one| one.place.backup))
        .collect();
    // Two copies of a backup have one id.
    ids.sort();
    ids.dedup();
    ids
}

fn row(place: &Place, shorts: &Shorts, now: Timestamp) -> BackupRow {
    BackupRow {
        id: place.backup.to_string(),
        short: shorts.short(&place.backup),
        domain: place.domain.clone(),
        domain_uuid: place.domain_uuid.clone(),
        at: place.at,
        memory: place.memory,
        disks: place.disks.clone(),
        size: place.size,
        folder: place.folder.clone(),
        job: Some(place.job.clone()),
        protection: place.protection.as_ref().filter(|note| note.in_force(now)).map(|note| ProtectionRow {
            by: note.by.clone(),
            at: note.at,
            until: note.until,
            why: note.why.clone(),
        }),
        verified: None,
        copies: Vec::new(),
    }
}

/// The backup that somebody means: by its folder, or by the beginning of its id. Its manifest is read anew. Blocks.
pub(super) fn find(wanted: &str, roots: &[PathBuf], view: &View) -> Result<Backup, Fault> {
    if wanted.starts_with('/') {
        return in_folder(Path::new(wanted), roots);
    }
    let place = named(wanted, view)?;
    // The catalogue knows its folder, wherever that is; what the folder holds is read from it.
    match from_folder(&place.folder, roots)? {
        one if one.stored.manifest.backup == place.backup => Ok(one),
        _ => Err(none(wanted, "another backup lies in its folder now")),
    }
}

/// The same for a deletion, which must not choose among copies of a backup by itself.
pub(super) fn only(wanted: &str, one: &Backup, view: &View) -> Result<(), Fault> {
    if wanted.starts_with('/') {
        return Ok(());
    }
    let id = one.stored.manifest.backup;
    let copies: Vec<_> = view.backups.iter().filter(|known| known.place.backup == id).collect();
    if copies.len() < 2 {
        return Ok(());
    }
    let folders: Vec<_> = copies.iter().map(|one| one.place.folder.display().to_string()).collect();
    let cause = format!("it lies in several folders: {}", folders.join(", "));
    Err(Fault::permanent(codes::AMBIGUOUS_NAME, "find the backup", wanted, cause).remedy("Name the folder"))
}

/// What the catalogue knows of the backup with an id that begins so.
pub(super) fn named<'v>(wanted: &str, view: &'v View) -> Result<&'v Place, Fault> {
    match prefix::find(wanted, &ids(view)) {
        Found::One(id) => match view.backups.iter().find(|one| one.place.backup == id) {
            Some(one) => Ok(&one.place),
            None => Err(missing(wanted, id, view)),
        },
        Found::None => Err(none(wanted, "no backup below the configured roots has an id that begins so")),
        Found::Many(shown) => Err(prefix::ambiguous("find the backup", wanted, &shown)),
    }
}

/// The missing backup with an id that begins so.
pub(super) fn lost(wanted: &str, view: &View) -> Result<BackupId, Fault> {
    match prefix::find(wanted, &ids(view)) {
        Found::One(id) => Ok(id),
        Found::None => Err(none(wanted, "no backup that is known has an id that begins so")),
        Found::Many(shown) => Err(prefix::ambiguous("find the backup", wanted, &shown)),
    }
}

fn missing(wanted: &str, id: BackupId, view: &View) -> Fault {
    let of = view.missing.iter().find(|one| one.place.backup == id);
    let cause = of.map_or_else(
        || "it is missing".to_owned(),
        |one| format!("it lay in {}: {}", one.place.folder.display(), one.why),
    );
    Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", wanted, cause).remedy(
        "Bring the folder back, or mount its file system. If it is gone for good: vmkeep catalogue forget BACKUP",
    )
}

fn none(wanted: &str, why: &str) -> Fault {
    Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", wanted, why)
        .remedy("List the backups: vmkeep list")
}

fn in_folder(path: &Path, roots: &[PathBuf]) -> Result<Backup, Fault> {
    let folder = open(path, roots)?;
    let of = |stored, withdrawn| Backup { path: folder.path().to_owned(), outside: false, stored, withdrawn };
    match manifest::read(&folder) {
        Ok(stored) => Ok(of(stored, false)),
        Err(error @ ManifestError::Place(RootError::Missing { .. })) => manifest::read_withdrawn(&folder)
            .map(|stored| of(stored, true))
            .map_err(|_| unreadable(path, &error)),
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// The backup in a folder that the requester has named, wherever it lies. Blocks.
pub(super) fn from_folder(path: &Path, roots: &[PathBuf]) -> Result<Backup, Fault> {
    match in_folder(path, roots) {
        Err(fault) if fault.code == codes::TARGET_OUTSIDE_ROOTS => {}
        found => return found,
    }
    let object = path.display().to_string();
    let root = TargetRoot::open(path)
        .map_err(|e| Fault::permanent(codes::NO_SUCH_BACKUP, "open the backup's folder", object, e))?;
    match manifest::read(root.folder()) {
        Ok(stored) => {
            Ok(Backup { path: root.folder().path().to_owned(), outside: true, stored, withdrawn: false })
        }
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// Opens a backup's folder, which must lie below a root.
pub(super) fn open(path: &Path, roots: &[PathBuf]) -> Result<Folder, Fault> {
    let present: Vec<&PathBuf> = roots.iter().filter(|root| root.is_dir()).collect();
    let object = path.display().to_string();
    Roots::open(present).and_then(|roots| roots.open_folder(path)).map_err(|error| {
        let code = match &error {
            RootError::Outside { .. } => codes::TARGET_OUTSIDE_ROOTS,
            RootError::Escapes { .. } | RootError::BadName { .. } => codes::UNSAFE_PATH,
            _ => codes::NO_SUCH_BACKUP,
        };
        Fault::permanent(code, "open the backup's folder", object, error)
            .remedy("Give the folder's real path below a configured root, or the backup's id: vmkeep list")
    })
}

pub(super) fn unreadable(path: &Path, error: &ManifestError) -> Fault {
    let code = match error {
        ManifestError::TooNew { .. } => codes::MANIFEST_TOO_NEW,
        ManifestError::Place(RootError::Missing { .. }) => codes::NO_SUCH_BACKUP,
        _ => codes::MANIFEST_MISMATCH,
    };
    Fault::permanent(code, "read the backup's manifest", path.display().to_string(), error)
        .remedy("Use another backup: vmkeep list")
}

/// The refusal of what is no backup any more.
pub(super) fn whole(one: Backup) -> Result<Backup, Fault> {
    if one.withdrawn {
        let object = one.path.display().to_string();
        return Err(Fault::permanent(
            codes::NO_SUCH_BACKUP,
            "use the backup",
            object,
            "its deletion was begun: it is no backup any more",
        )
        .remedy("Use another backup: vmkeep list"));
    }
    Ok(one)
}

/// A backup with all that is known about it.
pub(super) fn detail(one: &Backup, view: &View, now: Timestamp) -> Result<BackupDetail, Fault> {
    let manifest = &one.stored.manifest;
    let mut notes: Vec<String> = manifest
        .left_out
        .iter()
        .map(|disk| format!("disk {} is not in it: {}", disk.target, disk.reason))
        .collect();
    if let Memory::None { reason } = &manifest.memory {
        notes.push(format!("it holds no memory: {reason}"));
    }
    if let Memory::Saved(memory) = &manifest.memory
        && let Some(ms) = memory.downtime_ms
    {
        let down = crate::text::span(std::time::Duration::from_millis(ms));
        notes.push(format!("the guest was down for {down} while it was saved and loaded again"));
    }
    notes.extend(manifest.warnings.iter().cloned());
    let place = view
        .backups
        .iter()
        .find(|known| known.place.folder == one.path)
        .ok_or_else(|| none(&one.path.display().to_string(), "it went away while it was looked at"))?;
    let value = serde_json::to_value(manifest)
        .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "show the manifest", "", e))?;
    Ok(BackupDetail {
        backup: listed(place, &Shorts::of(&ids(view)), now),
        problems: Vec::new(),
        notes,
        manifest: value,
    })
}

//! The backups of this host: the folders with a manifest below the configured roots, and nothing else.

use std::path::{Path, PathBuf};

use vmkeep_steps::image::root::{Folder, RootError, Roots, TargetRoot};
use vmkeep_steps::manifest::catalogue::{Entry, scan};
use vmkeep_steps::manifest::{self, BackupId, ManifestError, Memory, Stored};
use vmkeep_workflow::{Fault, JobId};

use crate::api::prefix::{self, Found, Shortened, Shorts};
use crate::api::types::{BackupDetail, BackupRow};
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
}

/// Everything below the roots. Blocks.
pub(super) fn all(roots: &[PathBuf]) -> Result<(Vec<Backup>, Vec<String>), Fault> {
    let mut found = Vec::new();
    let mut warnings = Vec::new();
    let mut readable = 0;
    for root in roots {
        let entries = match TargetRoot::open(root).and_then(|root| scan(&root)) {
            Ok(entries) => entries,
            Err(error) => {
                warnings.push(format!("{}: {error}", root.display()));
                continue;
            }
        };
        readable += 1;
        for entry in entries {
            match entry {
                Entry::Backup { path, stored } => {
                    found.push(Backup { path, outside: false, stored: *stored })
                }
                Entry::Unreadable { path, error } => {
                    warnings.push(format!("the backup in {} cannot be read: {error}", path.display()));
                }
                Entry::Unpublished { .. } => {}
            }
        }
    }
    if readable == 0 {
        let fault = Fault::permanent(
            codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST,
            "look for backups",
            roots.first().map(|root| root.display().to_string()).unwrap_or_default(),
            warnings.join("; "),
        );
        return Err(fault.remedy("Mount or make the folder, or configure another root"));
    }
    // One root may lie below another: a backup is one backup however it was reached.
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found.dedup_by(|a, b| a.path == b.path);
    found.sort_by_key(|one| std::cmp::Reverse(one.stored.manifest.point_in_time));
    Ok((found, warnings))
}

/// The backups as rows, newest first.
pub(super) fn rows(found: &[Backup]) -> Vec<BackupRow> {
    let ids: Vec<BackupId> = found.iter().map(|one| one.stored.manifest.backup).collect();
    let shorts = Shorts::of(&ids);
    found.iter().map(|one| row(one, shorts.short(&one.stored.manifest.backup))).collect()
}

fn row(one: &Backup, short: String) -> BackupRow {
    let manifest = &one.stored.manifest;
    BackupRow {
        id: manifest.backup.to_string(),
        short,
        domain: manifest.domain.name.clone(),
        domain_uuid: manifest.domain.uuid.to_string(),
        at: manifest.point_in_time,
        memory: manifest.memory.saved().is_some(),
        disks: manifest.disks.iter().map(|disk| disk.target.clone()).collect(),
        size: manifest.size(),
        folder: one.path.clone(),
        job: Some(manifest.job.to_string()),
    }
}

/// The backup that somebody means: by its folder, or by the beginning of its id. Blocks.
pub(super) fn find(wanted: &str, roots: &[PathBuf]) -> Result<Backup, Fault> {
    if wanted.starts_with('/') {
        return in_folder(Path::new(wanted), roots);
    }
    let (found, _) = all(roots)?;
    let ids: Vec<BackupId> = found.iter().map(|one| one.stored.manifest.backup).collect();
    match prefix::find(wanted, &ids) {
        Found::One(id) => found
            .into_iter()
            .find(|one| one.stored.manifest.backup == id)
            .ok_or_else(|| none(wanted, "it went away while it was looked for")),
        Found::None => Err(none(wanted, "no backup below the configured roots has an id that begins so")),
        Found::Many(shown) => Err(prefix::ambiguous("find the backup", wanted, &shown)),
    }
}

fn none(wanted: &str, why: &str) -> Fault {
    Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", wanted, why)
        .remedy("List the backups: vmkeep list")
}

fn in_folder(path: &Path, roots: &[PathBuf]) -> Result<Backup, Fault> {
    let folder = open(path, roots)?;
    match manifest::read(&folder) {
        Ok(stored) => Ok(Backup { path: folder.path().to_owned(), outside: false, stored }),
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
        Ok(stored) => Ok(Backup { path: root.folder().path().to_owned(), outside: true, stored }),
        Err(error) => Err(unreadable(path, &error)),
    }
}

/// What somebody means: an id, or a folder wherever it lies. Blocks.
pub(super) fn wanted(backup: &str, from: Option<&Path>, roots: &[PathBuf]) -> Result<Backup, Fault> {
    match (backup.is_empty(), from) {
        (true, Some(from)) => from_folder(from, roots),
        (false, None) => find(backup, roots),
        _ => Err(super::orders::usage("name either a backup or its folder", "Give an id, or `--from DIR`")),
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

fn unreadable(path: &Path, error: &ManifestError) -> Fault {
    let code = match error {
        ManifestError::TooNew { .. } => codes::MANIFEST_TOO_NEW,
        ManifestError::Place(RootError::Missing { .. }) => codes::NO_SUCH_BACKUP,
        _ => codes::MANIFEST_MISMATCH,
    };
    Fault::permanent(code, "read the backup's manifest", path.display().to_string(), error)
        .remedy("Use another backup: vmkeep list")
}

/// A backup with all that is known about it.
pub(super) fn detail(one: &Backup, all: &[BackupId]) -> Result<BackupDetail, Fault> {
    let manifest = &one.stored.manifest;
    let mut notes: Vec<String> = manifest
        .left_out
        .iter()
        .map(|disk| format!("disk {} is not in it: {}", disk.target, disk.reason))
        .collect();
    if let Memory::None { reason } = &manifest.memory {
        notes.push(format!("it holds no memory: {reason}"));
    }
    notes.extend(manifest.warnings.iter().cloned());
    let value = serde_json::to_value(manifest)
        .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "show the manifest", "", e))?;
    Ok(BackupDetail {
        backup: row(one, Shorts::of(all).short(&manifest.backup)),
        problems: Vec::new(),
        notes,
        manifest: value,
    })
}

//! `remove-backups`: what withdrawn manifests name is removed; the point of no return.
//!
//! Per folder: the files, then their removal is made durable, then the manifest, then the folder itself. A power cut in
//! between leaves a folder whose withdrawn manifest still says what belongs to it, so the deletion can be finished by
//! whoever finds it. All of it may be repeated.

use std::path::PathBuf;

use async_trait::async_trait;
use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::options::Doomed;
use crate::codes;
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::manifest::folder::{DEFINITION, LIVE_DEFINITION, MANIFEST, NEW, PROTECTION, WITHDRAWN, fixed};
use crate::manifest::{self, BackupId, ManifestError};
use crate::snapshot::Places;

/// Removes files and folders.
#[derive(Debug)]
pub struct RemoveBackups(pub Places);

/// What is to be removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveInput {
    /// The backups, withdrawn before.
    pub backups: Vec<Doomed>,
    /// What else the reader of the result should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// The backups that are gone.
    pub backups: Vec<Gone>,
    /// What else the reader of the result should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A backup that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// The backup.
    pub backup: BackupId,
    /// Its folder, which is gone too unless something is left in it.
    pub folder: PathBuf,
    /// How many files the manifest named.
    pub files: u64,
    /// What they took, in bytes, holes included.
    pub bytes: u64,
    /// What did not belong to the backup and is left in the folder (46).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
}

const DOING: &str = "remove the backup's files";

#[async_trait]
impl Step for RemoveBackups {
    const KIND: StepKind = StepKind::new("remove-backups", 1);
    type Input = RemoveInput;
    type Output = Removed;

    async fn run(&self, cx: &StepContext, input: RemoveInput) -> Result<Removed, Fault> {
        let places = self.0.clone();
        let progress = cx.progress.clone();
        let done = crate::blocking::run(move || {
            let total = input.backups.iter().map(|one| one.files).sum();
            let (mut gone, mut failed, mut done) = (Vec::new(), Vec::new(), 0);
            for one in &input.backups {
                // A backup that cannot be removed keeps nobody from removing the next.
                match remove(&places, one) {
                    Ok(left) => gone.push(Gone {
                        backup: one.backup,
                        folder: one.folder.clone(),
                        files: one.files,
                        bytes: one.bytes,
                        left,
                    }),
                    Err(why) => failed.push(why),
                }
                done += one.files;
                progress.report(done, total, "files");
            }
            if failed.is_empty() {
                return Ok(Removed { backups: gone, notes: input.notes });
            }
            let object = input.backups.iter().map(|one| one.folder.display().to_string());
            let fault = Fault::transient(
                codes::CANNOT_REMOVE_FILE,
                DOING,
                object.collect::<Vec<_>>().join(", "),
                failed.join("; "),
            );
            Err(fault.remedy(
                "The backup is gone, some of its files are left. See whether the file system is writable and healthy; \
                 then `vmkeep job settle JOB --how retry`",
            ))
        });
        match done.await {
            Ok(done) => done,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, String::new(), e).class(Class::Transient)),
        }
    }

    /// It can be done again whatever is there. But a backup of which anything is gone must never be called one again, so the
    /// withdrawal may be taken back only if nothing is.
    async fn probe(&self, cx: &StepContext, input: RemoveInput) -> Verdict<Removed> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        let places = self.0.clone();
        let looked = crate::blocking::run(move || {
            input
                .backups
                .iter()
                .try_fold(true, |whole, one| Ok::<_, String>(whole && is_whole(&places, one)?))
        });
        match looked.await {
            Ok(Ok(true)) => Verdict::NotDone,
            Ok(Ok(false)) => Verdict::Partial(Value::from("a part is gone")),
            Ok(Err(why)) => Verdict::Unknown(why),
            Err(e) => Verdict::Unknown(e.to_string()),
        }
    }
}

/// Whether everything that is to be removed is still there.
fn is_whole(places: &Places, one: &Doomed) -> Result<bool, String> {
    let say = |e: RootError| e.to_string();
    let folder = match places.roots.open_folder(&one.folder) {
        Err(RootError::Missing { .. }) => return Ok(false),
        folder => folder.map_err(say)?,
    };
    let stored = match manifest::read_withdrawn(&folder) {
        Ok(stored) if stored.hash == one.manifest => stored,
        Ok(_) | Err(ManifestError::Place(RootError::Missing { .. })) => return Ok(false),
        Err(e) => return Err(e.to_string()),
    };
    for file in &stored.manifest.files {
        if folder.stat(&file.name).map_err(say)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes one; returns what is left in its folder, or why it could not be removed.
fn remove(places: &Places, one: &Doomed) -> Result<Vec<String>, String> {
    let say = |e: RootError| e.to_string();
    let parent = one.folder.parent().ok_or("it has no folder above it")?;
    let name = one.folder.file_name().and_then(|name| name.to_str()).ok_or("its folder has no name")?;
    let name = Component::new(name).map_err(say)?;
    let parent = match places.roots.open_folder(parent) {
        // It is never removed by a deletion: rather than the backup the place itself is not there.
        Err(e @ RootError::Missing { .. }) => return Err(format!("{e}: its file system may not be mounted")),
        parent => parent.map_err(say)?,
    };
    let folder = match parent.open_folder(&RelPath::from(name.clone())) {
        // Removed by an attempt that was cut off; whether the folder above was synced is not known.
        Err(RootError::Missing { .. }) => {
            parent.sync().map_err(say)?;
            return Ok(Vec::new());
        }
        folder => folder.map_err(say)?,
    };
    let at = folder.path().display();
    match manifest::read_withdrawn(&folder) {
        Ok(stored) if stored.hash == one.manifest => files(&folder, &stored.manifest)?,
        Ok(_) => return Err(format!("{at}: another backup lies there")),
        // Cut off after the manifest went: only what does not belong to it can be left.
        Err(ManifestError::Place(RootError::Missing { .. })) => {}
        Err(e) => return Err(format!("{at}: {e}")),
    }
    if folder.stat(&fixed(MANIFEST)).map_err(say)?.is_some() {
        return Err(format!("{at}: there is a manifest: it is a backup again"));
    }
    if !strangers(&folder)?.is_empty() {
        // Gone it is all the same; what is left has an owner who may look for it.
        folder.remove_file(&fixed(WITHDRAWN)).map_err(say)?;
        folder.sync().map_err(say)?;
        return strangers(&folder);
    }
    folder.remove_file(&fixed(WITHDRAWN)).map_err(say)?;
    folder.sync().map_err(say)?;
    match parent.remove_folder(&name) {
        // Somebody put something there at the last moment.
        Err(RootError::Exists { .. }) => return strangers(&folder),
        removed => removed.map_err(say)?,
    };
    parent.sync().map_err(say)?;
    Ok(Vec::new())
}

/// Removes the files that belong to the backup, and makes that durable.
fn files(folder: &Folder, manifest: &manifest::Manifest) -> Result<(), String> {
    let mut failed = Vec::new();
    let ours = [MANIFEST, DEFINITION, LIVE_DEFINITION, PROTECTION]
        .iter()
        .filter_map(|name| Component::new(format!("{name}{NEW}")).ok());
    let own = manifest.files.iter().map(|file| file.name.clone()).chain([fixed(PROTECTION)]).chain(ours);
    for name in own {
        let removed = match folder.stat(&name) {
            // A link or a folder of that name is somebody else's.
            Ok(Some(stat)) if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile => Ok(false),
            Ok(_) => folder.remove_file(&name),
            Err(e) => Err(e),
        };
        failed.extend(removed.err().map(|e| e.to_string()));
    }
    // Before the manifest goes the files are gone for good: it is what says that they belonged here.
    failed.extend(folder.sync().err().map(|e| e.to_string()));
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}

/// Names of what is in the folder besides the withdrawn manifest, those included that are not UTF-8.
fn strangers(folder: &Folder) -> Result<Vec<String>, String> {
    let names = folder.names().map_err(|e| e.to_string())?;
    Ok(names.into_iter().filter(|name| name != WITHDRAWN).collect())
}

//! `seal-memory` and `publish`: the folder becomes a backup.
//!
//! A backup exists from the instant at which the name of its manifest is durable, and not before. Everything that the
//! manifest speaks of was made durable and hashed by the steps before; what this one adds itself, the definitions,
//! it makes durable first.

use std::io::Read as _;
use std::path::PathBuf;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, JobId, Step, StepContext, StepName, Verdict};

use super::Places;
use super::copy::{CopyImage, place_fault};
use super::freeze::FreezeGuest;
use super::machine::{KeepOutput, KeepState};
use super::memory::{self, Form, WHOLE};
use super::take::{TakeOutput, TakeSnapshot};
use crate::codes;
use crate::image::chain::FileToCopy;
use crate::image::copy::{self, SourceFile};
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::manifest::folder::{DEFINITION, LIVE_DEFINITION, MEMORY, fixed};
use crate::manifest::{
    self, BackupId, Consistency, Digest, FileEntry, Host, LeftOut, Manifest, ManifestError, Role,
};
use crate::save::ResumeGuest;

/// Hashes the memory image.
#[derive(Debug)]
pub struct SealMemory(pub Places);

/// Publishes the backup.
#[derive(Debug)]
pub struct Publish(pub Places);

/// What sealing needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealInput {
    /// The backup's folder.
    pub folder: PathBuf,
    /// The step that wrote it.
    pub taken: StepName,
}

/// What sealing leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealOutput {
    /// The image; nothing if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Sealed>,
    /// Why there is none although there should be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

/// A memory image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Its length in bytes.
    pub size: u64,
    /// BLAKE3, in hexadecimal.
    pub hash: String,
    /// How it is written.
    pub form: Form,
}

#[async_trait]
impl Step for SealMemory {
    const KIND: StepKind = StepKind::new("seal-memory", 1);
    type Input = SealInput;
    type Output = SealOutput;

    async fn run(&self, cx: &StepContext, input: SealInput) -> Result<SealOutput, Fault> {
        let Some(path) = cx.outputs.of::<TakeSnapshot>(&input.taken)?.and_then(|taken| taken.memory) else {
            return Ok(SealOutput { memory: None, lost: None });
        };
        let (cx, object) = (cx.clone(), path.display().to_string());
        let doing = "read the memory image";
        match crate::blocking::run(move || seal(&path, &cx)).await {
            Ok(Ok(sealed)) => Ok(SealOutput { memory: Some(sealed), lost: None }),
            Ok(Err(copy::CopyError::Stopped { .. })) => Err(Fault::stopped(doing, object)),
            Ok(Err(e)) => Err(Fault::transient(codes::MEMORY_LOST, doing, object, e)),
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, object, e)),
        }
    }

    /// Reading changes nothing, so it is simply done again.
    async fn probe(&self, _: &StepContext, _: SealInput) -> Verdict<SealOutput> {
        Verdict::NotDone
    }
}

fn seal(path: &std::path::Path, cx: &StepContext) -> Result<Sealed, copy::CopyError> {
    let source = SourceFile::open(path)?;
    let mut header = [0; 32];
    let mut file = source.file();
    file.read_exact(&mut header).map_err(|source| copy::CopyError::Read { offset: 0, source })?;
    if &header[..16] != WHOLE {
        return Err(copy::CopyError::SourceShrunk { offset: 0, size: source.identity().size });
    }
    let hash = copy::hash(&source, None, cx)?;
    Ok(Sealed { size: source.identity().size, hash: hash.to_hex().to_string(), form: memory::form(&header) })
}

/// A disk of the backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishDisk {
    /// Its name in the definition.
    pub target: String,
    /// Its size in bytes.
    pub virtual_size: u64,
    /// Which of the files, from the top down.
    pub chain: Vec<usize>,
}

/// What publishing needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PublishInput {
    /// The backup's folder.
    pub folder: PathBuf,
    /// What wrote it.
    pub tool: String,
    /// The domain.
    pub domain: manifest::Domain,
    /// Where it runs.
    pub host: Host,
    /// The persistent definition.
    pub definition: String,
    /// The live one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<String>,
    /// The disks.
    pub disks: Vec<PublishDisk>,
    /// The files, each with the step that copied it.
    pub files: Vec<(FileToCopy, StepName)>,
    /// Disks that are not in the backup.
    pub left_out: Vec<LeftOut>,
    /// What the owner should know.
    pub warnings: Vec<String>,
    /// The step that took the snapshot.
    pub taken: StepName,
    /// The step that froze the guest's file systems, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<StepName>,
    /// The step that sealed the memory, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<StepName>,
    /// Whether the domain starts with the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
    /// The step that kept firmware variables and TPM state, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<StepName>,
    /// The step that let a saved guest run again, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<StepName>,
}

/// What publishing leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishOutput {
    /// The backup.
    pub backup: BackupId,
    /// BLAKE3 of the manifest, in hexadecimal.
    pub manifest: String,
}

fn backup_id(job: JobId) -> BackupId {
    BackupId(job.uuid())
}

#[async_trait]
impl Step for Publish {
    const KIND: StepKind = StepKind::new("publish", 1);
    type Input = PublishInput;
    type Output = PublishOutput;

    async fn run(&self, cx: &StepContext, input: PublishInput) -> Result<PublishOutput, Fault> {
        let (files, manifest) = describe(cx, &input)?;
        let (places, path) = (self.0.clone(), input.folder.clone());
        let object = path.display().to_string();
        let backup = manifest.backup;
        let done = crate::blocking::run(move || {
            let folder = places.roots.open_folder(&path)?;
            for (name, text) in files {
                write(&folder, name, text.as_bytes())?;
            }
            manifest::publish(&folder, &manifest)
        })
        .await;
        match done {
            Ok(Ok(hash)) => Ok(PublishOutput { backup, manifest: hash.to_string() }),
            Ok(Err(e)) => Err(fault(&e, &object)),
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, "publish the backup", object, e)),
        }
    }

    async fn probe(&self, cx: &StepContext, input: PublishInput) -> Verdict<PublishOutput> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        let (places, path, wanted) = (self.0.clone(), input.folder, backup_id(cx.job));
        let found = crate::blocking::run(move || {
            let folder = places.roots.open_folder(&path)?;
            let stored = manifest::read(&folder)?;
            folder.sync()?;
            Ok::<_, ManifestError>(stored)
        })
        .await;
        match found {
            Ok(Ok(stored)) if stored.manifest.backup == wanted => {
                Verdict::Done(PublishOutput { backup: wanted, manifest: stored.hash.to_string() })
            }
            Ok(Ok(_)) => Verdict::Diverged("the folder holds another backup".to_owned()),
            Ok(Err(ManifestError::Place(RootError::Missing { .. }))) => Verdict::NotDone,
            Ok(Err(e)) => Verdict::Unknown(e.to_string()),
            Err(e) => Verdict::Unknown(e.to_string()),
        }
    }
}

fn fault(e: &ManifestError, object: &str) -> Fault {
    let doing = "publish the backup";
    match e {
        ManifestError::Place(place) => {
            place_fault(place, codes::CANNOT_COPY_XML_TO_BACKUP_LOCATION, doing, object)
        }
        ManifestError::Io { .. } => {
            Fault::transient(codes::CANNOT_COPY_XML_TO_BACKUP_LOCATION, doing, object, e)
        }
        _ => Fault::permanent(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, doing, object, e),
    }
}

/// Writes a file of a folder that is no backup yet; an earlier attempt may have written it.
fn write(folder: &Folder, name: &'static str, bytes: &[u8]) -> Result<(), ManifestError> {
    let mut there = Vec::new();
    match folder.open_file(&RelPath::from(fixed(name))) {
        Ok(mut file) => {
            file.read_to_end(&mut there).map_err(|source| ManifestError::Io { act: "read", source })?;
            if there == bytes {
                return Ok(());
            }
            folder.remove_file(&fixed(name))?;
        }
        Err(RootError::Missing { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    manifest::file::write_durably(folder, name, bytes)
}

/// Text files by name.
type Texts = Vec<(&'static str, String)>;

/// The manifest, and the files that are still to be written for it.
fn describe(cx: &StepContext, input: &PublishInput) -> Result<(Texts, Manifest), Fault> {
    let taken: TakeOutput = required(cx.outputs.of::<TakeSnapshot>(&input.taken)?, &input.taken)?;
    let mut texts = vec![(DEFINITION, input.definition.clone())];
    texts.extend(input.live.clone().map(|live| (LIVE_DEFINITION, live)));
    let mut files: Vec<FileEntry> = texts
        .iter()
        .map(|(name, text)| {
            entry(fixed(name), Role::Definition, text.len() as u64, blake3::hash(text.as_bytes()).into())
        })
        .collect();
    for (at, (file, step)) in input.files.iter().enumerate() {
        let copied = required(cx.outputs.of::<CopyImage>(step)?, step)?;
        let top = input.disks.iter().any(|disk| disk.chain.first() == Some(&at));
        files.push(FileEntry {
            source_blake3: copied.source_hash.map(|hash| digest(&hash, step)).transpose()?,
            format: Some(file.format),
            virtual_size: Some(file.virtual_size),
            backing: file.backing.as_ref().map(|below| below.name.clone()),
            source: Some(file.source.display().to_string()),
            rights: file.rights.clone(),
            ..entry(
                file.name.clone(),
                if top { Role::Disk } else { Role::Base },
                copied.size,
                digest(&copied.hash, step)?,
            )
        });
    }
    let SealOutput { memory: sealed, lost } = match &input.sealed {
        Some(step) => required(cx.outputs.of::<SealMemory>(step)?, step)?,
        None => SealOutput { memory: None, lost: None },
    };
    let resumed = match &input.resumed {
        Some(step) => cx.outputs.of::<ResumeGuest>(step)?,
        None => None,
    };
    let memory = match (&sealed, &input.sealed) {
        (Some(sealed), Some(step)) => {
            files.push(entry(fixed(MEMORY), Role::Memory, sealed.size, digest(&sealed.hash, step)?));
            manifest::Memory::Saved(manifest::SavedMemory {
                file: fixed(MEMORY),
                version: sealed.form.version,
                compression: sealed.form.compression.clone(),
                downtime_ms: resumed.as_ref().and_then(|resumed| resumed.downtime_ms),
                unknown: manifest::Unknown::new(),
            })
        }
        _ => manifest::Memory::None {
            reason: taken.without_memory.clone().or_else(|| lost.clone()).unwrap_or_else(|| {
                let off = "the domain was shut off";
                if taken.off { off } else { "only the disks were asked for" }.to_owned()
            }),
        },
    };
    let frozen = match &input.frozen {
        Some(step) => Some(required(cx.outputs.of::<FreezeGuest>(step)?, step)?),
        None => None,
    };
    let consistency = match (&memory, &frozen) {
        (manifest::Memory::Saved(_), _) => Consistency::MemoryAndDisks,
        (_, Some(frozen)) if frozen.file_systems > 0 && taken.thawed.is_none() => Consistency::Quiesced,
        _ if taken.off => Consistency::Off,
        _ => Consistency::Crash,
    };
    let kept = match &input.kept {
        Some(step) => required(cx.outputs.of::<KeepState>(step)?, step)?,
        None => KeepOutput::default(),
    };
    files.extend(kept.files);
    let mut warnings = input.warnings.clone();
    warnings.extend(kept.warnings);
    warnings.extend(resumed.and_then(|resumed| {
        let why = resumed.why?;
        Some(format!("the guest did not come back with its memory: {why}"))
    }));
    warnings
        .extend(taken.without_memory.or(lost).map(|why| format!("the memory is not in the backup: {why}")));
    warnings.extend(
        taken.thawed.map(|why| format!("the guest's file systems were frozen for the snapshot, but {why}")),
    );
    warnings.extend(
        frozen.and_then(|f| f.why_not).map(|why| format!("the guest's file systems were not frozen: {why}")),
    );
    let manifest = Manifest {
        format: manifest::FORMAT.to_owned(),
        version: manifest::VERSION,
        min_reader: manifest::needed_reader(kept.nvram.as_ref(), kept.tpm.as_ref()),
        backup: backup_id(cx.job),
        job: cx.job.uuid(),
        tool: input.tool.clone(),
        point_in_time: taken.at,
        finished: Timestamp::now(),
        domain: input.domain.clone(),
        host: input.host.clone(),
        definition: manifest::Definition {
            inactive: fixed(DEFINITION),
            live: input.live.is_some().then(|| fixed(LIVE_DEFINITION)),
        },
        consistency,
        disks: input.disks.iter().map(|disk| disk_entry(disk, input)).collect(),
        memory,
        nvram: kept.nvram,
        tpm: kept.tpm,
        autostart: input.autostart,
        left_out: input.left_out.clone(),
        files,
        warnings,
        unknown: manifest::Unknown::new(),
    };
    Ok((texts, manifest))
}

fn disk_entry(disk: &PublishDisk, input: &PublishInput) -> manifest::Disk {
    let name = |at: &usize| input.files.get(*at).map(|(file, _)| file.name.clone());
    manifest::Disk {
        target: disk.target.clone(),
        virtual_size: disk.virtual_size,
        chain: disk.chain.iter().filter_map(name).collect(),
        unknown: manifest::Unknown::new(),
    }
}

fn entry(name: Component, role: Role, size: u64, blake3: Digest) -> FileEntry {
    FileEntry {
        name,
        role,
        size,
        blake3,
        source_blake3: None,
        format: None,
        virtual_size: None,
        backing: None,
        source: None,
        rights: None,
        unknown: manifest::Unknown::new(),
    }
}

fn digest(hash: &str, step: &StepName) -> Result<Digest, Fault> {
    Digest::try_from(hash.to_owned())
        .map_err(|e| Fault::permanent(Code::UNDEFINED, "read the hash of a file", step.to_string(), e))
}

fn required<T>(output: Option<T>, step: &StepName) -> Result<T, Fault> {
    output.ok_or_else(|| {
        Fault::permanent(Code::UNDEFINED, "publish the backup", step.to_string(), "this step has no outcome")
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::codes::assert_told;
    use crate::image::root::Roots;

    #[test]
    fn a_definition_that_cannot_be_written_is_no_backup_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        // A folder where the file should be.
        std::fs::create_dir(dir.path().join(DEFINITION)).unwrap();
        let folder = Roots::open([dir.path()]).unwrap().open_folder(dir.path()).unwrap();
        let failed = write(&folder, DEFINITION, b"<domain/>").unwrap_err();
        let fault = fault(&failed, &dir.path().display().to_string());
        assert_told(&fault, codes::CANNOT_COPY_XML_TO_BACKUP_LOCATION, dir.path().to_str().unwrap());
        assert!(fault.cause.contains(DEFINITION), "{fault}");
        assert!(dir.path().join(DEFINITION).is_dir(), "what is in the way is somebody's");
        // Nothing refers to it: without a manifest it is no backup.
        let places = Places { roots: Arc::new(Roots::open([dir.path()]).unwrap()) };
        let folder = places.roots.open_folder(dir.path()).unwrap();
        assert!(matches!(manifest::read(&folder), Err(ManifestError::Place(RootError::Missing { .. }))));
    }
}

//! `keep-machine-state`: what a machine keeps outside its disks and its memory: firmware variables and a TPM's state.
//!
//! They are small files that QEMU, or `swtpm`, writes to now and then: at boot, when an operating system is installed or
//! updated, when a key is sealed. Nothing freezes them together with the disks. What can be said honestly is *when each
//! was last written*: a file that was last written before the job was planned is what it was at the instant of the
//! disks; of one that was written since, only that it is as of soon after. The manifest says which of both it is.
//!
//! Each file is read whole between two equal looks at it, so that it is never half of one state and half of another.
//! (`swtpm` writes aside and renames; QEMU writes variables in place, some kilobytes at a time.)

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, Verdict};

use super::Places;
use crate::codes;
use crate::image::rights::Rights;
use crate::image::root::{Component, Folder, RootError};
use crate::manifest::folder::{NVRAM, TPM_PREFIX};
use crate::manifest::{self, Digest, FileEntry, Role};
use crate::tpm::{self, read_still};

const DOING: &str = "keep the machine's firmware and TPM state";

/// Copies what there is.
#[derive(Debug)]
pub struct KeepState(pub Places);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepInput {
    /// The backup's folder.
    pub folder: PathBuf,
    /// When the job was planned: a file that is older is what it was at the instant of the disks.
    pub planned: Timestamp,
    /// The firmware's variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<KeepNvram>,
    /// The TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<KeepTpm>,
}

/// Firmware variables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepNvram {
    /// Their file.
    pub file: PathBuf,
    /// Its format.
    pub format: String,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<PathBuf>,
}

/// A TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepTpm {
    /// The folder of its domain; the state is in a folder `tpm2` or `tpm1.2` below.
    pub folder: PathBuf,
    /// Its version, if the definition says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// It is encrypted with a secret of libvirt's, which is not in the backup.
    #[serde(default)]
    pub encrypted: bool,
}

/// What it leaves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KeepOutput {
    /// For the manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<manifest::Nvram>,
    /// For the manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<manifest::Tpm>,
    /// The files of both.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileEntry>,
    /// What the owner should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

#[async_trait]
impl Step for KeepState {
    const KIND: StepKind = StepKind::new("keep-machine-state", 1);
    type Input = KeepInput;
    type Output = KeepOutput;

    async fn run(&self, _: &StepContext, input: KeepInput) -> Result<KeepOutput, Fault> {
        let places = self.0.clone();
        let object = input.folder.display().to_string();
        match crate::blocking::run(move || keep(&places, &input)).await {
            Ok(kept) => kept,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, object, e)),
        }
    }

    /// Reading again does no harm; what was copied by an attempt that was cut off is replaced.
    async fn probe(&self, cx: &StepContext, _: KeepInput) -> Verdict<KeepOutput> {
        cx.may_repeat()
    }
}

fn place(e: &RootError, object: &Path) -> Fault {
    let code = codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION;
    super::copy::place_fault(e, code, DOING, &object.display().to_string())
}

fn unreadable(path: &Path, e: &dyn std::fmt::Display) -> Fault {
    let code = codes::FIRMWARE_STATE_UNSUPPORTED;
    Fault::permanent(code, DOING, path.display().to_string(), e)
        .remedy("Let the user that vmkeepd runs as read that file")
}

fn keep(places: &Places, input: &KeepInput) -> Result<KeepOutput, Fault> {
    let folder = places.roots.open_folder(&input.folder).map_err(|e| place(&e, &input.folder))?;
    let mut output = KeepOutput::default();
    if let Some(nvram) = &input.nvram {
        variables(&folder, input, nvram, &mut output)?;
    }
    if let Some(tpm) = &input.tpm {
        state_of_tpm(&folder, input, tpm, &mut output)?;
    }
    folder.sync().map_err(|e| place(&e, &input.folder))?;
    Ok(output)
}

fn variables(
    folder: &Folder,
    input: &KeepInput,
    nvram: &KeepNvram,
    output: &mut KeepOutput,
) -> Result<(), Fault> {
    let path = &nvram.file;
    let (bytes, written) = match read_still(&|| File::open(path)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("there are no firmware variables yet: {} does not exist", path.display());
            output.warnings.push(text);
            return Ok(());
        }
        read => read.map_err(|e| unreadable(path, &e))?,
    };
    let name = manifest::folder::fixed(NVRAM);
    output.files.push(write(folder, name.clone(), Role::Nvram, path, &bytes)?);
    output.nvram = Some(manifest::Nvram {
        file: name,
        format: nvram.format.clone(),
        template: nvram.template.as_ref().map(|template| template.display().to_string()),
        written,
        at_instant: written < input.planned,
        unknown: manifest::Unknown::new(),
    });
    if written >= input.planned {
        output
            .warnings
            .push(format!("the firmware's variables are as of {written}, not of the disks' instant"));
    }
    Ok(())
}

fn state_of_tpm(
    folder: &Folder,
    input: &KeepInput,
    from: &KeepTpm,
    output: &mut KeepOutput,
) -> Result<(), Fault> {
    let (mut files, mut newest) = (Vec::new(), Timestamp::MIN);
    for state in tpm::read(&from.folder).map_err(|e| unreadable(&from.folder, &e))? {
        newest = newest.max(state.written);
        let kept = Component::literal(format!("{TPM_PREFIX}{}.{}", state.below, state.name));
        output.files.push(write(folder, kept.clone(), Role::Tpm, &state.path, &state.bytes)?);
        files.push(manifest::TpmFile { file: kept, path: format!("{}/{}", state.below, state.name) });
    }
    if files.is_empty() {
        output.warnings.push("its TPM has no state yet".to_owned());
        return Ok(());
    }
    if from.encrypted {
        let text = "its TPM's state is encrypted with a secret of libvirt's, which is not in the backup";
        output.warnings.push(text.to_owned());
    }
    if newest >= input.planned {
        output.warnings.push(format!("the TPM's state is as of {newest}, not of the disks' instant"));
    }
    output.tpm = Some(manifest::Tpm {
        version: from.version.clone(),
        encrypted: from.encrypted,
        files,
        written: newest,
        at_instant: newest < input.planned,
        unknown: manifest::Unknown::new(),
    });
    Ok(())
}

/// Writes a file of a folder that is no backup yet, durably but for its name.
fn write(
    folder: &Folder,
    name: Component,
    role: Role,
    source: &Path,
    bytes: &[u8],
) -> Result<FileEntry, Fault> {
    let path = folder.path_of(&name);
    folder.remove_file(&name).map_err(|e| place(&e, &path))?;
    let mut file = folder.create_file(&name).map_err(|e| place(&e, &path))?;
    file.write_all(bytes).and_then(|()| crate::blocking::sync(&file)).map_err(|e| {
        let code = codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION;
        Fault::transient(code, DOING, path.display().to_string(), e)
    })?;
    Ok(FileEntry {
        name,
        role,
        size: bytes.len() as u64,
        blake3: Digest(blake3::hash(bytes)),
        source_blake3: None,
        format: None,
        virtual_size: None,
        backing: None,
        source: Some(source.display().to_string()),
        rights: (role == Role::Nvram).then(|| Rights::at_rest(source).ok()).flatten(),
        unknown: manifest::Unknown::new(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::image::root::Roots;

    fn places(root: &Path) -> Places {
        Places { roots: Arc::new(Roots::open([root]).unwrap()) }
    }

    fn input(dir: &Path, planned: Timestamp) -> KeepInput {
        KeepInput {
            folder: dir.join("backup"),
            planned,
            nvram: Some(KeepNvram { file: dir.join("vars.fd"), format: "raw".to_owned(), template: None }),
            tpm: Some(KeepTpm {
                folder: dir.join("swtpm"),
                version: Some("2.0".to_owned()),
                encrypted: false,
            }),
        }
    }

    #[test]
    fn what_was_last_written_before_the_plan_is_of_the_instant_and_the_rest_says_when_it_is_of() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        std::fs::create_dir_all(at.join("backup")).unwrap();
        std::fs::create_dir_all(at.join("swtpm/tpm2")).unwrap();
        std::fs::write(at.join("vars.fd"), b"variables").unwrap();
        std::fs::write(at.join("swtpm/tpm2/tpm2-00.permall"), b"sealed").unwrap();
        std::fs::write(at.join("swtpm/tpm2/.lock"), b"").unwrap();
        std::fs::write(at.join("swtpm/tpm2/TMP2-00.permall"), b"half").unwrap();
        let later = Timestamp::now() + jiff::SignedDuration::from_secs(60);
        for _ in 0..2 {
            let kept = keep(&places(at), &input(at, later)).unwrap();
            assert_eq!(kept.warnings, Vec::<String>::new());
            assert!(kept.nvram.unwrap().at_instant);
            let tpm = kept.tpm.unwrap();
            assert!(tpm.at_instant);
            assert_eq!(tpm.files.len(), 1, "no locks and no halves: {:?}", tpm.files);
            assert_eq!(tpm.files[0].path, "tpm2/tpm2-00.permall");
            assert_eq!(kept.files.len(), 2);
        }
        let earlier = Timestamp::now() - jiff::SignedDuration::from_secs(60);
        let kept = keep(&places(at), &input(at, earlier)).unwrap();
        assert!(!kept.nvram.unwrap().at_instant && !kept.tpm.unwrap().at_instant);
        assert_eq!(kept.warnings.len(), 2);
    }

    #[test]
    fn a_machine_that_never_ran_has_no_state_and_a_link_in_a_tpms_folder_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        std::fs::create_dir_all(at.join("backup")).unwrap();
        let kept = keep(&places(at), &input(at, Timestamp::now())).unwrap();
        assert!(kept.nvram.is_none() && kept.tpm.is_none());
        assert_eq!(kept.warnings.len(), 2);
        std::fs::create_dir_all(at.join("swtpm/tpm2")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", at.join("swtpm/tpm2/tpm2-00.permall")).unwrap();
        let kept = keep(&places(at), &input(at, Timestamp::now())).unwrap();
        assert!(kept.tpm.is_none() && kept.files.is_empty(), "{kept:?}");
    }
}

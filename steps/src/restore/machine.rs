//! `restore-variables`, `restore-tpm`: what the machine kept outside its disks and memory.
//!
//! Firmware variables become a file beside the new domain's images, which its definition names: never the original's.
//! A TPM's state has no place that a definition could name: libvirt keeps it in a folder of its own, by UUID. The UUID
//! is new and made for this job, so that whatever is there is this job's. Both are there before the domain is defined.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::ending;
use super::fetch::{Fetch, Head, Restored, Wanted};
use super::options::RestoreOptions;
use super::place::Place;
use crate::blocking::touch;
use crate::codes;
use crate::hypervisor::DomainRef;
use crate::image::name::encode;
use crate::image::rights::Wish;
use crate::image::root::{Component, RelPath};
use crate::manifest::{Digest, Manifest};
use crate::snapshot::copy::place_fault;
use crate::snapshot::{Places, World};
use crate::tpm::{self, TpmError};

/// Restores firmware variables.
#[derive(Debug)]
pub struct RestoreVariables(pub Places);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VariablesInput {
    /// The file of the backup.
    pub wanted: Wanted,
    /// The folder that it goes to.
    pub folder: PathBuf,
    /// That is the folder of an image of the domain's own; it need not lie below a root.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
    /// Its name there.
    pub name: Component,
    /// What it is given before it gets its name.
    #[serde(default, skip_serializing_if = "Wish::is_empty")]
    pub rights: Wish,
}

impl VariablesInput {
    /// Where they go.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join(self.name.as_str())
    }
}

impl RestoreVariables {
    fn fetch(&self, input: VariablesInput) -> Fetch {
        let place = Place {
            places: self.0.clone(),
            folder: input.folder,
            own: input.own,
            name: Some(input.name),
            source: input.wanted.name.clone(),
            rights: input.rights,
        };
        Fetch { wanted: input.wanted, place, head: Head::Bytes(Vec::new()), bandwidth: 0 }
    }
}

#[async_trait]
impl Step for RestoreVariables {
    const KIND: StepKind = StepKind::new("restore-variables", 1);
    type Input = VariablesInput;
    type Output = Restored;

    async fn run(&self, cx: &StepContext, input: VariablesInput) -> Result<Restored, Fault> {
        self.fetch(input).run(cx).await
    }

    async fn probe(&self, cx: &StepContext, input: VariablesInput) -> Verdict<Restored> {
        self.fetch(input).probe(cx).await
    }

    async fn undo(
        &self,
        cx: &StepContext,
        input: VariablesInput,
        output: Option<Restored>,
    ) -> Result<(), Fault> {
        self.fetch(input).undo(cx, output).await
    }
}

/// Restores a TPM's state.
#[derive(Debug)]
pub struct RestoreTpm {
    /// The world.
    pub world: World,
    /// Where the backup may be read.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmInput {
    /// The new domain.
    pub domain: DomainRef,
    /// The files of the backup, each with its folder and name in the TPM's.
    pub files: Vec<(Wanted, String, String)>,
}

const DOING: &str = "restore the TPM's state";

/// The folder of the new domain's TPM.
pub(super) async fn tpm_folder(world: &World, domain: &DomainRef) -> Result<PathBuf, Fault> {
    let own = world.hypervisor.own_folders().await;
    let own = own.map_err(|e| e.fault(codes::FIRMWARE_STATE_UNSUPPORTED, DOING, &domain.name))?;
    Ok(own.tpm(&domain.id))
}

/// Removes it. Its UUID was made for this job, so that all that is in it is this job's.
pub(super) async fn remove_tpm(world: &World, domain: &DomainRef) -> Result<(), Fault> {
    let folder = tpm_folder(world, domain).await.map_err(|fault| fault.class(Class::Transient))?;
    let gone = folder.clone();
    let removed = crate::blocking::io(move || {
        touch("remove")?;
        std::fs::remove_dir_all(&gone)
    });
    match removed.await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            let object = folder.display().to_string();
            Err(Fault::transient(codes::CANNOT_REMOVE_FILE, "remove the TPM's state", object, e))
        }
        _ => Ok(()),
    }
}

#[async_trait]
impl Step for RestoreTpm {
    const KIND: StepKind = StepKind::new("restore-tpm", 1);
    type Input = TpmInput;
    type Output = PathBuf;

    async fn run(&self, _: &StepContext, input: TpmInput) -> Result<PathBuf, Fault> {
        let folder = tpm_folder(&self.world, &input.domain).await?;
        let (places, name) = (self.places.clone(), input.domain.name.clone());
        match crate::blocking::run(move || write_all(&places, &folder, &input.files).map(|()| folder)).await {
            Ok(written) => written,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, name, e)),
        }
    }

    /// Nobody uses it before the domain is defined: it is written anew.
    async fn probe(&self, cx: &StepContext, _: TpmInput) -> Verdict<PathBuf> {
        cx.may_repeat()
    }

    async fn undo(&self, _: &StepContext, input: TpmInput, _: Option<PathBuf>) -> Result<(), Fault> {
        remove_tpm(&self.world, &input.domain).await
    }
}

/// Makes the folder of a TPM hold what the backup holds of one.
pub(crate) fn write_all(
    places: &Places,
    folder: &Path,
    files: &[(Wanted, String, String)],
) -> Result<(), Fault> {
    let mut state = Vec::new();
    for (wanted, below, name) in files {
        state.push((below.as_str(), name.as_str(), read(places, wanted)?));
    }
    let state: Vec<_> = state.iter().map(|(below, name, bytes)| (*below, *name, bytes.as_slice())).collect();
    tpm::write(folder, &state).map_err(|e| unwritable(folder, &e))
}

pub(crate) fn unwritable(folder: &Path, e: &TpmError) -> Fault {
    Fault::permanent(codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION, DOING, folder.display().to_string(), e)
        .remedy("Let the user that vmkeepd runs as write to libvirt's folder of TPM state")
}

fn read(places: &Places, wanted: &Wanted) -> Result<Vec<u8>, Fault> {
    let object = wanted.backup.join(wanted.name.as_str()).display().to_string();
    let file = places
        .open(&wanted.backup, wanted.outside)
        .and_then(|folder| folder.open_file(&RelPath::from(wanted.name.clone())))
        .map_err(|e| place_fault(&e, codes::MISSING_NECESSARY_FILES, "read the backup", &object))?;
    let mut bytes = Vec::new();
    file.take(wanted.size + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Fault::transient(codes::CANNOT_READ_STATE_FILE, "read the backup", object.clone(), e))?;
    if Digest(blake3::hash(&bytes)) != wanted.blake3 {
        let cause = "its hash is not the one that the manifest names";
        return Err(Fault::permanent(codes::MANIFEST_MISMATCH, "read the backup", object, cause));
    }
    Ok(bytes)
}

/// What there is to restore, and what to say of what there is not.
#[derive(Default)]
pub(super) struct MachineState {
    pub(super) variables: Option<VariablesInput>,
    pub(super) tpm: Option<TpmInput>,
    pub(super) notes: Vec<String>,
}

/// The variables go beside the first disk.
pub(super) fn of(
    manifest: &Manifest,
    definition: &crate::hypervisor::Definition,
    options: &RestoreOptions,
    new: &DomainRef,
    first: Option<&Path>,
) -> Result<MachineState, Fault> {
    let mut found = MachineState::default();
    let wanted = |name: &Component| {
        manifest.file(name).map(|entry| Wanted {
            backup: options.backup.clone(),
            outside: options.outside,
            name: entry.name.clone(),
            size: entry.size,
            blake3: entry.blake3,
        })
    };
    let devices = &definition.devices;
    match (&manifest.nvram, &devices.nvram) {
        (Some(nvram), Some(_)) => {
            let folder = first.or(options.folder.as_deref());
            let (Some(folder), Some(wanted)) = (folder, wanted(&nvram.file)) else {
                let cause = "there is no place for the firmware's variables";
                return Err(Fault::permanent(codes::USAGE, "find a place for them", &options.name, cause)
                    .remedy("Name a folder for all disks"));
            };
            let suffix = if nvram.format == "qcow2" { "qcow2" } else { "fd" };
            let name = Component::literal(format!("{}_VARS.{suffix}", encode(&options.name)));
            found.variables = Some(VariablesInput {
                wanted,
                folder: folder.to_owned(),
                own: false,
                name,
                rights: Wish::default(),
            });
            if !nvram.at_instant {
                found.notes.push(format!("Its firmware's variables are as of {}.", nvram.written));
            }
        }
        (None, Some(_)) => found.notes.push(ending::NO_VARIABLES.to_owned()),
        (_, None) => {}
    }
    match (&manifest.tpm, &devices.tpm) {
        (Some(tpm), Some(_)) => {
            let files = tpm.files.iter().filter_map(|file| {
                let (folder, name) = file.place()?;
                Some((wanted(&file.file)?, folder.to_owned(), name.to_owned()))
            });
            found.tpm = Some(TpmInput { domain: new.clone(), files: files.collect() });
            found.notes.push(ending::SAME_TPM.to_owned());
            if !tpm.at_instant {
                found.notes.push(format!("Its TPM's state is as of {}.", tpm.written));
            }
        }
        (None, Some(_)) => found.notes.push(ending::NO_TPM.to_owned()),
        (_, None) => {}
    }
    Ok(found)
}

//! `set-aside`: libvirt forgets what it remembers of the old machine, and the record is written; and `bring-back`: it
//! remembers again.
//!
//! A managed save image would be loaded by the next start, onto whatever disks the definition names by then; checkpoints
//! would bring old bitmaps back to life in new images. Both must be out of libvirt's hands before the definition names
//! other disks, and may come back only when it names the old ones again. A managed save image comes back only if its
//! disks were not written to since, and nobody runs: otherwise it is worth nothing, and dangerous.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::kept::{
    DEFINITION, Kept, KeptDisk, KeptState, KeptVariables, MANAGED_SAVE, RECORD, Was, blocking,
    checkpoint_name, fixed, moved_on, read, write,
};
use super::rest::RestDomain;
use crate::codes;
use crate::hypervisor::{DomainRef, HvError, RunState, Trouble};
use crate::image::copy::Identity;
use crate::image::root::{Component, Folder, RootError};
use crate::manifest::folder::TPM_PREFIX;
use crate::snapshot::{Places, World, cannot_look, fence, on_the_way_back};
use crate::tpm;

/// Sets a machine aside.
#[derive(Debug)]
pub struct SetAside {
    /// The world.
    pub world: World,
    /// Where it is kept.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AsideInput {
    /// The domain.
    pub domain: DomainRef,
    /// The folder in which it is kept.
    pub kept: PathBuf,
    /// What takes its place, for people.
    pub because: String,
    /// Its disks; as of when is found out now.
    pub disks: Vec<KeptDisk>,
    /// The step that brought it to rest.
    pub rest: StepName,
    /// Its firmware variables; as of when is found out now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<KeptVariables>,
    /// The folder of its TPM, if the state of that is exchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<PathBuf>,
}

/// The note before libvirt is told to forget.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Note {
    checkpoints: Vec<String>,
}

const DOING: &str = "set the old machine aside";

/// Fails if somebody has started the domain.
pub(super) async fn must_be_off(world: &World, domain: &DomainRef, doing: &str) -> Result<(), Fault> {
    let state = world.hypervisor.state(&domain.id).await;
    match state.map_err(|e| e.fault(codes::CANNOT_BRING_TO_REST, doing, &domain.name))? {
        RunState::Off => Ok(()),
        _ => Err(Fault::permanent(
            Code::FACTS_CHANGED,
            doing,
            &domain.name,
            "somebody has started it meanwhile: it runs on as it is",
        )
        .remedy("Start the restore again, and keep others from starting the domain meanwhile")),
    }
}

impl SetAside {
    async fn checkpoints(&self, cx: &StepContext, input: &AsideInput) -> Result<Vec<String>, Fault> {
        let fault =
            |e: HvError| e.fault(codes::CANNOT_SAVE_XML, "set the checkpoints aside", &input.domain.name);
        let id = &input.domain.id;
        // Noted: all of them are in files already, and some may be forgotten.
        let noted = cx.progress.saved().and_then(|note| Note::deserialize(&note).ok());
        let names = match noted {
            Some(note) => note.checkpoints,
            None => {
                let all = self.world.hypervisor.checkpoint_definitions(id).await.map_err(fault)?;
                let names: Vec<String> = all.iter().map(|(name, _)| name.clone()).collect();
                let kept = input.kept.clone();
                let code = codes::CANNOT_SAVE_XML;
                blocking(&self.places, code, "keep the checkpoints", &input.kept, move |places| {
                    let folder = places.roots.open_folder(&kept)?;
                    for (number, (_, xml)) in all.iter().enumerate() {
                        write(&folder, &checkpoint_name(number), xml.as_bytes())?;
                    }
                    folder.sync()
                })
                .await?;
                cx.progress.save(&Note { checkpoints: names.clone() }).await?;
                names
            }
        };
        if !names.is_empty() {
            self.world.hypervisor.forget_checkpoints(id).await.map_err(fault)?;
        }
        Ok(names)
    }

    async fn record(
        &self,
        cx: &StepContext,
        input: AsideInput,
        managed_save: bool,
        checkpoints: Vec<String>,
    ) -> Result<Kept, Fault> {
        let rest = cx.outputs.of::<RestDomain>(&input.rest)?;
        let (job, kept) = (cx.job, input.kept.clone());
        let AsideInput { domain, because, mut disks, mut variables, tpm, .. } = input;
        let code = codes::CANNOT_SAVE_XML;
        blocking(&self.places, code, "write down what is kept aside", &kept.clone(), move |places| {
            let folder = places.roots.open_folder(&kept)?;
            let definition = read(&folder, &fixed(DEFINITION))?;
            for disk in &mut disks {
                disk.identity = as_of(&disk.path)?;
            }
            if let Some(variables) = &mut variables {
                variables.identity = as_of(&variables.path)?;
            }
            let tpm = tpm.map(|from| keep_tpm(&folder, &from)).transpose()?;
            let record = Kept {
                version: Kept::needed_version(variables.as_ref(), tpm.as_ref()),
                job,
                at: Timestamp::now(),
                domain,
                because,
                was: rest.map_or(Was::Off, |rest| rest.was),
                definition: blake3::hash(definition.as_bytes()).into(),
                disks,
                memory: rest.is_some_and(|rest| rest.memory),
                managed_save,
                checkpoints,
                variables,
                tpm,
            };
            record.store(&folder)?;
            Ok(record)
        })
        .await
    }
}

fn as_of(path: &Path) -> Result<Identity, RootError> {
    Identity::at(path).map_err(|source| RootError::Io { act: "look at", path: path.to_owned(), source })
}

/// Copies the state of a TPM beside the record.
fn keep_tpm(folder: &Folder, from: &Path) -> Result<Vec<KeptState>, RootError> {
    let unreadable = |e: tpm::TpmError| match e {
        tpm::TpmError::Place(e) => e,
        tpm::TpmError::File { path, cause } => {
            RootError::Io { act: "read", path, source: std::io::Error::other(cause) }
        }
    };
    let mut kept = Vec::new();
    for state in tpm::read(from).map_err(unreadable)? {
        let file = Component::literal(format!("{TPM_PREFIX}{}.{}", state.below, state.name));
        write(folder, &file, &state.bytes)?;
        let path = format!("{}/{}", state.below, state.name);
        kept.push(KeptState { file, path, blake3: blake3::hash(&state.bytes).into() });
    }
    Ok(kept)
}

#[async_trait]
impl Step for SetAside {
    const KIND: StepKind = StepKind::new("set-aside", 1);
    type Input = AsideInput;
    type Output = Kept;

    async fn run(&self, cx: &StepContext, input: AsideInput) -> Result<Kept, Fault> {
        must_be_off(&self.world, &input.domain, DOING).await?;
        let managed = input.kept.join(MANAGED_SAVE);
        let taken = self.world.hypervisor.take_managed_save(&input.domain.id, &managed).await;
        let taken =
            taken.map_err(|e| e.fault(codes::CANNOT_SAVE_MACHINE_STATE, DOING, &input.domain.name))?;
        // Taken by an attempt that was cut off: libvirt has none any more, and the file is here.
        let managed_save = taken || there(&managed).await.unwrap_or(false);
        let checkpoints = self.checkpoints(cx, &input).await?;
        must_be_off(&self.world, &input.domain, DOING).await?;
        self.record(cx, input, managed_save, checkpoints).await
    }

    /// Each part of it may be repeated.
    async fn probe(&self, cx: &StepContext, input: AsideInput) -> Verdict<Kept> {
        fence::not_done(&*self.world.hypervisor, &input.domain.id, cx.still_running).await
    }

    async fn undo(&self, _: &StepContext, input: AsideInput, _: Option<Kept>) -> Result<(), Fault> {
        let places = self.places.clone();
        let disks = input.disks.iter().map(|disk| disk.path.clone()).collect();
        give_back(&self.world, &places, &input.domain, &input.kept, disks).await?;
        let kept = input.kept.clone();
        let code = codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION;
        let gone = blocking(&places, code, "remove the record", &input.kept, move |places| {
            let folder = match places.roots.open_folder(&kept) {
                Err(RootError::Missing { .. }) => return Ok(()),
                folder => folder?,
            };
            folder.remove_file(&fixed(RECORD))?;
            folder.sync()
        });
        gone.await.map_err(|fault| fault.class(Class::Transient))
    }

    async fn probe_undo(&self, cx: &StepContext, input: AsideInput, _: Option<Kept>) -> Verdict<()> {
        fence::not_done(&*self.world.hypervisor, &input.domain.id, cx.still_running).await
    }
}

/// Lets libvirt remember a machine again whose definition it has: checkpoints, and the managed save image if that still
/// fits. May be repeated.
async fn give_back(
    world: &World,
    places: &Places,
    domain: &DomainRef,
    kept: &Path,
    disks: Vec<PathBuf>,
) -> Result<(), Fault> {
    let doing = "give libvirt back what it knew of the old machine";
    let hypervisor = &world.hypervisor;
    let fault = |e: HvError| on_the_way_back(e, codes::CANNOT_DEFINE_MACHINE, doing, &domain.name);
    let state = match hypervisor.state(&domain.id).await {
        Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(()),
        state => state.map_err(fault)?,
    };
    let folder = kept.to_owned();
    let texts = blocking(places, codes::CANNOT_READ_XML_FILE, doing, kept, move |places| {
        let folder = match places.roots.open_folder(&folder) {
            Err(RootError::Missing { .. }) => return Ok(Vec::new()),
            folder => folder?,
        };
        let mut texts = Vec::new();
        for number in 0.. {
            match read(&folder, &checkpoint_name(number)) {
                Ok(text) => texts.push(text),
                Err(RootError::Missing { .. }) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(texts)
    })
    .await
    .map_err(|fault| fault.class(Class::Transient))?;
    for text in texts {
        if let Some(name) = checkpoint_of(&text) {
            hypervisor.give_checkpoint(&domain.id, &name, &text).await.map_err(fault)?;
        }
    }
    let managed = kept.join(MANAGED_SAVE);
    if state == RunState::Off && moved_on(&managed, &disks).is_none() {
        hypervisor.give_managed_save(&domain.id, &managed).await.map_err(fault)?;
    }
    Ok(())
}

/// The name in a checkpoint's description: its first element of that name, which libvirt writes first.
fn checkpoint_of(xml: &str) -> Option<String> {
    let (_, rest) = xml.split_once("<name>")?;
    let (name, _) = rest.split_once("</name>")?;
    let plain = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
    Some(plain.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to)))
}

/// Lets libvirt remember a machine that has come back.
#[derive(Debug)]
pub struct BringBack {
    /// The world.
    pub world: World,
    /// Where it was kept.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackInput {
    /// The domain.
    pub domain: DomainRef,
    /// The folder in which it was kept.
    pub kept: PathBuf,
    /// The images of its disks.
    pub disks: Vec<PathBuf>,
}

#[async_trait]
impl Step for BringBack {
    const KIND: StepKind = StepKind::new("bring-back", 1);
    type Input = BackInput;
    type Output = ();

    async fn run(&self, _: &StepContext, input: BackInput) -> Result<(), Fault> {
        give_back(&self.world, &self.places, &input.domain, &input.kept, input.disks).await
    }

    async fn probe(&self, cx: &StepContext, input: BackInput) -> Verdict<()> {
        fence::not_done(&*self.world.hypervisor, &input.domain.id, cx.still_running).await
    }

    async fn undo(&self, _: &StepContext, input: BackInput, _: Option<()>) -> Result<(), Fault> {
        let doing = "set the old machine aside again";
        let hypervisor = &self.world.hypervisor;
        let fault = |e: HvError| on_the_way_back(e, codes::UNDO_FAILED, doing, &input.domain.name);
        match hypervisor.state(&input.domain.id).await {
            Ok(RunState::Off) => {}
            // Whoever runs has no managed save image, and keeps its checkpoints.
            Ok(_) => return Ok(()),
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(()),
            Err(e) => return Err(fault(e)),
        }
        let managed = input.kept.join(MANAGED_SAVE);
        if there(&managed).await.unwrap_or(false) {
            hypervisor.take_managed_save(&input.domain.id, &managed).await.map_err(fault)?;
        }
        hypervisor.forget_checkpoints(&input.domain.id).await.map_err(fault)
    }

    async fn probe_undo(&self, cx: &StepContext, input: BackInput, _: Option<()>) -> Verdict<()> {
        match fence::fence(&*self.world.hypervisor, &input.domain.id).await {
            Ok(fence::Fence::Closed) if !cx.still_running => Verdict::NotDone,
            Ok(fence::Fence::Closed) => Verdict::InFlight("the call has not returned".to_owned()),
            Ok(fence::Fence::Open(what)) => Verdict::InFlight(what),
            Err(e) => cannot_look(&e),
        }
    }
}

async fn there(path: &std::path::Path) -> std::io::Result<bool> {
    let path = path.to_owned();
    crate::blocking::io(move || path.try_exists()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoints_name_is_read_as_libvirt_writes_it() {
        let xml =
            "<domaincheckpoint>\n  <name>a &lt;b&gt; &amp;amp;</name>\n  <parent><name>z</name></parent>";
        assert_eq!(checkpoint_of(xml).as_deref(), Some("a <b> &amp;"));
        assert_eq!(checkpoint_of("<domaincheckpoint/>"), None);
    }
}

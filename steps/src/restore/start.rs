//! `start-domain`: the new domain gets a QEMU, paused: from its memory image, or cold.
//!
//! A memory image fits its disks only as long as nobody has written to them since it was made. So before the memory is
//! loaded every restored image must be exactly as it was when it was restored (inode, size, time of change; and if the
//! time says otherwise, its hash). That also covers a repetition of this step after a crash, and an operator who
//! started the domain by hand in between.
//!
//! A guest restored from memory takes the state of its links from there: the definition says "down", libvirt
//! believes it, and the device is up. The cables are therefore pulled in QEMU itself, while the guest still stands.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::fetch::Restored;
use super::identity::NewDomain;
use super::image::RestoreImage;
use super::memory::{GO_COLD, RestoreMemory};
use crate::codes;
use crate::hypervisor::{DomainRef, HvError, Observation, Qemu, RunState, Trouble};
use crate::image::copy::{self, CopyError, Identity, SourceFile};
use crate::manifest::Digest;
use crate::snapshot::{World, cannot_look, fence, theirs};

/// Starts the domain.
#[derive(Debug)]
pub struct StartDomain(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartInput {
    /// The new domain.
    pub new: NewDomain,
    /// The steps that restored its images from files.
    pub images: Vec<StepName>,
    /// Further files that its QEMU may have, which it never had memory for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PathBuf>,
    /// The step that restored its memory; nothing for a cold start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<StepName>,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartOutput {
    /// The QEMU process.
    pub instance: String,
    /// Cables that were pulled.
    pub pulled: u32,
}

/// The note that a QEMU process is as it should be, cables included.
#[derive(Serialize, Deserialize)]
struct Pulled {
    instance: String,
    pulled: u32,
}

/// What is wrong with the files that QEMU has, if anything is.
pub(crate) fn strange_files(qemu: &Qemu, new: &NewDomain, images: &[PathBuf]) -> Option<String> {
    let same = |a: &Path, b: &Path| match (Identity::at(a), Identity::at(b)) {
        (Ok(a), Ok(b)) => a.same_file(&b),
        _ => a == b,
    };
    for disk in &new.disks {
        let Some(top) = qemu.top(&disk.target) else {
            return Some(format!("QEMU has no disk {}", disk.target));
        };
        if !same(top, &disk.path) {
            return Some(format!("QEMU has disk {} on {}", disk.target, top.display()));
        }
        let chain = qemu.disk(&disk.target).map(|disk| disk.chain.as_slice()).unwrap_or_default();
        if let Some(layer) = chain.iter().find(|layer| !images.iter().any(|image| same(&layer.path, image))) {
            return Some(format!("QEMU has {} under disk {}", layer.path.display(), disk.target));
        }
    }
    None
}

impl StartDomain {
    fn images(cx: &StepContext, input: &StartInput) -> Result<Vec<Restored>, Fault> {
        let mut images = Vec::new();
        for step in &input.images {
            images.extend(cx.outputs.of::<RestoreImage>(step)?);
        }
        Ok(images)
    }

    /// What is to be seen once it is started: our files, and libvirt has nothing left to do.
    fn settled(&self, seen: &Observation, input: &StartInput, images: &[Restored]) -> Result<String, String> {
        let Some(qemu) = &seen.qemu else { return Err("there is no QEMU".to_owned()) };
        let paths: Vec<_> = images.iter().map(|image| &image.path).chain(&input.files).cloned().collect();
        match strange_files(qemu, &input.new, &paths) {
            Some(what) => Err(what),
            None => Ok(qemu.instance.clone()),
        }
    }

    async fn with_memory(
        &self,
        cx: &StepContext,
        input: &StartInput,
        step: &StepName,
        images: &[Restored],
    ) -> Result<(), Fault> {
        let doing = "give the guest its memory back";
        let name = input.new.domain.name.as_str();
        let Some(image) = cx.outputs.of::<RestoreMemory>(step)? else {
            return Err(Fault::permanent(Code::UNDEFINED, doing, name, "the memory was not restored"));
        };
        let looked_at = images.to_vec();
        let untouched = crate::blocking::run(move || written_to(&looked_at)).await;
        match untouched {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(path))) => {
                let cause = format!("{} was written to since it was restored", path.display());
                return Err(
                    Fault::permanent(codes::CANNOT_RESTORE_MACHINE, doing, name, cause).remedy(GO_COLD)
                );
            }
            Ok(Err(e)) => return Err(Fault::transient(codes::CANNOT_RESTORE_MACHINE, doing, name, e)),
            Err(e) => return Err(Fault::permanent(Code::UNDEFINED, doing, name, e)),
        }
        let fault = |e: HvError| e.fault(codes::CANNOT_RESTORE_MACHINE, doing, name).remedy(GO_COLD);
        let hypervisor = &self.0.hypervisor;
        let xml = hypervisor.memory_image_definition(&image.path).await.map_err(fault)?;
        hypervisor.start_from_memory(&image.path, &xml, true).await.map_err(fault)
    }
}

/// The first of these files that somebody has written to since it was restored.
pub(crate) fn written_to(images: &[Restored]) -> Result<Option<PathBuf>, CopyError> {
    for image in images {
        let file = SourceFile::open(&image.path)?;
        let is = file.identity();
        if is == image.identity {
            continue;
        }
        // Opening an image may touch its times without changing a byte. The content decides.
        let same = is.same_file(&image.identity)
            && is.size == image.identity.size
            && Digest(copy::hash(&file, None, &())?) == image.blake3;
        if !same {
            return Ok(Some(image.path.clone()));
        }
    }
    Ok(None)
}

/// Pulls the cables if the definition says so; of how many cards.
pub(super) async fn pull_links(world: &World, new: &NewDomain, with_memory: bool) -> Result<u32, Fault> {
    // Started cold a guest finds its links as the definition says.
    if !new.links_down || !with_memory {
        return Ok(0);
    }
    let pulled = world.hypervisor.pull_links(&new.domain.id).await;
    pulled.map_err(|e| e.fault(codes::CANNOT_START_MACHINE, "pull the network cables", &new.domain.name))
}

#[async_trait]
impl Step for StartDomain {
    const KIND: StepKind = StepKind::new("start-domain", 1);
    type Input = StartInput;
    type Output = StartOutput;

    async fn run(&self, cx: &StepContext, input: StartInput) -> Result<StartOutput, Fault> {
        let name = input.new.domain.name.as_str();
        let id = &input.new.domain.id;
        let images = Self::images(cx, &input)?;
        if self.0.observe(id, codes::CANNOT_START_MACHINE).await?.state == RunState::Off {
            match &input.memory {
                Some(step) => self.with_memory(cx, &input, step, &images).await?,
                None => self
                    .0
                    .hypervisor
                    .start(id, true)
                    .await
                    .map_err(|e| e.fault(codes::CANNOT_START_MACHINE, "start the domain", name))?,
            }
        }
        let seen = self.0.observe(id, codes::CANNOT_START_MACHINE).await.map_err(Fault::in_doubt)?;
        if seen.qemu.is_none() {
            let (code, remedy) = match input.memory {
                Some(_) => (codes::CANNOT_RESTORE_MACHINE, GO_COLD),
                None => (codes::CANNOT_START_MACHINE, "See the domain's log of QEMU"),
            };
            let cause = "its QEMU ended right after it had been started";
            return Err(Fault::permanent(code, "start the domain", name, cause).remedy(remedy));
        }
        let instance = self.settled(&seen, &input, &images).map_err(|what| {
            Fault::permanent(Code::EFFECT_DIVERGED, "start the domain", name, what).class(Class::Fatal)
        })?;
        let pulled =
            pull_links(&self.0, &input.new, input.memory.is_some()).await.map_err(Fault::in_doubt)?;
        // Whether cables are out cannot be seen afterwards, so it is noted.
        cx.progress.save(&Pulled { instance: instance.clone(), pulled }).await.map_err(Fault::in_doubt)?;
        Ok(StartOutput { instance, pulled })
    }

    async fn probe(&self, cx: &StepContext, input: StartInput) -> Verdict<StartOutput> {
        let id = &input.new.domain.id;
        if let Some(verdict) = fence::under_way(&*self.0.hypervisor, id, cx.still_running).await {
            return verdict;
        }
        let seen = match self.0.hypervisor.observe(id).await {
            Ok(seen) => seen,
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Verdict::NotDone,
            Err(e) => return cannot_look(&e),
        };
        if seen.state == RunState::Off {
            return fence::not_done(&*self.0.hypervisor, id, false).await;
        }
        let images = match Self::images(cx, &input) {
            Ok(images) => images,
            Err(fault) => return Verdict::Unknown(fault.to_string()),
        };
        match self.settled(&seen, &input, &images) {
            Ok(instance) => {
                let note = cx.progress.saved().and_then(|note| Pulled::deserialize(&note).ok());
                match note.filter(|note| note.instance == instance) {
                    Some(note) => Verdict::Done(StartOutput { instance, pulled: note.pulled }),
                    None => Verdict::Partial(json!({ "started": instance })),
                }
            }
            Err(what) => Verdict::Diverged(what),
        }
    }

    async fn undo(&self, _: &StepContext, input: StartInput, _: Option<StartOutput>) -> Result<(), Fault> {
        end(&self.0, &input.new.domain).await
    }
}

/// Ends a QEMU that was started for a guest that has not run yet.
async fn end(world: &World, domain: &DomainRef) -> Result<(), Fault> {
    let id = &domain.id;
    let doing = "end the domain that was started";
    let fault = |e: HvError| {
        let class = if e.is_transient() { Class::Transient } else { Class::Permanent };
        e.fault(codes::UNDO_FAILED, doing, &domain.name).class(class)
    };
    match world.hypervisor.state(id).await {
        Ok(RunState::Off) => Ok(()),
        Ok(RunState::Paused(_)) => world.hypervisor.destroy(id).await.map_err(fault),
        Ok(RunState::Running | RunState::Other) => Err(theirs(doing, domain, "somebody has let it run")),
        Err(e) if e.trouble == Trouble::NoSuchDomain => Ok(()),
        Err(e) => Err(fault(e)),
    }
}

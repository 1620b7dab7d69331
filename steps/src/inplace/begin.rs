//! `begin-machine`: the machine that has come in place gets a QEMU, paused: from its memory, or cold.
//!
//! Memory is loaded only onto disks that are exactly as they were when it was restored or saved. The QEMU that this step
//! starts bears a hold in its live definition (`begun`), put into the very definition that it is loaded with: so a
//! domain that somebody else started in between, from the new disks and without the memory, is told from ours. Then the
//! guest has booted from these disks; they have moved on, the memory is worth nothing any more, and the job goes on
//! without it: what somebody runs is not taken from them.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::kept::{KeptDisk, is_whole, moved_on};
use crate::codes;
use crate::hypervisor::{Hold, HvError, Marker, Observation, RunState, Trouble};
use crate::image::copy::Identity;
use crate::restore::identity::NewDomain;
use crate::restore::image::RestoreImage;
use crate::restore::memory::{GO_COLD, RestoreMemory};
use crate::restore::start::{strange_files, written_to};
use crate::snapshot::{World, cannot_look, fence, theirs};

/// Starts the machine.
#[derive(Debug)]
pub struct BeginMachine(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginInput {
    /// The machine, with those of its disks that were exchanged.
    pub machine: NewDomain,
    /// This daemon's store, for the marker.
    pub store: String,
    /// All files that QEMU may have for these disks.
    pub files: Vec<PathBuf>,
    /// The steps that restored its images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restored: Vec<StepName>,
    /// Its memory; nothing for a cold start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryFrom>,
}

/// Where the memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum MemoryFrom {
    /// A step restored it.
    Backup {
        /// Which.
        step: StepName,
    },
    /// It was kept aside, with these disks.
    Kept {
        /// The file.
        path: PathBuf,
        /// The disks.
        disks: Vec<KeptDisk>,
    },
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginOutput {
    /// The QEMU process.
    pub instance: String,
    /// It has its memory.
    pub memory: bool,
    /// Somebody else has started it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_others: bool,
}

const DOING: &str = "start the domain";

/// Why memory that was kept aside does not fit its disks any more, if it does not.
pub(super) fn misfit(memory: &Path, disks: &[KeptDisk]) -> Option<String> {
    if !is_whole(memory) {
        return Some("the memory image is not whole".to_owned());
    }
    let other = disks.iter().find(|disk| !Identity::at(&disk.path).is_ok_and(|now| now == disk.identity));
    if let Some(disk) = other {
        return Some(format!("{} was written to since", disk.path.display()));
    }
    moved_on(memory, &disks.iter().map(|disk| disk.path.clone()).collect::<Vec<_>>())
}

impl BeginMachine {
    fn marker(cx: &StepContext, input: &BeginInput) -> Marker {
        Marker { store: input.store.clone(), job: cx.job.to_string(), hold: Some(Hold::Begun) }
    }

    fn ours(seen: &Observation, cx: &StepContext, input: &BeginInput) -> bool {
        seen.marker.as_ref() == Some(&Self::marker(cx, input))
    }

    /// The memory image, once it is sure that it fits.
    async fn memory(
        &self,
        cx: &StepContext,
        input: &BeginInput,
        from: &MemoryFrom,
    ) -> Result<PathBuf, Fault> {
        let name = input.machine.domain.name.as_str();
        let doing = "give the guest its memory back";
        let mut images = Vec::new();
        for step in &input.restored {
            images.extend(cx.outputs.of::<RestoreImage>(step)?);
        }
        let path = match from {
            MemoryFrom::Backup { step } => match cx.outputs.of::<RestoreMemory>(step)? {
                Some(image) => image.path,
                None => {
                    return Err(Fault::permanent(
                        Code::UNDEFINED,
                        doing,
                        name,
                        "the memory was not restored",
                    ));
                }
            },
            MemoryFrom::Kept { path, .. } => path.clone(),
        };
        let kept = match from {
            MemoryFrom::Backup { .. } => None,
            MemoryFrom::Kept { path, disks } => Some((path.clone(), disks.clone())),
        };
        let check = move || match kept {
            Some((memory, disks)) => Ok(misfit(&memory, &disks)),
            None => written_to(&images).map(|path| {
                path.map(|path| format!("{} was written to since it was restored", path.display()))
            }),
        };
        match crate::blocking::run(check).await {
            Ok(Ok(None)) => Ok(path),
            Ok(Ok(Some(cause))) => {
                Err(Fault::permanent(codes::CANNOT_RESTORE_MACHINE, doing, name, cause).remedy(GO_COLD))
            }
            Ok(Err(e)) => Err(Fault::transient(codes::CANNOT_RESTORE_MACHINE, doing, name, e)),
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, name, e)),
        }
    }

    async fn start(&self, cx: &StepContext, input: &BeginInput) -> Result<(), Fault> {
        let (id, name) = (&input.machine.domain.id, input.machine.domain.name.as_str());
        let hypervisor = &self.0.hypervisor;
        let Some(from) = &input.memory else {
            let fault = |e: HvError| e.fault(codes::CANNOT_START_MACHINE, DOING, name);
            return hypervisor.start(id, true).await.map_err(fault);
        };
        let fault = |e: HvError| e.fault(codes::CANNOT_RESTORE_MACHINE, DOING, name).remedy(GO_COLD);
        let path = self.memory(cx, input, from).await?;
        let xml = hypervisor.memory_image_definition(&path).await.map_err(fault)?;
        let xml = hypervisor.with_marker(&xml, &Self::marker(cx, input)).map_err(fault)?;
        hypervisor.start_from_memory(&path, &xml, true).await.map_err(fault)
    }

    /// What has become of it, once it is on.
    async fn judge(
        &self,
        cx: &StepContext,
        input: &BeginInput,
        seen: Observation,
    ) -> Result<BeginOutput, Fault> {
        let name = input.machine.domain.name.as_str();
        let Some(qemu) = &seen.qemu else {
            let (code, remedy) = match input.memory {
                Some(_) => (codes::CANNOT_RESTORE_MACHINE, GO_COLD),
                None => (codes::CANNOT_START_MACHINE, "See the domain's log of QEMU"),
            };
            let cause = "its QEMU ended right after it had been started";
            return Err(Fault::permanent(code, DOING, name, cause).remedy(remedy));
        };
        if let Some(what) = strange_files(qemu, &input.machine, &input.files) {
            return Err(Fault::permanent(Code::EFFECT_DIVERGED, DOING, name, what).class(Class::Fatal));
        }
        let instance = qemu.instance.clone();
        if Self::ours(&seen, cx, input) {
            return Ok(BeginOutput { instance, memory: input.memory.is_some(), by_others: false });
        }
        if input.memory.is_none() && matches!(seen.state, RunState::Paused(_)) {
            // Ours, and the hold is not there yet; or somebody's that stands at the same place: then it is as good.
            let hold = self.0.hypervisor.set_hold(&input.machine.domain.id, &Self::marker(cx, input)).await;
            hold.map_err(|e| e.fault(codes::CANNOT_START_MACHINE, DOING, name).in_doubt())?;
            return Ok(BeginOutput { instance, memory: false, by_others: false });
        }
        Ok(BeginOutput { instance, memory: false, by_others: true })
    }
}

#[async_trait]
impl Step for BeginMachine {
    const KIND: StepKind = StepKind::new("begin-machine", 1);
    type Input = BeginInput;
    type Output = BeginOutput;

    async fn run(&self, cx: &StepContext, input: BeginInput) -> Result<BeginOutput, Fault> {
        let id = &input.machine.domain.id;
        if self.0.observe(id, codes::CANNOT_START_MACHINE).await?.state == RunState::Off
            && let Err(fault) = self.start(cx, &input).await
        {
            // Somebody may have been quicker by a moment: libvirt then refuses a second start.
            let now = self.0.hypervisor.state(id).await;
            if fault.in_doubt || !matches!(now, Ok(state) if state.is_active()) {
                return Err(fault);
            }
        }
        let seen = self.0.observe(id, codes::CANNOT_START_MACHINE).await.map_err(Fault::in_doubt)?;
        self.judge(cx, &input, seen).await
    }

    async fn probe(&self, cx: &StepContext, input: BeginInput) -> Verdict<BeginOutput> {
        let id = &input.machine.domain.id;
        if let Some(verdict) = fence::under_way(&*self.0.hypervisor, id, cx.still_running).await {
            return verdict;
        }
        let seen = match self.0.hypervisor.observe(id).await {
            Ok(seen) => seen,
            Err(e) if e.trouble == Trouble::NoSuchDomain => {
                return Verdict::Diverged("somebody has removed the domain".to_owned());
            }
            Err(e) => return cannot_look(&e),
        };
        if seen.state == RunState::Off || !Self::ours(&seen, cx, &input) {
            // Off: nothing was started. On, and not (yet) known to be ours: `run` tells whose it is.
            return fence::not_done(&*self.0.hypervisor, id, false).await;
        }
        match self.judge(cx, &input, seen).await {
            Ok(output) => Verdict::Done(output),
            Err(fault) if fault.class == Class::Fatal => Verdict::Diverged(fault.cause),
            Err(fault) => Verdict::Unknown(fault.to_string()),
        }
    }

    async fn undo(&self, cx: &StepContext, input: BeginInput, _: Option<BeginOutput>) -> Result<(), Fault> {
        let (id, name) = (&input.machine.domain.id, input.machine.domain.name.as_str());
        let doing = "end the domain that was started";
        let seen = match self.0.hypervisor.observe(id).await {
            Ok(seen) => seen,
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(()),
            Err(e) => return Err(e.fault(codes::UNDO_FAILED, doing, name).class(Class::Transient)),
        };
        match seen.state {
            RunState::Off => Ok(()),
            RunState::Paused(_) if Self::ours(&seen, cx, &input) => {
                let ended = self.0.hypervisor.destroy(id).await;
                ended.map_err(|e| e.fault(codes::UNDO_FAILED, doing, name).class(Class::Transient))
            }
            _ => Err(theirs(doing, &input.machine.domain, "somebody has let it run")),
        }
    }
}

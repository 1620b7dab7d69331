//! The plan of an exchange of machines: the same for a restore in place and for its undo.

use std::path::PathBuf;

use serde_json::Value;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{Code, Fault, Millis, Plan, StepName, StepSpec};

use super::aside::{AsideInput, BackInput, BringBack, SetAside};
use super::begin::{BeginInput, BeginMachine, MemoryFrom};
use super::keep::{ForgetInput, ForgetKept, KeepAside, KeepInput};
use super::kept::{KeptDisk, KeptVariables, Was};
use super::rest::{Rest, RestDomain, RestInput};
use super::seen::{Arrive, SeeRunning, SeenInput};
use super::swap::{Machine, SwapDefinition, SwapInput};
use super::tpm::{ExchangeInput, ExchangeTpm, TpmFrom};
use crate::hypervisor::DomainRef;
use crate::recipe::{PATIENT_LOOK, PATIENTLY, patient, step};
use crate::restore::Then;
use crate::restore::folder::{PlaceInput, RestoreFolder};
use crate::restore::identity::NewDomain;
use crate::restore::image::{ImageInput, RestoreImage};
use crate::restore::machine::{RestoreVariables, VariablesInput};
use crate::restore::memory::{MemoryImageInput, RestoreMemory};
use crate::restore::resume::{ResumeDomain, ResumeInput};
use crate::restore::workflow::image_step;
use crate::snapshot::mark::{Mark, MarkInput, Unmark};

/// The machine that is there, and how it is set aside.
pub(super) struct Present {
    pub(super) machine: Machine,
    pub(super) disks: Vec<KeptDisk>,
    pub(super) was: Was,
    pub(super) rest: Rest,
    /// Where it is kept.
    pub(super) kept: PathBuf,
    /// What takes its place, for people.
    pub(super) because: String,
    pub(super) variables: Option<KeptVariables>,
}

/// An exchange.
pub(super) struct Exchange {
    pub(super) workflow: &'static str,
    pub(super) version: u32,
    pub(super) title: String,
    pub(super) domain: DomainRef,
    pub(super) store: String,
    /// Nothing if the domain does not exist.
    pub(super) present: Option<Present>,
    pub(super) places: Vec<PlaceInput>,
    pub(super) images: Vec<ImageInput>,
    /// The new machine's firmware variables, if they are restored.
    pub(super) variables: Option<VariablesInput>,
    /// The folder of the domain's TPM and what comes into it, if its state is exchanged.
    pub(super) tpm: Option<(PathBuf, TpmFrom)>,
    pub(super) memory_image: Option<MemoryImageInput>,
    pub(super) memory: Option<MemoryFrom>,
    /// What comes in place.
    pub(super) new: Machine,
    pub(super) machine: NewDomain,
    /// All files that QEMU may have for the disks that are exchanged.
    pub(super) files: Vec<PathBuf>,
    /// It was kept aside there, and comes back.
    pub(super) back: Option<BackInput>,
    pub(super) then: Then,
    pub(super) agent: bool,
    pub(super) notes: Vec<String>,
    pub(super) watch_ms: u64,
}

impl Exchange {
    pub(super) fn plan(&self, facts: Value) -> Result<Plan, Fault> {
        let mut steps = Vec::new();
        self.before(&mut steps)?;
        self.exchange(&mut steps)?;
        let barrier = self.after(&mut steps)?;
        // The facts are asserted before anything is touched.
        if let Some(first) = steps.first_mut() {
            first.check_facts = true;
        }
        Plan::new(self.workflow, self.version, self.title.clone(), steps, barrier, facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the exchange", &self.domain.name, e))
    }

    fn mark(&self) -> MarkInput {
        MarkInput { domain: self.domain.clone(), store: self.store.clone() }
    }

    /// All that the guest does not notice.
    fn before(&self, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let name = &self.domain.name;
        let mut ready: Vec<StepName> = Vec::new();
        if let Some(present) = &self.present {
            steps.push(
                step::<Mark>("mark", format!("reserve {name}"), &self.mark())?
                    .undo(patient())
                    .deadline(Millis::secs(120)),
            );
            let keep =
                KeepInput { kept: present.kept.clone(), definition: present.machine.definition.clone() };
            steps.push(
                step::<KeepAside>("keep", "keep the present definition", &keep)?
                    .after("mark")
                    .undo(patient()),
            );
            ready.push("keep".into());
        }
        for (at, place) in self.places.iter().enumerate() {
            let title = format!("make sure of {}", place.folder.display());
            let made = step::<RestoreFolder>(format!("folder/{at}"), title, place)?;
            steps.push(made.after_all(ready.clone()).undoable().deadline(Millis::secs(60)));
        }
        let folder = |folder: &std::path::Path| {
            let at = self.places.iter().position(|place| place.folder == folder);
            at.map(|at| StepName::from(format!("folder/{at}")))
        };
        for image in &self.images {
            let title = format!("restore {} ({} bytes)", image.path().display(), image.wanted.size);
            steps.push(
                step::<RestoreImage>(image_step(image), title, image)?
                    .after_all(ready.clone())
                    .after_all(folder(&image.folder))
                    .undo(patient())
                    .stall(Millis::secs(600)),
            );
        }
        if let Some(variables) = &self.variables {
            let title = format!("restore {} (firmware variables)", variables.path().display());
            steps.push(
                step::<RestoreVariables>("variables", title, variables)?
                    .after_all(ready.clone())
                    .after_all(folder(&variables.folder))
                    .undo(patient())
                    .deadline(Millis::secs(120)),
            );
        }
        if let Some(memory) = &self.memory_image {
            let title = format!("restore the memory ({} bytes)", memory.wanted.size);
            steps.push(
                step::<RestoreMemory>("memory", title, memory)?
                    .after_all(ready)
                    .after_all(folder(&memory.folder))
                    .undo(patient())
                    .stall(Millis::secs(600)),
            );
        }
        Ok(())
    }

    fn exchange(&self, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let name = &self.domain.name;
        let mut before: Vec<StepName> = steps.iter().map(|step| step.name.clone()).collect();
        if let Some(present) = &self.present {
            let rest = RestInput {
                domain: self.domain.clone(),
                how: present.rest,
                kept: present.kept.clone(),
                disks: present.disks.iter().map(|disk| disk.path.clone()).collect(),
                was: present.was,
            };
            let title = match present.rest {
                Rest { save: true, .. } => format!("save the memory of {name} and end it"),
                Rest { destroy: true, .. } => format!("shut {name} down, or pull its plug"),
                Rest { .. } => format!("shut {name} down"),
            };
            steps.push(
                step::<RestDomain>("rest", title, &rest)?
                    .after_all(before)
                    .check_facts()
                    .critical()
                    .undo(patient())
                    .probing(PATIENT_LOOK),
            );
            let aside = AsideInput {
                domain: self.domain.clone(),
                kept: present.kept.clone(),
                because: present.because.clone(),
                disks: present.disks.clone(),
                rest: "rest".into(),
                variables: present.variables.clone(),
                tpm: self.tpm.as_ref().map(|(folder, _)| folder.clone()),
            };
            steps.push(
                step::<SetAside>("aside", "set the present machine aside", &aside)?
                    .after("rest")
                    .undo(patient())
                    .probing(PATIENT_LOOK),
            );
            before = vec!["aside".into()];
        }
        let swap = SwapInput {
            domain: self.domain.clone(),
            store: self.store.clone(),
            old: self.present.as_ref().map(|present| present.machine.clone()),
            new: self.new.clone(),
        };
        steps.push(
            step::<SwapDefinition>("swap", format!("give {name} its other disks"), &swap)?
                .after_all(before)
                .undo(patient())
                .deadline(Millis::secs(180)),
        );
        let mut last: StepName = "swap".into();
        if let Some((folder, from)) = &self.tpm {
            let exchange = ExchangeInput {
                domain: self.domain.clone(),
                folder: folder.clone(),
                from: from.clone(),
                old: self.present.as_ref().map(|present| (present.kept.clone(), "aside".into())),
            };
            steps.push(
                step::<ExchangeTpm>("tpm", format!("give {name} the state of its TPM"), &exchange)?
                    .after(last)
                    .undo(patient())
                    .deadline(Millis::secs(180)),
            );
            last = "tpm".into();
        }
        if let Some(back) = &self.back {
            steps.push(
                step::<BringBack>("back", "let libvirt remember the machine that comes back", back)?
                    .after(last)
                    .undo(patient())
                    .deadline(Millis::secs(180)),
            );
        }
        Ok(())
    }

    /// From the start of the other machine to the end; the point of no return.
    fn after(&self, steps: &mut Vec<StepSpec>) -> Result<Option<StepName>, Fault> {
        let name = &self.domain.name;
        let mut last: StepName = match (&self.back, &self.tpm) {
            (Some(_), _) => "back".into(),
            (None, Some(_)) => "tpm".into(),
            (None, None) => "swap".into(),
        };
        let mut barrier = None;
        if self.then != Then::Default {
            let begin = BeginInput {
                machine: self.machine.clone(),
                store: self.store.clone(),
                files: self.files.clone(),
                restored: self.images.iter().map(image_step).collect(),
                memory: self.memory.clone(),
            };
            let title = match &self.memory {
                Some(_) => format!("give {name} its memory, paused"),
                None => format!("start {name}, paused"),
            };
            steps.push(
                step::<BeginMachine>("begin", title, &begin)?
                    .after(last)
                    .undo(patient())
                    .retry(Retry { attempts: 2, ..Retry::default() })
                    .probing(PATIENT_LOOK),
            );
            last = "begin".into();
        }
        if self.then == Then::Running {
            let resume = ResumeInput {
                new: self.machine.clone(),
                images: self.files.clone(),
                with_memory: self.memory.is_some(),
            };
            steps.push(
                step::<ResumeDomain>("resume", format!("let {name} run"), &resume)?
                    .after(last)
                    .probing(PATIENT_LOOK)
                    .deadline(Millis::secs(180)),
            );
            last = "resume".into();
            barrier = Some(last.clone());
        }
        if self.present.is_some() {
            let arrive = step::<Arrive>("arrive", "the domain is no longer down for this job", &())?;
            steps.push(arrive.after(last).closes("rest"));
            last = "arrive".into();
        }
        let memory = self.memory_image.as_ref();
        let seen = SeenInput {
            machine: self.machine.clone(),
            memory: memory.map(|m| (m.folder.clone(), m.own, m.wanted.name.clone())),
            begun: (self.then != Then::Default).then(|| "begin".into()),
            resumed: (self.then == Then::Running).then(|| "resume".into()),
            tpm: self.tpm.as_ref().map(|_| "tpm".into()),
            agent: self.agent,
            kept: self.present.is_some(),
            notes: self.notes.clone(),
            watch_ms: self.watch_ms,
        };
        let title = format!("see whether {name} stands");
        steps.push(step::<SeeRunning>("seen", title, &seen)?.after(last).retry(PATIENTLY));
        last = "seen".into();
        if let Some(back) = &self.back {
            let forget = ForgetInput { kept: back.kept.clone() };
            steps.push(
                step::<ForgetKept>("forget", "it is not kept aside any more", &forget)?
                    .after(last)
                    .retry(PATIENTLY),
            );
            last = "forget".into();
            barrier = barrier.or_else(|| Some("forget".into()));
        }
        steps.push(
            step::<Unmark>("unmark", format!("release {name}"), &self.mark())?.after(last).retry(PATIENTLY),
        );
        Ok(barrier)
    }
}

//! `see-running`: whether the machine that has come in place stands; and `arrive`.
//!
//! A guest that was let go is watched for some seconds: it must not be stopped by a disk, and if it has an agent that is
//! asked whether it answers. Whoever boots may need longer than that, so a silent agent is said and is no failure. Then
//! the copy of the memory image is removed: together with disks that have moved on it would be dangerous.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, JobId, Step, StepContext, StepName, Verdict};

use super::begin::BeginMachine;
use crate::codes;
use crate::hypervisor::{DomainRef, PauseReason, RunState};
use crate::image::root::{Component, RootError};
use crate::restore::fetch::aside;
use crate::restore::identity::NewDomain;
use crate::restore::resume::ResumeDomain;
use crate::snapshot::copy::place_fault;
use crate::snapshot::{Places, World};

/// Watches, tidies and reports.
#[derive(Debug)]
pub struct SeeRunning {
    /// The world.
    pub world: World,
    /// Where may be written.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenInput {
    /// The machine, with those of its disks that were exchanged.
    pub machine: NewDomain,
    /// The copy of the memory image: its folder, whether that is one of the domain's own, and the file in the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<(PathBuf, bool, Component)>,
    /// The step that started it; nothing if it is not to be started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begun: Option<StepName>,
    /// The step that let it go; nothing if it is not to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<StepName>,
    /// It has the channel of an agent.
    pub agent: bool,
    /// The machine that was set aside for it is kept.
    pub kept: bool,
    /// What was known when the plan was made.
    pub notes: Vec<String>,
    /// For how many milliseconds a running guest is watched.
    pub watch_ms: u64,
}

/// What an exchange of machines leaves: the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchanged {
    /// The domain.
    pub domain: DomainRef,
    /// Whether it is off, runs or is paused.
    pub state: RunState,
    /// Whether the guest goes on from its memory.
    pub with_memory: bool,
    /// The disks that were exchanged, with their images.
    pub disks: Vec<(String, PathBuf)>,
    /// The job under which the machine is kept whose place it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<JobId>,
    /// What its owner must know.
    pub notes: Vec<String>,
}

/// How often a running guest is looked at.
const LOOK: Duration = Duration::from_millis(250);

impl SeeRunning {
    /// Watches it; its state in the end, and whether its agent has answered.
    async fn watch(&self, cx: &StepContext, input: &SeenInput) -> Result<(RunState, bool), Fault> {
        let (id, name) = (&input.machine.domain.id, input.machine.domain.name.as_str());
        let mut left = Duration::from_millis(if input.resumed.is_some() { input.watch_ms } else { 0 });
        let mut answered = false;
        loop {
            let state = self.world.hypervisor.state(id).await;
            let state =
                state.map_err(|e| e.fault(codes::CANNOT_START_MACHINE, "look at the domain", name))?;
            if state == RunState::Paused(PauseReason::IoError) {
                let cause = "QEMU has stopped it because a disk could not be written";
                return Err(Fault::permanent(codes::NOT_ENOUGH_DISK_SPACE, "let the guest run", name, cause)
                    .remedy(format!(
                        "Make room beside its images, `virsh resume {name}`, then settle the job"
                    )));
            }
            if left.is_zero() || cx.stopping() || state == RunState::Off {
                return Ok((state, answered));
            }
            if input.agent && !answered && state == RunState::Running {
                let ping = self.world.hypervisor.freeze_state(id);
                answered = tokio::time::timeout(left, ping).await.is_ok_and(|answer| answer.is_ok());
            }
            tokio::time::sleep(LOOK).await;
            cx.progress.alive();
            left = left.saturating_sub(LOOK);
        }
    }

    async fn tidy(&self, cx: &StepContext, input: &SeenInput) -> Result<(), Fault> {
        let Some((folder, own, name)) = input.memory.clone() else { return Ok(()) };
        let (places, job) = (self.places.clone(), cx.job);
        let object = folder.display().to_string();
        let doing = "remove the copy of the memory image";
        let gone = tokio::task::spawn_blocking(move || {
            let folder = match places.open(&folder, own) {
                Err(RootError::Missing { .. }) => return Ok(()),
                folder => folder?,
            };
            folder.remove_file(&aside(job, name.as_str()))?;
            folder.sync()
        });
        match gone.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => {
                Err(place_fault(&e, codes::CANNOT_REMOVE_FILE, doing, &object).class(Class::Transient))
            }
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, object, e)),
        }
    }
}

#[async_trait]
impl Step for SeeRunning {
    const KIND: StepKind = StepKind::new("see-running", 1);
    type Input = SeenInput;
    type Output = Exchanged;

    async fn run(&self, cx: &StepContext, input: SeenInput) -> Result<Exchanged, Fault> {
        let (state, answered) = self.watch(cx, &input).await?;
        self.tidy(cx, &input).await?;
        let begun = match &input.begun {
            Some(step) => cx.outputs.of::<BeginMachine>(step)?,
            None => None,
        };
        let resumed = match &input.resumed {
            Some(step) => cx.outputs.of::<ResumeDomain>(step)?,
            None => None,
        };
        let cold = resumed.is_some_and(|output| output.cold);
        let mut notes = input.notes;
        if begun.as_ref().is_some_and(|output| output.by_others) {
            notes.push(
                "Somebody else has started it meanwhile: it booted from its new disks, without any memory."
                    .into(),
            );
        }
        if cold {
            notes.push(
                "Its QEMU ended right after it had been let go; it was started again without its memory, as after a \
                 power cut."
                    .to_owned(),
            );
        }
        if state == RunState::Off && input.resumed.is_some() {
            notes.push("It has shut down or crashed since.".to_owned());
        }
        if input.agent && !answered && input.resumed.is_some() && state == RunState::Running {
            notes.push("Its agent has not answered yet; a guest that boots may need longer.".to_owned());
        }
        Ok(Exchanged {
            domain: input.machine.domain.clone(),
            state,
            with_memory: begun.is_some_and(|output| output.memory) && !cold,
            disks: input.machine.disks.iter().map(|d| (d.target.0.clone(), d.path.clone())).collect(),
            kept: input.kept.then_some(cx.job),
            notes,
        })
    }

    /// Looking and tidying again does no harm.
    async fn probe(&self, cx: &StepContext, _: SeenInput) -> Verdict<Exchanged> {
        if cx.still_running { Verdict::InFlight("it has not returned".to_owned()) } else { Verdict::NotDone }
    }
}

/// The end of the stretch in which the job cannot be paused, because the domain is down for it. It closes the step that
/// brought the old machine to rest, and does nothing: where the domain ends is the other steps' to see to.
#[derive(Debug)]
pub struct Arrive;

#[async_trait]
impl Step for Arrive {
    const KIND: StepKind = StepKind::new("arrive", 1);
    type Input = ();
    type Output = ();

    async fn run(&self, _: &StepContext, (): ()) -> Result<(), Fault> {
        Ok(())
    }

    async fn probe(&self, _: &StepContext, (): ()) -> Verdict<()> {
        Verdict::Done(())
    }
}

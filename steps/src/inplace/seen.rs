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
use vmkeep_workflow::{Fault, JobId, Step, StepContext, StepName, Verdict};

use super::begin::BeginMachine;
use super::tpm::ExchangeTpm;
use crate::hypervisor::{DomainRef, RunState};
use crate::image::root::Component;
use crate::restore::identity::NewDomain;
use crate::restore::resume::ResumeDomain;
use crate::restore::watch;
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
    /// The step that exchanged the state of its TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<StepName>,
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

#[async_trait]
impl Step for SeeRunning {
    const KIND: StepKind = StepKind::new("see-running", 1);
    type Input = SeenInput;
    type Output = Exchanged;

    async fn run(&self, cx: &StepContext, input: SeenInput) -> Result<Exchanged, Fault> {
        let domain = &input.machine.domain;
        let watched = Duration::from_millis(if input.resumed.is_some() { input.watch_ms } else { 0 });
        let (state, answered) =
            watch::watch(&*self.world.hypervisor, cx, domain, input.agent, watched).await?;
        if let Some((folder, own, name)) = input.memory.clone() {
            watch::remove_memory(&self.places, cx, folder, own, name).await?;
        }
        let begun = match &input.begun {
            Some(step) => cx.outputs.of::<BeginMachine>(step)?,
            None => None,
        };
        let resumed = match &input.resumed {
            Some(step) => cx.outputs.of::<ResumeDomain>(step)?,
            None => None,
        };
        let cold = resumed.as_ref().is_some_and(|output| output.cold);
        let mut notes = input.notes;
        if begun.as_ref().is_some_and(|output| output.by_others) {
            notes.push(
                "Somebody else has started it meanwhile: it booted from its new disks, without any memory."
                    .into(),
            );
        }
        let tpm = match &input.tpm {
            Some(step) => cx.outputs.of::<ExchangeTpm>(step)?,
            None => None,
        };
        if tpm.is_some_and(|output| !output.given) {
            notes.push(
                "It was started before its TPM got the state that belongs to it, and may have that of the machine that \
                 was there: shut it down and restore again."
                    .to_owned(),
            );
        }
        if resumed.is_some() {
            notes.extend(watch::since(state, cold));
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
        cx.may_repeat()
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

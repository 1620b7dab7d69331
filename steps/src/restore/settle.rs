//! `settle-domain`: whether the new domain stands, and what its owner must know.
//!
//! A guest that was let run is watched for some seconds. Then the copy of the memory image is removed: it has no use
//! any more, and together with disks that have moved on it would be dangerous.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::define::DefineDomain;
use super::fetch::aside;
use super::identity::NewDomain;
use super::resume::ResumeDomain;
use crate::codes;
use crate::hypervisor::{PauseReason, RunState};
use crate::image::root::{Component, RootError};
use crate::snapshot::copy::place_fault;
use crate::snapshot::{Places, World};

/// Watches, tidies and reports.
#[derive(Debug)]
pub struct SettleDomain {
    /// The world.
    pub world: World,
    /// Where may be written.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettleInput {
    /// The new domain.
    pub new: NewDomain,
    /// The copy of the memory image: its folder, and the name of the file in the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<(PathBuf, Component)>,
    /// The step that defined it.
    pub defined: StepName,
    /// The step that let it run; nothing if it is not to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<StepName>,
    /// What was known when the plan was made.
    pub notes: Vec<String>,
    /// For how many milliseconds a running guest is watched.
    pub watch_ms: u64,
}

/// What a restore leaves: the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The new domain.
    pub domain: crate::hypervisor::DomainRef,
    /// Whether it is off, runs or is paused.
    pub state: RunState,
    /// Whether the guest goes on from its memory.
    pub with_memory: bool,
    /// Its disks.
    pub disks: Vec<(String, PathBuf)>,
    /// What its definition has otherwise than the original's.
    pub changes: Vec<String>,
    /// What its owner must know.
    pub notes: Vec<String>,
}

/// How often a running guest is looked at.
const LOOK: Duration = Duration::from_millis(250);

impl SettleDomain {
    async fn watch(&self, cx: &StepContext, input: &SettleInput) -> Result<RunState, Fault> {
        let (id, name) = (&input.new.domain.id, input.new.domain.name.as_str());
        let mut left = Duration::from_millis(if input.resumed.is_some() { input.watch_ms } else { 0 });
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
                return Ok(state);
            }
            tokio::time::sleep(LOOK).await;
            cx.progress.alive();
            left = left.saturating_sub(LOOK);
        }
    }

    async fn tidy(&self, cx: &StepContext, input: &SettleInput) -> Result<(), Fault> {
        let Some((folder, name)) = input.memory.clone() else { return Ok(()) };
        let (places, job) = (self.places.clone(), cx.job);
        let object = folder.display().to_string();
        let doing = "remove the copy of the memory image";
        let gone = tokio::task::spawn_blocking(move || {
            let folder = match places.roots.open_folder(&folder) {
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
impl Step for SettleDomain {
    const KIND: StepKind = StepKind::new("settle-domain", 1);
    type Input = SettleInput;
    type Output = Report;

    async fn run(&self, cx: &StepContext, input: SettleInput) -> Result<Report, Fault> {
        let state = self.watch(cx, &input).await?;
        self.tidy(cx, &input).await?;
        let defined = cx.outputs.of::<DefineDomain>(&input.defined)?;
        let resumed = match &input.resumed {
            Some(step) => cx.outputs.of::<ResumeDomain>(step)?,
            None => None,
        };
        let cold = resumed.is_some_and(|output| output.cold);
        let mut notes = input.notes;
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
        Ok(Report {
            domain: input.new.domain.clone(),
            state,
            with_memory: input.memory.is_some() && !cold,
            disks: input.new.disks.iter().map(|d| (d.target.0.clone(), d.path.clone())).collect(),
            changes: defined.map(|output| output.changes).unwrap_or_default(),
            notes,
        })
    }

    /// Looking and tidying again does no harm.
    async fn probe(&self, cx: &StepContext, _: SettleInput) -> Verdict<Report> {
        if cx.still_running { Verdict::InFlight("it has not returned".to_owned()) } else { Verdict::NotDone }
    }
}

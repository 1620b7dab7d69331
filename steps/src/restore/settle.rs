//! `settle-domain`: whether the new domain stands, and what its owner must know.
//!
//! A guest that was let run is watched for some seconds; then the copy of the memory image, which has no use any more, is
//! removed ([`watch`]).

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, StepName, Verdict};

use super::define::DefineDomain;
use super::identity::NewDomain;
use super::resume::ResumeDomain;
use super::watch;
use crate::codes;
use crate::hypervisor::RunState;
use crate::image::root::Component;
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
    /// Whether it is to start with the host.
    #[serde(default)]
    pub autostart: bool,
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

#[async_trait]
impl Step for SettleDomain {
    const KIND: StepKind = StepKind::new("settle-domain", 1);
    type Input = SettleInput;
    type Output = Report;

    async fn run(&self, cx: &StepContext, input: SettleInput) -> Result<Report, Fault> {
        let domain = &input.new.domain;
        let watched = Duration::from_millis(if input.resumed.is_some() { input.watch_ms } else { 0 });
        let (state, _) = watch::watch(&*self.world.hypervisor, cx, domain, false, watched).await?;
        if let Some((folder, name)) = input.memory.clone() {
            watch::remove_memory(&self.places, cx, folder, false, name).await?;
        }
        if input.autostart {
            let set = self.world.hypervisor.set_autostart(&domain.id, true).await;
            let doing = "let the domain start with the host";
            set.map_err(|e| e.fault(codes::CANNOT_DEFINE_MACHINE, doing, &domain.name))?;
        }
        let defined = cx.outputs.of::<DefineDomain>(&input.defined)?;
        let resumed = match &input.resumed {
            Some(step) => cx.outputs.of::<ResumeDomain>(step)?,
            None => None,
        };
        let cold = resumed.as_ref().is_some_and(|output| output.cold);
        let mut notes = input.notes;
        if resumed.is_some() {
            notes.extend(watch::since(state, cold));
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
        cx.may_repeat()
    }
}

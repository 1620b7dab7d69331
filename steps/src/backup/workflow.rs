//! The recipe: from a domain and a vault to a plan.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::{Fault, Outputs, Plan, PlanContext, Registry, StepName, Workflow};

use super::begin::BeginPull;
use super::choose;
use super::commit::CommitBackup;
use super::disk::BackupDisk;
use super::end::EndPull;
use super::forget::ForgetCheckpoints;
use super::held::Sessions;
use super::lease::{ReleaseLease, TakeLease};
use super::left::LeftLeases;
use super::options::{BackupOptions, BackupSettings};
use super::plan::Builder;
use super::read::ReadDisks;
use crate::codes;
use crate::hypervisor::{DomainId, DomainRef, Observation, RunState, Trouble};
use crate::recipe;
use crate::snapshot::{World, fence};
use crate::vaults::Vaults;
use crate::workflows::snapshot::{observe, wait_until_free};

/// The name of the workflow.
pub const NAME: &str = "backup";
/// The version of the recipe.
pub const VERSION: u32 = 1;

/// The recipe.
pub struct Backup {
    world: World,
    sessions: Sessions,
    left: Arc<LeftLeases>,
    settings: BackupSettings,
}

impl Backup {
    /// With this world, these vaults, what was left in them, and settings.
    #[must_use]
    pub fn new(world: World, vaults: Arc<dyn Vaults>, left: LeftLeases, settings: BackupSettings) -> Self {
        Self { world, sessions: Sessions::new(vaults), left: Arc::new(left), settings }
    }

    /// Makes the workflow and its steps known; those that it shares with `snapshot` are known already.
    #[must_use]
    pub fn register(self, registry: Registry) -> Registry {
        let (world, sessions) = (self.world.clone(), self.sessions.clone());
        registry
            .step(TakeLease { world: world.clone(), sessions: sessions.clone(), left: self.left.clone() })
            .step(BeginPull(world.clone()))
            .step(ReadDisks { world: world.clone(), sessions: sessions.clone() })
            .step(EndPull(world.clone()))
            .step(CommitBackup(sessions.clone()))
            .step(ForgetCheckpoints { world, sessions: sessions.clone() })
            .step(ReleaseLease { sessions })
            .workflow(self)
    }
}

/// What a plan was built on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The domain.
    pub domain: DomainRef,
    /// The QEMU process; nothing if the domain was off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// The persistent definition's hash, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub definition: Option<String>,
    /// The disks.
    pub disks: Vec<BackupDisk>,
}

impl Facts {
    /// What differs of a domain that was off.
    fn changed_at_rest(&self, seen: &Observation) -> Option<String> {
        if seen.state != RunState::Off || seen.managed_save {
            return Some("the domain was started, or saved (virsh managedsave)".to_owned());
        }
        let definition = seen.persistent.as_ref().map(|persistent| &persistent.bare);
        (definition != self.definition.as_ref())
            .then(|| "somebody has changed the domain's definition".to_owned())
    }
}

#[async_trait]
impl Workflow for Backup {
    fn name(&self) -> WorkflowName {
        WorkflowName::from(NAME)
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let options: BackupOptions = serde_json::from_value(cx.request.options.clone())
            .map_err(|e| Fault::permanent(codes::USAGE, "understand the options of the backup", "", e))?;
        let id = cx.request.subject.id.parse().map(DomainId);
        let domain = id.map_err(|e| {
            Fault::permanent(codes::CANNOT_FIND_MACHINE, "find the domain", &cx.request.subject.id, e)
        })?;
        wait_until_free(&self.world, &domain).await;
        let seen = observe(&self.world, &domain).await?;
        let choice = choose::choose(&self.world, &self.settings, &options, &seen, cx.job).await?;
        // Asked beforehand: no guest is touched for a vault that cannot be opened.
        let opened = self.sessions.vaults.open(&options.vault).await?;
        let builder =
            Builder { world: &self.world, settings: &self.settings, options: &options, job: cx.job };
        builder.build(&seen, choice, &opened).await
    }

    async fn check_facts(&self, plan: &Plan, _: &StepName, _: &Outputs) -> Result<Option<String>, Fault> {
        let facts: Facts = recipe::facts(plan)?;
        let doing = "look at the domain once more";
        let fault =
            |e: crate::hypervisor::HvError| e.fault(codes::CANNOT_BEGIN_PULL, doing, &facts.domain.name);
        let seen = match self.world.hypervisor.observe(&facts.domain.id).await {
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(Some("the domain is gone".to_owned())),
            seen => seen.map_err(fault)?,
        };
        let Some(instance) = &facts.instance else {
            return Ok(facts.changed_at_rest(&seen));
        };
        let Some(qemu) = seen.qemu.as_ref().filter(|qemu| qemu.instance == *instance) else {
            return Ok(Some("the domain has ended, or was started anew".to_owned()));
        };
        for disk in &facts.disks {
            if qemu.disk(&disk.target).map(|now| &now.chain) != Some(&disk.chain) {
                return Ok(Some(format!("the images under disk {} have changed", disk.target)));
            }
            if let Some(job) = qemu.job(&disk.target) {
                return Ok(Some(format!("a block job ({}) works on disk {}", job.id, disk.target)));
            }
        }
        fence::busy(&*self.world.hypervisor, &facts.domain.id).await.map_err(fault)
    }
}

//! `snapshot`: a backup into plain files, of a running domain or one that is off.
//!
//! The plan's shape and the reasons for it stand in `STEPS.md`; here it is built ([`plan`]) from what is seen of the
//! domain, after everything that could go wrong has been asked for ([`check`]). Nothing is changed while planning.

mod at_rest;
mod check;
mod devices;
mod facts;
mod images;
mod machine;
mod off;
mod options;
mod overlays;
pub mod phases;
mod plan;
pub mod reboot;
mod room;
mod rule;
mod saved;
mod saving;

#[cfg(test)]
mod tests;

use async_trait::async_trait;
use serde_json::Value;
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::{Fault, Outputs, Plan, PlanContext, Registry, StepName, Workflow};

pub(crate) use at_rest::{AtRest, at_rest};
pub(crate) use check::{observe, wait_until_free};
pub use devices::unfit as unfit_for_overlays;
pub use facts::{Facts, LeftOutDisk};
pub(crate) use machine::{can_be_kept, kept_state};
pub use options::{MemoryOptions, Settings, SnapshotOptions};
pub(crate) use overlays::{Overlays, SWITCH, TIDY};
pub use phases::{Phase, Waits};
pub use rule::{cannot_take_part, transient};
pub use saving::SaveOptions;

use crate::codes;
use crate::hypervisor::DomainId;
use crate::recipe;
use crate::save::{ClearState, ReloadGuest, ResumeGuest, RetainState, SaveGuest};
use crate::snapshot::commit::CommitOverlay;
use crate::snapshot::copy::CopyImage;
use crate::snapshot::folder::PrepareFolder;
use crate::snapshot::freeze::{FreezeGuest, ThawGuest};
use crate::snapshot::machine::KeepState;
use crate::snapshot::mark::{Mark, Unmark};
use crate::snapshot::overlay::CreateOverlay;
use crate::snapshot::pivot::Pivot;
use crate::snapshot::publish::{Publish, SealMemory};
use crate::snapshot::rest::TakeAtRest;
use crate::snapshot::saved::TakeSaved;
use crate::snapshot::switch::SwitchDefinition;
use crate::snapshot::take::TakeSnapshot;
use crate::snapshot::tidy::Tidy;
use crate::snapshot::{Places, World};

/// The name of the workflow.
pub const NAME: &str = "snapshot";

/// The version of the recipe.
pub const VERSION: u32 = 1;

/// The recipe.
#[derive(Debug)]
pub struct Snapshot {
    world: World,
    places: Places,
    settings: Settings,
}

impl Snapshot {
    /// With this world, these places and settings.
    #[must_use]
    pub fn new(world: World, places: Places, settings: Settings) -> Self {
        Self { world, places, settings }
    }

    /// Makes the workflow and all its steps known.
    #[must_use]
    pub fn register(self, registry: Registry) -> Registry {
        let (world, places) = (self.world.clone(), self.places.clone());
        registry
            .step(Mark(world.clone()))
            .step(Unmark(world.clone()))
            .step(PrepareFolder(places.clone()))
            .step(CreateOverlay(world.clone()))
            .step(SwitchDefinition(world.clone()))
            .step(FreezeGuest(world.clone()))
            .step(ThawGuest(world.clone()))
            .step(TakeSnapshot(world.clone()))
            .step(TakeAtRest(world.clone()))
            .step(TakeSaved(world.clone()))
            .step(CopyImage { world: world.clone(), places: places.clone() })
            .step(KeepState(places.clone()))
            .step(SealMemory(places.clone()))
            .step(SaveGuest(world.clone()))
            .step(ReloadGuest(world.clone()))
            .step(ResumeGuest(world.clone()))
            .step(RetainState { world: world.clone(), places: places.clone() })
            .step(ClearState)
            .step(Publish(places))
            .step(CommitOverlay(world.clone()))
            .step(Pivot(world.clone()))
            .step(Tidy(world))
            .workflow(self)
    }
}

#[async_trait]
impl Workflow for Snapshot {
    fn name(&self) -> WorkflowName {
        WorkflowName::from(NAME)
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let options = options_of(&cx.request.options)?;
        let domain = domain_of(&cx.request.subject.id)?;
        check::wait_until_free(&self.world, &domain).await;
        let seen = check::observe(&self.world, &domain).await?;
        let chosen = check::choose(&self.world, &self.settings, &options, &seen).await?;
        let built = plan::Builder {
            world: &self.world,
            places: &self.places,
            settings: &self.settings,
            options: &options,
            job: cx.job,
        };
        built.build(&seen, &chosen).await
    }

    async fn check_facts(
        &self,
        plan: &Plan,
        before: &StepName,
        _: &Outputs,
    ) -> Result<Option<String>, Fault> {
        let facts: Facts = recipe::facts(plan)?;
        facts.differ(&self.world, [plan::TAKE, saving::SAVE].contains(&before.as_str())).await
    }
}

fn options_of(options: &Value) -> Result<SnapshotOptions, Fault> {
    serde_json::from_value(options.clone())
        .map_err(|e| Fault::permanent(codes::USAGE, "understand the options of the backup", String::new(), e))
}

fn domain_of(id: &str) -> Result<DomainId, Fault> {
    id.parse()
        .map(DomainId)
        .map_err(|e| Fault::permanent(codes::CANNOT_FIND_MACHINE, "find the domain", id.to_owned(), e))
}

//! A guest that the end of the host took down in the middle of a backup.
//!
//! It ran when its job began, and nobody else starts it unless libvirt does by itself. Whether it is started again is
//! the caller's policy ([`AfterReboot`]), and it is done once per boot of the host, at once: a copy that goes on after
//! the reboot may take hours. Where it starts from is no question: at every instant the persistent definition names
//! files that hold all that the guest has flushed, and whoever commits an overlay of a domain that is off gives way to
//! a start. A guest that was being saved is the saving steps' as long as these are not done: they may still have its
//! memory.

use vmkeep_workflow::{JobStatus, Plan, StepName};

use super::overlays::SWITCH;
use super::saving::RESUME;
use super::{Facts, NAME};
use crate::hypervisor::{HvError, RunState, Trouble};
use crate::recipe;
use crate::save::AfterReboot;
use crate::snapshot::World;

/// The states of jobs whose guests are looked after: also of one that goes back, or that somebody has paused.
pub const OPEN: [JobStatus; 4] =
    [JobStatus::Running, JobStatus::Paused, JobStatus::Unwinding, JobStatus::NeedsAttention];

/// Whether a job's guest is this module's to start, if it is off: it ran when the plan was made, on another boot of the
/// host than this one. `started` and `done` tell of its steps.
#[must_use]
pub fn concerns(
    plan: &Plan,
    boot: &str,
    started: impl Fn(&StepName) -> bool,
    done: impl Fn(&StepName) -> bool,
) -> bool {
    if plan.workflow.as_str() != NAME {
        return false;
    }
    let Ok(facts) = recipe::facts::<Facts>(plan) else { return false };
    let resume = StepName::from(RESUME);
    // They close the switch: as long as that has not begun they never run, and the job only goes back.
    let saving = plan.steps.iter().any(|step| step.name == resume) && started(&StepName::from(SWITCH));
    let saved = saving && !done(&resume);
    facts.running
        && facts.after_reboot == AfterReboot::Start
        && facts.boot.is_some_and(|then| then != boot)
        && !saved
}

/// Starts it if it is off; says whether it was.
///
/// # Errors
/// When it could not be, or when the hypervisor did not answer.
pub async fn start(world: &World, plan: &Plan) -> Result<bool, HvError> {
    let facts: Facts = recipe::facts(plan).map_err(|e| HvError::new(Trouble::Refused, e.to_string()))?;
    let id = &facts.domain.id;
    if world.hypervisor.state(id).await? != RunState::Off {
        return Ok(false);
    }
    match world.hypervisor.start(id, false).await {
        // Somebody was quicker.
        Err(_) if world.hypervisor.state(id).await.is_ok_and(|state| state != RunState::Off) => Ok(false),
        Err(e) => Err(e),
        Ok(()) => Ok(true),
    }
}

//! `mark`, `unmark`: the note in the domain that a job of ours works on it.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, Verdict};

use super::rescue::{self, Rescue};
use super::{World, cannot_look, fence, not_looked, on_the_way_back};
use crate::codes;
use crate::hypervisor::{DomainRef, HvError, Marker, Observation, PauseReason, RunState, Trouble};

/// Writes the marker.
#[derive(Debug)]
pub struct Mark(pub World);

/// Removes it.
#[derive(Debug)]
pub struct Unmark(pub World);

/// What both need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkInput {
    /// The domain.
    pub domain: DomainRef,
    /// The store of this daemon.
    pub store: String,
}

impl MarkInput {
    fn marker(&self, cx: &StepContext) -> Marker {
        Marker { store: self.store.clone(), job: cx.job.to_string(), hold: None }
    }
}

/// The fault of finding another daemon's marker.
#[must_use]
pub fn foreign(domain: &DomainRef, marker: &Marker) -> Fault {
    Fault::permanent(
        codes::FOREIGN_MARKER,
        "reserve the domain",
        domain.name.clone(),
        format!("job {} of another vmkeep (store {}) works on it", marker.job, marker.store),
    )
    .remedy(format!(
        "Stop one of the two daemons; if the other store is gone for good: virsh metadata {} {} --remove --live --config",
        domain.id,
        crate::hypervisor::MARKER_NAMESPACE
    ))
}

fn marker_of(observation: &Observation, persistent: bool) -> Option<&Marker> {
    if persistent { observation.persistent_marker.as_ref() } else { observation.marker.as_ref() }
}

#[async_trait]
impl Step for Mark {
    const KIND: StepKind = StepKind::new("mark", 1);
    type Input = MarkInput;
    type Output = ();

    async fn run(&self, cx: &StepContext, input: MarkInput) -> Result<(), Fault> {
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_LOCK_MACHINE).await?;
        let others = [marker_of(&seen, false), marker_of(&seen, true)];
        if let Some(marker) = others.into_iter().flatten().find(|marker| marker.store != input.store) {
            return Err(foreign(&input.domain, marker));
        }
        self.0
            .hypervisor
            .set_marker(&input.domain.id, &input.marker(cx))
            .await
            .map_err(|e| e.fault(codes::CANNOT_LOCK_MACHINE, "reserve the domain", &input.domain.name))
    }

    async fn probe(&self, cx: &StepContext, input: MarkInput) -> Verdict<()> {
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => seen,
            Err(e) => return cannot_look(&e),
        };
        let wanted = cx.job.to_string();
        let ours =
            |marker: Option<&Marker>| marker.is_some_and(|m| m.store == input.store && m.job == wanted);
        let live = !seen.state.is_active() || ours(marker_of(&seen, false));
        if live && (seen.persistent.is_none() || ours(marker_of(&seen, true))) {
            return match self.0.hypervisor.sync_definitions().await {
                Ok(()) => Verdict::Done(()),
                Err(e) => cannot_look(&e),
            };
        }
        fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await
    }

    async fn undo(&self, cx: &StepContext, input: MarkInput, _: Option<()>) -> Result<(), Fault> {
        clear(&self.0, cx, &input).await
    }
}

#[async_trait]
impl Step for Unmark {
    const KIND: StepKind = StepKind::new("unmark", 1);
    type Input = MarkInput;
    type Output = ();

    async fn run(&self, cx: &StepContext, input: MarkInput) -> Result<(), Fault> {
        clear(&self.0, cx, &input).await
    }

    /// Removing what is not there is harmless, so there is nothing to find out.
    async fn probe(&self, _: &StepContext, _: MarkInput) -> Verdict<()> {
        Verdict::NotDone
    }
}

/// Removes the marker if it is this job's. Whoever the job's files have kept from writing goes on first.
async fn clear(world: &World, cx: &StepContext, input: &MarkInput) -> Result<(), Fault> {
    let seen = match world.hypervisor.observe(&input.domain.id).await {
        // A domain that is gone bears no marker.
        Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(()),
        seen => seen.map_err(|e| {
            not_looked(e, codes::CANNOT_LOCK_MACHINE, "look at the domain", &input.domain.name)
        })?,
    };
    let ours = |m: Option<&Marker>| m.is_some_and(|m| m.store == input.store && m.job == cx.job.to_string());
    let failed = |e: HvError| {
        let doing = "remove the marker from the domain";
        on_the_way_back(e, codes::CANNOT_LOCK_MACHINE, doing, &input.domain.name)
    };
    if !ours(marker_of(&seen, false)) && !ours(marker_of(&seen, true)) {
        // Whoever removed it may have died before that was durable.
        return world.hypervisor.sync_definitions().await.map_err(failed);
    }
    if seen.state == RunState::Paused(PauseReason::IoError) {
        match rescue::at_home(world, &input.store, &input.domain.id).await {
            Ok(Rescue::NotOurs) => {}
            Ok(found) => tracing::info!(domain = %input.domain.name, ?found, "QEMU had stopped the guest"),
            // The job has done with its disks; what stops the guest now is to be seen to by its operator.
            Err(error) => {
                tracing::warn!(domain = %input.domain.name, %error, "QEMU has stopped the guest, and it could not be resumed");
            }
        }
    }
    world.hypervisor.clear_marker(&input.domain.id).await.map_err(failed)
}

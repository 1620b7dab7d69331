//! `freeze-guest`, `thaw-guest`: the guest's file systems at rest for the instant of a disk-only snapshot.
//!
//! Never together with memory: the restored guest would be frozen. The marker's hold is written before the agent is
//! called, so that a guest that we froze can be told from one that somebody else did: theirs is never thawed.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, StepName, Verdict};

use super::{World, cannot_look, fence};
use crate::codes;
use crate::hypervisor::{DomainId, DomainRef, FreezeState, Hold, HvError, Marker, Observation, Trouble};

/// Freezes the guest's file systems.
#[derive(Debug)]
pub struct FreezeGuest(pub World);

/// Thaws them.
#[derive(Debug)]
pub struct ThawGuest(pub World);

/// How much freezing matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FreezePolicy {
    /// Never.
    Never,
    /// If an agent does it; the backup says whether it did.
    #[default]
    IfPossible,
    /// No backup without.
    Required,
}

/// What both need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeInput {
    /// The domain.
    pub domain: DomainRef,
    /// The store of this daemon.
    pub store: String,
    /// How much it matters.
    #[serde(default)]
    pub policy: FreezePolicy,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeOutput {
    /// How many file systems.
    pub file_systems: u32,
    /// Why none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

impl FreezeInput {
    fn marker(&self, cx: &StepContext, hold: Option<Hold>) -> Marker {
        Marker { store: self.store.clone(), job: cx.job.to_string(), hold }
    }

    /// Whether the freeze that is seen, or that may come, is ours.
    fn held(&self, cx: &StepContext, seen: &Observation) -> bool {
        seen.marker.as_ref() == Some(&self.marker(cx, Some(Hold::Frozen)))
    }

    fn without(&self, fault: Fault) -> Result<FreezeOutput, Fault> {
        match self.policy {
            FreezePolicy::Required => Err(fault),
            FreezePolicy::IfPossible | FreezePolicy::Never => {
                Ok(FreezeOutput { file_systems: 0, why_not: Some(fault.cause) })
            }
        }
    }

    fn fault(&self, e: &HvError) -> Fault {
        let doubt = e.in_doubt || matches!(e.trouble, Trouble::AgentSilent | Trouble::TimedOut);
        let fault =
            Fault::permanent(codes::CANNOT_FREEZE, "freeze the guest's file systems", &self.domain.name, e)
                .remedy("Check the guest's agent, or allow backups without freezing");
        // An agent that did not answer in time may freeze later; the thaw sees to that.
        if doubt { fault.in_doubt() } else { fault }
    }
}

#[async_trait]
impl Step for FreezeGuest {
    const KIND: StepKind = StepKind::new("freeze-guest", 1);
    type Input = FreezeInput;
    type Output = FreezeOutput;

    async fn run(&self, cx: &StepContext, input: FreezeInput) -> Result<FreezeOutput, Fault> {
        let hypervisor = &self.0.hypervisor;
        let domain = &input.domain.id;
        let seen = self.0.observe(domain, codes::CANNOT_FREEZE).await?;
        match hypervisor.freeze_state(domain).await {
            Ok(FreezeState::Thawed) => {}
            Ok(FreezeState::Frozen) if input.held(cx, &seen) => {
                // An earlier attempt of this job; how many is not told a second time.
                return Ok(FreezeOutput { file_systems: 1, why_not: None });
            }
            Ok(FreezeState::Frozen) => {
                let fault = Fault::permanent(
                    codes::FROZEN_BY_OTHERS,
                    "freeze the guest's file systems",
                    &input.domain.name,
                    "somebody else has frozen them",
                )
                .remedy(format!("Thaw them when their owner is done: virsh domfsthaw {domain}"));
                return input.without(fault);
            }
            Err(e) => return input.without(input.fault(&e)),
        }
        hypervisor.set_hold(domain, &input.marker(cx, Some(Hold::Frozen))).await.map_err(|e| {
            e.fault(codes::CANNOT_FREEZE, "note the freeze in the domain", &input.domain.name)
        })?;
        match hypervisor.freeze(domain).await {
            Ok(file_systems) => Ok(FreezeOutput { file_systems, why_not: None }),
            Err(e) if e.in_doubt => Err(input.fault(&e)),
            Err(e) => input.without(input.fault(&e)),
        }
    }

    async fn probe(&self, cx: &StepContext, input: FreezeInput) -> Verdict<FreezeOutput> {
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => seen,
            Err(e) => return cannot_look(&e),
        };
        if !input.held(cx, &seen) {
            return fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await;
        }
        match self.0.hypervisor.freeze_state(&input.domain.id).await {
            Ok(FreezeState::Frozen) => Verdict::Done(FreezeOutput { file_systems: 1, why_not: None }),
            Ok(FreezeState::Thawed) => {
                fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await
            }
            Err(e) => cannot_look(&e),
        }
    }
}

#[async_trait]
impl Step for ThawGuest {
    const KIND: StepKind = StepKind::new("thaw-guest", 1);
    type Input = FreezeInput;
    type Output = FreezeOutput;

    async fn run(&self, cx: &StepContext, input: FreezeInput) -> Result<FreezeOutput, Fault> {
        let hypervisor = &self.0.hypervisor;
        let domain = &input.domain.id;
        let seen = self.0.observe(domain, codes::CANNOT_THAW).await?;
        if !seen.state.is_active() || !input.held(cx, &seen) {
            return Ok(FreezeOutput {
                file_systems: 0,
                why_not: Some("nothing is frozen by this job".to_owned()),
            });
        }
        let fault = |e: HvError| {
            Fault::transient(codes::CANNOT_THAW, "thaw the guest's file systems", &input.domain.name, e)
                .remedy(format!("virsh domfsthaw {domain}; if that fails, reset the guest"))
        };
        // Also when the agent says that nothing is frozen: it thaws what a late freeze may be about to freeze.
        let file_systems = hypervisor.thaw(domain).await.map_err(fault)?;
        hypervisor.set_hold(domain, &input.marker(cx, None)).await.map_err(fault)?;
        Ok(FreezeOutput { file_systems, why_not: None })
    }

    async fn probe(&self, cx: &StepContext, input: FreezeInput) -> Verdict<FreezeOutput> {
        match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) if !seen.state.is_active() || !input.held(cx, &seen) => {
                Verdict::Done(FreezeOutput { file_systems: 0, why_not: None })
            }
            Ok(_) => Verdict::NotDone,
            Err(e) => cannot_look(&e),
        }
    }
}

/// Whether that step of this job has frozen anything.
pub(crate) fn was_frozen(cx: &StepContext, step: Option<&StepName>) -> bool {
    let Some(step) = step else { return false };
    cx.outputs.of::<FreezeGuest>(step).ok().flatten().is_some_and(|frozen| frozen.file_systems > 0)
}

/// Why the file systems that this step has frozen may have been thawed before the act that has just ended: the guest's own
/// limit, the watchdog's or an operator may have been faster. Asked afterwards, since what was frozen before proves nothing.
pub(crate) async fn thawed(
    world: &World,
    cx: &StepContext,
    domain: &DomainId,
    store: &str,
    step: Option<&StepName>,
) -> Option<String> {
    const LATE: &str = "they were thawed before it, because it came too late";
    if !was_frozen(cx, step) {
        return None;
    }
    let unknown = |e: HvError| Some(format!("whether they still were at its instant is not known: {e}"));
    let ours = Marker { store: store.to_owned(), job: cx.job.to_string(), hold: Some(Hold::Frozen) };
    match world.hypervisor.marker(domain).await {
        Ok(marker) if marker.as_ref() == Some(&ours) => {}
        Ok(_) => return Some(LATE.to_owned()),
        Err(e) => return unknown(e),
    }
    match world.hypervisor.freeze_state(domain).await {
        Ok(FreezeState::Frozen) => None,
        Ok(FreezeState::Thawed) => Some(LATE.to_owned()),
        Err(e) => unknown(e),
    }
}

//! `resume-guest`: the guest runs again. The downtime ends here.
//!
//! Before the guest's first instruction it is noted in the persistent definition that its state is used up. Whatever
//! happens after that note, the state is never loaded again: a guest that is found off is started cold, because it may
//! have run, for however short a time, and answered somebody.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::guest::{SaveGuest, SaveOutput};
use super::reload::{Outcome, ReloadGuest, ReloadOutput, bring_back, fault, held, on_overlays, rebooted};
use super::{AfterReboot, Saving, is_ours, marker, used_up};
use crate::codes;
use crate::hypervisor::{Hold, RunState};
use crate::snapshot::{World, cannot_look, fence};

/// Lets the guest run.
#[derive(Debug)]
pub struct ResumeGuest(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeInput {
    /// What was saved.
    #[serde(flatten)]
    pub saving: Saving,
    /// The step that saved it.
    pub saved: StepName,
    /// The step that loaded it.
    pub reloaded: StepName,
}

/// How the guest came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Back {
    /// With its memory.
    Resumed,
    /// Without; it was started anew.
    Cold,
    /// Somebody else had started it.
    ByOthers,
    /// It had never gone.
    NeverGone,
    /// It is off.
    Off,
    /// It is loaded and paused, as it was before.
    Paused,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeOutput {
    /// How.
    pub back: Back,
    /// Why not with its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Milliseconds from the call that stopped the guest to the return of the one that let it run; nothing when it was
    /// not this program's own doing, or when vmkeepd ended in between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
}

impl ResumeOutput {
    fn of(back: Back) -> Self {
        Self { back, why: None, downtime_ms: None }
    }
}

const DOING: &str = "let the guest run";

/// So long a guest that neither runs nor is known to be paused is looked at within one attempt.
const LOOK: Duration = Duration::from_secs(10);
/// How long it is waited before one whose QEMU has not the right disks is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[async_trait]
impl Step for ResumeGuest {
    const KIND: StepKind = StepKind::new("resume-guest", 1);
    type Input = ResumeInput;
    type Output = ResumeOutput;

    async fn run(&self, cx: &StepContext, input: ResumeInput) -> Result<ResumeOutput, Fault> {
        let saved = cx.outputs.of::<SaveGuest>(&input.saved)?;
        let work = Work { world: &self.0, cx, saving: &input.saving, saved: saved.as_ref() };
        match cx.outputs.of::<ReloadGuest>(&input.reloaded)?.map(|reloaded: ReloadOutput| reloaded.outcome) {
            Some(Outcome::NotSaved) => Ok(ResumeOutput::of(Back::NeverGone)),
            Some(Outcome::StartedByOthers) => Ok(ResumeOutput::of(Back::ByOthers)),
            Some(Outcome::StaysOff(why)) => {
                Ok(ResumeOutput { why: Some(why), ..ResumeOutput::of(Back::Off) })
            }
            Some(Outcome::Cold(why)) => work.cold(why).await,
            Some(Outcome::Loaded) | None => work.loaded().await,
        }
    }

    async fn probe(&self, cx: &StepContext, input: ResumeInput) -> Verdict<ResumeOutput> {
        if cx.still_running {
            return Verdict::InFlight("the call has not returned".to_owned());
        }
        let id = &input.saving.domain.id;
        let loaded = match cx.outputs.of::<ReloadGuest>(&input.reloaded) {
            Ok(reloaded) => reloaded.is_none_or(|reloaded| reloaded.outcome == Outcome::Loaded),
            Err(fault) => return Verdict::Unknown(fault.to_string()),
        };
        match self.0.hypervisor.state(id).await {
            Ok(RunState::Running) if loaded => match self.0.hypervisor.observe(id).await {
                Ok(seen)
                    if !held(&seen, &input.saving, cx) && used_up(&seen, &input.saving.store, cx.job) =>
                {
                    Verdict::Done(ResumeOutput::of(Back::Resumed))
                }
                // A hold goes with the next attempt; and whose QEMU it is without a note is found out by it.
                Ok(_) => Verdict::NotDone,
                Err(e) => cannot_look(&e),
            },
            Ok(_) => fence::not_done(&*self.0.hypervisor, id, false).await,
            Err(e) => cannot_look(&e),
        }
    }
}

pub(super) struct Work<'a> {
    pub(super) world: &'a World,
    pub(super) cx: &'a StepContext,
    pub(super) saving: &'a Saving,
    pub(super) saved: Option<&'a SaveOutput>,
}

impl Work<'_> {
    fn fault(&self, e: crate::hypervisor::HvError) -> Fault {
        fault(e, codes::CANNOT_START_MACHINE, DOING, self.saving)
    }

    fn downtime(&self) -> Option<u64> {
        let since = self.saved?.stopped?;
        u64::try_from(Timestamp::now().duration_since(since).as_millis()).ok()
    }

    /// Notes that the state is used up, and lets go of the guest; says for how long it was down if it is this that lets it
    /// run.
    async fn let_go(&self, run: bool) -> Result<Option<u64>, Fault> {
        let (hypervisor, id) = (&self.world.hypervisor, &self.saving.domain.id);
        let of = |hold| marker(&self.saving.store, self.cx.job, hold);
        hypervisor.note(id, &of(Some(Hold::Resumed))).await.map_err(|e| self.fault(e))?;
        let mut downtime = None;
        if run {
            hypervisor.resume(id).await.map_err(|e| self.fault(e).in_doubt())?;
            downtime = self.downtime();
        }
        hypervisor.set_hold(id, &of(None)).await.map_err(|e| self.fault(e).in_doubt())?;
        Ok(downtime)
    }

    /// The failure of a guest that was loaded onto other disks.
    fn elsewhere(&self) -> Fault {
        let cause = "QEMU has not opened the disks that the guest's state belongs to";
        Fault::permanent(Code::EFFECT_DIVERGED, DOING, &self.saving.domain.name, cause)
            .class(Class::Fatal)
            .remedy(format!(
                "The guest stands still and has run nothing. virsh destroy {} ends it; then settle the job",
                self.saving.domain.id
            ))
    }

    /// A guest that was loaded.
    pub(super) async fn loaded(&self) -> Result<ResumeOutput, Fault> {
        let id = &self.saving.domain.id;
        let begun = Instant::now();
        loop {
            let seen = self.world.observe(id, codes::CANNOT_START_MACHINE).await?;
            let ours = |hold| is_ours(seen.marker.as_ref(), &self.saving.store, self.cx.job, hold);
            match seen.state {
                // Not on its whole chain the guest would read zeroes, and write what follows from them. A QEMU that is ending
                // has none of its disks any more, and libvirt hears of its end later: what it is shows the next look.
                RunState::Paused(_)
                    if held(&seen, self.saving, self.cx) && !on_overlays(&seen, self.saving) =>
                {
                    if begun.elapsed() > LOOK {
                        return Err(self.elsewhere());
                    }
                    tokio::time::sleep(LOOK_AGAIN).await;
                    continue;
                }
                RunState::Paused(_) if ours(Hold::Reloaded) => {
                    let downtime_ms = self.let_go(true).await?;
                    return Ok(ResumeOutput { downtime_ms, ..ResumeOutput::of(Back::Resumed) });
                }
                // It stood still before it was saved, or somebody has stopped it since.
                RunState::Paused(_) => {
                    if ours(Hold::Begun) {
                        self.let_go(false).await?;
                    }
                    return Ok(ResumeOutput::of(Back::Paused));
                }
                // Somebody has let it run.
                RunState::Running if held(&seen, self.saving, self.cx) => {
                    self.let_go(false).await?;
                    return Ok(ResumeOutput::of(Back::Resumed));
                }
                RunState::Running => {
                    let ours = used_up(&seen, &self.saving.store, self.cx.job);
                    return Ok(ResumeOutput::of(if ours { Back::Resumed } else { Back::ByOthers }));
                }
                // If its QEMU ended before it was let run its state is as good as it was.
                RunState::Off => match bring_back(self.world, self.cx, self.saving, self.saved).await? {
                    Outcome::Loaded => {}
                    Outcome::NotSaved => return Ok(ResumeOutput::of(Back::NeverGone)),
                    Outcome::StartedByOthers => return Ok(ResumeOutput::of(Back::ByOthers)),
                    Outcome::StaysOff(why) => {
                        return Ok(ResumeOutput { why: Some(why), ..ResumeOutput::of(Back::Off) });
                    }
                    Outcome::Cold(why) => return self.cold(why).await,
                },
                RunState::Other => {}
            }
            if begun.elapsed() > LOOK {
                let cause = "it neither runs nor stands still";
                return Err(Fault::transient(
                    codes::CANNOT_START_MACHINE,
                    DOING,
                    &self.saving.domain.name,
                    cause,
                ));
            }
        }
    }

    /// A guest that has to be started without its memory, unless somebody else was quicker.
    pub(super) async fn cold(&self, why: String) -> Result<ResumeOutput, Fault> {
        let (hypervisor, id) = (&self.world.hypervisor, &self.saving.domain.id);
        let state = hypervisor.state(id).await.map_err(|e| self.fault(e))?;
        let started = ResumeOutput { why: Some(why), ..ResumeOutput::of(Back::Cold) };
        if state != RunState::Off {
            return Ok(started);
        }
        let leave = self.saving.after_reboot == AfterReboot::Leave || !self.saving.running;
        if leave && rebooted(self.world, self.saving).await? {
            return Ok(ResumeOutput { back: Back::Off, ..started });
        }
        let used = marker(&self.saving.store, self.cx.job, Some(Hold::Resumed));
        hypervisor.note(id, &used).await.map_err(|e| self.fault(e))?;
        hypervisor.start(id, !self.was_running()).await.map_err(|e| self.fault(e))?;
        Ok(ResumeOutput {
            downtime_ms: self.saved.and_then(|saved| saved.stopped).and_then(|_| self.downtime()),
            ..started
        })
    }

    fn was_running(&self) -> bool {
        self.saved
            .and_then(|saved| saved.state.as_ref())
            .map_or(self.saving.running, |state| state.was_running)
    }
}

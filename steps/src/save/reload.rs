//! `reload-guest`: the saved guest is loaded again, paused, onto its overlays.
//!
//! It closes the switch, as the merge does, and comes before it: it runs whenever a save may have been begun, and leads to a
//! guest that can be let run from whatever it finds. Nothing is committed under a guest that is still to be loaded.
//! What it finds, and what follows:
//!
//! | QEMU | how it came about | outcome |
//! |---|---|---|
//! | the planned process | the save failed, or libvirt gave it up; the guest runs (or is set free) | [`Outcome::NotSaved`] |
//! | another, with our mark of a loaded state | an attempt of ours | [`Outcome::Loaded`] |
//! | another | somebody started the domain; the state is stale | [`Outcome::StartedByOthers`] |
//! | none, the state usable | saved | it is loaded |
//! | none, overlays written to, same boot | it ran again, by us or by somebody, and has ended | [`Outcome::StaysOff`] |
//! | none, overlays written to, another boot | it ran again, and the host went down with it | by policy: [`Outcome::Cold`] or off |
//! | none, no state that was ever whole, same boot, and libvirt says that its QEMU crashed | the save took it down, or it died by itself | [`Outcome::Cold`] |
//! | the same, and libvirt says otherwise, or does not know any more | somebody ended it while it was being saved | [`Outcome::StaysOff`] |
//! | none, no state, another boot | the host went down with it | by policy: [`Outcome::Cold`] or off |
//! | none, state used up, but nothing written | let run, and gone in that moment | [`Outcome::Cold`] |
//! | none, state gone, worthless, or refused three times | it was us who took it down | [`Outcome::Cold`] |
//!
//! A state that this QEMU refuses stays where it is and becomes part of the backup all the same: with the disks of its
//! instant it may be loaded elsewhere.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::guest::{SaveGuest, SaveOutput};
use super::state::{self, SavedState, Unasked, Usable};
use super::{AfterReboot, Saving, is_ours, marker, used_up};
use crate::codes;
use crate::hypervisor::{Hold, HvError, Observation, RunState, Trouble};
use crate::snapshot::safety::{self, Release};
use crate::snapshot::stand::Stand;
use crate::snapshot::take::TakeOutput;
use crate::snapshot::{World, cannot_look, fence};

/// So often a state may be refused before the guest is started without it: it is down all the time.
const REFUSALS: u64 = 3;

/// Loads the guest.
#[derive(Debug)]
pub struct ReloadGuest(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadInput {
    /// What was saved.
    #[serde(flatten)]
    pub saving: Saving,
    /// The step that saved it.
    pub saved: StepName,
}

/// How the guest stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "why")]
pub enum Outcome {
    /// It was never saved, and is as it was.
    NotSaved,
    /// It is loaded and has not run yet.
    Loaded,
    /// Somebody else started the domain; the state is stale.
    StartedByOthers,
    /// It is off, and stays so.
    StaysOff(String),
    /// It is off, its state cannot be used, and it is to be started without.
    Cold(String),
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadOutput {
    /// The point in time, and the images that stand still.
    #[serde(flatten)]
    pub taken: TakeOutput,
    /// How the guest stands.
    #[serde(flatten)]
    pub outcome: Outcome,
}

const DOING: &str = "load the guest's state again";

#[async_trait]
impl Step for ReloadGuest {
    const KIND: StepKind = StepKind::new("reload-guest", 1);
    type Input = ReloadInput;
    type Output = ReloadOutput;

    async fn run(&self, cx: &StepContext, input: ReloadInput) -> Result<ReloadOutput, Fault> {
        let saved = cx.outputs.of::<SaveGuest>(&input.saved)?;
        let outcome = bring_back(&self.0, cx, &input.saving, saved.as_ref()).await?;
        Ok(ReloadOutput { taken: taken(saved), outcome })
    }

    async fn probe(&self, cx: &StepContext, input: ReloadInput) -> Verdict<ReloadOutput> {
        let id = &input.saving.domain.id;
        if let Some(verdict) = fence::under_way(&*self.0.hypervisor, id, cx.still_running).await {
            return verdict;
        }
        let seen = match self.0.hypervisor.observe(id).await {
            Ok(seen) => seen,
            Err(e) => return cannot_look(&e),
        };
        match cx.outputs.of::<SaveGuest>(&input.saved) {
            Ok(saved) if on_overlays(&seen, &input.saving) && loaded_by_us(&seen, &input.saving, cx) => {
                Verdict::Done(ReloadOutput { taken: taken(saved), outcome: Outcome::Loaded })
            }
            Ok(_) => fence::not_done(&*self.0.hypervisor, id, false).await,
            Err(fault) => Verdict::Unknown(fault.to_string()),
        }
    }
}

fn taken(saved: Option<SaveOutput>) -> TakeOutput {
    saved.map(|saved| saved.taken).unwrap_or_else(|| TakeOutput {
        at: Timestamp::now(),
        memory: None,
        without_memory: Some("the guest was not saved".to_owned()),
        frozen: Vec::new(),
        paused_ms: 0,
        off: false,
        thawed: None,
    })
}

/// Whether this QEMU was loaded by this job: its definition came with the state and bears the mark; or the mark's end
/// stands in the persistent definition.
fn loaded_by_us(seen: &Observation, saving: &Saving, cx: &StepContext) -> bool {
    held(seen, saving, cx) || used_up(seen, &saving.store, cx.job)
}

/// Whether this QEMU was loaded by this job and has not been let go.
pub(super) fn held(seen: &Observation, saving: &Saving, cx: &StepContext) -> bool {
    [Hold::Reloaded, Hold::Begun]
        .into_iter()
        .any(|hold| is_ours(seen.marker.as_ref(), &saving.store, cx.job, hold))
}

pub(super) fn on_overlays(seen: &Observation, saving: &Saving) -> bool {
    seen.qemu.is_some()
        && saving.disks.iter().all(|(disk, _)| matches!(Stand::of(seen, disk), Stand::OnOverlay { .. }))
}

pub(super) fn fault(e: HvError, code: Code, doing: &str, saving: &Saving) -> Fault {
    // The guest is down: whoever refuses now is asked again.
    let hopeless = matches!(e.trouble, Trouble::NoSuchDomain);
    let fault = e.fault(code, doing, &saving.domain.name);
    if hopeless { fault } else { fault.class(Class::Transient) }
}

/// Brings a guest that may be down to where it can be let run. Changes nothing if it is there.
pub(super) async fn bring_back(
    world: &World,
    cx: &StepContext,
    saving: &Saving,
    saved: Option<&SaveOutput>,
) -> Result<Outcome, Fault> {
    let seen = world.observe(&saving.domain.id, codes::CANNOT_RESTORE_MACHINE).await?;
    if let Some(qemu) = &seen.qemu {
        if qemu.instance == saving.instance {
            // A save that failed leaves the guest running; one that libvirt died in may leave it to us.
            let released = safety::release(world, &saving.store, &saving.domain.id).await;
            let released =
                released.map_err(|e| fault(e, codes::CANNOT_RESTORE_MACHINE, "resume the guest", saving))?;
            if released == Release::Waiting {
                let cause = "libvirt is still saving it";
                return Err(Fault::transient(
                    codes::CANNOT_RESTORE_MACHINE,
                    DOING,
                    &saving.domain.name,
                    cause,
                ));
            }
            return Ok(Outcome::NotSaved);
        }
        let ours = loaded_by_us(&seen, saving, cx);
        return Ok(if ours { Outcome::Loaded } else { Outcome::StartedByOthers });
    }
    if seen.state != RunState::Off {
        let cause = "libvirt and QEMU disagree whether it runs";
        return Err(Fault::transient(codes::CANNOT_RESTORE_MACHINE, DOING, &saving.domain.name, cause));
    }
    let rebooted = rebooted(world, saving).await?;
    if rebooted && (saving.after_reboot == AfterReboot::Leave || !saving.running) {
        return Ok(Outcome::StaysOff(
            "the host was restarted, and the guest is not to be started then".to_owned(),
        ));
    }
    let Some(saved) = saved else {
        return Ok(if rebooted {
            Outcome::Cold("the host was restarted before the state was whole".to_owned())
        } else if seen.crashed && saving.running {
            // Nobody wished it off: a save fills the host's memory, and may itself be what its QEMU died of.
            Outcome::Cold("its QEMU ended by itself while it was being saved".to_owned())
        } else {
            Outcome::StaysOff("it ended while it was being saved, and not by the save".to_owned())
        });
    };
    let used_up = used_up(&seen, &saving.store, cx.job);
    let found = state::usable(&*world.storage, &cx.outputs, saving, saved).await;
    let unasked = |e: Unasked| Fault::transient(codes::CANNOT_RESTORE_MACHINE, DOING, &saving.domain.name, e);
    match found.map_err(unasked)? {
        Usable::Stale(what) if rebooted => Ok(Outcome::Cold(what)),
        Usable::Stale(what) if used_up => {
            Ok(Outcome::StaysOff(format!("it ran again, and has ended: {what}")))
        }
        Usable::Stale(what) => {
            Ok(Outcome::StaysOff(format!("it was started by somebody, and has ended: {what}")))
        }
        _ if used_up => {
            Ok(Outcome::Cold("it had been let run, and its QEMU ended right after that".to_owned()))
        }
        Usable::Lost(what) => Ok(Outcome::Cold(what)),
        Usable::Yes(state) => load(world, cx, saving, &state).await,
    }
}

/// Whether the host has been restarted since the plan was made.
pub(super) async fn rebooted(world: &World, saving: &Saving) -> Result<bool, Fault> {
    let environment = world
        .hypervisor
        .environment()
        .await
        .map_err(|e| fault(e, codes::CANNOT_RESTORE_MACHINE, "learn which boot this is", saving))?;
    Ok(environment.get("boot").is_some_and(|boot| *boot != saving.boot))
}

async fn load(
    world: &World,
    cx: &StepContext,
    saving: &Saving,
    state: &SavedState,
) -> Result<Outcome, Fault> {
    let hypervisor = &world.hypervisor;
    let refused: u64 = cx.progress.saved().and_then(|note| note["refused"].as_u64()).unwrap_or(0);
    let attempt = async {
        let xml = hypervisor.memory_image_definition(&state.file).await?;
        let disks: Vec<_> =
            saving.disks.iter().map(|(disk, _)| (disk.target.clone(), disk.overlay_layer())).collect();
        // One that stood still by somebody's wish stays so: nobody but this job lets go of it.
        let hold = if state.was_running { Hold::Reloaded } else { Hold::Begun };
        let xml = hypervisor.reloaded_definition(&xml, &disks, &marker(&saving.store, cx.job, Some(hold)))?;
        hypervisor.start_from_memory(&state.file, &xml, true).await
    };
    let Err(e) = attempt.await else {
        return Ok(Outcome::Loaded);
    };
    // Whoever holds an image lets go of it some time; without the state the guest could not be started either.
    if e.in_doubt || e.is_transient() || e.trouble == Trouble::Locked {
        return Err(fault(e, codes::CANNOT_RESTORE_MACHINE, DOING, saving));
    }
    let refused = refused + 1;
    if refused >= REFUSALS {
        return Ok(Outcome::Cold(format!("its state was refused {refused} times: {e}")));
    }
    cx.progress.save(&json!({ "refused": refused })).await?;
    Err(fault(e, codes::CANNOT_RESTORE_MACHINE, DOING, saving))
}

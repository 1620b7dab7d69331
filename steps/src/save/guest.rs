//! `save-guest`: the guest's state goes to a file, and the guest goes down.
//!
//! The downtime begins here. What must be known later is made known before: when the guest was stopped, and the hold in
//! the live definition, by which a guest that libvirt leaves paused in the middle is set free. A save that fails leaves
//! the guest running on its bases, by libvirt's own doing; then nothing has happened.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::state::{self, SavedState};
use super::{Saving, is_ours, marker};
use crate::codes;
use crate::hypervisor::{Hold, HvError, Observation, RunState, Trouble};
use crate::image::copy::Identity;
use crate::snapshot::stand::Stand;
use crate::snapshot::take::TakeOutput;
use crate::snapshot::{World, cannot_look, fence, safety};

/// How often the progress is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Saves the guest.
#[derive(Debug)]
pub struct SaveGuest(pub World);

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveOutput {
    /// The point in time, and the images that stand still from now on.
    #[serde(flatten)]
    pub taken: TakeOutput,
    /// The state; nothing if the guest is gone and its state cannot be relied upon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<SavedState>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
    /// When the guest was stopped; nothing if that is not known any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Timestamp>,
}

const DOING: &str = "save the guest's state";

fn same_process(seen: &Observation, saving: &Saving) -> bool {
    seen.qemu.as_ref().is_some_and(|qemu| qemu.instance == saving.instance)
}

/// Why a disk of the planned process is not on its base, if one is not.
fn astray(seen: &Observation, saving: &Saving) -> Option<String> {
    saving.disks.iter().find_map(|(disk, _)| match Stand::of(seen, disk) {
        Stand::OnBase { .. } => None,
        Stand::Off | Stand::Unplugged => Some(format!("QEMU has no disk {}", disk.target)),
        Stand::OnOverlay { .. } => Some(format!("disk {} is on its overlay already", disk.target)),
        Stand::Elsewhere(what) => Some(format!("disk {}: {what}", disk.target)),
    })
}

/// Whether the guest went down by our save, and what it wrote is gone. libvirt remembers that it was saved; a save that it
/// gives up itself takes the file away, but not the folder, and whoever has saved the guest after that has its memory.
fn vanished(seen: &Observation, saving: &Saving, begun: bool) -> bool {
    let folder_gone = saving.file.parent().is_some_and(|folder| matches!(folder.try_exists(), Ok(false)));
    begun && seen.saved == Some(true) && !seen.managed_save && folder_gone
}

#[async_trait]
impl Step for SaveGuest {
    const KIND: StepKind = StepKind::new("save-guest", 1);
    type Input = Saving;
    type Output = SaveOutput;

    async fn run(&self, cx: &StepContext, input: Saving) -> Result<SaveOutput, Fault> {
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_SAVE_MACHINE_STATE).await?;
        if !same_process(&seen, &input) {
            return Err(Fault::permanent(
                Code::FACTS_CHANGED,
                DOING,
                input.domain.name,
                "the domain ended, or was started anew, while the job was about to save it",
            )
            .remedy("Start the job again; it plans anew"));
        }
        if let Some(what) = astray(&seen, &input) {
            return Err(
                Fault::permanent(Code::EFFECT_DIVERGED, DOING, input.domain.name, what).class(Class::Fatal)
            );
        }
        // Of an attempt that was cut off, torn or stale.
        remove(&input).await?;
        let held = is_ours(seen.marker.as_ref(), &input.store, cx.job, Hold::Suspended);
        if held {
            safety::release(&self.0, &input.store, &input.domain.id).await.map_err(|e| fault(e, &input))?;
        }
        if seen.state != RunState::Running && !held {
            return Err(super::paused(&input.domain, DOING));
        }
        let hold = marker(&input.store, cx.job, Some(Hold::Suspended));
        self.0.hypervisor.set_hold(&input.domain.id, &hold).await.map_err(|e| fault(e, &input))?;
        let stopped = Timestamp::now();
        cx.progress.save(&json!({ "stopped": stopped })).await?;
        match self.save(cx, &input).await {
            Ok(()) => match self.saved(&input, Some(stopped)).await.map_err(Fault::in_doubt)? {
                Some(output) => Ok(output),
                // The guest is gone by our own doing; that must be known to whoever brings it back.
                None => self.without(&input, Some(stopped), "libvirt left none that is whole").await,
            },
            Err(e) if e.in_doubt => Err(fault(e, &input)),
            Err(e) => {
                if let Err(e) = safety::release(&self.0, &input.store, &input.domain.id).await {
                    tracing::error!(error = %e, "the guest could not be resumed yet");
                }
                remove(&input).await?;
                if e.trouble == Trouble::Cancelled && cx.stopping() {
                    return Err(Fault::stopped(DOING, input.domain.name));
                }
                Err(fault(e, &input))
            }
        }
    }

    async fn probe(&self, cx: &StepContext, input: Saving) -> Verdict<SaveOutput> {
        let under_way = fence::under_way(&*self.0.hypervisor, &input.domain.id, cx.still_running).await;
        if let Some(verdict) = under_way {
            return verdict;
        }
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => seen,
            Err(e) => return cannot_look(&e),
        };
        if same_process(&seen, &input)
            && let Some(what) = astray(&seen, &input)
        {
            return Verdict::Diverged(what);
        }
        if seen.state == RunState::Off {
            let noted = cx.progress.saved().and_then(|note| note["stopped"].as_str()?.parse().ok());
            match self.saved(&input, noted).await {
                Ok(Some(output)) => match &output.state {
                    Some(state) if !state::is_of_these(state, &output.taken.frozen) => {}
                    _ => return Verdict::Done(output),
                },
                Ok(None) if vanished(&seen, &input, noted.is_some()) => {
                    let why = "its folder was removed while it was written";
                    return match self.without(&input, noted, why).await {
                        Ok(output) => Verdict::Done(output),
                        Err(fault) => Verdict::Unknown(fault.to_string()),
                    };
                }
                // No state, or one that the guest has outlived: it was ended by somebody else.
                Ok(None) => {}
                Err(fault) => return Verdict::Unknown(fault.to_string()),
            }
        }
        fence::not_done(&*self.0.hypervisor, &input.domain.id, false).await
    }
}

impl SaveGuest {
    /// Saves, and gives way if the job is to stop: the guest then runs on.
    async fn save(&self, cx: &StepContext, input: &Saving) -> Result<(), HvError> {
        // Beside each other: libvirt may let a question about the save wait, and the guest is down meanwhile.
        tokio::select! {
            outcome = self.0.hypervisor.save(&input.domain.id, &input.file) => outcome,
            never = self.accompany(cx, input) => match never {},
        }
    }

    /// Tells how far the save is, and ends it when the job is to stop: the call itself then says that it was cancelled;
    /// until it has, nothing is over. It is asked for until then: an abort that comes before QEMU has begun to write is
    /// accepted, and stops nothing.
    async fn accompany(&self, cx: &StepContext, input: &Saving) -> Infallible {
        let hypervisor = &self.0.hypervisor;
        loop {
            tokio::time::sleep(LOOK).await;
            if cx.stopping()
                && let Err(e) = hypervisor.abort_domain_job(&input.domain.id).await
            {
                tracing::debug!(error = %e, "the save is not given up yet");
            }
            if let Ok(Some(job)) = hypervisor.domain_job(&input.domain.id).await {
                cx.progress.report(job.done, job.done.saturating_add(job.remaining), "bytes");
            }
        }
    }

    /// What the save left, made durable: the guest is down. Nothing if there is no whole state. One that cannot be made
    /// durable is not relied upon: what has once failed to be written may be anything when it is read again.
    async fn saved(&self, input: &Saving, stopped: Option<Timestamp>) -> Result<Option<SaveOutput>, Fault> {
        let file = input.file.clone();
        let looked = crate::blocking::run(move || {
            let Some(found) = state::look(&file)? else { return Ok(None) };
            Ok(Some((found, state::sync(&file))))
        })
        .await
        .unwrap_or_else(|e| Err(std::io::Error::other(e)));
        match looked.map_err(|e| unread(input, e))? {
            None => Ok(None),
            Some((_, Err(e))) => {
                self.without(input, stopped, &format!("it could not be made durable: {e}")).await.map(Some)
            }
            Some((state, Ok(()))) => {
                let frozen = bases(input).await?;
                Ok(Some(SaveOutput { state: Some(state), ..SaveOutput::of(input, stopped, frozen) }))
            }
        }
    }

    /// A guest that was saved, and whose state is worth nothing.
    async fn without(
        &self,
        input: &Saving,
        stopped: Option<Timestamp>,
        why: &str,
    ) -> Result<SaveOutput, Fault> {
        let frozen = bases(input).await?;
        Ok(SaveOutput { unusable: Some(why.to_owned()), ..SaveOutput::of(input, stopped, frozen) })
    }
}

impl SaveOutput {
    fn of(input: &Saving, stopped: Option<Timestamp>, frozen: Vec<(PathBuf, Identity)>) -> Self {
        let at = stopped.unwrap_or_else(Timestamp::now);
        let memory = Some(input.file.clone());
        let taken =
            TakeOutput { at, memory, without_memory: None, frozen, paused_ms: 0, off: false, thawed: None };
        Self { taken, state: None, unusable: None, stopped }
    }
}

fn unread(input: &Saving, e: std::io::Error) -> Fault {
    let object = input.file.display().to_string();
    Fault::transient(codes::CANNOT_READ_STATE_FILE, "read the saved state back", object, e)
}

async fn bases(input: &Saving) -> Result<Vec<(PathBuf, Identity)>, Fault> {
    let saving = input.clone();
    let looked = crate::blocking::run(move || state::bases(&saving)).await;
    looked.unwrap_or_else(|e| Err(std::io::Error::other(e))).map_err(|e| unread(input, e).in_doubt())
}

fn fault(e: HvError, input: &Saving) -> Fault {
    let full = e.trouble == Trouble::NoSpace;
    let fault = e.fault(codes::CANNOT_SAVE_MACHINE_STATE, DOING, &input.domain.name);
    if full && input.ram_disk {
        return Fault { code: codes::NOT_ENOUGH_SPACE_ON_RAM_DISK, ..fault }.remedy(
            "The guest runs on. Enlarge the RAM disk, or let the state go to the target: `--ram-disk never`",
        );
    }
    fault
}

async fn remove(input: &Saving) -> Result<(), Fault> {
    let file = input.file.clone();
    match crate::blocking::remove(file).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Fault::permanent(
            codes::CANNOT_REMOVE_FILE,
            "remove the state of an attempt that was cut off",
            input.file.display().to_string(),
            e,
        )),
        _ => Ok(()),
    }
}

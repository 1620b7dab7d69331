//! The part of the plan that saves the guest: where its state goes, and the steps from the save to the resume.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use vmkeep_workflow::plan::Probing;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{Code, Fault, Millis, StepName, StepSpec};

use super::overlays::SWITCH;
use super::plan::{Builder, Common};
use crate::codes;
use crate::hypervisor::{Bitmap, Observation, RunState};
use crate::manifest::folder;
use crate::recipe::step;
use crate::save::keep::RetainInput;
use crate::save::ram_disk::{self, Place, UseRamDisk};
use crate::save::reload::ReloadInput;
use crate::save::resume::ResumeInput;
use crate::save::{ClearState, ReloadGuest, ResumeGuest, RetainState, SaveGuest, Saving, WithoutState};
use crate::snapshot::disk::{JobDisk, state_path};

/// The name of the step that saves the guest.
pub(super) const SAVE: &str = "save";
/// The name of the step that loads it again.
pub(super) const RELOAD: &str = "reload";
/// The name of the step that lets it run.
pub(super) const RESUME: &str = "resume";

/// The guest is down: the way back to running is tried again soon, and for more than an hour.
const URGENTLY: Retry = Retry { attempts: 2000, first: Millis(200), most: Millis::secs(3) };

/// And its effect is looked for as often.
const URGENT_LOOK: Probing = Probing { limit: Millis::secs(3600), first: Millis(100), most: Millis::secs(2) };

/// What a state may take beyond the guest's memory: its devices' and the definition.
const DEVICES: u64 = 64 << 20;

/// How a guest is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveOptions {
    /// The configured RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_disk: Option<PathBuf>,
    /// Whether it is used.
    #[serde(default)]
    pub use_ram_disk: UseRamDisk,
    /// What to do when the state is lost.
    #[serde(default)]
    pub without_state: WithoutState,
}

/// What a plan with a save needs beyond one without.
pub(super) struct SavePlan {
    pub(super) saving: Saving,
    pub(super) without: WithoutState,
    pub(super) warning: Option<String>,
    /// For each disk the bitmaps of its overlay.
    pub(super) bitmaps: Vec<Vec<Bitmap>>,
}

/// The most that a state of a guest with so much memory takes.
pub(super) fn largest(memory: u64) -> u64 {
    memory.saturating_add(DEVICES)
}

impl Builder<'_> {
    /// Decides where the state goes, and what the overlays need.
    pub(super) async fn save_plan(
        &self,
        seen: &Observation,
        disks: &[JobDisk],
        folder: PathBuf,
        memory: u64,
        boot: Option<&String>,
    ) -> Result<Option<SavePlan>, Fault> {
        let Some(options) = &self.options.save else { return Ok(None) };
        let Some(qemu) = &seen.qemu else { return Ok(None) };
        let refused = |e: crate::hypervisor::HvError, doing: &str| {
            e.fault(codes::CANNOT_SAVE_MACHINE_STATE, doing, &seen.domain.name)
        };
        let (configured, wanted) = (options.ram_disk.clone(), options.use_ram_disk);
        let chosen =
            crate::blocking::run(move || ram_disk::choose(configured.as_deref(), wanted, largest(memory)));
        let place: Place = chosen
            .await
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "look at the RAM disk", &seen.domain.name, e))??;
        let file = match &place.ram_disk {
            Some(disk) => state_path(disk, self.job, &seen.domain.name),
            None => folder.join(folder::MEMORY),
        };
        let mut bitmaps = Vec::new();
        for disk in disks {
            let found = self.world.hypervisor.bitmaps(&seen.domain.id, &disk.base.path).await;
            bitmaps.push(found.map_err(|e| refused(e, "ask QEMU about its bitmaps"))?);
        }
        let made = disks.iter().map(|disk| (disk.clone(), super::overlays::overlay_step(disk))).collect();
        Ok(Some(SavePlan {
            saving: Saving {
                domain: seen.domain.clone(),
                store: self.settings.store.clone(),
                instance: qemu.instance.clone(),
                boot: boot.cloned().unwrap_or_default(),
                disks: made,
                file,
                ram_disk: place.ram_disk.is_some(),
                running: seen.state == RunState::Running,
                after_reboot: self.options.after_reboot,
            },
            without: options.without_state,
            warning: place.warning,
            bitmaps,
        }))
    }

    /// The act: save, load, let run.
    pub(super) fn act_saving(
        &self,
        plan: &SavePlan,
        before: Vec<StepName>,
        steps: &mut Vec<StepSpec>,
    ) -> Result<(), Fault> {
        let saving = &plan.saving;
        let place = if saving.ram_disk { "the RAM disk" } else { "the target" };
        steps.push(
            step::<SaveGuest>(SAVE, format!("save the guest's state to {place}"), saving)?
                .after_all(before)
                .check_facts()
                .retry(Retry { attempts: 2, ..Retry::default() })
                .probing(URGENT_LOOK)
                .stall(Millis::secs(600)),
        );
        let of = ReloadInput { saving: saving.clone(), saved: SAVE.into() };
        steps.push(
            step::<ReloadGuest>(RELOAD, "load the guest again, paused, on its overlays", &of)?
                .after(SAVE)
                .closes(SWITCH)
                .safety()
                .retry(URGENTLY)
                .probing(URGENT_LOOK)
                .deadline(Millis::secs(1800)),
        );
        let of = ResumeInput { saving: saving.clone(), saved: SAVE.into(), reloaded: RELOAD.into() };
        steps.push(
            step::<ResumeGuest>(RESUME, "let the guest run", &of)?
                .after(RELOAD)
                .closes(SWITCH)
                .safety()
                .retry(URGENTLY)
                .probing(URGENT_LOOK)
                .deadline(Millis::secs(300)),
        );
        Ok(())
    }

    /// The state becomes part of the backup. Says after which step that is so.
    pub(super) fn keep_state(
        &self,
        plan: &SavePlan,
        common: &Common,
        steps: &mut Vec<StepSpec>,
    ) -> Result<StepName, Fault> {
        let saving = &plan.saving;
        let of = RetainInput {
            saving: saving.clone(),
            saved: SAVE.into(),
            folder: common.folder.path(),
            low_water: self.settings.guests,
            bandwidth: self.options.bandwidth,
            without: plan.without,
        };
        let title = if saving.ram_disk {
            "copy the guest's state off the RAM disk"
        } else {
            "check the guest's state"
        };
        steps.push(step::<RetainState>("memory", title, &of)?.after(RESUME).stall(Millis::secs(600)));
        if !saving.ram_disk {
            return Ok("memory".into());
        }
        steps.push(
            step::<ClearState>("clear", "remove the state from the RAM disk", saving)?
                .after("memory")
                .closes(SWITCH)
                .retry(URGENTLY),
        );
        Ok("clear".into())
    }
}

//! The way onto overlays and home again, which every backup takes that reads images while they stand still.

use vmkeep_workflow::{Fault, Millis, StepName, StepSpec};

use crate::hypervisor::{Bitmap, DomainRef};
use crate::recipe::{PATIENT_LOOK, PATIENTLY, patient, step};
use crate::snapshot::commit::{CommitInput, CommitOverlay};
use crate::snapshot::disk::JobDisk;
use crate::snapshot::overlay::{CreateOverlay, OverlayInput};
use crate::snapshot::pivot::{Pivot, PivotInput};
use crate::snapshot::switch::{SwitchDefinition, SwitchInput};
use crate::snapshot::tidy::{Tidy, TidyInput};

/// The name of the step after which a start of the domain uses the overlays. The way back closes it: whoever starts the
/// domain then, it is led home, whether or not a snapshot was ever taken. Until it is home the job is in no safe place.
pub(crate) const SWITCH: &str = "switch";
/// The name of the last step of the way back.
pub(crate) const TIDY: &str = "tidy";

/// The overlays of a job.
pub(crate) struct Overlays {
    pub(crate) domain: DomainRef,
    /// The store of this daemon.
    pub(crate) store: String,
    /// The persistent definition.
    pub(crate) definition: String,
    pub(crate) disks: Vec<JobDisk>,
    /// The QEMU process; nothing if the domain is off.
    pub(crate) instance: Option<String>,
    /// Bytes per second for committing each overlay; 0 for no limit.
    pub(crate) bandwidth: u64,
}

pub(super) fn overlay_step(disk: &JobDisk) -> StepName {
    format!("overlay/{}", disk.target).into()
}

fn commit_step(disk: &JobDisk) -> StepName {
    format!("commit/{}", disk.target).into()
}

impl Overlays {
    /// Makes them, with these bitmaps for each, and lets the definition name them.
    pub(crate) fn onto(
        &self,
        after: &'static str,
        bitmaps: &[Vec<Bitmap>],
        steps: &mut Vec<StepSpec>,
    ) -> Result<(), Fault> {
        for (at, disk) in self.disks.iter().enumerate() {
            let bitmaps = bitmaps.get(at).cloned().unwrap_or_default();
            let of = OverlayInput { domain: self.domain.clone(), disk: disk.clone(), bitmaps };
            let title = format!("create the overlay of {}", disk.target);
            steps.push(
                step::<CreateOverlay>(overlay_step(disk), title, &of)?
                    .after(after)
                    .undo(patient())
                    .deadline(Millis::secs(180)),
            );
        }
        let switch = SwitchInput {
            domain: self.domain.clone(),
            definition: self.definition.clone(),
            disks: self.disks.clone(),
        };
        steps.push(
            step::<SwitchDefinition>(SWITCH, "let the definition name the overlays", &switch)?
                .after_all(self.disks.iter().map(overlay_step))
                .critical()
                .undo(patient())
                .deadline(Millis::secs(180)),
        );
        Ok(())
    }

    /// Commits them, brings the domain back to its own images, and removes them.
    pub(crate) fn home(&self, after: &'static str, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        for disk in &self.disks {
            let of = CommitInput {
                domain: self.domain.clone(),
                disk: disk.clone(),
                instance: self.instance.clone().unwrap_or_default(),
                bandwidth: self.bandwidth,
            };
            let title = format!("commit the overlay of {}", disk.target);
            steps.push(
                step::<CommitOverlay>(commit_step(disk), title, &of)?
                    .after(after)
                    .closes(SWITCH)
                    .retry(PATIENTLY)
                    .probing(PATIENT_LOOK)
                    .stall(Millis::secs(900)),
            );
        }
        let pivot = PivotInput {
            domain: self.domain.clone(),
            store: self.store.clone(),
            definition: self.definition.clone(),
            disks: self.disks.clone(),
            instance: self.instance.clone().unwrap_or_default(),
            bandwidth: self.bandwidth,
        };
        steps.push(
            step::<Pivot>("pivot", "bring the domain back to its images", &pivot)?
                .after_all(self.disks.iter().map(commit_step))
                .closes(SWITCH)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        let tidy = TidyInput {
            domain: self.domain.clone(),
            disks: self.disks.iter().map(|disk| (disk.clone(), overlay_step(disk))).collect(),
            proof: "pivot".into(),
        };
        steps.push(
            step::<Tidy>(TIDY, "remove the overlays", &tidy)?
                .after("pivot")
                .closes(SWITCH)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        Ok(())
    }
}

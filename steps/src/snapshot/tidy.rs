//! `tidy`: the overlays go.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, StepName, Verdict};

use super::disk::JobDisk;
use super::overlay::{CreateOverlay, Proof, remove};
use super::pivot::Pivot;
use super::{World, not_looked, on_the_way_back};
use crate::codes;
use crate::hypervisor::{DomainRef, Trouble};

/// Removes the overlays.
#[derive(Debug)]
pub struct Tidy(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TidyInput {
    /// The domain.
    pub domain: DomainRef,
    /// The disks, each with the step that made its overlay.
    pub disks: Vec<(JobDisk, StepName)>,
    /// The step whose success proves that the overlays are not needed.
    pub proof: StepName,
}

/// What it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TidyOutput {
    /// How many files were removed.
    pub removed: u32,
}

#[async_trait]
impl Step for Tidy {
    const KIND: StepKind = StepKind::new("tidy", 1);
    type Input = TidyInput;
    type Output = TidyOutput;

    async fn run(&self, cx: &StepContext, input: TidyInput) -> Result<TidyOutput, Fault> {
        let proof =
            if cx.outputs.of::<Pivot>(&input.proof)?.is_some() { Proof::Committed } else { Proof::Empty };
        let code = codes::CANNOT_REMOVE_OLD_DISK_IMAGE;
        let files: Vec<_> = input.disks.iter().map(|(disk, _)| disk.overlay.clone()).collect();
        match self.0.hypervisor.close_unused(&input.domain.id, &files).await {
            Err(e) if !matches!(e.trouble, Trouble::NotRunning | Trouble::NoSuchDomain) => {
                return Err(on_the_way_back(e, code, "let QEMU close the overlays", &input.domain.name));
            }
            _ => {}
        }
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Err(e) if e.trouble == Trouble::NoSuchDomain => None,
            seen => Some(seen.map_err(|e| not_looked(e, code, "look at the domain", &input.domain.name))?),
        };
        let mut removed = 0;
        for (disk, maker) in &input.disks {
            let id = cx.outputs.of::<CreateOverlay>(maker)?.map(|made| made.id);
            removed += u32::from(remove(&self.0, seen.as_ref(), disk, id, proof).await?);
        }
        Ok(TidyOutput { removed })
    }

    /// Removing what is gone is harmless, so there is nothing to find out.
    async fn probe(&self, cx: &StepContext, _: TidyInput) -> Verdict<TidyOutput> {
        cx.may_repeat()
    }
}

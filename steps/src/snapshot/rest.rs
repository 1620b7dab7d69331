//! `take-at-rest`: the instant of a domain that is off.
//!
//! Nothing has to be taken: the images stand still because nobody writes to them. What has to be made sure of is that
//! they *go on* standing still, although anybody may start the domain at any time and no backup may be in the way of
//! that. The definition does it: since `switch` it names empty overlays, durably. A domain that is seen to be off after
//! that can only start on the overlays; one that has been started from them since has left the bases alone. Either way
//! the bases are what the guest left when it went off.
//!
//! One start is different: one that read the definition *before* the switch. It shows at once as a guest that writes to
//! its bases, and is then taken as a running one is, without memory. libvirt's own disk-only snapshot silently redefines
//! a domain that is off, so it is called only for a QEMU that was just seen; and should that one end in the same moment,
//! the call can only name the overlays that the definition names already.

use std::path::PathBuf;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::disk::JobDisk;
use super::switch::{Names, names, persistent};
use super::take::{TakeOutput, Where, whereabouts};
use super::{World, fence};
use crate::codes;
use crate::hypervisor::{DomainRef, Observation, RunState, Take};
use crate::image::copy::Identity;

/// Sees to it that the images of a domain that is off stand still.
#[derive(Debug)]
pub struct TakeAtRest(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestInput {
    /// The domain.
    pub domain: DomainRef,
    /// The disks.
    pub disks: Vec<JobDisk>,
}

const DOING: &str = "see that the disks stand still";

#[async_trait]
impl Step for TakeAtRest {
    const KIND: StepKind = StepKind::new("take-at-rest", 1);
    type Input = RestInput;
    type Output = TakeOutput;

    async fn run(&self, _: &StepContext, input: RestInput) -> Result<TakeOutput, Fault> {
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_TAKE_SNAPSHOT).await?;
        self.can_only_start_on_overlays(&seen, &input)?;
        let off = match whereabouts(&seen, &input.disks) {
            // libvirt prepares a QEMU that cannot be asked yet. It may have read the old definition.
            Where::Off if seen.state.is_active() => return Err(self.on_its_way(&input)),
            Where::Off | Where::Overlays => true,
            Where::Bases => {
                self.take_running(&seen, &input).await?;
                false
            }
            Where::Neither(what) => {
                return Err(Fault::permanent(Code::EFFECT_DIVERGED, DOING, input.domain.name, what)
                    .class(Class::Fatal));
            }
        };
        let bases: Vec<PathBuf> = input.disks.iter().map(|disk| disk.base.path.clone()).collect();
        let looked = crate::blocking::run(move || {
            bases.into_iter().map(|path| Identity::at(&path).map(|is| (path, is))).collect()
        })
        .await;
        let cannot =
            |cause: String| Fault::transient(codes::CANNOT_TAKE_SNAPSHOT, DOING, &input.domain.name, cause);
        let frozen: std::io::Result<Vec<_>> = looked.map_err(|e| cannot(e.to_string()))?;
        let frozen = frozen.map_err(|e| cannot(e.to_string()))?;
        Ok(TakeOutput {
            at: Timestamp::now(),
            memory: None,
            without_memory: None,
            frozen,
            paused_ms: 0,
            off,
            thawed: None,
        })
    }

    /// Looking again does no harm. A snapshot that was asked for may still come, though.
    async fn probe(&self, cx: &StepContext, input: RestInput) -> Verdict<TakeOutput> {
        fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await
    }
}

impl TakeAtRest {
    /// The whole reasoning of this module hangs on that.
    fn can_only_start_on_overlays(&self, seen: &Observation, input: &RestInput) -> Result<(), Fault> {
        let changed = |cause: &str| {
            Fault::permanent(Code::FACTS_CHANGED, DOING, input.domain.name.clone(), cause)
                .remedy("Start the job again; it plans anew")
        };
        if names(persistent(seen, &input.domain)?, &input.disks) != Names::Overlays {
            return Err(changed("somebody has changed the disks of the persistent definition"));
        }
        // A saved guest comes back on the files that it was saved with, whatever the definition names.
        if seen.managed_save {
            return Err(changed("the domain was started and saved meanwhile (virsh managedsave)"));
        }
        Ok(())
    }

    fn on_its_way(&self, input: &RestInput) -> Fault {
        let cause = "the domain is being started or ended";
        Fault::transient(codes::CANNOT_TAKE_SNAPSHOT, DOING, &input.domain.name, cause)
    }

    /// The guest was started in the moment before the switch.
    async fn take_running(&self, seen: &Observation, input: &RestInput) -> Result<(), Fault> {
        let fault =
            |e: crate::hypervisor::HvError| e.fault(codes::CANNOT_TAKE_SNAPSHOT, DOING, &input.domain.name);
        if !matches!(seen.state, RunState::Running | RunState::Paused(_)) {
            return Err(self.on_its_way(input));
        }
        if let Some(what) = fence::busy(&*self.0.hypervisor, &input.domain.id).await.map_err(fault)? {
            return Err(Fault::transient(codes::CANNOT_TAKE_SNAPSHOT, DOING, &input.domain.name, what));
        }
        let disks = input.disks.iter().map(|disk| (disk.target.clone(), disk.overlay.clone())).collect();
        self.0.hypervisor.take(&input.domain.id, &Take { disks, memory: None }).await.map_err(fault)?;
        let seen =
            self.0.observe(&input.domain.id, codes::CANNOT_TAKE_SNAPSHOT).await.map_err(Fault::in_doubt)?;
        match whereabouts(&seen, &input.disks) {
            Where::Overlays | Where::Off => Ok(()),
            Where::Bases | Where::Neither(_) => Err(Fault::transient(
                codes::CANNOT_TAKE_SNAPSHOT,
                DOING,
                &input.domain.name,
                "the domain was started anew in the same moment",
            )
            .in_doubt()),
        }
    }
}

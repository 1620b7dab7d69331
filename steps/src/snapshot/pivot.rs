//! `pivot`: the domain goes back to its own images.
//!
//! The guest is stopped for it. While it stands still an overlay that has caught up and its base are the same disk, so
//! either may be named by either definition, and the order in which QEMU, libvirt and the persistent definition change
//! does not matter. It is resumed only after QEMU was asked where it writes, and the persistent definition names just
//! that, durably. Whatever fails in between, the guest is set free by the same rule.
//!
//! The step goes on from whatever it finds: no disk moved, some, all; a guest that is off; a guest that we hold since
//! an attempt that was cut off.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Fault, Step, StepContext, Verdict};

use super::commit::{CommitOutput, Merge};
use super::disk::JobDisk;
use super::stand::{CommitStand, Stand};
use super::switch::{Names, names, persistent, to_bases, to_layer};
use super::{World, cannot_look, fence, not_looked, on_the_way_back, safety};
use crate::codes;
use crate::hypervisor::{
    Definition, DomainRef, Hold, HvError, Marker, Observation, PauseReason, RunState, Trouble,
};

/// So long the guest may stand still while the last of its writes are committed.
const CATCH_UP: Duration = Duration::from_secs(5);

/// So long libvirt is given to notice the end of a block job after it was itself restarted in its middle.
const NOTICE: Duration = Duration::from_secs(3);

/// Brings the domain back to its images.
#[derive(Debug)]
pub struct Pivot(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PivotInput {
    /// The domain.
    pub domain: DomainRef,
    /// The store of this daemon.
    pub store: String,
    /// The persistent definition as it was before the job.
    pub definition: String,
    /// The disks.
    pub disks: Vec<JobDisk>,
    /// The QEMU process that the plan was made for; empty if the domain was off.
    pub instance: String,
    /// Bytes per second for what is still to be committed; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// What it leaves: proof that no overlay holds anything that its base lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PivotOutput {
    /// For how long the guest stood still, in microseconds; nothing if it did not have to, or if it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_us: Option<u64>,
    /// What had to be mended on the way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

#[async_trait]
impl Step for Pivot {
    const KIND: StepKind = StepKind::new("pivot", 1);
    type Input = PivotInput;
    type Output = PivotOutput;

    async fn run(&self, cx: &StepContext, input: PivotInput) -> Result<PivotOutput, Fault> {
        let work = Work {
            step: self,
            cx,
            input: &input,
            merge: Merge { world: &self.0, domain: &input.domain, bandwidth: input.bandwidth, ran: false },
        };
        let mut output = PivotOutput::default();
        let mut first = cx.attempt == 1;
        loop {
            let seen = self.0.observe(&input.domain.id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
            // Later on a guest may run on its base because this very step has led it there.
            for disk in input.disks.iter().filter(|_| first) {
                work.merge.base_is_ours(&seen, disk, Some(&input.instance)).await?;
            }
            first = false;
            let back = if seen.state.is_active() {
                work.live(&seen, &mut output).await?
            } else {
                work.off(&seen, &mut output).await?
            };
            if back {
                break;
            }
        }
        work.free(&mut output).await?;
        work.libvirt_agrees().await?;
        Ok(output)
    }

    async fn probe(&self, cx: &StepContext, input: PivotInput) -> Verdict<PivotOutput> {
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => seen,
            // The step looks first as well, and fails with what there is to do.
            Err(e) if e.trouble == Trouble::Forgotten && !cx.still_running => return Verdict::NotDone,
            Err(e) => return cannot_look(&e),
        };
        for disk in &input.disks {
            match Stand::of(&seen, disk) {
                Stand::Elsewhere(what) => return Verdict::Diverged(format!("disk {}: {what}", disk.target)),
                Stand::OnBase { libvirt_lost: false } | Stand::Off | Stand::Unplugged => {}
                Stand::OnOverlay { .. } | Stand::OnBase { libvirt_lost: true } => {
                    return fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await;
                }
            }
        }
        let home = seen.persistent.as_ref().is_some_and(|d| names(d, &input.disks) == Names::Bases);
        let held = seen.state.is_active()
            && seen
                .marker
                .as_ref()
                .is_some_and(|m| m.store == input.store && m.hold == Some(Hold::Suspended));
        // libvirt writes what lies below a disk into the definition when it pivots; somebody else's change stays.
        let as_it_was = self.below_is_as_it_was(&seen, &input);
        if !home || held || !as_it_was || cx.still_running {
            return fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await;
        }
        match self.0.hypervisor.sync_definitions().await {
            Ok(()) => Verdict::Done(PivotOutput::default()),
            Err(e) => cannot_look(&e),
        }
    }
}

impl Pivot {
    /// Whether the definition says of what lies below the disks what it said before the job. If it cannot be told, it
    /// does: the definition is right either way.
    fn below_is_as_it_was(&self, seen: &Observation, input: &PivotInput) -> bool {
        let Ok(was) = self.0.hypervisor.parse_definition(&input.definition) else { return true };
        let Some(now) = &seen.persistent else { return true };
        let below = |definition: &Definition, disk: &JobDisk| {
            definition.disk(&disk.target).map(|disk| disk.backing.clone())
        };
        input.disks.iter().all(|disk| below(&was, disk) == below(now, disk))
    }
}

struct Work<'a> {
    step: &'a Pivot,
    cx: &'a StepContext,
    input: &'a PivotInput,
    merge: Merge<'a>,
}

impl Work<'_> {
    fn world(&self) -> &World {
        &self.step.0
    }

    fn fault(&self, e: HvError, doing: &str) -> Fault {
        on_the_way_back(e, codes::CANNOT_MERGE_DISK_IMAGES, doing, &self.input.domain.name)
    }

    fn marker(&self, hold: Option<Hold>) -> Marker {
        Marker { store: self.input.store.clone(), job: self.cx.job.to_string(), hold }
    }

    fn ours(&self, seen: &Observation) -> bool {
        seen.marker.as_ref().is_some_and(|m| m.store == self.input.store && m.hold == Some(Hold::Suspended))
    }

    /// A running domain. Says whether it is back; `false` means that the world has to be looked at again.
    async fn live(&self, seen: &Observation, output: &mut PivotOutput) -> Result<bool, Fault> {
        let mut on_overlay = false;
        for disk in &self.input.disks {
            match Stand::of(seen, disk) {
                Stand::Elsewhere(what) => return Err(self.merge.elsewhere(disk, what)),
                Stand::Off => return Ok(false),
                Stand::OnBase { .. } => {}
                Stand::Unplugged => {
                    self.merge.offline(disk, false).await?;
                }
                Stand::OnOverlay { .. } => {
                    on_overlay = true;
                    match self.merge.bring_near(self.cx, disk).await? {
                        CommitOutput::Ready | CommitOutput::OnBase => {}
                        CommitOutput::Offline => return Ok(false),
                    }
                }
            }
        }
        if !on_overlay {
            // QEMU is on the bases. A definition that names other files is wrong, and is made right whether the guest
            // runs or not; one that names the right ones gets back what libvirt has added or taken away.
            self.definition_as_it_was(seen, output).await?;
            return Ok(true);
        }
        // Until the guest is free again nobody else may let it run.
        let _alone = self.world().in_hand(&self.input.domain.id).await;
        // Getting there may have taken long.
        let seen = self.world().observe(&self.input.domain.id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
        let held = match seen.state {
            RunState::Running => true,
            // Since an attempt that was cut off.
            RunState::Paused(_) if self.ours(&seen) => true,
            // QEMU stopped it for want of space; there will be room when the overlays are gone.
            RunState::Paused(PauseReason::IoError) => {
                output.notes.push("the guest had been stopped by an I/O error; it was resumed".to_owned());
                true
            }
            // Its operator's; it stays as it is.
            RunState::Paused(_) | RunState::Other => false,
            RunState::Off => return Ok(false),
        };
        if held {
            self.world()
                .hypervisor
                .set_hold(&self.input.domain.id, &self.marker(Some(Hold::Suspended)))
                .await
                .map_err(|e| self.fault(e, "note in the domain that the guest is about to be stopped"))?;
        }
        let since = Instant::now();
        let moved = self.move_all(&seen).await;
        // From here on the guest is set free whatever happened, by the rule of this module.
        let freed = self.let_go(output, moved.is_ok(), held).await;
        output.paused_us = held.then(|| u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX));
        moved.and(freed)?;
        Ok(false)
    }

    /// Stops the guest and moves every disk to its base.
    async fn move_all(&self, before: &Observation) -> Result<(), Fault> {
        let hypervisor = &self.world().hypervisor;
        let id = &self.input.domain.id;
        if before.state == RunState::Running && !vmkeep_workflow::mutation::on("pivot-running") {
            hypervisor.suspend(id).await.map_err(|e| self.fault(e, "stop the guest for the pivot"))?;
        }
        let begun = Instant::now();
        for disk in &self.input.disks {
            // What was seen right before is tried first: every question is time for which the guest stands still.
            if let Stand::OnOverlay { through, commit: CommitStand::Ready } = Stand::of(before, disk) {
                let moved = hypervisor.commit_pivot(id, &self.merge.commit(disk, through)).await;
                match moved {
                    Ok(()) => continue,
                    Err(e) if e.in_doubt => return Err(self.fault(e, "move the disk to its image")),
                    Err(e) => tracing::debug!(disk = %disk.target, error = %e, "not yet"),
                }
            }
            self.move_one(before, disk, begun).await?;
        }
        Ok(())
    }

    /// Moves a disk as soon as it has caught up.
    async fn move_one(&self, before: &Observation, disk: &JobDisk, begun: Instant) -> Result<(), Fault> {
        let hypervisor = &self.world().hypervisor;
        let id = &self.input.domain.id;
        loop {
            let qemu = hypervisor.qemu(id).await.map_err(|e| {
                not_looked(
                    e,
                    codes::CANNOT_MERGE_DISK_IMAGES,
                    "ask QEMU about its disks",
                    &self.input.domain.name,
                )
            })?;
            // libvirt's belief does not change without libvirt.
            match Stand::read(qemu.as_ref(), before.live.as_ref(), disk) {
                Stand::OnBase { .. } | Stand::Unplugged => return Ok(()),
                Stand::OnOverlay { through, commit: CommitStand::Ready } => {
                    return hypervisor
                        .commit_pivot(id, &self.merge.commit(disk, through))
                        .await
                        .map_err(|e| self.fault(e, "move the disk to its image"));
                }
                Stand::OnOverlay { commit: CommitStand::Running { .. }, .. }
                    if begun.elapsed() < CATCH_UP =>
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Stand::Elsewhere(what) => return Err(self.merge.elsewhere(disk, what)),
                Stand::Off | Stand::OnOverlay { .. } => {
                    return Err(Fault::transient(
                        codes::CANNOT_MERGE_DISK_IMAGES,
                        "move the disk to its image",
                        format!("disk {} of {}", disk.target, self.input.domain.name),
                        "the commit has not caught up with the guest, or has ended",
                    ));
                }
            }
        }
    }

    /// Makes the definition right, then resumes the guest.
    async fn let_go(&self, output: &mut PivotOutput, moved: bool, held: bool) -> Result<(), Fault> {
        let hypervisor = &self.world().hypervisor;
        let id = &self.input.domain.id;
        let doing = "resume the guest";
        let seen = self.world().observe(id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
        if !seen.state.is_active() {
            return Ok(());
        }
        // Only that it names the right files; to make it again what it was there is time when the guest runs.
        let home = seen.persistent.as_ref().is_some_and(|d| names(d, &self.input.disks) == Names::Bases);
        if moved && home && self.all_on_base(&seen) {
            hypervisor.sync_definitions().await.map_err(|e| self.fault(e, doing))?;
        } else {
            let mended = safety::align(self.world(), &seen).await.map_err(|e| self.fault(e, doing))?;
            if !mended.is_empty() {
                output
                    .notes
                    .push(format!("the persistent definition was made right for {}", mended.join(", ")));
            }
        }
        if !held {
            return Ok(());
        }
        hypervisor.resume(id).await.map_err(|e| self.fault(e, doing))?;
        hypervisor.set_hold(id, &self.marker(None)).await.map_err(|e| self.fault(e, doing))
    }

    fn all_on_base(&self, seen: &Observation) -> bool {
        let home = |disk| matches!(Stand::of(seen, disk), Stand::OnBase { .. } | Stand::Unplugged);
        self.input.disks.iter().all(home)
    }

    /// The disks' elements become what they were before the job, durably. A disk that somebody has pointed elsewhere
    /// meanwhile, or taken away, stays as they want it.
    async fn definition_as_it_was(&self, seen: &Observation, output: &mut PivotOutput) -> Result<(), Fault> {
        let definition = persistent(seen, &self.input.domain)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for disk in &self.input.disks {
            let file = definition.file(&disk.target);
            if file.is_some_and(|file| disk.is_base(file) || *file == disk.overlay) {
                ours.push(disk.clone());
            } else {
                theirs.push(disk.target.to_string());
            }
        }
        if !theirs.is_empty() {
            let theirs = theirs.join(", ");
            output.notes.push(format!("somebody has changed the definition of {theirs}; it stays as it is"));
        }
        let hypervisor = &self.world().hypervisor;
        let done = if ours.is_empty() {
            hypervisor.sync_definitions().await
        } else {
            hypervisor.redefine_disks(&self.input.domain.id, &to_bases(&self.input.definition, &ours)).await
        };
        done.map_err(|e| {
            on_the_way_back(
                e,
                codes::CANNOT_DEFINE_MACHINE,
                "put the definition back",
                &self.input.domain.name,
            )
        })
    }

    /// A domain that is off. Says whether it is back; `false` if it was started meanwhile.
    async fn off(&self, seen: &Observation, output: &mut PivotOutput) -> Result<bool, Fault> {
        self.merge.not_saved_onto(self.cx, seen, &self.input.disks).await?;
        for disk in &self.input.disks {
            let named = seen.persistent.as_ref().and_then(|d| d.file(&disk.target));
            if named.is_some_and(|named| disk.is_base(named)) {
                // It starts on its base already: what the overlay held is there, or `base_is_ours` had spoken.
                continue;
            }
            if !self.merge.offline(disk, true).await? {
                return Ok(false);
            }
        }
        self.definition_as_it_was(seen, output).await?;
        // Started between the commit and the define? Then QEMU is on an overlay that equals its base, and has not run
        // a single instruction of the guest's yet. The definition follows it, and the commit goes on live.
        let again = self.world().observe(&self.input.domain.id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
        let saved = again.managed_save || (again.saved == Some(true) && seen.saved != Some(true));
        if !again.state.is_active() && !saved {
            return Ok(true);
        }
        for disk in &self.input.disks {
            // One that was saved as well comes back on its overlays.
            if saved || matches!(Stand::of(&again, disk), Stand::OnOverlay { .. }) {
                self.world()
                    .hypervisor
                    .redefine_disks(&self.input.domain.id, &to_layer(disk, disk.overlay_layer()))
                    .await
                    .map_err(|e| self.fault(e, "follow a domain that was started meanwhile"))?;
            }
        }
        Ok(false)
    }

    /// A hold that an attempt left behind.
    async fn free(&self, output: &mut PivotOutput) -> Result<(), Fault> {
        match safety::release(self.world(), &self.input.store, &self.input.domain.id).await {
            Ok(safety::Release::Resumed { .. }) => {
                output.notes.push("the guest was still held by an attempt that was cut off".to_owned());
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(e) if matches!(e.trouble, Trouble::NotRunning | Trouble::NoSuchDomain) => Ok(()),
            Err(e) => Err(self.fault(e, "resume the guest")),
        }
    }

    /// libvirt may have missed the end of a block job. It is given a moment; then an operator has to know, because
    /// libvirt would save, or migrate, the domain to the wrong file.
    async fn libvirt_agrees(&self) -> Result<(), Fault> {
        let begun = Instant::now();
        loop {
            let seen = self.world().observe(&self.input.domain.id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
            let lost: Vec<String> = self
                .input
                .disks
                .iter()
                .filter(|disk| {
                    matches!(Stand::of(&seen, disk), Stand::OnBase { libvirt_lost: true })
                        || (seen.state.is_active() && Stand::stuck_mirror(&seen, disk))
                })
                .map(|disk| disk.target.to_string())
                .collect();
            if lost.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > NOTICE {
                return Err(Fault::permanent(
                    codes::HYPERVISOR_LOST_TRACK,
                    "bring libvirt to see where the disks are",
                    format!("{} of {}", lost.join(", "), self.input.domain.name),
                    "libvirt believes that they are still on their overlays; it was ended in the middle of the pivot. \
                     QEMU writes to the right files, and the next start will use them",
                )
                .class(Class::Fatal)
                .remedy(format!(
                    "Shut the domain down and start it again (virsh shutdown {0}; virsh start {0}); do not save or \
                     migrate it before. Then settle the job",
                    self.input.domain.id
                )));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

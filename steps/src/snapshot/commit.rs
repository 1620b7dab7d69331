//! `commit-overlay`: an overlay's contents go back into its base.
//!
//! Nothing is assumed about how the disk came to stand where it stands; [`Stand`] decides. The commit of a running
//! guest is only made *ready* here: the move to the base is `pivot`'s, for all disks at once. The overlay of a domain
//! that is off is committed by a helper that gives way as soon as the domain is started.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::disk::JobDisk;
use super::stand::{CommitStand, Stand};
use super::{World, cannot_look, fence, on_the_way_back};
use crate::codes;
use crate::hypervisor::{Commit, DomainRef, HvError, Observation, RunState, Through, Trouble};

/// How often a running commit is looked at: soon at first, since most are short.
const LOOKS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// So long a commit may stay within [`NEARLY`] of the guest without catching up before it counts as good enough: the
/// rest is done while the guest stands still.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that are committed within a fraction of a second.
const NEARLY: u64 = 64 << 20;

/// How often it is looked whether a domain that is off has been started.
const START_LOOK: Duration = Duration::from_millis(25);

/// Commits an overlay.
#[derive(Debug)]
pub struct CommitOverlay(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitInput {
    /// The domain.
    pub domain: DomainRef,
    /// The disk.
    pub disk: JobDisk,
    /// The QEMU process that the plan was made for.
    pub instance: String,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// How far it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommitOutput {
    /// Caught up, or nearly; waits for the pivot.
    Ready,
    /// Committed while the domain was off.
    Offline,
    /// The guest is on its base.
    OnBase,
}

#[async_trait]
impl Step for CommitOverlay {
    const KIND: StepKind = StepKind::new("commit-overlay", 1);
    type Input = CommitInput;
    type Output = CommitOutput;

    async fn run(&self, cx: &StepContext, input: CommitInput) -> Result<CommitOutput, Fault> {
        let merge = Merge { world: &self.0, domain: &input.domain, bandwidth: input.bandwidth };
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
        merge.base_is_ours(&seen, &input.disk, &input.instance).await?;
        merge.bring_near(cx, &input.disk).await
    }

    async fn probe(&self, cx: &StepContext, input: CommitInput) -> Verdict<CommitOutput> {
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => seen,
            // The step looks first as well, and fails with what there is to do.
            Err(e) if e.trouble == Trouble::Forgotten && !cx.still_running => return Verdict::NotDone,
            Err(e) => return cannot_look(&e),
        };
        match Stand::of(&seen, &input.disk) {
            Stand::OnOverlay { commit: CommitStand::Ready, .. } => Verdict::Done(CommitOutput::Ready),
            Stand::Elsewhere(what) => Verdict::Diverged(what),
            _ if cx.still_running => Verdict::InFlight("the call has not returned".to_owned()),
            // A commit that is going on is taken over by the next attempt; one that begins behind its back is no worse:
            // a second one is refused by libvirt, and one on a disk that is home already finds nothing to commit.
            _ => match fence::busy(&*self.0.hypervisor, &input.domain.id).await {
                Ok(None) => Verdict::NotDone,
                Ok(Some(what)) => Verdict::InFlight(what),
                Err(e) => cannot_look(&e),
            },
        }
    }
}

/// The work of committing a domain's overlays.
pub(crate) struct Merge<'a> {
    pub(crate) world: &'a World,
    pub(crate) domain: &'a DomainRef,
    pub(crate) bandwidth: u64,
}

impl Merge<'_> {
    pub(crate) fn commit(&self, disk: &JobDisk, through: Through) -> Commit {
        Commit {
            target: disk.target.clone(),
            overlay: disk.overlay.clone(),
            base: disk.base.path.clone(),
            through,
            bandwidth: self.bandwidth,
        }
    }

    fn fault(&self, disk: &JobDisk, e: HvError) -> Fault {
        let locked = e.trouble == Trouble::Locked;
        let code = if locked { codes::IMAGE_LOCKED } else { codes::CANNOT_MERGE_DISK_IMAGES };
        let full = e.trouble == Trouble::NoSpace;
        let object = format!("disk {} of {}", disk.target, self.domain.name);
        let fault = on_the_way_back(e, code, "commit the overlay", &object);
        let base = disk.base.path.display();
        if locked {
            fault.remedy(format!("Find out who holds it: fuser {base}"))
        } else if full {
            // Somebody may make room any time; the guest is safe on its overlay until then.
            fault.remedy(format!("Make room on the file system of {base}"))
        } else {
            fault
        }
    }

    pub(crate) fn elsewhere(&self, disk: &JobDisk, what: String) -> Fault {
        Fault::permanent(
            Code::EFFECT_DIVERGED,
            "bring the disk back to its image",
            format!("disk {} of {}", disk.target, self.domain.name),
            what,
        )
        .class(Class::Fatal)
        .remedy(format!(
            "Nothing was removed. {} may hold what the guest wrote last, on top of {}. Give the disk that file again \
             (virsh attach-disk, or a start with a definition that names it), then settle the job",
            disk.overlay.display(),
            disk.base.path.display()
        ))
    }

    /// A guest that is on its base in another QEMU process than the job's was started there. If the overlay holds data
    /// then, somebody has changed the definition by hand, and the overlay may be the only copy of what the guest wrote.
    pub(crate) async fn base_is_ours(
        &self,
        seen: &Observation,
        disk: &JobDisk,
        instance: &str,
    ) -> Result<(), Fault> {
        let other = seen.qemu.as_ref().is_some_and(|qemu| qemu.instance != instance);
        if !other || !matches!(Stand::of(seen, disk), Stand::OnBase { .. }) {
            return Ok(());
        }
        match self.world.storage.inspect(&disk.overlay_layer()).await {
            Ok(Some(image)) if !image.empty => Err(self.elsewhere(
                disk,
                format!(
                    "the domain was started on {} although {} holds what the guest wrote last",
                    disk.base.path.display(),
                    disk.overlay.display()
                ),
            )),
            Ok(_) => Ok(()),
            Err(e) => Err(self.fault(disk, e)),
        }
    }

    /// Brings one disk as near to its base as can be while the guest runs.
    pub(crate) async fn bring_near(&self, cx: &StepContext, disk: &JobDisk) -> Result<CommitOutput, Fault> {
        let mut wait = LOOKS.0;
        let mut near_since: Option<Instant> = None;
        let mut begun = false;
        loop {
            let seen = self.world.observe(&self.domain.id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
            match Stand::of(&seen, disk) {
                Stand::OnBase { .. } => return Ok(CommitOutput::OnBase),
                Stand::Elsewhere(what) => return Err(self.elsewhere(disk, what)),
                Stand::Off => {
                    if self.offline(disk).await? {
                        return Ok(CommitOutput::Offline);
                    }
                    begun = false;
                }
                Stand::OnOverlay { through, commit } => match commit {
                    CommitStand::Ready => return Ok(CommitOutput::Ready),
                    CommitStand::None if begun => {
                        return Err(Fault::transient(
                            codes::CANNOT_MERGE_DISK_IMAGES,
                            "commit the overlay",
                            format!("disk {} of {}", disk.target, self.domain.name),
                            "QEMU gave the commit up",
                        )
                        .remedy("The guest is safe on its overlay. Look for want of space or I/O errors"));
                    }
                    CommitStand::None => {
                        let commit = self.commit(disk, through);
                        self.world
                            .hypervisor
                            .commit_begin(&self.domain.id, &commit)
                            .await
                            .map_err(|e| self.fault(disk, e))?;
                        begun = true;
                        continue;
                    }
                    CommitStand::Running { done, total } => {
                        begun = true;
                        cx.progress.report(done, total, "bytes");
                        if total.saturating_sub(done) > NEARLY {
                            near_since = None;
                        } else if near_since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                            return Ok(CommitOutput::Ready);
                        }
                    }
                    CommitStand::Failed(why) => {
                        // It is cleared away, so that the next attempt begins anew.
                        let commit = self.commit(disk, through);
                        self.world
                            .hypervisor
                            .commit_abort(&self.domain.id, &commit)
                            .await
                            .map_err(|e| self.fault(disk, e))?;
                        return Err(Fault::transient(
                            codes::CANNOT_MERGE_DISK_IMAGES,
                            "commit the overlay",
                            format!("disk {} of {}", disk.target, self.domain.name),
                            why,
                        ));
                    }
                    CommitStand::Foreign(id) => {
                        return Err(Fault::transient(
                            codes::DOMAIN_BUSY_ELSEWHERE,
                            "commit the overlay",
                            format!("disk {} of {}", disk.target, self.domain.name),
                            format!("somebody else's block job {id} is going on"),
                        ));
                    }
                },
            }
            // The commit goes on in QEMU; whoever continues the job takes it over.
            if cx.stopping() {
                return Err(Fault::stopped("commit the overlay", disk.target.to_string()));
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LOOKS.1);
        }
    }

    /// Commits the overlay of a domain that is off. `false` if it was started meanwhile.
    pub(crate) async fn offline(&self, disk: &JobDisk) -> Result<bool, Fault> {
        let storage = &self.world.storage;
        match storage.inspect(&disk.overlay_layer()).await {
            Ok(None) => return Ok(true),
            Ok(Some(image)) if image.empty => return Ok(true),
            Ok(Some(_)) => {}
            Err(e) => return Err(self.fault(disk, e)),
        }
        let give_way = CancellationToken::new();
        let overlay = disk.overlay_layer();
        let commit = storage.commit_offline(&overlay, &disk.base, &give_way);
        tokio::pin!(commit);
        let outcome = loop {
            tokio::select! {
                outcome = &mut commit => break outcome,
                () = tokio::time::sleep(START_LOOK) => {
                    let state = self.world.hypervisor.state(&self.domain.id).await;
                    if state.is_ok_and(|state| state != RunState::Off) {
                        give_way.cancel();
                    }
                }
            }
        };
        match outcome {
            Ok(()) => Ok(true),
            Err(e) if e.trouble == Trouble::Cancelled => Ok(false),
            Err(e) => Err(self.fault(disk, e)),
        }
    }
}

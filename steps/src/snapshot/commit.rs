//! `commit-overlay`: an overlay's contents go back into its base.
//!
//! Nothing is assumed about how the disk came to stand where it stands; [`Stand`] decides. The commit of a running
//! guest is only made *ready* here: the move to the base is `pivot`'s, for all disks at once. The overlay of a domain
//! that is off is committed by a helper that gives way as soon as the domain is started.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::disk::JobDisk;
use super::stand::{CommitStand, Stand};
use super::switch::{Names, names};
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
    /// The QEMU process that the plan was made for; empty if the domain was off.
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

/// What is remembered of a guest that was found saved: whether by libvirt, or by somebody into a file of their own.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct SavedNote {
    managed: bool,
}

#[async_trait]
impl Step for CommitOverlay {
    const KIND: StepKind = StepKind::new("commit-overlay", 1);
    type Input = CommitInput;
    type Output = CommitOutput;

    async fn run(&self, cx: &StepContext, input: CommitInput) -> Result<CommitOutput, Fault> {
        let merge = Merge {
            world: &self.0,
            domain: &input.domain,
            bandwidth: input.bandwidth,
            ran: !input.instance.is_empty(),
        };
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_MERGE_DISK_IMAGES).await?;
        merge.base_is_ours(&seen, &input.disk, None).await?;
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
    /// The guest ran when the job began, and no overlay has been committed by a step before this one: even one that is
    /// empty may belong to a memory that was saved.
    pub(crate) ran: bool,
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
        // QEMU's words when it has closed the disks of a guest that was paused while its memory was saved.
        let closed = e.message.contains("Block node is read-only");
        let object = format!("disk {} of {}", disk.target, self.domain.name);
        let fault = on_the_way_back(e, code, "commit the overlay", &object);
        let base = disk.base.path.display();
        if locked {
            fault.remedy(format!("Find out who holds it: fuser {base}"))
        } else if full {
            // Somebody may make room any time; the guest is safe on its overlay until then.
            fault.remedy(format!("Make room on the file system of {base}"))
        } else if closed {
            fault.remedy(format!(
                "The guest was paused while its memory was saved, and QEMU opens its disks when it runs again: \
                 virsh resume {}",
                self.domain.id
            ))
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

    /// Nobody but `pivot` leads a disk from an overlay that holds data to its base. If it is found there before
    /// (`instance` is nothing), or in another QEMU process than the job's, then somebody has changed the definition by
    /// hand, or has unplugged the disk and plugged its base in, and the overlay may be the only copy of what the guest
    /// wrote.
    pub(crate) async fn base_is_ours(
        &self,
        seen: &Observation,
        disk: &JobDisk,
        instance: Option<&str>,
    ) -> Result<(), Fault> {
        let other = seen.qemu.as_ref().is_some_and(|qemu| Some(qemu.instance.as_str()) != instance);
        if !other || !matches!(Stand::of(seen, disk), Stand::OnBase { .. }) {
            return Ok(());
        }
        match self.world.storage.inspect(&disk.overlay_layer()).await {
            Ok(Some(image)) if !image.empty => Err(self.elsewhere(
                disk,
                format!(
                    "the guest was given {} although {} holds what it wrote last",
                    disk.base.path.display(),
                    disk.overlay.display()
                ),
            )),
            Ok(_) => Ok(()),
            Err(e) => Err(self.fault(disk, e)),
        }
    }

    /// A device goes by a name that the next start of the host may give to another; nothing is written to that.
    async fn is_still_the_device(&self, disk: &JobDisk) -> Result<(), Fault> {
        let looked_at = disk.clone();
        match crate::blocking::run(move || looked_at.other_device()).await {
            Ok(None) => Ok(()),
            Ok(Some(other)) => {
                let (path, was) = (disk.base.path.display(), disk.lasting.as_deref().unwrap_or_default());
                Err(self.elsewhere(
                    disk,
                    format!("{path} leads to another device now ({other} instead of {was})"),
                ))
            }
            Err(e) => {
                Err(Fault::permanent(Code::UNDEFINED, "look at the device", disk.target.to_string(), e))
            }
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
                    self.not_saved_onto(cx, &seen, std::slice::from_ref(disk)).await?;
                    if self.offline(disk, true).await? {
                        return Ok(CommitOutput::Offline);
                    }
                    begun = false;
                }
                Stand::Unplugged => {
                    self.offline(disk, false).await?;
                    return Ok(CommitOutput::Offline);
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
                        self.is_still_the_device(disk).await?;
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

    /// A guest that was saved while it ran on its overlays comes back on them, whatever the definition says, and its memory
    /// belongs to them as they are. They stay as they are until it has come back, or was started without that memory, or
    /// its managed save image was given up. Where somebody has put the file of a `virsh save`, and whether it is still
    /// there, nobody knows; so that wait ends only with a start.
    pub(crate) async fn not_saved_onto(
        &self,
        cx: &StepContext,
        seen: &Observation,
        disks: &[JobDisk],
    ) -> Result<(), Fault> {
        // While a guest is on overlays its definition names them.
        if seen.persistent.as_ref().is_some_and(|definition| names(definition, disks) == Names::Bases) {
            return Ok(());
        }
        let noted = cx.progress.saved().and_then(|note| SavedNote::deserialize(&note).ok());
        let managed = match (seen.managed_save, seen.saved, noted) {
            (true, _, _) => true,
            // Nobody has started it since: it was given up.
            (false, Some(true), Some(SavedNote { managed: true })) => return Ok(()),
            // Or libvirt was started anew and does not remember.
            (false, Some(true), _) | (false, None, Some(SavedNote { managed: false })) => false,
            (false, _, _) => return Ok(()),
        };
        // Saved before the job began, or given up already when an earlier step committed them.
        if !managed && noted.is_none() && !self.ran && self.all_empty(disks).await? {
            return Ok(());
        }
        cx.progress.save(&SavedNote { managed }).await?;
        let (how, remedy) = if managed {
            ("managedsave", "Start it: virsh start {0}. Or give its memory up: virsh managedsave-remove {0}")
        } else {
            ("save", "Bring it back: virsh restore FILE. Or give its memory up: virsh start {0}")
        };
        let cause = format!("its memory was saved (virsh {how}), and belongs to the overlays as they are");
        let code = codes::CANNOT_MERGE_DISK_IMAGES;
        Err(Fault::transient(code, "commit the overlays", &self.domain.name, cause).remedy(format!(
            "{}. The job then goes on by itself, or with: vmkeep job settle {}",
            remedy.replace("{0}", &self.domain.id.to_string()),
            cx.job.short()
        )))
    }

    async fn all_empty(&self, disks: &[JobDisk]) -> Result<bool, Fault> {
        for disk in disks {
            let image = self.world.storage.inspect(&disk.overlay_layer()).await;
            if image.map_err(|e| self.fault(disk, e))?.is_some_and(|image| !image.empty) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Commits an overlay that no QEMU uses: of a domain that is off (`yields`: it gives way as soon as that is started; then
    /// the answer is `false`), or of a disk that was unplugged from a running one. The overlay is empty afterwards, so that
    /// it may be done again whatever became of the base meanwhile.
    pub(crate) async fn offline(&self, disk: &JobDisk, yields: bool) -> Result<bool, Fault> {
        self.is_still_the_device(disk).await?;
        let storage = &self.world.storage;
        match storage.inspect(&disk.overlay_layer()).await {
            Ok(None) => return Ok(true),
            Ok(Some(image)) if image.empty => {
                self.give_back(disk, yields).await;
                return Ok(true);
            }
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
                () = tokio::time::sleep(START_LOOK), if yields => {
                    let state = self.world.hypervisor.state(&self.domain.id).await;
                    if state.is_ok_and(|state| state != RunState::Off) {
                        give_way.cancel();
                    }
                }
            }
        };
        match outcome {
            Ok(()) => {
                self.give_back(disk, yields).await;
                Ok(true)
            }
            Err(e) if e.trouble == Trouble::Cancelled => Ok(false),
            Err(e) => Err(self.fault(disk, e)),
        }
    }

    /// Not while somebody starts the domain: libvirt has then given the base to QEMU, and the pivot gives it back.
    async fn give_back(&self, disk: &JobDisk, yields: bool) {
        let off = !yields
            || self.world.hypervisor.state(&self.domain.id).await.is_ok_and(|state| state == RunState::Off);
        if off {
            self.world.storage.give_back(&disk.base.path, disk.base_id, &disk.overlay).await;
        }
    }
}

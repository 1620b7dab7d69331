//! Where a disk stands, from all three who have an opinion on it.
//!
//! QEMU knows which file it writes to. libvirt's live definition is what libvirt believes, and decides by whose hands
//! a commit can be run. The persistent definition is what the next start uses. [`Stand::of`] reads the first two; the
//! third is made right in every case and needs no reading here.

use std::path::{Path, PathBuf};

use super::disk::JobDisk;
use crate::hypervisor::{BlockJobKind, Definition, Mirror, Observation, Qemu, Through};

/// Where a disk stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stand {
    /// There is no QEMU.
    Off,
    /// QEMU writes to the base.
    OnBase {
        /// libvirt believes otherwise, and will go on to do so until the domain is started anew.
        libvirt_lost: bool,
    },
    /// QEMU writes to the overlay.
    OnOverlay {
        /// By whose hands it can be committed.
        through: Through,
        /// How far that is.
        commit: CommitStand,
    },
    /// The guest runs without the disk: somebody has taken it away, and QEMU has let go of overlay and base.
    Unplugged,
    /// QEMU writes to neither, or has one of them open and not as that disk.
    Elsewhere(String),
}

/// How far a commit is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommitStand {
    /// None is going on.
    None,
    /// It has not caught up with the guest.
    Running {
        /// Bytes done.
        done: u64,
        /// Of so many.
        total: u64,
    },
    /// It has, and waits for the pivot.
    Ready,
    /// It has stopped.
    Failed(String),
    /// Another kind of block job is in the way.
    Foreign(String),
}

impl Stand {
    /// Where `disk` stands.
    #[must_use]
    pub fn of(observation: &Observation, disk: &JobDisk) -> Self {
        Self::read(observation.qemu.as_ref(), observation.live.as_ref(), disk)
    }

    /// The same from QEMU's answer and libvirt's live definition.
    #[must_use]
    pub fn read(qemu: Option<&Qemu>, live: Option<&Definition>, disk: &JobDisk) -> Self {
        let Some(qemu) = qemu else { return Self::Off };
        let Some(top) = qemu.top(&disk.target) else {
            let ours = |file: &&PathBuf| **file == disk.overlay || disk.is_base(file);
            let held = qemu.open.iter().find(ours);
            return match held {
                None => Self::Unplugged,
                Some(file) => Self::Elsewhere(format!(
                    "QEMU has no disk {} with a medium, and has {} open",
                    disk.target,
                    file.display()
                )),
            };
        };
        let believed = live.and_then(|live| live.file(&disk.target)).map(|path| path.as_path());
        let top = match believed {
            Some(believed) if vmkeep_workflow::mutation::on("probe-by-xml") => believed,
            _ => top,
        };
        if disk.is_base(top) {
            return Self::OnBase { libvirt_lost: believed == Some(disk.overlay.as_path()) };
        }
        if top != disk.overlay {
            return Self::Elsewhere(format!("QEMU writes to {}", top.display()));
        }
        let below = qemu.disk(&disk.target).and_then(|d| d.chain.get(1)).map(|layer| layer.path.as_path());
        if !below.is_some_and(|below| disk.is_base(below)) {
            return Self::Elsewhere(format!(
                "under the overlay QEMU has {}",
                below.map_or("nothing".into(), Path::to_string_lossy)
            ));
        }
        let on_base = believed.is_some_and(|believed| disk.is_base(believed));
        let through = if on_base { Through::Monitor } else { Through::Libvirt };
        let commit = match qemu.job(&disk.target) {
            None => CommitStand::None,
            Some(job) if job.kind != BlockJobKind::Commit => CommitStand::Foreign(job.id.clone()),
            Some(job) => match &job.error {
                Some(error) => CommitStand::Failed(error.clone()),
                None if job.ready => CommitStand::Ready,
                None => CommitStand::Running { done: job.done, total: job.total },
            },
        };
        Self::OnOverlay { through, commit }
    }

    /// Whether libvirt believes in a block job that QEMU does not have, on a disk that is on its base.
    #[must_use]
    pub fn stuck_mirror(observation: &Observation, disk: &JobDisk) -> bool {
        let mirror =
            observation.live.as_ref().and_then(|live| live.disk(&disk.target)).and_then(|d| d.mirror);
        let job = observation.qemu.as_ref().is_some_and(|qemu| qemu.job(&disk.target).is_some());
        matches!(mirror, Some(Mirror::Pivoting)) && !job
    }
}

//! What there is to see of a domain.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::definition::{Definition, Layer};
use super::marker::Marker;

/// A domain's UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DomainId(pub Uuid);

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A domain: its UUID, and its name as it was when asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DomainRef {
    /// Stays.
    pub id: DomainId,
    /// May change.
    pub name: String,
}

/// The name of a disk within its domain: `vda`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Target(pub String);

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Target {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

/// Why a guest is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// Somebody asked for it.
    Asked,
    /// A disk could not be written.
    IoError,
    /// libvirt does so for a job of its own and will resume it.
    Job,
    /// Anything else, or not known.
    Other,
}

/// Whether a domain runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", content = "reason", rename_all = "snake_case")]
pub enum RunState {
    /// There is no QEMU.
    Off,
    /// Its processors run.
    Running,
    /// They are stopped.
    Paused(PauseReason),
    /// Neither: crashed, asleep, shutting down.
    Other,
}

impl RunState {
    /// Whether there is a QEMU.
    #[must_use]
    pub fn is_active(self) -> bool {
        self != Self::Off
    }
}

/// All there is to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Whom.
    pub domain: DomainRef,
    /// Whether it runs.
    pub state: RunState,
    /// What it starts from the next time; nothing if it is transient.
    pub persistent: Option<Definition>,
    /// What libvirt believes that it runs with; nothing if it is off.
    pub live: Option<Definition>,
    /// What QEMU says; nothing if it is off.
    pub qemu: Option<Qemu>,
    /// Our own note in the live definition if it runs, else in the persistent one.
    pub marker: Option<Marker>,
    /// Our own note in the persistent definition.
    pub persistent_marker: Option<Marker>,
    /// libvirt's managed save image exists.
    pub managed_save: bool,
    /// Whether it is off because its memory was saved, into whatever file: nothing if it is not off, or if that is not
    /// known (any more). Stays so when that file is removed.
    pub saved: Option<bool>,
    /// It is off because its QEMU ended by itself: nobody destroyed it, and its guest did not shut down. False also if that
    /// is not known (any more).
    pub crashed: bool,
    /// It starts with the host.
    pub autostart: bool,
    /// Names of libvirt's snapshots, each with whether any part of it is in a file outside the disks.
    pub snapshots: Vec<(String, bool)>,
    /// Names of libvirt's checkpoints.
    pub checkpoints: Vec<String>,
}

/// QEMU's own answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// Which process: number, start and boot in one string.
    pub instance: String,
    /// The disks that have a medium.
    pub disks: Vec<QemuDisk>,
    /// All block jobs, also those that libvirt does not know.
    pub jobs: Vec<BlockJob>,
    /// Every image file that the process has open, also where no disk uses it.
    pub open: Vec<PathBuf>,
}

impl Qemu {
    /// A disk by target.
    #[must_use]
    pub fn disk(&self, target: &Target) -> Option<&QemuDisk> {
        self.disks.iter().find(|disk| disk.target == *target)
    }

    /// The file that QEMU writes a disk to.
    #[must_use]
    pub fn top(&self, target: &Target) -> Option<&Path> {
        self.disk(target).and_then(|disk| disk.chain.first()).map(|layer| layer.path.as_path())
    }

    /// The block job on a disk.
    #[must_use]
    pub fn job(&self, target: &Target) -> Option<&BlockJob> {
        self.jobs.iter().find(|job| job.target.as_ref() == Some(target))
    }
}

/// A disk as QEMU has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuDisk {
    /// Which.
    pub target: Target,
    /// Its images from the top down; the first is written to. Helper nodes of block jobs are left out.
    pub chain: Vec<Layer>,
    /// The guest may not write.
    pub read_only: bool,
}

/// What a block job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockJobKind {
    /// Commits images down.
    Commit,
    /// Anything else.
    Other,
}

/// A block job in QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJob {
    /// QEMU's name for it.
    pub id: String,
    /// On which disk, if that can be told.
    pub target: Option<Target>,
    /// What it does.
    pub kind: BlockJobKind,
    /// A commit that has caught up and waits for the pivot.
    pub ready: bool,
    /// Bytes done.
    pub done: u64,
    /// Of so many; grows while the guest writes.
    pub total: u64,
    /// Why it has stopped, if it has.
    pub error: Option<String>,
}

/// libvirt's idea of a block job that moves a disk, from the live definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mirror {
    /// Not caught up.
    Running,
    /// Caught up.
    Ready,
    /// Moving. If QEMU has no such job any more, libvirt missed its end and believes so until the domain is started
    /// anew.
    Pivoting,
    /// Being given up.
    Aborting,
}

/// Whether libvirt is busy with a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// It is not.
    Idle,
    /// A call is being executed, or waits for QEMU, since so many milliseconds.
    Busy {
        /// Milliseconds.
        for_ms: u64,
    },
    /// It cannot talk to QEMU.
    Broken,
}

/// libvirt's asynchronous job on a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainJob {
    /// What it does, in libvirt's words: "snapshot", "save", "backup".
    pub operation: String,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
    /// Bytes done.
    pub done: u64,
    /// Bytes left; with a guest that writes it grows again.
    pub remaining: u64,
    /// Bytes in all, as far as known.
    pub total: u64,
    /// Bytes that the guest dirties a second, as last measured; 0 when not known.
    pub dirty_rate: u64,
    /// How often memory has been gone through.
    pub iteration: u64,
}

/// What the guest's agent says about its file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FreezeState {
    /// None is frozen.
    Thawed,
    /// They are frozen.
    Frozen,
}

//! What a backup can be told, and what the daemon has settled.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::phases::Waits;
use super::saving::SaveOptions;
use crate::image::space::LowWater;
use crate::save::AfterReboot;
use crate::snapshot::freeze::FreezePolicy;
use crate::snapshot::memory::IfSlow;

/// What a backup is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotOptions {
    /// A root, or a folder below one.
    pub target: PathBuf,
    /// Memory as well; nothing for disks only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryOptions>,
    /// Whether the guest's file systems are frozen for the instant; only without memory.
    #[serde(default)]
    pub freeze: FreezePolicy,
    /// Only these disks, by target; empty for all that can take part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// Bytes per second for copying each image; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
    /// Bytes per second for committing each overlay; 0 for no limit.
    #[serde(default)]
    pub merge_bandwidth: u64,
    /// The classic act: the guest is saved, which takes it down for a moment. Excludes memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save: Option<SaveOptions>,
    /// What becomes of the guest when the host goes down meanwhile.
    #[serde(default)]
    pub after_reboot: AfterReboot,
    /// Waits between its phases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<Waits>,
    /// How many whole backups of the domain stay below that root once this one is there and was read again; absent: all.
    /// A job of its own sees to that, see [`crate::deletion`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<u32>,
}

impl SnapshotOptions {
    /// Of the disks alone, for who puts nothing into a folder.
    pub(super) fn of_disks() -> Self {
        Self {
            target: PathBuf::new(),
            memory: None,
            freeze: FreezePolicy::Never,
            disks: Vec::new(),
            bandwidth: 0,
            merge_bandwidth: 0,
            save: None,
            after_reboot: AfterReboot::default(),
            waits: None,
            keep: None,
        }
    }
}

/// How much memory may take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryOptions {
    /// Bytes of its file; absent: a quarter more than the guest has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Seconds; absent: ten minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// What to do then.
    #[serde(default)]
    pub if_slow: IfSlow,
}

/// What the daemon has settled for all backups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The store's id.
    pub store: String,
    /// What writes the manifests: `vmkeep 0.1.0`.
    pub tool: String,
    /// What stays free on the guests' own file systems, and where overlays lie.
    pub guests: LowWater,
    /// What stays free on the targets.
    pub targets: LowWater,
    /// A folder for the overlays of disks on block devices; nothing: such disks take no part.
    pub overlay_dir: Option<PathBuf>,
}

impl Settings {
    /// With the defaults for all but the identity.
    #[must_use]
    pub fn new(store: impl Into<String>, tool: impl Into<String>) -> Self {
        Self {
            store: store.into(),
            tool: tool.into(),
            guests: LowWater::default(),
            targets: LowWater { bytes: 64 << 20, percent: 1 },
            overlay_dir: None,
        }
    }
}

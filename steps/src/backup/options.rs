//! What a backup into a vault can be told, and what the daemon has settled.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::image::space::LowWater;
use crate::snapshot::freeze::FreezePolicy;

/// What is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Asked {
    /// What has changed since the last backup, where that can be known; else everything.
    #[default]
    Auto,
    /// Everything.
    Full,
    /// As `auto`; the manifest calls a disk that had to be read whole by its reason.
    Incremental,
    /// What has changed since the last backup that was a full one.
    Differential,
}

/// What a backup is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupOptions {
    /// The vault's name.
    pub vault: String,
    /// What is to be read.
    #[serde(default)]
    pub kind: Asked,
    /// Whether the guest's file systems are frozen for the instant.
    #[serde(default)]
    pub freeze: FreezePolicy,
    /// Only these disks, by target; empty for all that can take part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// Bytes per second for reading; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
    /// What is secret may lie in a vault without encryption.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_plaintext: bool,
}

/// What the daemon has settled for all backups into vaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupSettings {
    /// The store's id.
    pub store: String,
    /// What makes the backups: `vmkeep 0.1.0`.
    pub tool: String,
    /// Where scratch files lie; nothing: beside the image of their disk.
    pub scratch_dir: Option<PathBuf>,
    /// A folder for the overlays of disks on block devices of domains that are off; nothing: such disks take no part then.
    pub overlay_dir: Option<PathBuf>,
    /// Bytes per second for committing each overlay of a domain that was off; 0 for no limit.
    pub merge_bandwidth: u64,
    /// What stays free where scratch files and overlays lie.
    pub low_water: LowWater,
    /// After so many days a disk is read whole again, whatever bitmaps say.
    pub full_every_days: u32,
    /// So many checkpoints of ours a domain keeps over all vaults; at least one.
    pub checkpoints: u32,
}

impl BackupSettings {
    /// With the defaults for all but the identity.
    #[must_use]
    pub fn new(store: impl Into<String>, tool: impl Into<String>) -> Self {
        Self {
            store: store.into(),
            tool: tool.into(),
            scratch_dir: None,
            overlay_dir: None,
            merge_bandwidth: 0,
            low_water: LowWater::default(),
            full_every_days: 35,
            checkpoints: 4,
        }
    }
}

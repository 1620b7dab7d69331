//! What a restore can be told.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::rights::RightsSettings;
use crate::image::space::LowWater;

/// What becomes of the new domain in the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// With memory it is paused, without it is defined and off.
    #[default]
    Default,
    /// It runs.
    Running,
    /// It is paused: with its memory, or before its first instruction.
    Paused,
}

/// What a restore is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreOptions {
    /// The backup's folder.
    pub backup: PathBuf,
    /// Its owner has named that folder himself; it lies below no root.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside: bool,
    /// Its definition was shown to somebody who answers for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trusted: bool,
    /// The name of the new domain.
    pub name: String,
    /// Where all disks go that are not named in `disks`; below a root, made if need be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// Where single disks go: the path of the new image, by target.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub disks: BTreeMap<String, PathBuf>,
    /// Leave the memory out.
    #[serde(default)]
    pub cold: bool,
    /// What becomes of it in the end.
    #[serde(default)]
    pub then: Then,
    /// Network links are up from the start.
    #[serde(default)]
    pub connect: bool,
    /// It starts with the host.
    #[serde(default)]
    pub autostart: bool,
    /// Bytes per second for each file; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// What the daemon has settled for all restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoreSettings {
    /// What stays free where images are restored to.
    pub targets: LowWater,
    /// For how many milliseconds a guest that was let run is watched.
    pub watch_ms: u64,
    /// Whose restored files become.
    pub rights: RightsSettings,
}

impl Default for RestoreSettings {
    fn default() -> Self {
        Self {
            targets: LowWater { bytes: 64 << 20, percent: 1 },
            watch_ms: 3000,
            rights: RightsSettings::default(),
        }
    }
}

//! What a restore from a vault can be told.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmkeep_vault::ids::{BackupId, DomainId};

use crate::image::qcow2::Format;
use crate::restore::Then;

/// What a restore from a vault is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaultRestoreOptions {
    /// The vault's name.
    pub vault: String,
    /// The backup.
    pub backup: BackupId,
    /// The domain that it is of.
    pub domain: DomainId,
    /// Also one that is unchecked, to be pruned, or known to be damaged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unchecked: bool,
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
    /// The format of the new images.
    #[serde(default = "raw")]
    pub format: Format,
    /// What becomes of it in the end.
    #[serde(default)]
    pub then: Then,
    /// Network links are up from the start.
    #[serde(default)]
    pub connect: bool,
    /// It starts with the host.
    #[serde(default)]
    pub autostart: bool,
    /// Bytes per second for each disk; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

fn raw() -> Format {
    Format::Raw
}

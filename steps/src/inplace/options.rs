//! What a restore in place, its undo and a discard can be told.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmkeep_workflow::JobId;

use super::rest::Rest;
use crate::restore::Then;

/// What a restore in place is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InPlaceOptions {
    /// The backup's folder.
    pub backup: PathBuf,
    /// Its owner has named that folder himself; it lies below no root.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside: bool,
    /// Its definition was shown to somebody who answers for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trusted: bool,
    /// Only these disks, by target; empty: all that the backup holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// Where the new images go; absent: each beside the image whose place it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// Leave the memory out.
    #[serde(default)]
    pub cold: bool,
    /// The backup's definition comes back as well.
    #[serde(default)]
    pub definition: bool,
    /// How the present machine may be brought to rest.
    #[serde(default)]
    pub rest: Rest,
    /// What becomes of it in the end; by default what the present machine does.
    #[serde(default)]
    pub then: Then,
    /// Bytes per second for each file; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// What the way back is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UndoOptions {
    /// The job that set the machine aside.
    pub job: JobId,
    /// Leave its memory out, if it was saved.
    #[serde(default)]
    pub cold: bool,
    /// How the present machine may be brought to rest.
    #[serde(default)]
    pub rest: Rest,
    /// What becomes of it in the end; by default what it did when it was set aside.
    #[serde(default)]
    pub then: Then,
}

/// What a discard is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscardOptions {
    /// The job that set the machine aside.
    pub job: JobId,
}

/// What the daemon has settled for all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InPlaceSettings {
    /// This daemon's store.
    pub store: String,
    /// The folder of restored domains, a root: machines are kept aside below it.
    pub restored: PathBuf,
    /// What stays free where images are restored to, and for how long a guest is watched.
    pub restore: crate::restore::RestoreSettings,
}

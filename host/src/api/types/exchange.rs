//! Restores in place, the way back, and what is kept aside.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::StartAs;

/// How the machine that is there may be brought to rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestRequest {
    /// Its memory is saved, and kept aside with it.
    #[serde(default)]
    pub save_old: bool,
    /// Its plug may be pulled when it does not shut down in time.
    #[serde(default)]
    pub destroy: bool,
    /// How long it may take to shut down; absent: three minutes.
    pub shutdown_ms: Option<u64>,
}

/// Asks for a restore in place of the domain that the backup is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InPlaceRequest {
    /// The backup's id, its unique beginning, or its folder; empty with `from`.
    #[serde(default)]
    pub backup: String,
    /// The backup's folder, wherever it lies; instead of `backup`.
    pub from: Option<PathBuf>,
    /// Whether the requester answers for a definition from outside the roots that reaches into the host.
    #[serde(default)]
    pub trust_definition: bool,
    /// Only these disks, by target; empty: all that the backup holds.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Where the new images go; absent: each beside the image whose place it takes.
    pub folder: Option<PathBuf>,
    /// Leave the memory out.
    #[serde(default)]
    pub cold: bool,
    /// The backup's definition comes back as well.
    #[serde(default)]
    pub definition: bool,
    /// How the present machine may be brought to rest.
    #[serde(default)]
    pub rest: RestRequest,
    /// Whether it starts; by default it does what the present machine does.
    #[serde(default)]
    pub start: StartAs,
    /// Bytes per second; 0: no limit; absent: the configured one.
    pub bandwidth: Option<u64>,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plan.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks for the machine back that a restore in place has set aside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UndoRequest {
    /// The job that set it aside, or its unique beginning.
    pub job: String,
    /// Leave its memory out, if it was saved.
    #[serde(default)]
    pub cold: bool,
    /// How the present machine may be brought to rest.
    #[serde(default)]
    pub rest: RestRequest,
    /// Whether it starts; by default it does what it did when it was set aside.
    #[serde(default)]
    pub start: StartAs,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plan.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks to remove a machine for good that is kept aside.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscardRequest {
    /// The job that set it aside, or its unique beginning.
    pub job: String,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plan.
    #[serde(default)]
    pub dry_run: bool,
}

/// A machine that is kept aside, in one row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptRow {
    /// The job that set it aside.
    pub job: String,
    /// The beginning of its id that is enough.
    pub short: String,
    /// Whose machine.
    pub domain: String,
    /// Its UUID.
    pub domain_uuid: String,
    /// When it was set aside.
    pub at: Timestamp,
    /// What took its place.
    pub because: String,
    /// Its memory was saved.
    pub memory: bool,
    /// Its images that were replaced.
    pub images: Vec<PathBuf>,
    /// Its folder.
    pub folder: PathBuf,
    /// Bytes that would be free without it.
    pub bytes: u64,
}

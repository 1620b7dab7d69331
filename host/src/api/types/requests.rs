//! What is asked of the daemon. Every absent option means the default that is stated here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_steps::backup::Asked;
use vmkeep_workflow::Settle;

/// What to do when memory changes faster than it can be saved, or does not fit its limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnBusyMemory {
    /// Pause the guest so that saving comes to an end.
    Pause,
    /// Take the disks alone.
    #[default]
    DiskOnly,
    /// Fail, with nothing changed.
    Fail,
}

/// Whether the configured RAM disk is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RamDisk {
    /// If it is there and large enough; else the target, with a warning.
    #[default]
    Prefer,
    /// Or the backup is refused.
    Require,
    /// Not at all.
    Never,
}

/// What to do when the saved state is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WithoutState {
    /// No backup then.
    #[default]
    Fail,
    /// A backup of the disks alone.
    DiskOnly,
}

/// A phase that a job can wait before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WaitBefore {
    /// Before what stands still is copied.
    Retain,
    /// Before the overlays are merged.
    Merge,
}

/// Asks for a backup into a vault.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupRequest {
    /// Name, UUID, or unique beginning of the UUID.
    pub domain: String,
    /// The vault's name in the configuration; absent: the usual one.
    pub vault: Option<String>,
    /// What is read.
    #[serde(default)]
    pub kind: Asked,
    /// Only these disks, by target; empty: all that can take part.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Bytes per second for reading; 0: no limit; absent: the configured one.
    pub bandwidth: Option<u64>,
    /// Whether the guest's file systems are frozen for the instant; absent: when an agent answers.
    pub quiesce: Option<bool>,
    /// Whether what is secret may lie in a vault without encryption.
    #[serde(default)]
    pub allow_plaintext: bool,
    /// Whether to wait while the domain is busy with another job, instead of being refused.
    #[serde(default)]
    pub queue: bool,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plan.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks for a backup into plain files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// Name, UUID, or unique beginning of the UUID.
    pub domain: String,
    /// Whether memory is taken as well.
    #[serde(default)]
    pub memory: bool,
    /// The classic act: save the guest to a file, which takes it down for a moment, load it again and let it run.
    /// Excludes memory.
    #[serde(default)]
    pub save: bool,
    /// For `save`: whether the configured RAM disk is used.
    #[serde(default)]
    pub ram_disk: RamDisk,
    /// For `save`: what to do when the state is lost before it is in the backup.
    #[serde(default)]
    pub without_state: WithoutState,
    /// The root or a folder below one; absent: the first root.
    pub to: Option<PathBuf>,
    /// Only these disks, by target; empty: all that can take part.
    #[serde(default)]
    pub disks: Vec<String>,
    /// The largest memory image in bytes; absent: the configured limit.
    pub memory_limit: Option<u64>,
    /// The longest time for saving memory, in whole seconds (a part of one counts as one); absent: the configured limit.
    pub memory_time_ms: Option<u64>,
    /// What to do when memory is too busy.
    #[serde(default)]
    pub on_busy_memory: OnBusyMemory,
    /// Bytes per second for copying; 0: no limit; absent: the configured one.
    pub bandwidth: Option<u64>,
    /// Bytes per second for merging the overlays back; 0: no limit; absent: the configured one.
    pub merge_bandwidth: Option<u64>,
    /// Phases before which the job waits for the signal of that name.
    #[serde(default)]
    pub wait_before: Vec<WaitBefore>,
    /// The longest of each wait; then the job goes on by itself. Absent: half an hour.
    pub wait_limit_ms: Option<u64>,
    /// Whether the guest's file systems are frozen for the instant; absent: when an agent answers.
    pub quiesce: Option<bool>,
    /// How many whole backups of the domain stay below that root once this one is there and was read again; absent: as
    /// configured; 0: all.
    pub keep: Option<u32>,
    /// Whether to wait while the domain is busy with another job, instead of being refused.
    #[serde(default)]
    pub queue: bool,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plan.
    #[serde(default)]
    pub dry_run: bool,
}

/// Whether, and how, a restored domain starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum StartAs {
    /// With memory it is left paused, without it is left shut off.
    #[default]
    Default,
    /// It runs.
    Running,
    /// It is paused.
    Paused,
}

/// What the images of a restored domain are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// Raw, with holes where there is nothing.
    #[default]
    Raw,
    /// qcow2; needs room for both while it is made.
    Qcow2,
}

/// Asks for a restore to a new domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The backup's id, its unique beginning, or its folder; empty with `from`.
    #[serde(default)]
    pub backup: String,
    /// The backup's folder, wherever it lies; instead of `backup`.
    #[serde(default)]
    pub from: Option<PathBuf>,
    /// The vault that the backup is in, by its name in the configuration; absent: it is a folder.
    #[serde(default)]
    pub vault: Option<String>,
    /// Of a backup in a vault: also one that is unchecked, to be pruned, or known to be damaged.
    #[serde(default)]
    pub unchecked: bool,
    /// Of a backup in a vault: what the new images are; absent: raw.
    #[serde(default)]
    pub format: Option<ImageFormat>,
    /// Whether the requester answers for a definition from outside the roots, or from a vault without encryption, that
    /// reaches into the host.
    #[serde(default)]
    pub trust_definition: bool,
    /// The new domain's name.
    #[serde(rename = "as")]
    pub name: String,
    /// Where single disks go, by target.
    #[serde(default)]
    pub disks: BTreeMap<String, PathBuf>,
    /// Where all other disks go; absent: a folder of its own below the restore folder.
    pub folder: Option<PathBuf>,
    /// Leave the memory out.
    #[serde(default)]
    pub cold: bool,
    /// Whether it starts.
    #[serde(default)]
    pub start: StartAs,
    /// Whether network links are up from the start.
    #[serde(default)]
    pub connect: bool,
    /// Whether it starts with the host.
    #[serde(default)]
    pub autostart: bool,
    /// Bytes per second; 0: no limit; absent: the configured one.
    pub bandwidth: Option<u64>,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plan.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks to delete backups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteRequest {
    /// Their ids, unique beginnings of those, or folders.
    pub backups: Vec<String>,
    /// Whether the last whole backup of a domain may be among them; needs a reason.
    #[serde(default)]
    pub last_copy: bool,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plans.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks to thin backups out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneRequest {
    /// Name or UUID of the domain; absent: every domain that has backups.
    pub domain: Option<String>,
    /// How many whole backups stay below each root; at least 1.
    pub keep: u32,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plans.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks to take away what jobs that are over have left, as far as that is safe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepairRequest {
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only show the plans.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks to protect a backup from deletion, or to end that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectRequest {
    /// Its id, its unique beginning, or its folder.
    pub backup: String,
    /// When it ends by itself; absent: never.
    pub until: Option<Timestamp>,
    /// Why.
    pub reason: Option<String>,
    /// Only say whether it could be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks to read every manifest anew.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebuildRequest {
    /// Below this folder; absent: below the roots.
    pub from: Option<PathBuf>,
    /// Why.
    pub reason: Option<String>,
    /// Only tell what is found.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks to forget a backup that is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForgetRequest {
    /// Its id or its unique beginning.
    pub backup: String,
    /// Why.
    pub reason: Option<String>,
    /// Only say whether it could be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// What an operator does to a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Act {
    /// Why, for the journal.
    pub reason: Option<String>,
    /// For a pause: how long, at most.
    pub pause_ms: Option<u64>,
    /// For settling: how.
    pub settle: Option<Settle>,
    /// For a signal: its name.
    pub signal: Option<String>,
    /// Only say what it would do.
    #[serde(default)]
    pub dry_run: bool,
}

/// Asks for the history of old jobs to be let go. What is absent is as configured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryPruneRequest {
    /// Keep those that ended within so many days; 0: for ever.
    pub keep_days: Option<u32>,
    /// Keep the latest so many; 0: all.
    pub keep_jobs: Option<usize>,
    /// Why, for the journal.
    pub reason: Option<String>,
    /// Only tell what would go.
    #[serde(default)]
    pub dry_run: bool,
}

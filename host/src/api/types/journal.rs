//! Answers about the journal as evidence, and the files that it is kept in.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmkeep_store::Tombstone;
use vmkeep_workflow::JobStatus;

/// What verifying the audit trail found. Damage is an error and no answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Audited {
    /// Streams.
    pub streams: u64,
    /// Records.
    pub records: u64,
    /// The head of the global chain, in hexadecimal: keep it elsewhere, to notice a rewrite of everything.
    ///
    /// Absent for an export of single jobs, which has no global chain.
    pub head: Option<String>,
    /// The jobs whose history was let go, by their tombstones.
    #[serde(default)]
    pub pruned: Vec<Tombstone>,
    /// For an export: the streams of which it holds a part only, in words.
    #[serde(default)]
    pub cut: Vec<String>,
    /// The signed heads that it was compared with; absent if there were none.
    #[serde(default)]
    pub vouched: Option<Vouching>,
}

/// Signed heads that agree with the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vouching {
    /// The file of the heads.
    pub file: PathBuf,
    /// Whether it lies beside the journal, where whoever changes the one can change the other.
    pub local: bool,
    /// How many heads were compared.
    pub heads: u64,
    /// The commit of the newest.
    pub commit: u64,
    /// When that was signed.
    pub at: Timestamp,
    /// How many commits came after it, and nobody vouches for.
    pub after: u64,
    /// Whether the last line of the file was cut off, and left out.
    pub cut_off: bool,
}

/// A new key for signing heads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyChange {
    /// The public key that vouches for the new one.
    pub old: String,
    /// The new public key.
    pub new: String,
}

/// What keeps the journal, and how much is in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreInfo {
    /// Its folder.
    pub path: PathBuf,
    /// What keeps it.
    pub engine: String,
    /// Its id.
    pub id: Uuid,
    /// When it was made.
    pub created: Timestamp,
    /// Bytes, the reserve included.
    pub size: u64,
    /// Records.
    pub records: u64,
    /// Streams.
    pub streams: u64,
    /// Commits.
    pub commits: u64,
    /// Jobs with their history.
    pub jobs: u64,
    /// Jobs whose history was let go.
    pub pruned: u64,
    /// The link of the last commit; absent when the store is damaged.
    pub head: Option<String>,
    /// How many things are wrong with it.
    pub found: u64,
}

/// What was let go of the journal, or would be.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Pruned {
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The jobs, the oldest first.
    pub jobs: Vec<PrunedJob>,
    /// How many events they had in all.
    pub events: u64,
    /// How many more would be due, and stay because a backup that they made still exists.
    pub kept_for_backups: u64,
    /// Those that could not be let go, and why.
    pub failed: Vec<String>,
}

/// A job whose history was let go, or would be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrunedJob {
    /// The job.
    pub job: String,
    /// Its workflow.
    pub workflow: String,
    /// The domain's name at that time.
    pub subject: String,
    /// How it ended.
    pub status: JobStatus,
    /// When.
    pub ended: Option<Timestamp>,
    /// How many events it had.
    pub events: u64,
    /// The hash of the last one, in hexadecimal; absent when nothing was done.
    pub hash: Option<String>,
}

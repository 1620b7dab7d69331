//! What the engine needs of a store: streams of records that are appended to under a condition and never changed.
//!
//! The promises that an implementation makes, each proven by the conformance suite of the store crate:
//! - **Durable.** When [`EventStore::append`] returns `Ok`, the records survive kill -9, a full disk and a power cut.
//! - **Conditional.** Records are appended only if the stream ends at the expected place. A conflict means that
//!   somebody else owns the job; nothing was written.
//! - **Whole.** All records of one append, the job's summary and its idempotency key become visible together.
//! - **Contiguous.** Places run 1, 2, 3 … without a gap, and this is checked on reading.
//! - **Tamper-evident.** Each record carries the BLAKE3 hash of its predecessor's hash and its own *stored bytes*; a
//!   global link per commit orders the streams among each other.
//! - **Honest.** A failure says whether the records may have been written ([`AppendError::Unknown`]). A failed fsync is
//!   [`AppendError::Fatal`]: what the kernel did with the pages is not known any more, the process must end, and the
//!   next one reads what is there.
//!
//! Rows ([`EventStore::put_row`]) are the mutable side: one small value per attempt for progress and resume tokens,
//! outside the hash chain, lost without harm.

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::broadcast;

use crate::fault::{Code, Fault};
use crate::ids::{JobId, Seq, StreamId};
use crate::summary::{JobStatus, JobSummary};

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The stream.
    pub stream: StreamId,
    /// The place in the stream.
    pub seq: Seq,
    /// The stored bytes: UTF-8 JSON, as they were handed to [`EventStore::append`].
    pub bytes: Vec<u8>,
    /// BLAKE3 of the predecessor's hash (32 zero bytes for the first) and the stored bytes.
    pub hash: [u8; 32],
}

/// The hash of a record, from its predecessor's hash and its stored bytes.
#[must_use]
pub fn link(previous: &[u8; 32], bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous);
    hasher.update(bytes);
    *hasher.finalize().as_bytes()
}

/// What to append.
#[derive(Clone, Debug)]
pub struct Append {
    /// The stream.
    pub stream: StreamId,
    /// The place at which the stream must end; `Seq(0)` for a new stream.
    pub expected: Seq,
    /// The records' bytes: UTF-8 JSON without raw newlines, at least one record.
    pub records: Vec<Vec<u8>>,
    /// The job's summary after these records, kept in the same transaction.
    pub summary: Option<JobSummary>,
    /// An idempotency key to be claimed for this stream in the same transaction.
    pub key: Option<String>,
}

/// An append that took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The place at which the stream ends now.
    pub last: Seq,
}

/// Why an append did not take place, or may not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// The stream does not end where it was expected to. Nothing was written.
    #[error("stream {stream} ends at {actual}, not at {expected}: another process owns it")]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// Where it was expected to end.
        expected: Seq,
        /// Where it ends.
        actual: Seq,
    },
    /// The idempotency key is taken by that stream. Nothing was written.
    #[error("the key is taken by {0}")]
    KeyTaken(StreamId),
    /// There is no room, not even in the reserve. Nothing was written.
    #[error("the store is full: {0}")]
    Full(String),
    /// Nothing was written; trying again may help.
    #[error("the store did not accept the record: {0}")]
    Rejected(String),
    /// It is not known whether the records were written. Read the stream before doing anything else.
    #[error("it is not known whether the record was written: {0}")]
    Unknown(String),
    /// The store can no longer vouch for what it wrote. The process must end.
    #[error("the store failed and the process must end: {0}")]
    Fatal(String),
}

/// Why a store cannot be opened or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has it open.
    #[error("the store {path} is in use by {holder}")]
    InUse {
        /// The store.
        path: String,
        /// What is known of the other process.
        holder: String,
    },
    /// It was written by a newer release. It was not touched.
    #[error("the store {path} has format {found}, and this release reads up to {known}")]
    TooNew {
        /// The store.
        path: String,
        /// Its format.
        found: u32,
        /// The newest format known.
        known: u32,
    },
    /// Another engine made it than the one that is asked for. It was not touched.
    #[error("the store {path} was made by the engine {found}, and {wanted} is configured")]
    OtherEngine {
        /// The store.
        path: String,
        /// The engine that made it.
        found: String,
        /// The engine that is asked for.
        wanted: String,
    },
    /// The history of a job was removed on purpose; what is left proves that it was there.
    #[error("the history of {stream} was pruned: it had {events} events, the last with the hash {hash}")]
    Pruned {
        /// The job's stream.
        stream: StreamId,
        /// How many records it had.
        events: u64,
        /// The hash of the last one, in hexadecimal digits.
        hash: String,
    },
    /// It is damaged; the text says where.
    #[error("the store is damaged: {0}")]
    Damaged(String),
    /// Reading or writing failed.
    #[error("the store cannot be read: {0}")]
    Io(String),
}

impl AppendError {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Full(_) => Code::STORE_RESERVE_SPENT,
            Self::Conflict { .. } => Code::STORE_IN_USE,
            Self::KeyTaken(_) => Code::DUPLICATE_KEY,
            Self::Rejected(_) | Self::Unknown(_) | Self::Fatal(_) => Code::STORE_UNAVAILABLE,
        }
    }
}

impl StoreError {
    /// The stable code: a store that was changed is not the same as one that cannot be reached.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::InUse { .. } => Code::STORE_IN_USE,
            Self::TooNew { .. } => Code::STORE_TOO_NEW,
            Self::Damaged(_) => Code::STORE_DAMAGED,
            Self::Pruned { .. } => Code::NO_SUCH_JOB,
            Self::Io(_) | Self::OtherEngine { .. } => Code::STORE_UNAVAILABLE,
        }
    }

    /// The failure of reading the store, without a remedy: the code's own holds.
    #[must_use]
    pub fn fault(&self, doing: &str, object: impl Into<String>) -> Fault {
        Fault::permanent(self.code(), doing, object, self)
    }
}

/// Which jobs to list. Every absent field means "any".
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct JobFilter {
    /// Of this subject.
    pub subject: Option<String>,
    /// Of this workflow.
    pub workflow: Option<String>,
    /// In one of these states; empty means any.
    #[serde(default)]
    pub status: Vec<JobStatus>,
    /// Asked for at or after this instant.
    pub since: Option<Timestamp>,
    /// Asked for before this instant.
    pub until: Option<Timestamp>,
    /// At most so many; 0 means no limit.
    #[serde(default)]
    pub limit: usize,
}

/// Whether the store lives on its reserve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reserve {
    /// The reserve is whole.
    Intact,
    /// The disk was full and the reserve was given up; no new job may start.
    Spent,
}

/// A store of streams. See the module's list of promises.
#[async_trait]
pub trait EventStore: Send + Sync + 'static {
    /// The store's own identity, made with it and kept for ever.
    fn id(&self) -> uuid::Uuid;

    /// Appends records under the condition that the stream ends at the expected place.
    async fn append(&self, append: Append) -> Result<Appended, AppendError>;

    /// Reads at most `limit` records of a stream (0: all) from a place on, in order, with the chain checked from the
    /// first record that is read.
    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError>;

    /// Where a stream ends; `Seq(0)` when there is none.
    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError>;

    /// All streams, by name.
    async fn streams(&self) -> Result<Vec<StreamId>, StoreError>;

    /// The summaries of jobs, newest request first.
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError>;

    /// The summary of one job.
    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError>;

    /// The stream that claimed an idempotency key.
    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError>;

    /// Sets a mutable row of a job.
    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError>;

    /// The mutable rows of a job, by name.
    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError>;

    /// Removes all mutable rows of a job.
    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError>;

    /// Records as they become durable, from now on, over all streams and in the order of their commits. A receiver
    /// that lags is told so and reads the streams anew.
    fn subscribe(&self) -> broadcast::Receiver<Record>;

    /// Whether the store lives on its reserve. Looking may restore a spent reserve when there is room again.
    async fn reserve(&self) -> Result<Reserve, StoreError>;
}

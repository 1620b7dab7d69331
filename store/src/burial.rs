//! Letting go of the history of a job, so that what is left still proves the order of everything.
//!
//! **What goes, what stays.** Of a buried job the bytes of its events go, its summary and its rows. Of each event the place,
//! the commit and the hash stay: a commit's digest is made of those, so every seal and every link can be checked as before,
//! and the seals vouch for the hashes. What can no longer be shown is what was hashed. In the same commit a [`Tombstone`] is
//! appended to the stream [`STREAM`]: sealed like any record, it says what was taken away, how much of it, by whom, and its
//! final hash. Bytes that are missing without a tombstone are damage.
//!
//! **What can never go**: streams other than those of jobs, jobs that have not ended, and idempotency keys. A key that was
//! used once stays taken, or a request that is repeated after months would be carried out a second time.
//!
//! Rejected: removing whole records and keeping their number only. Then no commit that held one of them could be
//! checked any more, nor the records of other jobs that became durable with them.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::event::{Actor, Body, Event, Subject};
use vmkeep_workflow::ids::{JobId, Seq, StreamId, WorkflowName};
use vmkeep_workflow::journal::{Append, AppendError, Record, StoreError};
use vmkeep_workflow::summary::{JobStatus, JobSummary};

use crate::Store;
use crate::chain::hex;

/// The stream that tells what was taken out of the journal.
pub const STREAM: &str = "history";

/// The version of the stored form.
const FORMAT: u32 = 1;

/// What is left of a job's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The job's stream.
    pub stream: StreamId,
    /// How many events it had.
    pub events: u64,
    /// When the first of them happened.
    pub first: Timestamp,
    /// When the last of them happened.
    pub last: Timestamp,
    /// The hash of the last one, over all before it, in hexadecimal digits.
    pub hash: String,
    /// The recipe.
    pub workflow: WorkflowName,
    /// What the job worked on.
    pub subject: Subject,
    /// How it ended.
    pub status: JobStatus,
    /// The idempotency key of its request; it stays taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Who had it removed, and why.
    pub by: Actor,
}

/// A record of the stream.
#[derive(Serialize, Deserialize)]
struct Entry {
    v: u32,
    at: Timestamp,
    body: Told,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
enum Told {
    Pruned(Tombstone),
}

/// The tombstone that a record of the stream is; nothing if it is none, or one that this release does not know.
pub(crate) fn tombstone(record: &Record) -> Option<Tombstone> {
    if record.stream.as_str() != STREAM {
        return None;
    }
    let entry: Entry = serde_json::from_slice(&record.bytes).ok()?;
    let Told::Pruned(tombstone) = entry.body;
    Some(tombstone)
}

/// An append that lets a job's history go; for engines.
#[derive(Clone, Debug)]
pub struct Burial {
    /// The job.
    pub job: JobId,
    /// Where its stream must end.
    pub events: Seq,
    /// What is appended in the same commit: the tombstone.
    pub note: Append,
}

impl Burial {
    /// The job's stream.
    #[must_use]
    pub fn stream(&self) -> StreamId {
        StreamId::job(self.job)
    }
}

/// Why a job's history was not let go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BurialError {
    /// There is no such job.
    #[error("there is no job {0}")]
    NoJob(JobId),
    /// It has not ended.
    #[error("job {job} has not ended: it is {}", status.as_str())]
    NotEnded {
        /// The job.
        job: JobId,
        /// Where it stands.
        status: JobStatus,
    },
    /// Its history cannot be read, or is not what was written. What is damaged is evidence, and stays.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An event of it cannot be understood, so nobody can say what would be taken away.
    #[error("record {seq} of {stream} cannot be understood: {why}")]
    NotUnderstood {
        /// The job's stream.
        stream: StreamId,
        /// The place.
        seq: Seq,
        /// Why.
        why: String,
    },
    /// The store did not take the tombstone. Nothing was let go, or all of it.
    #[error(transparent)]
    Append(#[from] AppendError),
}

/// Lets the history of an ended job go, once it has been read and found whole.
///
/// # Errors
/// See [`BurialError`].
pub async fn bury(
    store: &dyn Store,
    job: JobId,
    by: Actor,
    now: Timestamp,
) -> Result<Tombstone, BurialError> {
    let summary = store.job(job).await?.ok_or(BurialError::NoJob(job))?;
    if !summary.status.ended() {
        return Err(BurialError::NotEnded { job, status: summary.status });
    }
    let stream = StreamId::job(job);
    // With its chain checked: what does not fit is damage, and must not be made to look like history that was let go.
    let records = store.read(&stream, Seq(1), 0).await?;
    let tombstone = describe(&summary, &records, by)?;
    let body = Entry { v: FORMAT, at: now, body: Told::Pruned(tombstone.clone()) };
    let body = serde_json::to_vec(&body).map_err(|e| AppendError::Rejected(e.to_string()))?;
    let history = StreamId::from(STREAM);
    let expected = store.last(&history).await?;
    let note = Append { stream: history, expected, records: vec![body], summary: None, key: None };
    store.bury(Burial { job, events: Seq(tombstone.events), note }).await?;
    Ok(tombstone)
}

fn describe(summary: &JobSummary, records: &[Record], by: Actor) -> Result<Tombstone, BurialError> {
    let stream = StreamId::job(summary.job);
    let event = |record: Option<&Record>| -> Result<Event, BurialError> {
        let record = record.ok_or(BurialError::NoJob(summary.job))?;
        serde_json::from_slice(&record.bytes).map_err(|e| BurialError::NotUnderstood {
            stream: stream.clone(),
            seq: record.seq,
            why: e.to_string(),
        })
    };
    let (first, last) = (event(records.first())?, event(records.last())?);
    let key = match first.body {
        Body::JobRequested(request) => request.key,
        _ => None,
    };
    Ok(Tombstone {
        events: records.len() as u64,
        first: first.at,
        last: last.at,
        hash: records.last().map(|record| hex(&record.hash)).unwrap_or_default(),
        workflow: summary.workflow.clone(),
        subject: summary.subject.clone(),
        status: summary.status,
        key,
        by,
        stream,
    })
}

/// How long the histories of ended jobs are kept. A job goes as soon as one of the limits says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Those that ended so many days ago at most; nothing: however long ago.
    pub keep_days: Option<u32>,
    /// The latest so many; nothing: all.
    pub keep_jobs: Option<usize>,
}

impl Policy {
    /// Whether nothing ever goes.
    #[must_use]
    pub fn keeps_everything(&self) -> bool {
        *self == Self::default()
    }

    /// The jobs that may go, the oldest first. `kept` are those that must stay whatever the limits say; they count.
    #[must_use]
    pub fn due<'a>(
        &self,
        jobs: &'a [JobSummary],
        kept: &HashSet<JobId>,
        now: Timestamp,
    ) -> Vec<&'a JobSummary> {
        let mut ended: Vec<(Timestamp, &JobSummary)> =
            jobs.iter().filter(|job| job.status.ended()).filter_map(|job| Some((job.ended?, job))).collect();
        ended.sort_by_key(|(ended, job)| (std::cmp::Reverse(*ended), job.job));
        let hours = self.keep_days.map(|days| i64::from(days) * 24);
        let oldest = hours.and_then(|hours| now.checked_sub(jiff::SignedDuration::from_hours(hours)).ok());
        let due = |(n, (ended, _)): &(usize, (Timestamp, &JobSummary))| {
            oldest.is_some_and(|oldest| *ended < oldest) || self.keep_jobs.is_some_and(|keep| *n >= keep)
        };
        let mut due: Vec<&JobSummary> =
            ended.into_iter().enumerate().filter(due).map(|(_, (_, job))| job).collect();
        due.retain(|job| !kept.contains(&job.job));
        due.reverse();
        due
    }
}

/// What a walk over the journal has seen of buried jobs.
#[derive(Default)]
pub(crate) struct Graves {
    /// Streams with records that have no bytes: how many.
    empty: HashMap<StreamId, u64>,
    /// What their tombstones say.
    tombstones: HashMap<StreamId, Tombstone>,
}

impl Graves {
    /// Takes a record in. Whether its bytes were let go.
    pub(crate) fn take(&mut self, record: &Record) -> bool {
        if let Some(tombstone) = tombstone(record) {
            self.tombstones.insert(tombstone.stream.clone(), tombstone);
        }
        let empty = record.bytes.is_empty();
        if empty {
            *self.empty.entry(record.stream.clone()).or_default() += 1;
        }
        empty
    }

    /// Whether a stream was buried, by its tombstone.
    pub(crate) fn has(&self, stream: &StreamId) -> bool {
        self.tombstones.contains_key(stream)
    }

    /// The tombstones, by stream.
    pub(crate) fn tombstones(&self) -> Vec<Tombstone> {
        let mut all: Vec<Tombstone> = self.tombstones.values().cloned().collect();
        all.sort_by(|a, b| a.stream.cmp(&b.stream));
        all
    }

    /// The streams whose tombstone is missing or does not fit, given where each stream ends.
    pub(crate) fn wrong(&self, end: impl Fn(&StreamId) -> Option<(Seq, [u8; 32])>) -> Vec<StreamId> {
        let fits = |stream: &StreamId| {
            let end = end(stream).map(|(last, hash)| (last.0, hex(&hash)));
            let tombstone = self.tombstones.get(stream);
            let said = tombstone.map(|tombstone| (tombstone.events, tombstone.hash.clone()));
            said.is_some() && said == end
        };
        let streams = self.empty.keys().chain(self.tombstones.keys());
        let mut wrong: Vec<StreamId> = streams.filter(|stream| !fits(stream)).cloned().collect();
        wrong.sort();
        wrong.dedup();
        wrong
    }
}

/// The error for reading records that were let go.
pub(crate) fn gone(stream: &StreamId, events: Seq, hash: &[u8; 32]) -> StoreError {
    StoreError::Pruned { stream: stream.clone(), events: events.0, hash: hex(hash) }
}

//! What a check found.

use std::fmt;

use serde::Serialize;
use uuid::Uuid;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::Record;
use vmkeep_workflow::summary::JobSummary;

use crate::burial::Tombstone;
use crate::config::EngineName;

/// So many findings are kept; the rest is counted.
const KEPT: usize = 1000;

/// The outcome of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The store.
    pub store: Uuid,
    /// Its engine.
    pub engine: EngineName,
    /// How many records were read.
    pub records: u64,
    /// How many streams they belong to.
    pub streams: u64,
    /// How many summaries were compared.
    pub jobs: u64,
    /// How many commits were compared.
    pub commits: u64,
    /// The link of the last commit, in hexadecimal digits: kept elsewhere, it shows later whether the journal was
    /// rewritten.
    pub link: String,
    /// What is left of the jobs whose history was let go, by stream.
    pub pruned: Vec<Tombstone>,
    /// What is wrong, in the order in which it was found; the first thousand.
    pub findings: Vec<Finding>,
    /// How many findings there were in all.
    pub found: u64,
}

impl Report {
    pub(super) fn new(store: Uuid, engine: EngineName) -> Self {
        Self {
            store,
            engine,
            records: 0,
            streams: 0,
            jobs: 0,
            commits: 0,
            link: String::new(),
            pruned: Vec::new(),
            findings: Vec::new(),
            found: 0,
        }
    }

    pub(super) fn add(&mut self, finding: Finding) {
        self.found += 1;
        if self.findings.len() < KEPT {
            self.findings.push(finding);
        }
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.found == 0
    }
}

/// Something that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The stream, if it concerns one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<StreamId>,
    /// The place in the stream, if it concerns one record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<Seq>,
    /// The commit, if it concerns one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<u64>,
    /// What is wrong.
    #[serde(flatten)]
    pub problem: Problem,
}

impl Finding {
    pub(super) fn of(problem: Problem) -> Self {
        Self { stream: None, seq: None, commit: None, problem }
    }

    pub(super) fn at(record: &Record, problem: Problem) -> Self {
        Self { seq: Some(record.seq), ..Self::in_stream(&record.stream, problem) }
    }

    pub(super) fn in_stream(stream: &StreamId, problem: Problem) -> Self {
        Self { stream: Some(stream.clone()), ..Self::of(problem) }
    }

    pub(super) fn in_commit(number: u64, problem: Problem) -> Self {
        Self { commit: Some(number), ..Self::of(problem) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(stream) = &self.stream {
            write!(f, "stream {:?}", stream.as_str())?;
            if let Some(seq) = self.seq {
                write!(f, ", record {seq}")?;
            }
            f.write_str(": ")?;
        }
        if let Some(commit) = self.commit {
            write!(f, "commit {commit}: ")?;
        }
        self.problem.fmt(f)
    }
}

/// What can be wrong with a journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "problem", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Problem {
    /// The hash does not follow from the previous hash and the stored bytes.
    #[error("its bytes do not fit its hash")]
    Chain,
    /// Records before this one are missing.
    #[error("it follows on record {after}: what belongs in between is missing")]
    Missing {
        /// The record before it.
        after: Seq,
    },
    /// It stands among the records of a later commit.
    #[error("it belongs to commit {commit} and stands after a later one")]
    OutOfOrder {
        /// Its commit.
        commit: u64,
    },
    /// It belongs to no stream.
    #[error("it belongs to no stream")]
    NoStream,
    /// It is an event that this release does not know, or no event.
    #[error("the event cannot be understood: {why}")]
    NotUnderstood {
        /// Why.
        why: String,
    },
    /// The bytes of its records are gone, and no tombstone fits.
    #[error("it was pruned, and there is no tombstone that fits what is left")]
    Tombstone,
    /// A commit is not there.
    #[error("it is missing")]
    CommitMissing,
    /// None of a commit's records is there.
    #[error("its records are missing")]
    CommitEmpty,
    /// A commit's records are not those that were sealed.
    #[error("its records are not those that were sealed")]
    Digest,
    /// A commit does not follow on the one before it.
    #[error("it does not fit the commit before it")]
    Link,
    /// A job has no summary.
    #[error("the job's summary is missing")]
    SummaryMissing,
    /// There is a summary of a job that was never requested.
    #[error("there is a summary without the events it is made of")]
    SummaryStray,
    /// A summary is not what the events give.
    #[error("the job's summary is not what its events give: {}", fields.join(", "))]
    SummaryDiffers {
        /// The fields that differ.
        fields: Vec<String>,
    },
    /// A job's idempotency key is not claimed.
    #[error("the job's key {key:?} is not claimed")]
    KeyMissing {
        /// The key.
        key: String,
    },
    /// A job's idempotency key is claimed by another stream.
    #[error("the job's key {key:?} is claimed by {holder}")]
    KeyElsewhere {
        /// The key.
        key: String,
        /// The other stream.
        holder: StreamId,
    },
    /// The engine cannot read its own files.
    #[error("{text}")]
    Engine {
        /// What it says.
        text: String,
    },
}

/// The names of the fields in which two summaries differ.
pub(super) fn differing(one: &JobSummary, other: &JobSummary) -> Vec<String> {
    let fields = |summary| serde_json::to_value(summary).unwrap_or_default();
    let (one, other) = (fields(one), fields(other));
    let names = one.as_object().into_iter().flat_map(|fields| fields.keys());
    names.filter(|name| one.get(name) != other.get(name)).cloned().collect()
}

//! Records and jobs to test with.

use jiff::Timestamp;
use serde_json::json;
use vmkeep_workflow::event::{Actor, Body, Event, IfBusy, JobRequest, Subject};
use vmkeep_workflow::fault::{Code, Fault};
use vmkeep_workflow::ids::{JobId, Seq, StreamId, WorkflowName};
use vmkeep_workflow::journal::{Append, AppendError, EventStore, Record, link};
use vmkeep_workflow::summary::JobSummary;

use crate::Store;

/// The record that belongs at a place of a stream.
#[must_use]
pub fn record(stream: &str, seq: u64) -> Vec<u8> {
    json!({ "stream": stream, "seq": seq }).to_string().into_bytes()
}

/// An append of so many such records, where the stream is expected to end.
#[must_use]
pub fn append(stream: &str, expected: u64, count: u64) -> Append {
    let records = (1..=count).map(|n| record(stream, expected + n)).collect();
    of(stream, expected, records)
}

/// An append of those records.
#[must_use]
pub fn of(stream: &str, expected: u64, records: Vec<Vec<u8>>) -> Append {
    let stream = StreamId::from(stream.to_owned());
    Append { stream, expected: Seq(expected), records, summary: None, key: None }
}

/// Reads a whole stream.
pub async fn read(store: &dyn EventStore, stream: &str) -> Vec<Record> {
    store.read(&StreamId::from(stream.to_owned()), Seq(1), 0).await.unwrap()
}

/// Whether a stream holds exactly the records that belong there, with a chain that fits.
pub async fn assert_holds(store: &dyn EventStore, stream: &str, count: u64) {
    let records = read(store, stream).await;
    let mut hash = [0; 32];
    for (n, found) in (1..).zip(&records) {
        assert_eq!(found.seq, Seq(n), "{stream}");
        assert_eq!(found.bytes, record(stream, n), "{stream}");
        hash = link(&hash, &found.bytes);
        assert_eq!(found.hash, hash, "{stream}, record {n}");
    }
    assert_eq!(records.len() as u64, count, "{stream}");
}

/// Fails with what is wrong with a store, if anything is.
pub async fn assert_whole(store: &dyn Store) {
    let report = crate::verify::verify(store).await.unwrap();
    let findings: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    assert!(findings.is_empty(), "{findings:#?}");
}

/// An instant, so many seconds after some other.
#[must_use]
pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

/// A job that is being written.
#[derive(Clone)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Its summary up to the last append that was made of it.
    pub summary: Option<JobSummary>,
    seq: Seq,
}

impl Job {
    /// A job that was not asked for yet.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self { id: JobId::new(), summary: None, seq: Seq(0) }
    }

    /// Its stream.
    #[must_use]
    pub fn stream(&self) -> StreamId {
        StreamId::job(self.id)
    }

    /// The append of its next events, with the summary after them.
    pub fn next(&mut self, second: i64, bodies: Vec<Body>) -> Append {
        let expected = self.seq;
        let mut records = Vec::new();
        let mut key = None;
        for body in bodies {
            if let Body::JobRequested(request) = &body {
                key.clone_from(&request.key);
            }
            let event = Event::new(at(second), std::collections::BTreeMap::new(), body);
            match &mut self.summary {
                Some(summary) => summary.apply(&event),
                None => self.summary = JobSummary::first(self.id, &event),
            }
            records.push(serde_json::to_vec(&event).unwrap());
            self.seq = self.seq.next();
        }
        Append { stream: self.stream(), expected, records, summary: self.summary.clone(), key }
    }

    /// The append of its request.
    pub fn request(&mut self, second: i64, workflow: &str, subject: &str, key: Option<&str>) -> Append {
        let request = JobRequest {
            workflow: WorkflowName::from(workflow.to_owned()),
            subject: Subject { id: subject.to_owned(), label: format!("the {subject}") },
            options: json!({ "live": true, "rate": 1.0e3, "note": "ü \" \\ \u{1f980}" }),
            key: key.map(str::to_owned),
            by: Actor { who: "admin".to_owned(), why: Some("before the upgrade".to_owned()) },
            if_busy: IfBusy::Queue,
            limits: Vec::new(),
            retry_of: None,
        };
        self.next(second, vec![Body::JobRequested(request)])
    }

    /// The append of its refusal.
    pub fn refuse(&mut self, second: i64) -> Append {
        let fault = Fault::permanent(Code::SUBJECT_BUSY, "plan", "web1", "somebody else has it");
        self.next(second, vec![Body::JobRefused(fault)])
    }
}

/// Whether an append failed because somebody else was first; where the stream ends then.
#[must_use]
pub fn conflict<T>(outcome: &Result<T, AppendError>) -> Option<Seq> {
    match outcome {
        Err(AppendError::Conflict { actual, .. }) => Some(*actual),
        _ => None,
    }
}

//! Recomputing the summaries of jobs from their events: for import, which must not trust a file, and for verification,
//! which must not trust the store.

use std::collections::HashMap;

use vmkeep_workflow::event::{Body, Event};
use vmkeep_workflow::ids::{JobId, StreamId};
use vmkeep_workflow::journal::Record;
use vmkeep_workflow::summary::JobSummary;

/// The jobs of the records seen so far. Records of a stream are to be taken in order.
#[derive(Default)]
pub(crate) struct Jobs {
    jobs: HashMap<StreamId, Job>,
}

/// A job as its events tell it.
#[derive(Default)]
pub(crate) struct Job {
    /// Its summary; none if its first event is not a request.
    pub(crate) summary: Option<JobSummary>,
    /// The idempotency key of its request.
    pub(crate) key: Option<String>,
    /// Whether one of its events could not be understood.
    pub(crate) lost: bool,
}

impl Jobs {
    /// Takes a record in. Says why if it is an event of a job that cannot be understood; the job's later events are then
    /// left out.
    pub(crate) fn take(&mut self, record: &Record) -> Result<(), String> {
        let Some(id) = record.stream.as_job() else { return Ok(()) };
        // A name is made for new streams only: most records belong to one that is known.
        if !self.jobs.contains_key(&record.stream) {
            self.jobs.insert(record.stream.clone(), Job::default());
        }
        let Some(job) = self.jobs.get_mut(&record.stream) else { return Ok(()) };
        job.take(id, record)
    }

    /// What is known of a stream's job.
    pub(crate) fn get(&self, stream: &StreamId) -> Option<&Job> {
        self.jobs.get(stream)
    }

    /// All jobs, with their streams.
    pub(crate) fn into_inner(self) -> HashMap<StreamId, Job> {
        self.jobs
    }
}

impl Job {
    /// Takes the next record of the job in.
    pub(crate) fn take(&mut self, id: JobId, record: &Record) -> Result<(), String> {
        if self.lost {
            return Ok(());
        }
        let event: Event = serde_json::from_slice(&record.bytes).map_err(|e| {
            self.lost = true;
            e.to_string()
        })?;
        if record.seq.0 == 1 {
            self.summary = JobSummary::first(id, &event);
            if let Body::JobRequested(request) = event.body {
                self.key = request.key;
            }
        } else if let Some(summary) = &mut self.summary {
            summary.apply(&event);
        }
        Ok(())
    }
}

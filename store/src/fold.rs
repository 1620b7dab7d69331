//! Recomputing the summaries of jobs from their events: for import, which must not trust a file, and for verification,
//! which must not trust the store. And choosing among summaries, for engines without an index.

use std::collections::HashMap;

use vmkeep_workflow::event::{Body, Event};
use vmkeep_workflow::ids::{JobId, StreamId};
use vmkeep_workflow::journal::{JobFilter, Record};
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

/// Those that a filter means, the newest request first.
pub(crate) fn pick(jobs: impl Iterator<Item = JobSummary>, filter: &JobFilter) -> Vec<JobSummary> {
    let wanted = |job: &JobSummary| {
        filter.subject.as_ref().is_none_or(|subject| *subject == job.subject.id)
            && filter.workflow.as_ref().is_none_or(|workflow| workflow == job.workflow.as_str())
            && (filter.status.is_empty() || filter.status.contains(&job.status))
            && filter.since.is_none_or(|since| job.requested >= since)
            && filter.until.is_none_or(|until| job.requested < until)
    };
    let mut jobs: Vec<JobSummary> = jobs.filter(wanted).collect();
    jobs.sort_by_key(|job| std::cmp::Reverse((job.requested, job.job)));
    if filter.limit > 0 {
        jobs.truncate(filter.limit);
    }
    jobs
}

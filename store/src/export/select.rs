//! Choosing a part of a journal: by job, domain, state and time.
//!
//! A job's journal is taken whole if the job was alive within the span: a job that is cut in the middle can neither be
//! replayed nor understood. Other streams go on for ever; of them the records within the span are taken, and the export
//! says that they are cut.

use jiff::Timestamp;
use serde::Deserialize;
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{JobFilter, StoreError};
use vmkeep_workflow::summary::{JobStatus, JobSummary};

use super::PAGE;
use crate::Store;

/// A stream, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The stream.
    pub stream: StreamId,
    /// Its first record that is taken.
    pub from: Seq,
    /// Its last one; nothing: up to its end.
    pub to: Option<Seq>,
}

impl Part {
    /// A whole stream.
    #[must_use]
    pub fn whole(stream: StreamId) -> Self {
        Self { stream, from: Seq(1), to: None }
    }
}

/// What is wanted. Every absent field means "any".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// This job.
    pub job: Option<JobId>,
    /// Jobs on this subject, by its id or its name at that time.
    pub subject: Option<String>,
    /// Jobs in one of these states; empty means any.
    pub status: Vec<JobStatus>,
    /// What happened at or after this instant.
    pub since: Option<Timestamp>,
    /// What happened before this instant.
    pub until: Option<Timestamp>,
}

impl Choice {
    /// Whether everything is wanted.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    fn wants(&self, job: &JobSummary) -> bool {
        self.job.is_none_or(|wanted| wanted == job.job)
            && self.subject.as_ref().is_none_or(|s| *s == job.subject.id || *s == job.subject.label)
            && (self.status.is_empty() || self.status.contains(&job.status))
            && self.until.is_none_or(|until| job.requested < until)
            && self.since.is_none_or(|since| job.ended.is_none_or(|ended| ended >= since))
    }

    fn within(&self, at: Timestamp) -> bool {
        self.since.is_none_or(|since| at >= since) && self.until.is_none_or(|until| at < until)
    }

    /// The parts of a journal that are wanted: jobs in the order in which they were asked for, then other streams by
    /// name. Those are wanted only if nothing but time is asked about.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn parts(&self, store: &dyn Store) -> Result<Vec<Part>, StoreError> {
        let jobs = store.jobs(&JobFilter::default()).await?;
        let wanted = jobs.iter().rev().filter(|job| self.wants(job));
        let mut parts: Vec<Part> = wanted.map(|job| Part::whole(StreamId::job(job.job))).collect();
        if self.job.is_some() || self.subject.is_some() || !self.status.is_empty() {
            return Ok(parts);
        }
        for stream in store.streams().await? {
            if stream.as_job().is_none()
                && let Some((from, to)) = self.span(store, &stream).await?
            {
                parts.push(Part { stream, from, to: Some(to) });
            }
        }
        Ok(parts)
    }

    /// The first and the last record of a stream within the span. A record that tells no time belongs to those around it.
    async fn span(&self, store: &dyn Store, stream: &StreamId) -> Result<Option<(Seq, Seq)>, StoreError> {
        #[derive(Deserialize)]
        struct When {
            at: Timestamp,
        }
        let (mut next, mut span) = (Seq(1), None);
        loop {
            let page = store.read(stream, next, PAGE).await?;
            let Some(last) = page.last() else { return Ok(span) };
            next = last.seq.next();
            for record in &page {
                let when: Option<When> = serde_json::from_slice(&record.bytes).ok();
                if when.is_none_or(|when| self.within(when.at)) {
                    span = Some((span.map_or(record.seq, |(first, _)| first), record.seq));
                }
            }
        }
    }
}

//! What has been added to the journals of jobs since the last look.

use std::collections::HashSet;

use jiff::{SignedDuration, Timestamp};
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{Event, EventStore, JobId, JobStatus, Seq, StreamId};

/// Clocks step; a job that was asked for so long before the last look is looked at again.
const OVERLAP: SignedDuration = SignedDuration::from_hours(1);

/// Where the journals have been read up to.
#[derive(Clone, Debug, Default)]
pub(super) struct Cursor {
    /// Jobs asked for before have been looked at.
    from: Option<Timestamp>,
    /// Those since then that have been.
    done: HashSet<JobId>,
}

impl Cursor {
    /// What jobs of these workflows that have ended since the last time tell. `known` are jobs whose tale is known from before.
    pub(super) async fn news<T>(
        &mut self,
        store: &dyn EventStore,
        workflows: &[&str],
        known: impl Fn(&str) -> bool,
        tell: fn(JobId, &mut dyn Iterator<Item = Event>) -> Vec<T>,
    ) -> Result<Vec<T>, String> {
        let (mut found, mut oldest_open) = (Vec::new(), None);
        let now = Timestamp::now();
        for workflow in workflows {
            let filter = JobFilter {
                workflow: Some((*workflow).to_owned()),
                since: self.from,
                ..JobFilter::default()
            };
            for job in store.jobs(&filter).await.map_err(|e| e.to_string())? {
                if !job.status.ended() {
                    oldest_open =
                        Some(oldest_open.map_or(job.requested, |open: Timestamp| open.min(job.requested)));
                } else if job.status != JobStatus::Refused
                    && self.done.insert(job.job)
                    && !known(&job.job.to_string())
                {
                    // A history that was pruned, or cannot be read, tells nothing any more.
                    if let Ok(records) = store.read(&StreamId::job(job.job), Seq(1), 0).await {
                        let mut events =
                            records.iter().filter_map(|record| serde_json::from_slice(&record.bytes).ok());
                        found.extend(tell(job.job, &mut events));
                    }
                }
            }
        }
        let from = oldest_open.map_or(now, |open| open.min(now));
        self.from = Some(from.saturating_sub(OVERLAP).unwrap_or(Timestamp::MIN));
        Ok(found)
    }
}

//! What the last reading of each backup found, from the journals of the jobs that read it.
//!
//! Two kinds of job read a whole backup: `verify`, and the retention that makes sure of a successor. Both leave in their
//! journals what they read and how that ended; a look at the catalogue takes over what has been added since. A reading that
//! was cut off or cancelled says nothing about the backup and changes nothing here.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use vmkeep_steps::deletion::read_again::{ReadAgain, RereadInput};
use vmkeep_steps::deletion::workflow::PRUNE;
use vmkeep_steps::manifest::BackupId;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{
    Body, Code, Event, EventStore, Fault, JobId, JobStatus, Phase, Seq, Step, StepSpec, StreamId, Verdict,
};

use crate::codes;
use crate::verify::{self, VerifyBackup};

/// Clocks step; a job that was asked for so long before the last look is looked at again.
const OVERLAP: SignedDuration = SignedDuration::from_hours(1);

/// What a reading found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The backup.
    pub backup: BackupId,
    /// The folder that was read.
    pub folder: PathBuf,
    /// When the reading ended.
    pub at: Timestamp,
    /// The job.
    pub job: String,
    /// What was wrong; absent: it is what was published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Where the journals have been read up to.
#[derive(Clone, Debug, Default)]
pub(super) struct Cursor {
    /// Jobs asked for before have been looked at.
    from: Option<Timestamp>,
    /// Those since then that have been.
    done: HashSet<JobId>,
}

impl Cursor {
    /// What readings have found since the last time. `known` are jobs whose checks are known from before.
    pub(super) async fn news(
        &mut self,
        store: &dyn EventStore,
        known: impl Fn(&str) -> bool,
    ) -> Result<Vec<Check>, String> {
        let (mut found, mut oldest_open) = (Vec::new(), None);
        let now = Timestamp::now();
        for workflow in [verify::NAME, PRUNE] {
            let filter =
                JobFilter { workflow: Some(workflow.to_owned()), since: self.from, ..JobFilter::default() };
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
                        let events =
                            records.iter().filter_map(|record| serde_json::from_slice(&record.bytes).ok());
                        found.extend(of(job.job, events));
                    }
                }
            }
        }
        let from = oldest_open.map_or(now, |open| open.min(now));
        self.from = Some(from.saturating_sub(OVERLAP).unwrap_or(Timestamp::MIN));
        found.sort_by_key(|check| check.at);
        Ok(found)
    }
}

/// What a job's events tell of the backups that it read.
fn of(job: JobId, events: impl Iterator<Item = Event>) -> Vec<Check> {
    let mut reads = HashMap::new();
    let mut found = Vec::new();
    for event in events {
        let (step, problem) = match event.body {
            Body::JobPlanned(plan) => {
                let read = |step: &StepSpec| Some((step.name.clone(), subject(step)?));
                reads = plan.steps.iter().filter_map(read).collect();
                continue;
            }
            Body::StepSucceeded { step, phase: Phase::Forward, .. }
            | Body::StepProbed { step, phase: Phase::Forward, verdict: Verdict::Done(_), .. } => (step, None),
            Body::StepFailed { step, phase: Phase::Forward, fault, .. } if about_the_backup(&fault) => {
                (step, Some(fault.cause))
            }
            _ => continue,
        };
        if let Some((backup, folder)) = reads.get(&step) {
            found.push(Check {
                backup: *backup,
                folder: folder.clone(),
                at: event.at,
                job: job.to_string(),
                problem,
            });
        }
    }
    found
}

/// Which backup a step reads, if it reads one.
fn subject(step: &StepSpec) -> Option<(BackupId, PathBuf)> {
    if step.kind == VerifyBackup::KIND {
        let options = verify::Options::deserialize(&step.input).ok()?;
        Some((BackupId(options.backup.parse().ok()?), options.folder))
    } else if step.kind == ReadAgain::KIND {
        let input = RereadInput::deserialize(&step.input).ok()?;
        Some((input.backup.backup, input.backup.folder))
    } else {
        None
    }
}

/// Whether a failure says something about the backup, and not about who read it.
fn about_the_backup(fault: &Fault) -> bool {
    const ABOUT: [Code; 3] =
        [codes::MISSING_NECESSARY_FILES, codes::CORRUPT_DISK_IMAGE_FOUND, codes::MANIFEST_MISMATCH];
    ABOUT.contains(&fault.code)
}

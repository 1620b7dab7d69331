//! What the last reading of each backup found, from the journals of the jobs that read it.
//!
//! Two kinds of job read a whole backup: `verify`, and the retention that makes sure of a successor. Both leave in their
//! journals what they read and how that ended; a look at the catalogue takes over what has been added since. A reading that
//! was cut off or cancelled says nothing about the backup and changes nothing here.

use std::collections::HashMap;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_steps::deletion::read_again::{ReadAgain, RereadInput};
use vmkeep_steps::deletion::workflow::PRUNE;
use vmkeep_steps::manifest::BackupId;
use vmkeep_workflow::{Body, Code, Event, Fault, JobId, Phase, Step, StepSpec, Verdict};

use crate::codes;
use crate::verify::{self, VerifyBackup};

/// The jobs that read backups.
pub(super) const WORKFLOWS: &[&str] = &[verify::NAME, PRUNE];

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

/// What a job's events tell of the backups that it read.
pub(super) fn of(job: JobId, events: &mut dyn Iterator<Item = Event>) -> Vec<Check> {
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

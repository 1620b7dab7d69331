//! Which unfinished job needs a backup.
//!
//! Asked of the journals, because a job that waits for its turn, for an operator or for the next vmkeepd needs its
//! backup as much as one that runs. What a job needs stands in its request: a backup's folder or its id. Every workflow
//! is judged alike, those of later releases included.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;
use vmkeep_workflow::journal::{JobFilter, Record};
use vmkeep_workflow::{Body, Event, EventStore, Fault, JobStatus, Seq, StreamId};

use super::workflow::{DELETE, PRUNE};
use crate::codes;
use crate::manifest::BackupId;

/// Knows which unfinished job needs a backup.
#[async_trait]
pub trait Users: Send + Sync {
    /// A job that needs it, in words: `restore, job 1234…`. Deletions do not count.
    ///
    /// # Errors
    /// When that cannot be found out.
    async fn of(&self, folder: &Path, backup: BackupId) -> Result<Option<String>, Fault>;
}

/// The unfinished jobs of a store.
pub struct OpenJobs(pub Arc<dyn EventStore>);

/// States of jobs that are not over.
const OPEN: [JobStatus; 5] = [
    JobStatus::Queued,
    JobStatus::Running,
    JobStatus::Paused,
    JobStatus::Unwinding,
    JobStatus::NeedsAttention,
];

#[async_trait]
impl Users for OpenJobs {
    async fn of(&self, folder: &Path, backup: BackupId) -> Result<Option<String>, Fault> {
        let cannot = |e: &dyn std::fmt::Display| {
            Fault::transient(codes::STORE_UNAVAILABLE, "see who needs the backup", backup.to_string(), e)
        };
        let filter = JobFilter { status: OPEN.to_vec(), ..JobFilter::default() };
        for job in self.0.jobs(&filter).await.map_err(|e| cannot(&e))? {
            if [DELETE, PRUNE].contains(&job.workflow.as_str()) {
                continue;
            }
            let first = self.0.read(&StreamId::job(job.job), Seq(1), 1).await.map_err(|e| cannot(&e))?;
            // A request that cannot be understood may need anything.
            let needs = match first.first().and_then(options) {
                Some(options) => mentions(&options, folder, backup),
                None => true,
            };
            if needs {
                return Ok(Some(format!("{}, job {}", job.workflow, job.job)));
            }
        }
        Ok(None)
    }
}

fn options(record: &Record) -> Option<Value> {
    match serde_json::from_slice::<Event>(&record.bytes).ok()?.body {
        Body::JobRequested(request) => Some(request.options),
        _ => None,
    }
}

/// Whether a value names the folder, something in it, or the backup.
fn mentions(value: &Value, folder: &Path, backup: BackupId) -> bool {
    match value {
        Value::String(text) => *text == backup.to_string() || Path::new(text).starts_with(folder),
        Value::Array(values) => values.iter().any(|value| mentions(value, folder, backup)),
        Value::Object(fields) => fields.values().any(|value| mentions(value, folder, backup)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_needs_a_backup_that_it_names_in_any_way() {
        let backup = BackupId(uuid::Uuid::now_v7());
        let folder = Path::new("/b/web/1");
        for yes in [
            json!({ "backup": "/b/web/1" }),
            json!({ "x": [{ "folder": "/b/web/1/" }] }),
            json!({ "image": "/b/web/1/vda.qcow2" }),
            json!({ "backup": backup }),
        ] {
            assert!(mentions(&yes, folder, backup), "{yes}");
        }
        for no in [json!({ "target": "/b/web" }), json!({ "backup": "/b/web/12" }), json!([1, null])] {
            assert!(!mentions(&no, folder, backup), "{no}");
        }
    }
}

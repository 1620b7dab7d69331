//! What becomes of older backups after a new one: `snapshot --keep N`.
//!
//! The deletion is a job of its own, which follows the backup's: a backup that is whole must not be called failed
//! because an old folder resists, and the guest's way home must not wait for it. Asked for it is by the daemon, not by
//! whoever asked for the backup. That it is neither forgotten nor asked for twice is the doing of its key, which is made of
//! the backup's job: the request may be repeated by anybody at any time, and a daemon that starts looks whether one is owed.

use std::collections::HashMap;

use serde::Deserialize;
use tokio::sync::broadcast::error::RecvError;
use vmkeep_steps::deletion::PruneOptions;
use vmkeep_steps::deletion::workflow::PRUNE;
use vmkeep_steps::manifest::BackupId;
use vmkeep_steps::workflows::snapshot;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{
    Actor, Body, Engine, Fault, IfBusy, JobId, JobRequest, JobStatus, JobSummary, WorkflowName,
};

use crate::codes;

/// How many backups of a domain, the newest first, are looked at for a retention that is owed.
const LOOK_BACK: usize = 10;

/// What of a backup's options matters here.
#[derive(Debug, Default, Deserialize)]
struct Options {
    #[serde(default)]
    keep: Option<u32>,
    #[serde(default)]
    bandwidth: u64,
}

/// The key of the retention that follows a backup.
fn key(job: JobId) -> String {
    format!("retention after {job}")
}

/// Asks for the retention that a successful backup wants; nothing if it wants none. May be repeated.
///
/// # Errors
/// When the store cannot be read, or takes no new job.
pub async fn follow_up(engine: &Engine, job: JobId) -> Result<Option<JobId>, Fault> {
    let summary = engine.summary(job).await?;
    if summary.workflow.as_str() != snapshot::NAME || summary.status != JobStatus::Succeeded {
        return Ok(None);
    }
    let Some(options) = wanted(engine, job).await? else { return Ok(None) };
    let Some(keep) = options.keep else { return Ok(None) };
    // The backup's id is that of its job.
    let successor = Some(BackupId(job.uuid()));
    let options = PruneOptions { keep, successor, bandwidth: options.bandwidth };
    let request = JobRequest {
        workflow: WorkflowName::from(PRUNE),
        subject: summary.subject,
        options: serde_json::to_value(options)
            .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "write the options down", "", e))?,
        key: Some(key(job)),
        by: Actor {
            who: summary.by.who,
            why: Some(format!("keep the last {keep}, asked for with backup job {job}")),
        },
        if_busy: IfBusy::Queue,
        limits: Vec::new(),
        retry_of: None,
    };
    engine.request(request).await.map(Some)
}

async fn wanted(engine: &Engine, job: JobId) -> Result<Option<Options>, Fault> {
    let history = engine.history(job).await?;
    Ok(match history.first().map(|(_, event)| &event.body) {
        Some(Body::JobRequested(request)) => Options::deserialize(&request.options).ok(),
        _ => None,
    })
}

/// Sees to it that every successful backup is followed by the retention that it wants. Never returns while the engine
/// lives.
pub async fn watch(engine: Engine) {
    let mut records = engine.store().subscribe();
    owed(&engine).await;
    loop {
        match records.recv().await {
            Ok(record) => {
                let Some(job) = record.stream.as_job() else { continue };
                // The type stands in the bytes as it is; what else they say is not needed.
                if record.bytes.windows(ENDED.len()).any(|window| window == ENDED) {
                    ask(&engine, job).await;
                }
            }
            Err(RecvError::Lagged(_)) => owed(&engine).await,
            Err(RecvError::Closed) => return,
        }
    }
}

const ENDED: &[u8] = b"\"job_succeeded\"";

async fn ask(engine: &Engine, job: JobId) {
    match follow_up(engine, job).await {
        Ok(Some(next)) => tracing::info!(%job, %next, "older backups are thinned out"),
        Ok(None) => {}
        Err(fault) => {
            tracing::warn!(%job, %fault, "the retention after a backup could not be asked for; the next backup's does it as well");
        }
    }
}

/// Asks for what an earlier daemon did not come to ask for.
async fn owed(engine: &Engine) {
    let filter = JobFilter {
        workflow: Some(snapshot::NAME.to_owned()),
        status: vec![JobStatus::Succeeded],
        ..JobFilter::default()
    };
    let jobs = match engine.jobs(&filter).await {
        Ok(jobs) => jobs,
        Err(fault) => {
            tracing::warn!(%fault, "whether a retention is owed could not be found out");
            return;
        }
    };
    let mut seen: HashMap<String, usize> = HashMap::new();
    for JobSummary { job, subject, .. } in jobs {
        let looked = seen.entry(subject.id).or_default();
        if *looked >= LOOK_BACK {
            continue;
        }
        *looked += 1;
        // Whatever an older backup wanted was owed before this one began.
        match engine.store().key(&key(job)).await {
            Ok(Some(_)) => *looked = LOOK_BACK,
            Ok(None) => ask(engine, job).await,
            Err(error) => tracing::warn!(%error, "whether a retention is owed could not be found out"),
        }
    }
}

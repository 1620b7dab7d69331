//! Letting the history of old jobs go: daily by the daemon, or when it is asked to.
//!
//! The store knows what may never go (jobs that have not ended, keys, everything but jobs); this host knows which jobs made
//! backups that still exist. Those stay: a backup's origin can be shown as long as there is a backup. A root that cannot be
//! read (unmounted, perhaps) leaves that open, so then nothing goes at all.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use vmkeep_store::Store;
use vmkeep_store::burial::{BurialError, Policy, bury};
use vmkeep_workflow::journal::{AppendError, JobFilter};
use vmkeep_workflow::{Actor, Fault, JobId};

use crate::api::types::{Pruned, PrunedJob};
use crate::codes;
use crate::site::Site;

/// How long after the start, and how far apart.
const FIRST: Duration = Duration::from_secs(10 * 60);
const APART: Duration = Duration::from_secs(24 * 60 * 60);

/// Lets go what the policy says, or tells what it would be.
///
/// # Errors
/// When it is not known which backups exist, or the store fails.
pub async fn prune(
    store: &dyn Store,
    site: &dyn Site,
    policy: Policy,
    by: Actor,
    dry_run: bool,
) -> Result<Pruned, Fault> {
    let origins = origins(site).await?;
    let jobs = store.jobs(&JobFilter::default()).await.map_err(|e| e.fault("let history go", ""))?;
    let now = Timestamp::now();
    let due = policy.due(&jobs, &origins, now);
    let kept = policy.due(&jobs, &HashSet::new(), now).len() - due.len();
    let mut pruned = Pruned { dry_run, kept_for_backups: kept as u64, ..Pruned::default() };
    for job in due {
        let mut row = PrunedJob {
            job: job.job.to_string(),
            workflow: job.workflow.to_string(),
            subject: job.subject.label.clone(),
            status: job.status,
            ended: job.ended,
            events: job.seq.0,
            hash: None,
        };
        if !dry_run {
            match bury(store, job.job, by.clone(), now).await {
                Ok(tombstone) => row.hash = Some(tombstone.hash),
                Err(BurialError::Append(error @ (AppendError::Fatal(_) | AppendError::Unknown(_)))) => {
                    return Err(Fault::permanent(error.code(), "let history go", row.job, error));
                }
                // One job's trouble is no reason to keep the others.
                Err(error) => {
                    tracing::warn!(job = row.job, %error, "the history of a job could not be let go");
                    pruned.failed.push(format!("{}: {error}", row.job));
                    continue;
                }
            }
        }
        pruned.events += row.events;
        pruned.jobs.push(row);
    }
    Ok(pruned)
}

/// The jobs that made the backups that exist.
async fn origins(site: &dyn Site) -> Result<HashSet<JobId>, Fault> {
    let found = site.backups().await?;
    if found.partial {
        let warning = found.warnings.join("; ");
        let object = "the histories of old jobs";
        return Err(Fault::permanent(
            codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST,
            "let go",
            object,
            format!("not all backups can be seen, and the jobs that made them must stay: {warning}"),
        )
        .remedy("Mount the folder or mend the backup, then ask again"));
    }
    // One that is missing may lie on a disk that comes back.
    let all = found.backups.iter().chain(found.missing.iter().map(|missing| &missing.backup));
    Ok(all.filter_map(|backup| backup.job.as_ref()?.parse().ok()).collect())
}

/// Prunes daily. Ends with the task that it runs in.
pub(crate) async fn daily(store: Arc<dyn Store>, site: Arc<dyn Site>, policy: Policy) {
    if policy.keeps_everything() {
        return;
    }
    let mut next = FIRST;
    loop {
        tokio::time::sleep(next).await;
        next = APART;
        let by =
            Actor { who: "vmkeepd".to_owned(), why: Some("history.keep_days, history.keep_jobs".to_owned()) };
        match prune(&*store, &*site, policy, by, false).await {
            Ok(pruned) if pruned.jobs.is_empty() => {}
            Ok(pruned) => {
                tracing::info!(
                    jobs = pruned.jobs.len(),
                    events = pruned.events,
                    "histories of old jobs were let go"
                )
            }
            Err(fault) => tracing::warn!(%fault, "histories of old jobs were not let go"),
        }
    }
}

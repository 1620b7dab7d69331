//! Commands that make jobs, and what they are about.

use std::collections::BTreeMap;

use vmkeep_workflow::Fault;

use super::args::{Restore, Snapshot, Waiting};
use super::{Ended, Out, show, wait};
use crate::api::types::{Accepted, BackupDetail, RestoreRequest, SnapshotRequest, StartAs};
use crate::client::{Client, segment};
use crate::codes;

pub(super) async fn snapshot(client: &Client, out: &Out, args: Snapshot) -> Ended {
    let request = SnapshotRequest {
        domain: args.domain,
        memory: !args.disk_only,
        to: args.to.as_deref().map(whole).transpose()?,
        disks: args.disks,
        memory_limit: args.memory_limit,
        memory_time_ms: args.memory_time.map(|span| u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
        on_busy_memory: args.on_busy_memory,
        bandwidth: args.bandwidth,
        merge_bandwidth: args.merge_bandwidth,
        wait_limit_ms: (!args.wait_before.is_empty())
            .then(|| u64::try_from(args.wait_limit.as_millis()).unwrap_or(u64::MAX)),
        wait_before: args.wait_before,
        quiesce: match (args.quiesce, args.no_quiesce) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        },
        queue: args.queue,
        reason: args.waiting.reason.clone(),
        dry_run: args.waiting.dry_run,
    };
    let key = args.waiting.key.as_deref();
    let accepted = client.post("/v1/snapshot", &request, key).await?;
    go_on(client, out, &args.waiting, accepted).await
}

pub(super) async fn restore(client: &Client, out: &Out, args: Restore) -> Ended {
    let mut disks = BTreeMap::new();
    for (disk, path) in args.disks {
        if disks.insert(disk.clone(), whole(&path)?).is_some() {
            return Err(Fault::permanent(codes::USAGE, "read --disk", disk, "it is given twice"));
        }
    }
    let request = RestoreRequest {
        backup: folder_or_id(args.backup)?,
        name: args.name,
        disks,
        folder: args.folder.as_deref().map(whole).transpose()?,
        cold: args.cold,
        start: match (args.start, args.paused) {
            (true, _) => StartAs::Running,
            (_, true) => StartAs::Paused,
            _ => StartAs::Default,
        },
        connect: args.connect,
        bandwidth: args.bandwidth,
        reason: args.waiting.reason.clone(),
        dry_run: args.waiting.dry_run,
    };
    let key = args.waiting.key.as_deref();
    let accepted = client.post("/v1/restore", &request, key).await?;
    go_on(client, out, &args.waiting, accepted).await
}

pub(super) async fn verify(client: &Client, out: &Out, backup: &str, waiting: &Waiting) -> Ended {
    let body = serde_json::json!({
        "backup": folder_or_id(backup.to_owned())?,
        "reason": waiting.reason,
        "dry_run": waiting.dry_run,
    });
    let accepted = client.post("/v1/backups/verify", &body, waiting.key.as_deref()).await?;
    go_on(client, out, waiting, accepted).await
}

pub(super) async fn show_backup(client: &Client, out: &Out, backup: &str) -> Result<(), Fault> {
    let backup = folder_or_id(backup.to_owned())?;
    let detail: BackupDetail = client.get(&format!("/v1/backups/show?backup={}", segment(&backup))).await?;
    out.show(&detail, show::backup)
}

async fn go_on(client: &Client, out: &Out, waiting: &Waiting, accepted: Accepted) -> Ended {
    match accepted {
        Accepted::Plan(plan) => {
            out.show(&plan, |plan| show::plan(plan))?;
            Ok(0)
        }
        Accepted::Job(job) if waiting.no_wait => {
            out.show(&job, |job| {
                format!("job {} was started; follow it: vmkeep job watch {}", job.short, job.short)
            })?;
            Ok(0)
        }
        Accepted::Job(job) => wait::follow(client, out, &job.id.to_string(), &job.short).await,
    }
}

/// The daemon has another working folder than whoever types.
fn whole(path: &std::path::Path) -> Result<std::path::PathBuf, Fault> {
    std::path::absolute(path)
        .map_err(|e| Fault::permanent(codes::USAGE, "understand the path", path.display().to_string(), e))
}

/// Something with a slash is a folder, everything else an id.
fn folder_or_id(backup: String) -> Result<String, Fault> {
    if !backup.contains('/') && backup != "." && backup != ".." {
        return Ok(backup);
    }
    let path = whole(backup.as_ref())?;
    path.into_os_string().into_string().map_err(|path| {
        Fault::permanent(codes::USAGE, "understand the path", path.to_string_lossy(), "it is not valid UTF-8")
    })
}

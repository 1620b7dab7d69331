//! Commands that make jobs, and what they are about.

use std::collections::BTreeMap;

use vmkeep_workflow::Fault;

use super::args::{Restore, Snapshot, Waiting};
use super::{Ended, Out, kept, show, wait};
use crate::api::types::{
    Accepted, BackupDetail, DiscardRequest, InPlaceRequest, KeptRow, RestRequest, RestoreRequest,
    SnapshotRequest, StartAs, UndoRequest,
};
use crate::client::{Client, segment};
use crate::codes;

pub(super) async fn snapshot(client: &Client, out: &Out, args: Snapshot) -> Ended {
    let request = SnapshotRequest {
        domain: args.domain,
        memory: !args.disk_only && !args.save,
        save: args.save,
        ram_disk: args.ram_disk,
        without_state: args.without_state,
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
        keep: args.keep,
        queue: args.queue,
        reason: args.waiting.reason.clone(),
        dry_run: args.waiting.dry_run,
    };
    let key = args.waiting.key.as_deref();
    let accepted = client.post("/v1/snapshot", &request, key).await?;
    let job = match accepted {
        Accepted::Job(job) if !args.waiting.no_wait => job,
        other => return go_on(client, out, &args.waiting, other).await,
    };
    let Some(detail) = wait::to_its_end(client, out, &job.id.to_string(), &job.short).await? else {
        return Ok(super::INTERRUPTED);
    };
    out.show(&detail, show::ending)?;
    match wait::ending_status(&detail) {
        0 => super::backups::follow_up(client, out, &detail).await,
        status => Ok(status),
    }
}

pub(super) async fn restore(client: &Client, out: &Out, args: Restore) -> Ended {
    let (path, body) = order(&args)?;
    let accepted = client.post(path, &body, args.waiting.key.as_deref()).await?;
    go_on(client, out, &args.waiting, accepted).await
}

/// Which call a restore is, and what is asked.
fn order(args: &Restore) -> Result<(&'static str, serde_json::Value), Fault> {
    let (reason, dry_run) = (args.waiting.reason.clone(), args.waiting.dry_run);
    let start = match (args.start, args.paused) {
        (true, _) => StartAs::Running,
        (_, true) => StartAs::Paused,
        _ => StartAs::Default,
    };
    let rest = RestRequest {
        save_old: args.save_old,
        destroy: args.destroy,
        shutdown_ms: args.shutdown_time.map(|span| u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
    };
    let backup = match (&args.vault, args.backup.clone()) {
        (Some(_), id) => id.unwrap_or_default(),
        (None, backup) => backup.map(folder_or_id).transpose()?.unwrap_or_default(),
    };
    let from = args.from.as_deref().map(whole).transpose()?;
    let folder = args.folder.as_deref().map(whole).transpose()?;
    if let Some(job) = args.undo.clone() {
        let request = UndoRequest { job, cold: args.cold, rest, start, reason, dry_run };
        return Ok(("/v1/restore/undo", body(&request)?));
    }
    if let Some(job) = args.discard.clone() {
        return Ok(("/v1/restore/discard", body(&DiscardRequest { job, reason, dry_run })?));
    }
    if args.in_place {
        if let Some(vault) = &args.vault {
            return Err(not_in_place(vault, &backup));
        }
        let request = InPlaceRequest {
            backup,
            from,
            trust_definition: args.trust_definition,
            disks: args.disks.clone(),
            folder,
            cold: args.cold,
            definition: args.definition,
            rest,
            start,
            bandwidth: args.bandwidth,
            reason,
            dry_run,
        };
        return Ok(("/v1/restore/in-place", body(&request)?));
    }
    let mut disks = BTreeMap::new();
    for (disk, path) in &args.places {
        if disks.insert(disk.clone(), whole(path)?).is_some() {
            return Err(Fault::permanent(codes::USAGE, "read --disk", disk, "it is given twice"));
        }
    }
    let request = RestoreRequest {
        backup,
        from,
        vault: args.vault.clone(),
        unchecked: args.unchecked,
        format: args.format,
        trust_definition: args.trust_definition,
        name: args.name.clone().unwrap_or_default(),
        disks,
        folder,
        cold: args.cold,
        start,
        connect: args.connect,
        autostart: args.autostart,
        bandwidth: args.bandwidth,
        reason,
        dry_run,
    };
    Ok(("/v1/restore", body(&request)?))
}

/// A machine is only exchanged for one whose files are there.
fn not_in_place(vault: &str, backup: &str) -> Fault {
    let cause = "a backup in a vault comes back as a new domain, or as files; not in place";
    Fault::permanent(codes::USAGE, "restore in place from a vault", backup, cause).remedy(format!(
        "`vmkeep restore {backup} --vault {vault} --as NAME`; or `vmkeep vault export {vault} {backup} --to FOLDER`, and put \
         the images into the place of the old ones while the domain is shut off"
    ))
}

fn body<T: serde::Serialize>(request: &T) -> Result<serde_json::Value, Fault> {
    serde_json::to_value(request)
        .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "write the request down", "", e))
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
    let detail: Result<BackupDetail, Fault> =
        client.get(&format!("/v1/backups/show?backup={}", segment(&backup))).await;
    match detail {
        Err(fault) if fault.code == codes::NO_SUCH_BACKUP => {
            let all: Vec<KeptRow> = client.get("/v1/kept").await?;
            let meant = |row: &&KeptRow| {
                let short = row.job.rsplit('-').next().unwrap_or_default();
                row.job.starts_with(&backup) || short.starts_with(&backup)
            };
            let mut found = all.iter().filter(meant);
            match (found.next(), found.next()) {
                (Some(row), None) => out.show(row, kept::one),
                _ => Err(fault),
            }
        }
        detail => out.show(&detail?, show::backup),
    }
}

pub(super) async fn go_on(client: &Client, out: &Out, waiting: &Waiting, accepted: Accepted) -> Ended {
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

/// The daemon has another working folder than whoever types; and a place may be named as `file:///srv`.
pub(super) fn whole(path: &std::path::Path) -> Result<std::path::PathBuf, Fault> {
    let path = &crate::location::path(path)?;
    std::path::absolute(path)
        .map_err(|e| Fault::permanent(codes::USAGE, "understand the path", path.display().to_string(), e))
}

/// Something with a slash is a folder, everything else an id.
pub(super) fn folder_or_id(backup: String) -> Result<String, Fault> {
    if !backup.contains('/') && backup != "." && backup != ".." {
        return Ok(backup);
    }
    let path = whole(backup.as_ref())?;
    path.into_os_string().into_string().map_err(|path| {
        Fault::permanent(codes::USAGE, "understand the path", path.to_string_lossy(), "it is not valid UTF-8")
    })
}

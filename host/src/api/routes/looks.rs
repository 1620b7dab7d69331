//! Looking: status, domains, backups, doctor. None of these changes anything.

use std::collections::HashMap;

use axum::extract::State as Extract;
use serde::Deserialize;
use vmkeep_workflow::JobStatus;
use vmkeep_workflow::journal::Reserve;

use super::State;
use crate::api::answer::{Answer, Json, Query};
use crate::api::prefix::Shorts;
use crate::api::types::{
    BackupDetail, BackupRow, Backups, DaemonStatus, DomainRow, ErrorBody, Finding, JobRow, LastBackup, Status,
};

/// Missing backups that a warning names.
const SHOWN: usize = 3;

pub(super) async fn status(Extract(app): State) -> Answer<Status> {
    let mut warnings = Vec::new();
    let jobs = app.all_jobs().await?;
    let ids: Vec<_> = jobs.iter().map(|job| job.job).collect();
    let shorts = Shorts::of(&ids);
    let row = |job: &vmkeep_workflow::JobSummary| JobRow::new(job, shorts.short(&job.job));
    let open = jobs.iter().filter(|job| !job.status.ended());
    let (attention, running): (Vec<_>, Vec<_>) =
        open.partition(|job| job.status == JobStatus::NeedsAttention);

    let libvirt = app.site.libvirt().await;
    let domains = if libvirt.reachable {
        match with_backups_and_jobs(&app).await {
            Ok((domains, more)) => {
                warnings.extend(more);
                domains
            }
            Err(fault) => {
                warnings.push(fault.to_string());
                Vec::new()
            }
        }
    } else {
        Vec::new()
    };
    let kept = match app.site.kept().await {
        Ok((kept, more)) => {
            warnings.extend(more);
            kept
        }
        Err(fault) => {
            warnings.push(fault.to_string());
            Vec::new()
        }
    };
    let reserve_spent = match app.store.reserve().await {
        Ok(reserve) => reserve == Reserve::Spent,
        Err(error) => {
            warnings.push(format!("the store: {error}"));
            false
        }
    };
    if reserve_spent {
        warnings.push(format!(
            "the file system of {} is full: running jobs go on, no new one starts",
            app.config.state_dir.display()
        ));
    }
    Ok(Json(Status {
        daemon: DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started: app.started,
            phase: *app.phase.borrow(),
            store: app.store.id().to_string(),
            reserve_spent,
            state_dir: app.config.state_dir.clone(),
        },
        libvirt,
        domains,
        running: running.into_iter().map(row).collect(),
        attention: attention.into_iter().map(row).collect(),
        kept,
        warnings,
    }))
}

pub(super) async fn domains(Extract(app): State) -> Answer<Vec<DomainRow>> {
    Ok(Json(with_backups_and_jobs(&app).await?.0))
}

async fn with_backups_and_jobs(
    app: &super::App,
) -> Result<(Vec<DomainRow>, Vec<String>), vmkeep_workflow::Fault> {
    let mut domains = app.site.domains().await?;
    let (backups, mut warnings) = match app.site.backups().await {
        Ok(found) => {
            let mut warnings = found.warnings;
            if !found.missing.is_empty() {
                let shown: Vec<_> = found.missing.iter().take(SHOWN).map(|one| &one.backup).collect();
                let shown: Vec<_> =
                    shown.iter().map(|one| format!("{} of {}", one.short, one.domain)).collect();
                let more = if found.missing.len() > SHOWN { ", …" } else { "" };
                warnings.push(format!(
                    "{} backups are missing ({}{more}): vmkeep list",
                    found.missing.len(),
                    shown.join(", ")
                ));
            }
            (found.backups, warnings)
        }
        Err(fault) => (Vec::new(), vec![fault.to_string()]),
    };
    let mut last: HashMap<String, LastBackup> = HashMap::new();
    for backup in backups {
        let verified = backup.verified.as_ref();
        if let Some((at, problem)) = verified.and_then(|found| Some((found.at, found.problem.as_ref()?))) {
            warnings.push(format!(
                "backup {} of {}: verification failed at {at}: {problem}",
                backup.short, backup.domain
            ));
            // It is not what anybody should count on.
            continue;
        }
        let newer = last.get(&backup.domain_uuid).is_none_or(|known| known.at < backup.at);
        if newer {
            last.insert(backup.domain_uuid, LastBackup { id: backup.short, at: backup.at });
        }
    }
    let (in_vaults, more) = app.site.in_vaults().await;
    add_new(&mut warnings, more);
    let shorts = Shorts::of(&app.all_ids().await?);
    for domain in &mut domains {
        domain.last_backup = last.remove(&domain.uuid);
        domain.in_vaults = in_vaults.iter().filter(|one| one.domain_uuid == domain.uuid).cloned().collect();
        domain.job = app.engine.holder(&domain.uuid).map(|job| shorts.short(&job));
        if let Some(why) = app.engine.closed(&domain.uuid) {
            warnings.push(format!("{}: {}. {}", domain.name, why.cause, why.remedy));
            domain.obstacle = Some(ErrorBody::from(&why));
        }
    }
    Ok((domains, warnings))
}

pub(super) async fn doctor(Extract(app): State) -> Answer<Vec<Finding>> {
    Ok(Json(app.site.doctor().await))
}

/// Both looks at the catalogue may have been in the way of the same.
fn add_new(warnings: &mut Vec<String>, more: Vec<String>) {
    let new: Vec<_> = more.into_iter().filter(|one| !warnings.contains(one)).collect();
    warnings.extend(new);
}

/// Which backups.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OfDomain {
    domain: Option<String>,
}

pub(super) async fn backups(Extract(app): State, Query(which): Query<OfDomain>) -> Answer<Backups> {
    let mut found = app.site.backups().await?;
    let (in_vaults, more) = app.site.in_vaults().await;
    found.in_vaults = in_vaults;
    add_new(&mut found.warnings, more);
    if let Some(domain) = which.domain {
        let of = |backup: &BackupRow| backup.domain == domain || backup.domain_uuid == domain;
        found.backups.retain(of);
        found.missing.retain(|missing| of(&missing.backup));
        found.in_vaults.retain(|one| one.domain == domain || one.domain_uuid == domain);
    }
    Ok(Json(found))
}

/// One backup: an id, the beginning of one, or a folder. In the query, since a folder has slashes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OneBackup {
    backup: String,
}

pub(super) async fn backup(Extract(app): State, Query(which): Query<OneBackup>) -> Answer<BackupDetail> {
    Ok(Json(app.site.backup(&which.backup).await?))
}

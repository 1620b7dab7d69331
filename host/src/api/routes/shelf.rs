//! The catalogue, and what removes or protects backups.

use axum::extract::{Path, State as Extract};
use axum::http::HeaderMap;
use vmkeep_workflow::Fault;

use super::changes::{Asked, one};
use super::{State, key};
use crate::api::answer::{Answer, Json};
use crate::api::types::{
    Accepted, BackupRow, DeleteRequest, ForgetRequest, HistoryRow, JobRow, ProtectRequest, PruneRequest,
    RebuildRequest, Rebuilt, RepairRequest,
};
use crate::site::Order;

pub(super) async fn delete(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<DeleteRequest>,
) -> Answer<Vec<Accepted>> {
    app.ready("delete backups", &request.backups.join(", "))?;
    let orders = app.site.delete(&request).await?;
    all(&app, orders, request.reason, request.dry_run, key(&headers)?).await
}

pub(super) async fn prune(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<PruneRequest>,
) -> Answer<Vec<Accepted>> {
    app.ready("thin the backups out", request.domain.as_deref().unwrap_or("all domains"))?;
    let orders = app.site.prune(&request).await?;
    all(&app, orders, request.reason, request.dry_run, key(&headers)?).await
}

pub(super) async fn repair(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<RepairRequest>,
) -> Answer<Vec<Accepted>> {
    app.ready("take away what jobs have left", "")?;
    let orders = app.site.repair().await?;
    all(&app, orders, request.reason, request.dry_run, key(&headers)?).await
}

/// Several orders: if one of them would be refused, none is carried out.
async fn all(
    app: &std::sync::Arc<super::App>,
    orders: Vec<Order>,
    reason: Option<String>,
    dry_run: bool,
    key: Option<String>,
) -> Answer<Vec<Accepted>> {
    let mut asked = Asked { reason, dry_run: true, queue: false };
    let mut plans = Vec::new();
    // A repeated request may find its own first one under way, or done: its key finds the jobs.
    if dry_run || key.is_none() {
        for order in &orders {
            plans.push(one(app, order.clone(), &asked, None).await?);
        }
    }
    if dry_run {
        return Ok(Json(plans));
    }
    asked.dry_run = false;
    let mut jobs = Vec::new();
    for order in orders {
        let key = key.as_ref().map(|key| format!("{key} {}", order.subject.id));
        jobs.push(one(app, order, &asked, key).await?);
    }
    Ok(Json(jobs))
}

pub(super) async fn protect(Extract(app): State, Json(request): Json<ProtectRequest>) -> Answer<BackupRow> {
    Ok(Json(app.site.protect(&request, true, app.actor(request.reason.clone())).await?))
}

pub(super) async fn unprotect(Extract(app): State, Json(request): Json<ProtectRequest>) -> Answer<BackupRow> {
    Ok(Json(app.site.protect(&request, false, app.actor(request.reason.clone())).await?))
}

pub(super) async fn rebuild(Extract(app): State, Json(request): Json<RebuildRequest>) -> Answer<Rebuilt> {
    Ok(Json(app.site.rebuild(&request, app.actor(request.reason.clone())).await?))
}

pub(super) async fn forget(Extract(app): State, Json(request): Json<ForgetRequest>) -> Answer<()> {
    Ok(Json(app.site.forget(&request, app.actor(request.reason.clone())).await?))
}

pub(super) async fn history(Extract(app): State) -> Answer<Vec<HistoryRow>> {
    let records = app.site.catalogue().await?;
    Ok(Json(records.iter().map(super::jobs::history_row).collect()))
}

pub(super) async fn guests(Extract(app): State) -> Answer<Vec<HistoryRow>> {
    let records = crate::guests::history(&**app.engine.store()).await?;
    Ok(Json(records.iter().map(super::jobs::history_row).collect()))
}

/// The job that follows a successful backup, if it wants one: asked for if that has not been done.
pub(super) async fn follow_up(Extract(app): State, Path(job): Path<String>) -> Answer<Option<JobRow>> {
    let job = app.find_job(&job).await?;
    let engine = app.engine.clone();
    let next = tokio::spawn(async move { crate::retention::follow_up(&engine, job).await }).await.map_err(
        |e| Fault::permanent(crate::codes::UNDEFINED_ERROR, "follow the job up", job.to_string(), e),
    )??;
    Ok(Json(match next {
        Some(next) => Some(app.row(next).await?),
        None => None,
    }))
}

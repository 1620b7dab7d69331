//! Changes: jobs asked for, and operators' acts on jobs.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State as Extract};
use axum::http::HeaderMap;
use jiff::Timestamp;
use serde::Deserialize;
use vmkeep_workflow::{Code, Fault, IfBusy, JobId, JobRequest, JobStatus, Settle};

use super::{App, State, key};
use crate::api::answer::{Answer, Failure, Json};
use crate::api::types::{Accepted, Act, Acted, BackupRequest, RestoreRequest, SnapshotRequest};
use crate::site::Order;
use crate::text::safe;

pub(super) async fn snapshot(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<SnapshotRequest>,
) -> Answer<Accepted> {
    app.ready("back the domain up", &request.domain)?;
    let order = app.site.snapshot(&request).await?;
    let asked = Asked { reason: request.reason, dry_run: request.dry_run, queue: request.queue };
    place(&app, order, asked, key(&headers)?).await
}

pub(super) async fn back_up(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<BackupRequest>,
) -> Answer<Accepted> {
    app.ready("back the domain up", &request.domain)?;
    let order = app.site.back_up(&request).await?;
    let asked = Asked { reason: request.reason, dry_run: request.dry_run, queue: request.queue };
    place(&app, order, asked, key(&headers)?).await
}

pub(super) async fn restore(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<RestoreRequest>,
) -> Answer<Accepted> {
    app.ready("restore the backup", &request.backup)?;
    let key = key(&headers)?;
    let order = app.site.restore(&request, key.as_deref()).await?;
    let asked = Asked { reason: request.reason, dry_run: request.dry_run, queue: false };
    place(&app, order, asked, key).await
}

/// Asks to read a backup again.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Verify {
    backup: String,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    dry_run: bool,
}

pub(super) async fn verify(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<Verify>,
) -> Answer<Accepted> {
    app.ready("verify the backup", &request.backup)?;
    let order = app.site.verify(&request.backup).await?;
    let asked = Asked { reason: request.reason, dry_run: request.dry_run, queue: true };
    place(&app, order, asked, key(&headers)?).await
}

pub(super) struct Asked {
    pub(super) reason: Option<String>,
    pub(super) dry_run: bool,
    pub(super) queue: bool,
}

pub(super) async fn place(
    app: &Arc<App>,
    order: Order,
    asked: Asked,
    key: Option<String>,
) -> Answer<Accepted> {
    Ok(Json(one(app, order, &asked, key).await?))
}

/// One order carried out, or its plan.
pub(super) async fn one(
    app: &Arc<App>,
    order: Order,
    asked: &Asked,
    key: Option<String>,
) -> Result<Accepted, Failure> {
    let request = JobRequest {
        workflow: order.workflow,
        subject: order.subject,
        options: order.options,
        key,
        by: app.actor(asked.reason.clone()),
        if_busy: if asked.queue { IfBusy::Queue } else { IfBusy::Refuse },
        limits: order.limits,
        retry_of: None,
    };
    if asked.dry_run {
        return Ok(Accepted::Plan(Box::new(app.engine.dry_run(request).await?)));
    }
    app.site.before_job(&app.engine).await;
    // Detached from the connection: a client that goes away must not cut an admission in half.
    let engine = app.engine.clone();
    let job = tokio::spawn(async move { engine.request(request).await }).await.map_err(|e| gone(&e))??;
    Ok(Accepted::Job(Box::new(app.row(job).await?)))
}

pub(super) fn gone(error: &tokio::task::JoinError) -> Fault {
    Fault::permanent(Code::UNDEFINED, "carry out the request", "", error)
        .remedy("This is a fault in vmkeep itself; the log tells more. Please report it")
}

pub(super) async fn cancel(
    Extract(app): State,
    Path(job): Path<String>,
    Json(act): Json<Act>,
) -> Answer<Acted> {
    let (job, row) = begin(&app, &job, "cancel the job").await?;
    let detail = app.detail(job).await?;
    let passed = detail
        .point_of_no_return
        .as_deref()
        .is_some_and(|name| detail.steps.iter().any(|step| step.name == name && step.attempts > 0));
    let what = if passed {
        "it is past its point of no return and goes on to its end"
    } else if row == JobStatus::Queued {
        "it has not begun; nothing has to be taken back"
    } else {
        "it stops at the next place where it can, and takes back what it did"
    };
    if !act.dry_run {
        app.engine.cancel(job, app.actor(act.reason)).await?;
    }
    acted(&app, job, act.dry_run, "cancel", what).await
}

pub(super) async fn pause(
    Extract(app): State,
    Path(job): Path<String>,
    Json(act): Json<Act>,
) -> Answer<Acted> {
    let (job, _) = begin(&app, &job, "pause the job").await?;
    let span = Duration::from_millis(act.pause_ms.unwrap_or(3_600_000));
    let until = Timestamp::now()
        .checked_add(span)
        .map_err(|e| crate::api::answer::misused("pause_ms", &e.to_string()))?;
    if !act.dry_run {
        app.engine.pause(job, app.actor(act.reason), until).await?;
    }
    let what = match crate::explain::pause_waits(&app.detail(job).await?.safe_after) {
        Some(why) => format!(
            "it goes on for now and pauses later: {why}. A pause ends {} after it was asked for, whether it has taken \
             effect by then or not",
            crate::text::span(span)
        ),
        None => format!("it begins nothing new from now on, for {} at most", crate::text::span(span)),
    };
    acted(&app, job, act.dry_run, "pause", &what).await
}

pub(super) async fn resume(
    Extract(app): State,
    Path(job): Path<String>,
    Json(act): Json<Act>,
) -> Answer<Acted> {
    let (job, _) = begin(&app, &job, "resume the job").await?;
    if !act.dry_run {
        app.engine.resume(job, app.actor(act.reason)).await?;
    }
    acted(&app, job, act.dry_run, "resume", "it goes on").await
}

/// A word that a step waits for. One that nobody waits for yet is kept until somebody does; one that this job never
/// waits for is refused, because it is a misspelt one.
pub(super) async fn signal(
    Extract(app): State,
    Path(job): Path<String>,
    Json(act): Json<Act>,
) -> Answer<Acted> {
    let (job, _) = begin(&app, &job, "send the signal").await?;
    let name = act.signal.unwrap_or_default();
    let plan = app.engine.view(job).await?.plan;
    let known: Vec<String> = plan
        .iter()
        .flat_map(|plan| &plan.steps)
        .filter_map(|s| Some(s.signal.as_ref()?.name.clone()))
        .collect();
    if !known.contains(&name) {
        let cause = if known.is_empty() {
            "it waits for no signal".to_owned()
        } else {
            format!("it waits for no such signal, but for {}", known.join(" and "))
        };
        return Err(Fault::permanent(Code::INVALID_STATE, "send the signal", safe(&name), cause)
            .remedy("`vmkeep job show` tells what it waits for")
            .into());
    }
    if !act.dry_run {
        app.engine.signal(job, name.clone(), serde_json::Value::Bool(true), app.actor(act.reason)).await?;
    }
    acted(
        &app,
        job,
        act.dry_run,
        "signal",
        &format!("it goes on with \"{}\" when it gets there", safe(&name)),
    )
    .await
}

pub(super) async fn settle(
    Extract(app): State,
    Path(job): Path<String>,
    Json(act): Json<Act>,
) -> Answer<Acted> {
    let (job, _) = begin(&app, &job, "settle the job").await?;
    let how = act.settle.unwrap_or(Settle::Probe);
    if !act.dry_run {
        app.engine.settle(job, app.actor(act.reason), how).await?;
    }
    let what = match how {
        Settle::Probe => "it looks at the world again and goes on from what is there",
        Settle::Retry => "it looks at the world again and repeats what failed",
        Settle::Undo => "it looks at the world again and takes back what can be taken back",
    };
    acted(&app, job, act.dry_run, "settle", what).await
}

pub(super) async fn abandon(
    Extract(app): State,
    Path(job): Path<String>,
    Json(act): Json<Act>,
) -> Answer<Acted> {
    let (job, _) = begin(&app, &job, "abandon the job").await?;
    let detail = app.detail(job).await?;
    let left: Vec<String> = detail
        .job
        .needs
        .iter()
        .map(|item| {
            format!("\n  {}: {} ({})", safe(&item.step), safe(&item.fault.object), safe(&item.fault.cause))
        })
        .collect();
    if !act.dry_run {
        app.engine.abandon(job, app.actor(act.reason)).await?;
    }
    let what = if left.is_empty() {
        "nothing is known to be left behind".to_owned()
    } else {
        format!("it is over, its domain is free, and this is left behind:{}", left.concat())
    };
    acted(&app, job, act.dry_run, "abandon", &what).await
}

async fn begin(app: &App, job: &str, doing: &str) -> Result<(JobId, JobStatus), Failure> {
    app.ready(doing, job)?;
    let job = app.find_job(job).await?;
    let status = app.engine.summary(job).await?.status;
    if status.ended() {
        let fault = Fault::permanent(Code::INVALID_STATE, doing, job.to_string(), "it has ended");
        return Err(fault.remedy(format!("`vmkeep job explain {job}` tells how")).into());
    }
    Ok((job, status))
}

async fn acted(app: &App, job: JobId, dry_run: bool, verb: &str, what: &str) -> Answer<Acted> {
    let job = app.row(job).await?;
    let message = if dry_run {
        format!("job {} was not touched. With `{verb}`: {what}", job.short)
    } else {
        format!("job {}: {what}", job.short)
    };
    Ok(Json(Acted { message, job }))
}

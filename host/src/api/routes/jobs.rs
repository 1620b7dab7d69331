//! Jobs: lists, details, histories.

use axum::extract::{Path, State as Extract};
use jiff::Timestamp;
use serde::Deserialize;
use vmkeep_workflow::journal::{JobFilter, Record};
use vmkeep_workflow::plan::Plan;
use vmkeep_workflow::{Code, Fault, JobId, JobStatus, Seq, StreamId};

use super::State;
use crate::api::answer::{Answer, Json, Query};
use crate::api::prefix::Shorts;
use crate::api::types::{Explanation, HistoryRow, JobDetail, JobRow};

/// Which jobs.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// Name or UUID of the domain, as it was when the job was asked for.
    domain: Option<String>,
    workflow: Option<String>,
    /// States, separated by commas.
    status: Option<String>,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    #[serde(default)]
    limit: usize,
}

pub(super) async fn list(Extract(app): State, Query(which): Query<Which>) -> Answer<Vec<JobRow>> {
    let status = which.status.as_deref().map(statuses).transpose()?.unwrap_or_default();
    let filter = JobFilter {
        workflow: which.workflow,
        status,
        since: which.since,
        until: which.until,
        ..JobFilter::default()
    };
    let all = app.all_ids().await?;
    let mut jobs = app.engine.jobs(&filter).await?;
    if let Some(domain) = &which.domain {
        // A name may have belonged to several domains over time: all of their jobs are meant.
        jobs.retain(|job| job.subject.label == *domain || job.subject.id == *domain);
    }
    if which.limit > 0 {
        jobs.truncate(which.limit);
    }
    let shorts = Shorts::of(&all);
    Ok(Json(jobs.iter().map(|job| JobRow::new(job, shorts.short(&job.job))).collect()))
}

pub(super) fn statuses(text: &str) -> Result<Vec<JobStatus>, crate::api::answer::Failure> {
    text.split(',')
        .map(|word| {
            serde_json::from_value(serde_json::Value::String(word.to_owned()))
                .map_err(|e| crate::api::answer::misused("query", &e.to_string()))
        })
        .collect()
}

pub(super) async fn show(Extract(app): State, Path(job): Path<String>) -> Answer<JobDetail> {
    let job = app.find_job(&job).await?;
    Ok(Json(app.detail(job).await?))
}

pub(super) async fn plan(Extract(app): State, Path(job): Path<String>) -> Answer<Plan> {
    let job = app.find_job(&job).await?;
    let plan = app.engine.view(job).await?.plan;
    let plan = plan.ok_or_else(|| {
        Fault::permanent(Code::INVALID_STATE, "show the plan", job.to_string(), "the job has no plan")
            .remedy("A job is planned when its turn comes; one that was refused never is")
    })?;
    Ok(Json(plan))
}

pub(super) async fn history(Extract(app): State, Path(job): Path<String>) -> Answer<Vec<HistoryRow>> {
    let job = app.find_job(&job).await?;
    let records = records(&app, job).await?;
    Ok(Json(records.iter().map(history_row).collect()))
}

pub(super) fn history_row(record: &Record) -> HistoryRow {
    // A record that is no JSON is damage that the reader should see and not be spared.
    let text = || serde_json::Value::String(String::from_utf8_lossy(&record.bytes).into_owned());
    HistoryRow {
        seq: record.seq.0,
        hash: crate::audit::hex(&record.hash),
        event: serde_json::from_slice(&record.bytes).unwrap_or_else(|_| text()),
    }
}

pub(super) async fn records(app: &super::App, job: JobId) -> Result<Vec<Record>, Fault> {
    app.engine.summary(job).await?;
    app.store
        .read(&StreamId::job(job), Seq(1), 0)
        .await
        .map_err(|error| super::audit::damaged(&job.to_string(), &error))
}

pub(super) async fn explain(Extract(app): State, Path(job): Path<String>) -> Answer<Explanation> {
    let job = app.find_job(&job).await?;
    let history = app.engine.history(job).await?;
    Ok(Json(crate::explain::story(&history)))
}

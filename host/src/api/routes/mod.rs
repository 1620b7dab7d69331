//! Routes and what they share.

mod audit;
mod changes;
mod exchange;
mod jobs;
mod looks;
mod shelf;
mod watch;

use std::sync::Arc;

use axum::Router;
use axum::extract::connect_info::ConnectInfo;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use jiff::Timestamp;
use tokio::sync::watch as channel;
use vmkeep_store::Store;
use vmkeep_workflow::engine::JobView;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{Actor, Engine, Fault, JobId, JobSummary};

use super::answer::{Failure, Json};
use super::listener::{Peer, only_owner};
use super::prefix::{self, Shorts};
use super::types::{DaemonPhase, ErrorBody, IDEMPOTENCY_KEY, JobDetail, JobRow, ProgressRow, StepRow};
use crate::codes;
use crate::config::Config;
use crate::heads::Sealer;
use crate::site::Site;

/// What the handlers work with.
pub struct App {
    /// The configuration.
    pub config: Config,
    /// The engine. It may not have recovered yet: [`App::phase`] tells.
    pub engine: Engine,
    /// The host.
    pub site: Arc<dyn Site>,
    /// The store.
    pub store: Arc<dyn Store>,
    /// What signs its heads.
    pub sealer: Arc<Sealer>,
    /// Where the daemon stands.
    pub phase: channel::Receiver<DaemonPhase>,
    /// When it started.
    pub started: Timestamp,
    /// The only user that may use the API.
    pub owner: u32,
    /// That user's name: the journal's actor.
    pub owner_name: String,
}

type State = axum::extract::State<Arc<App>>;

/// The API. Connections must come with their [`Peer`].
pub fn router(app: Arc<App>) -> Router {
    let owner = app.owner;
    Router::new()
        .route("/v1/status", get(looks::status))
        .route("/v1/domains", get(looks::domains))
        .route("/v1/doctor", get(looks::doctor))
        .route("/v1/doctor/repair", post(shelf::repair))
        .route("/v1/backups", get(looks::backups))
        .route("/v1/backups/show", get(looks::backup))
        .route("/v1/backups/verify", post(changes::verify))
        .route("/v1/backups/delete", post(shelf::delete))
        .route("/v1/backups/prune", post(shelf::prune))
        .route("/v1/backups/protect", post(shelf::protect))
        .route("/v1/backups/unprotect", post(shelf::unprotect))
        .route("/v1/catalogue/rebuild", post(shelf::rebuild))
        .route("/v1/catalogue/forget", post(shelf::forget))
        .route("/v1/catalogue/history", get(shelf::history))
        .route("/v1/guests/history", get(shelf::guests))
        .route("/v1/jobs/{job}/follow-up", post(shelf::follow_up))
        .route("/v1/snapshot", post(changes::snapshot))
        .route("/v1/backup", post(changes::back_up))
        .route("/v1/restore", post(changes::restore))
        .route("/v1/restore/in-place", post(exchange::in_place))
        .route("/v1/restore/undo", post(exchange::undo))
        .route("/v1/restore/discard", post(exchange::discard))
        .route("/v1/kept", get(exchange::kept))
        .route("/v1/jobs", get(jobs::list))
        .route("/v1/jobs/{job}", get(jobs::show))
        .route("/v1/jobs/{job}/history", get(jobs::history))
        .route("/v1/jobs/{job}/explain", get(jobs::explain))
        .route("/v1/jobs/{job}/plan", get(jobs::plan))
        .route("/v1/jobs/{job}/watch", get(watch::watch))
        .route("/v1/jobs/{job}/replay", get(audit::replay))
        .route("/v1/jobs/{job}/cancel", post(changes::cancel))
        .route("/v1/jobs/{job}/pause", post(changes::pause))
        .route("/v1/jobs/{job}/resume", post(changes::resume))
        .route("/v1/jobs/{job}/signal", post(changes::signal))
        .route("/v1/jobs/{job}/settle", post(changes::settle))
        .route("/v1/jobs/{job}/abandon", post(changes::abandon))
        .route("/v1/audit/verify", get(audit::verify))
        .route("/v1/audit/export", get(audit::export))
        .route("/v1/audit/prune", post(audit::prune))
        .route("/v1/audit/key/rotate", post(audit::rotate))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_route)
        .with_state(app)
        .layer(axum::middleware::from_fn(
            move |peer: ConnectInfo<Peer>, request: axum::extract::Request, next: axum::middleware::Next| {
                only_owner(owner, peer, request, next)
            },
        ))
}

async fn no_such_route(request: axum::extract::Request) -> (StatusCode, Json<ErrorBody>) {
    let what = format!("{} {}", request.method(), request.uri().path());
    let fault = Fault::permanent(codes::USAGE, "answer the request", what, "this release has no such call")
        .remedy("Use vmkeep and vmkeepd of the same release");
    (StatusCode::NOT_FOUND, Json(ErrorBody::from(&fault)))
}

impl App {
    /// Refuses what only a daemon that has taken its jobs over may do.
    fn ready(&self, doing: &str, object: &str) -> Result<(), Fault> {
        let phase = *self.phase.borrow();
        let (code, cause, remedy) = match phase {
            DaemonPhase::Ready => return Ok(()),
            DaemonPhase::WaitingForLibvirt => (
                codes::HYPERVISOR_UNREACHABLE,
                format!("libvirt does not answer at {}; vmkeepd waits for it", self.config.connect),
                "Start libvirt (systemctl start libvirtd); `vmkeep doctor` tells more. Then ask again",
            ),
            DaemonPhase::Recovering => (
                codes::INVALID_STATE,
                "vmkeepd is taking interrupted jobs over".to_owned(),
                "Ask again in a few seconds",
            ),
            DaemonPhase::Stopping => {
                (codes::INVALID_STATE, "vmkeepd is stopping".to_owned(), "Ask again once it has started anew")
            }
        };
        Err(Fault::transient(code, doing, object, cause).remedy(remedy))
    }

    async fn all_jobs(&self) -> Result<Vec<JobSummary>, Fault> {
        self.engine.jobs(&JobFilter::default()).await
    }

    async fn all_ids(&self) -> Result<Vec<JobId>, Fault> {
        Ok(self.all_jobs().await?.iter().map(|summary| summary.job).collect())
    }

    /// The job that somebody means.
    async fn find_job(&self, prefix: &str) -> Result<JobId, Fault> {
        // A whole id needs no list of all others.
        match prefix.parse::<JobId>() {
            Ok(job) if prefix.len() == 36 => Ok(job),
            _ => prefix::job(prefix, &self.all_ids().await?),
        }
    }

    async fn row(&self, job: JobId) -> Result<JobRow, Fault> {
        let summary = self.engine.summary(job).await?;
        let shorts = Shorts::of(&self.all_ids().await?);
        Ok(JobRow::new(&summary, shorts.short(&job)))
    }

    async fn detail(&self, job: JobId) -> Result<JobDetail, Fault> {
        let view = self.engine.view(job).await?;
        let shorts = Shorts::of(&self.all_ids().await?);
        Ok(detail_of(view, shorts.short(&job)))
    }

    fn actor(&self, reason: Option<String>) -> Actor {
        Actor { who: self.owner_name.clone(), why: reason.filter(|reason| !reason.trim().is_empty()) }
    }
}

fn detail_of(view: JobView, short: String) -> JobDetail {
    let results = crate::explain::results(&view);
    let steps = view.steps.into_iter().map(|step| StepRow {
        name: step.name.to_string(),
        kind: step.kind,
        title: step.title,
        state: step.state,
        attempts: step.attempts,
        fault: step.fault.as_ref().map(Into::into),
        output: step.output,
        progress: step.progress.map(|p| ProgressRow { done: p.done, total: p.total, unit: p.unit }),
        undo: step.undo,
        undo_fault: step.undo_fault.as_ref().map(Into::into),
        phase: step.stage,
        awaits_until: step.awaits.as_ref().map(|(_, until)| *until),
        awaits: step.awaits.map(|(signal, _)| signal),
    });
    JobDetail {
        job: JobRow::new(&view.summary, short),
        point_of_no_return: view.plan.and_then(|plan| plan.point_of_no_return).map(|step| step.to_string()),
        paused_until: view.paused_until,
        safe_after: view.safe_after,
        parked: view.parked.as_ref().map(Into::into),
        cancelled_too_late: view.cancelled_too_late.map(|actor| actor.who),
        results,
        phases: view.stages.iter().map(Into::into).collect(),
        steps: steps.collect(),
    }
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    match value.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= 200 => Ok(Some(key.to_owned())),
        _ => Err(super::answer::misused(
            "header idempotency-key",
            "it must have 1 to 200 visible ASCII characters",
        )),
    }
}

//! The engine: jobs asked for, locked, driven, recovered and acted on.
//!
//! # Locks
//! At most one job that changes a subject runs on it. The lock is not a thing of its own: it is *derived* from the
//! journals. A job holds its subject from its plan until it has ended, across crashes, and also while it needs
//! attention; so a subject whose last job could not be settled stays closed until somebody settles it. What is kept in
//! memory is only the index of that.
//!
//! Besides, a subject may be *closed* from outside ([`Engine::close`]): by whoever has to see to it before any job may go
//! on there. That is memory only, and for whoever closes to do again after a crash.
//!
//! # Admission
//! A request is durable before anything else happens to it. It is planned when its subject's lock is held and the
//! limits allow, so that a plan is never older than its first step.

mod attempt;
mod clock;
mod driver;
mod inbox;
pub(crate) mod log;
mod schedule;
mod view;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

use crate::event::{Actor, Body, Event, IfBusy, JobRequest, Settle};
use crate::fault::{Code, Fault};
use crate::ids::{JobId, Seq, StreamId};
use crate::journal::{Append, EventStore, JobFilter, Reserve};
use crate::plan::Plan;
use crate::state::State;
use crate::step::{PlanContext, Registry};
use crate::summary::{JobStatus, JobSummary};

pub use clock::{Clock, Environment, NoEnvironment, SystemClock};
pub use view::{JobView, StageView, StepState, StepView};

use driver::Start;
use inbox::Message;
use log::Log;
use schedule::{Queued, Shared, internal, unfoldable, unreadable};

/// How long a job's driver is waited for that is asked how its job stands.
const ANSWER: Duration = Duration::from_secs(2);

/// How many jobs run at once.
#[derive(Clone, Debug)]
pub struct Limits {
    /// In all.
    pub running: usize,
    /// By the names that requests carry.
    pub named: BTreeMap<String, usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { running: 4, named: BTreeMap::new() }
    }
}

/// What an engine is made of.
pub struct Config {
    /// Where journals are kept.
    pub store: Arc<dyn EventStore>,
    /// The step kinds and workflows of this binary.
    pub registry: Registry,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// What is recorded of the world.
    pub environment: Arc<dyn Environment>,
    /// How much runs at once.
    pub limits: Limits,
    /// Called when the store can no longer be trusted. It must end the process.
    pub on_fatal: Arc<dyn Fn(&str) + Send + Sync>,
}

/// What recovery found.
#[derive(Clone, Debug, Default)]
pub struct Recovery {
    /// Jobs that go on.
    pub resumed: Vec<JobId>,
    /// Jobs that this engine cannot read; they keep their subjects and are otherwise left alone.
    pub parked: Vec<(JobId, Fault)>,
}

/// The engine. Cheap to clone; all clones are the same engine.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}

impl Engine {
    /// An engine that has not recovered yet and runs nothing.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self(Arc::new(Shared {
            store: config.store,
            registry: config.registry,
            clock: config.clock,
            environment: config.environment,
            limits: config.limits,
            on_fatal: config.on_fatal,
            schedule: Mutex::default(),
            admission: tokio::sync::Mutex::default(),
            idle: tokio::sync::Notify::new(),
        }))
    }

    /// The step kinds and workflows of this engine.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Where journals are kept.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn EventStore> {
        &self.0.store
    }

    /// Takes over every job that has not ended: folds its journal, holds its lock, and goes on. A job that cannot be
    /// folded is set aside and keeps nobody else from going on.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn recover(&self) -> Result<Recovery, Fault> {
        let _one = self.0.admission.lock().await;
        let mut recovery = Recovery::default();
        let mut jobs = self.0.store.jobs(&JobFilter::default()).await.map_err(|e| unreadable(&e))?;
        jobs.retain(|summary| !summary.status.ended());
        jobs.sort_by_key(|summary| (summary.requested, summary.job));
        for summary in jobs {
            let job = summary.job;
            let subject = summary.subject.id.clone();
            match self.0.take_over(summary).await {
                Ok((start, exclusive)) => {
                    let planned = start.log.state.plan().is_some();
                    let closed = exclusive && self.0.schedule().closed.contains_key(&subject);
                    if planned && !closed {
                        self.0.run(job, start, exclusive);
                    } else {
                        let mut schedule = self.0.schedule();
                        if planned {
                            schedule.holders.insert(subject, job);
                        }
                        schedule.queue.push_back(Queued { job, start, exclusive });
                    }
                    recovery.resumed.push(job);
                }
                Err(fault) => {
                    tracing::error!(%job, %fault, "a job cannot be read and is set aside");
                    let mut schedule = self.0.schedule();
                    schedule.holders.entry(subject).or_insert(job);
                    schedule.parked.insert(job, fault.clone());
                    drop(schedule);
                    recovery.parked.push((job, fault));
                }
            }
        }
        self.0.pump();
        Ok(recovery)
    }

    /// Asks for a job. When this returns `Ok` the request is durable.
    ///
    /// # Errors
    /// When the workflow is unknown, the subject is busy or needs attention, the key belongs to another request, or
    /// the store cannot take new jobs.
    pub async fn request(&self, request: JobRequest) -> Result<JobId, Fault> {
        let workflow = self.0.workflow(&request)?;
        let _one = self.0.admission.lock().await;
        if let Some(key) = &request.key
            && let Some(stream) = self.0.store.key(key).await.map_err(|e| unreadable(&e))?
        {
            return self.0.same_request(&stream, &request).await;
        }
        if self.0.schedule().draining {
            return Err(Fault::transient(
                Code::INVALID_STATE,
                "start a job",
                request.subject.label,
                "vmkeepd is stopping",
            )
            .remedy("Ask again once it has started anew"));
        }
        if self.0.store.reserve().await.map_err(|e| unreadable(&e))? == Reserve::Spent {
            return Err(Fault::transient(
                Code::STORE_RESERVE_SPENT,
                "start a job",
                request.subject.label,
                "the file system of the state folder is full and the store lives on its reserve",
            )
            .remedy("Free space there; running jobs go on, new ones start once the reserve is whole again"));
        }
        if workflow.exclusive() && request.if_busy == IfBusy::Refuse {
            self.0.refuse_busy(&request)?;
        }
        let job = JobId::new();
        let event =
            Event::new(self.0.clock.now(), self.0.environment.facts(), Body::JobRequested(request.clone()));
        let mut state = State::new();
        state.apply(&event).map_err(|e| internal(job, &e.to_string()))?;
        let summary =
            JobSummary::first(job, &event).ok_or_else(|| internal(job, "the first event is no request"))?;
        let append = Append {
            stream: StreamId::job(job),
            expected: Seq(0),
            records: vec![log::encode(&event).map_err(|e| internal(job, &e))?],
            summary: Some(summary.clone()),
            key: request.key.clone(),
        };
        crate::crash::point(&format!("append/before/{}/1", request.workflow));
        self.0.store.append(append).await.map_err(|e| self.0.not_accepted(&request, &e))?;
        crate::crash::point(&format!("append/after/{}/1", request.workflow));
        let start = Start {
            log: Log::new(self.0.clone(), job, state, summary),
            recovered: false,
            started_in: HashMap::new(),
            tokens: HashMap::new(),
        };
        self.0.schedule().queue.push_back(Queued { job, start, exclusive: workflow.exclusive() });
        self.0.pump();
        Ok(job)
    }

    /// The plan that a request would get now. Changes nothing.
    ///
    /// # Errors
    /// When no plan can be made.
    pub async fn dry_run(&self, request: JobRequest) -> Result<Plan, Fault> {
        let workflow = self.0.workflow(&request)?;
        if workflow.exclusive() {
            self.0.refuse_busy(&request)?;
        }
        self.0.make_plan(PlanContext { job: JobId::new(), request: Arc::new(request), dry_run: true }).await
    }

    /// Asks a job to stop and roll back. Past the point of no return it goes on to its end instead, and says so.
    ///
    /// # Errors
    /// When the job does not exist or has ended.
    pub async fn cancel(&self, job: JobId, by: Actor) -> Result<(), Fault> {
        self.act(job, Body::CancelRequested(by)).await
    }

    /// Asks a job to wait at the next safe place until that instant.
    ///
    /// # Errors
    /// When the job does not exist or has ended.
    pub async fn pause(&self, job: JobId, by: Actor, until: Timestamp) -> Result<(), Fault> {
        self.act(job, Body::PauseRequested { by, until }).await
    }

    /// Ends a pause.
    ///
    /// # Errors
    /// When the job is not paused.
    pub async fn resume(&self, job: JobId, by: Actor) -> Result<(), Fault> {
        self.act(job, Body::ResumeRequested(by)).await
    }

    /// Settles a job that needs attention.
    ///
    /// # Errors
    /// When the job does not need attention.
    pub async fn settle(&self, job: JobId, by: Actor, how: Settle) -> Result<(), Fault> {
        self.act(job, Body::SettleRequested { by, how }).await
    }

    /// Gives a job up that needs attention or was set aside, and frees its subject. What it leaves behind is written
    /// down as far as it is known.
    ///
    /// # Errors
    /// When the job does not need attention.
    pub async fn abandon(&self, job: JobId, by: Actor) -> Result<(), Fault> {
        if self.0.schedule().parked.contains_key(&job) {
            return self.0.abandon_parked(job, by).await;
        }
        let left = self
            .view(job)
            .await?
            .summary
            .items
            .into_iter()
            .map(|item| format!("step {}: {} ({})", item.step, item.fault.object, item.fault.cause));
        let left = left.collect();
        self.act(job, Body::JobAbandoned { by, left }).await
    }

    /// Sends a signal to a job.
    ///
    /// # Errors
    /// When the job does not exist or has ended.
    pub async fn signal(&self, job: JobId, name: String, value: Value, by: Actor) -> Result<(), Fault> {
        self.act(job, Body::SignalReceived { name, value, by }).await
    }

    /// Records that something was done to keep a guest safe. The act itself never waits for this.
    ///
    /// # Errors
    /// When the job does not exist or has ended.
    pub async fn intervened(&self, job: JobId, act: String, outcome: String) -> Result<(), Fault> {
        self.act(job, Body::Intervened { act, outcome }).await
    }

    async fn act(&self, job: JobId, body: Body) -> Result<(), Fault> {
        if let Some(handle) = self.0.handle(job)
            && let Some(answer) =
                handle.ask(|reply| Message::Act { body: Box::new(body.clone()), reply }).await
        {
            return answer;
        }
        if self.0.schedule().queue.iter().any(|queued| queued.job == job) {
            return self.0.act_on_queued(job, body).await;
        }
        let summary = self.summary(job).await?;
        Err(Fault::permanent(
            Code::INVALID_STATE,
            "act on the job",
            job.to_string(),
            if summary.status.ended() { "it has ended" } else { "this vmkeepd does not run it" },
        )
        .remedy(format!("`vmkeep job show {job}` tells where it stands")))
    }

    /// A job with its steps.
    ///
    /// # Errors
    /// When the job does not exist or its history cannot be read.
    pub async fn view(&self, job: JobId) -> Result<JobView, Fault> {
        // A driver that waits for room in the journal answers nobody; what is stored tells as much.
        if let Some(handle) = self.0.handle(job)
            && let Ok(Some(view)) = tokio::time::timeout(ANSWER, handle.ask(Message::View)).await
        {
            return Ok(view);
        }
        let summary = self.summary(job).await?;
        let parked = self.0.schedule().parked.get(&job).cloned();
        let folded = match log::history(&*self.0.store, job).await {
            Ok(events) => State::fold(events.iter().map(|(_, event)| event)).map_err(|e| e.to_string()),
            Err(fault) => Err(fault.to_string()),
        };
        match (folded, parked) {
            (Ok(state), parked) => Ok(JobView { parked, ..JobView::of(&state, summary) }),
            (Err(_), Some(fault)) => {
                Ok(JobView { parked: Some(fault), ..JobView::of(&State::new(), summary) })
            }
            (Err(why), None) => Err(unfoldable(job, &why)),
        }
    }

    /// A job in one row.
    ///
    /// # Errors
    /// When the job does not exist.
    pub async fn summary(&self, job: JobId) -> Result<JobSummary, Fault> {
        self.0.store.job(job).await.map_err(|e| unreadable(&e))?.ok_or_else(|| log::no_such_job(job))
    }

    /// The jobs that match, newest first.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, Fault> {
        self.0.store.jobs(filter).await.map_err(|e| unreadable(&e))
    }

    /// A job's events.
    ///
    /// # Errors
    /// When the job does not exist or its history cannot be read.
    pub async fn history(&self, job: JobId) -> Result<Vec<(Seq, Event)>, Fault> {
        log::history(&*self.0.store, job).await
    }

    /// Waits until a job has ended or needs attention.
    ///
    /// # Errors
    /// When the job does not exist.
    pub async fn wait(&self, job: JobId) -> Result<JobSummary, Fault> {
        loop {
            let changed = self.0.idle.notified();
            if let Some(mut handle) = self.0.handle(job) {
                let settled = |s: &JobSummary| s.status.ended() || s.status == JobStatus::NeedsAttention;
                if let Ok(summary) = handle.summary.wait_for(settled).await {
                    return Ok(summary.clone());
                }
            }
            let summary = self.summary(job).await?;
            let parked = self.0.schedule().parked.contains_key(&job);
            if summary.status.ended() || summary.status == JobStatus::NeedsAttention || parked {
                return Ok(summary);
            }
            changed.await;
        }
    }

    /// The job that holds a subject.
    #[must_use]
    pub fn holder(&self, subject: &str) -> Option<JobId> {
        self.0.schedule().holders.get(subject).copied()
    }

    /// All subjects that are held, with the job that holds each.
    #[must_use]
    pub fn held(&self) -> Vec<(String, JobId)> {
        self.0.schedule().holders.iter().map(|(subject, job)| (subject.clone(), *job)).collect()
    }

    /// Closes a subject: until it is opened again no job starts on it, and a job on it that is taken over waits.
    /// False if a job is being driven on it; then nothing is done, and the subject is that job's business.
    #[must_use]
    pub fn close(&self, subject: &str, why: Fault) -> bool {
        let mut schedule = self.0.schedule();
        let driven = schedule.drivers.values().any(|running| running.subject.as_deref() == Some(subject));
        if !driven {
            schedule.closed.insert(subject.to_owned(), why);
        }
        !driven
    }

    /// Opens a subject that was closed.
    pub fn open(&self, subject: &str) {
        self.0.schedule().closed.remove(subject);
        self.0.pump();
    }

    /// Why a subject is closed, if it is.
    #[must_use]
    pub fn closed(&self, subject: &str) -> Option<Fault> {
        self.0.schedule().closed.get(subject).cloned()
    }

    /// The jobs that this engine set aside, and why.
    #[must_use]
    pub fn parked(&self) -> Vec<(JobId, Fault)> {
        self.0.schedule().parked.iter().map(|(job, fault)| (*job, fault.clone())).collect()
    }

    /// Brings every job to a safe place and stops. The jobs go on when an engine recovers them.
    pub async fn shutdown(&self) {
        {
            let mut schedule = self.0.schedule();
            schedule.draining = true;
            for running in schedule.drivers.values() {
                let _ = running.handle.inbox.send(Message::Drain);
            }
        }
        loop {
            let changed = self.0.idle.notified();
            if self.0.schedule().drivers.is_empty() {
                return;
            }
            changed.await;
        }
    }
}

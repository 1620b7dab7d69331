//! Admission, locks and limits: which job may run when, and what becomes of one that ends.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{self, Ended, Start};
use super::inbox::Handle;
use super::log::{self, Log};
use super::{Clock, Environment, Limits};
use crate::event::{Actor, Body, Event, JobRequest};
use crate::fault::{Class, Code, Fault};
use crate::ids::{JobId, Phase, StepName, StreamId};
use crate::journal::{Append, AppendError, EventStore, StoreError};
use crate::plan::Plan;
use crate::progress::{ProgressRow, Token};
use crate::state::State;
use crate::step::{PlanContext, Registry, Workflow};
use crate::summary::{JobStatus, JobSummary};

#[derive(Default)]
pub(super) struct Schedule {
    pub(super) holders: HashMap<String, JobId>,
    pub(super) queue: VecDeque<Queued>,
    pub(super) drivers: HashMap<JobId, Running>,
    pub(super) parked: HashMap<JobId, Fault>,
    /// Subjects that were closed from outside, and why.
    pub(super) closed: HashMap<String, Fault>,
    pub(super) draining: bool,
}

pub(super) struct Queued {
    pub(super) job: JobId,
    pub(super) start: Start,
    pub(super) exclusive: bool,
}

pub(super) struct Running {
    pub(super) handle: Handle,
    pub(super) subject: Option<String>,
    pub(super) limits: Vec<String>,
}

pub(super) struct Shared {
    pub(super) store: Arc<dyn EventStore>,
    pub(super) registry: Registry,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) environment: Arc<dyn Environment>,
    pub(super) limits: Limits,
    pub(super) on_fatal: Arc<dyn Fn(&str) + Send + Sync>,
    pub(super) schedule: Mutex<Schedule>,
    /// Admissions one after the other: whether a subject is free and that a request claims it is one decision.
    pub(super) admission: tokio::sync::Mutex<()>,
    pub(super) idle: tokio::sync::Notify,
}

impl Shared {
    pub(super) fn schedule(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn handle(&self, job: JobId) -> Option<Handle> {
        self.schedule().drivers.get(&job).map(|running| running.handle.clone())
    }

    pub(super) fn workflow(&self, request: &JobRequest) -> Result<Arc<dyn Workflow>, Fault> {
        self.registry.find_workflow(&request.workflow).ok_or_else(|| {
            let known: Vec<_> = self.registry.workflow_names().iter().map(ToString::to_string).collect();
            Fault::permanent(
                Code::UNKNOWN_STEP_KIND,
                "start a job",
                request.subject.label.clone(),
                format!("there is no workflow {}", request.workflow),
            )
            .remedy(format!("Known workflows: {}", known.join(", ")))
        })
    }

    pub(super) async fn make_plan(&self, cx: PlanContext) -> Result<Plan, Fault> {
        let workflow = self.workflow(&cx.request)?;
        let plan = workflow.plan(&cx).await?;
        let label = cx.request.subject.label.clone();
        if let Some(step) = plan.steps.iter().find(|step| !self.registry.knows(&step.kind)) {
            let cause =
                format!("the plan names the step kind {}, which this release does not have", step.kind);
            return Err(Fault::permanent(Code::UNKNOWN_STEP_KIND, "plan the job", label, cause));
        }
        match plan.clone().compile() {
            Ok(_) => Ok(plan),
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, "plan the job", label, e)),
        }
    }

    pub(super) async fn same_request(&self, stream: &StreamId, request: &JobRequest) -> Result<JobId, Fault> {
        let taken = |cause: &str| {
            Fault::permanent(Code::DUPLICATE_KEY, "start a job", request.subject.label.clone(), cause)
                .remedy("Use a new key for a new request")
        };
        let job = stream.as_job().ok_or_else(|| taken("the key belongs to something that is not a job"))?;
        let events = log::history(&*self.store, job).await.map_err(|fault| match fault.code {
            // What was asked for then cannot be compared any more; that it was carried out is certain.
            Code::NO_SUCH_JOB => taken(&format!("the key was used by job {job}, whose history was pruned")),
            _ => fault,
        })?;
        match events.first().map(|(_, event)| &event.body) {
            Some(Body::JobRequested(before))
                if before.workflow == request.workflow
                    && before.subject == request.subject
                    && before.options == request.options =>
            {
                Ok(job)
            }
            _ => Err(taken(&format!("the key was used for another request, job {job}"))),
        }
    }

    pub(super) fn not_accepted(&self, request: &JobRequest, error: &AppendError) -> Fault {
        if let AppendError::Fatal(why) = error {
            (self.on_fatal)(why);
        }
        Fault::transient(error.code(), "store the request", request.subject.label.clone(), error)
            .remedy("Nothing was started. See to the state folder's file system, then ask again")
    }

    /// Refuses a request whose subject is closed, held or already asked for.
    pub(super) fn refuse_busy(&self, request: &JobRequest) -> Result<(), Fault> {
        let schedule = self.schedule();
        let subject = &request.subject.id;
        if let Some(why) = schedule.closed.get(subject) {
            return Err(why.clone());
        }
        let queued = schedule.queue.iter().find(|queued| {
            queued.exclusive
                && queued.start.log.state.request().is_some_and(|waiting| waiting.subject.id == *subject)
        });
        let holder = schedule.holders.get(subject).copied().or_else(|| queued.map(|queued| queued.job));
        let Some(holder) = holder else { return Ok(()) };
        let status = schedule.drivers.get(&holder).map(|running| running.handle.summary.borrow().status);
        let parked = schedule.parked.contains_key(&holder);
        if status.is_some_and(JobStatus::ended) {
            // It is seen to have ended a moment before it lets go: the next job waits for that moment in the queue.
            return Ok(());
        }
        let label = request.subject.label.clone();
        Err(if parked || status == Some(JobStatus::NeedsAttention) {
            Fault::permanent(Code::NEEDS_ATTENTION, "start a job", label, format!("job {holder} on it needs attention"))
                .remedy(format!(
                    "`vmkeep job show {holder}` says what is left; then `vmkeep job settle {holder}` or `vmkeep job abandon {holder}`"
                ))
        } else {
            Fault::transient(Code::SUBJECT_BUSY, "start a job", label, format!("job {holder} works on it"))
                .remedy(format!("Wait for it (`vmkeep job watch {holder}`), or ask with --queue"))
        })
    }

    /// Reads a job of an earlier engine.
    pub(super) async fn take_over(self: &Arc<Self>, summary: JobSummary) -> Result<(Start, bool), Fault> {
        let job = summary.job;
        let events = log::history(&*self.store, job).await?;
        let state = State::fold(events.iter().map(|(_, event)| event))
            .map_err(|e| unfoldable(job, &e.to_string()))?;
        let exclusive =
            self.registry.find_workflow(&summary.workflow).is_none_or(|workflow| workflow.exclusive());
        let mut started_in = HashMap::<(StepName, Phase), _>::new();
        for (_, event) in &events {
            if let Body::StepStarted { step, phase, .. } = &event.body {
                started_in.insert((step.clone(), *phase), Arc::new(event.env.clone()));
            }
        }
        let rows = self.store.rows(job).await.map_err(|e| unreadable(&e))?;
        let tokens = rows
            .into_iter()
            .filter_map(|(name, value)| {
                let value = serde_json::from_value::<ProgressRow>(value).ok()?.token?;
                Some((name, Token { value, stored: true }))
            })
            .collect();
        let recovered = state.plan().is_some();
        // The summary may be a projection of a damaged store; the fold is the truth that goes on from here.
        let mut fresh =
            JobSummary::first(job, &events[0].1).ok_or_else(|| unfoldable(job, "it has no request"))?;
        events[1..].iter().for_each(|(_, event)| fresh.apply(event));
        Ok((
            Start { log: Log::new(self.clone(), job, state, fresh), recovered, started_in, tokens },
            exclusive,
        ))
    }

    /// Starts a job's driver and takes its lock.
    pub(super) fn run(self: &Arc<Self>, job: JobId, start: Start, exclusive: bool) {
        let request = start.log.state.request().cloned();
        let subject = request.as_ref().filter(|_| exclusive).map(|request| request.subject.id.clone());
        let limits = request.map(|request| request.limits.clone()).unwrap_or_default();
        let mut schedule = self.schedule();
        if let Some(subject) = &subject {
            schedule.holders.insert(subject.clone(), job);
        }
        let handle = driver::spawn(self, job, start);
        schedule.drivers.insert(job, Running { handle, subject, limits });
        drop(schedule);
        self.idle.notify_waiters();
    }

    /// Starts what may start: in the order of the requests, past those that have to wait.
    pub(super) fn pump(self: &Arc<Self>) {
        loop {
            let next = {
                let mut schedule = self.schedule();
                if schedule.draining || schedule.drivers.len() >= self.limits.running {
                    return;
                }
                let free = schedule.queue.iter().position(|queued| self.may_run(&schedule, queued));
                free.and_then(|at| schedule.queue.remove(at))
            };
            let Some(Queued { job, start, exclusive }) = next else { return };
            self.run(job, start, exclusive);
        }
    }

    pub(super) fn may_run(&self, schedule: &Schedule, queued: &Queued) -> bool {
        let Some(request) = queued.start.log.state.request() else { return true };
        let subject = &request.subject.id;
        // A job that waits with a plan, because its subject was closed when it was taken over, holds it already.
        let free = !queued.exclusive
            || (!schedule.closed.contains_key(subject)
                && schedule.holders.get(subject).is_none_or(|holder| *holder == queued.job));
        free && request.limits.iter().all(|name| {
            let most = self.limits.named.get(name).copied().unwrap_or(usize::MAX);
            schedule.drivers.values().filter(|running| running.limits.contains(name)).count() < most
        })
    }

    /// An act on a job that waits: it gets its driver at once, without a lock, which a job without a plan never needs.
    pub(super) async fn act_on_queued(self: &Arc<Self>, job: JobId, body: Body) -> Result<(), Fault> {
        self.not_begun(job)?;
        if !matches!(body, Body::CancelRequested(_)) {
            return Err(Fault::permanent(
                Code::INVALID_STATE,
                "act on the job",
                job.to_string(),
                "it has not started yet",
            )
            .remedy("A waiting job can only be cancelled"));
        }
        let _one = self.admission.lock().await;
        let found = {
            let mut schedule = self.schedule();
            let at = schedule.queue.iter().position(|queued| queued.job == job);
            at.and_then(|at| schedule.queue.remove(at))
        };
        let Some(mut queued) = found else {
            return Err(Fault::transient(
                Code::INVALID_STATE,
                "act on the job",
                job.to_string(),
                "it has just started",
            )
            .remedy("Ask again"));
        };
        let by = match &body {
            Body::CancelRequested(by) => by.clone(),
            _ => Actor::default(),
        };
        let cancelled = queued.start.log.append(vec![body]).await;
        let ended = match cancelled {
            Ok(()) => {
                queued.start.log.append(vec![Body::JobRolledBack(crate::event::Cause::Cancel(by))]).await
            }
            lost => lost,
        };
        self.idle.notify_waiters();
        ended.map_err(|lost| internal(job, &format!("{lost:?}")))
    }

    /// Refuses to act on a job that waits with a plan. It has begun, and only its driver may act on what it did.
    fn not_begun(&self, job: JobId) -> Result<(), Fault> {
        let schedule = self.schedule();
        let queued = schedule.queue.iter().find(|queued| queued.job == job);
        let Some(queued) = queued.filter(|queued| queued.start.log.state.plan().is_some()) else {
            return Ok(());
        };
        let closed = schedule.closed.get(&queued.start.log.summary.subject.id);
        let why = closed.map_or("it is being taken over", |why| why.cause.as_str());
        Err(Fault::transient(Code::INVALID_STATE, "act on the job", job.to_string(), why)
            .remedy("The job goes on by itself once that is over; then ask again"))
    }

    /// A job that this engine cannot read is given up by its summary alone: the event is the last of its stream, and
    /// nothing of what stands before it is interpreted.
    pub(super) async fn abandon_parked(self: &Arc<Self>, job: JobId, by: Actor) -> Result<(), Fault> {
        let _one = self.admission.lock().await;
        let stream = StreamId::job(job);
        let mut summary =
            self.store.job(job).await.map_err(|e| unreadable(&e))?.ok_or_else(|| log::no_such_job(job))?;
        let expected = self.store.last(&stream).await.map_err(|e| unreadable(&e))?;
        let left = vec!["what the job had done so far; this release could not read its history".to_owned()];
        let event = Event::new(self.clock.now(), self.environment.facts(), Body::JobAbandoned { by, left });
        summary.apply(&event);
        summary.seq = expected.next();
        let records = vec![log::encode(&event).map_err(|e| internal(job, &e))?];
        let append = Append { stream, expected, records, summary: Some(summary), key: None };
        self.store
            .append(append)
            .await
            .map_err(|e| Fault::transient(e.code(), "give the job up", job.to_string(), e))?;
        {
            let mut schedule = self.schedule();
            schedule.parked.remove(&job);
            schedule.holders.retain(|_, holder| *holder != job);
        }
        self.pump();
        self.idle.notify_waiters();
        Ok(())
    }

    pub(super) async fn driver_ended(self: &Arc<Self>, job: JobId, ended: Ended) {
        if matches!(ended, Ended::Job)
            && let Err(error) = self.store.clear_rows(job).await
        {
            tracing::warn!(%job, %error, "the progress rows of an ended job could not be removed");
        }
        {
            let mut schedule = self.schedule();
            let running = schedule.drivers.remove(&job);
            match &ended {
                Ended::Job => {
                    if let Some(subject) = running.and_then(|running| running.subject) {
                        schedule.holders.remove(&subject);
                    }
                }
                Ended::Parked(fault) => {
                    schedule.parked.insert(job, fault.clone());
                }
                Ended::Drained | Ended::Fatal(_) => {}
            }
        }
        if let Ended::Fatal(why) = &ended {
            tracing::error!(%job, why, "the store failed; ending the process");
            (self.on_fatal)(why);
        }
        self.pump();
        self.idle.notify_waiters();
    }
}

pub(super) fn unreadable(error: &StoreError) -> Fault {
    error.fault("read the store", "")
}

pub(super) fn unfoldable(job: JobId, why: &str) -> Fault {
    Fault::permanent(Code::STORE_DAMAGED, "fold a job's history", job.to_string(), why)
        .class(Class::Fatal)
        .remedy(
            "The job is set aside. Use a release that knows its events, or export the history and report it",
        )
}

pub(super) fn internal(job: JobId, why: &str) -> Fault {
    Fault::permanent(Code::UNDEFINED, "run the job", job.to_string(), why)
        .remedy("This is a fault in vmkeep itself. Please report it")
}

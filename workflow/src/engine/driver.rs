//! The driver of one job: asks the decision rules what should hold, and sees to it that it does.
//!
//! One task per job owns the job's state. Everything that happens reaches it as a [`Message`]; it writes the event,
//! takes it in when the store has acknowledged it, and asks again. Attempts, probes, plans and timers run in tasks of
//! their own and know nothing of the state.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::decide::{Command, decide};
use crate::event::{Body, Timer, Verdict};
use crate::fault::{Class, Code, Fault};
use crate::ids::{JobId, Phase, StepName};
use crate::progress::{Progress, Token};
use crate::state::{Mode, Run};
use crate::step::{Outputs, PlanContext, StepContext};
use crate::summary::JobSummary;

use super::Shared;
use super::attempt::{self, Live};
use super::inbox::{Handle, Message};
use super::log::{Log, Lost};
use super::view::JobView;

/// How often the world is asked for the facts of a plan before that counts as a difference.
const FACTS_TRIES: u32 = 5;

/// What a driver starts with.
pub(super) struct Start {
    pub(super) log: Log,
    pub(super) recovered: bool,
    /// The environments in which the attempts of the history were started.
    pub(super) started_in: HashMap<(StepName, Phase), Arc<BTreeMap<String, String>>>,
    /// The resume tokens in the store's rows.
    pub(super) tokens: HashMap<String, Token>,
}

pub(super) struct Driver {
    shared: Arc<Shared>,
    job: JobId,
    log: Log,
    told: watch::Sender<JobSummary>,
    inbox: mpsc::UnboundedReceiver<Message>,
    sender: mpsc::UnboundedSender<Message>,
    outputs: Outputs,
    live: HashMap<(StepName, Phase), Live>,
    probes: HashMap<(StepName, Phase), AbortHandle>,
    timers: HashMap<Timer, AbortHandle>,
    planning: bool,
    checking: HashSet<StepName>,
    facts_tries: u32,
    started_in: HashMap<(StepName, Phase), Arc<BTreeMap<String, String>>>,
    tokens: HashMap<String, Token>,
    recovered: bool,
    draining: bool,
}

/// Starts a driver. The task ends when the job has ended, when the engine drains, or when the job is lost.
pub(super) fn spawn(shared: &Arc<Shared>, job: JobId, start: Start) -> Handle {
    let (sender, inbox) = mpsc::unbounded_channel();
    let (told, summary) = watch::channel(start.log.summary.clone());
    let driver = Driver {
        shared: shared.clone(),
        job,
        log: start.log,
        told,
        inbox,
        sender: sender.clone(),
        outputs: Outputs::default(),
        live: HashMap::new(),
        probes: HashMap::new(),
        timers: HashMap::new(),
        planning: false,
        checking: HashSet::new(),
        facts_tries: 0,
        started_in: start.started_in,
        tokens: start.tokens,
        recovered: start.recovered,
        draining: false,
    };
    let shared = shared.clone();
    tokio::spawn(async move {
        let ended = Box::pin(driver.drive()).await;
        shared.driver_ended(job, ended).await;
    });
    Handle { inbox: sender, summary }
}

/// How a driver's task ended.
pub(super) enum Ended {
    /// The job has ended.
    Job,
    /// The engine drains; the job goes on at the next start.
    Drained,
    /// The job can no longer be written to; it is set aside.
    Parked(Fault),
    /// The store failed and the process must end.
    Fatal(String),
}

impl Driver {
    async fn drive(mut self) -> Ended {
        for (place, cell) in self.log.state.cells().iter().enumerate() {
            if let Some(output) = &cell.output {
                self.outputs.set(self.log.state.spec(place).name.clone(), (**output).clone());
            }
        }
        if self.recovered
            && let Err(lost) = self.record(vec![Body::JobRecovered]).await
        {
            return self.lost(lost);
        }
        loop {
            match self.turn().await {
                Ok(None) => {}
                Ok(Some(ended)) => return ended,
                Err(lost) => return self.lost(lost),
            }
        }
    }

    fn lost(&mut self, lost: Lost) -> Ended {
        self.stop_all();
        match lost {
            Lost::Fatal(why) => Ended::Fatal(why),
            Lost::Owned(why) => Ended::Parked(
                Fault::permanent(Code::STORE_IN_USE, "carry on the job", self.job.to_string(), why)
                    .class(Class::Fatal)
                    .remedy("Make sure that only one vmkeepd uses this store, then start it again"),
            ),
        }
    }

    /// Asks what should hold, makes it hold, and takes in one message.
    async fn turn(&mut self) -> Result<Option<Ended>, Lost> {
        let mut commands = decide(&self.log.state);
        let mut due: Vec<Body> = Vec::new();
        commands.retain(|command| match command {
            Command::Record(body) => {
                due.push(body.clone());
                false
            }
            _ => true,
        });
        if self.draining && !self.log.state.holds_guest() {
            due.retain(|body| !matches!(body, Body::StepStarted { .. } | Body::SignalAwaited { .. }));
        }
        if !due.is_empty() {
            if crate::mutation::on("event-after-effect") {
                self.act_first(&due).await;
            }
            self.record(due).await?;
            return Ok(None);
        }
        if self.log.state.mode() == Mode::Ended {
            self.stop_all();
            return Ok(Some(Ended::Job));
        }
        if self.draining && !self.log.state.holds_guest() {
            self.live.values().for_each(|live| live.stop.cancel());
            if self.live.values().all(|live| live.returned) {
                self.stop_all();
                return Ok(Some(Ended::Drained));
            }
        }
        self.hold(commands);
        match self.inbox.recv().await {
            Some(message) => self.take(message).await.map(|()| None),
            None => Ok(Some(Ended::Drained)),
        }
    }

    /// What must never be: effects ahead of their events. See [`crate::mutation`].
    async fn act_first(&self, due: &[Body]) {
        for body in due {
            let Body::StepStarted { step, phase: Phase::Forward, attempt, .. } = body else { continue };
            let Some((_, spec)) = self.find(step) else { continue };
            let Some(kind) = self.shared.registry.find_step(&spec.kind) else { continue };
            if let Some(cx) = self.context(step, Phase::Forward, *attempt, CancellationToken::new()) {
                let _ = kind.run(&cx, &spec.input).await;
            }
        }
    }

    /// Makes events durable and takes them in.
    async fn record(&mut self, bodies: Vec<Body>) -> Result<(), Lost> {
        let outputs: Vec<(StepName, Value)> = bodies
            .iter()
            .filter_map(Body::output)
            .map(|(step, output)| (step.clone(), output.clone()))
            .collect();
        for body in &bodies {
            if let Body::StepStarted { step, phase, .. } = body {
                self.started_in.insert((step.clone(), *phase), Arc::new(self.shared.environment.facts()));
            }
        }
        self.log.append(bodies).await?;
        for (step, output) in outputs {
            self.outputs.set(step, output);
        }
        self.told.send_replace(self.log.summary.clone());
        Ok(())
    }

    /// An input, if it may still come. One that no longer may (a late outcome, a timer of an attempt that is over)
    /// has lost its meaning and is dropped.
    async fn input(&mut self, body: Body) -> Result<(), Lost> {
        match self.log.state.admits(&body) {
            Ok(()) => self.record(vec![body]).await,
            Err(illegal) => {
                tracing::debug!(job = %self.job, %illegal, "dropped");
                Ok(())
            }
        }
    }

    async fn take(&mut self, message: Message) -> Result<(), Lost> {
        match message {
            Message::Outcome { step, phase, attempt, result } => {
                self.outcome(step, phase, attempt, result).await
            }
            Message::Stalled { step, phase, attempt } => {
                self.input(Body::StepStalled { step, phase, attempt }).await
            }
            Message::Probed { step, phase, attempt, verdict } => {
                self.probes.remove(&(step.clone(), phase));
                let verdict = self.sober(&step, phase, verdict);
                self.input(Body::StepProbed { step, phase, attempt, verdict }).await
            }
            Message::Fired(timer) => {
                self.timers.remove(&timer);
                self.input(Body::TimerFired(timer)).await
            }
            Message::Planned(planned) => {
                self.planning = false;
                self.input(match *planned {
                    Ok(plan) => Body::JobPlanned(Box::new(plan)),
                    Err(fault) => Body::JobRefused(fault),
                })
                .await
            }
            Message::Facts { before, found } => self.facts(before, found).await,
            Message::Act { mut body, reply } => {
                if let Body::PauseRequested { until, .. } = &mut *body {
                    // Meant by the wall clock, kept by the job's.
                    let left = until.duration_since(self.shared.clock.now());
                    *until = self.log.now().saturating_add(left).unwrap_or(*until);
                }
                let answer = match self.log.state.admits(&body) {
                    Ok(()) => {
                        self.record(vec![*body]).await?;
                        Ok(())
                    }
                    Err(illegal) => Err(Fault::permanent(
                        Code::INVALID_STATE,
                        "act on the job",
                        self.job.to_string(),
                        illegal.why,
                    )
                    .remedy(format!("`vmkeep job show {}` tells where it stands", self.job))),
                };
                let _ = reply.send(answer);
                Ok(())
            }
            Message::View(reply) => {
                let mut view = JobView::of(&self.log.state, self.log.summary.clone());
                for ((step, phase), live) in &self.live {
                    let amount = live.progress.amount();
                    // One that has not said anything yet shows nothing, rather than nothing of nothing.
                    if amount != crate::progress::Amount::default() {
                        view.set_progress(step, *phase, amount);
                    }
                }
                let _ = reply.send(view);
                Ok(())
            }
            Message::Drain => {
                self.draining = true;
                Ok(())
            }
        }
    }

    async fn outcome(
        &mut self,
        step: StepName,
        phase: Phase,
        attempt: u32,
        result: Result<Value, Fault>,
    ) -> Result<(), Lost> {
        let key = (step.clone(), phase);
        if let Some(live) = self.live.get_mut(&key).filter(|live| live.attempt == attempt) {
            live.returned = true;
            if let Some(token) = live.progress.token() {
                self.tokens.insert(crate::progress::row_name(&step, phase), token);
            }
        }
        match result {
            Ok(output) => self.input(Body::StepSucceeded { step, phase, attempt, output }).await,
            // An attempt that gave way because the daemon ends has failed at nothing: its start stays without an
            // outcome, and the next engine asks the world how far it came.
            Err(fault) if self.draining && fault.class == Class::Stopped => Ok(()),
            Err(fault) => self.input(Body::StepFailed { step, phase, attempt, fault }).await,
        }
    }

    /// As long as an attempt's call has not returned in this very process, "nothing there" proves nothing.
    fn sober(&self, step: &StepName, phase: Phase, verdict: Verdict) -> Verdict {
        let running = self.live.get(&(step.clone(), phase)).is_some_and(|live| !live.returned);
        match verdict {
            Verdict::NotDone | Verdict::Partial(_) if running => {
                Verdict::InFlight("the call of the attempt has not returned yet".to_owned())
            }
            other => other,
        }
    }

    async fn facts(&mut self, before: StepName, found: Result<Option<String>, Fault>) -> Result<(), Lost> {
        self.checking.remove(&before);
        let difference = match found {
            Ok(difference) => difference,
            Err(fault) if self.facts_tries < FACTS_TRIES => {
                self.facts_tries += 1;
                tracing::warn!(job = %self.job, %fault, "the facts could not be observed; trying again");
                return Ok(());
            }
            Err(fault) => Some(format!("it could not be observed: {fault}")),
        };
        self.facts_tries = 0;
        self.input(Body::FactsChecked { before, difference }).await
    }

    /// Sees to it that each command holds, and that nothing else does.
    fn hold(&mut self, commands: Vec<Command>) {
        let mut armed: HashSet<Timer> = HashSet::new();
        for command in commands {
            match command {
                Command::Record(_) => {}
                Command::Plan => self.plan(),
                Command::CheckFacts { before } => self.check(before),
                Command::Attempt { step, phase, attempt } => self.attempt(&step, phase, attempt),
                Command::Stop { step, phase, attempt } => {
                    if let Some(live) = self.live.get(&(step, phase)).filter(|live| live.attempt == attempt) {
                        live.stop.cancel();
                    }
                }
                Command::Probe { step, phase, attempt, at } => self.probe(&step, phase, attempt, at),
                Command::Arm { timer, at } => {
                    armed.insert(timer.clone());
                    self.arm(timer, at);
                }
            }
        }
        self.timers.retain(|timer, task| {
            let keep = armed.contains(timer);
            if !keep {
                task.abort();
            }
            keep
        });
    }

    fn plan(&mut self) {
        if std::mem::replace(&mut self.planning, true) {
            return;
        }
        let Some(request) = self.log.state.request().cloned() else { return };
        let (shared, job, sender) = (self.shared.clone(), self.job, self.sender.clone());
        tokio::spawn(async move {
            let planned = shared.make_plan(PlanContext { job, request, dry_run: false }).await;
            let _ = sender.send(Message::Planned(Box::new(planned)));
        });
    }

    fn check(&mut self, before: StepName) {
        if self.draining || !self.checking.insert(before.clone()) {
            return;
        }
        let Some(plan) = self.log.state.plan().cloned() else { return };
        let Some(workflow) = self.shared.registry.find_workflow(&plan.plan.workflow) else {
            let fault = Fault::permanent(
                Code::UNKNOWN_STEP_KIND,
                "check the facts",
                before.to_string(),
                "unknown workflow",
            );
            let _ = self.sender.send(Message::Facts { before, found: Err(fault) });
            return;
        };
        let (outputs, sender, clock) = (self.outputs.clone(), self.sender.clone(), self.shared.clock.clone());
        let wait = Duration::from_millis(200 * u64::from(self.facts_tries));
        tokio::spawn(async move {
            if !wait.is_zero() {
                clock.sleep(wait).await;
            }
            let found = workflow.check_facts(&plan.plan, &before, &outputs).await;
            let _ = sender.send(Message::Facts { before, found });
        });
    }

    fn attempt(&mut self, step: &StepName, phase: Phase, attempt: u32) {
        let key = (step.clone(), phase);
        if self.live.get(&key).is_some_and(|live| live.attempt == attempt) {
            return;
        }
        let Some((place, spec)) = self.find(step) else { return };
        let stop = CancellationToken::new();
        let Some(cx) = self.context(step, phase, attempt, stop.clone()) else { return };
        let output = self.log.state.cells()[place].output.clone();
        self.live.insert(key, Live { attempt, stop, returned: false, progress: cx.progress.clone() });
        let running = attempt::Running::new(&self.log.running);
        attempt::launch(&self.shared, &spec, cx, output, running, self.sender.clone());
    }

    fn probe(&mut self, step: &StepName, phase: Phase, attempt: u32, at: Option<jiff::Timestamp>) {
        let key = (step.clone(), phase);
        if self.probes.contains_key(&key) || self.draining {
            return;
        }
        let Some((place, spec)) = self.find(step) else { return };
        let Some(mut cx) = self.context(step, phase, attempt, CancellationToken::new()) else { return };
        cx.still_running = self.live.get(&key).is_some_and(|live| !live.returned);
        let output = self.log.state.cells()[place].output.clone();
        let wait = at.map_or(Duration::ZERO, |at| self.until(at));
        self.probes.insert(key, attempt::probe(&self.shared, &spec, cx, output, wait, self.sender.clone()));
    }

    fn context(
        &self,
        step: &StepName,
        phase: Phase,
        attempt: u32,
        stop: CancellationToken,
    ) -> Option<StepContext> {
        let key = (step.clone(), phase);
        let token = |of| self.tokens.get(&crate::progress::row_name(step, of)).cloned();
        let left = match phase {
            Phase::Forward => None,
            Phase::Undo => token(Phase::Forward).map(|token| token.value),
        };
        let token = token(phase);
        let resume = self.resume(step, phase);
        Some(StepContext {
            job: self.job,
            step: step.clone(),
            phase,
            attempt,
            resume,
            request: self.log.state.request()?.clone(),
            facts: Arc::new(self.log.state.plan()?.plan.facts.clone()),
            outputs: self.outputs.clone(),
            stop,
            started_in: self.started_in.get(&key).cloned().unwrap_or_default(),
            still_running: false,
            progress: Progress::new(self.shared.store.clone(), self.job, step, phase, attempt, token),
            left,
        })
    }

    /// The token that the attempt under way was started with.
    fn resume(&self, step: &StepName, phase: Phase) -> Option<Value> {
        let place = self.log.state.plan()?.place(step)?;
        match &self.log.state.track(place, phase).run {
            Run::Running { resume, .. } => resume.clone(),
            _ => None,
        }
    }

    fn arm(&mut self, timer: Timer, at: jiff::Timestamp) {
        if self.timers.contains_key(&timer) || (self.draining && !self.log.state.holds_guest()) {
            return;
        }
        let (sender, clock, wait) = (self.sender.clone(), self.shared.clock.clone(), self.until(at));
        let fired = timer.clone();
        let task = tokio::spawn(async move {
            clock.sleep(wait).await;
            let _ = sender.send(Message::Fired(fired));
        });
        self.timers.insert(timer, task.abort_handle());
    }

    /// The wait until an instant of the job.
    fn until(&self, at: jiff::Timestamp) -> Duration {
        Duration::try_from(at.duration_since(self.log.now())).unwrap_or(Duration::ZERO)
    }

    fn find(&self, step: &StepName) -> Option<(usize, crate::plan::StepSpec)> {
        let plan = self.log.state.plan()?;
        let place = plan.place(step)?;
        Some((place, plan.step(place).clone()))
    }

    fn stop_all(&mut self) {
        self.live.values().for_each(|live| live.stop.cancel());
        self.probes.drain().for_each(|(_, task)| task.abort());
        self.timers.drain().for_each(|(_, task)| task.abort());
    }
}

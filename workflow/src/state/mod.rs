//! The fold: what a job's events mean.
//!
//! [`State::apply`] is the only place that knows which event may follow which. Live execution and recovery go through
//! it alike: the engine applies an event exactly when the store has acknowledged it, and recovery applies the stored
//! events in order. There is no second table of legal transitions that could disagree with the first.
//!
//! A job moves through these modes; each is derived from what happened and stored nowhere:
//!
//! ```text
//! queued ── planned ──> forward ── every step done ─────────────────────────> succeeded
//!    │                    │  failure, cancel, stuck step
//!    │ refused            v
//!    v                 settling ── nothing under way ──> unwinding ── all undone ──> rolled back
//!  refused                │ something stuck                 │ an undo failed
//!                         └────────> needs attention <──────┘
//! ```
//!
//! Past the point of no return there is no settling: the other steps go on, and what failed needs attention.
//!
//! The fold keeps sets of the steps that may start and of those under way, so that each event costs what it touches
//! and not what the plan holds.

mod run;
mod unwind;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::event::{Actor, Body, Cause, Event, Item, JobRequest, Settle, Timer};
use crate::fault::{Class, Code, Fault};
use crate::ids::{Phase, Seq, StepName};
use crate::plan::{Compiled, Plan, StepSpec};

pub use run::{Run, Track};
pub(crate) use unwind::Unwind;

/// How often a plan may be made anew before anything is touched.
const REPLANS: u32 = 1;

/// An event that may not follow what came before it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("event {seq} ({event}) may not follow: {why}")]
pub struct Illegal {
    /// The place at which the event would stand.
    pub seq: Seq,
    /// Its type.
    pub event: &'static str,
    /// Why not.
    pub why: String,
}

/// Where a job stands as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No event yet.
    New,
    /// Asked for, not planned.
    Queued,
    /// Steps are carried out.
    Forward,
    /// Nothing new starts; what is under way comes to rest.
    Settling,
    /// What was done is taken back.
    Unwinding,
    /// Waits for an operator.
    Attention,
    /// Has ended.
    Ended,
}

/// What one step has come to.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The step itself.
    pub forward: Track,
    /// Its undo.
    pub undo: Track,
    /// Its output, once it succeeded.
    pub output: Option<Arc<Value>>,
    waits_for: usize,
    facts_asserted: bool,
    ready_at: Option<Timestamp>,
}

/// A pause that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Who.
    pub by: Actor,
    /// When it ends by itself.
    pub until: Timestamp,
}

/// The state of a job: the fold of its events.
#[derive(Clone, Debug, Default)]
pub struct State {
    seq: Seq,
    now: Option<Timestamp>,
    request: Option<Arc<JobRequest>>,
    plan: Option<Arc<Compiled>>,
    plans: u32,
    plan_wanted: bool,
    cells: Vec<Cell>,
    ready: BTreeSet<usize>,
    active: BTreeSet<(usize, Phase)>,
    broken: BTreeSet<(usize, Phase)>,
    started: usize,
    done: usize,
    cause: Option<Cause>,
    cancel: Option<Actor>,
    unwind: Option<Unwind>,
    attention: bool,
    ended: bool,
    pause: Option<Pause>,
    signals: BTreeMap<String, (Value, Actor)>,
}

impl State {
    /// The state before the first event.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Folds a whole history.
    ///
    /// # Errors
    /// Names the first event that may not follow those before it.
    pub fn fold<'a>(events: impl IntoIterator<Item = &'a Event>) -> Result<Self, Illegal> {
        let mut state = Self::new();
        for event in events {
            state.apply(event)?;
        }
        Ok(state)
    }

    /// Takes one more event in.
    ///
    /// # Errors
    /// When it may not follow; the state is then unchanged.
    pub fn apply(&mut self, event: &Event) -> Result<(), Illegal> {
        let seq = self.seq.next();
        self.admits(&event.body)?;
        self.seq = seq;
        self.now = Some(event.at);
        self.take(&event.body, event.at);
        self.reconsider();
        Ok(())
    }

    /// Whether an event may come next, by the mode alone and by the step it names.
    fn admit(&self, body: &Body) -> Result<(), String> {
        let mode = self.mode();
        match (mode, body) {
            (Mode::Ended, _) => return Err("the job has ended".to_owned()),
            (Mode::New, Body::JobRequested(_)) => return Ok(()),
            (Mode::New, _) => return Err("the first event must be a request".to_owned()),
            (_, Body::JobRequested(_)) => return Err("the job was requested before".to_owned()),
            _ => {}
        }
        match body {
            Body::JobPlanned(plan) => {
                if !self.plan_wanted || self.started > 0 {
                    return Err("no plan is wanted".to_owned());
                }
                plan.clone().compile().map(|_| ()).map_err(|e| e.to_string())
            }
            Body::JobRefused(_) if self.plan_wanted && self.started == 0 => Ok(()),
            Body::JobRefused(_) => Err("the job is planned".to_owned()),
            Body::FactsChecked { before, .. } => {
                let place = self.find(before)?;
                if self.ready.contains(&place) || matches!(self.cells[place].forward.run, Run::Cleared { .. })
                {
                    Ok(())
                } else {
                    Err(format!("step {before} is not about to start"))
                }
            }
            Body::StepStarted { step, phase, attempt, .. } => {
                self.admit_start(self.find(step)?, *phase, *attempt)
            }
            Body::StepSucceeded { step, phase, attempt, .. }
            | Body::StepFailed { step, phase, attempt, .. }
            | Body::StepStalled { step, phase, attempt }
            | Body::StepProbed { step, phase, attempt, .. } => {
                let place = self.find(step)?;
                let track = self.track(place, *phase);
                if !self.active.contains(&(place, *phase))
                    || !track.run.under_way()
                    || track.attempts != *attempt
                {
                    return Err(format!("attempt {attempt} of step {step} is not under way"));
                }
                Ok(())
            }
            Body::RetryScheduled { step, phase, attempt, .. } => {
                let track = self.track(self.find(step)?, *phase);
                match track.run {
                    Run::Faulted { .. } if track.attempts + 1 == *attempt => Ok(()),
                    _ => Err(format!("step {step} has no failed attempt to repeat")),
                }
            }
            Body::SignalAwaited { step, .. } => {
                let place = self.find(step)?;
                if self.ready.contains(&place) && self.spec(place).signal.is_some() {
                    Ok(())
                } else {
                    Err(format!("step {step} does not wait for a signal now"))
                }
            }
            Body::TimerFired(Timer::Retry { step, phase, attempt }) => {
                match self.track(self.find(step)?, *phase).run {
                    Run::Waiting { attempt: next, .. } if next == *attempt => Ok(()),
                    _ => Err(format!("step {step} does not wait to be repeated")),
                }
            }
            Body::TimerFired(Timer::Deadline { step, phase, attempt }) => {
                let track = self.track(self.find(step)?, *phase);
                match track.run {
                    Run::Running { .. } if track.attempts == *attempt => Ok(()),
                    _ => Err(format!("attempt {attempt} of step {step} is not running")),
                }
            }
            Body::TimerFired(Timer::Signal { step }) => {
                match self.track(self.find(step)?, Phase::Forward).run {
                    Run::Awaiting { .. } => Ok(()),
                    _ => Err(format!("step {step} does not wait for a signal")),
                }
            }
            Body::TimerFired(Timer::Pause) | Body::ResumeRequested(_) if self.pause.is_none() => {
                Err("the job is not paused".to_owned())
            }
            Body::SettleRequested { .. } if mode != Mode::Attention => {
                Err("the job does not need attention".to_owned())
            }
            Body::JobAbandoned { .. } if mode != Mode::Attention => {
                Err("only a job that needs attention can be given up; cancel it instead".to_owned())
            }
            Body::UnwindBegan(_) if mode != Mode::Settling || !self.at_rest() || self.stuck() => {
                Err("the job is not ready to roll back".to_owned())
            }
            Body::JobNeedsAttention(items) if mode == Mode::Attention || items.is_empty() => {
                Err("nothing needs attention".to_owned())
            }
            Body::JobSucceeded
                if mode != Mode::Forward || self.done != self.cells.len() || self.plan.is_none() =>
            {
                Err("not every step has succeeded".to_owned())
            }
            Body::JobRolledBack(_) if !self.rolled_back() => Err("not everything is undone".to_owned()),
            _ => Ok(()),
        }
    }

    fn admit_start(&self, place: usize, phase: Phase, attempt: u32) -> Result<(), String> {
        let name = &self.spec(place).name;
        let track = self.track(place, phase);
        if track.attempts + 1 != attempt {
            return Err(format!("step {name} has had {} attempts, {attempt} cannot be next", track.attempts));
        }
        let may = match (phase, &track.run) {
            (_, Run::Cleared { .. }) => true,
            (Phase::Forward, Run::Idle) => self.ready.contains(&place) || self.closer_may_start(place),
            (Phase::Undo, Run::Idle) => {
                self.unwind.as_ref().is_some_and(|unwind| unwind.ready.contains(&place))
            }
            _ => false,
        };
        if may { Ok(()) } else { Err(format!("step {name} may not start")) }
    }

    fn take(&mut self, body: &Body, at: Timestamp) {
        match body {
            Body::JobRequested(request) => {
                self.request = Some(Arc::new(request.clone()));
                self.plan_wanted = true;
            }
            Body::JobPlanned(plan) => self.take_plan(plan, at),
            Body::JobRefused(_) | Body::JobAbandoned { .. } | Body::JobSucceeded | Body::JobRolledBack(_) => {
                self.ended = true;
            }
            Body::FactsChecked { before, difference } => self.take_facts(before, difference.as_deref()),
            Body::StepStarted { step, phase, attempt, resume } => {
                if let Some(place) = self.place(step) {
                    self.take_start(place, *phase, *attempt, resume.clone(), at);
                }
            }
            Body::StepSucceeded { step, phase, output, .. } => {
                if let Some(place) = self.place(step) {
                    self.take_done(place, *phase, output, at);
                }
            }
            Body::StepFailed { step, phase, fault, .. } => {
                if let Some(place) = self.place(step) {
                    self.take_fault(place, *phase, fault, at);
                }
            }
            Body::StepStalled { step, phase, .. } => {
                if let Some(place) = self.place(step) {
                    let limit = self.spec(place).stall.map_or(0, |s| s.0);
                    self.doubt(
                        place,
                        *phase,
                        Some(overdue(Code::STEP_STALLED, self.spec(place), "no progress for", limit)),
                    );
                }
            }
            Body::StepProbed { step, phase, verdict, .. } => {
                if let Some(place) = self.place(step) {
                    self.take_verdict(place, *phase, verdict, at);
                }
            }
            Body::RetryScheduled { step, phase, attempt, at } => {
                if let Some(place) = self.place(step) {
                    self.track_mut(place, *phase).run = Run::Waiting { attempt: *attempt, at: *at };
                }
            }
            Body::SignalAwaited { step, until } => {
                if let Some(place) = self.place(step) {
                    self.take_await(place, *until, at);
                }
            }
            Body::TimerFired(timer) => self.take_timer(timer, at),
            Body::SignalReceived { name, value, by } => self.take_signal(name, value, by, at),
            Body::JobRecovered => self.take_recovery(),
            Body::CancelRequested(by) => {
                self.cancel.get_or_insert_with(|| by.clone());
            }
            Body::PauseRequested { by, until } => self.pause = Some(Pause { by: by.clone(), until: *until }),
            Body::ResumeRequested(_) => self.pause = None,
            Body::SettleRequested { by, how } => self.take_settle(by, *how),
            Body::Intervened { .. } => {}
            Body::UnwindBegan(_) => self.begin_unwind(),
            Body::JobNeedsAttention(_) => self.attention = true,
        }
    }

    fn take_plan(&mut self, plan: &Plan, at: Timestamp) {
        // Admission has compiled it before; a plan that does not compile never gets here.
        let Ok(compiled) = plan.clone().compile() else { return };
        self.plans += 1;
        self.plan_wanted = false;
        self.cells = (0..compiled.len())
            .map(|place| Cell {
                forward: Track::default(),
                undo: Track::default(),
                output: None,
                waits_for: compiled.dependencies(place).len(),
                facts_asserted: false,
                ready_at: Some(at),
            })
            .collect();
        self.ready = (0..compiled.len()).filter(|&place| self.cells[place].waits_for == 0).collect();
        self.plan = Some(Arc::new(compiled));
    }

    fn take_facts(&mut self, before: &StepName, difference: Option<&str>) {
        let Some(place) = self.place(before) else { return };
        let Some(difference) = difference else {
            self.cells[place].facts_asserted = true;
            return;
        };
        if self.started == 0 && self.plans <= REPLANS {
            self.plan_wanted = true;
            self.ready.clear();
            return;
        }
        let spec = self.spec(place);
        let fault = Fault::permanent(
            Code::FACTS_CHANGED,
            format!("start the step \"{}\"", spec.title),
            spec.name.to_string(),
            format!("the world is no longer as it was when the job was planned: {difference}"),
        )
        .remedy("Nothing of this step was done. Look at what was changed, then ask for the job again");
        self.ready.remove(&place);
        self.active.remove(&(place, Phase::Forward));
        self.fail(place, Phase::Forward, fault);
    }

    fn take_await(&mut self, place: usize, until: Timestamp, at: Timestamp) {
        self.ready.remove(&place);
        self.active.insert((place, Phase::Forward));
        self.started += 1;
        self.cells[place].forward.attempts += 1;
        self.cells[place].forward.run = Run::Awaiting { until };
        let early =
            self.spec(place).signal.as_ref().and_then(|signal| self.signals.get(&signal.name).cloned());
        if let Some((value, by)) = early {
            self.answer(place, &value, Some(&by), at);
        }
    }

    fn take_signal(&mut self, name: &str, value: &Value, by: &Actor, at: Timestamp) {
        self.signals.insert(name.to_owned(), (value.clone(), by.clone()));
        let waiting: Vec<usize> = self
            .active
            .iter()
            .filter(|(place, phase)| {
                *phase == Phase::Forward
                    && matches!(self.cells[*place].forward.run, Run::Awaiting { .. })
                    && self.spec(*place).signal.as_ref().is_some_and(|signal| signal.name == name)
            })
            .map(|(place, _)| *place)
            .collect();
        for place in waiting {
            self.answer(place, value, Some(by), at);
        }
    }

    fn answer(&mut self, place: usize, value: &Value, by: Option<&Actor>, at: Timestamp) {
        let output = json!({ "value": value, "by": by, "timed_out": by.is_none() });
        self.take_done(place, Phase::Forward, &output, at);
    }

    fn take_timer(&mut self, timer: &Timer, at: Timestamp) {
        match timer {
            Timer::Retry { step, phase, .. } => {
                if let Some(place) = self.place(step) {
                    self.doubt(place, *phase, None);
                }
            }
            Timer::Deadline { step, phase, .. } => {
                if let Some(place) = self.place(step) {
                    let spec = self.spec(place);
                    let limit = match phase {
                        Phase::Forward => spec.deadline,
                        Phase::Undo => spec.undo.and_then(|undo| undo.deadline),
                    };
                    let fault =
                        overdue(Code::STEP_DEADLINE, spec, "not finished after", limit.map_or(0, |l| l.0));
                    self.doubt(place, *phase, Some(fault));
                }
            }
            Timer::Signal { step } => {
                if let Some(place) = self.place(step) {
                    let value =
                        self.spec(place).signal.as_ref().map_or(Value::Null, |signal| signal.default.clone());
                    self.answer(place, &value, None, at);
                }
            }
            Timer::Pause => self.pause = None,
        }
    }

    /// A new engine has taken over: whatever was running was cut off, and the time that probes may take counts anew.
    fn take_recovery(&mut self) {
        for (place, phase) in self.active.clone() {
            match &mut self.track_mut(place, phase).run {
                Run::Running { .. } => self.doubt(place, phase, None),
                Run::Doubtful(doubt) => doubt.start_over(),
                _ => {}
            }
        }
        for cell in &mut self.cells {
            cell.facts_asserted = false;
        }
    }

    fn take_settle(&mut self, by: &Actor, how: Settle) {
        self.attention = false;
        for (place, phase) in std::mem::take(&mut self.broken) {
            let track = self.track_mut(place, phase);
            track.tries = 0;
            let stuck = matches!(track.run, Run::Stuck(_));
            if how == Settle::Undo
                && !self.passed()
                && self.unwind.is_none()
                && phase == Phase::Forward
                && !stuck
            {
                continue;
            }
            if track_started(self.track(place, phase)) {
                self.active.insert((place, phase));
                self.doubt(place, phase, None);
            } else {
                self.track_mut(place, phase).run = Run::Idle;
                if phase == Phase::Forward && self.unwind.is_none() {
                    self.ready.insert(place);
                }
            }
        }
        if how == Settle::Undo && !self.passed() && self.unwind.is_none() {
            self.stop_for(Cause::Settled(by.clone()));
        }
    }

    /// The consequences that follow from the state alone, after every event.
    fn reconsider(&mut self) {
        if let Some(by) = &self.cancel
            && self.cause.is_none()
            && self.unwind.is_none()
            && !self.passed()
            && !self.ended
        {
            self.stop_for(Cause::Cancel(by.clone()));
        }
    }

    /// From here on nothing new starts, and what only waits comes to rest at once.
    fn stop_for(&mut self, cause: Cause) {
        self.cause.get_or_insert(cause);
        self.plan_wanted = false;
        let waiting: Vec<_> =
            self.active.iter().copied().filter(|&(place, phase)| self.parked(place, phase)).collect();
        for (place, phase) in waiting {
            self.active.remove(&(place, phase));
            self.track_mut(place, phase).run = Run::Stopped;
        }
    }

    // ---- what others may ask ----

    /// Where the job stands as a whole.
    #[must_use]
    pub fn mode(&self) -> Mode {
        if self.ended {
            Mode::Ended
        } else if self.attention {
            Mode::Attention
        } else if self.unwind.is_some() {
            Mode::Unwinding
        } else if self.cause.is_some() || self.stuck() {
            Mode::Settling
        } else if self.plan.is_some() && !self.plan_wanted {
            Mode::Forward
        } else if self.request.is_some() {
            Mode::Queued
        } else {
            Mode::New
        }
    }

    /// The last event's place.
    #[must_use]
    pub fn seq(&self) -> Seq {
        self.seq
    }

    /// The last event's instant.
    #[must_use]
    pub fn now(&self) -> Option<Timestamp> {
        self.now
    }

    /// What was asked for.
    #[must_use]
    pub fn request(&self) -> Option<&Arc<JobRequest>> {
        self.request.as_ref()
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> Option<&Arc<Compiled>> {
        self.plan.as_ref()
    }

    /// What each step has come to, in the plan's order.
    #[must_use]
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// The pause in force.
    #[must_use]
    pub fn paused(&self) -> Option<&Pause> {
        self.pause.as_ref()
    }

    /// Why the job rolls back.
    #[must_use]
    pub fn cause(&self) -> Option<&Cause> {
        self.cause.as_ref()
    }

    /// Somebody asked to cancel when it was too late.
    #[must_use]
    pub fn cancelled_too_late(&self) -> Option<&Actor> {
        self.cancel.as_ref().filter(|_| self.cause.is_none())
    }

    /// Whether the job only goes forward: the point of no return was started and is not known to have had no effect.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.plan.as_ref().and_then(|plan| plan.barrier()).is_some_and(|barrier| {
            let track = &self.cells[barrier].forward;
            track_started(track) && !track.absent
        })
    }

    /// Whether a critical section is open: the job is not in a safe place.
    #[must_use]
    pub fn critical(&self) -> bool {
        let Some(plan) = &self.plan else { return false };
        self.cells.iter().enumerate().any(|(place, cell)| {
            plan.step(place).critical
                && track_started(&cell.forward)
                && plan.closers(place).iter().any(|&closer| !self.cells[closer].forward.run.is_done())
        })
    }

    /// Whether the job holds the guest: an opener was started and a closer that sets the guest free is still to come.
    /// In such a section the engine does not stop either.
    #[must_use]
    pub fn holds_guest(&self) -> bool {
        let Some(plan) = &self.plan else { return false };
        self.cells.iter().enumerate().any(|(place, cell)| {
            track_started(&cell.forward)
                && plan
                    .closers(place)
                    .iter()
                    .any(|&closer| plan.step(closer).safety && !self.cells[closer].forward.run.is_done())
        })
    }

    /// What the job waits for an operator to settle.
    #[must_use]
    pub fn items(&self) -> Vec<Item> {
        self.broken
            .iter()
            .filter_map(|&(place, phase)| {
                let fault = self.track(place, phase).run.fault()?.clone();
                Some(Item { step: self.spec(place).name.clone(), phase, fault })
            })
            .collect()
    }

    pub(crate) fn ready(&self) -> impl Iterator<Item = usize> + '_ {
        self.ready.iter().copied()
    }

    pub(crate) fn active(&self) -> impl Iterator<Item = (usize, Phase)> + '_ {
        self.active.iter().copied()
    }

    /// When a step's last predecessor succeeded.
    pub(crate) fn ready_at(&self, place: usize) -> Timestamp {
        self.cells[place].ready_at.unwrap_or(Timestamp::UNIX_EPOCH)
    }

    pub(crate) fn under_way(&self) -> usize {
        self.active.len()
    }

    pub(crate) fn unwinding(&self) -> Option<&Unwind> {
        self.unwind.as_ref()
    }

    pub(crate) fn plan_wanted(&self) -> bool {
        self.plan_wanted
    }

    pub(crate) fn facts_wanted(&self, place: usize) -> bool {
        let partial = matches!(self.cells[place].forward.run, Run::Cleared { resume: Some(_) });
        self.spec(place).check_facts && !self.cells[place].facts_asserted && !partial && self.unwind.is_none()
    }

    pub(crate) fn all_done(&self) -> bool {
        self.plan.is_some() && !self.plan_wanted && self.done == self.cells.len()
    }

    /// Whether nothing is under way that could still change the world.
    pub(crate) fn at_rest(&self) -> bool {
        match self.mode() {
            Mode::Settling | Mode::Attention => {
                self.active.iter().all(|&(place, phase)| self.parked(place, phase))
            }
            _ => self.active.is_empty(),
        }
    }

    /// Whether a step only waits, and may be left waiting while the job comes to rest. One that sets the guest free
    /// is not left: it goes on until it is done.
    pub(crate) fn parked(&self, place: usize, phase: Phase) -> bool {
        self.track(place, phase).run.only_waits() && !self.spec(place).safety
    }

    /// An event's admission, without taking it in.
    ///
    /// # Errors
    /// When the event may not come next.
    pub fn admits(&self, body: &Body) -> Result<(), Illegal> {
        self.admit(body).map_err(|why| Illegal { seq: self.seq.next(), event: body.type_name(), why })
    }

    pub(crate) fn broken(&self) -> bool {
        !self.broken.is_empty()
    }

    /// Whether a step's effect could not be settled.
    pub(crate) fn stuck(&self) -> bool {
        self.broken.iter().any(|&(place, phase)| matches!(self.track(place, phase).run, Run::Stuck(_)))
            && self.unwind.is_none()
            && !self.passed()
    }

    pub(crate) fn rolled_back(&self) -> bool {
        match (&self.unwind, self.mode()) {
            (Some(unwind), _) => unwind.left == 0 && self.at_rest(),
            (None, Mode::Settling) => self.started == 0 && self.at_rest() && self.cause.is_some(),
            _ => false,
        }
    }

    pub(crate) fn track(&self, place: usize, phase: Phase) -> &Track {
        match phase {
            Phase::Forward => &self.cells[place].forward,
            Phase::Undo => &self.cells[place].undo,
        }
    }

    fn track_mut(&mut self, place: usize, phase: Phase) -> &mut Track {
        match phase {
            Phase::Forward => &mut self.cells[place].forward,
            Phase::Undo => &mut self.cells[place].undo,
        }
    }

    /// The step at a place. Places come from the plan, so there is one whenever there are places.
    pub(crate) fn spec(&self, place: usize) -> &StepSpec {
        match &self.plan {
            Some(plan) => plan.step(place),
            None => unreachable!("a place without a plan"),
        }
    }

    fn place(&self, step: &StepName) -> Option<usize> {
        self.plan.as_ref()?.place(step)
    }

    fn find(&self, step: &StepName) -> Result<usize, String> {
        self.place(step).ok_or_else(|| format!("there is no step {step}"))
    }
}

pub(crate) fn track_started(track: &Track) -> bool {
    track.attempts > 0
}

fn overdue(code: Code, spec: &StepSpec, what: &str, millis: u64) -> Fault {
    Fault::permanent(
        code,
        spec.title.clone(),
        spec.name.to_string(),
        format!("{what} {} s", millis.div_ceil(1000)),
    )
    .class(Class::Transient)
    .remedy("The step is looked at and repeated by itself; if it fails again, see what slows the host down")
}

#[cfg(test)]
mod tests;

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

mod admit;
mod query;
mod run;
mod unwind;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::event::{Actor, Body, Cause, Event, JobRequest, Settle, Timer};
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
    /// When its first attempt, or its waiting, began.
    pub began: Option<Timestamp>,
    /// When it succeeded.
    pub ended: Option<Timestamp>,
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
                began: None,
                ended: None,
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
        self.cells[place].began = Some(at);
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

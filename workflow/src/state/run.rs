//! What one step has come to: its attempts, outcomes and doubts, forward or undo.

use jiff::Timestamp;
use serde_json::Value;

use super::State;
use crate::event::{Cause, Verdict};
use crate::fault::{Class, Code, Fault};
use crate::ids::Phase;
use crate::plan::Retry;

/// A step, or its undo, over all its attempts.
#[derive(Clone, Debug, Default)]
pub struct Track {
    /// Where it stands.
    pub run: Run,
    /// The number of the last attempt; 0 when there was none.
    pub attempts: u32,
    /// The failure of the last attempt that failed.
    pub fault: Option<Fault>,
    /// Failures that count against the retry policy.
    pub(super) tries: u32,
    /// A probe has found that the last attempt had no effect, and none has started since.
    pub(super) absent: bool,
}

/// Where a step stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Run {
    /// Not started.
    #[default]
    Idle,
    /// An attempt is under way since that instant.
    Running {
        /// When it began.
        since: Timestamp,
        /// Where it goes on from.
        resume: Option<Value>,
    },
    /// It is not known whether the last attempt took effect; the world is being asked.
    Doubtful(Doubt),
    /// The last attempt failed and may be repeated.
    Faulted {
        /// When it failed.
        at: Timestamp,
    },
    /// The next attempt waits for its instant.
    Waiting {
        /// Its number.
        attempt: u32,
        /// When.
        at: Timestamp,
    },
    /// The world was asked, and a further attempt may begin.
    Cleared {
        /// Where it goes on.
        resume: Option<Value>,
    },
    /// Waits for a signal.
    Awaiting {
        /// At most until then.
        until: Timestamp,
    },
    /// Took effect.
    Done,
    /// Failed for good.
    Failed(Fault),
    /// Its effect cannot be settled without an operator.
    Stuck(Fault),
    /// Came to rest unfinished because the job rolls back.
    Stopped,
}

impl Run {
    /// Whether it took effect.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done)
    }

    /// The failure that it ended with.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Failed(fault) | Self::Stuck(fault) => Some(fault),
            _ => None,
        }
    }

    /// Whether an attempt may still report an outcome, or be probed.
    pub(super) fn under_way(&self) -> bool {
        matches!(self, Self::Running { .. } | Self::Doubtful(_))
    }

    /// Whether nothing of it is under way although it is not settled.
    pub(super) fn only_waits(&self) -> bool {
        matches!(
            self,
            Self::Faulted { .. } | Self::Waiting { .. } | Self::Cleared { .. } | Self::Awaiting { .. }
        )
    }
}

/// A doubt about an attempt's effect, and what probes have said so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Doubt {
    /// When the first probe gave no clear answer.
    pub since: Option<Timestamp>,
    /// When the last one did.
    pub last: Option<Timestamp>,
    /// How many there were.
    pub seen: u32,
    /// The failure that the attempt ends with if it turns out to have had no effect.
    pub fault: Option<Fault>,
}

impl Doubt {
    pub(super) fn start_over(&mut self) {
        self.since = None;
        self.last = None;
        self.seen = 0;
    }
}

impl State {
    pub(super) fn take_start(
        &mut self,
        place: usize,
        phase: Phase,
        attempt: u32,
        resume: Option<Value>,
        at: Timestamp,
    ) {
        if phase == Phase::Forward {
            if attempt == 1 {
                self.started += 1;
            }
            self.ready.remove(&place);
            self.cells[place].facts_asserted = false;
            self.cells[place].began.get_or_insert(at);
        } else if let Some(unwind) = &mut self.unwind {
            unwind.ready.remove(&place);
        }
        self.active.insert((place, phase));
        let track = self.track_mut(place, phase);
        track.attempts = attempt;
        track.absent = false;
        track.run = Run::Running { since: at, resume };
    }

    pub(super) fn take_done(&mut self, place: usize, phase: Phase, output: &Value, at: Timestamp) {
        self.active.remove(&(place, phase));
        let track = self.track_mut(place, phase);
        track.run = Run::Done;
        track.fault = None;
        match phase {
            Phase::Forward => {
                self.done += 1;
                self.cells[place].ended = Some(at);
                self.cells[place].output = Some(std::sync::Arc::new(output.clone()));
                if self.unwind.is_some() {
                    self.closer_done(place);
                } else {
                    self.release_dependents(place, at);
                }
            }
            Phase::Undo => self.undone(place),
        }
    }

    fn release_dependents(&mut self, place: usize, at: Timestamp) {
        let Some(plan) = self.plan.clone() else { return };
        for &next in plan.dependents(place) {
            let cell = &mut self.cells[next];
            cell.waits_for = cell.waits_for.saturating_sub(1);
            if cell.waits_for == 0 && cell.forward.run == Run::Idle {
                cell.ready_at = Some(at);
                self.ready.insert(next);
            }
        }
    }

    pub(super) fn take_fault(&mut self, place: usize, phase: Phase, fault: &Fault, at: Timestamp) {
        // Guards against counting one attempt's deadline and its late failure twice.
        let counted = matches!(&self.track(place, phase).run, Run::Doubtful(doubt) if doubt.fault.is_some());
        let track = self.track_mut(place, phase);
        track.fault = Some(fault.clone());
        if !counted && fault.class != Class::Stopped {
            track.tries += 1;
        }
        let barrier =
            self.plan.as_ref().and_then(|plan| plan.barrier()) == Some(place) && phase == Phase::Forward;
        match fault.class {
            Class::Fatal => self.get_stuck(place, phase, fault.clone()),
            // Whether the job may still turn back hangs on what this step did: that is looked at, never assumed.
            _ if fault.in_doubt || barrier => self.doubt(place, phase, Some(fault.clone())),
            Class::Stopped if self.coming_to_rest(place, phase) => self.come_to_rest(place, phase),
            Class::Stopped => self.doubt(place, phase, None),
            Class::Transient if self.may_repeat(place, phase) => {
                self.track_mut(place, phase).run = Run::Faulted { at };
            }
            Class::Transient | Class::Permanent => self.fail(place, phase, fault.clone()),
        }
    }

    /// Whether the retry policy allows another attempt now. While the job comes to rest nothing forward is repeated.
    fn may_repeat(&self, place: usize, phase: Phase) -> bool {
        let track = self.track(place, phase);
        !self.coming_to_rest(place, phase) && track.tries < self.policy(place, phase).attempts
    }

    /// Whether the job is about to roll back, so that this step is not carried on. A step that sets the guest free is.
    fn coming_to_rest(&self, place: usize, phase: Phase) -> bool {
        phase == Phase::Forward && self.unwind.is_none() && self.cause.is_some() && !self.spec(place).safety
    }

    pub(crate) fn policy(&self, place: usize, phase: Phase) -> Retry {
        let spec = self.spec(place);
        match phase {
            Phase::Forward => spec.retry,
            Phase::Undo => spec.undo.unwrap_or_default().retry,
        }
    }

    /// The effect of the last attempt is not known from here on. A second reason does not replace the first.
    pub(super) fn doubt(&mut self, place: usize, phase: Phase, fault: Option<Fault>) {
        self.active.insert((place, phase));
        let late = matches!(&fault, Some(f) if f.code == Code::STEP_DEADLINE || f.code == Code::STEP_STALLED);
        let track = self.track_mut(place, phase);
        if late {
            track.tries += 1;
            track.fault.clone_from(&fault);
        }
        match &mut track.run {
            Run::Doubtful(doubt) => {
                if doubt.fault.is_none() {
                    doubt.fault = fault;
                }
            }
            run => *run = Run::Doubtful(Doubt { fault, ..Doubt::default() }),
        }
    }

    pub(super) fn take_verdict(&mut self, place: usize, phase: Phase, verdict: &Verdict, at: Timestamp) {
        let fault = match &self.track(place, phase).run {
            Run::Doubtful(doubt) => doubt.fault.clone(),
            _ => None,
        };
        match verdict {
            Verdict::Done(output) => self.take_done(place, phase, output, at),
            Verdict::NotDone => {
                self.track_mut(place, phase).absent = true;
                self.clear(place, phase, None, fault);
            }
            // Null is no token: an event without one and an event with that one are the same bytes.
            Verdict::Partial(token) => {
                self.clear(place, phase, Some(token.clone()).filter(|token| !token.is_null()), fault);
            }
            Verdict::Diverged(what) => {
                let fault = self.unsettled(place, Code::EFFECT_DIVERGED, what);
                self.get_stuck(place, phase, fault);
            }
            Verdict::InFlight(what) | Verdict::Unknown(what) => {
                let limit = self.spec(place).probing.limit.span();
                let expired = match &mut self.track_mut(place, phase).run {
                    Run::Doubtful(doubt) => {
                        let since = *doubt.since.get_or_insert(at);
                        doubt.last = Some(at);
                        doubt.seen += 1;
                        at.duration_since(since) >= limit
                    }
                    _ => false,
                };
                if expired {
                    let fault = self.unsettled(place, Code::EFFECT_UNKNOWN, what);
                    self.get_stuck(place, phase, fault);
                }
            }
        }
    }

    fn unsettled(&self, place: usize, code: Code, what: &str) -> Fault {
        let spec = self.spec(place);
        Fault::permanent(code, format!("settle the step \"{}\"", spec.title), spec.name.to_string(), what)
            .class(Class::Fatal)
            .remedy("Bring the named object into order, then settle the job: it looks again and goes on from there")
    }

    /// The last attempt is over and its effect is known not to be whole.
    fn clear(&mut self, place: usize, phase: Phase, resume: Option<Value>, fault: Option<Fault>) {
        if self.coming_to_rest(place, phase) {
            match fault {
                Some(fault) => self.fail(place, phase, fault),
                None => self.come_to_rest(place, phase),
            }
            return;
        }
        match fault {
            Some(fault) if fault.class == Class::Permanent || !self.may_repeat(place, phase) => {
                self.fail(place, phase, fault);
            }
            _ => self.track_mut(place, phase).run = Run::Cleared { resume },
        }
    }

    fn come_to_rest(&mut self, place: usize, phase: Phase) {
        self.active.remove(&(place, phase));
        self.track_mut(place, phase).run = Run::Stopped;
    }

    /// Failed for good. Before the point of no return a forward failure makes the job roll back.
    pub(super) fn fail(&mut self, place: usize, phase: Phase, fault: Fault) {
        self.active.remove(&(place, phase));
        self.track_mut(place, phase).run = Run::Failed(fault.clone());
        if phase == Phase::Undo || self.unwind.is_some() || self.passed() || self.stuck() {
            self.broken.insert((place, phase));
        } else {
            self.stop_for(Cause::Failure { step: self.spec(place).name.clone(), fault });
        }
    }

    fn get_stuck(&mut self, place: usize, phase: Phase, fault: Fault) {
        self.active.remove(&(place, phase));
        self.track_mut(place, phase).run = Run::Stuck(fault);
        self.broken.insert((place, phase));
    }
}

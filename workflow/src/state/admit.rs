//! Which event may come next.

use super::{Mode, Run, State};
use crate::event::{Body, Timer};
use crate::ids::Phase;

impl State {
    /// Whether an event may come next, by the mode alone and by the step it names.
    pub(super) fn admit(&self, body: &Body) -> Result<(), String> {
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

    pub(super) fn admit_start(&self, place: usize, phase: Phase, attempt: u32) -> Result<(), String> {
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
}

//! What others may ask of a state.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Cell, Illegal, Mode, Pause, Run, State, Track, Unwind, track_started};
use crate::event::{Actor, Body, Cause, Item, JobRequest};
use crate::ids::{Phase, Seq, StepName};
use crate::plan::{Compiled, StepSpec};

impl State {
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

    /// What has to be done before the job is in a safe place again, in the plan's order. Nothing if it is in one.
    #[must_use]
    pub fn until_safe(&self) -> Vec<&StepSpec> {
        let Some(plan) = &self.plan else { return Vec::new() };
        let open = self.cells.iter().enumerate();
        let open = open.filter(|&(place, cell)| plan.step(place).critical && track_started(&cell.forward));
        let mut wanted: Vec<usize> =
            open.flat_map(|(place, _)| plan.closers(place).iter().copied()).collect();
        wanted.retain(|&closer| !self.cells[closer].forward.run.is_done());
        wanted.sort_unstable();
        wanted.dedup();
        wanted.into_iter().map(|place| plan.step(place)).collect()
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

    pub(super) fn track_mut(&mut self, place: usize, phase: Phase) -> &mut Track {
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

    pub(super) fn place(&self, step: &StepName) -> Option<usize> {
        self.plan.as_ref()?.place(step)
    }

    pub(super) fn find(&self, step: &StepName) -> Result<usize, String> {
        self.place(step).ok_or_else(|| format!("there is no step {step}"))
    }
}

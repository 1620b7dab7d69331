//! Rolling back: which undo and which closer may run when.
//!
//! When a job unwinds, every step that was ever started is undone, in the reverse order of the plan, also those that
//! failed: a failed step may have left something. Closers are not undone. Those whose opener was started and which
//! have not succeeded are *run*: they do not wait for undos, only for one another in the plan's order (thaw before
//! merge), because everything that depends on the opener has already come to rest. Within one opener a closer needs
//! those before it to have succeeded (no pivot without a finished commit); across openers it needs them settled, so
//! that a thaw that failed does not keep a merge from running. An opener is undone after its closers have succeeded.

use std::collections::BTreeSet;

use super::{Run, State, track_started};
use crate::ids::Phase;

/// The bookkeeping of a rollback.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unwind {
    /// Steps whose undo may start.
    pub(crate) ready: BTreeSet<usize>,
    /// Closers that are to be run, each with the closers that come before it.
    pub(crate) closing: Vec<(usize, Vec<usize>)>,
    /// For each step, how much must happen before it may be undone.
    blockers: Vec<usize>,
    /// For each step, the steps that wait for its undo.
    releases: Vec<Vec<usize>>,
    /// How many steps are not yet undone.
    pub(crate) left: usize,
}

impl State {
    pub(super) fn begin_unwind(&mut self) {
        let Some(plan) = self.plan.clone() else {
            self.unwind = Some(Unwind::default());
            return;
        };
        let started: Vec<bool> = self.cells.iter().map(|cell| track_started(&cell.forward)).collect();
        let to_run: Vec<usize> = (0..plan.len())
            .filter(|&place| {
                plan.opener(place).is_some_and(|opener| started[opener])
                    && !self.cells[place].forward.run.is_done()
            })
            .collect();
        let mut involved = started;
        for &closer in &to_run {
            involved[closer] = true;
        }
        let mut blockers = vec![0; plan.len()];
        let mut releases = vec![Vec::new(); plan.len()];
        for place in (0..plan.len()).filter(|&place| involved[place]) {
            let mut after: BTreeSet<usize> = plan.dependents(place).iter().copied().collect();
            after.extend(plan.closers(place));
            for next in after.into_iter().filter(|&next| involved[next]) {
                blockers[place] += 1;
                releases[next].push(place);
            }
        }
        for &closer in &to_run {
            blockers[closer] += 1;
        }
        let closing = to_run
            .iter()
            .map(|&closer| {
                let before = plan.ancestors(closer);
                (closer, to_run.iter().copied().filter(|&other| before[other]).collect())
            })
            .collect();
        let left = involved.iter().filter(|&&involved| involved).count();
        self.unwind = Some(Unwind { ready: BTreeSet::new(), closing, blockers, releases, left });
        self.ready.clear();
        self.broken.clear();
        for closer in to_run {
            let track = &mut self.cells[closer].forward;
            track.tries = 0;
            track.run = Run::Idle;
            if track_started(track) {
                self.doubt(closer, Phase::Forward, None);
            }
        }
        let free: Vec<usize> = self
            .unwind
            .as_ref()
            .map(|unwind| {
                (0..plan.len()).filter(|&place| involved[place] && unwind.blockers[place] == 0).collect()
            })
            .unwrap_or_default();
        for place in free {
            self.may_undo(place);
        }
    }

    /// Nothing stands in the way of a step's undo any more.
    fn may_undo(&mut self, place: usize) {
        let mut free = vec![place];
        while let Some(place) = free.pop() {
            if self.spec(place).undo.is_some() && track_started(&self.cells[place].forward) {
                if let Some(unwind) = &mut self.unwind {
                    unwind.ready.insert(place);
                }
            } else {
                free.extend(self.count_undone(place));
            }
        }
    }

    /// A step is undone; returns the steps that may now be.
    fn count_undone(&mut self, place: usize) -> Vec<usize> {
        let Some(unwind) = &mut self.unwind else { return Vec::new() };
        unwind.left = unwind.left.saturating_sub(1);
        let mut free = Vec::new();
        for waiting in unwind.releases[place].clone() {
            unwind.blockers[waiting] = unwind.blockers[waiting].saturating_sub(1);
            if unwind.blockers[waiting] == 0 {
                free.push(waiting);
            }
        }
        free
    }

    pub(super) fn undone(&mut self, place: usize) {
        for free in self.count_undone(place) {
            self.may_undo(free);
        }
    }

    pub(super) fn closer_done(&mut self, place: usize) {
        let Some(unwind) = &mut self.unwind else { return };
        unwind.blockers[place] = unwind.blockers[place].saturating_sub(1);
        if unwind.blockers[place] == 0 {
            self.may_undo(place);
        }
    }

    /// Whether a closer may start outside its place in the plan: while unwinding, when the closers before it are out
    /// of the way; and, if it sets the guest free, also while another step is stuck.
    pub(crate) fn closer_may_start(&self, place: usize) -> bool {
        let Some(plan) = &self.plan else { return false };
        let Some(opener) = plan.opener(place) else { return false };
        match &self.unwind {
            Some(unwind) => {
                unwind.closing.iter().find(|(closer, _)| *closer == place).is_some_and(|(_, before)| {
                    before.iter().all(|&other| match &self.cells[other].forward.run {
                        Run::Done => true,
                        Run::Failed(_) | Run::Stuck(_) => plan.opener(other) != Some(opener),
                        _ => false,
                    })
                })
            }
            None => self.stuck() && plan.step(place).safety && track_started(&self.cells[opener].forward),
        }
    }

    /// The closers that may start now outside their place in the plan.
    pub(crate) fn closers_to_start(&self) -> Vec<usize> {
        let idle =
            |place: &usize| self.cells[*place].forward.run == Run::Idle && self.closer_may_start(*place);
        match (&self.unwind, &self.plan) {
            (Some(unwind), _) => unwind.closing.iter().map(|(closer, _)| *closer).filter(idle).collect(),
            (None, Some(plan)) if self.stuck() => (0..plan.len()).filter(idle).collect(),
            _ => Vec::new(),
        }
    }
}

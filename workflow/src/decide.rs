//! The decision rules: what happens next, as a pure function of the state.
//!
//! [`decide`] reads no clock, does no I/O and draws no numbers. What it returns is a *level*, not an edge: as long as
//! the state stays the same it returns the same commands, and the engine sees to it that each of them holds (an
//! attempt that is to be under way is started once, a timer that is to be armed is armed once). This is what makes
//! recovery the same as execution: a new engine asks the same question and gets the same answer.
//!
//! Commands that record a decision come alone: once they are in the journal the question is asked again.

use jiff::Timestamp;

use crate::event::{Body, Cause, Timer};
use crate::ids::{Phase, StepName};
use crate::plan::Millis;
use crate::state::{Mode, Run, State};

/// The version of these rules. A plan names the version that it is run by; rules that a stored history used are kept.
pub const VERSION: u32 = 1;

/// So many steps of one job are under way at once.
const PARALLEL: usize = 8;

/// Something that should hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// This decision should be in the journal.
    Record(Body),
    /// A plan should be made.
    Plan,
    /// The facts should be compared with the world before that step.
    CheckFacts {
        /// The step.
        before: StepName,
    },
    /// This attempt should be under way.
    Attempt {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt.
        attempt: u32,
    },
    /// This attempt should give way.
    Stop {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt.
        attempt: u32,
    },
    /// The world should be asked about this attempt.
    Probe {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt.
        attempt: u32,
        /// Not before this instant.
        at: Option<Timestamp>,
    },
    /// This timer should be armed.
    Arm {
        /// The timer.
        timer: Timer,
        /// Its instant.
        at: Timestamp,
    },
}

/// What should hold now.
#[must_use]
pub fn decide(state: &State) -> Vec<Command> {
    let records = records(state);
    if !records.is_empty() {
        return records.into_iter().map(Command::Record).collect();
    }
    let mut commands = Vec::new();
    if matches!(state.mode(), Mode::New | Mode::Ended) {
        return commands;
    }
    if state.mode() == Mode::Queued && state.plan_wanted() {
        commands.push(Command::Plan);
    }
    if let Some(pause) = state.paused() {
        commands.push(Command::Arm { timer: Timer::Pause, at: pause.until });
    }
    let resting = matches!(state.mode(), Mode::Settling | Mode::Attention);
    for (place, phase) in state.active().filter(|&(place, phase)| !(resting && state.parked(place, phase))) {
        follow(state, place, phase, &mut commands);
    }
    if state.mode() == Mode::Forward && may_start_steps(state) {
        let wanted = startable(state).into_iter().filter(|&(place, _)| state.facts_wanted(place));
        commands
            .extend(wanted.map(|(place, _)| Command::CheckFacts { before: state.spec(place).name.clone() }));
    }
    commands
}

/// The decisions that are due.
fn records(state: &State) -> Vec<Body> {
    match state.mode() {
        Mode::New | Mode::Queued | Mode::Attention | Mode::Ended => Vec::new(),
        Mode::Forward => forward(state),
        Mode::Settling => settling(state),
        Mode::Unwinding => unwinding(state),
    }
}

fn forward(state: &State) -> Vec<Body> {
    if state.all_done() {
        return vec![Body::JobSucceeded];
    }
    let mut due = repetitions(state);
    if may_start_steps(state) {
        let starts = startable(state).into_iter().filter(|&(place, _)| !state.facts_wanted(place));
        due.extend(starts.map(|(place, phase)| start(state, place, phase)));
    }
    if due.is_empty() && state.at_rest() && state.broken() && startable(state).is_empty() {
        due.push(Body::JobNeedsAttention(state.items()));
    }
    due
}

fn settling(state: &State) -> Vec<Body> {
    let mut due = repetitions(state);
    due.extend(state.closers_to_start().into_iter().map(|place| start(state, place, Phase::Forward)));
    let urgent = cleared(state).filter(|&(place, phase)| !state.parked(place, phase));
    due.extend(urgent.map(|(place, phase)| start(state, place, phase)));
    if !due.is_empty() || !state.at_rest() {
        return due;
    }
    if state.stuck() {
        return vec![Body::JobNeedsAttention(state.items())];
    }
    match state.cause() {
        Some(cause) if state.rolled_back() => vec![Body::JobRolledBack(cause.clone())],
        Some(cause) => vec![Body::UnwindBegan(cause.clone())],
        None => Vec::new(),
    }
}

fn unwinding(state: &State) -> Vec<Body> {
    let Some(unwind) = state.unwinding() else { return Vec::new() };
    if state.rolled_back() {
        return state.cause().map(|cause: &Cause| Body::JobRolledBack(cause.clone())).into_iter().collect();
    }
    let mut due = repetitions(state);
    due.extend(state.closers_to_start().into_iter().map(|place| start(state, place, Phase::Forward)));
    due.extend(cleared(state).map(|(place, phase)| start(state, place, phase)));
    let free = PARALLEL.saturating_sub(state.under_way());
    due.extend(unwind.ready.iter().take(free).map(|&place| start(state, place, Phase::Undo)));
    if due.is_empty() && state.at_rest() && state.broken() {
        due.push(Body::JobNeedsAttention(state.items()));
    }
    due
}

/// Whether new work may begin: not while the job is paused in a safe place.
fn may_start_steps(state: &State) -> bool {
    state.paused().is_none() || state.critical()
}

/// Steps that may start in forward mode: new ones as far as the limit allows, and repetitions.
fn startable(state: &State) -> Vec<(usize, Phase)> {
    let free = PARALLEL.saturating_sub(state.under_way());
    state.ready().take(free).map(|place| (place, Phase::Forward)).chain(cleared(state)).collect()
}

fn cleared(state: &State) -> impl Iterator<Item = (usize, Phase)> + '_ {
    state.active().filter(|&(place, phase)| matches!(state.track(place, phase).run, Run::Cleared { .. }))
}

fn start(state: &State, place: usize, phase: Phase) -> Body {
    let spec = state.spec(place);
    if phase == Phase::Forward
        && let Some(signal) = &spec.signal
    {
        let until = later(state.ready_at(place), signal.limit);
        return Body::SignalAwaited { step: spec.name.clone(), until };
    }
    let track = state.track(place, phase);
    let resume = match &track.run {
        Run::Cleared { resume } => resume.clone(),
        _ => None,
    };
    Body::StepStarted { step: spec.name.clone(), phase, attempt: track.attempts + 1, resume }
}

fn repetitions(state: &State) -> Vec<Body> {
    state
        .active()
        .filter(|&(place, phase)| !(state.mode() == Mode::Settling && state.parked(place, phase)))
        .filter_map(|(place, phase)| {
            let track = state.track(place, phase);
            let Run::Faulted { at } = &track.run else { return None };
            let attempt = track.attempts + 1;
            let wait = state.policy(place, phase).backoff(attempt);
            let step = state.spec(place).name.clone();
            Some(Body::RetryScheduled { step, phase, attempt, at: later(*at, wait) })
        })
        .collect()
}

/// What should hold for a step that is under way.
fn follow(state: &State, place: usize, phase: Phase, commands: &mut Vec<Command>) {
    let spec = state.spec(place);
    let step = spec.name.clone();
    let track = state.track(place, phase);
    let attempt = track.attempts;
    match &track.run {
        Run::Running { since, .. } => {
            commands.push(Command::Attempt { step: step.clone(), phase, attempt });
            let deadline = match phase {
                Phase::Forward => spec.deadline,
                Phase::Undo => spec.undo.and_then(|undo| undo.deadline),
            };
            if let Some(deadline) = deadline {
                let timer = Timer::Deadline { step: step.clone(), phase, attempt };
                commands.push(Command::Arm { timer, at: later(*since, deadline) });
            }
            if state.mode() == Mode::Settling && phase == Phase::Forward && !spec.safety {
                commands.push(Command::Stop { step, phase, attempt });
            }
        }
        Run::Doubtful(doubt) => {
            // An attempt that ran late gives way, so that its call returns and the probe can be certain.
            commands.push(Command::Stop { step: step.clone(), phase, attempt });
            let policy = spec.probing;
            let at = doubt.last.map(|last| {
                let doublings = doubt.seen.saturating_sub(1).min(32);
                later(last, Millis(policy.first.0.saturating_mul(1_u64 << doublings).min(policy.most.0)))
            });
            commands.push(Command::Probe { step, phase, attempt, at });
        }
        Run::Waiting { attempt, at } => {
            commands.push(Command::Arm { timer: Timer::Retry { step, phase, attempt: *attempt }, at: *at });
        }
        Run::Awaiting { until } => commands.push(Command::Arm { timer: Timer::Signal { step }, at: *until }),
        _ => {}
    }
}

fn later(at: Timestamp, wait: Millis) -> Timestamp {
    at.saturating_add(wait.span()).unwrap_or(Timestamp::MAX)
}

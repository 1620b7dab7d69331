//! A job as people look at it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::event::Actor;
use crate::fault::Fault;
use crate::ids::{Phase, StepName};
use crate::plan::Plan;
use crate::progress::Amount;
use crate::state::{Run, State, Track};
use crate::summary::JobSummary;

/// A job with its steps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobView {
    /// The job in one row.
    pub summary: JobSummary,
    /// Its plan, once there is one.
    pub plan: Option<Plan>,
    /// Its steps, in the plan's order.
    pub steps: Vec<StepView>,
    /// Why it was set aside by this engine, if it was.
    pub parked: Option<Fault>,
    /// Until when it is paused.
    pub paused_until: Option<Timestamp>,
    /// The steps, by title, that must be done before the job is in a safe place: a pause takes effect after the last of
    /// them. Empty if it is in one.
    pub safe_after: Vec<String>,
    /// Somebody asked to cancel it after the point of no return: it goes on to its end.
    pub cancelled_too_late: Option<Actor>,
    /// Its parts in the order in which they come in the plan; empty for recipes that have none.
    pub stages: Vec<StageView>,
}

/// One part of a job: the steps that the plan gives the same [`stage`](crate::StepSpec::stage).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageView {
    /// The recipe's word for it.
    pub name: String,
    /// What its steps have come to together.
    pub state: StepState,
    /// When the first of them began.
    pub began: Option<Timestamp>,
    /// When the last of them was done; for a part that was not finished, when the job ended.
    pub ended: Option<Timestamp>,
}

/// What a step has come to, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Not started.
    Pending,
    /// An attempt is under way.
    Running,
    /// The world is being asked whether it took effect.
    Probing,
    /// Waits to be repeated, or for a signal.
    Waiting,
    /// Took effect.
    Done,
    /// Failed for good.
    Failed,
    /// Cannot be settled without an operator.
    Stuck,
    /// Came to rest because the job rolls back.
    Stopped,
}

/// One step of a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepView {
    /// The step.
    pub name: StepName,
    /// `kind@version`.
    pub kind: String,
    /// One line for people.
    pub title: String,
    /// What it has come to.
    pub state: StepState,
    /// How often it was attempted.
    pub attempts: u32,
    /// Its last failure.
    pub fault: Option<Fault>,
    /// Its output.
    pub output: Option<Value>,
    /// How far it is.
    pub progress: Option<Amount>,
    /// What its undo has come to; absent while there was none.
    pub undo: Option<StepState>,
    /// The undo's last failure.
    pub undo_fault: Option<Fault>,
    /// The part of the job that it belongs to.
    pub stage: Option<String>,
    /// The signal that it waits for now, and until when.
    pub awaits: Option<(String, Timestamp)>,
}

impl JobView {
    pub(crate) fn of(state: &State, summary: JobSummary) -> Self {
        let steps = state.cells().iter().enumerate().map(|(place, cell)| {
            let spec = state.spec(place);
            StepView {
                name: spec.name.clone(),
                kind: spec.kind.to_string(),
                title: spec.title.clone(),
                state: word(&cell.forward),
                attempts: cell.forward.attempts,
                fault: fault_of(&cell.forward),
                output: cell.output.as_deref().cloned(),
                progress: None,
                undo: (cell.undo.attempts > 0).then(|| word(&cell.undo)),
                undo_fault: fault_of(&cell.undo),
                stage: spec.stage.clone(),
                awaits: match (&cell.forward.run, &spec.signal) {
                    (Run::Awaiting { until }, Some(signal)) => Some((signal.name.clone(), *until)),
                    _ => None,
                },
            }
        });
        Self {
            steps: steps.collect(),
            plan: state.plan().map(|plan| plan.plan.clone()),
            parked: None,
            paused_until: state.paused().map(|pause| pause.until),
            safe_after: state.until_safe().into_iter().map(|step| step.title.clone()).collect(),
            cancelled_too_late: state.cancelled_too_late().cloned(),
            stages: stages(state, summary.ended),
            summary,
        }
    }

    pub(crate) fn set_progress(&mut self, step: &StepName, phase: Phase, amount: Amount) {
        if let Some(view) = self.steps.iter_mut().find(|view| view.name == *step)
            && phase == Phase::Forward
        {
            view.progress = Some(amount);
        }
    }
}

/// The parts of a job, each with the span from its first step's beginning to its last one's end.
fn stages(state: &State, job_ended: Option<Timestamp>) -> Vec<StageView> {
    let mut names: Vec<&str> = Vec::new();
    for place in 0..state.cells().len() {
        if let Some(stage) = state.spec(place).stage.as_deref()
            && !names.contains(&stage)
        {
            names.push(stage);
        }
    }
    let of = |name: &str| {
        let cells: Vec<_> = state
            .cells()
            .iter()
            .enumerate()
            .filter(|(place, _)| state.spec(*place).stage.as_deref() == Some(name))
            .map(|(_, cell)| cell)
            .collect();
        let began = cells.iter().filter_map(|cell| cell.began).min();
        let done = cells.iter().all(|cell| cell.forward.run.is_done());
        let state = if done {
            StepState::Done
        } else if cells.iter().any(|cell| cell.forward.run.fault().is_some()) {
            StepState::Failed
        } else if began.is_none() {
            StepState::Pending
        } else if job_ended.is_some() {
            StepState::Stopped
        } else {
            StepState::Running
        };
        let last = cells.iter().filter_map(|cell| cell.ended).max();
        let ended = if done { last } else { began.and(job_ended) };
        StageView { name: name.to_owned(), state, began, ended }
    };
    names.into_iter().map(of).collect()
}

fn fault_of(track: &Track) -> Option<Fault> {
    track.run.fault().cloned().or_else(|| track.fault.clone())
}

fn word(track: &Track) -> StepState {
    match track.run {
        Run::Idle => StepState::Pending,
        Run::Running { .. } => StepState::Running,
        Run::Doubtful(_) => StepState::Probing,
        Run::Faulted { .. } | Run::Waiting { .. } | Run::Cleared { .. } | Run::Awaiting { .. } => {
            StepState::Waiting
        }
        Run::Done => StepState::Done,
        Run::Failed(_) => StepState::Failed,
        Run::Stuck(_) => StepState::Stuck,
        Run::Stopped => StepState::Stopped,
    }
}

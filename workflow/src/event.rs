//! Events: the immutable records of a job's journal, and the only source of truth about it.
//!
//! There are two sorts. *Inputs* tell what the world, the clock or a person did: outcomes, verdicts, timers, operator
//! acts. *Decisions* tell what the engine made of them ([`Body::is_decision`]); replaying a journal checks that each
//! decision is one that [`crate::decide`] takes in the state before it.
//!
//! The stored form is JSON: `{"v":1,"at":…,"env":{…},"body":{"type":…,"data":{…}}}`. It is never flattened or
//! untagged, so that a type that this binary does not know is recognised as such and the job is set aside unharmed.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fault::Fault;
use crate::ids::{JobId, Phase, StepName, WorkflowName};
use crate::plan::Plan;

/// The version of the stored form that this binary writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// A record of a job's journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The version of the stored form.
    pub v: u32,
    /// When it happened, by the wall clock.
    pub at: Timestamp,
    /// What the world was: boot id, hypervisor and guest process instances. Empty where it does not matter.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// What happened.
    pub body: Body,
}

impl Event {
    /// An event of the present format.
    #[must_use]
    pub fn new(at: Timestamp, env: BTreeMap<String, String>, body: Body) -> Self {
        Self { v: FORMAT, at, env, body }
    }
}

/// Who did something, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The person or program: a user name, a schedule, `vmkeepd`.
    pub who: String,
    /// The reason that was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What a job works on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Subject {
    /// The identity that is locked: a domain's UUID.
    pub id: String,
    /// The name for people.
    pub label: String,
}

/// What to do when the subject is held by another job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IfBusy {
    /// Refuse the request.
    #[default]
    Refuse,
    /// Wait for the other job to end.
    Queue,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRequest {
    /// The recipe.
    pub workflow: WorkflowName,
    /// What it is to work on.
    pub subject: Subject,
    /// The recipe's options, in its own shape.
    pub options: Value,
    /// A key that makes a repeated request harmless: the same key returns the same job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Who asked, and why.
    pub by: Actor,
    /// What to do when the subject is busy.
    #[serde(default)]
    pub if_busy: IfBusy,
    /// Names of further limits that the job counts against: a target, a vault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
    /// The job that this one repeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_of: Option<JobId>,
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verdict", content = "data", rename_all = "snake_case")]
pub enum Verdict<T = Value> {
    /// The step took effect; this is its output.
    Done(T),
    /// It did not, and can no longer do so by itself.
    NotDone,
    /// It took effect in part; the token lets a further attempt go on from there.
    Partial(Value),
    /// It is going on, or may yet begin.
    InFlight(String),
    /// The world is neither as before nor as after. Nothing is done without an operator.
    Diverged(String),
    /// It could not be learned.
    Unknown(String),
}

/// Something that will have been reached at an instant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(tag = "timer", rename_all = "snake_case")]
pub enum Timer {
    /// The wait before a further attempt is over.
    Retry {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt that may follow.
        attempt: u32,
    },
    /// An attempt ran past its deadline.
    Deadline {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt.
        attempt: u32,
    },
    /// Nobody sent the signal.
    Signal {
        /// The waiting step.
        step: StepName,
    },
    /// A pause is over.
    Pause,
}

/// How an operator settles a job that needs attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Settle {
    /// Look at the world again and go on from what is there.
    Probe,
    /// Look again, then run the failed steps anew.
    Retry,
    /// Look again, then roll back what can still be rolled back.
    Undo,
}

/// One thing that a job that needs attention waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// The step.
    pub step: StepName,
    /// Forward or undo.
    pub phase: Phase,
    /// What is wrong and what helps.
    pub fault: Fault,
}

/// Why a job unwinds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", content = "data", rename_all = "snake_case")]
pub enum Cause {
    /// A step failed.
    Failure {
        /// The first step that failed.
        step: StepName,
        /// How.
        fault: Fault,
    },
    /// Somebody cancelled the job.
    Cancel(Actor),
    /// Somebody settled a stuck job by undoing it.
    Settled(Actor),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Body {
    /// Input: a job was asked for. Always the first event.
    JobRequested(JobRequest),
    /// Input: the subject's lock is held and the plan was made (or, once, made anew before anything was touched).
    JobPlanned(Box<Plan>),
    /// Input: no plan could be made; nothing was touched.
    JobRefused(Fault),
    /// Input: the facts of the plan were compared with the world right before a step.
    FactsChecked {
        /// The step that waits for it.
        before: StepName,
        /// What differs, if anything does.
        difference: Option<String>,
    },
    /// Decision: an attempt begins. Durable before the effect.
    StepStarted {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// From 1, counted over forward and undo apart.
        attempt: u32,
        /// Where the attempt goes on, from a probe's partial verdict.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resume: Option<Value>,
    },
    /// Input: an attempt succeeded; its effect is durable.
    StepSucceeded {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt.
        attempt: u32,
        /// The step kind's output; null for an undo.
        output: Value,
    },
    /// Input: an attempt failed.
    StepFailed {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt.
        attempt: u32,
        /// How.
        fault: Fault,
    },
    /// Input: an attempt made no progress for longer than its limit.
    StepStalled {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt.
        attempt: u32,
    },
    /// Input: the world was asked whether a started step took effect.
    StepProbed {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt in question.
        attempt: u32,
        /// What was found.
        verdict: Verdict,
    },
    /// Decision: a failed attempt will be repeated at that instant.
    RetryScheduled {
        /// The step.
        step: StepName,
        /// Forward or undo.
        phase: Phase,
        /// The attempt to come.
        attempt: u32,
        /// When.
        at: Timestamp,
    },
    /// Decision: a step waits for a signal until that instant.
    SignalAwaited {
        /// The step.
        step: StepName,
        /// How long.
        until: Timestamp,
    },
    /// Input: the instant of a timer has passed.
    TimerFired(Timer),
    /// Input: an outside party answered.
    SignalReceived {
        /// The signal's name.
        name: String,
        /// Its value.
        value: Value,
        /// Who sent it.
        by: Actor,
    },
    /// Input: a new engine took the job over; attempts without an outcome were cut off.
    JobRecovered,
    /// Input: somebody asked to cancel.
    CancelRequested(Actor),
    /// Input: somebody asked to pause at the next safe place.
    PauseRequested {
        /// Who.
        by: Actor,
        /// When the pause ends by itself.
        until: Timestamp,
    },
    /// Input: somebody ended a pause.
    ResumeRequested(Actor),
    /// Input: somebody settled a job that needs attention.
    SettleRequested {
        /// Who.
        by: Actor,
        /// How.
        how: Settle,
    },
    /// Input: somebody gave the job up. The last event.
    JobAbandoned {
        /// Who.
        by: Actor,
        /// What is left behind in the world.
        left: Vec<String>,
    },
    /// Input: something was done to keep the guest safe, outside any step.
    Intervened {
        /// What: "thawed the guest".
        act: String,
        /// How it went.
        outcome: String,
    },
    /// Decision: everything has settled; from here the job rolls back.
    UnwindBegan(Cause),
    /// Decision: the job cannot go on by itself. Ends with an operator's act.
    JobNeedsAttention(Vec<Item>),
    /// Decision: every step succeeded. A last event.
    JobSucceeded,
    /// Decision: everything that was done is undone. A last event.
    JobRolledBack(Cause),
}

impl Body {
    /// Whether the engine authors this event by deciding, as opposed to recording an input.
    #[must_use]
    pub fn is_decision(&self) -> bool {
        matches!(
            self,
            Self::StepStarted { .. }
                | Self::RetryScheduled { .. }
                | Self::SignalAwaited { .. }
                | Self::UnwindBegan(_)
                | Self::JobNeedsAttention(_)
                | Self::JobSucceeded
                | Self::JobRolledBack(_)
        )
    }

    /// What a step of the way forward has put out, if this event tells of that: it returned, or was found done.
    #[must_use]
    pub fn output(&self) -> Option<(&StepName, &Value)> {
        match self {
            Self::StepSucceeded { step, phase: Phase::Forward, output, .. }
            | Self::StepProbed { step, phase: Phase::Forward, verdict: Verdict::Done(output), .. } => {
                Some((step, output))
            }
            _ => None,
        }
    }

    /// The event's type as it is stored.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::JobRequested(_) => "job_requested",
            Self::JobPlanned(_) => "job_planned",
            Self::JobRefused(_) => "job_refused",
            Self::FactsChecked { .. } => "facts_checked",
            Self::StepStarted { .. } => "step_started",
            Self::StepSucceeded { .. } => "step_succeeded",
            Self::StepFailed { .. } => "step_failed",
            Self::StepStalled { .. } => "step_stalled",
            Self::StepProbed { .. } => "step_probed",
            Self::RetryScheduled { .. } => "retry_scheduled",
            Self::SignalAwaited { .. } => "signal_awaited",
            Self::TimerFired(_) => "timer_fired",
            Self::SignalReceived { .. } => "signal_received",
            Self::JobRecovered => "job_recovered",
            Self::CancelRequested(_) => "cancel_requested",
            Self::PauseRequested { .. } => "pause_requested",
            Self::ResumeRequested(_) => "resume_requested",
            Self::SettleRequested { .. } => "settle_requested",
            Self::JobAbandoned { .. } => "job_abandoned",
            Self::Intervened { .. } => "intervened",
            Self::UnwindBegan(_) => "unwind_began",
            Self::JobNeedsAttention(_) => "job_needs_attention",
            Self::JobSucceeded => "job_succeeded",
            Self::JobRolledBack(_) => "job_rolled_back",
        }
    }
}

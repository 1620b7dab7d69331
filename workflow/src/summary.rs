//! The summary of a job: what lists show, kept by the store in the same transaction as the events it is made of.
//!
//! It is derived from events alone, in constant time and without judging them; whether an event may follow is for
//! [`crate::state::State::apply`] to say, and that has always happened before.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::event::{Actor, Body, Cause, Event, Item, Subject};
use crate::fault::Fault;
use crate::ids::{JobId, Phase, Seq, WorkflowName};

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// Asked for; waits for its subject or a limit.
    Queued,
    /// Steps are being carried out.
    Running,
    /// Waits at a safe place because somebody asked.
    Paused,
    /// Rolls back.
    Unwinding,
    /// Cannot go on without an operator; holds its subject.
    NeedsAttention,
    /// Every step succeeded.
    Succeeded,
    /// Failed, and everything it did is undone.
    RolledBack,
    /// Cancelled, and everything it did is undone.
    Cancelled,
    /// No plan could be made; nothing was touched.
    Refused,
    /// Given up by an operator.
    Abandoned,
}

impl JobStatus {
    /// Whether the job has ended.
    #[must_use]
    pub fn ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::RolledBack | Self::Cancelled | Self::Refused | Self::Abandoned)
    }

    /// The name as it is stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Unwinding => "unwinding",
            Self::NeedsAttention => "needs_attention",
            Self::Succeeded => "succeeded",
            Self::RolledBack => "rolled_back",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Abandoned => "abandoned",
        }
    }
}

/// A job in one row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSummary {
    /// The job.
    pub job: JobId,
    /// The recipe.
    pub workflow: WorkflowName,
    /// What it works on.
    pub subject: Subject,
    /// One line for people; empty until planned.
    pub title: String,
    /// Where it stands.
    pub status: JobStatus,
    /// Who asked for it.
    pub by: Actor,
    /// When it was asked for.
    pub requested: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// The last record that this summary covers.
    pub seq: Seq,
    /// How many steps the plan has.
    pub steps: u32,
    /// How many of them succeeded.
    pub steps_done: u32,
    /// The failure that ended it or holds it.
    pub fault: Option<Fault>,
    /// What it waits for when it needs attention.
    pub items: Vec<Item>,
}

impl JobSummary {
    /// The summary after a job's first event; nothing if that is not a request.
    #[must_use]
    pub fn first(job: JobId, event: &Event) -> Option<Self> {
        let Body::JobRequested(request) = &event.body else { return None };
        Some(Self {
            job,
            workflow: request.workflow.clone(),
            subject: request.subject.clone(),
            title: String::new(),
            status: JobStatus::Queued,
            by: request.by.clone(),
            requested: event.at,
            updated: event.at,
            ended: None,
            seq: Seq(1),
            steps: 0,
            steps_done: 0,
            fault: None,
            items: Vec::new(),
        })
    }

    /// Takes one more event in.
    pub fn apply(&mut self, event: &Event) {
        self.seq = self.seq.next();
        self.updated = event.at;
        match &event.body {
            Body::JobPlanned(plan) => {
                // A pause that was asked for while the job waited is in force from its first step on.
                if self.status != JobStatus::Paused {
                    self.status = JobStatus::Running;
                }
                self.title.clone_from(&plan.title);
                self.steps = u32::try_from(plan.steps.len()).unwrap_or(u32::MAX);
            }
            Body::StepSucceeded { phase: Phase::Forward, .. }
            | Body::StepProbed { phase: Phase::Forward, verdict: crate::event::Verdict::Done(_), .. } => {
                self.steps_done = self.steps_done.saturating_add(1).min(self.steps);
            }
            Body::StepFailed { fault, .. } if self.fault.is_none() => self.fault = Some(fault.clone()),
            Body::PauseRequested { .. } if matches!(self.status, JobStatus::Queued | JobStatus::Running) => {
                self.status = JobStatus::Paused
            }
            Body::ResumeRequested(_) | Body::TimerFired(crate::event::Timer::Pause)
                if self.status == JobStatus::Paused =>
            {
                self.status = JobStatus::Running;
            }
            Body::UnwindBegan(cause) => {
                self.status = JobStatus::Unwinding;
                self.note_cause(cause);
            }
            Body::JobNeedsAttention(items) => {
                self.status = JobStatus::NeedsAttention;
                self.items.clone_from(items);
                self.fault = items.first().map(|item| item.fault.clone()).or_else(|| self.fault.take());
            }
            Body::SettleRequested { .. } => {
                self.status = JobStatus::Running;
                self.items.clear();
            }
            Body::JobSucceeded => {
                self.fault = None;
                self.end(JobStatus::Succeeded, event.at);
            }
            Body::JobRolledBack(cause) => {
                self.note_cause(cause);
                let cancelled = matches!(cause, Cause::Cancel(_));
                self.end(if cancelled { JobStatus::Cancelled } else { JobStatus::RolledBack }, event.at);
            }
            Body::JobRefused(fault) => {
                self.fault = Some(fault.clone());
                self.end(JobStatus::Refused, event.at);
            }
            Body::JobAbandoned { .. } => self.end(JobStatus::Abandoned, event.at),
            _ => {}
        }
    }

    fn note_cause(&mut self, cause: &Cause) {
        if let Cause::Failure { fault, .. } = cause {
            self.fault = Some(fault.clone());
        }
    }

    fn end(&mut self, status: JobStatus, at: Timestamp) {
        self.status = status;
        self.ended = Some(at);
        self.items.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{IfBusy, JobRequest};
    use crate::plan::Plan;

    #[test]
    fn a_pause_that_was_asked_for_before_the_plan_shows_until_it_ends() {
        let at = Timestamp::UNIX_EPOCH;
        let event = |body| Event::new(at, Default::default(), body);
        let request = JobRequest {
            workflow: "toy".into(),
            subject: Subject { id: "s".into(), label: "s".into() },
            options: serde_json::Value::Null,
            key: None,
            by: Actor::default(),
            if_busy: IfBusy::Refuse,
            limits: vec![],
            retry_of: None,
        };
        let mut summary = JobSummary::first(JobId::new(), &event(Body::JobRequested(request))).unwrap();
        summary.apply(&event(Body::PauseRequested { by: Actor::default(), until: at }));
        let plan = Plan::new("toy", 1, "toy", vec![], None, serde_json::Value::Null).unwrap();
        summary.apply(&event(Body::JobPlanned(Box::new(plan))));
        assert_eq!(summary.status, JobStatus::Paused);
        summary.apply(&event(Body::ResumeRequested(Actor::default())));
        assert_eq!(summary.status, JobStatus::Running);
    }
}

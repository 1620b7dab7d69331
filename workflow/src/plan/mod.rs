//! The plan: the DAG of steps of one job, as data.
//!
//! A plan is built once, from observed facts, and stored whole in the job's journal. From then on it is the only
//! recipe: a newer binary runs the old plan, and recovery never plans anew. It therefore names steps by stable names
//! (never by an index of a graph library), and carries everything that decisions depend on: edges, retry policies,
//! deadlines, undo, the point of no return, the closers.
//!
//! Shapes that a plan may have are checked when it is built *and* when it is loaded ([`Plan::compile`]):
//! - edges name steps that exist, names are unique, and there is no cycle;
//! - the point of no return is a barrier: every other step comes before or after it;
//! - a closer comes after the opener that it closes.

mod compiled;
mod policy;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ids::{StepKind, StepName, WorkflowName};

pub use compiled::Compiled;
pub use policy::{AwaitSignal, Millis, Probing, Retry, Undo};

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepSpec {
    /// Unique within the plan and stable.
    pub name: StepName,
    /// What it does, and in which version.
    pub kind: StepKind,
    /// One line for people: "copy disk vda (2.0 GiB)".
    pub title: String,
    /// The kind's input.
    pub input: Value,
    /// The steps that must have succeeded before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<StepName>,
    /// Repetition of failed attempts.
    #[serde(default)]
    pub retry: Retry,
    /// The longest time for one attempt. Passing it leads to a probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Millis>,
    /// The longest time without progress. Passing it leads to a probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall: Option<Millis>,
    /// How its effect is looked for.
    #[serde(default)]
    pub probing: Probing,
    /// Its compensation; absent when there is nothing to take back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<Undo>,
    /// The opener that this step closes. A closer runs if and only if its opener was started: in its place in the
    /// plan, and else, when the job unwinds, once everything that depends on the opener has settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closes: Option<StepName>,
    /// A closer that sets the guest free (thaw, resume): it runs even while another step is stuck.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub safety: bool,
    /// An opener: until its closers are done the job cannot be paused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub critical: bool,
    /// Whether the facts that the plan was built on are asserted again right before this step.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub check_facts: bool,
    /// When set, the step does nothing but wait for a signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<AwaitSignal>,
    /// The part of the job that this step belongs to, in the recipe's own words. Only for people: no decision hangs
    /// on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
}

/// The kind of a step that waits for a signal; the engine itself carries it out.
pub const SIGNAL: StepKind = StepKind::new("await-signal", 1);

impl StepSpec {
    /// A step with the default policies, no predecessor and no undo.
    #[must_use]
    pub fn new(name: impl Into<StepName>, kind: StepKind, title: impl Into<String>, input: Value) -> Self {
        Self {
            name: name.into(),
            kind,
            title: title.into(),
            input,
            after: Vec::new(),
            retry: Retry::default(),
            deadline: None,
            stall: None,
            probing: Probing::default(),
            undo: None,
            closes: None,
            safety: false,
            critical: false,
            check_facts: false,
            signal: None,
            stage: None,
        }
    }

    /// A step that waits for a signal.
    #[must_use]
    pub fn signal(name: impl Into<StepName>, title: impl Into<String>, signal: AwaitSignal) -> Self {
        Self { signal: Some(signal), ..Self::new(name, SIGNAL, title, Value::Null) }
    }

    /// Comes after that step.
    #[must_use]
    pub fn after(mut self, step: impl Into<StepName>) -> Self {
        self.after.push(step.into());
        self
    }

    /// Comes after all those steps.
    #[must_use]
    pub fn after_all<N: Into<StepName>>(mut self, steps: impl IntoIterator<Item = N>) -> Self {
        self.after.extend(steps.into_iter().map(Into::into));
        self
    }

    /// Repeats by this policy.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Probes by this policy.
    #[must_use]
    pub fn probing(mut self, probing: Probing) -> Self {
        self.probing = probing;
        self
    }

    /// Has this deadline.
    #[must_use]
    pub fn deadline(mut self, deadline: Millis) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Has this stall limit.
    #[must_use]
    pub fn stall(mut self, stall: Millis) -> Self {
        self.stall = Some(stall);
        self
    }

    /// Can be undone, by the default policy.
    #[must_use]
    pub fn undoable(self) -> Self {
        self.undo(Undo::default())
    }

    /// Can be undone, by this policy.
    #[must_use]
    pub fn undo(mut self, undo: Undo) -> Self {
        self.undo = Some(undo);
        self
    }

    /// Closes that opener (and therefore comes after it).
    #[must_use]
    pub fn closes(mut self, opener: impl Into<StepName>) -> Self {
        self.closes = Some(opener.into());
        self
    }

    /// Is a closer that sets the guest free.
    #[must_use]
    pub fn safety(mut self) -> Self {
        self.safety = true;
        self
    }

    /// Opens a section in which the job cannot be paused.
    #[must_use]
    pub fn critical(mut self) -> Self {
        self.critical = true;
        self
    }

    /// Belongs to this part of the job.
    #[must_use]
    pub fn stage(mut self, stage: impl Into<String>) -> Self {
        self.stage = Some(stage.into());
        self
    }

    /// Asserts the plan's facts right before it starts.
    #[must_use]
    pub fn check_facts(mut self) -> Self {
        self.check_facts = true;
        self
    }
}

/// The DAG of one job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The version of the decision rules that this plan is run by.
    pub decider: u32,
    /// The recipe that built it.
    pub workflow: WorkflowName,
    /// The recipe's version.
    pub workflow_version: u32,
    /// One line for people: "live snapshot of web1 with memory".
    pub title: String,
    /// The steps, in the order in which the recipe named them.
    pub steps: Vec<StepSpec>,
    /// Once this step has taken effect the job only goes forward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point_of_no_return: Option<StepName>,
    /// What was observed when the plan was made; the recipe's own shape.
    pub facts: Value,
    /// BLAKE3 of all of the above, in hexadecimal.
    pub hash: String,
}

/// Why a plan cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum PlanError {
    #[error("two steps are named {0}")]
    TwiceNamed(StepName),
    #[error("step {step} comes after {missing}, which is not in the plan")]
    NoSuchStep { step: StepName, missing: StepName },
    #[error("the steps form a cycle through {0}")]
    Cycle(StepName),
    #[error("{step} is neither before nor after the point of no return {barrier}")]
    NotABarrier { step: StepName, barrier: StepName },
    #[error("closer {closer} does not come after its opener {opener}")]
    CloserFirst { closer: StepName, opener: StepName },
    #[error("the plan's hash does not match its contents")]
    HashMismatch,
    #[error("the plan cannot be serialised: {0}")]
    Unserialisable(String),
    #[error("the plan was made for decision rules of version {0}, which this binary does not have")]
    UnknownDecider(u32),
}

impl Plan {
    /// Builds and checks a plan.
    ///
    /// # Errors
    /// When the steps do not form a plan (see the module's list of shapes).
    pub fn new(
        workflow: impl Into<WorkflowName>,
        workflow_version: u32,
        title: impl Into<String>,
        steps: Vec<StepSpec>,
        point_of_no_return: Option<StepName>,
        facts: Value,
    ) -> Result<Self, PlanError> {
        let mut plan = Self {
            decider: crate::decide::VERSION,
            workflow: workflow.into(),
            workflow_version,
            title: title.into(),
            steps,
            point_of_no_return,
            facts,
            hash: String::new(),
        };
        plan.hash = plan.digest()?;
        Compiled::new(plan.clone())?;
        Ok(plan)
    }

    fn digest(&self) -> Result<String, PlanError> {
        let bare = Self { hash: String::new(), ..self.clone() };
        let bytes = serde_json::to_vec(&bare).map_err(|e| PlanError::Unserialisable(e.to_string()))?;
        Ok(blake3::hash(&bytes).to_hex().to_string())
    }

    /// Checks a stored plan and makes it runnable.
    ///
    /// # Errors
    /// When the hash does not match, the decision rules are unknown, or the shape is not a plan's.
    pub fn compile(self) -> Result<Compiled, PlanError> {
        if self.digest()? != self.hash {
            return Err(PlanError::HashMismatch);
        }
        if self.decider != crate::decide::VERSION {
            return Err(PlanError::UnknownDecider(self.decider));
        }
        Compiled::new(self)
    }
}

//! Steps: idempotent units of work with typed input and output.
//!
//! A step kind implements [`Step`]. The engine stores inputs and outputs as JSON and knows a step only through
//! [`Registry`]; the types come back at the kind's own door, so that an old input that no longer fits is a coded
//! fault and never a panic.
//!
//! The contract of a step:
//! - [`Step::run`] may be called again after any crash. It returns only when its effect is durable.
//! - [`Step::probe`] looks, and changes nothing. It is asked after every attempt without a clean outcome, and before
//!   every repetition.
//! - [`Step::undo`] takes back what was done, tolerates that it never happened, and may itself be cut off and repeated.
//! - [`Step::probe_undo`] looks whether an undo took effect.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::event::{JobRequest, Verdict};
use crate::fault::{Code, Fault};
use crate::ids::{JobId, Phase, StepKind, StepName, WorkflowName};
use crate::plan::Plan;
use crate::progress::Progress;

/// The outputs of a job's steps so far.
#[derive(Clone, Debug, Default)]
pub struct Outputs(Arc<RwLock<HashMap<StepName, Arc<Value>>>>);

impl Outputs {
    pub(crate) fn set(&self, step: StepName, output: Value) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(step, Arc::new(output));
    }

    /// The output of a step as it is stored, once it succeeded.
    #[must_use]
    pub fn get(&self, step: &StepName) -> Option<Arc<Value>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(step).cloned()
    }

    /// The output of a step of kind `S`: nothing if that step has not succeeded.
    ///
    /// # Errors
    /// When the stored output is not of that kind's type.
    pub fn of<S: Step>(&self, step: &StepName) -> Result<Option<S::Output>, Fault> {
        self.get(step).map(|value| decode(&value, "read the output of a step", step.as_str())).transpose()
    }
}

impl FromIterator<(StepName, Value)> for Outputs {
    fn from_iter<I: IntoIterator<Item = (StepName, Value)>>(outputs: I) -> Self {
        let all = Self::default();
        for (step, output) in outputs {
            all.set(step, output);
        }
        all
    }
}

/// What an attempt or a probe knows of its surroundings.
#[derive(Clone, Debug)]
pub struct StepContext {
    /// The job.
    pub job: JobId,
    /// The step.
    pub step: StepName,
    /// Forward or undo.
    pub phase: Phase,
    /// The attempt, from 1. For a probe: the attempt in question.
    pub attempt: u32,
    /// Where this attempt goes on, from a probe's [`Verdict::Partial`]; nothing in a probe.
    pub resume: Option<Value>,
    /// What was asked for.
    pub request: Arc<JobRequest>,
    /// The facts that the plan was built on, in the workflow's shape.
    pub facts: Arc<Value>,
    /// Outputs of the steps that succeeded.
    pub outputs: Outputs,
    /// Raised when the attempt should give way: it stops at the next place from which it can go on later, and
    /// returns [`Fault::stopped`]. Steps that cannot stop half way ignore it.
    pub stop: CancellationToken,
    /// The environment (boot, hypervisor and guest instances) in which the attempt in question was started.
    pub started_in: Arc<std::collections::BTreeMap<String, String>>,
    /// In a probe: whether the attempt's call has still not returned in this process.
    pub still_running: bool,
    /// Progress and the resume token.
    pub progress: Progress,
    /// In an undo, and in its probe: the token that the step's own attempts have left, if they have left one. What was stored
    /// right before an effect is known here also when no output ever was.
    pub left: Option<Value>,
}

impl StepContext {
    /// In a probe: the verdict on an attempt whose call has still not returned in this process. Whatever the world looks like
    /// meanwhile, it may change.
    #[must_use]
    pub fn not_returned<T>(&self) -> Option<Verdict<T>> {
        self.still_running.then(|| Verdict::InFlight("it has not returned".to_owned()))
    }

    /// In a probe: the verdict on work that may be done again, however far it came: once its call has returned.
    #[must_use]
    pub fn may_repeat<T>(&self) -> Verdict<T> {
        self.not_returned().unwrap_or(Verdict::NotDone)
    }

    /// Whether the attempt should give way.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.is_cancelled()
    }
}

/// A kind of step.
#[async_trait]
pub trait Step: Send + Sync + 'static {
    /// The kind and its version.
    const KIND: StepKind;
    /// What the plan hands over.
    type Input: Serialize + DeserializeOwned + Send + Sync;
    /// What it leaves for the steps after it.
    type Output: Serialize + DeserializeOwned + Send + Sync;

    /// Does it. Returns once the effect is durable.
    async fn run(&self, cx: &StepContext, input: Self::Input) -> Result<Self::Output, Fault>;

    /// Looks whether it was done. Changes nothing.
    async fn probe(&self, cx: &StepContext, input: Self::Input) -> Verdict<Self::Output>;

    /// Takes it back. `output` is there if the step succeeded.
    async fn undo(
        &self,
        cx: &StepContext,
        input: Self::Input,
        output: Option<Self::Output>,
    ) -> Result<(), Fault> {
        let _ = (cx, input, output);
        Ok(())
    }

    /// Looks whether it was taken back. The default repeats the undo, which must be harmless.
    async fn probe_undo(
        &self,
        cx: &StepContext,
        input: Self::Input,
        output: Option<Self::Output>,
    ) -> Verdict<()> {
        let _ = (cx, input, output);
        Verdict::NotDone
    }
}

/// A [`Step`] with its types hidden.
#[async_trait]
pub(crate) trait AnyStep: Send + Sync {
    async fn run(&self, cx: &StepContext, input: &Value) -> Result<Value, Fault>;
    async fn probe(&self, cx: &StepContext, input: &Value) -> Verdict;
    async fn undo(&self, cx: &StepContext, input: &Value, output: Option<&Value>) -> Result<(), Fault>;
    async fn probe_undo(&self, cx: &StepContext, input: &Value, output: Option<&Value>) -> Verdict;
}

#[async_trait]
impl<S: Step> AnyStep for S {
    async fn run(&self, cx: &StepContext, input: &Value) -> Result<Value, Fault> {
        let input = decode(input, "read the input of a step", cx.step.as_str())?;
        let output = Step::run(self, cx, input).await?;
        // The effect is there; an output that cannot be written down is for the probe to look at again.
        encode(&output, cx.step.as_str()).map_err(Fault::in_doubt)
    }

    async fn probe(&self, cx: &StepContext, input: &Value) -> Verdict {
        let input = match decode(input, "read the input of a step", cx.step.as_str()) {
            Ok(input) => input,
            Err(fault) => return Verdict::Diverged(fault.to_string()),
        };
        match Step::probe(self, cx, input).await {
            Verdict::Done(output) => match encode(&output, cx.step.as_str()) {
                Ok(output) => Verdict::Done(output),
                Err(fault) => Verdict::Diverged(fault.to_string()),
            },
            other => other.without_output(),
        }
    }

    async fn undo(&self, cx: &StepContext, input: &Value, output: Option<&Value>) -> Result<(), Fault> {
        let output = output.map(|v| decode(v, "read the output of a step", cx.step.as_str())).transpose()?;
        let input = decode(input, "read the input of a step", cx.step.as_str())?;
        Step::undo(self, cx, input, output).await
    }

    async fn probe_undo(&self, cx: &StepContext, input: &Value, output: Option<&Value>) -> Verdict {
        let decoded = output
            .map(|v| decode(v, "read the output of a step", cx.step.as_str()))
            .transpose()
            .and_then(|output| Ok((decode(input, "read the input of a step", cx.step.as_str())?, output)));
        match decoded {
            Ok((input, output)) => match Step::probe_undo(self, cx, input, output).await {
                Verdict::Done(()) => Verdict::Done(Value::Null),
                other => other.without_output(),
            },
            Err(fault) => Verdict::Diverged(fault.to_string()),
        }
    }
}

impl<T> Verdict<T> {
    /// The same verdict about another output; `Done` says nothing without one and becomes `Unknown`.
    fn without_output(self) -> Verdict {
        match self {
            Self::Done(_) => Verdict::Unknown("the probe gave no output".to_owned()),
            Self::NotDone => Verdict::NotDone,
            Self::Partial(token) => Verdict::Partial(token),
            Self::InFlight(what) => Verdict::InFlight(what),
            Self::Diverged(what) => Verdict::Diverged(what),
            Self::Unknown(why) => Verdict::Unknown(why),
        }
    }
}

fn decode<T: DeserializeOwned>(value: &Value, doing: &str, object: &str) -> Result<T, Fault> {
    T::deserialize(value).map_err(|e| {
        Fault::permanent(
            Code::UNKNOWN_STEP_KIND,
            doing,
            object,
            format!("its stored form is not understood: {e}"),
        )
        .class(crate::fault::Class::Fatal)
        .remedy("Use the release that wrote the plan, then settle the job")
    })
}

fn encode<T: Serialize>(value: &T, object: &str) -> Result<Value, Fault> {
    serde_json::to_value(value)
        .map_err(|e| Fault::permanent(Code::UNDEFINED, "write down the output of a step", object, e))
}

/// What a planner knows.
#[derive(Clone, Debug)]
pub struct PlanContext {
    /// The job; for a dry run an id that is used for nothing else.
    pub job: JobId,
    /// What was asked for.
    pub request: Arc<JobRequest>,
    /// Whether the plan is only shown.
    pub dry_run: bool,
}

/// A named, versioned recipe that builds plans.
#[async_trait]
pub trait Workflow: Send + Sync + 'static {
    /// The name.
    fn name(&self) -> WorkflowName;

    /// Whether its jobs change the subject and so need its lock.
    fn exclusive(&self) -> bool {
        true
    }

    /// Observes the world and builds a plan from what it finds. Changes nothing.
    ///
    /// # Errors
    /// When no plan can be made; the job is then refused.
    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault>;

    /// Compares the world with what it must look like right before `before`, a step that asked for it. Returns what
    /// differs; nothing means that all is as expected.
    ///
    /// # Errors
    /// When the world could not be observed; the comparison is repeated.
    async fn check_facts(
        &self,
        plan: &Plan,
        before: &StepName,
        outputs: &Outputs,
    ) -> Result<Option<String>, Fault> {
        let _ = (plan, before, outputs);
        Ok(None)
    }
}

/// The step kinds and workflows that a binary knows.
#[derive(Default)]
pub struct Registry {
    steps: HashMap<StepKind, Arc<dyn AnyStep>>,
    workflows: HashMap<WorkflowName, Arc<dyn Workflow>>,
}

impl Registry {
    /// Knows nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns a step kind.
    #[must_use]
    pub fn step<S: Step>(mut self, step: S) -> Self {
        self.steps.insert(S::KIND, Arc::new(step));
        self
    }

    /// Learns a workflow.
    #[must_use]
    pub fn workflow<W: Workflow>(mut self, workflow: W) -> Self {
        self.workflows.insert(workflow.name(), Arc::new(workflow));
        self
    }

    /// Puts something of the caller's own around every workflow that is known by now; it keeps its name.
    #[must_use]
    pub fn around_workflows(mut self, wrap: impl Fn(Arc<dyn Workflow>) -> Arc<dyn Workflow>) -> Self {
        self.workflows.values_mut().for_each(|workflow| *workflow = wrap(workflow.clone()));
        self
    }

    /// A workflow by name.
    #[must_use]
    pub fn find_workflow(&self, name: &WorkflowName) -> Option<Arc<dyn Workflow>> {
        self.workflows.get(name).cloned()
    }

    /// The names of the workflows, sorted.
    #[must_use]
    pub fn workflow_names(&self) -> Vec<WorkflowName> {
        let mut names: Vec<_> = self.workflows.keys().cloned().collect();
        names.sort();
        names
    }

    /// Whether a step kind is known.
    #[must_use]
    pub fn knows(&self, kind: &StepKind) -> bool {
        *kind == crate::plan::SIGNAL || self.steps.contains_key(kind)
    }

    pub(crate) fn find_step(&self, kind: &StepKind) -> Option<Arc<dyn AnyStep>> {
        self.steps.get(kind).cloned()
    }
}

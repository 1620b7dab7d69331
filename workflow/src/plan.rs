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

use std::collections::HashMap;

use jiff::SignedDuration;
use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::{Dfs, Reversed};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ids::{StepKind, StepName, WorkflowName};

/// A span of time in milliseconds, as plans store it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    /// So many seconds.
    #[must_use]
    pub const fn secs(secs: u64) -> Self {
        Self(secs * 1000)
    }

    pub(crate) fn span(self) -> SignedDuration {
        SignedDuration::from_millis(i64::try_from(self.0).unwrap_or(i64::MAX))
    }
}

/// How often and how soon a failed attempt is repeated. Only transient failures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Attempts in all, the first included; at least 1.
    pub attempts: u32,
    /// The wait before the second attempt; doubles with each further one.
    pub first: Millis,
    /// The longest wait.
    pub most: Millis,
}

impl Retry {
    /// One attempt only.
    pub const NEVER: Self = Self { attempts: 1, first: Millis(0), most: Millis(0) };

    /// The wait before attempt number `next` (2 for the first repetition).
    #[must_use]
    pub fn backoff(&self, next: u32) -> Millis {
        let doublings = next.saturating_sub(2).min(32);
        Millis(self.first.0.saturating_mul(1_u64 << doublings).min(self.most.0))
    }
}

impl Default for Retry {
    /// Four attempts within about seven seconds.
    fn default() -> Self {
        Self { attempts: 4, first: Millis(1000), most: Millis::secs(30) }
    }
}

/// How a step's effect is looked for when its outcome is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probing {
    /// How long a probe may answer "in flight" or "unknown" before the job needs attention.
    pub limit: Millis,
    /// The wait between two probes; doubles up to `most`.
    pub first: Millis,
    /// The longest wait between two probes.
    pub most: Millis,
}

impl Default for Probing {
    fn default() -> Self {
        Self { limit: Millis::secs(600), first: Millis(250), most: Millis::secs(15) }
    }
}

/// A step's compensation. What it does is the step kind's business; here stand its limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// Repetition of a failed undo.
    pub retry: Retry,
    /// The longest time for one attempt.
    pub deadline: Option<Millis>,
}

/// A wait for an outside party.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwaitSignal {
    /// The signal's name.
    pub name: String,
    /// How long to wait.
    pub limit: Millis,
    /// What is taken as answer when nobody answers.
    pub default: Value,
}

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

/// A checked plan with its graph. Steps are addressed by their place in [`Plan::steps`]; that place is never stored.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The plan.
    pub plan: Plan,
    graph: DiGraph<(), ()>,
    places: HashMap<StepName, usize>,
    barrier: Option<usize>,
    openers: Vec<Option<usize>>,
    closers: Vec<Vec<usize>>,
    dependents: Vec<Vec<usize>>,
}

impl Compiled {
    fn new(plan: Plan) -> Result<Self, PlanError> {
        let mut graph = DiGraph::with_capacity(plan.steps.len(), plan.steps.len());
        let mut places = HashMap::with_capacity(plan.steps.len());
        for (place, step) in plan.steps.iter().enumerate() {
            graph.add_node(());
            if places.insert(step.name.clone(), place).is_some() {
                return Err(PlanError::TwiceNamed(step.name.clone()));
            }
        }
        let find = |step: &StepName, wanted: &StepName| {
            places
                .get(wanted)
                .copied()
                .ok_or_else(|| PlanError::NoSuchStep { step: step.clone(), missing: wanted.clone() })
        };
        let mut openers = vec![None; plan.steps.len()];
        let mut closers = vec![Vec::new(); plan.steps.len()];
        for (place, step) in plan.steps.iter().enumerate() {
            for before in &step.after {
                graph.update_edge(NodeIndex::new(find(&step.name, before)?), NodeIndex::new(place), ());
            }
            if let Some(opener) = &step.closes {
                let opener = find(&step.name, opener)?;
                openers[place] = Some(opener);
                closers[opener].push(place);
            }
        }
        petgraph::algo::toposort(&graph, None)
            .map_err(|cycle| PlanError::Cycle(plan.steps[cycle.node_id().index()].name.clone()))?;
        let barrier = match &plan.point_of_no_return {
            None => None,
            Some(name) => Some(
                *places
                    .get(name)
                    .ok_or_else(|| PlanError::NoSuchStep { step: name.clone(), missing: name.clone() })?,
            ),
        };
        let dependents =
            (0..plan.steps.len()).map(|at| neighbours(&graph, at, Direction::Outgoing)).collect();
        let compiled = Self { plan, graph, places, barrier, openers, closers, dependents };
        compiled.check_barrier()?;
        compiled.check_closers()?;
        Ok(compiled)
    }

    fn check_barrier(&self) -> Result<(), PlanError> {
        let Some(barrier) = self.barrier else { return Ok(()) };
        let before = self.ancestors(barrier);
        let after = self.descendants(barrier);
        for (place, step) in self.plan.steps.iter().enumerate() {
            if place != barrier && !before[place] && !after[place] {
                let barrier = self.plan.steps[barrier].name.clone();
                return Err(PlanError::NotABarrier { step: step.name.clone(), barrier });
            }
        }
        Ok(())
    }

    fn check_closers(&self) -> Result<(), PlanError> {
        for (opener, closers) in self.closers.iter().enumerate() {
            if closers.is_empty() {
                continue;
            }
            let after = self.descendants(opener);
            if let Some(&closer) = closers.iter().find(|&&closer| !after[closer]) {
                return Err(PlanError::CloserFirst {
                    closer: self.plan.steps[closer].name.clone(),
                    opener: self.plan.steps[opener].name.clone(),
                });
            }
        }
        Ok(())
    }

    /// How many steps there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.plan.steps.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.plan.steps.is_empty()
    }

    /// The step at a place.
    #[must_use]
    pub fn step(&self, place: usize) -> &StepSpec {
        &self.plan.steps[place]
    }

    /// The place of a step.
    #[must_use]
    pub fn place(&self, name: &StepName) -> Option<usize> {
        self.places.get(name).copied()
    }

    /// The place of the point of no return.
    #[must_use]
    pub fn barrier(&self) -> Option<usize> {
        self.barrier
    }

    /// The opener that a closer closes.
    #[must_use]
    pub fn opener(&self, closer: usize) -> Option<usize> {
        self.openers[closer]
    }

    /// The closers of an opener.
    #[must_use]
    pub fn closers(&self, opener: usize) -> &[usize] {
        &self.closers[opener]
    }

    /// The steps that come directly after.
    #[must_use]
    pub fn dependents(&self, place: usize) -> &[usize] {
        &self.dependents[place]
    }

    /// The steps that come directly before.
    #[must_use]
    pub fn dependencies(&self, place: usize) -> Vec<usize> {
        neighbours(&self.graph, place, Direction::Incoming)
    }

    /// For each step, whether it comes before this one, directly or not.
    #[must_use]
    pub fn ancestors(&self, place: usize) -> Vec<bool> {
        let mut seen = vec![false; self.len()];
        let mut walk = Dfs::new(Reversed(&self.graph), NodeIndex::new(place));
        while let Some(node) = walk.next(Reversed(&self.graph)) {
            seen[node.index()] = node.index() != place;
        }
        seen
    }

    /// For each step, whether it comes after this one, directly or not.
    #[must_use]
    pub fn descendants(&self, place: usize) -> Vec<bool> {
        let mut seen = vec![false; self.len()];
        let mut walk = Dfs::new(&self.graph, NodeIndex::new(place));
        while let Some(node) = walk.next(&self.graph) {
            seen[node.index()] = node.index() != place;
        }
        seen
    }
}

fn neighbours(graph: &DiGraph<(), ()>, place: usize, direction: Direction) -> Vec<usize> {
    let mut found: Vec<usize> =
        graph.neighbors_directed(NodeIndex::new(place), direction).map(NodeIndex::index).collect();
    found.sort_unstable();
    found
}

//! A plan that was checked, with its graph.

use std::collections::HashMap;

use petgraph::Direction;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::{Dfs, Reversed};

use super::{Plan, PlanError, StepSpec};
use crate::ids::StepName;

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
    pub(super) fn new(plan: Plan) -> Result<Self, PlanError> {
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

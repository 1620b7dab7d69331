//! What happened to a job, in plain words: the engine's tale, and what it comes to.

use vmkeep_workflow::{Event, Seq};

use crate::api::types::Explanation;

/// Tells a history.
#[must_use]
pub fn story(history: &[(Seq, Event)]) -> Explanation {
    Explanation { lines: vmkeep_workflow::explain::explain(history), summary: Vec::new() }
}

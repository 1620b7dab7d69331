//! Taking in commits as another store sealed them: how a journal moves from one engine to another.
//!
//! An import makes commits of its own, so its head is a new one. An adoption keeps numbers, places, digests and links, and
//! records whose bytes were let go; the head stays what it was, and whoever kept it elsewhere can still compare. It is meant
//! for a store that holds nothing but what was adopted before; the records themselves are not checked, for the whole is
//! compared and verified afterwards ([`crate::migrate`]).

use vmkeep_workflow::ids::StreamId;
use vmkeep_workflow::journal::AppendError;
use vmkeep_workflow::summary::JobSummary;

use crate::chain::{self, Commit, Hash, Placed};

/// What is adopted at once.
#[derive(Clone, Debug, Default)]
pub struct Adoption {
    /// The next commits.
    pub commits: Vec<Commit>,
    /// Their records, in order.
    pub records: Vec<Placed>,
    /// Summaries of jobs whose records are there, or come along.
    pub jobs: Vec<JobSummary>,
    /// Idempotency keys with their streams.
    pub keys: Vec<(String, StreamId)>,
}

/// Refuses what does not follow on the end of the journal. Returns the new end: the last commit, its link, and the last
/// position.
pub(crate) fn check(
    adoption: &Adoption,
    mut commit: u64,
    mut link: Hash,
    mut position: u64,
) -> Result<(u64, Hash, u64), AppendError> {
    let refuse = |what: String| Err(AppendError::Rejected(what));
    let first = commit + 1;
    for next in &adoption.commits {
        if next.number != commit + 1 || next.link != chain::link(&link, next.number, &next.digest) {
            return refuse(format!("commit {} does not follow on commit {commit}", next.number));
        }
        (commit, link) = (next.number, next.link);
    }
    for placed in &adoption.records {
        if placed.position != position + 1 || placed.commit < first || placed.commit > commit {
            return refuse(format!("the record at position {} does not belong here", placed.position));
        }
        position = placed.position;
    }
    Ok((commit, link, position))
}

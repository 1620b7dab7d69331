//! Replaying a history: the fold again, and every decision again.
//!
//! A journal is sound when its chain of hashes is whole, when each event may follow those before it, and when each
//! decision in it is one that the decision rules take in the state before it. The first point that is not so is named.
//! A newer release that decides otherwise is found this way before it touches anything.

use crate::decide::{Command, decide};
use crate::event::Event;
use crate::fault::Fault;
use crate::ids::Seq;
use crate::journal::{Record, link};
use crate::state::State;
use crate::summary::JobSummary;

/// A sound history.
#[derive(Clone, Debug)]
pub struct Report {
    /// How many events there were.
    pub events: usize,
    /// How many of them were decisions, each of which was taken again.
    pub decisions: usize,
    /// Where the job stands after them.
    pub summary: Option<JobSummary>,
    /// The state after them.
    pub state: State,
}

/// The first point at which a history is not sound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Divergence {
    /// A record is missing or in the wrong place.
    #[error("record {found} stands where record {expected} must")]
    Gap {
        /// The place that comes next.
        expected: Seq,
        /// The place that was found.
        found: Seq,
    },
    /// A record is not the one that was written.
    #[error("the hash of record {0} does not match its bytes and its predecessor")]
    Hash(Seq),
    /// A record cannot be read.
    #[error("record {seq} cannot be read: {fault}")]
    Unreadable {
        /// Its place.
        seq: Seq,
        /// Why.
        fault: Fault,
    },
    /// An event may not follow those before it.
    #[error("{0}")]
    Illegal(#[from] crate::state::Illegal),
    /// A decision is not one that these rules take.
    #[error(
        "record {seq} is the decision {found}, but in the state before it these rules decide: {expected}"
    )]
    Decision {
        /// Its place.
        seq: Seq,
        /// What was decided then.
        found: String,
        /// What is decided now.
        expected: String,
    },
}

/// Replays a whole job's history.
///
/// # Errors
/// Names the first point at which it is not sound.
pub fn check(records: &[Record]) -> Result<Report, Divergence> {
    let mut previous = [0; 32];
    let mut events = Vec::with_capacity(records.len());
    for (at, record) in records.iter().enumerate() {
        let expected = Seq(at as u64 + 1);
        if record.seq != expected {
            return Err(Divergence::Gap { expected, found: record.seq });
        }
        if record.hash != link(&previous, &record.bytes) {
            return Err(Divergence::Hash(record.seq));
        }
        previous = record.hash;
        let event = crate::engine::log::decode(record)
            .map_err(|fault| Divergence::Unreadable { seq: record.seq, fault })?;
        events.push(event);
    }
    let mut report = decisions(&events)?;
    if let (Some(first), Some(record)) = (events.first(), records.first())
        && let Some(job) = record.stream.as_job()
    {
        report.summary = JobSummary::first(job, first).map(|mut summary| {
            events[1..].iter().for_each(|event| summary.apply(event));
            summary
        });
    }
    Ok(report)
}

/// Replays events without their stored form: only the fold and the decisions.
///
/// # Errors
/// Names the first event that may not follow, or the first decision that is not taken again.
pub fn decisions(events: &[Event]) -> Result<Report, Divergence> {
    let mut state = State::new();
    let mut count = 0;
    // Decisions that were taken together stand one after the other; all of them were taken in the state before the
    // first. Those of one batch that are still due are due in the state after the earlier ones as well.
    for event in events {
        if event.body.is_decision() {
            count += 1;
            let due = decide(&state);
            let taken =
                due.iter().any(|command| matches!(command, Command::Record(body) if *body == event.body));
            if !taken {
                return Err(Divergence::Decision {
                    seq: state.seq().next(),
                    found: brief(&event.body),
                    expected: if due.is_empty() {
                        "nothing".to_owned()
                    } else {
                        due.iter().map(|c| format!("{c:?}")).collect::<Vec<_>>().join("; ")
                    },
                });
            }
        }
        state.apply(event)?;
    }
    Ok(Report { events: events.len(), decisions: count, summary: None, state })
}

fn brief(body: &crate::event::Body) -> String {
    serde_json::to_string(body).unwrap_or_else(|_| body.type_name().to_owned())
}

//! What every engine checks of an append before it looks at the stream, so that a mistake of a caller is refused the
//! same way everywhere and never stored.

use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{Append, AppendError};

use crate::Burial;

/// The largest record that is accepted, in bytes. The largest real one is a plan of ten thousand steps, some MiB.
pub const MAX_RECORD: usize = 64 << 20;

/// Refuses what no stream may take.
pub(crate) fn check(append: &Append) -> Result<(), AppendError> {
    let refuse =
        |why: String| Err(AppendError::Rejected(format!("stream {:?}: {why}", append.stream.as_str())));
    if append.stream.as_str().is_empty() {
        return refuse("a stream needs a name".to_owned());
    }
    if append.records.is_empty() {
        return refuse("an append needs at least one record".to_owned());
    }
    for record in &append.records {
        if record.is_empty() || record.len() > MAX_RECORD {
            return refuse(format!("a record has 1 to {MAX_RECORD} bytes, not {}", record.len()));
        }
        if record.contains(&b'\n') || std::str::from_utf8(record).is_err() {
            return refuse("a record is UTF-8 text in one line".to_owned());
        }
    }
    let last = end(append);
    // SQLite's integers are signed; no stream comes near this.
    if last.0 > i64::MAX as u64 {
        return refuse(format!("there is no place {last}"));
    }
    if let Some(summary) = &append.summary {
        if append.stream.as_job() != Some(summary.job) {
            return refuse(format!("the summary is that of job {}", summary.job));
        }
        if summary.seq != last {
            return refuse(format!("the summary covers {}, the records end at {last}", summary.seq));
        }
    }
    Ok(())
}

/// Where the stream ends after an append that was expected where it was.
pub(crate) fn end(append: &Append) -> Seq {
    Seq(append.expected.0.saturating_add(append.records.len() as u64))
}

/// Refuses to bury what is not to be buried so.
pub(crate) fn check_burial(burial: &Burial) -> Result<(), AppendError> {
    check(&burial.note)?;
    if burial.note.stream.as_job().is_some() || burial.events.0 == 0 {
        return Err(AppendError::Rejected("a tombstone belongs into a stream of its own".to_owned()));
    }
    Ok(())
}

/// The refusal of an append to a stream whose history was let go.
pub(crate) fn buried(stream: &StreamId) -> AppendError {
    AppendError::Rejected(format!("the history of {stream} was pruned: nothing can follow on it"))
}

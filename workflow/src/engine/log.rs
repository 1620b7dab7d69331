//! A job's journal as its driver sees it: appends under the expected place, and what to do when that fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use jiff::Timestamp;

use crate::event::{Body, Event};
use crate::fault::{Class, Code, Fault};
use crate::ids::{JobId, Seq, StreamId};
use crate::journal::{Append, AppendError, EventStore, Record};
use crate::state::State;
use crate::summary::JobSummary;

use super::Shared;

/// The wait before an append that found no room, or a disk that does not write, is tried again.
const FULL_WAIT: Duration = Duration::from_secs(1);

/// Why a job can no longer be written to by this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// Another process owns the stream.
    Owned(String),
    /// The store failed for good.
    Fatal(String),
}

/// The journal of one job, with its fold and its summary.
pub(super) struct Log {
    shared: Arc<Shared>,
    stream: StreamId,
    pub(super) state: State,
    pub(super) summary: JobSummary,
    /// How many attempts of the job run in this process.
    pub(super) running: Arc<AtomicUsize>,
    /// An instant of the job, and how much time had passed then.
    began: (Timestamp, Duration),
}

impl Log {
    pub(super) fn new(shared: Arc<Shared>, job: JobId, state: State, summary: JobSummary) -> Self {
        let wall = shared.clock.now();
        // Instants never go back within a job, whatever the wall clock does.
        let at = state.now().map_or(wall, |last| last.max(wall));
        let began = (at, shared.clock.passed());
        Self { shared, stream: StreamId::job(job), state, summary, running: Arc::default(), began }
    }

    /// The job's time: the wall clock's when this process took the job up, and from then on as much later as time has passed.
    ///
    /// A wall clock that is set meanwhile (by a year, at the first answer of a time server) neither ends a wait early nor makes
    /// one longer, and the job's history tells how long everything took. It shows in the next job's instants.
    pub(super) fn now(&self) -> Timestamp {
        let (at, passed) = self.began;
        let since = self.shared.clock.passed().saturating_sub(passed);
        let now = at.checked_add(since).unwrap_or(at);
        self.state.now().map_or(now, |last| last.max(now))
    }

    /// Makes events durable, and only then takes them in. All of them are admissible one after the other.
    pub(super) async fn append(&mut self, bodies: Vec<Body>) -> Result<(), Lost> {
        let at = self.now();
        let events: Vec<Event> = bodies
            .into_iter()
            .map(|body| {
                let telling = matches!(
                    body,
                    Body::JobRequested(_)
                        | Body::JobPlanned(_)
                        | Body::JobRecovered
                        | Body::StepStarted { .. }
                );
                let env = if telling { self.shared.environment.facts() } else { Default::default() };
                Event::new(at, env, body)
            })
            .collect();
        let mut summary = self.summary.clone();
        let mut records = Vec::with_capacity(events.len());
        for event in &events {
            summary.apply(event);
            records.push(encode(event).map_err(Lost::Fatal)?);
        }
        let expected = self.state.seq();
        self.crash_points("before", expected, records.len());
        let full = || {
            // An attempt under way sees to its guest itself; to act beside it would be to cross it.
            if self.running.load(Ordering::SeqCst) == 0 {
                self.shared.environment.no_room(summary.job, &summary.subject);
            }
        };
        write(&self.shared, &self.stream, expected, &records, &summary, full).await?;
        self.crash_points("after", expected, records.len());
        for event in &events {
            if let Err(illegal) = self.state.apply(event) {
                return Err(Lost::Fatal(format!("the engine wrote an event that may not follow: {illegal}")));
            }
        }
        self.summary = summary;
        Ok(())
    }

    fn crash_points(&self, side: &str, expected: Seq, count: usize) {
        if cfg!(feature = "crash-points") {
            for seq in expected.0 + 1..=expected.0 + count as u64 {
                crate::crash::point(&format!("append/{side}/{}/{seq}", self.summary.workflow));
            }
        }
    }
}

/// Appends until the store has the records or the job is lost. A full disk is waited out: nothing was written, the
/// steps under way are held by their own outcome, `full` is told, and an operator sees the store's state.
async fn write(
    shared: &Shared,
    stream: &StreamId,
    expected: Seq,
    records: &[Vec<u8>],
    summary: &JobSummary,
    full: impl Fn(),
) -> Result<(), Lost> {
    loop {
        let append = Append {
            stream: stream.clone(),
            expected,
            records: records.to_vec(),
            summary: Some(summary.clone()),
            key: None,
        };
        match shared.store.append(append).await {
            Ok(_) => return Ok(()),
            Err(error @ (AppendError::Full(_) | AppendError::Rejected(_))) => {
                tracing::error!(%stream, %error, "an event could not be stored; trying again");
                full();
                shared.clock.sleep(FULL_WAIT).await;
            }
            Err(AppendError::Unknown(why)) => {
                tracing::warn!(%stream, why, "it is not known whether an event was stored; reading");
                match written(shared, stream, expected, records).await {
                    Ok(true) => return Ok(()),
                    // A disk that fails for longer must not be asked without end.
                    Ok(false) => {
                        full();
                        shared.clock.sleep(FULL_WAIT).await;
                    }
                    Err(lost) => return Err(lost),
                }
            }
            Err(error @ (AppendError::Conflict { .. } | AppendError::KeyTaken(_))) => {
                return Err(Lost::Owned(error.to_string()));
            }
            Err(error) => return Err(Lost::Fatal(error.to_string())),
        }
    }
}

async fn written(
    shared: &Shared,
    stream: &StreamId,
    expected: Seq,
    records: &[Vec<u8>],
) -> Result<bool, Lost> {
    let found =
        shared.store.read(stream, expected.next(), 0).await.map_err(|e| Lost::Fatal(e.to_string()))?;
    if found.is_empty() {
        return Ok(false);
    }
    if found.len() == records.len() && found.iter().zip(records).all(|(found, ours)| &found.bytes == ours) {
        return Ok(true);
    }
    Err(Lost::Owned(format!("stream {stream} goes on after {expected} with events of another process")))
}

/// The stored form of an event.
pub(super) fn encode(event: &Event) -> Result<Vec<u8>, String> {
    serde_json::to_vec(event).map_err(|e| format!("an event cannot be serialised: {e}"))
}

/// An event from its stored form.
pub(crate) fn decode(record: &Record) -> Result<Event, Fault> {
    let fault = |cause: String| {
        let object = format!("{} at {}", record.stream, record.seq);
        Fault::permanent(Code::UNKNOWN_STEP_KIND, "read an event", object, cause)
            .class(Class::Fatal)
            .remedy("Use a release that knows this event; the job is set aside and nothing of it is touched")
    };
    let event: Event = serde_json::from_slice(&record.bytes).map_err(|e| fault(e.to_string()))?;
    if event.v > crate::event::FORMAT {
        return Err(fault(format!(
            "it has format {}, and this release reads up to {}",
            event.v,
            crate::event::FORMAT
        )));
    }
    Ok(event)
}

/// A job's events, from the store.
pub(crate) async fn history(store: &dyn EventStore, job: JobId) -> Result<Vec<(Seq, Event)>, Fault> {
    let stream = StreamId::job(job);
    let records = store
        .read(&stream, Seq(1), 0)
        .await
        .map_err(|e| e.fault("read a job's history", stream.to_string()))?;
    if records.is_empty() {
        return Err(no_such_job(job));
    }
    records.iter().map(|record| Ok((record.seq, decode(record)?))).collect()
}

pub(super) fn no_such_job(job: JobId) -> Fault {
    Fault::permanent(Code::NO_SUCH_JOB, "find the job", job.to_string(), "the store has no job of that id")
        .remedy("`vmkeep jobs` lists the jobs")
}

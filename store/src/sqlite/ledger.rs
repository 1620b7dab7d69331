//! One transaction for a group of appends.
//!
//! The ledger knows where each stream in use ends, so an append costs no query: while the lock is held nobody else
//! writes. What it knows changes only after `COMMIT` returned; after a failure all of it is forgotten and read anew.
//!
//! Whether an append conflicts or its key is taken is found out *before* its first write. So a group needs no
//! savepoints: either an append is left out with its answer, or its writes are expected to work; when one does not, the
//! whole transaction is rolled back, and the writer tries the appends one by one.

use std::collections::HashMap;
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row};
use uuid::Uuid;
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{Append, AppendError, link};
use vmkeep_workflow::summary::JobSummary;

use super::errors::Failed;
use crate::chain::{self, Digest, GENESIS, Hash, Placed};
use crate::queue::{Outcome, Prepare, Written};
use crate::{Adoption, Burial, accept, adoption};

/// So many streams are remembered; more than jobs ever run at once.
const REMEMBERED: usize = 10_000;

/// An append that was checked, with its summary made ready to be stored.
pub(super) struct Prepared {
    pub(super) append: Append,
    projection: Option<Projection>,
    /// The job whose history goes with it, and where its stream must end.
    buries: Option<(JobId, Seq)>,
}

struct Projection {
    job: Uuid,
    indexed: Arc<Indexed>,
    updated: i64,
    json: String,
}

/// The columns of a job that indexes hold.
#[derive(PartialEq, Eq)]
struct Indexed {
    subject: String,
    workflow: String,
    status: &'static str,
    requested: i64,
}

/// An instant as it is stored: nanoseconds since 1970, which last until the year 2262.
pub(super) fn nanoseconds(at: jiff::Timestamp) -> i64 {
    let nanoseconds = at.as_nanosecond();
    i64::try_from(nanoseconds).unwrap_or(if nanoseconds < 0 { i64::MIN } else { i64::MAX })
}

impl Prepared {
    /// Makes an append ready. Takes the summary out of it.
    pub(super) fn new(mut append: Append) -> Result<Self, AppendError> {
        accept::check(&append)?;
        let projection = append.summary.take().map(|summary| Projection::of(&summary)).transpose()?;
        Ok(Self { append, projection, buries: None })
    }

    /// Makes a burial ready.
    pub(super) fn burial(burial: Burial) -> Result<Self, AppendError> {
        accept::check_burial(&burial)?;
        Ok(Self { buries: Some((burial.job, burial.events)), ..Self::new(burial.note)? })
    }
}

impl Prepare for Prepared {
    fn append(&self) -> &Append {
        &self.append
    }

    fn into_append(self) -> Append {
        self.append
    }
}

impl Projection {
    fn of(summary: &JobSummary) -> Result<Self, AppendError> {
        let json = serde_json::to_string(summary)
            .map_err(|e| AppendError::Rejected(format!("the summary of {}: {e}", summary.job)))?;
        Ok(Self {
            job: summary.job.uuid(),
            indexed: Arc::new(Indexed {
                subject: summary.subject.id.clone(),
                workflow: summary.workflow.as_str().to_owned(),
                status: summary.status.as_str(),
                requested: nanoseconds(summary.requested),
            }),
            updated: nanoseconds(summary.updated),
            json,
        })
    }
}

/// Where a stream ends.
#[derive(Clone)]
struct Tail {
    /// The stream's key; none before its first record.
    key: Option<i64>,
    last: Seq,
    hash: Hash,
    /// Whether its history was let go.
    buried: bool,
    /// What the job's row says in its indexed columns, as far as it is known.
    indexed: Option<Arc<Indexed>>,
}

/// The last commit.
#[derive(Clone, Copy)]
struct Head {
    number: u64,
    link: Hash,
}

/// The write connection and what is known about the end of things.
pub(super) struct Ledger {
    connection: Connection,
    head: Head,
    tails: HashMap<StreamId, Tail>,
}

/// A transaction in the making.
struct Draft<'a> {
    connection: &'a Connection,
    known: &'a HashMap<StreamId, Tail>,
    fresh: HashMap<StreamId, Tail>,
    number: u64,
    digest: Digest,
    appends: usize,
}

impl Ledger {
    /// Reads where the commits end.
    pub(super) fn open(connection: Connection, store: Uuid) -> rusqlite::Result<Self> {
        let head = connection
            .query_row("SELECT number, link FROM commits ORDER BY number DESC LIMIT 1", [], |row| {
                Ok(Head { number: unsigned(row, 0)?, link: row.get(1)? })
            })
            .optional()?
            .unwrap_or_else(|| Head { number: 0, link: chain::genesis(store) });
        Ok(Self { connection, head, tails: HashMap::new() })
    }

    /// The connection, for checkpoints.
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Writes a group in one durable transaction. The outcomes hold only if all of it succeeds.
    pub(super) fn attempt(&mut self, group: &[&Prepared]) -> Result<Vec<Outcome>, Failed> {
        let mut draft = Draft {
            connection: &self.connection,
            known: &self.tails,
            fresh: HashMap::with_capacity(group.len()),
            number: self.head.number + 1,
            digest: Digest::default(),
            appends: 0,
        };
        let outcomes = match draft.write(group) {
            Ok(outcomes) => outcomes,
            Err(error) => return Err(self.roll_back(false, error)),
        };
        let Draft { fresh, number, digest, appends, .. } = draft;
        if appends == 0 {
            return match execute(&self.connection, "ROLLBACK") {
                Ok(()) => Ok(outcomes),
                Err(error) => Err(self.roll_back(false, error)),
            };
        }
        let digest = digest.finish();
        let head = Head { number, link: chain::link(&self.head.link, number, &digest) };
        if let Err(error) = self.seal(&head, &digest) {
            return Err(self.roll_back(false, error));
        }
        if let Err(error) = execute(&self.connection, "COMMIT") {
            return Err(self.roll_back(true, error));
        }
        self.head = head;
        if self.tails.len() + fresh.len() > REMEMBERED {
            self.tails.clear();
        }
        self.tails.extend(fresh);
        Ok(outcomes)
    }

    /// Takes in commits as another store sealed them.
    pub(super) fn adopt(&mut self, adoption: &Adoption) -> Result<Result<(), AppendError>, Failed> {
        let adopted = match self.try_adopt(adoption) {
            Ok(Ok(head)) => head,
            Ok(Err(refusal)) => {
                let _ = self.roll_back(false, rusqlite::Error::QueryReturnedNoRows);
                return Ok(Err(refusal));
            }
            Err(error) => return Err(self.roll_back(false, error)),
        };
        if let Err(error) = execute(&self.connection, "COMMIT") {
            return Err(self.roll_back(true, error));
        }
        (self.head, self.tails) = (adopted, HashMap::new());
        Ok(Ok(()))
    }

    fn try_adopt(&self, adoption: &Adoption) -> rusqlite::Result<Result<Head, AppendError>> {
        let db = &self.connection;
        execute(db, "BEGIN IMMEDIATE")?;
        let position: i64 =
            db.query_row("SELECT coalesce(max(position), 0) FROM records", [], |row| row.get(0))?;
        let end = adoption::check(adoption, self.head.number, self.head.link, position.cast_unsigned());
        let (number, link, _) = match end {
            Ok(end) => end,
            Err(refusal) => return Ok(Err(refusal)),
        };
        for commit in &adoption.commits {
            db.prepare_cached("INSERT INTO commits (number, digest, link) VALUES (?1, ?2, ?3)")?
                .execute((commit.number.cast_signed(), commit.digest, commit.link))?;
        }
        for Placed { position, commit, record } in &adoption.records {
            let id = self.stream_key(&record.stream)?;
            db.prepare_cached(
                "INSERT INTO records (position, stream, seq, commit_number, hash, bytes)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute((
                position.cast_signed(),
                id,
                record.seq.0.cast_signed(),
                commit.cast_signed(),
                record.hash,
                std::str::from_utf8(&record.bytes)?,
            ))?;
        }
        for summary in &adoption.jobs {
            let id = self.stream_key(&StreamId::job(summary.job))?;
            match Projection::of(summary) {
                Ok(projection) => upsert(db, id, &projection)?,
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        for (key, stream) in &adoption.keys {
            db.prepare_cached("INSERT INTO keys (key, stream) VALUES (?1, ?2)")?
                .execute((key, stream.as_str()))?;
        }
        Ok(Ok(Head { number, link }))
    }

    fn stream_key(&self, stream: &StreamId) -> rusqlite::Result<i64> {
        let known = self
            .connection
            .prepare_cached("SELECT key FROM streams WHERE name = ?1")?
            .query_row([stream.as_str()], |row| row.get(0))
            .optional()?;
        match known {
            Some(key) => Ok(key),
            None => self
                .connection
                .prepare_cached("INSERT INTO streams (name) VALUES (?1)")?
                .insert([stream.as_str()]),
        }
    }

    fn seal(&self, head: &Head, digest: &Hash) -> rusqlite::Result<()> {
        self.connection
            .prepare_cached("INSERT INTO commits (number, digest, link) VALUES (?1, ?2, ?3)")?
            .execute((head.number.cast_signed(), digest, head.link))?;
        Ok(())
    }

    fn roll_back(&mut self, at_commit: bool, error: rusqlite::Error) -> Failed {
        self.tails.clear();
        if !self.connection.is_autocommit() {
            // Many failures have rolled back already; whether this one has is what counts.
            let _ = execute(&self.connection, "ROLLBACK");
        }
        Failed { at_commit, error, stuck: !self.connection.is_autocommit() }
    }
}

/// Writes a job's summary, whatever was there.
fn upsert(connection: &Connection, id: i64, projection: &Projection) -> rusqlite::Result<()> {
    let Projection { job, indexed, updated, json } = projection;
    connection
        .prepare_cached(
            "INSERT INTO jobs (stream, job, subject, workflow, status, requested, updated, summary)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT (stream) DO UPDATE SET job = excluded.job, subject = excluded.subject,
                 workflow = excluded.workflow, status = excluded.status, requested = excluded.requested,
                 updated = excluded.updated, summary = excluded.summary",
        )?
        .execute((
            id,
            job.as_bytes(),
            &indexed.subject,
            &indexed.workflow,
            indexed.status,
            indexed.requested,
            updated,
            json,
        ))?;
    Ok(())
}

fn execute(connection: &Connection, sql: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(sql)?.execute([]).map(drop)
}

/// A column that is never negative.
pub(super) fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, value))
}

impl Draft<'_> {
    fn write(&mut self, group: &[&Prepared]) -> rusqlite::Result<Vec<Outcome>> {
        execute(self.connection, "BEGIN IMMEDIATE")?;
        group.iter().map(|prepared| self.append(prepared)).collect()
    }

    fn append(&mut self, prepared: &Prepared) -> rusqlite::Result<Outcome> {
        let Append { stream, expected, records, key, .. } = &prepared.append;
        let mut tail = self.tail(stream)?;
        if tail.last != *expected {
            let conflict =
                AppendError::Conflict { stream: stream.clone(), expected: *expected, actual: tail.last };
            self.fresh.insert(stream.clone(), tail);
            return Ok(Err(conflict));
        }
        if tail.buried {
            return Ok(Err(accept::buried(stream)));
        }
        if let Some((job, events)) = prepared.buries
            && let Err(refusal) = self.bury(job, events)?
        {
            return Ok(Err(refusal));
        }
        if let Some(key) = key {
            match self.key(key)? {
                Some(holder) if holder != stream.as_str() => {
                    return Ok(Err(AppendError::KeyTaken(StreamId::from(holder))));
                }
                Some(_) => {}
                None => {
                    self.connection
                        .prepare_cached("INSERT INTO keys (key, stream) VALUES (?1, ?2)")?
                        .execute((key, stream.as_str()))?;
                }
            }
        }
        let id = match tail.key {
            Some(id) => id,
            None => self
                .connection
                .prepare_cached("INSERT INTO streams (name) VALUES (?1)")?
                .insert([stream.as_str()])?,
        };
        tail.key = Some(id);
        let mut hashes = Vec::with_capacity(records.len());
        let mut insert = self.connection.prepare_cached(
            "INSERT INTO records (stream, seq, commit_number, hash, bytes) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        for bytes in records {
            tail.last = tail.last.next();
            tail.hash = link(&tail.hash, bytes);
            let text = std::str::from_utf8(bytes)?;
            insert.execute((id, tail.last.0.cast_signed(), self.number.cast_signed(), tail.hash, text))?;
            self.digest.add(stream, tail.last, &tail.hash);
            hashes.push(tail.hash);
        }
        if let Some(projection) = &prepared.projection {
            self.project(id, &mut tail, projection)?;
        }
        let last = tail.last;
        self.fresh.insert(stream.clone(), tail);
        self.appends += 1;
        Ok(Ok(Written { last, hashes }))
    }

    fn tail(&self, stream: &StreamId) -> rusqlite::Result<Tail> {
        match self.fresh.get(stream).or_else(|| self.known.get(stream)) {
            Some(tail) => Ok(tail.clone()),
            None => self.load(stream),
        }
    }

    /// Lets the bytes of a job's records go, its summary and its rows.
    fn bury(&mut self, job: JobId, events: Seq) -> rusqlite::Result<Result<(), AppendError>> {
        let stream = StreamId::job(job);
        let mut tail = self.tail(&stream)?;
        let (Some(id), true) = (tail.key, tail.last == events && !tail.buried) else {
            return Ok(Err(AppendError::Conflict { stream, expected: events, actual: tail.last }));
        };
        for sql in ["UPDATE records SET bytes = '' WHERE stream = ?1", "DELETE FROM jobs WHERE stream = ?1"] {
            self.connection.prepare_cached(sql)?.execute([id])?;
        }
        self.connection
            .prepare_cached("DELETE FROM rows WHERE job = ?1")?
            .execute([job.uuid().as_bytes()])?;
        (tail.buried, tail.indexed) = (true, None);
        self.fresh.insert(stream, tail);
        Ok(Ok(()))
    }

    /// Writes a job's summary. Its indexes are touched only when what they hold changes, which is seldom.
    fn project(&self, id: i64, tail: &mut Tail, projection: &Projection) -> rusqlite::Result<()> {
        let Projection { indexed, updated, json, .. } = projection;
        if tail.indexed.as_ref() == Some(indexed) {
            self.connection
                .prepare_cached("UPDATE jobs SET updated = ?2, summary = ?3 WHERE stream = ?1")?
                .execute((id, updated, json))?;
            return Ok(());
        }
        upsert(self.connection, id, projection)?;
        tail.indexed = Some(Arc::clone(indexed));
        Ok(())
    }

    fn key(&self, key: &str) -> rusqlite::Result<Option<String>> {
        self.connection
            .prepare_cached("SELECT stream FROM keys WHERE key = ?1")?
            .query_row([key], |row| row.get(0))
            .optional()
    }

    fn load(&self, stream: &StreamId) -> rusqlite::Result<Tail> {
        let key: Option<i64> = self
            .connection
            .prepare_cached("SELECT key FROM streams WHERE name = ?1")?
            .query_row([stream.as_str()], |row| row.get(0))
            .optional()?;
        let none = Tail { key, last: Seq(0), hash: GENESIS, buried: false, indexed: None };
        if key.is_none() {
            return Ok(none);
        }
        let tail = self
            .connection
            .prepare_cached(
                "SELECT seq, hash, bytes = '' FROM records WHERE stream = ?1 ORDER BY seq DESC LIMIT 1",
            )?
            .query_row([key], |row| {
                let (last, hash, buried) = (Seq(unsigned(row, 0)?), row.get(1)?, row.get(2)?);
                Ok(Tail { last, hash, buried, ..none.clone() })
            })
            .optional()?;
        Ok(tail.unwrap_or(none))
    }
}

//! What a group of appends changes, worked out before anything is written.
//!
//! The ledger knows where the journal and each stream in use end: while the lock is held nobody else writes. What it knows
//! changes only after a group became durable; after a failure all of it is read anew.

use std::collections::HashMap;

use sled::Db;
use uuid::Uuid;
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{Append, AppendError, Record, StoreError, link};
use vmkeep_workflow::summary::JobSummary;

use super::codec::{self, Changes, Tail};
use super::queries;
use crate::chain::{self, Commit, Digest, Hash, Placed};
use crate::queue::{Outcome, Prepare, RowChange, Written};
use crate::{Adoption, Burial, accept, adoption};

/// So many streams are remembered; more than jobs ever run at once.
const REMEMBERED: usize = 10_000;

/// An append that was checked, with its summary as it is stored.
pub(super) struct Prepared {
    pub(super) append: Append,
    summary: Option<(Uuid, Vec<u8>)>,
    /// The job whose history goes with it, and where its stream must end.
    buries: Option<(JobId, Seq)>,
}

impl Prepared {
    /// Makes an append ready. Takes the summary out of it.
    pub(super) fn new(mut append: Append) -> Result<Self, AppendError> {
        accept::check(&append)?;
        let summary = match append.summary.take() {
            Some(summary) => Some((summary.job.uuid(), json(&summary)?)),
            None => None,
        };
        Ok(Self { append, summary, buries: None })
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

fn json(summary: &JobSummary) -> Result<Vec<u8>, AppendError> {
    serde_json::to_vec(summary)
        .map_err(|e| AppendError::Rejected(format!("the summary of {}: {e}", summary.job)))
}

/// The end of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) commit: u64,
    pub(super) link: Hash,
    pub(super) position: u64,
}

impl End {
    /// Reads where the journal ends.
    pub(super) fn read(db: &Db, store: Uuid) -> Result<Self, StoreError> {
        let last = queries::last_commit(db)?;
        let (commit, link) =
            last.map_or_else(|| (0, chain::genesis(store)), |commit| (commit.number, commit.link));
        Ok(Self { commit, link, position: queries::last_position(db)? })
    }
}

/// What is known about the end of things.
pub(super) struct Ledger {
    pub(super) end: End,
    tails: HashMap<StreamId, Tail>,
}

impl Ledger {
    pub(super) fn new(end: End) -> Self {
        Self { end, tails: HashMap::new() }
    }

    /// Takes in what became durable.
    pub(super) fn accept(&mut self, end: End, fresh: HashMap<StreamId, Tail>) {
        self.end = end;
        if self.tails.len() + fresh.len() > REMEMBERED {
            self.tails.clear();
        }
        self.tails.extend(fresh);
    }
}

/// A group in the making.
pub(super) struct Draft<'a> {
    db: &'a Db,
    ledger: &'a Ledger,
    changes: Changes,
    fresh: HashMap<StreamId, Tail>,
    keys: HashMap<String, StreamId>,
    digest: Digest,
    end: End,
    appends: usize,
}

/// A group that is ready to be written.
pub(super) struct Ready {
    pub(super) changes: Changes,
    pub(super) end: End,
    pub(super) fresh: HashMap<StreamId, Tail>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(db: &'a Db, ledger: &'a Ledger) -> Self {
        Self {
            db,
            ledger,
            changes: Changes::default(),
            fresh: HashMap::new(),
            keys: HashMap::new(),
            digest: Digest::default(),
            end: End { commit: ledger.end.commit + 1, ..ledger.end },
            appends: 0,
        }
    }

    /// Adds an append, or says why it is left out.
    pub(super) fn append(&mut self, prepared: &Prepared) -> Result<Outcome, StoreError> {
        let Append { stream, expected, records, key, .. } = &prepared.append;
        let mut tail = self.tail(stream)?;
        if tail.last != *expected {
            let (stream, expected, actual) = (stream.clone(), *expected, tail.last);
            return Ok(Err(AppendError::Conflict { stream, expected, actual }));
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
            let holder = match self.keys.get(key) {
                Some(holder) => Some(holder.clone()),
                None => queries::key(self.db, key)?,
            };
            match holder {
                Some(holder) if holder != *stream => return Ok(Err(AppendError::KeyTaken(holder))),
                Some(_) => {}
                None => {
                    let value = stream.as_str().as_bytes().to_vec();
                    self.changes.set(codec::named(codec::KEY, key), value);
                    self.keys.insert(key.clone(), stream.clone());
                }
            }
        }
        let mut hashes = Vec::with_capacity(records.len());
        for bytes in records {
            let seq = tail.last.next();
            tail = Tail { last: seq, hash: link(&tail.hash, bytes), buried: false };
            let record = Record { stream: stream.clone(), seq, bytes: bytes.clone(), hash: tail.hash };
            self.end.position += 1;
            self.record(self.end.position, &record);
            hashes.push(tail.hash);
        }
        self.changes.set(codec::named(codec::STREAM, stream.as_str()), codec::tail(&tail));
        if let Some((job, json)) = &prepared.summary {
            self.changes.set_long(self.db, &codec::job(*job), json)?;
        }
        let last = tail.last;
        self.fresh.insert(stream.clone(), tail);
        self.appends += 1;
        Ok(Ok(Written { last, hashes }))
    }

    fn tail(&self, stream: &StreamId) -> Result<Tail, StoreError> {
        match self.fresh.get(stream).or_else(|| self.ledger.tails.get(stream)) {
            Some(tail) => Ok(*tail),
            None => Ok(queries::tail(self.db, stream)?.unwrap_or(Tail::NONE)),
        }
    }

    /// Lets the bytes of a job's records go, its summary and its rows.
    fn bury(&mut self, job: JobId, events: Seq) -> Result<Result<(), AppendError>, StoreError> {
        let stream = StreamId::job(job);
        let tail = self.tail(&stream)?;
        // What this very group appended is not in the tree yet; nobody buries a job that is being written.
        if tail.last != events || tail.buried || self.fresh.contains_key(&stream) {
            let (expected, actual) = (events, tail.last);
            return Ok(Err(AppendError::Conflict { stream, expected, actual }));
        }
        for seq in 1..=events.0 {
            let Placed { position, commit, mut record } = queries::at(self.db, &stream, Seq(seq))?;
            record.bytes.clear();
            let key = codec::numbered(codec::RECORD, position);
            self.changes.set_long(self.db, &key, &codec::record(commit, &record))?;
        }
        self.changes.remove_long(self.db, codec::job(job.uuid()))?;
        for key in queries::row_keys(self.db, job.uuid())? {
            self.changes.remove_long(self.db, key)?;
        }
        let tail = Tail { buried: true, ..tail };
        self.changes.set(codec::named(codec::STREAM, stream.as_str()), codec::tail(&tail));
        self.fresh.insert(stream, tail);
        Ok(Ok(()))
    }

    fn record(&mut self, position: u64, record: &Record) {
        put(&mut self.changes, position, self.end.commit, record);
        self.digest.add(&record.stream, record.seq, &record.hash);
    }

    /// Seals the group; nothing if there is nothing to write.
    pub(super) fn seal(mut self) -> Option<Ready> {
        if self.appends == 0 {
            return None;
        }
        let (number, digest) = (self.end.commit, self.digest.finish());
        self.end.link = chain::link(&self.ledger.end.link, number, &digest);
        let commit = Commit { number, digest, link: self.end.link };
        self.changes.set(codec::numbered(codec::COMMIT, number), codec::commit(&commit));
        Some(Ready { changes: self.changes, end: self.end, fresh: self.fresh })
    }
}

fn put(changes: &mut Changes, position: u64, commit: u64, record: &Record) {
    changes.set_new(codec::numbered(codec::RECORD, position), &codec::record(commit, record));
    changes.set(codec::place(&record.stream, record.seq), position.to_be_bytes().to_vec());
}

/// What commits of another store come to.
pub(super) fn adopt(ledger: &Ledger, adoption: &Adoption) -> Result<Ready, AppendError> {
    let End { commit, link, position } = ledger.end;
    let (commit, link, position) = adoption::check(adoption, commit, link, position)?;
    let mut changes = Changes::default();
    let mut fresh = HashMap::new();
    for commit in &adoption.commits {
        changes.set(codec::numbered(codec::COMMIT, commit.number), codec::commit(commit));
    }
    for Placed { position, commit, record } in &adoption.records {
        put(&mut changes, *position, *commit, record);
        let tail = Tail { last: record.seq, hash: record.hash, buried: record.bytes.is_empty() };
        fresh.insert(record.stream.clone(), tail);
    }
    for (stream, tail) in &fresh {
        changes.set(codec::named(codec::STREAM, stream.as_str()), codec::tail(tail));
    }
    for summary in &adoption.jobs {
        changes.set_new(codec::job(summary.job.uuid()), &json(summary)?);
    }
    for (key, stream) in &adoption.keys {
        changes.set(codec::named(codec::KEY, key), stream.as_str().as_bytes().to_vec());
    }
    Ok(Ready { changes, end: End { commit, link, position }, fresh })
}

/// What changes of rows come to.
pub(super) fn rows<'a>(db: &Db, wanted: impl Iterator<Item = &'a RowChange>) -> Result<Changes, StoreError> {
    let mut changes = Changes::default();
    // Rows that were set in this very group are cleared as well.
    let mut set: Vec<(Uuid, Vec<u8>)> = Vec::new();
    for change in wanted {
        match change {
            RowChange::Put { job, row, value } => {
                let key = codec::row(*job, row);
                changes.set_long(db, &key, value.to_string().as_bytes())?;
                set.push((*job, key));
            }
            RowChange::Clear { job } => {
                for key in queries::row_keys(db, *job)? {
                    changes.remove_long(db, key)?;
                }
                for (_, key) in set.iter().filter(|(of, _)| of == job) {
                    changes.remove(key.clone());
                }
            }
        }
    }
    Ok(changes)
}

//! What is read. Each function is one question to the tree; damage is told with the place where it is.

use serde_json::Value;
use sled::{Db, IVec};
use uuid::Uuid;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{JobFilter, Record, StoreError};
use vmkeep_workflow::summary::JobSummary;

use super::codec::{self, Tail};
use super::errors::unread;
use super::head::Head;
use crate::chain::{self, Commit, GENESIS, Placed};
use crate::{burial, fold};

/// A page of the history is closed when its records reach so many bytes.
const PAGE_BYTES: usize = 8 << 20;

type Answer<T> = Result<T, StoreError>;

fn get(db: &Db, key: &[u8]) -> Answer<Option<IVec>> {
    db.get(key).map_err(|e| unread("read an entry", &e))
}

fn entry(found: sled::Result<(IVec, IVec)>) -> Answer<(IVec, IVec)> {
    found.map_err(|e| unread("read the entries", &e))
}

/// Where a stream ends; nothing if there is none.
pub(super) fn tail(db: &Db, stream: &StreamId) -> Answer<Option<Tail>> {
    let key = codec::named(codec::STREAM, stream.as_str());
    get(db, &key)?.map(|value| codec::read_tail(&value)).transpose()
}

/// The record at a position.
pub(super) fn placed(db: &Db, position: u64) -> Answer<Option<Placed>> {
    let key = codec::numbered(codec::RECORD, position);
    match get(db, &key)? {
        Some(value) => codec::read_record(position, &codec::whole(db, &key, &value)?).map(Some),
        None => Ok(None),
    }
}

fn missing(stream: &StreamId, seq: Seq) -> StoreError {
    StoreError::Damaged(format!("stream {:?}, record {seq}: it is missing", stream.as_str()))
}

/// The record at a place.
pub(super) fn at(db: &Db, stream: &StreamId, seq: Seq) -> Answer<Placed> {
    let position = get(db, &codec::place(stream, seq))?.ok_or_else(|| missing(stream, seq))?;
    let placed = placed(db, codec::number(&position)?)?.ok_or_else(|| missing(stream, seq))?;
    if placed.record.stream != *stream || placed.record.seq != seq {
        return Err(missing(stream, seq));
    }
    Ok(placed)
}

pub(super) fn read(db: &Db, stream: &StreamId, from: Seq, limit: usize) -> Answer<Vec<Record>> {
    let Some(tail) = tail(db, stream)? else { return Ok(Vec::new()) };
    let (from, limit) = (from.0.max(1), if limit == 0 { u64::MAX } else { limit as u64 });
    if from > tail.last.0 {
        return Ok(Vec::new());
    }
    if tail.buried {
        return Err(burial::gone(stream, tail.last, &tail.hash));
    }
    let mut previous = if from == 1 { GENESIS } else { at(db, stream, Seq(from - 1))?.record.hash };
    let mut records = Vec::new();
    for seq in from..=tail.last.0.min(from.saturating_add(limit - 1)) {
        let record = at(db, stream, Seq(seq))?.record;
        chain::check(&record, &previous)?;
        previous = record.hash;
        records.push(record);
    }
    Ok(records)
}

pub(super) fn last(db: &Db, stream: &StreamId) -> Answer<Seq> {
    Ok(tail(db, stream)?.map_or(Seq(0), |tail| tail.last))
}

pub(super) fn streams(db: &Db) -> Answer<Vec<StreamId>> {
    Ok(tails(db)?.into_iter().filter(|(_, tail)| !tail.buried).map(|(stream, _)| stream).collect())
}

fn tails(db: &Db) -> Answer<Vec<(StreamId, Tail)>> {
    let all = db.scan_prefix([codec::STREAM]).map(|found| {
        let (key, value) = entry(found)?;
        Ok((StreamId::from(codec::text(&key[1..])?), codec::read_tail(&value)?))
    });
    all.collect()
}

fn summary(db: &Db, key: &[u8], value: &[u8]) -> Answer<JobSummary> {
    serde_json::from_slice(&codec::whole(db, key, value)?)
        .map_err(|e| StoreError::Damaged(format!("a job's summary cannot be understood: {e}")))
}

pub(super) fn jobs(db: &Db, filter: &JobFilter) -> Answer<Vec<JobSummary>> {
    let all = db.scan_prefix([codec::JOB]).map(|found| {
        let (key, value) = entry(found)?;
        summary(db, &key, &value)
    });
    Ok(fold::pick(all.collect::<Answer<Vec<_>>>()?.into_iter(), filter))
}

pub(super) fn job(db: &Db, job: Uuid) -> Answer<Option<JobSummary>> {
    let key = codec::job(job);
    get(db, &key)?.map(|value| summary(db, &key, &value)).transpose()
}

pub(super) fn key(db: &Db, key: &str) -> Answer<Option<StreamId>> {
    let found = get(db, &codec::named(codec::KEY, key))?;
    found.map(|stream| codec::text(&stream).map(StreamId::from)).transpose()
}

pub(super) fn keys(db: &Db) -> Answer<Vec<(String, StreamId)>> {
    let all = db.scan_prefix([codec::KEY]).map(|found| {
        let (key, stream) = entry(found)?;
        Ok((codec::text(&key[1..])?, StreamId::from(codec::text(&stream)?)))
    });
    all.collect()
}

pub(super) fn rows(db: &Db, job: Uuid) -> Answer<Vec<(String, Value)>> {
    let prefix = codec::rows(job);
    let all = db.scan_prefix(&prefix).map(|found| {
        let (key, value) = entry(found)?;
        let name = codec::text(&key[prefix.len()..])?;
        match serde_json::from_slice(&codec::whole(db, &key, &value)?) {
            Ok(value) => Ok((name, value)),
            Err(e) => Err(StoreError::Damaged(format!("the row {name:?} cannot be understood: {e}"))),
        }
    });
    all.collect()
}

pub(super) fn history(db: &Db, after: u64, limit: usize) -> Answer<Vec<Placed>> {
    let (mut page, mut size) = (Vec::new(), 0);
    let Some(from) = after.checked_add(1) else { return Ok(page) };
    let range = codec::numbered(codec::RECORD, from)..=codec::numbered(codec::RECORD, u64::MAX);
    for found in db.range(range) {
        if page.len() >= limit || size >= PAGE_BYTES {
            break;
        }
        let (key, value) = entry(found)?;
        let placed = codec::read_record(codec::last_number(&key)?, &codec::whole(db, &key, &value)?)?;
        size += placed.record.bytes.len();
        page.push(placed);
    }
    Ok(page)
}

pub(super) fn commits(db: &Db, after: u64, limit: usize) -> Answer<Vec<Commit>> {
    let Some(from) = after.checked_add(1) else { return Ok(Vec::new()) };
    let range = codec::numbered(codec::COMMIT, from)..=codec::numbered(codec::COMMIT, u64::MAX);
    let commits = db.range(range).take(limit).map(|found| {
        let (key, value) = entry(found)?;
        codec::read_commit(&key, &value)
    });
    commits.collect()
}

/// The last commit; nothing before the first.
pub(super) fn last_commit(db: &Db) -> Answer<Option<Commit>> {
    let range = codec::numbered(codec::COMMIT, 0)..=codec::numbered(codec::COMMIT, u64::MAX);
    let last = db.range(range).next_back().map(entry).transpose()?;
    last.map(|(key, value)| codec::read_commit(&key, &value)).transpose()
}

/// The last position; 0 before the first.
pub(super) fn last_position(db: &Db) -> Answer<u64> {
    let range = codec::numbered(codec::RECORD, 0)..=codec::numbered(codec::RECORD, u64::MAX);
    match db.range(range).next_back().map(entry).transpose()? {
        Some((key, _)) => codec::last_number(&key),
        None => Ok(0),
    }
}

/// Looks for what sled may have lost: the end of the journal, records out of the middle, places and ends of streams.
pub(super) fn inspect(db: &Db, head: &Head) -> Answer<Vec<String>> {
    match look(db, head) {
        Ok(found) => Ok(found),
        Err(StoreError::Damaged(what)) => Ok(vec![what]),
        Err(other) => Err(other),
    }
}

fn look(db: &Db, head: &Head) -> Answer<Vec<String>> {
    let mut found = Vec::new();
    if let Some(what) = short_of(db, head)? {
        found.push(what);
    }
    let (mut position, mut records) = (0, 0_u64);
    loop {
        let page = history(db, position, 512)?;
        let Some(last) = page.last() else { break };
        for placed in &page {
            let record = &placed.record;
            let name = record.stream.as_str();
            if placed.position != position + 1 {
                found.push(format!(
                    "between the positions {position} and {} records are missing",
                    placed.position
                ));
            }
            position = placed.position;
            records += 1;
            let index = get(db, &codec::place(&record.stream, record.seq))?;
            if index.map(|index| codec::number(&index)).transpose()? != Some(position) {
                found.push(format!("stream {name:?}, record {}: its place does not lead to it", record.seq));
            }
            if tail(db, &record.stream)?.is_none_or(|tail| tail.last < record.seq) {
                found.push(format!("stream {name:?}: it ends before record {}", record.seq));
            }
        }
        position = last.position;
    }
    let places = db.scan_prefix([codec::PLACE]).try_fold(0_u64, |n, found| entry(found).map(|_| n + 1))?;
    if places != records {
        found.push(format!("there are {records} records and {places} places"));
    }
    for (stream, tail) in tails(db)? {
        let last = at(db, &stream, tail.last)?.record;
        if last.hash != tail.hash || last.bytes.is_empty() != tail.buried {
            found.push(format!("stream {:?}: its last record is not the one that it had", stream.as_str()));
        }
    }
    Ok(found)
}

/// What the store lacks of what its head says that it has.
pub(super) fn short_of(db: &Db, head: &Head) -> Answer<Option<String>> {
    if head.commit == 0 {
        return Ok(None);
    }
    let found = get(db, &codec::numbered(codec::COMMIT, head.commit))?;
    let found = found.map(|value| codec::read_commit(&codec::numbered(codec::COMMIT, head.commit), &value));
    let last = last_commit(db)?.map_or(0, |commit| commit.number);
    Ok(match found.transpose()? {
        Some(commit) if commit.link == head.link => None,
        Some(_) => Some(format!("commit {} is not the one that the store had", head.commit)),
        None => Some(format!(
            "the journal ends at commit {last}, and had {}: its end was lost or damaged",
            head.commit
        )),
    })
}

/// The keys of a job's rows.
pub(super) fn row_keys(db: &Db, job: Uuid) -> Answer<Vec<Vec<u8>>> {
    db.scan_prefix(codec::rows(job)).map(|found| Ok(entry(found)?.0.to_vec())).collect()
}

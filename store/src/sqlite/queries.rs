//! What is read. Each function is one question to one connection; damage is told with the place where it is.

use rusqlite::types::{ToSql, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row};
use serde_json::Value;
use uuid::Uuid;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{JobFilter, Record, StoreError};
use vmkeep_workflow::summary::JobSummary;

use super::errors::unread;
use super::ledger::{nanoseconds, unsigned};
use crate::burial;
use crate::chain::{self, Commit, GENESIS, Hash, Placed};

/// A page of the history is closed when its records reach so many bytes.
const PAGE_BYTES: usize = 8 << 20;

type Answer<T> = Result<T, StoreError>;

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// No limit is -1 to SQLite.
fn at_most(limit: usize) -> i64 {
    if limit == 0 { -1 } else { i64::try_from(limit).unwrap_or(-1) }
}

fn bytes(row: &Row<'_>, column: usize) -> rusqlite::Result<Vec<u8>> {
    // Not as text: a damaged record need not be UTF-8, and is to be found by its hash.
    match row.get_ref(column)? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Ok(bytes.to_vec()),
        other => Err(rusqlite::Error::InvalidColumnType(column, "bytes".to_owned(), other.data_type())),
    }
}

fn stream_key(db: &Connection, stream: &StreamId) -> rusqlite::Result<Option<i64>> {
    db.prepare_cached("SELECT key FROM streams WHERE name = ?1")?
        .query_row([stream.as_str()], |row| row.get(0))
        .optional()
}

pub(super) fn read(db: &Connection, stream: &StreamId, from: Seq, limit: usize) -> Answer<Vec<Record>> {
    let from = Seq(from.0.max(1));
    let doing = || format!("read the stream {:?}", stream.as_str());
    let records = records(db, stream, from, limit).map_err(|e| unread(&doing(), &e))?;
    if records.is_empty() {
        return Ok(records);
    }
    let mut previous = predecessor(db, stream, from).map_err(|e| unread(&doing(), &e))?.ok_or_else(|| {
        StoreError::Damaged(format!("stream {:?}, record {}: it is missing", stream.as_str(), from.0 - 1))
    })?;
    let mut expected = from;
    for record in &records {
        if record.seq != expected {
            return Err(StoreError::Damaged(format!(
                "stream {:?}, record {expected}: it is missing",
                stream.as_str()
            )));
        }
        if record.bytes.is_empty() {
            return Err(pruned(db, stream).unwrap_or_else(|e| unread(&doing(), &e)));
        }
        chain::check(record, &previous)?;
        previous = record.hash;
        expected = expected.next();
    }
    Ok(records)
}

/// What there is to say of a stream whose history was let go.
fn pruned(db: &Connection, stream: &StreamId) -> rusqlite::Result<StoreError> {
    let key = stream_key(db, stream)?;
    db.prepare_cached("SELECT seq, hash FROM records WHERE stream = ?1 ORDER BY seq DESC LIMIT 1")?
        .query_row([key], |row| Ok(burial::gone(stream, Seq(unsigned(row, 0)?), &row.get(1)?)))
}

fn records(db: &Connection, stream: &StreamId, from: Seq, limit: usize) -> rusqlite::Result<Vec<Record>> {
    let Some(key) = stream_key(db, stream)? else { return Ok(Vec::new()) };
    db.prepare_cached(
        "SELECT seq, hash, bytes FROM records WHERE stream = ?1 AND seq >= ?2 ORDER BY seq LIMIT ?3",
    )?
    .query_map((key, signed(from.0), at_most(limit)), |row| {
        Ok(Record {
            stream: stream.clone(),
            seq: Seq(unsigned(row, 0)?),
            hash: row.get(1)?,
            bytes: bytes(row, 2)?,
        })
    })?
    .collect()
}

/// The hash of the record before a place.
fn predecessor(db: &Connection, stream: &StreamId, from: Seq) -> rusqlite::Result<Option<Hash>> {
    if from.0 <= 1 {
        return Ok(Some(GENESIS));
    }
    let key = stream_key(db, stream)?;
    db.prepare_cached("SELECT hash FROM records WHERE stream = ?1 AND seq = ?2")?
        .query_row((key, signed(from.0 - 1)), |row| row.get(0))
        .optional()
}

pub(super) fn last(db: &Connection, stream: &StreamId) -> Answer<Seq> {
    let ask = || {
        let Some(key) = stream_key(db, stream)? else { return Ok(Seq(0)) };
        db.prepare_cached("SELECT coalesce(max(seq), 0) FROM records WHERE stream = ?1")?
            .query_row([key], |row| Ok(Seq(unsigned(row, 0)?)))
    };
    ask().map_err(|e| unread(&format!("read the end of the stream {:?}", stream.as_str()), &e))
}

pub(super) fn streams(db: &Connection) -> Answer<Vec<StreamId>> {
    let ask = || -> rusqlite::Result<Vec<StreamId>> {
        db.prepare_cached(
            "SELECT name FROM streams LEFT JOIN records ON stream = key AND seq = 1
             WHERE bytes IS NULL OR bytes <> '' ORDER BY name",
        )?
        .query_map([], |row| Ok(StreamId::from(row.get::<_, String>(0)?)))?
        .collect()
    };
    ask().map_err(|e| unread("list the streams", &e))
}

fn summary(json: &str) -> Answer<JobSummary> {
    serde_json::from_str(json)
        .map_err(|e| StoreError::Damaged(format!("a job's summary cannot be understood: {e}")))
}

pub(super) fn jobs(db: &Connection, filter: &JobFilter) -> Answer<Vec<JobSummary>> {
    let mut sql = String::from("SELECT summary FROM jobs WHERE true");
    let mut values: Vec<Box<dyn ToSql>> = Vec::new();
    if let Some(subject) = &filter.subject {
        sql.push_str(" AND subject = ?");
        values.push(Box::new(subject.clone()));
    }
    if let Some(workflow) = &filter.workflow {
        sql.push_str(" AND workflow = ?");
        values.push(Box::new(workflow.clone()));
    }
    if !filter.status.is_empty() {
        sql.push_str(" AND status IN (?");
        sql.push_str(&", ?".repeat(filter.status.len() - 1));
        sql.push(')');
        for status in &filter.status {
            values.push(Box::new(status.as_str()));
        }
    }
    if let Some(since) = filter.since {
        sql.push_str(" AND requested >= ?");
        values.push(Box::new(nanoseconds(since)));
    }
    if let Some(until) = filter.until {
        sql.push_str(" AND requested < ?");
        values.push(Box::new(nanoseconds(until)));
    }
    sql.push_str(" ORDER BY requested DESC, job DESC LIMIT ?");
    values.push(Box::new(at_most(filter.limit)));
    let ask = || -> rusqlite::Result<Vec<String>> {
        db.prepare_cached(&sql)?
            .query_map(rusqlite::params_from_iter(values.iter()), |row| row.get(0))?
            .collect()
    };
    let found = ask().map_err(|e| unread("list the jobs", &e))?;
    found.iter().map(|json| summary(json)).collect()
}

pub(super) fn job(db: &Connection, stream: &StreamId) -> Answer<Option<JobSummary>> {
    let ask = || -> rusqlite::Result<Option<String>> {
        db.prepare_cached(
            "SELECT jobs.summary FROM streams JOIN jobs ON jobs.stream = streams.key WHERE streams.name = ?1",
        )?
        .query_row([stream.as_str()], |row| row.get(0))
        .optional()
    };
    let found = ask().map_err(|e| unread("read a job's summary", &e))?;
    found.map(|json| summary(&json)).transpose()
}

pub(super) fn key(db: &Connection, key: &str) -> Answer<Option<StreamId>> {
    let ask = || {
        db.prepare_cached("SELECT stream FROM keys WHERE key = ?1")?
            .query_row([key], |row| Ok(StreamId::from(row.get::<_, String>(0)?)))
            .optional()
    };
    ask().map_err(|e| unread("look a key up", &e))
}

pub(super) fn keys(db: &Connection) -> Answer<Vec<(String, StreamId)>> {
    let ask = || -> rusqlite::Result<Vec<(String, StreamId)>> {
        db.prepare_cached("SELECT key, stream FROM keys ORDER BY key")?
            .query_map([], |row| Ok((row.get(0)?, StreamId::from(row.get::<_, String>(1)?))))?
            .collect()
    };
    ask().map_err(|e| unread("list the keys", &e))
}

pub(super) fn rows(db: &Connection, job: Uuid) -> Answer<Vec<(String, Value)>> {
    let ask = || -> rusqlite::Result<Vec<(String, String)>> {
        db.prepare_cached("SELECT name, value FROM rows WHERE job = ?1 ORDER BY name")?
            .query_map([job.as_bytes()], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    };
    let found = ask().map_err(|e| unread("read a job's rows", &e))?;
    let understood = |(name, value): (String, String)| match serde_json::from_str(&value) {
        Ok(value) => Ok((name, value)),
        Err(e) => Err(StoreError::Damaged(format!("the row {name:?} cannot be understood: {e}"))),
    };
    found.into_iter().map(understood).collect()
}

pub(super) fn history(db: &Connection, after: u64, limit: usize) -> Answer<Vec<Placed>> {
    let ask = || {
        let mut statement = db.prepare_cached(
            "SELECT position, commit_number, name, seq, hash, bytes
             FROM records LEFT JOIN streams ON streams.key = records.stream
             WHERE position > ?1 ORDER BY position LIMIT ?2",
        )?;
        let mut rows = statement.query((signed(after), at_most(limit)))?;
        let (mut page, mut size) = (Vec::new(), 0);
        while size < PAGE_BYTES
            && let Some(row) = rows.next()?
        {
            let record = Record {
                stream: StreamId::from(row.get::<_, Option<String>>(2)?.unwrap_or_default()),
                seq: Seq(unsigned(row, 3)?),
                hash: row.get(4)?,
                bytes: bytes(row, 5)?,
            };
            size += record.bytes.len();
            page.push(Placed { position: unsigned(row, 0)?, commit: unsigned(row, 1)?, record });
        }
        Ok(page)
    };
    ask().map_err(|e| unread("read the history", &e))
}

pub(super) fn commits(db: &Connection, after: u64, limit: usize) -> Answer<Vec<Commit>> {
    let ask = || -> rusqlite::Result<Vec<Commit>> {
        db.prepare_cached(
            "SELECT number, digest, link FROM commits WHERE number > ?1 ORDER BY number LIMIT ?2",
        )?
        .query_map((signed(after), at_most(limit)), |row| {
            Ok(Commit { number: unsigned(row, 0)?, digest: row.get(1)?, link: row.get(2)? })
        })?
        .collect()
    };
    ask().map_err(|e| unread("read the commits", &e))
}

/// The last commit; nothing before the first. What a reader sees was fsynced: the log's index names a commit only then.
pub(super) fn head(db: &Connection) -> Answer<Option<Commit>> {
    let ask = || -> rusqlite::Result<Option<Commit>> {
        db.prepare_cached("SELECT number, digest, link FROM commits ORDER BY number DESC LIMIT 1")?
            .query_row((), |row| {
                Ok(Commit { number: unsigned(row, 0)?, digest: row.get(1)?, link: row.get(2)? })
            })
            .optional()
    };
    ask().map_err(|e| unread("read the last commit", &e))
}

/// Has SQLite check its own structure, pages, indexes and all.
pub(super) fn inspect(db: &Connection) -> Answer<Vec<String>> {
    let ask = || -> rusqlite::Result<Vec<String>> {
        db.prepare("PRAGMA integrity_check(100)")?.query_map([], |row| row.get(0))?.collect()
    };
    match ask() {
        Ok(found) => Ok(found.into_iter().filter(|line| line != "ok").collect()),
        Err(e) => match unread("check the database", &e) {
            StoreError::Damaged(what) => Ok(vec![what]),
            other => Err(other),
        },
    }
}

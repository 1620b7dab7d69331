//! The engine that keeps everything in memory: the same rules, no durability. For tests and measurements.
//!
//! One mutex guards all of it, and records are published to subscribers while it is held: that is what makes their order
//! that of the commits. Each append is a commit of its own.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::broadcast;
use uuid::Uuid;
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{
    Append, AppendError, Appended, EventStore, JobFilter, Record, Reserve, StoreError, link,
};
use vmkeep_workflow::summary::JobSummary;

use crate::chain::{self, Commit, Digest, GENESIS, Hash, Placed};
use crate::config::EngineName;
use crate::{Adoption, Burial, SUBSCRIBER_LAG, Store, accept, adoption, burial, fold};

/// A store in memory.
pub struct MemoryStore {
    id: Uuid,
    created: Timestamp,
    inner: Mutex<Inner>,
    subscribers: broadcast::Sender<Record>,
}

#[derive(Default)]
struct Inner {
    log: Vec<Placed>,
    /// For each stream the places of its records in `log`.
    streams: BTreeMap<StreamId, Vec<usize>>,
    commits: Vec<Commit>,
    jobs: HashMap<JobId, JobSummary>,
    keys: BTreeMap<String, StreamId>,
    rows: HashMap<JobId, BTreeMap<String, Value>>,
    buried: HashSet<StreamId>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store with a fresh id.
    #[must_use]
    pub fn new() -> Self {
        Self::with_id(Uuid::new_v4())
    }

    /// An empty store with that id: to take in the export of another.
    #[must_use]
    pub fn with_id(id: Uuid) -> Self {
        Self::copy_of(id, Timestamp::now())
    }

    /// An empty store with that id, as old as it says: to adopt the journal of another.
    #[must_use]
    pub fn copy_of(id: Uuid, created: Timestamp) -> Self {
        Self { id, created, inner: Mutex::default(), subscribers: broadcast::Sender::new(SUBSCRIBER_LAG) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics halfway through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Inner) -> Result<(Appended, usize), AppendError>,
    ) -> Result<Appended, AppendError> {
        let mut inner = self.inner();
        let (appended, first) = change(&mut inner)?;
        if self.subscribers.receiver_count() > 0 {
            for placed in &inner.log[first..] {
                // An error means that the last receiver has just gone.
                let _ = self.subscribers.send(placed.record.clone());
            }
        }
        Ok(appended)
    }

    /// Flips a bit of a stored record, as a failing drive would.
    #[cfg(feature = "conformance")]
    pub fn tamper(&self, stream: &StreamId, seq: Seq) {
        let inner = &mut *self.inner();
        let at = usize::try_from(seq.0).ok().and_then(|seq| seq.checked_sub(1));
        if let Some(place) = at.and_then(|at| inner.streams.get(stream)?.get(at).copied()) {
            inner.log[place].record.bytes[0] ^= 1;
        }
    }
}

impl Inner {
    fn end(&self, stream: &StreamId) -> Seq {
        Seq(self.streams.get(stream).map_or(0, |places| places.len() as u64))
    }

    fn append(&mut self, id: Uuid, append: Append) -> Result<(Appended, usize), AppendError> {
        accept::check(&append)?;
        let actual = self.end(&append.stream);
        if actual != append.expected {
            return Err(AppendError::Conflict { stream: append.stream, expected: append.expected, actual });
        }
        if self.buried.contains(&append.stream) {
            return Err(accept::buried(&append.stream));
        }
        if let Some(key) = append.key {
            match self.keys.get(&key) {
                Some(holder) if *holder != append.stream => {
                    return Err(AppendError::KeyTaken(holder.clone()));
                }
                Some(_) => {}
                None => drop(self.keys.insert(key, append.stream.clone())),
            }
        }
        let Append { stream, records, summary, .. } = append;
        let number = self.commits.len() as u64 + 1;
        let first = self.log.len();
        let places = self.streams.entry(stream.clone()).or_default();
        let mut last = actual;
        let mut hash = places.last().map_or(GENESIS, |&place| self.log[place].record.hash);
        let mut digest = Digest::default();
        for bytes in records {
            last = last.next();
            hash = link(&hash, &bytes);
            digest.add(&stream, last, &hash);
            places.push(self.log.len());
            self.log.push(Placed {
                position: self.log.len() as u64 + 1,
                commit: number,
                record: Record { stream: stream.clone(), seq: last, bytes, hash },
            });
        }
        let previous = self.commits.last().map_or_else(|| chain::genesis(id), |commit| commit.link);
        let digest = digest.finish();
        self.commits.push(Commit { number, digest, link: chain::link(&previous, number, &digest) });
        if let Some(summary) = summary {
            self.jobs.insert(summary.job, summary);
        }
        Ok((Appended { last }, first))
    }

    fn bury(&mut self, id: Uuid, burial: Burial) -> Result<(Appended, usize), AppendError> {
        let (stream, expected) = (burial.stream(), burial.events);
        accept::check_burial(&burial)?;
        let actual = self.end(&stream);
        if actual != expected || self.buried.contains(&stream) {
            return Err(AppendError::Conflict { stream, expected, actual });
        }
        let done = self.append(id, burial.note)?;
        for &place in self.streams.get(&stream).into_iter().flatten() {
            self.log[place].record.bytes.clear();
        }
        self.jobs.remove(&burial.job);
        self.rows.remove(&burial.job);
        self.buried.insert(stream);
        Ok(done)
    }

    fn adopt(&mut self, id: Uuid, adoption: Adoption) -> Result<(), AppendError> {
        let last = self.commits.last().map_or_else(|| (0, chain::genesis(id)), |c| (c.number, c.link));
        adoption::check(&adoption, last.0, last.1, self.log.len() as u64)?;
        self.commits.extend(adoption.commits);
        for placed in adoption.records {
            let stream = &placed.record.stream;
            self.streams.entry(stream.clone()).or_default().push(self.log.len());
            if placed.record.bytes.is_empty() {
                self.buried.insert(stream.clone());
            }
            self.log.push(placed);
        }
        self.jobs.extend(adoption.jobs.into_iter().map(|summary| (summary.job, summary)));
        self.keys.extend(adoption.keys);
        Ok(())
    }

    fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        let Some(places) = self.streams.get(stream) else { return Ok(Vec::new()) };
        let from = usize::try_from(from.0.max(1)).unwrap_or(usize::MAX);
        let mut previous: Hash = match from.checked_sub(2).and_then(|before| places.get(before)) {
            Some(&place) => self.log[place].record.hash,
            None => GENESIS,
        };
        let mut records = Vec::new();
        let limit = if limit == 0 { usize::MAX } else { limit };
        for &place in places.iter().skip(from - 1).take(limit) {
            let record = &self.log[place].record;
            if self.buried.contains(stream) {
                let last = &self.log[places[places.len() - 1]].record;
                return Err(burial::gone(stream, last.seq, &last.hash));
            }
            chain::check(record, &previous)?;
            previous = record.hash;
            records.push(record.clone());
        }
        Ok(records)
    }
}

#[async_trait]
impl EventStore for MemoryStore {
    fn id(&self) -> Uuid {
        self.id
    }

    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        self.change(|inner| inner.append(self.id, append))
    }

    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        self.inner().read(stream, from, limit)
    }

    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError> {
        Ok(self.inner().end(stream))
    }

    async fn streams(&self) -> Result<Vec<StreamId>, StoreError> {
        let inner = self.inner();
        Ok(inner.streams.keys().filter(|stream| !inner.buried.contains(*stream)).cloned().collect())
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        Ok(fold::pick(self.inner().jobs.values().cloned(), filter))
    }

    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError> {
        Ok(self.inner().jobs.get(&job).cloned())
    }

    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError> {
        Ok(self.inner().keys.get(key).cloned())
    }

    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        self.inner().rows.entry(job).or_default().insert(row.to_owned(), value.clone());
        Ok(())
    }

    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        let inner = self.inner();
        let rows = inner.rows.get(&job).into_iter().flatten();
        Ok(rows.map(|(row, value)| (row.clone(), value.clone())).collect())
    }

    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
        self.inner().rows.remove(&job);
        Ok(())
    }

    fn subscribe(&self) -> broadcast::Receiver<Record> {
        self.subscribers.subscribe()
    }

    async fn reserve(&self) -> Result<Reserve, StoreError> {
        Ok(Reserve::Intact)
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn engine(&self) -> EngineName {
        EngineName::Memory
    }

    fn created(&self) -> Timestamp {
        self.created
    }

    async fn history(&self, after: u64, limit: usize) -> Result<Vec<Placed>, StoreError> {
        let after = usize::try_from(after).unwrap_or(usize::MAX);
        Ok(self.inner().log.iter().skip(after).take(limit).cloned().collect())
    }

    async fn commits(&self, after: u64, limit: usize) -> Result<Vec<Commit>, StoreError> {
        let after = usize::try_from(after).unwrap_or(usize::MAX);
        Ok(self.inner().commits.iter().skip(after).take(limit).copied().collect())
    }

    async fn head(&self) -> Result<Option<Commit>, StoreError> {
        Ok(self.inner().commits.last().copied())
    }

    async fn bury(&self, burial: Burial) -> Result<Appended, AppendError> {
        self.change(|inner| inner.bury(self.id, burial))
    }

    async fn adopt(&self, adoption: Adoption) -> Result<(), AppendError> {
        self.inner().adopt(self.id, adoption)
    }

    async fn keys(&self) -> Result<Vec<(String, StreamId)>, StoreError> {
        Ok(self.inner().keys.iter().map(|(key, stream)| (key.clone(), stream.clone())).collect())
    }

    async fn inspect(&self) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }
}

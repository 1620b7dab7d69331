//! Taking an export into a store.
//!
//! Nothing of the file is trusted but its records: chains and seals are checked ([`crate::export::Reader`]), summaries and
//! idempotency keys are computed anew from the events. The file is read twice: first everything is checked, conflicts with
//! what the store holds included; then it is appended. So a bad file changes nothing.
//!
//! Streams that the store has already must agree with the file, and are continued. The last hash that both have decides,
//! for it covers all before it. So an import that was interrupted is simply repeated.
//!
//! Commits are those of the new store: records of one stream that follow on each other within a commit stay together,
//! each other append becomes a commit of its own, in the file's order.

use std::collections::HashMap;
use std::io::{BufRead, Seek, SeekFrom};

use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{Append, AppendError, Record, StoreError};

use crate::Store;
use crate::chain::Hash;
use crate::export::{Item, ReadError, Reader};
use crate::fold::Jobs;

/// Records that become one append at most.
const BATCH: usize = 256;

/// What was imported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// How many records were appended.
    pub records: u64,
    /// How many the store had already.
    pub present: u64,
    /// How many streams the file has.
    pub streams: u64,
}

/// Why an import did not take place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file is not right. Nothing was changed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store holds another record at that place. Nothing was changed.
    #[error("stream {stream}: at record {seq} the store and the export have become different")]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// The last place that both have.
        seq: Seq,
    },
    /// The file begins in the middle of a stream, and the store does not hold what comes before. Nothing was changed.
    #[error("stream {stream}: the export begins at record {from}, and the store ends at {last}")]
    Cut {
        /// The stream.
        stream: StreamId,
        /// Its first record in the file.
        from: Seq,
        /// Its last record in the store.
        last: Seq,
    },
    /// The history of a job in the file was pruned: its records cannot be appended. Nothing was changed.
    #[error("stream {0}: its history was pruned, and records without their bytes cannot be taken in")]
    Pruned(StreamId),
    /// The key of a job in the file belongs to another job in the store. Nothing was changed.
    #[error("the key {key:?} of {stream} is taken by {holder}")]
    KeyTaken {
        /// The key.
        key: String,
        /// The stream in the file.
        stream: StreamId,
        /// The stream in the store.
        holder: StreamId,
    },
    /// An event of a job cannot be understood, so the job's summary cannot be made. Nothing was changed.
    #[error("stream {stream}, record {seq}: the event cannot be understood: {why}")]
    NotUnderstood {
        /// The stream.
        stream: StreamId,
        /// The place.
        seq: Seq,
        /// Why.
        why: String,
    },
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store refused a record that had passed all checks. What came before it was imported; the import can be repeated.
    #[error("stream {stream}, record {seq}: {error}")]
    Append {
        /// The stream.
        stream: StreamId,
        /// The first record of the append.
        seq: Seq,
        /// Why.
        error: AppendError,
    },
}

/// Imports an export, whole or of some streams.
///
/// # Errors
/// See [`ImportError`].
pub async fn import<R: BufRead + Seek + Send>(
    store: &dyn Store,
    input: &mut R,
) -> Result<Imported, ImportError> {
    let start = input.stream_position().map_err(ReadError::Read)?;
    let present = check(store, input).await?;
    input.seek(SeekFrom::Start(start)).map_err(ReadError::Read)?;
    let mut imported = Imported { streams: present.len() as u64, ..Imported::default() };
    let mut reader = Reader::new(input)?;
    let mut jobs = Jobs::default();
    let mut batch = Batch::default();
    while let Some(item) = reader.next_item()? {
        let record = match item {
            Item::Record(record, _) => record,
            Item::Seal(_) => {
                batch.flush(store, &mut imported).await?;
                continue;
            }
        };
        take(&mut jobs, &record)?;
        if present.get(&record.stream).is_some_and(|present| record.seq <= *present) {
            imported.present += 1;
            continue;
        }
        if !batch.takes(&record) {
            batch.flush(store, &mut imported).await?;
        }
        batch.add(record, &jobs);
    }
    batch.flush(store, &mut imported).await?;
    Ok(imported)
}

fn take(jobs: &mut Jobs, record: &Record) -> Result<(), ImportError> {
    jobs.take(record).map_err(|why| ImportError::NotUnderstood {
        stream: record.stream.clone(),
        seq: record.seq,
        why,
    })
}

/// Checks the file by itself and against the store. Returns where the file's streams end in the store.
async fn check<R: BufRead + Send>(
    store: &dyn Store,
    input: &mut R,
) -> Result<HashMap<StreamId, Seq>, ImportError> {
    let mut reader = Reader::new(input)?;
    let mut jobs = Jobs::default();
    // Where each stream ends in the store, and the last place of the file up to there.
    let mut streams: HashMap<StreamId, (Seq, Option<(Seq, Hash)>)> = HashMap::new();
    while let Some(item) = reader.next_item()? {
        let Item::Record(record, _) = item else { continue };
        if record.bytes.is_empty() {
            return Err(ImportError::Pruned(record.stream));
        }
        // A stream that is cut cannot tell its job's summary; it is refused below.
        if record.seq == Seq(1) || jobs.get(&record.stream).is_some() {
            take(&mut jobs, &record)?;
        }
        if !streams.contains_key(&record.stream) {
            let last = store.last(&record.stream).await?;
            let job = record.stream.as_job().is_some();
            if record.seq > last.next() || (job && record.seq > Seq(1)) {
                return Err(ImportError::Cut { stream: record.stream, from: record.seq, last });
            }
            streams.insert(record.stream.clone(), (last, None));
        }
        if let Some((last, common)) = streams.get_mut(&record.stream)
            && record.seq <= *last
        {
            *common = Some((record.seq, record.hash));
        }
    }
    let mut present = HashMap::with_capacity(streams.len());
    for (stream, (last, common)) in streams {
        if let Some((seq, hash)) = common {
            let found = store.read(&stream, seq, 1).await?;
            if found.first().is_none_or(|record| record.hash != hash) {
                return Err(ImportError::Conflict { stream, seq });
            }
        }
        present.insert(stream, last);
    }
    check_keys(store, jobs).await?;
    Ok(present)
}

async fn check_keys(store: &dyn Store, jobs: Jobs) -> Result<(), ImportError> {
    let mut claimed: HashMap<String, StreamId> = HashMap::new();
    for (stream, job) in jobs.into_inner() {
        let Some(key) = job.key else { continue };
        let holder = store.key(&key).await?.or_else(|| claimed.get(&key).cloned());
        match holder {
            Some(holder) if holder != stream => return Err(ImportError::KeyTaken { key, stream, holder }),
            _ => drop(claimed.insert(key, stream)),
        }
    }
    Ok(())
}

/// Records of one stream that are appended together.
#[derive(Default)]
struct Batch(Option<Append>);

impl Batch {
    fn takes(&self, record: &Record) -> bool {
        self.0.as_ref().is_none_or(|append| append.stream == record.stream && append.records.len() < BATCH)
    }

    fn add(&mut self, record: Record, jobs: &Jobs) {
        let Record { stream, seq, bytes, .. } = record;
        let job = jobs.get(&stream);
        let append = self.0.get_or_insert_with(|| Append {
            stream,
            expected: Seq(seq.0.saturating_sub(1)),
            records: Vec::new(),
            summary: None,
            key: None,
        });
        append.records.push(bytes);
        append.summary = job.and_then(|job| job.summary.clone());
        if seq == Seq(1) {
            append.key = job.and_then(|job| job.key.clone());
        }
    }

    async fn flush(&mut self, store: &dyn Store, imported: &mut Imported) -> Result<(), ImportError> {
        let Some(append) = self.0.take() else { return Ok(()) };
        let (stream, seq, records) = (append.stream.clone(), append.expected.next(), append.records.len());
        store.append(append).await.map_err(|error| ImportError::Append { stream, seq, error })?;
        imported.records += records as u64;
        Ok(())
    }
}

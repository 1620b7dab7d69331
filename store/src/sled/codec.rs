//! How keys and values look in the tree.
//!
//! One tree holds everything, so that one batch is one atomic commit. The first byte of a key says what it is:
//!
//! | key | value |
//! |---|---|
//! | `r` position | a record: commit, place, hash, stream, bytes |
//! | `p` stream, place | the record's position |
//! | `s` stream | where the stream ends: place, hash, whether its history was let go |
//! | `c` number | a commit: digest, link |
//! | `j` job | the job's summary, JSON |
//! | `k` key | the stream that claimed it |
//! | `w` job, name | a row, JSON |
//! | `x` key, number | a further piece of a long value |
//!
//! Numbers are big-endian, so that the order of keys is theirs. A stream's name inside a key is preceded by its length: no
//! name is then the beginning of another.
//!
//! **Pieces.** sled puts what is large into files of their own (`blobs/`) which it never fsyncs, and it rewrites whole
//! leaves, of up to some twenty entries, again and again. So no value has more than 4 KiB: a longer one is cut, its pieces
//! are entries of the same batch, and no such file ever comes to be.

use sled::{Batch, Tree};
use uuid::Uuid;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{Record, StoreError};

use super::errors::unread;
use crate::chain::{Commit, GENESIS, Hash, Placed};

/// The longest value, and the longest piece of one.
const PIECE: usize = 4096;

const WHOLE: u8 = 0;
const CUT: u8 = 1;

pub(super) const RECORD: u8 = b'r';
pub(super) const PLACE: u8 = b'p';
pub(super) const STREAM: u8 = b's';
pub(super) const COMMIT: u8 = b'c';
pub(super) const JOB: u8 = b'j';
pub(super) const KEY: u8 = b'k';
pub(super) const ROW: u8 = b'w';
const FURTHER: u8 = b'x';

/// Where a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    pub(super) last: Seq,
    pub(super) hash: Hash,
    /// Whether its history was let go.
    pub(super) buried: bool,
}

impl Tail {
    /// Of a stream that nobody wrote.
    pub(super) const NONE: Self = Self { last: Seq(0), hash: GENESIS, buried: false };
}

pub(super) fn numbered(kind: u8, number: u64) -> Vec<u8> {
    [&[kind][..], &number.to_be_bytes()].concat()
}

pub(super) fn named(kind: u8, name: &str) -> Vec<u8> {
    [&[kind][..], name.as_bytes()].concat()
}

pub(super) fn job(job: Uuid) -> Vec<u8> {
    [&[JOB][..], job.as_bytes()].concat()
}

pub(super) fn rows(job: Uuid) -> Vec<u8> {
    [&[ROW][..], job.as_bytes()].concat()
}

pub(super) fn row(job: Uuid, name: &str) -> Vec<u8> {
    [&rows(job)[..], name.as_bytes()].concat()
}

/// What all places of a stream begin with.
pub(super) fn places(stream: &StreamId) -> Vec<u8> {
    let name = stream.as_str().as_bytes();
    // A name is never longer: it would not fit into a record.
    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    [&[PLACE][..], &length.to_be_bytes(), name].concat()
}

pub(super) fn place(stream: &StreamId, seq: Seq) -> Vec<u8> {
    [&places(stream)[..], &seq.0.to_be_bytes()].concat()
}

fn further(key: &[u8], number: u32) -> Vec<u8> {
    [&[FURTHER][..], key, &number.to_be_bytes()].concat()
}

/// The number at the end of a key.
pub(super) fn last_number(key: &[u8]) -> Result<u64, StoreError> {
    let at = key.len().checked_sub(8).ok_or_else(garbled)?;
    number(&key[at..])
}

/// A value that is a number.
pub(super) fn number(bytes: &[u8]) -> Result<u64, StoreError> {
    Ok(u64::from_be_bytes(bytes.try_into().map_err(|_| garbled())?))
}

fn garbled() -> StoreError {
    StoreError::Damaged("an entry of the store cannot be understood".to_owned())
}

/// Takes so many bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], StoreError> {
    let (head, rest) = bytes.split_at_checked(count).ok_or_else(garbled)?;
    *bytes = rest;
    Ok(head)
}

fn take_number(bytes: &mut &[u8]) -> Result<u64, StoreError> {
    number(take(bytes, 8)?)
}

fn take_hash(bytes: &mut &[u8]) -> Result<Hash, StoreError> {
    take(bytes, 32)?.try_into().map_err(|_| garbled())
}

/// A text that the tree holds.
pub(super) fn text(bytes: &[u8]) -> Result<String, StoreError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| garbled())
}

pub(super) fn tail(tail: &Tail) -> Vec<u8> {
    [&tail.last.0.to_be_bytes()[..], &tail.hash, &[u8::from(tail.buried)]].concat()
}

pub(super) fn read_tail(mut bytes: &[u8]) -> Result<Tail, StoreError> {
    let bytes = &mut bytes;
    Ok(Tail { last: Seq(take_number(bytes)?), hash: take_hash(bytes)?, buried: take(bytes, 1)? == [1] })
}

pub(super) fn commit(commit: &Commit) -> Vec<u8> {
    [&commit.digest[..], &commit.link].concat()
}

pub(super) fn read_commit(key: &[u8], mut bytes: &[u8]) -> Result<Commit, StoreError> {
    Ok(Commit { number: last_number(key)?, digest: take_hash(&mut bytes)?, link: take_hash(&mut bytes)? })
}

/// A record as a value.
pub(super) fn record(commit: u64, record: &Record) -> Vec<u8> {
    let name = record.stream.as_str().as_bytes();
    let mut value = Vec::with_capacity(52 + name.len() + record.bytes.len());
    value.extend(commit.to_be_bytes());
    value.extend(record.seq.0.to_be_bytes());
    value.extend(record.hash);
    value.extend(u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
    value.extend(name);
    value.extend(&record.bytes);
    value
}

pub(super) fn read_record(position: u64, mut bytes: &[u8]) -> Result<Placed, StoreError> {
    let bytes = &mut bytes;
    let (commit, seq, hash) = (take_number(bytes)?, Seq(take_number(bytes)?), take_hash(bytes)?);
    let length = u32::from_be_bytes(take(bytes, 4)?.try_into().map_err(|_| garbled())?);
    let name = take(bytes, usize::try_from(length).map_err(|_| garbled())?)?;
    let stream = StreamId::from(text(name)?);
    Ok(Placed { position, commit, record: Record { stream, seq, hash, bytes: bytes.to_vec() } })
}

/// The changes of one commit, with their size.
#[derive(Default)]
pub(super) struct Changes {
    batch: Batch,
    bytes: u64,
    entries: u64,
}

impl Changes {
    /// Sets an entry whose value is short, and was never long.
    pub(super) fn set(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.bytes += (key.len() + value.len()) as u64;
        self.entries += 1;
        self.batch.insert(key, value);
    }

    /// Sets an entry whose value may be long. What it held before is asked of the tree, for its pieces have to go.
    pub(super) fn set_long(&mut self, tree: &Tree, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let before = pieces(tree, key)?;
        let now = self.set_new(key.to_vec(), value);
        for number in now..before {
            self.remove(further(key, number));
        }
        Ok(())
    }

    /// Sets an entry that is new, and whose value may be long. Returns how many further pieces it has.
    pub(super) fn set_new(&mut self, key: Vec<u8>, value: &[u8]) -> u32 {
        if value.len() < PIECE {
            self.set(key, [&[WHOLE][..], value].concat());
            return 0;
        }
        let (first, rest) = value.split_at(PIECE / 2);
        let mut count: u32 = 0;
        for piece in rest.chunks(PIECE) {
            self.set(further(&key, count), piece.to_vec());
            count += 1;
        }
        let head = [&[CUT][..], &count.to_be_bytes(), &(value.len() as u64).to_be_bytes(), first].concat();
        self.set(key, head);
        count
    }

    /// Removes an entry.
    pub(super) fn remove(&mut self, key: Vec<u8>) {
        self.bytes += key.len() as u64;
        self.entries += 1;
        self.batch.remove(key);
    }

    /// Removes an entry whose value may be long.
    pub(super) fn remove_long(&mut self, tree: &Tree, key: Vec<u8>) -> Result<(), StoreError> {
        for number in 0..pieces(tree, &key)? {
            self.remove(further(&key, number));
        }
        self.remove(key);
        Ok(())
    }

    /// Roughly how much sled's log grows by it: each entry, and leaves that are written anew.
    pub(super) fn weight(&self) -> u64 {
        2 * self.bytes + 512 * self.entries
    }

    pub(super) fn into_batch(self) -> Batch {
        self.batch
    }
}

/// How many further pieces an entry has.
fn pieces(tree: &Tree, key: &[u8]) -> Result<u32, StoreError> {
    match tree.get(key).map_err(|e| unread("read an entry", &e))? {
        Some(value) if value.first() == Some(&CUT) => count(&value),
        _ => Ok(0),
    }
}

fn count(value: &[u8]) -> Result<u32, StoreError> {
    let count = value.get(1..5).and_then(|bytes| bytes.try_into().ok()).ok_or_else(garbled)?;
    Ok(u32::from_be_bytes(count))
}

/// A value that may be long, put together.
pub(super) fn whole(tree: &Tree, key: &[u8], value: &[u8]) -> Result<Vec<u8>, StoreError> {
    match value.split_first() {
        Some((&WHOLE, rest)) => Ok(rest.to_vec()),
        Some((&CUT, _)) => {
            let total = number(value.get(5..13).ok_or_else(garbled)?)?;
            let mut put = value.get(13..).unwrap_or_default().to_vec();
            for number in 0..count(value)? {
                let piece = tree.get(further(key, number)).map_err(|e| unread("read an entry", &e))?;
                let piece = piece.ok_or_else(|| {
                    StoreError::Damaged(format!("a piece of an entry of {total} bytes is missing"))
                })?;
                put.extend_from_slice(&piece);
            }
            if put.len() as u64 == total { Ok(put) } else { Err(garbled()) }
        }
        _ => Err(garbled()),
    }
}

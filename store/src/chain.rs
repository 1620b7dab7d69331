//! The order of all records of a store, and how it is sealed.
//!
//! Each stream is a hash chain of its own ([`vmkeep_workflow::journal::link`]). That says nothing about which of two
//! streams was written first, and would not notice that a whole stream is gone. Therefore each commit (all appends that
//! became durable by one fsync) gets a number, from 1, a *digest* over the stream, place and hash of each of its records,
//! and a *link*: the hash of the previous commit's link and its own number and digest. The first link follows from the
//! store's id, so that commits of one store are never taken for those of another.
//!
//! A digest is made of places and hashes, not of bytes. So all of this can still be checked after the bytes of an old job's
//! records were let go ([`crate::burial`]).

use uuid::Uuid;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{self, Record, StoreError};

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

/// What stands for the predecessor's hash in a stream's first record.
pub const GENESIS: Hash = [0; 32];

/// A commit: the appends that became durable together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// From 1, without a gap.
    pub number: u64,
    /// Over the records; see [`Digest`].
    pub digest: Hash,
    /// Over the previous link, the number and the digest; see [`link`].
    pub link: Hash,
}

/// A record with its place in the order of all records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Rises with each record of the store; there may be gaps.
    pub position: u64,
    /// The commit that it belongs to.
    pub commit: u64,
    /// The record. One whose history was let go has no bytes.
    pub record: Record,
}

/// The digest of a commit, made record by record in their order.
#[derive(Clone, Default)]
pub struct Digest(blake3::Hasher);

impl Digest {
    /// Takes a record in. The name's length is hashed with it, so that no two lists of records look alike.
    pub fn add(&mut self, stream: &StreamId, seq: Seq, hash: &Hash) {
        let name = stream.as_str().as_bytes();
        self.0.update(&(name.len() as u64).to_le_bytes());
        self.0.update(name);
        self.0.update(&seq.0.to_le_bytes());
        self.0.update(hash);
    }

    /// The digest of what was taken in.
    #[must_use]
    pub fn finish(&self) -> Hash {
        *self.0.finalize().as_bytes()
    }
}

/// What stands for the link before the first commit of a store.
#[must_use]
pub fn genesis(store: Uuid) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"vmkeep journal ");
    hasher.update(store.as_bytes());
    *hasher.finalize().as_bytes()
}

/// The link of a commit.
#[must_use]
pub fn link(previous: &Hash, number: u64, digest: &Hash) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(previous);
    hasher.update(&number.to_le_bytes());
    hasher.update(digest);
    *hasher.finalize().as_bytes()
}

/// A hash as text.
#[must_use]
pub fn hex(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// A hash from its text; nothing if it is none.
#[must_use]
pub fn unhex(text: &str) -> Option<Hash> {
    blake3::Hash::from_hex(text).ok().map(|hash| *hash.as_bytes())
}

/// Checks that a record follows on a hash.
pub(crate) fn check(record: &Record, previous: &Hash) -> Result<(), StoreError> {
    if journal::link(previous, &record.bytes) == record.hash {
        return Ok(());
    }
    let name = record.stream.as_str();
    Err(StoreError::Damaged(format!("stream {name:?}, record {}: the hash chain is broken", record.seq)))
}

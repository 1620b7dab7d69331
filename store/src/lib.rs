//! Event stores: where journals live.
//!
//! The contract is [`vmkeep_workflow::EventStore`]; this crate holds the engines that keep it.
//!
//! | to learn about | read |
//! |---|---|
//! | the engine for production | [`sqlite`] |
//! | the second engine | [`sled`] |
//! | the engine for tests and measurements | [`memory`] |
//! | what every engine offers beyond the contract | [`Store`] |
//! | the order of all records, and how it is sealed | [`chain`] |
//! | taking a journal out and in again | [`export`], [`import`] |
//! | checking that a journal is whole | [`verify`] |
//! | what the chains cannot find: heads that are signed | [`heads`] |
//! | letting the history of old jobs go | [`burial`] |
//! | moving a journal to another engine | [`migrate`] |
//! | what an engine must prove | `conformance` (feature `conformance`) |
//!
//! What a hash chain can and cannot do: it has no key. It finds accidents, and edits by somebody who did not recompute
//! it. Somebody who rewrites the whole store, or cuts its end off, leaves a chain that fits; against that, only a
//! head that was kept elsewhere helps: [`heads`] are signed for that.

mod accept;
pub mod adoption;
pub mod burial;
pub mod chain;
mod config;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod export;
mod files;
mod fold;
pub mod heads;
pub mod import;
mod lock;
pub mod memory;
pub mod migrate;
mod queue;
mod reserve;
pub mod sled;
pub mod sqlite;
pub mod verify;

use async_trait::async_trait;
use jiff::Timestamp;
use vmkeep_workflow::EventStore;
use vmkeep_workflow::ids::StreamId;
use vmkeep_workflow::journal::{AppendError, Appended, StoreError};

pub use accept::MAX_RECORD;
pub use adoption::Adoption;
pub use burial::{Burial, Tombstone};
pub use chain::{Commit, Hash, Placed};
pub use config::{EngineName, Options, StoreConfig, engine_of, open, open_read_only};
pub use memory::MemoryStore;
pub use sled::SledStore;
pub use sqlite::SqliteStore;

/// How many records a subscriber may be behind before it is told that it lags.
pub const SUBSCRIBER_LAG: usize = 1024;

/// What engines offer beyond [`EventStore`]: the order of all commits, for audit, export and verification.
///
/// Nothing here is checked while it is read: a damaged store must still be readable as far as it goes, so that
/// [`verify::verify`] can say what is wrong with it.
#[async_trait]
pub trait Store: EventStore {
    /// Which engine this is.
    fn engine(&self) -> EngineName;

    /// When the store was made.
    fn created(&self) -> Timestamp;

    /// Records of all streams in the order of their commits: those placed after `after` (0 for the beginning), at
    /// most `limit`, and fewer when they are large. Empty at the end only.
    async fn history(&self, after: u64, limit: usize) -> Result<Vec<Placed>, StoreError>;

    /// Commits by number: those after `after` (0 for the beginning), at most `limit`.
    async fn commits(&self, after: u64, limit: usize) -> Result<Vec<Commit>, StoreError>;

    /// The last commit; nothing before the first. Only what is durable.
    async fn head(&self) -> Result<Option<Commit>, StoreError>;

    /// Lets the bytes of a job's records go, its summary and its rows, and appends the tombstone, in one commit. The
    /// records keep their places, their commits and their hashes; [`EventStore::read`] says then that they were pruned,
    /// [`EventStore::streams`] leaves the stream out, and [`EventStore::last`] is what it was. Nothing may follow on them.
    /// For [`burial::bury`], which knows what may go.
    async fn bury(&self, burial: Burial) -> Result<Appended, AppendError>;

    /// Takes in commits as another store sealed them. For [`migrate`].
    async fn adopt(&self, adoption: Adoption) -> Result<(), AppendError>;

    /// All idempotency keys with the streams that claimed them, by key.
    async fn keys(&self) -> Result<Vec<(String, StreamId)>, StoreError>;

    /// What the engine itself finds wrong with its files, apart from what they mean. Reads everything.
    async fn inspect(&self) -> Result<Vec<String>, StoreError>;
}

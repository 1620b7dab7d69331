//! Which engine to use and where: the part of the daemon's configuration that concerns the store.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use crate::memory::MemoryStore;
use crate::sled::SledStore;
use crate::sqlite::SqliteStore;
use crate::{Store, reserve, sled, sqlite};

/// An engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineName {
    /// One SQLite database; the default.
    #[default]
    Sqlite,
    /// A folder of sled's.
    Sled,
    /// Nothing on disk; for tests and measurements.
    Memory,
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sqlite => "sqlite",
            Self::Sled => "sled",
            Self::Memory => "memory",
        })
    }
}

/// How an engine opens its store.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The bytes that are kept back for a full disk; 0 for none.
    pub reserve: u64,
    /// The id of a store that has to be made: to take in the export of another. A fresh one if none.
    pub id: Option<Uuid>,
    /// When a store that has to be made says that it was made: a copy in another engine is as old as the original. Now
    /// if none.
    pub created: Option<Timestamp>,
}

impl Default for Options {
    fn default() -> Self {
        Self { reserve: reserve::DEFAULT_SIZE, id: None, created: None }
    }
}

/// Where the store is and how it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// The engine.
    #[serde(default)]
    pub engine: EngineName,
    /// The store's own folder; it is made when it is not there.
    pub path: PathBuf,
    /// The bytes that are kept back for a full disk; 0 for none.
    #[serde(default = "default_reserve")]
    pub reserve: u64,
}

fn default_reserve() -> u64 {
    reserve::DEFAULT_SIZE
}

impl StoreConfig {
    /// The default engine in that folder.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { engine: EngineName::default(), path: path.into(), reserve: default_reserve() }
    }
}

/// The engine that made the store in a folder; nothing if there is no store yet.
///
/// # Errors
/// [`StoreError::Damaged`] when two engines claim the folder.
pub fn engine_of(folder: &Path) -> Result<Option<EngineName>, StoreError> {
    match (sqlite::is_there(folder), sled::is_there(folder)) {
        (true, true) => Err(StoreError::Damaged(format!(
            "{} holds the journals of two engines, and nothing tells which is the true one",
            folder.display()
        ))),
        (true, false) => Ok(Some(EngineName::Sqlite)),
        (false, true) => Ok(Some(EngineName::Sled)),
        (false, false) => Ok(None),
    }
}

/// Refuses a store that another engine made: this one would begin an empty store beside it.
fn check_engine(config: &StoreConfig) -> Result<(), StoreError> {
    match engine_of(&config.path)? {
        Some(found) if found != config.engine && config.engine != EngineName::Memory => {
            Err(StoreError::OtherEngine {
                path: config.path.display().to_string(),
                found: found.to_string(),
                wanted: config.engine.to_string(),
            })
        }
        _ => Ok(()),
    }
}

/// Opens the store, and makes it when it is not there. Blocks.
///
/// # Errors
/// [`StoreError::InUse`] when another process has it open, [`StoreError::TooNew`] when a newer release wrote it,
/// [`StoreError::OtherEngine`] when another engine did, [`StoreError::Damaged`] and [`StoreError::Io`] with the reason.
pub fn open(config: &StoreConfig) -> Result<Arc<dyn Store>, StoreError> {
    check_engine(config)?;
    let options = Options { reserve: config.reserve, ..Options::default() };
    match config.engine {
        EngineName::Sqlite => Ok(Arc::new(SqliteStore::open(&config.path, options)?)),
        EngineName::Sled => Ok(Arc::new(SledStore::open(&config.path, options)?)),
        EngineName::Memory => Ok(Arc::new(MemoryStore::new())),
    }
}

/// Opens the store for reading only, also while another process has it open or the disk is full. Blocks.
///
/// # Errors
/// As [`open`], without [`StoreError::InUse`]; [`StoreError::Io`] when there is no store.
pub fn open_read_only(config: &StoreConfig) -> Result<Arc<dyn Store>, StoreError> {
    check_engine(config)?;
    match config.engine {
        EngineName::Sqlite => Ok(Arc::new(SqliteStore::open_read_only(&config.path)?)),
        EngineName::Sled => Ok(Arc::new(SledStore::open_read_only(&config.path)?)),
        EngineName::Memory => Err(StoreError::Io("the memory engine keeps nothing to read".to_owned())),
    }
}

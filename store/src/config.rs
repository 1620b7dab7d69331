//! Which engine to use and where: the part of the daemon's configuration that concerns the store.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmkeep_workflow::journal::StoreError;

use crate::memory::MemoryStore;
use crate::sqlite::{Options, SqliteStore};
use crate::{Store, reserve};

/// An engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineName {
    /// One SQLite database; the default.
    #[default]
    Sqlite,
    /// Nothing on disk; for tests and measurements.
    Memory,
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sqlite => "sqlite",
            Self::Memory => "memory",
        })
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

/// Opens the store, and makes it when it is not there. Blocks.
///
/// # Errors
/// [`StoreError::InUse`] when another process has it open, [`StoreError::TooNew`] when a newer release wrote it,
/// [`StoreError::Damaged`] and [`StoreError::Io`] with the reason.
pub fn open(config: &StoreConfig) -> Result<Arc<dyn Store>, StoreError> {
    match config.engine {
        EngineName::Sqlite => {
            let options = Options { reserve: config.reserve, ..Options::default() };
            Ok(Arc::new(SqliteStore::open(&config.path, options)?))
        }
        EngineName::Memory => Ok(Arc::new(MemoryStore::new())),
    }
}

/// Opens the store for reading only, also while another process has it open or the disk is full. Blocks.
///
/// # Errors
/// As [`open`], without [`StoreError::InUse`]; [`StoreError::Io`] when there is no store.
pub fn open_read_only(config: &StoreConfig) -> Result<Arc<dyn Store>, StoreError> {
    match config.engine {
        EngineName::Sqlite => Ok(Arc::new(SqliteStore::open_read_only(&config.path)?)),
        EngineName::Memory => Err(StoreError::Io("the memory engine keeps nothing to read".to_owned())),
    }
}

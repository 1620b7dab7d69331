//! The daemon's configuration: complete without any file, strict about the one that is there.
//!
//! A value comes from, in this order: the command line, the environment, the file, the default. An unknown key is an
//! error that names the key and its line, because a misspelt safety margin that is silently ignored is worse than a
//! daemon that does not start. Everything is resolved to absolute paths once, here; nothing else reads the
//! environment.
//!
//! Why a remote hypervisor is refused: vmkeep opens images, overlays and state files by path, beside QEMU. Paths that
//! a remote libvirt tells mean nothing on this host, and at worst something else.

mod file;
mod keep;
mod places;
mod rights;
mod uri;
mod vaults;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

pub use file::{File, LogFormat, StoreEngine};
pub use keep::{Keep, periods, time_zone};
pub use places::{Overrides, Surroundings};
pub use uri::check_uri;
pub use vaults::{KeySource, NotAName, VaultName, VaultSettings};

use vmkeep_steps::image::space::LowWater;
use vmkeep_steps::restore::RightsSettings;
use vmkeep_steps::save::AfterReboot;
use vmkeep_store::burial::Policy;
use vmkeep_store::{EngineName, StoreConfig};
use vmkeep_workflow::{Code, Fault};

use crate::codes;

/// Everything that the daemon needs to know before it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the journal and, by default, backups live. Absolute.
    pub state_dir: PathBuf,
    /// The Unix socket of the API. Absolute, and short enough to be bound.
    pub socket: PathBuf,
    /// The URI of the local hypervisor.
    pub connect: String,
    /// The folders below which backups and restored images may be put. The first is the default for backups.
    pub roots: Vec<PathBuf>,
    /// Where restored images go when the caller names no place: a folder per restored domain below it.
    pub restore_dir: PathBuf,
    /// The engine that keeps the journal.
    pub engine: EngineName,
    /// How long the histories of ended jobs are kept. For ever, if nothing is said: history is evidence, and whoever wants
    /// it gone should have said so.
    pub history: Policy,
    /// How much may go on at a time.
    pub limits: Limits,
    /// What backups do unless told otherwise.
    pub snapshot: SnapshotDefaults,
    /// Whose restored files become.
    pub restore: RightsSettings,
    /// The vaults that are known by name.
    pub vaults: BTreeMap<VaultName, VaultSettings>,
    /// What backups into vaults do.
    pub backup: BackupDefaults,
    /// What is logged, and how.
    pub log: Log,
    /// The file that was read, if one was.
    pub file: Option<PathBuf>,
}

/// How much may go on at a time, and how much a memory image may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Jobs that run at a time on this host; more wait.
    pub jobs: usize,
    /// Jobs that write below one root at a time; more wait.
    pub jobs_per_root: usize,
    /// The largest memory image that is taken without being asked for, in bytes; nothing: as large as fits.
    pub memory: Option<u64>,
    /// The longest time that saving memory may take.
    pub memory_time: Duration,
    /// Bytes per second for copying; 0 is no limit.
    pub bandwidth: u64,
    /// Bytes per second for merging each overlay; 0 is no limit.
    pub merge_bandwidth: u64,
    /// For how long a restored guest is watched before its restore counts as done.
    pub watch: Duration,
    /// The longest time for which a guest's file systems stay frozen.
    pub freeze: Duration,
    /// What a backup leaves free where guests write.
    pub keep_free: LowWater,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            jobs: 4,
            jobs_per_root: 2,
            memory: None,
            memory_time: Duration::from_secs(600),
            bandwidth: 0,
            merge_bandwidth: 0,
            watch: Duration::from_secs(3),
            freeze: Duration::from_secs(10),
            keep_free: LowWater::default(),
        }
    }
}

/// What backups do unless told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotDefaults {
    /// How many whole backups of a domain stay below a root; nothing: all.
    pub keep: Option<u32>,
    /// A folder on a tmpfs, to which a state goes first. Absolute.
    pub ram_disk: Option<PathBuf>,
    /// A folder for the overlays of disks on block devices; nothing: such disks take no part. Absolute.
    pub overlay_dir: Option<PathBuf>,
    /// Whether a guest that ran before is started after a reboot.
    pub after_reboot: AfterReboot,
}

/// What backups into vaults do unless told otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupDefaults {
    /// The vault that is meant where none is named.
    pub vault: Option<VaultName>,
    /// A folder for what guests overwrite while they are backed up; nothing: beside their images. Absolute.
    pub scratch_dir: Option<PathBuf>,
    /// After so many days a disk is read whole again, whatever bitmaps say.
    pub full_every_days: u32,
    /// So many checkpoints of ours a domain keeps over all vaults; at least one.
    pub checkpoints: u32,
}

impl Default for BackupDefaults {
    fn default() -> Self {
        Self { vault: None, scratch_dir: None, full_every_days: 35, checkpoints: 4 }
    }
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Lines for people or JSON objects.
    pub format: LogFormat,
    /// A filter as `tracing` knows it: `info`, `vmkeep_steps=debug,info`.
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

/// Why there is no configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file was named that cannot be read.
    #[error("{path}: {why}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
    /// The file is not what it should be.
    #[error("{path}, line {line}: {why}")]
    Wrong {
        /// The file.
        path: String,
        /// From 1.
        line: usize,
        /// What is wrong; names the key.
        why: String,
    },
    /// Nothing tells where something is to be.
    #[error("{0}")]
    Missing(String),
    /// A value is not possible.
    #[error("{what}: {why}")]
    Impossible {
        /// Which value, and where it came from.
        what: String,
        /// Why not.
        why: String,
    },
    /// A folder is named by a protocol that is not supported.
    #[error("{what}: {why}")]
    Protocol {
        /// Which value.
        what: String,
        /// Why not.
        why: String,
    },
    /// The hypervisor is on another host.
    #[error("{uri} names a hypervisor on another host")]
    Remote {
        /// The URI.
        uri: String,
    },
}

impl ConfigError {
    /// The error's stable code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Unreadable { .. } => codes::CANNOT_FIND_CONFIGURATION_ENTRY,
            Self::Missing(_) => codes::MISSING_PARAMETER_IN_CONFIG_FILE,
            Self::Wrong { .. } | Self::Impossible { .. } => codes::UNSUPPORTED_CONFIGURATION_PARAMETER,
            Self::Protocol { .. } => codes::UNSUPPORTED_FILE_TRANSFER_PROTOCOL,
            Self::Remote { .. } => codes::REMOTE_HYPERVISOR,
        }
    }
}

impl From<ConfigError> for Fault {
    fn from(error: ConfigError) -> Self {
        let remedy = match &error {
            ConfigError::Unreadable { .. } => {
                "Name a file that can be read, or none: vmkeepd needs no configuration"
            }
            ConfigError::Wrong { .. } | ConfigError::Impossible { .. } => {
                "Correct the value; docs/configuration.md lists all keys"
            }
            ConfigError::Missing(_) => {
                "Name it in the configuration file; the state folder also with --state-dir"
            }
            ConfigError::Protocol { .. } => {
                "Give a path, or `file://` and a path; mount here what is on another host"
            }
            ConfigError::Remote { .. } => {
                "Run vmkeepd on the hypervisor itself and connect to qemu:///system or qemu:///session"
            }
        };
        Fault::permanent(error.code(), "read the configuration", "", &error).remedy(remedy)
    }
}

impl Config {
    /// Resolves the configuration from all its sources.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(overrides: &Overrides, around: &Surroundings) -> Result<Self, ConfigError> {
        let (file, path) = File::find(overrides.config.as_deref(), around)?;
        Self::resolve(file, path, overrides, around)
    }

    /// The folder of the store.
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        self.state_dir.join("store")
    }

    /// The store, for whoever opens it.
    #[must_use]
    pub fn store(&self) -> StoreConfig {
        StoreConfig { engine: self.engine, ..StoreConfig::new(self.store_dir()) }
    }
}

#[cfg(test)]
mod tests;

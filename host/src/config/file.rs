//! The configuration file: TOML, every key optional, none unknown.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmkeep_steps::image::space::LowWater;
use vmkeep_steps::save::AfterReboot;
use vmkeep_store::EngineName;
use vmkeep_store::burial::Policy;

use super::places::Surroundings;
use super::rights::FileRestore;
use super::vaults::FileVault;
use super::{ConfigError, Overrides};

/// The file as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Where the journal and, by default, backups live.
    pub state_dir: Option<PathBuf>,
    /// The Unix socket of the API.
    pub socket: Option<PathBuf>,
    /// The URI of the local hypervisor.
    pub connect: Option<String>,
    /// `[targets]`
    #[serde(default)]
    pub targets: Targets,
    /// `[store]`
    #[serde(default)]
    pub store: FileStore,
    /// `[history]`
    #[serde(default)]
    pub history: FileHistory,
    /// `[limits]`
    #[serde(default)]
    pub limits: FileLimits,
    /// `[snapshot]`
    #[serde(default)]
    pub snapshot: FileSnapshot,
    /// `[backup]`
    #[serde(default)]
    pub backup: FileBackup,
    /// `[restore]`
    #[serde(default)]
    pub restore: FileRestore,
    /// `[vaults.NAME]`
    #[serde(default)]
    pub vaults: BTreeMap<String, FileVault>,
    /// `[log]`
    #[serde(default)]
    pub log: FileLog,
}

/// What backups do unless told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSnapshot {
    /// How many whole backups of a domain stay below a root; 0: all.
    pub keep: Option<u32>,
    /// A folder on a tmpfs, to which the state of a guest that is saved goes first.
    pub ram_disk: Option<PathBuf>,
    /// A folder for the overlays of disks on block devices.
    pub overlay_dir: Option<PathBuf>,
    /// What becomes of a guest that the end of the host took down in the middle of a job: `start` or `leave`.
    pub after_reboot: Option<AfterReboot>,
}

/// What backups into vaults do unless told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileBackup {
    /// The vault that is meant where none is named.
    pub vault: Option<String>,
    /// A folder for what guests overwrite while they are backed up.
    pub scratch_dir: Option<PathBuf>,
    /// After so many days a disk is read whole again.
    pub full_every_days: Option<u32>,
    /// So many checkpoints of ours a domain keeps.
    pub checkpoints: Option<u32>,
}

/// Where backups and restored images may be put.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Targets {
    /// The folders below which anything may be written; the first is the default for backups.
    pub roots: Option<Vec<PathBuf>>,
    /// Where restored images go by default.
    pub restore: Option<PathBuf>,
}

/// How the journal is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileStore {
    /// `sqlite` or `sled`.
    pub engine: Option<StoreEngine>,
}

/// How long the histories of ended jobs are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileHistory {
    /// So many days; 0 or absent: for ever.
    pub keep_days: Option<u32>,
    /// The latest so many; 0 or absent: all.
    pub keep_jobs: Option<usize>,
}

/// An engine that keeps files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreEngine {
    /// One SQLite database; the default.
    Sqlite,
    /// A folder of sled's.
    Sled,
}

impl From<StoreEngine> for EngineName {
    fn from(engine: StoreEngine) -> Self {
        match engine {
            StoreEngine::Sqlite => Self::Sqlite,
            StoreEngine::Sled => Self::Sled,
        }
    }
}

/// With less every backup of a frozen guest would come too late.
const SHORTEST_FREEZE: std::time::Duration = std::time::Duration::from_secs(1);

/// How much may go on at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileLimits {
    /// Jobs at a time.
    pub jobs: Option<usize>,
    /// Jobs at a time that write below one root.
    pub jobs_per_root: Option<usize>,
    /// The largest memory image: `8G`.
    pub memory: Option<String>,
    /// The longest time for saving memory: `10m`.
    pub memory_time: Option<String>,
    /// Bytes per second for copying: `200M`.
    pub bandwidth: Option<String>,
    /// Bytes per second for merging each overlay: `100M`.
    pub merge_bandwidth: Option<String>,
    /// For how long a restored guest is watched: `3s`.
    pub watch: Option<String>,
    /// The longest time for which a guest's file systems stay frozen: `10s`.
    pub freeze: Option<String>,
    /// What a backup leaves free where guests write: `1G` …
    pub keep_free: Option<String>,
    /// … or so many percent of the file system, whichever is more.
    pub keep_free_percent: Option<u8>,
}

/// What is logged, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileLog {
    /// `text` or `json`.
    pub format: Option<LogFormat>,
    /// `info`, `debug`, or a filter by module.
    pub level: Option<String>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl File {
    /// Reads a file's text; `path` is for messages.
    ///
    /// # Errors
    /// When it is not TOML, or holds a key or a value that is not known.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let before = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = 1 + text.as_bytes()[..before].iter().filter(|b| **b == b'\n').count();
            ConfigError::Wrong { path: path.display().to_string(), line, why: error.message().to_owned() }
        })
    }

    /// Reads the file that was named, or the one at the usual place if there is one.
    pub(super) fn find(
        named: Option<&Path>,
        around: &Surroundings,
    ) -> Result<(Self, Option<PathBuf>), ConfigError> {
        let named = named.map(Path::to_owned).or_else(|| around.path("VMKEEP_CONFIG"));
        let (path, must_exist) = match named {
            Some(path) => (path, true),
            None => match around.config_file() {
                Some(path) => (path, false),
                None => return Ok((Self::default(), None)),
            },
        };
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok((Self::parse(&text, &path)?, Some(path))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
                Ok((Self::default(), None))
            }
            Err(error) => {
                Err(ConfigError::Unreadable { path: path.display().to_string(), why: error.to_string() })
            }
        }
    }
}

impl super::Config {
    /// Puts the sources together.
    pub(super) fn resolve(
        file: File,
        path: Option<PathBuf>,
        overrides: &Overrides,
        around: &Surroundings,
    ) -> Result<Self, ConfigError> {
        let state_dir = around.state_dir(overrides, file.state_dir)?;
        let socket = around.socket(overrides, file.socket, &state_dir)?;
        let connect = overrides
            .connect
            .clone()
            .or_else(|| around.text("VMKEEP_CONNECT"))
            .or(file.connect)
            .unwrap_or_else(|| around.default_uri().to_owned());
        super::check_uri(&connect)?;

        let restore_dir = match file.targets.restore {
            Some(dir) => absolute("targets.restore", &dir)?,
            None => state_dir.join("restored"),
        };
        let mut roots = match file.targets.roots {
            Some(roots) if roots.is_empty() => {
                return Err(impossible("targets.roots", "at least one folder is needed"));
            }
            Some(roots) => roots
                .into_iter()
                .map(|root| absolute("targets.roots", &root))
                .collect::<Result<Vec<_>, _>>()?,
            None => vec![state_dir.join("backups")],
        };
        if !roots.iter().any(|root| restore_dir.starts_with(root)) {
            roots.push(restore_dir.clone());
        }

        let vaults = super::vaults::resolve(file.vaults)?;
        Ok(Self {
            state_dir,
            socket,
            connect,
            roots,
            restore_dir,
            engine: file.store.engine.map(EngineName::from).unwrap_or_default(),
            history: Policy {
                keep_days: file.history.keep_days.filter(|days| *days > 0),
                keep_jobs: file.history.keep_jobs.filter(|jobs| *jobs > 0),
            },
            limits: limits(&file.limits)?,
            snapshot: super::SnapshotDefaults {
                keep: file.snapshot.keep.filter(|keep| *keep > 0),
                ram_disk: (file.snapshot.ram_disk)
                    .map(|dir| absolute("snapshot.ram_disk", &dir))
                    .transpose()?,
                overlay_dir: (file.snapshot.overlay_dir)
                    .map(|dir| absolute("snapshot.overlay_dir", &dir))
                    .transpose()?,
                after_reboot: file.snapshot.after_reboot.unwrap_or_default(),
            },
            backup: backup(file.backup, &vaults)?,
            restore: super::rights::resolve(&file.restore)?,
            vaults,
            log: log(file.log, around),
            file: path,
        })
    }
}

fn backup(
    file: FileBackup,
    vaults: &std::collections::BTreeMap<super::VaultName, super::VaultSettings>,
) -> Result<super::BackupDefaults, ConfigError> {
    let named = |name: String| -> Result<super::VaultName, ConfigError> {
        let name: super::VaultName = name.parse().map_err(|e| impossible("backup.vault", &format!("{e}")))?;
        if vaults.contains_key(&name) {
            return Ok(name);
        }
        Err(impossible("backup.vault", &format!("there is no table [vaults.{name}]")))
    };
    // One alone is meant.
    let only = || vaults.keys().next().filter(|_| vaults.len() == 1).cloned();
    Ok(super::BackupDefaults {
        vault: file.vault.map(named).transpose()?.or_else(only),
        scratch_dir: file.scratch_dir.map(|dir| absolute("backup.scratch_dir", &dir)).transpose()?,
        full_every_days: match file.full_every_days {
            Some(0) => {
                return Err(impossible(
                    "backup.full_every_days",
                    "every backup would be a full one: use --full",
                ));
            }
            days => days.unwrap_or(super::BackupDefaults::default().full_every_days),
        },
        checkpoints: match file.checkpoints {
            Some(0) => {
                return Err(impossible(
                    "backup.checkpoints",
                    "no backup could begin with what the last has read",
                ));
            }
            most => most.unwrap_or(super::BackupDefaults::default().checkpoints),
        },
    })
}

fn limits(file: &FileLimits) -> Result<super::Limits, ConfigError> {
    let default = super::Limits::default();
    let read = |key: &str, text: &Option<String>, read: fn(&str) -> Result<u64, String>| {
        text.as_deref().map(|text| read(text).map_err(|why| impossible(key, &why))).transpose()
    };
    let rate = |key: &str, text: &Option<String>| read(key, text, crate::text::parse_rate);
    let at_least_one = |key: &str, value: Option<usize>, default: usize| match value {
        Some(0) => Err(impossible(key, "0 would let no job run")),
        Some(value) => Ok(value),
        None => Ok(default),
    };
    let span = |key: &str, text: &Option<String>, default: std::time::Duration| match text {
        Some(text) => crate::text::parse_span(text).map_err(|why| impossible(key, &why)),
        None => Ok(default),
    };
    Ok(super::Limits {
        jobs: at_least_one("limits.jobs", file.jobs, default.jobs)?,
        jobs_per_root: at_least_one("limits.jobs_per_root", file.jobs_per_root, default.jobs_per_root)?,
        memory: read("limits.memory", &file.memory, crate::text::parse_size)?,
        memory_time: span("limits.memory_time", &file.memory_time, default.memory_time)?,
        bandwidth: rate("limits.bandwidth", &file.bandwidth)?.unwrap_or(default.bandwidth),
        merge_bandwidth: rate("limits.merge_bandwidth", &file.merge_bandwidth)?
            .unwrap_or(default.merge_bandwidth),
        watch: span("limits.watch", &file.watch, default.watch)?,
        freeze: match span("limits.freeze", &file.freeze, default.freeze)? {
            short if short < SHORTEST_FREEZE => {
                return Err(impossible(
                    "limits.freeze",
                    "no guest's agent freezes and thaws in less than a second",
                ));
            }
            freeze => freeze,
        },
        keep_free: LowWater {
            bytes: read("limits.keep_free", &file.keep_free, crate::text::parse_size)?
                .unwrap_or(default.keep_free.bytes),
            percent: match file.keep_free_percent {
                Some(101..) => return Err(impossible("limits.keep_free_percent", "there are 100 in all")),
                percent => percent.unwrap_or(default.keep_free.percent),
            },
        },
    })
}

fn log(file: FileLog, around: &Surroundings) -> super::Log {
    let default = super::Log::default();
    super::Log {
        format: file.format.unwrap_or(default.format),
        filter: around.text("VMKEEP_LOG").or(file.level).unwrap_or(default.filter),
    }
}

pub(super) fn absolute(key: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    let path = crate::location::path(path)
        .map_err(|fault| ConfigError::Protocol { what: key.to_owned(), why: fault.cause })?;
    let whole = path.is_absolute() && !path.components().any(|c| c == std::path::Component::ParentDir);
    if whole {
        Ok(path)
    } else {
        Err(impossible(key, &format!("{path:?} is not an absolute path without \"..\"")))
    }
}

pub(super) fn impossible(what: &str, why: &str) -> ConfigError {
    ConfigError::Impossible { what: what.to_owned(), why: why.to_owned() }
}

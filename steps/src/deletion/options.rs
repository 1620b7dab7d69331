//! What is asked for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::manifest::{BackupId, Digest};

/// What a deletion is told. The subject is the domain whose backups these are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteOptions {
    /// The backups with their folders; at least one.
    pub backups: Vec<Chosen>,
    /// Whether the last whole backup of the domain may be among them. Needs a reason in the request.
    #[serde(default)]
    pub last_copy: bool,
}

/// A backup that somebody chose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chosen {
    /// Its id.
    pub backup: BackupId,
    /// Its folder.
    pub folder: PathBuf,
}

/// What a retention is told. The subject is the domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneOptions {
    /// How many whole backups stay below each root; at least 1. Protected ones stay besides.
    pub keep: u32,
    /// The backup that the older ones make room for: it stays, is read again first, and only those below its root are
    /// looked at. Absent: below each root the newest takes this part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<BackupId>,
    /// Bytes per second for reading it again; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// A backup that is going to be removed, as its folder was when the plan was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doomed {
    /// The backup.
    pub backup: BackupId,
    /// Its folder.
    pub folder: PathBuf,
    /// BLAKE3 of its manifest.
    pub manifest: Digest,
    /// How many files the manifest names.
    pub files: u64,
    /// What they take, in bytes, holes included.
    pub bytes: u64,
}

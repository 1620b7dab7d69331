//! The records of the catalogue's stream.
//!
//! The stored form is JSON: `{"v":1,"at":…,"body":{"type":…,"data":{…}}}`, as that of a job's journal. A type that this
//! release does not know is skipped: nothing is decided by this stream.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_steps::manifest::catalogue::Stamp;
use vmkeep_steps::manifest::protection::Protection;
use vmkeep_steps::manifest::{BackupId, Digest, Stored};
use vmkeep_workflow::Actor;

use super::checks::Check;
use super::look::Counts;
use super::vaulted::Vaulted;

/// The version of the stored form.
pub(super) const FORMAT: u32 = 1;

/// A record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The version of the stored form.
    pub v: u32,
    /// When it was written.
    pub at: Timestamp,
    /// What happened.
    pub body: Body,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Body {
    /// A backup was found in a folder, for the first time or changed.
    Seen(Box<Place>),
    /// Somebody protected a backup.
    Protected {
        /// The backup.
        backup: BackupId,
        /// Who, and why.
        by: Actor,
        /// Until when; absent: for ever.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<Timestamp>,
    },
    /// Somebody ended a protection.
    Unprotected {
        /// The backup.
        backup: BackupId,
        /// Who, and why.
        by: Actor,
    },
    /// A job read a backup and compared it with its manifest.
    Checked(Box<Check>),
    /// A job has put a backup into a vault.
    Vaulted(Box<Vaulted>),
    /// A job deleted a backup.
    Deleted {
        /// The backup.
        backup: BackupId,
        /// The folder that it lay in; copies elsewhere are not meant.
        folder: PathBuf,
        /// The job, whose journal says who asked for it and why.
        job: String,
    },
    /// Somebody said that a missing backup may be forgotten.
    Forgotten {
        /// The backup.
        backup: BackupId,
        /// Who, and why.
        by: Actor,
    },
    /// Everything was read anew.
    Rebuilt {
        /// Who asked for it, and why.
        by: Actor,
        /// What was found.
        report: Counts,
    },
}

impl Body {
    pub(super) fn seen(place: Place) -> Self {
        Self::Seen(Box::new(place))
    }
}

/// A backup in a folder, as lists show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// The backup.
    pub backup: BackupId,
    /// Its folder.
    pub folder: PathBuf,
    /// Which files told that.
    pub stamp: Stamp,
    /// BLAKE3 of its manifest.
    pub manifest: Digest,
    /// The domain's name at the time.
    pub domain: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// The instant that it holds.
    pub at: Timestamp,
    /// Whether it holds memory.
    pub memory: bool,
    /// Its disks, by target.
    pub disks: Vec<String>,
    /// What its files take, in bytes.
    pub size: u64,
    /// The job that made it.
    pub job: String,
    /// The note that protects it, in force or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protection: Option<Protection>,
}

impl Place {
    /// Of a manifest that was read.
    pub(super) fn new(
        stored: &Stored,
        folder: PathBuf,
        stamp: Stamp,
        protection: Option<Protection>,
    ) -> Self {
        let manifest = &stored.manifest;
        Self {
            backup: manifest.backup,
            folder,
            stamp,
            manifest: stored.hash,
            domain: manifest.domain.name.clone(),
            domain_uuid: manifest.domain.uuid.to_string(),
            at: manifest.point_in_time,
            memory: manifest.memory.saved().is_some(),
            disks: manifest.disks.iter().map(|disk| disk.target.clone()).collect(),
            size: manifest.size(),
            job: manifest.job.to_string(),
            protection,
        }
    }
}

/// The bytes of a record that is written now.
pub(super) fn encode(body: &Body) -> Result<Vec<u8>, serde_json::Error> {
    serde_json::to_vec(&Event { v: FORMAT, at: Timestamp::now(), body: body.clone() })
}

//! The fields of a manifest. Fields that this program does not know are kept and written back.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::machine::{Nvram, Tpm};
use crate::image::qcow2::Format;
use crate::image::rights::Rights;
use crate::image::root::Component;

/// What stands in [`Manifest::format`].
pub const FORMAT: &str = "vmkeep-backup";
/// The version that this program writes.
pub const VERSION: u32 = 2;
/// The oldest version of reader that understands what this program writes of an ordinary machine; see
/// [`super::needed_reader`].
pub const MIN_READER: u32 = 1;
/// The version of reader that this program is.
pub const READER: u32 = 2;

/// Fields that this program does not know.
pub type Unknown = BTreeMap<String, Value>;

/// The id of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BackupId(pub Uuid);

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// A backup, described whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    /// The version of this form.
    pub version: u32,
    /// The oldest version of reader that understands this manifest.
    pub min_reader: u32,
    /// The backup.
    pub backup: BackupId,
    /// The job that made it.
    pub job: Uuid,
    /// What wrote it: `vmkeep 0.1.0`.
    pub tool: String,
    /// The instant that the backup holds.
    pub point_in_time: Timestamp,
    /// When the manifest was made.
    pub finished: Timestamp,
    /// The domain.
    pub domain: Domain,
    /// The host that it ran on.
    #[serde(default)]
    pub host: Host,
    /// The definition files.
    pub definition: Definition,
    /// How the disks (and the memory) fit together.
    pub consistency: Consistency,
    /// The disks, in the order of the definition.
    pub disks: Vec<Disk>,
    /// The memory.
    pub memory: Memory,
    /// Firmware variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<Nvram>,
    /// A TPM's state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Tpm>,
    /// Whether it started with the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
    /// Disks of the domain that are not in the backup.
    #[serde(default)]
    pub left_out: Vec<LeftOut>,
    /// Every file of the backup but the manifest itself.
    pub files: Vec<FileEntry>,
    /// What the owner should know.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Manifest {
    /// A file by name.
    #[must_use]
    pub fn file(&self, name: &Component) -> Option<&FileEntry> {
        self.files.iter().find(|f| f.name == *name)
    }

    /// A disk by target.
    #[must_use]
    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|d| d.target == target)
    }

    /// Bytes of all files but the manifest, holes included.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.files.iter().fold(0, |sum, f| sum.saturating_add(f.size))
    }
}

/// Whose backup it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name at that time.
    pub name: String,
    /// QEMU's machine type, as the running domain had it: `pc-q35-7.2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The processor architecture: `x86_64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    /// Its memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// Where the domain ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The host's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// libvirt's version: `9.0.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub libvirt: Option<String>,
    /// QEMU's version: `7.2.22`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<String>,
    /// The kernel's release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// The definition, as libvirt had it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// What the domain starts from.
    pub inactive: Component,
    /// What it ran with, if it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<Component>,
}

/// How the parts of a backup fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// Memory and all disks at one instant: the guest goes on as if nothing had happened.
    MemoryAndDisks,
    /// All disks at one instant, with the guest's file systems frozen.
    Quiesced,
    /// All disks at one instant: what a power cut would have left.
    Crash,
    /// The domain was shut off.
    Off,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name in the definition: `vda`.
    pub target: String,
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Its files from the top down. The first is the one to attach.
    pub chain: Vec<Component>,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// The memory, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// A memory image of libvirt's.
    Saved(SavedMemory),
    /// None.
    None {
        /// Why.
        reason: String,
    },
}

impl Memory {
    /// The memory image, if there is one.
    #[must_use]
    pub fn saved(&self) -> Option<&SavedMemory> {
        match self {
            Self::Saved(saved) => Some(saved),
            Self::None { .. } => None,
        }
    }
}

/// A memory image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMemory {
    /// Its file.
    pub file: Component,
    /// The version of libvirt's header.
    pub version: u32,
    /// How the stream is written: `raw`, `zstd`, …
    pub compression: String,
    /// For how many milliseconds the guest was down because it was saved; absent when it ran on, or when that is not
    /// known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A disk that is not in the backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Its name in the definition.
    pub target: String,
    /// Why, in words.
    pub reason: String,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The top image of a disk.
    Disk,
    /// An image under others.
    Base,
    /// A definition.
    Definition,
    /// The memory.
    Memory,
    /// Firmware variables.
    Nvram,
    /// A TPM's state.
    Tpm,
}

/// A file of the backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the folder.
    pub name: Component,
    /// What it is.
    pub role: Role,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// BLAKE3 of its content as it lies in the folder, in hexadecimal.
    pub blake3: Digest,
    /// BLAKE3 of what it was copied from, where that differs: the header names other neighbours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_blake3: Option<Digest>,
    /// Images only: the format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Images only: size of the disk that it shows, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<u64>,
    /// Images only: the file that it stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Component>,
    /// Where it came from. Only for people: nothing is ever read from or written to this path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Images and firmware variables only: whose that was, and what others might do with it, when no guest used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rights: Option<Rights>,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A BLAKE3 hash; 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub blake3::Hash);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_hex())
    }
}

impl TryFrom<String> for Digest {
    type Error = blake3::HexError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        blake3::Hash::from_hex(text).map(Self)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(hash)
    }
}

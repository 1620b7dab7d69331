//! A manifest: all that a catalogue knows of a backup (`FORMAT.md`, §3). Its put is the commit.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::blob::BlobType;
use crate::header::{CHUNK, FORMAT};
use crate::ids::{BackupId, BlobId, DomainId, LeaseId};
use crate::keys::IdKeys;
use crate::names::ObjectName;
use crate::tree::Tree;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupKind {
    /// Everything was read.
    Full,
    /// What changed since the last backup was read.
    Incremental,
    /// What changed since the last full backup was read.
    Differential,
}

/// The tree of a disk or stream, as a manifest holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Bytes.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk: u32,
    /// The topmost node; all zero if everything is.
    pub top: BlobId,
    /// What proves size, chunk size and top.
    pub root: BlobId,
}

impl Image {
    /// That of a tree.
    #[must_use]
    pub fn new(ids: &IdKeys, leaves: BlobType, tree: Tree) -> Self {
        let root = ids.root(leaves, tree.size, CHUNK, tree.top);
        Self { size: tree.size, chunk: CHUNK, top: tree.top, root }
    }

    /// Whether the root fits all else.
    #[must_use]
    pub fn is_sound(&self, ids: &IdKeys, leaves: BlobType) -> bool {
        self.chunk == CHUNK && ids.root(leaves, self.size, self.chunk, self.top) == self.root
    }

    /// The tree.
    #[must_use]
    pub fn tree(&self) -> Tree {
        Tree { size: self.size, top: self.top }
    }
}

/// A disk of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its target in the guest, as libvirt names it.
    pub target: String,
    /// Its content.
    pub image: Image,
    /// The format of the file that it was read from.
    pub source_format: String,
    /// Bytes that were read as changed.
    pub dirty: u64,
    /// Bytes that were put for it, compressed and with its nodes.
    pub stored: u64,
    /// When all of it was last read, whatever a bitmap said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole: Option<Timestamp>,
    /// Why all of it was read although something else was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_because: Option<String>,
    /// The backup since which only what had changed was read; nothing: all of it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unchanged_since: Option<BackupId>,
    /// Whether the backup's checkpoint has a bitmap of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bitmap: bool,
    /// The files that it was read from, from the top down, as they were then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<SourceFile>,
}

impl Disk {
    /// One that was read whole, of which no more is known than that.
    #[must_use]
    pub fn new(target: impl Into<String>, image: Image, source_format: impl Into<String>) -> Self {
        Self {
            target: target.into(),
            image,
            source_format: source_format.into(),
            dirty: 0,
            stored: 0,
            whole: None,
            whole_because: None,
            unchanged_since: None,
            bitmap: false,
            files: Vec::new(),
        }
    }
}

/// A file that a disk was read from, as it was when the backup began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Where it was.
    pub path: String,
    /// The file system that it lay on, by what lasts of it; empty if that is not known.
    pub file_system: String,
    /// Its number there.
    pub inode: u64,
    /// Bytes; nothing of the file that the guest writes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// When it was last changed; nothing of the file that the guest writes to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<Timestamp>,
}

/// Memory, TPM state, firmware variables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// What it is.
    pub name: String,
    /// Its content.
    pub image: Image,
}

/// The host of a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its boot.
    pub boot: String,
    /// libvirt's version.
    pub libvirt: String,
    /// QEMU's version.
    pub qemu: String,
    /// vmkeep's version.
    pub vmkeep: String,
}

/// Where a backup stands in its host's journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The journal.
    pub journal: String,
    /// The job.
    pub job: String,
    /// The plan.
    pub plan: String,
}

/// A backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format that it was made with.
    pub format: u32,
    /// The oldest format whose readers can read it.
    pub min_reader: u32,
    /// Features that it makes use of.
    pub features: Vec<String>,
    /// The backup.
    pub backup: BackupId,
    /// The lease under which it was put.
    pub lease: LeaseId,
    /// The domain.
    pub domain: DomainId,
    /// The domain's name.
    pub domain_name: String,
    /// The point in time.
    pub taken: Timestamp,
    /// What may be expected of the guest's file systems.
    pub consistency: String,
    /// What was read.
    pub kind: BackupKind,
    /// Why it is a full one although something else was asked for.
    pub full_because: Option<String>,
    /// The backup that it was based on.
    pub parent: Option<BackupId>,
    /// The checkpoint that was made with it.
    pub checkpoint: Option<String>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Its streams.
    pub streams: Vec<Stream>,
    /// The domain's definition; with passwords only in an encrypted vault.
    pub definition: String,
    /// Whether the domain starts with its host.
    pub autostart: bool,
    /// Where it was made.
    pub host: Host,
    /// By which job.
    pub origin: Origin,
    /// The vault's header, for the day when it is lost.
    pub header: String,
}

impl Manifest {
    /// An empty one, to be filled in.
    #[must_use]
    pub fn new(domain: DomainId, backup: BackupId, lease: LeaseId, taken: Timestamp, header: &[u8]) -> Self {
        Self {
            format: FORMAT,
            min_reader: FORMAT,
            features: Vec::new(),
            backup,
            lease,
            domain,
            domain_name: String::new(),
            taken,
            consistency: String::new(),
            kind: BackupKind::Full,
            full_because: None,
            parent: None,
            checkpoint: None,
            disks: Vec::new(),
            streams: Vec::new(),
            definition: String::new(),
            autostart: false,
            host: Host::default(),
            origin: Origin::default(),
            header: String::from_utf8_lossy(header).into_owned(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> ObjectName {
        ObjectName::Manifest(self.domain, self.backup, self.lease)
    }

    /// All its trees, with what their leaves are and what they are called.
    #[must_use]
    pub fn images(&self) -> Vec<(&str, BlobType, &Image)> {
        let disks = self.disks.iter().map(|disk| (disk.target.as_str(), BlobType::Data, &disk.image));
        let streams =
            self.streams.iter().map(|stream| (stream.name.as_str(), BlobType::Stream, &stream.image));
        disks.chain(streams).collect()
    }
}

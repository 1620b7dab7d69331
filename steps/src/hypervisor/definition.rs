//! A domain's definition, as far as backups care.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::observation::{Mirror, Target};

/// An image file in a chain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layer {
    /// Absolute path.
    pub path: PathBuf,
    /// `qcow2`, `raw`, …
    pub format: String,
}

/// A definition, persistent or live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// The whole text, secrets included where the hypervisor gives them.
    pub xml: String,
    /// A hash of the definition without what a job itself changes: the marker, and of every disk on a file or block device
    /// which of both it is, its source, format and backing store. Equal hashes of persistent definitions mean that nobody else has changed anything.
    pub bare: String,
    /// Its disks, in its order.
    pub disks: Vec<DiskDef>,
    /// What else matters.
    pub devices: Devices,
}

impl Definition {
    /// A disk by target.
    #[must_use]
    pub fn disk(&self, target: &Target) -> Option<&DiskDef> {
        self.disks.iter().find(|disk| disk.target == *target)
    }

    /// The file or block device that a disk names.
    #[must_use]
    pub fn file(&self, target: &Target) -> Option<&PathBuf> {
        self.disk(target)?.source.image()
    }
}

/// What a disk is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskDevice {
    /// A disk.
    Disk,
    /// A CD drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// A SCSI device passed through.
    Lun,
}

/// Where a disk's contents are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "at", rename_all = "snake_case")]
pub enum DiskSource {
    /// A file.
    File(PathBuf),
    /// A block device of the host.
    Block(PathBuf),
    /// Over the network: protocol and name.
    Network(String),
    /// Something else: pool volume, folder, NVMe, vhost-user.
    Other(String),
    /// No medium.
    Empty,
}

impl DiskSource {
    /// The file or block device.
    #[must_use]
    pub fn image(&self) -> Option<&PathBuf> {
        match self {
            Self::File(path) | Self::Block(path) => Some(path),
            _ => None,
        }
    }
}

/// What a definition says about the images under a disk's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "layers", rename_all = "snake_case")]
pub enum Backing {
    /// Nothing: the image itself tells.
    Probed,
    /// Explicitly these, from the top down, the image itself not included; none means that the image is taken to stand
    /// alone *whatever its header says*.
    Explicit(Vec<Layer>),
}

/// A disk of a definition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDef {
    /// Its name in the guest's terms: `vda`.
    pub target: Target,
    /// What it is.
    pub device: DiskDevice,
    /// Where its contents are.
    pub source: DiskSource,
    /// The format that the definition names.
    pub format: Option<String>,
    /// What is said about the images below.
    pub backing: Backing,
    /// The guest may not write.
    pub read_only: bool,
    /// Other guests may write.
    pub shareable: bool,
    /// Changes are thrown away at shutdown.
    pub transient: bool,
    /// The image is encrypted by QEMU.
    pub encrypted: bool,
    /// Live definition only: libvirt's idea of a block job on this disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
}

/// What of a definition decides whether and how it can be backed up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// Memory in bytes.
    pub memory: u64,
    /// The machine type; in a live definition the exact one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The processor architecture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    /// Firmware variables, in a file of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<NvramDef>,
    /// A TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<TpmDef>,
    /// The channel of a guest agent.
    pub agent: bool,
    /// How many network cards it has.
    #[serde(default)]
    pub network_cards: usize,
    /// Devices that keep a memory image from being taken, in words: host devices, virtiofs, …
    pub unsaveable: Vec<String>,
    /// What in it reaches into the host beyond the images of its disks, in words: programs and scripts that are run,
    /// files and devices of the host. For definitions that somebody else may have written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reaches: Vec<String>,
}

/// Firmware variables (UEFI).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NvramDef {
    /// Their file; nothing if the definition leaves it to libvirt, which names it only in the live one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The file's format, raw if the definition does not say.
    pub format: String,
    /// What libvirt makes the file from when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<PathBuf>,
    /// They are not in a file, but there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<String>,
}

/// Who is the TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TpmKind {
    /// An `swtpm` that libvirt starts with the domain, whose state is in a folder of libvirt's.
    Emulator,
    /// An `swtpm` that somebody else runs, the host's own, or one that is not known.
    Other(String),
}

/// A TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmDef {
    /// Who it is.
    pub kind: TpmKind,
    /// `1.2` or `2.0`; nothing if the definition leaves it to libvirt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its state is encrypted with a secret of libvirt's.
    #[serde(default)]
    pub encrypted: bool,
}

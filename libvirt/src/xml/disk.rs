//! Disks of a definition, read.
//!
//! Invariant: what libvirt leaves out stays distinguishable from what it states: a disk without
//! `<backingStore>` (libvirt will look into the image) is not one with an empty `<backingStore/>`
//! (the chain ends here, and the image's own backing file is *ignored*).

use serde::{Deserialize, Serialize};

use super::tree::Element;

/// What a disk is to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskDevice {
    /// A hard disk.
    Disk,
    /// A CD-ROM drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// A SCSI device passed through.
    Lun,
    /// Something this crate does not know.
    Other(String),
}

/// Where an image lies.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// A file.
    File,
    /// A block device of the host.
    Block,
    /// A folder shown as a file system.
    Dir,
    /// The network, by protocol.
    Network(String),
    /// A volume of a storage pool.
    Volume,
    /// Something this crate does not know, or treats alike (`nvme`, `vhostuser`, …).
    Other(String),
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSource {
    /// Where it lies.
    pub kind: SourceKind,
    /// File, device, folder or name on the server; `None` for an empty drive. For a volume
    /// `pool/volume`.
    pub path: Option<String>,
    /// libvirt's number of the link in the chain (live definitions only).
    pub index: Option<u32>,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Whether only a slice of the file is used.
    pub sliced: bool,
    /// Whether its data lie in another file beside it.
    pub data_file: Option<String>,
}

/// What the definition says about what lies below an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Nothing: libvirt reads it from the image itself.
    Unstated,
    /// The chain ends here, whatever the image says.
    End,
    /// Another image.
    Layer(Box<BackingLayer>),
}

/// An image below another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingLayer {
    /// The image.
    pub source: DiskSource,
    /// Its format.
    pub format: Option<String>,
    /// What lies below it.
    pub below: Backing,
}

/// How far a mirror is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorReady {
    /// Still copying.
    No,
    /// In step with the disk: a pivot may be asked for.
    Yes,
    /// Being pivoted.
    Pivot,
    /// Being given up.
    Abort,
    /// Something this crate does not know.
    Other(String),
}

/// The second image of a disk with a copy or an active commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// `copy` or `active-commit`.
    pub job: Option<String>,
    /// How far it is.
    pub ready: MirrorReady,
    /// The second image.
    pub source: DiskSource,
    /// Its format.
    pub format: Option<String>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// What it is to the guest.
    pub device: DiskDevice,
    /// Its target, unique in the domain: `vda`.
    pub target: String,
    /// Its bus.
    pub bus: Option<String>,
    /// Its serial number.
    pub serial: Option<String>,
    /// Its image.
    pub source: DiskSource,
    /// Its driver, `qemu`.
    pub driver: Option<String>,
    /// Its format; `None` means raw to libvirt.
    pub format: Option<String>,
    /// The cache mode.
    pub cache: Option<String>,
    /// Whether discards reach the image.
    pub discard: Option<String>,
    /// What the definition says about the chain below.
    pub backing: Backing,
    /// A copy or active commit in progress.
    pub mirror: Option<Mirror>,
    /// The guest cannot write it.
    pub readonly: bool,
    /// Other domains may use it at the same time.
    pub shareable: bool,
    /// Its changes are dropped when the domain ends.
    pub transient: bool,
    /// Whether libvirt is to do snapshots of it (`snapshot=` of the definition).
    pub snapshot: Option<String>,
    /// libvirt's or the user's name of the device.
    pub alias: Option<String>,
}

impl Disk {
    pub(super) fn read(e: &Element) -> Option<Self> {
        let target = e.child("target")?;
        let driver = e.child("driver");
        let attr = |name: &str| driver.and_then(|d| d.attr(name)).map(str::to_owned);
        Some(Self {
            device: match e.attr("device").unwrap_or("disk") {
                "disk" => DiskDevice::Disk,
                "cdrom" => DiskDevice::Cdrom,
                "floppy" => DiskDevice::Floppy,
                "lun" => DiskDevice::Lun,
                other => DiskDevice::Other(other.to_owned()),
            },
            target: target.attr("dev")?.to_owned(),
            bus: target.attr("bus").map(str::to_owned),
            serial: e.child_text("serial"),
            source: DiskSource::read(e),
            driver: attr("name"),
            format: attr("type"),
            cache: attr("cache"),
            discard: attr("discard"),
            backing: Backing::read(e),
            mirror: e.child("mirror").map(Mirror::read),
            readonly: e.child("readonly").is_some(),
            shareable: e.child("shareable").is_some(),
            transient: e.child("transient").is_some(),
            snapshot: e.attr("snapshot").map(str::to_owned),
            alias: e.child("alias").and_then(|a| a.attr("name")).map(str::to_owned),
        })
    }

    /// The images the definition names, from the top down.
    pub fn layers(&self) -> Vec<(&DiskSource, Option<&str>)> {
        let mut out = vec![(&self.source, self.format.as_deref())];
        let mut below = &self.backing;
        while let Backing::Layer(layer) = below {
            out.push((&layer.source, layer.format.as_deref()));
            below = &layer.below;
        }
        out
    }
}

impl DiskSource {
    /// Of an element that has `type` and a `<source>` (a disk, a backing store, a mirror).
    fn read(e: &Element) -> Self {
        let source = e.child("source");
        let attr = |name: &str| source.and_then(|s| s.attr(name)).map(str::to_owned);
        let (kind, path) = match e.attr("type").unwrap_or("file") {
            // A mirror's own attributes repeat the file for old clients.
            "file" => (SourceKind::File, attr("file").or_else(|| e.attr("file").map(str::to_owned))),
            "block" => (SourceKind::Block, attr("dev")),
            "dir" => (SourceKind::Dir, attr("dir")),
            "network" => (SourceKind::Network(attr("protocol").unwrap_or_default()), attr("name")),
            "volume" => (
                SourceKind::Volume,
                attr("pool").zip(attr("volume")).map(|(pool, volume)| format!("{pool}/{volume}")),
            ),
            other => (SourceKind::Other(other.to_owned()), attr("path")),
        };
        let has = |name: &str| source.is_some_and(|s| s.child(name).is_some());
        Self {
            kind,
            path,
            index: attr("index").and_then(|i| i.parse().ok()),
            // Old definitions carry the encryption beside the source.
            encrypted: has("encryption") || e.child("encryption").is_some(),
            sliced: has("slices"),
            data_file: source
                .and_then(|s| s.at(&["dataStore", "source"]))
                .and_then(|s| s.attr("file").or_else(|| s.attr("dev")))
                .map(str::to_owned),
        }
    }
}

impl Backing {
    fn read(e: &Element) -> Self {
        match e.child("backingStore") {
            None => Self::Unstated,
            Some(b) if b.child("source").is_none() && b.attr("type").is_none() => Self::End,
            Some(b) => Self::Layer(Box::new(BackingLayer {
                source: DiskSource::read(b),
                format: format_of(b),
                below: Self::read(b),
            })),
        }
    }
}

impl Mirror {
    fn read(e: &Element) -> Self {
        Self {
            job: e.attr("job").map(str::to_owned),
            ready: match e.attr("ready") {
                None | Some("no") => MirrorReady::No,
                Some("yes") => MirrorReady::Yes,
                Some("pivot") => MirrorReady::Pivot,
                Some("abort") => MirrorReady::Abort,
                Some(other) => MirrorReady::Other(other.to_owned()),
            },
            source: DiskSource::read(e),
            format: format_of(e).or_else(|| e.attr("format").map(str::to_owned)),
        }
    }
}

fn format_of(e: &Element) -> Option<String> {
    e.child("format").and_then(|f| f.attr("type")).map(str::to_owned)
}

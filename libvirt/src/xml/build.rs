//! Descriptions that libvirt's calls take: of snapshots, checkpoints and backups, built through the
//! tree, so that any name or path is escaped.
//!
//! Invariant: nothing is left to a default that depends on what else the domain has. libvirt includes
//! disks that a description omits, so callers list every disk, also those that take no part.

use serde::{Deserialize, Serialize};

use super::tree::{Document, Element, XmlError};

fn text_child(parent: &mut Element, name: &str, text: Option<&str>) -> Result<(), XmlError> {
    if let Some(text) = text {
        let mut e = Element::new(name)?;
        e.set_text(text)?;
        parent.push(e);
    }
    Ok(())
}

fn with_attrs(name: &str, attrs: &[(&str, Option<&str>)]) -> Result<Element, XmlError> {
    let mut e = Element::new(name)?;
    for (key, value) in attrs {
        if let Some(value) = value {
            e.set_attr(key, value)?;
        }
    }
    Ok(e)
}

/// What a snapshot does with the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotMemory {
    /// Nothing.
    No,
    /// Writes it to this file, in the format of a save image.
    File(String),
}

/// What a snapshot does with a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotDisk {
    /// Nothing.
    No,
    /// Puts this file on top.
    External {
        /// The overlay.
        path: String,
        /// Its format.
        format: String,
    },
}

/// A `<domainsnapshot>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotXml {
    /// Its name; libvirt makes one up if there is none.
    pub name: Option<String>,
    /// Words for people.
    pub description: Option<String>,
    /// The guest's memory.
    pub memory: SnapshotMemory,
    /// Every disk, by target.
    pub disks: Vec<(String, SnapshotDisk)>,
}

impl SnapshotXml {
    /// The description.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn to_xml(&self) -> Result<String, XmlError> {
        let mut root = Element::new("domainsnapshot")?;
        text_child(&mut root, "name", self.name.as_deref())?;
        text_child(&mut root, "description", self.description.as_deref())?;
        root.push(match &self.memory {
            SnapshotMemory::No => with_attrs("memory", &[("snapshot", Some("no"))])?,
            SnapshotMemory::File(path) => {
                with_attrs("memory", &[("snapshot", Some("external")), ("file", Some(path))])?
            }
        });
        let mut disks = Element::new("disks")?;
        for (target, what) in &self.disks {
            disks.push(match what {
                SnapshotDisk::No => with_attrs("disk", &[("name", Some(target)), ("snapshot", Some("no"))])?,
                SnapshotDisk::External { path, format } => {
                    let mut disk = with_attrs(
                        "disk",
                        &[("name", Some(target)), ("snapshot", Some("external")), ("type", Some("file"))],
                    )?;
                    disk.push(with_attrs("driver", &[("type", Some(format))])?);
                    disk.push(with_attrs("source", &[("file", Some(path))])?);
                    disk
                }
            });
        }
        root.push(disks);
        Ok(root.to_string())
    }
}

/// A `<domaincheckpoint>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointXml {
    /// Its name, also that of its bitmaps.
    pub name: String,
    /// Words for people.
    pub description: Option<String>,
    /// Every disk, by target, and whether it gets a bitmap.
    pub disks: Vec<(String, bool)>,
}

impl CheckpointXml {
    /// The description.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn to_xml(&self) -> Result<String, XmlError> {
        let mut root = Element::new("domaincheckpoint")?;
        text_child(&mut root, "name", Some(&self.name))?;
        text_child(&mut root, "description", self.description.as_deref())?;
        let mut disks = Element::new("disks")?;
        for (target, takes_part) in &self.disks {
            let kind = if *takes_part { "bitmap" } else { "no" };
            disks.push(with_attrs("disk", &[("name", Some(target)), ("checkpoint", Some(kind))])?);
        }
        root.push(disks);
        Ok(root.to_string())
    }
}

/// Who copies in a backup job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupMode {
    /// QEMU writes the data to the disks' targets.
    Push,
    /// QEMU shows the data on an NBD server at this Unix socket, until the job is aborted.
    Pull {
        /// The socket, in a folder that QEMU's user can write.
        socket: String,
    },
}

/// A disk in a backup job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupDisk {
    /// Its target.
    pub target: String,
    /// What the job does with it; `None` leaves it out.
    pub part: Option<BackupPart>,
}

/// A disk's part in a backup job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupPart {
    /// Push: where to; pull: where to keep what the guest overwrites meanwhile.
    pub file: String,
    /// The file's format; libvirt's choice if none.
    pub format: Option<String>,
    /// The checkpoint since which to copy, where it differs from the job's. `Some(None)`: in full.
    pub incremental: Option<Option<String>>,
    /// Pull: the export's name, where not the target.
    pub export: Option<String>,
    /// Pull: the name under which the dirty bitmap is shown.
    pub export_bitmap: Option<String>,
}

/// A `<domainbackup>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupXml {
    /// Who copies.
    pub mode: BackupMode,
    /// The checkpoint since which to copy; everything if none.
    pub incremental: Option<String>,
    /// Every disk.
    pub disks: Vec<BackupDisk>,
}

impl BackupXml {
    /// The scratch files that a job's description names, as libvirt gives it back.
    ///
    /// # Errors
    /// When it is no XML.
    pub fn scratch_files(text: &str) -> Result<Vec<String>, XmlError> {
        let job = Document::parse(text)?;
        let disks = job.root().child("disks").into_iter().flat_map(|disks| disks.children_named("disk"));
        let file = |disk: &Element| disk.at(&["scratch"])?.attr("file").map(str::to_owned);
        Ok(disks.filter_map(file).collect())
    }

    /// The description.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn to_xml(&self) -> Result<String, XmlError> {
        let mode = match self.mode {
            BackupMode::Push => "push",
            BackupMode::Pull { .. } => "pull",
        };
        let mut root = with_attrs("domainbackup", &[("mode", Some(mode))])?;
        text_child(&mut root, "incremental", self.incremental.as_deref())?;
        if let BackupMode::Pull { socket } = &self.mode {
            root.push(with_attrs("server", &[("transport", Some("unix")), ("socket", Some(socket))])?);
        }
        let mut disks = Element::new("disks")?;
        for disk in &self.disks {
            disks.push(self.disk(disk)?);
        }
        root.push(disks);
        Ok(root.to_string())
    }

    fn disk(&self, disk: &BackupDisk) -> Result<Element, XmlError> {
        let Some(part) = &disk.part else {
            return with_attrs("disk", &[("name", Some(&disk.target)), ("backup", Some("no"))]);
        };
        let (backup_mode, since) = match &part.incremental {
            None => (None, None),
            Some(None) => (Some("full"), None),
            Some(Some(checkpoint)) => (Some("incremental"), Some(checkpoint.as_str())),
        };
        let mut e = with_attrs(
            "disk",
            &[
                ("name", Some(&disk.target)),
                ("backup", Some("yes")),
                ("type", Some("file")),
                ("backupmode", backup_mode),
                ("incremental", since),
                ("exportname", part.export.as_deref()),
                ("exportbitmap", part.export_bitmap.as_deref()),
            ],
        )?;
        if let Some(format) = &part.format {
            e.push(with_attrs("driver", &[("type", Some(format))])?);
        }
        let element = match self.mode {
            BackupMode::Push => "target",
            BackupMode::Pull { .. } => "scratch",
        };
        e.push(with_attrs(element, &[("file", Some(&part.file))])?);
        Ok(e)
    }
}

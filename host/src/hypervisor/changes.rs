//! What changes a guest's disks: definitions, snapshots, commits.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmkeep_libvirt::flags::{BlockJobAbortFlags, CommitFlags, DefineFlags, SnapshotCreateFlags, XmlFlags};
use vmkeep_libvirt::xml::{DomainXml, SnapshotDisk, SnapshotMemory, SnapshotXml};
use vmkeep_steps::hypervisor::{
    Commit, DiskChange, DomainId, DomainRef, HvError, HvResult, Take, Through, Trouble,
};

use super::{Libvirt, definition};

/// How a complete memory image of libvirt's begins; one that was cut off says `LibvirtQemudPart`.
const COMPLETE: &[u8; 16] = b"LibvirtQemudSave";

impl Libvirt {
    pub(super) async fn change_disks(&self, domain: &DomainId, change: DiskChange) -> HvResult<()> {
        let text =
            self.look_at(domain, "definition", |d| d.xml(XmlFlags::SECURE | XmlFlags::INACTIVE)).await?;
        let mut xml = DomainXml::parse(&text).map_err(|e| definition::broken(&e))?;
        match &change {
            DiskChange::Point(disks) => {
                for (target, layer) in disks {
                    definition::point(&mut xml, target, layer).map_err(|e| definition::broken(&e))?;
                }
            }
            DiskChange::LikeIn { xml: other, targets } => {
                let other = DomainXml::parse(other).map_err(|e| definition::broken(&e))?;
                for target in targets {
                    definition::like_in(&mut xml, &other, target).map_err(|e| definition::broken(&e))?;
                }
            }
        }
        let text = xml.to_string();
        self.change_definition(domain, "define the disks", text).await?;
        self.sync_folders().await
    }

    /// Replaces the persistent definition of a domain that has one.
    pub(super) async fn change_definition(
        &self,
        domain: &DomainId,
        what: &str,
        text: String,
    ) -> HvResult<()> {
        let uuid = domain.0;
        // Looked up in the same call: a definition that went away meanwhile must not be made anew.
        let name = format!("{what} of {uuid}");
        self.change_anything(&name, move |c| {
            c.domain_by_uuid(uuid)?;
            c.define(&text, DefineFlags::NONE).map(drop)
        })
        .await
    }

    pub(super) async fn define_another(&self, text: String) -> HvResult<DomainRef> {
        let xml = DomainXml::parse(&text).map_err(|e| definition::broken(&e))?;
        let uuid = xml.uuid().map_err(|e| definition::broken(&e))?;
        let name = xml.name().map_err(|e| definition::broken(&e))?;
        let wanted = DomainRef { id: DomainId(uuid), name: name.clone() };
        let taken = {
            let name = name.clone();
            self.change_anything(&format!("define {uuid}"), move |c| {
                if let Some(by) = taken_by(c, uuid, &name)? {
                    return Ok(Some(by));
                }
                c.define(&text, DefineFlags::NONE).map(|_| None)
            })
            .await?
        };
        match taken {
            Some(by) => Err(HvError::new(Trouble::Exists, format!("there is a domain {by} already"))),
            None => {
                self.sync_folders().await?;
                Ok(wanted)
            }
        }
    }

    pub(super) async fn take_snapshot(&self, domain: &DomainId, take: Take) -> HvResult<()> {
        let memory = take.memory.as_deref().map(definition::path_text).transpose()?.map(str::to_owned);
        let mut overlays = Vec::with_capacity(take.disks.len());
        for (target, overlay) in &take.disks {
            overlays.push((target.0.clone(), definition::path_text(overlay)?.to_owned()));
        }
        let with_memory = memory.is_some();
        let taken = self
            .change_patiently(domain, "take the snapshot", move |d| {
                let text = d.xml(XmlFlags::NONE)?;
                let Ok(xml) = DomainXml::parse(&text) else {
                    return Ok(Err("the live definition is unreadable"));
                };
                // Every disk is named: libvirt takes those that are not along.
                let mut disks = Vec::new();
                for disk in xml.disks() {
                    let what = match overlays.iter().find(|(target, _)| *target == disk.target) {
                        Some((_, path)) => {
                            SnapshotDisk::External { path: path.clone(), format: "qcow2".to_owned() }
                        }
                        None => SnapshotDisk::No,
                    };
                    disks.push((disk.target, what));
                }
                if overlays.iter().any(|(target, _)| disks.iter().all(|(name, _)| name != target)) {
                    return Ok(Err("a disk is gone"));
                }
                let description = SnapshotXml {
                    name: None,
                    description: None,
                    memory: memory.map_or(SnapshotMemory::No, SnapshotMemory::File),
                    disks,
                };
                let Ok(description) = description.to_xml() else {
                    return Ok(Err("a path cannot stand in XML"));
                };
                let flags = SnapshotCreateFlags::REUSE_EXTERNAL
                    | SnapshotCreateFlags::ATOMIC
                    | SnapshotCreateFlags::NO_METADATA;
                let kind =
                    if with_memory { SnapshotCreateFlags::LIVE } else { SnapshotCreateFlags::DISK_ONLY };
                d.create_snapshot(&description, flags | kind).map(|_| Ok(()))
            })
            .await?;
        taken.map_err(|why| HvError::new(Trouble::Refused, why))?;
        match take.memory {
            Some(path) => seal(path).await,
            None => Ok(()),
        }
    }

    pub(super) async fn begin_commit(&self, domain: &DomainId, commit: Commit) -> HvResult<()> {
        match commit.through {
            Through::Libvirt => {
                let base = definition::path_text(&commit.base)?.to_owned();
                self.change(domain, "begin the commit", move |d| {
                    let flags = CommitFlags::ACTIVE | CommitFlags::BANDWIDTH_BYTES;
                    d.block_commit(&commit.target.0, Some(&base), None, commit.bandwidth, flags)
                })
                .await
            }
            Through::Monitor => self.begin_commit_by_monitor(domain, &commit).await,
        }
    }

    pub(super) async fn pivot_commit(&self, domain: &DomainId, commit: Commit) -> HvResult<()> {
        match commit.through {
            Through::Libvirt => {
                self.urgent(domain, "pivot", move |d| {
                    d.block_job_abort(&commit.target.0, BlockJobAbortFlags::PIVOT)
                })
                .await
            }
            Through::Monitor => self.pivot_by_monitor(domain, &commit).await,
        }
    }

    pub(super) async fn abort_commit(&self, domain: &DomainId, commit: Commit) -> HvResult<()> {
        match commit.through {
            Through::Libvirt => {
                self.change(domain, "give the commit up", move |d| {
                    if d.block_job_info(&commit.target.0)?.is_none() {
                        return Ok(());
                    }
                    d.block_job_abort(&commit.target.0, BlockJobAbortFlags::NONE)
                })
                .await
            }
            Through::Monitor => self.abort_by_monitor(domain, &commit).await,
        }
    }
}

fn taken_by(
    c: &vmkeep_libvirt::Connection,
    uuid: Uuid,
    name: &str,
) -> vmkeep_libvirt::Result<Option<String>> {
    let none = |e: vmkeep_libvirt::Error| {
        if e.code == vmkeep_libvirt::ErrorCode::NoDomain { Ok(None) } else { Err(e) }
    };
    if let Some(by) = c.domain_by_uuid(uuid).map(|d| Some(format!("{uuid}, {:?}", d.name()))).or_else(none)? {
        return Ok(Some(by));
    }
    c.domain_by_name(name).map(|d| Some(format!("{:?}, {}", d.name(), d.uuid()))).or_else(none)
}

/// Makes a memory image durable with its name, and makes sure that it is whole: libvirt writes the header's last word
/// after its own fdatasync.
pub(super) async fn seal(path: PathBuf) -> HvResult<()> {
    let sealed = tokio::task::spawn_blocking(move || {
        let io = |e: &std::io::Error| {
            let trouble =
                if e.kind() == std::io::ErrorKind::NotFound { Trouble::Missing } else { Trouble::Io };
            HvError::new(trouble, format!("the memory image {}: {e}", path.display()))
        };
        let mut file = File::open(&path).map_err(|e| io(&e))?;
        file.sync_all().map_err(|e| io(&e))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        File::open(folder).and_then(|dir| dir.sync_all()).map_err(|e| io(&e))?;
        let mut magic = [0; 16];
        file.read_exact(&mut magic).map_err(|e| io(&e))?;
        if magic != *COMPLETE {
            return Err(HvError::new(
                Trouble::Refused,
                format!("the memory image {} is not complete", path.display()),
            ));
        }
        Ok(())
    });
    // The snapshot was taken: whatever is wrong with the file does not undo that.
    sealed.await.unwrap_or_else(|e| Err(HvError::new(Trouble::Io, e.to_string()))).map_err(HvError::in_doubt)
}

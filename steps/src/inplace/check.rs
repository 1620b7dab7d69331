//! What can be found out before a machine is exchanged, and whether it still holds.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmkeep_workflow::{Code, Fault};

use super::kept::{KeptDisk, Was};
use super::rest::Rest;
use super::state;
use super::swap::{Machine, files};
use crate::codes;
use crate::hypervisor::{
    Definition, DiskDef, DiskDevice, DiskSource, DomainId, DomainRef, Layer, Observation, Target, Trouble,
};
use crate::image::chain;
use crate::image::copy::Identity;
use crate::image::qcow2::Format;
use crate::manifest;
use crate::restore::check::read_backup;
use crate::snapshot::disk::overlay_job;
use crate::snapshot::{Places, World, fence, mark};

pub(super) const DOING: &str = "put a machine in its place";

/// What a plan was built on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) domain: DomainRef,
    /// The backup's folder, whether its owner named it himself, and the hash of its manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) backup: Option<(PathBuf, bool, manifest::Digest)>,
    /// The persistent definition's hash (see [`Definition::bare`]) and its disks; nothing if there is no such domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) present: Option<(String, Vec<(Target, Layer)>)>,
    /// Paths that do not exist when the job begins.
    pub(super) free: Vec<PathBuf>,
}

impl Facts {
    /// What differs right before the first change, or (`later`) right before the domain is brought to rest.
    pub(super) async fn differ(
        &self,
        world: &World,
        places: &Places,
        later: bool,
    ) -> Result<Option<String>, Fault> {
        if let Some((folder, outside, hash)) = self.backup.as_ref().filter(|_| !later) {
            match read_backup(places, folder, *outside).await {
                Ok(stored) if stored.hash == *hash => {}
                Ok(_) => return Ok(Some("the backup's manifest has changed".to_owned())),
                Err(fault) => return Ok(Some(fault.to_string())),
            }
        }
        if let Some(path) = self.free.iter().filter(|_| !later).find(|path| path.symlink_metadata().is_ok()) {
            return Ok(Some(format!("{} exists now", path.display())));
        }
        let seen = observe(world, &self.domain).await?;
        let (Some((bare, disks)), Some(seen)) = (&self.present, seen.as_ref()) else {
            return Ok(match (&self.present, seen) {
                (None, Some(_)) => Some("the domain exists now".to_owned()),
                (Some(_), None) => Some("the domain is gone".to_owned()),
                _ => None,
            });
        };
        let Some(persistent) = &seen.persistent else {
            return Ok(Some("the domain has no persistent definition any more".to_owned()));
        };
        if persistent.bare != *bare || files(persistent) != *disks {
            return Ok(Some("somebody has changed the domain's definition".to_owned()));
        }
        Ok(None)
    }
}

/// The domain, if it exists.
pub(super) async fn observe(world: &World, domain: &DomainRef) -> Result<Option<Observation>, Fault> {
    match world.hypervisor.observe(&domain.id).await {
        Ok(seen) => Ok(Some(seen)),
        Err(e) if e.trouble == Trouble::NoSuchDomain => Ok(None),
        Err(e) => Err(e.fault(codes::CANNOT_FIND_MACHINE, "look at the domain", &domain.name)),
    }
}

/// The domain that a request means.
pub(super) fn subject(id: &str, label: &str) -> Result<DomainRef, Fault> {
    match id.parse() {
        Ok(uuid) => Ok(DomainRef { id: DomainId(uuid), name: label.to_owned() }),
        Err(e) => Err(Fault::permanent(codes::USAGE, "read the domain's UUID", id, e)),
    }
}

fn refuse(code: Code, domain: &DomainRef, cause: impl Into<String>) -> Fault {
    Fault::permanent(code, DOING, domain.name.clone(), cause.into())
}

/// Whether the machine that is there may be set aside; its persistent definition.
pub(super) async fn present<'a>(
    world: &World,
    store: &str,
    seen: &'a Observation,
    rest: Rest,
) -> Result<&'a Definition, Fault> {
    let domain = &seen.domain;
    let Some(persistent) = &seen.persistent else {
        return Err(refuse(
            codes::DOMAIN_TRANSIENT,
            domain,
            "it is transient: nothing of it would be left to come back to",
        )
        .remedy("virsh define makes it persistent"));
    };
    for marker in [&seen.marker, &seen.persistent_marker].into_iter().flatten() {
        if marker.store != store {
            return Err(mark::foreign(domain, marker));
        }
    }
    state::within_reach(domain, persistent)?;
    if !seen.snapshots.is_empty() {
        let names: Vec<_> = seen.snapshots.iter().map(|(name, _)| name.as_str()).collect();
        let cause =
            format!("libvirt has snapshots of it, which would name other images: {}", names.join(", "));
        return Err(refuse(codes::FOREIGN_SNAPSHOT, domain, cause)
            .remedy(format!("Delete them first: virsh snapshot-list {}", domain.id)));
    }
    for (target, layer) in files(persistent) {
        if let Some(job) = overlay_job(&layer.path) {
            let cause = format!("disk {target} uses {}, an overlay of job {job}", layer.path.display());
            return Err(refuse(codes::OUR_LEFTOVERS, domain, cause));
        }
    }
    if rest.save && seen.state.is_active() && !persistent.devices.unsaveable.is_empty() {
        let cause = format!("it has {}", persistent.devices.unsaveable.join(", "));
        return Err(refuse(codes::MEMORY_UNSAVEABLE, domain, cause).remedy("Leave `--save-old` out"));
    }
    memory_can_wait(seen, persistent, rest)?;
    if let Some(job) = seen.qemu.as_ref().and_then(|qemu| qemu.jobs.first()) {
        return Err(refuse(
            codes::DOMAIN_BUSY_ELSEWHERE,
            domain,
            format!("a block job ({}) works on it", job.id),
        ));
    }
    let busy = fence::busy(&*world.hypervisor, &domain.id).await;
    match busy.map_err(|e| e.fault(codes::DOMAIN_BUSY_ELSEWHERE, DOING, &domain.name))? {
        Some(what) => Err(refuse(codes::DOMAIN_BUSY_ELSEWHERE, domain, what)
            .remedy(format!("Wait for its end: virsh domjobinfo {}", domain.id))),
        None => Ok(persistent),
    }
}

/// Memory that is kept aside comes back only if no disk is younger than it. Of a disk that is not a file that cannot be told,
/// and both machines write to it.
fn memory_can_wait(seen: &Observation, definition: &Definition, rest: Rest) -> Result<(), Fault> {
    let remedy = match (seen.state.is_active(), rest.save, seen.managed_save) {
        (true, true, _) => "Leave `--save-old` out".to_owned(),
        (false, _, true) => format!(
            "Start it and shut it down, or give its memory up: virsh managedsave-remove {}",
            seen.domain.id
        ),
        _ => return Ok(()),
    };
    let ageless = |disk: &&DiskDef| {
        let written = disk.device == DiskDevice::Disk && !disk.read_only;
        written && !matches!(disk.source, DiskSource::File(_) | DiskSource::Empty)
    };
    let Some(disk) = definition.disks.iter().find(ageless) else { return Ok(()) };
    let cause = format!(
        "disk {} is not a file and has no time of its last change: whether memory that was kept aside still fits it \
         could not be told",
        disk.target
    );
    Err(refuse(codes::MEMORY_UNSAVEABLE, &seen.domain, cause).remedy(remedy))
}

/// The disks of a machine that is about to be set aside. An image that is not there cannot be kept; that may be the very
/// reason for a restore.
pub(super) async fn disks(
    machine: &Machine,
    new: &[(Target, Layer)],
) -> Result<(Vec<KeptDisk>, Vec<String>), Fault> {
    let (old, new) = (machine.disks.clone(), new.to_vec());
    let looked = crate::blocking::run(move || {
        let (mut found, mut notes) = (Vec::new(), Vec::new());
        for (target, layer) in old {
            let Some(identity) = there(&layer.path)? else {
                notes.push(format!(
                    "The present image of disk {target}, {}, is not there.",
                    layer.path.display()
                ));
                continue;
            };
            let chain = match Format::from_name(&layer.format).map(|format| chain::probe(&layer.path, format))
            {
                Some(Ok(chain)) => chain.into_iter().map(|element| element.path).collect(),
                // Whatever is wrong with it: it is kept as it is.
                _ => vec![layer.path.clone()],
            };
            let replaced = new.iter().all(|(_, other)| other.path != layer.path);
            found.push(KeptDisk {
                target,
                path: layer.path,
                format: layer.format,
                chain,
                identity,
                replaced,
            });
        }
        Ok((found, notes))
    });
    looked.await.unwrap_or_else(|e| Err(Fault::permanent(Code::UNDEFINED, DOING, String::new(), e)))
}

/// Which file it is, if there is one. What cannot be looked at is not taken for gone: a record without it would let it lie
/// for ever.
pub(super) fn there(path: &Path) -> Result<Option<Identity>, Fault> {
    match Identity::at(path) {
        Ok(identity) => Ok(Some(identity)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => {
            let object = path.display().to_string();
            Err(Fault::permanent(codes::MISSING_NECESSARY_FILES, "look at a file of the machine", object, e)
                .remedy(
                    "Nothing was changed. Make the file accessible to vmkeepd, or move it away if it is lost",
                ))
        }
    }
}

/// Whether the memory of the machine that is set aside has room.
pub(super) async fn room_for_memory(
    world: &World,
    seen: &Observation,
    rest: Rest,
    folder: &Path,
) -> Result<(), Fault> {
    let memory = seen.persistent.as_ref().map_or(0, |definition| definition.devices.memory);
    if !rest.save || Was::of(seen.state) == Was::Off {
        return Ok(());
    }
    let object = folder.display().to_string();
    let space = world.storage.space(folder).await;
    let space =
        space.map_err(|e| e.fault(codes::NO_DISK_SPACE_INFORMATION, "find room for the memory", &object))?;
    // What a save writes besides the memory is a few megabytes.
    let needed = memory.saturating_add(memory / 20);
    if space.free < needed {
        let cause = format!("{needed} bytes are needed, {} are free", space.free);
        return Err(Fault::permanent(
            codes::NOT_ENOUGH_DISK_SPACE,
            "find room for the memory",
            object,
            cause,
        )
        .remedy("Make room there, or leave `--save-old` out"));
    }
    Ok(())
}

/// The disks on which two machines differ, as the new one has them.
pub(super) fn exchanged(old: &[(Target, Layer)], new: &[(Target, Layer)]) -> Vec<(Target, Layer)> {
    new.iter().filter(|disk| !old.contains(disk)).cloned().collect()
}

/// A disk that is on a file, as it must be to be exchanged.
pub(super) fn file_of<'a>(
    definition: &'a Definition,
    target: &str,
    domain: &DomainRef,
) -> Result<&'a Path, Fault> {
    let target = Target(target.to_owned());
    let Some(disk) = definition.disk(&target) else {
        let cause = format!("its present definition has no disk {target}");
        return Err(refuse(codes::NO_SUCH_DISK, domain, cause)
            .remedy("Restore the definition as well: `--definition`; or choose disks with `--disks`"));
    };
    match &disk.source {
        DiskSource::File(path) if files(definition).iter().any(|(t, _)| *t == target) => Ok(path),
        source => {
            let what = match source {
                DiskSource::Block(device) => format!("the block device {}", device.display()),
                _ => "not an image file".to_owned(),
            };
            // What is kept aside is never overwritten, and a device has no second place.
            let cause = format!("its disk {target} is {what}, and only image files can be exchanged");
            Err(refuse(codes::DISK_CANNOT_TAKE_PART, domain, cause)
                .remedy("Leave it out with `--disks`, or restore beside the original with `--as`"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_that_cannot_be_looked_at_is_not_taken_for_gone() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| {
            let layer = Layer { path: dir.path().join(name), format: "raw".to_owned() };
            Machine { definition: String::new(), disks: vec![("vda".into(), layer)] }
        };
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        let fault = disks(&of("loop"), &[]).await.unwrap_err();
        assert_eq!(fault.code, codes::MISSING_NECESSARY_FILES);
        let (found, notes) = disks(&of("gone"), &[]).await.unwrap();
        assert!(found.is_empty() && notes.len() == 1, "{found:?} {notes:?}");
        std::fs::write(dir.path().join("there"), b"x").unwrap();
        let (found, notes) = disks(&of("there"), &[]).await.unwrap();
        assert!(found.len() == 1 && notes.is_empty(), "{found:?} {notes:?}");
    }
}

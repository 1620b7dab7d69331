//! Whether a domain can be backed up into a vault, and which of its disks.
//!
//! A pull leaves a guest on its images, so nothing of a snapshot's caution about definitions is needed: a domain may be transient,
//! and may run on somebody's overlay. What QEMU writes to is what is read. Of a domain that is off all is asked that
//! `snapshot` asks, since it goes the same way.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use vmkeep_workflow::{Code, Fault, JobId};

use super::disk::{BackupDisk, source_files};
use super::options::{BackupOptions, BackupSettings};
use crate::codes;
use crate::hypervisor::{DiskDef, DiskSource, DomainRef, Layer, Observation, Qemu, RunState};
use crate::image::qcow2::Header;
use crate::image::space::Space;
use crate::snapshot::disk::{JobDisk, scratch_path};
use crate::snapshot::{World, fence, mark};
use crate::text;
use crate::workflows::snapshot::{AtRest, LeftOutDisk, Settings, at_rest, cannot_take_part};

const DOING: &str = "back the domain up";

/// What takes part and what does not.
pub(super) struct Choice {
    pub(super) disks: Vec<BackupDisk>,
    pub(super) left_out: Vec<LeftOutDisk>,
    pub(super) power: Power,
}

/// How they can be read.
pub(super) enum Power {
    /// By a pull of this QEMU process.
    Runs { instance: String },
    /// At rest, while the domain is on these overlays.
    Off { disks: Vec<JobDisk>, definition: String },
}

pub(super) fn refuse(code: Code, domain: &DomainRef, cause: impl Into<String>) -> Fault {
    Fault::permanent(code, DOING, domain.name.clone(), cause.into())
}

pub(super) async fn choose(
    world: &World,
    settings: &BackupSettings,
    options: &BackupOptions,
    seen: &Observation,
    job: JobId,
) -> Result<Choice, Fault> {
    let domain = &seen.domain;
    if seen.state == RunState::Off {
        return off(world, settings, options, seen, job).await;
    }
    let qemu = runs(seen)?;
    for marker in [&seen.marker, &seen.persistent_marker].into_iter().flatten() {
        if marker.store != settings.store {
            return Err(mark::foreign(domain, marker));
        }
    }
    let busy = fence::busy(&*world.hypervisor, &domain.id).await;
    if let Some(what) = busy.map_err(|e| e.fault(codes::DOMAIN_BUSY_ELSEWHERE, DOING, &domain.name))? {
        return Err(refuse(codes::DOMAIN_BUSY_ELSEWHERE, domain, what)
            .remedy(format!("Wait for its end: virsh domjobinfo {}", domain.id)));
    }
    let pulling = world.hypervisor.pulling(&domain.id).await;
    let pulling = pulling.map_err(|e| e.fault(codes::DOMAIN_BUSY_ELSEWHERE, DOING, &domain.name))?;
    if !pulling.is_nothing() {
        let what = "QEMU copies or shows its disks for somebody: a backup, or what is left of one";
        return Err(refuse(codes::DOMAIN_BUSY_ELSEWHERE, domain, what)
            .remedy(format!("Wait for its end, or end it: virsh domjobabort {}", domain.id)));
    }
    let (disks, left_out) = disks(seen, qemu, settings, options, job).await?;
    room(world, settings, domain, &disks).await?;
    Ok(Choice { disks, left_out, power: Power::Runs { instance: qemu.instance.clone() } })
}

/// A domain that is off: its images are read while nobody can start it but on overlays. Nobody vouches for its bitmaps, so
/// all of it is read.
async fn off(
    world: &World,
    settings: &BackupSettings,
    options: &BackupOptions,
    seen: &Observation,
    job: JobId,
) -> Result<Choice, Fault> {
    let of = Settings {
        guests: settings.low_water,
        overlay_dir: settings.overlay_dir.clone(),
        ..Settings::new(&settings.store, &settings.tool)
    };
    let AtRest { disks, left_out, definition } = at_rest(world, &of, &options.disks, job, seen).await?;
    let chains: Vec<Vec<Layer>> = disks.iter().map(|(_, chain)| chain.clone()).collect();
    let files = crate::blocking::io(move || {
        chains.iter().map(|chain| source_files(chain)).collect::<Result<Vec<_>, _>>()
    });
    let files = files.await.map_err(|e| refuse(codes::CHAIN_UNREADABLE, &seen.domain, e.to_string()))?;
    let wanted = disks.iter().zip(files).map(|((disk, chain), files)| BackupDisk {
        target: disk.target.clone(),
        chain: chain.clone(),
        virtual_size: disk.virtual_size,
        scratch: disk.overlay.clone(),
        no_bitmap: Some("the domain is off".to_owned()),
        files,
    });
    let wanted: Vec<BackupDisk> = wanted.collect();
    room(world, settings, &seen.domain, &wanted).await?;
    let disks = disks.into_iter().map(|(disk, _)| disk).collect();
    Ok(Choice { disks: wanted, left_out, power: Power::Off { disks, definition } })
}

fn runs(seen: &Observation) -> Result<&Qemu, Fault> {
    let domain = &seen.domain;
    match (&seen.qemu, seen.state) {
        (Some(qemu), RunState::Running | RunState::Paused(_)) => Ok(qemu),
        _ => Err(refuse(codes::DOMAIN_NOT_RUNNING, domain, "it neither runs nor is it off")
            .remedy(format!("virsh domstate --reason {}", domain.id))),
    }
}

async fn disks(
    seen: &Observation,
    qemu: &Qemu,
    settings: &BackupSettings,
    options: &BackupOptions,
    job: JobId,
) -> Result<(Vec<BackupDisk>, Vec<LeftOutDisk>), Fault> {
    let domain = &seen.domain;
    let all = seen.live.as_ref().map(|live| live.disks.as_slice()).unwrap_or_default();
    if let Some(unknown) = options.disks.iter().find(|name| all.iter().all(|disk| disk.target.0 != **name)) {
        return Err(refuse(codes::NO_SUCH_DISK, domain, format!("it has no disk {unknown}"))
            .remedy(format!("virsh domblklist {}", domain.id)));
    }
    let folder = settings.scratch_dir.clone().or_else(|| beside(all));
    let (mut chosen, mut left_out) = (Vec::new(), Vec::new());
    for disk in all {
        let asked = options.disks.contains(&disk.target.0);
        let reason = match cannot_take_part(disk, folder.as_deref()) {
            Some(reason) if asked => {
                let cause = format!("disk {} cannot take part: {reason}", disk.target);
                return Err(refuse(codes::DISK_CANNOT_TAKE_PART, domain, cause));
            }
            None if !options.disks.is_empty() && !asked => Some("it was not asked for".to_owned()),
            reason => reason,
        };
        match reason {
            Some(reason) => left_out.push(LeftOutDisk { target: disk.target.0.clone(), reason }),
            None => chosen.push(one(seen, qemu, disk, folder.as_deref(), settings, job).await?),
        }
    }
    if chosen.is_empty() {
        let reasons: Vec<_> = left_out.iter().map(|d| format!("{}: {}", d.target, d.reason)).collect();
        let cause = if reasons.is_empty() { "it has no disks".to_owned() } else { reasons.join("; ") };
        return Err(refuse(codes::NO_DISK_TO_BACK_UP, domain, cause));
    }
    Ok((chosen, left_out))
}

/// The folder of the first image that is a file.
fn beside(disks: &[DiskDef]) -> Option<PathBuf> {
    disks.iter().find_map(|disk| match (&disk.source, disk.read_only) {
        (DiskSource::File(path), false) => path.parent().map(Path::to_owned),
        _ => None,
    })
}

async fn one(
    seen: &Observation,
    qemu: &Qemu,
    disk: &DiskDef,
    common: Option<&Path>,
    settings: &BackupSettings,
    job: JobId,
) -> Result<BackupDisk, Fault> {
    let (domain, target) = (&seen.domain, &disk.target);
    if let Some(job) = qemu.job(target) {
        let what = format!("a block job ({}) works on disk {target}", job.id);
        return Err(refuse(codes::DOMAIN_BUSY_ELSEWHERE, domain, what)
            .remedy(format!("Wait for its end: virsh blockjob {} {target}", domain.id)));
    }
    let chain: Vec<Layer> = qemu.disk(target).map(|disk| disk.chain.clone()).unwrap_or_default();
    let unreadable = |cause: String| refuse(codes::CHAIN_UNREADABLE, domain, cause);
    let Some(top) = chain.first().cloned() else {
        return Err(unreadable(format!("QEMU does not know disk {target}")));
    };
    let own = match &disk.source {
        DiskSource::File(_) => top.path.parent(),
        _ => None,
    };
    let Some(folder) = settings.scratch_dir.as_deref().or(own).or(common) else {
        return Err(unreadable(format!("there is no folder for the scratch file of disk {target}")));
    };
    let looked = chain.clone();
    let block = matches!(disk.source, DiskSource::Block(_));
    let found = crate::blocking::io(move || Ok((source_files(&looked)?, look(&looked, block)?))).await;
    let (files, (virtual_size, no_bitmap)) =
        found.map_err(|e| unreadable(format!("the images of disk {target}: {e}")))?;
    Ok(BackupDisk {
        target: target.clone(),
        chain,
        virtual_size,
        scratch: scratch_path(folder, job, target),
        no_bitmap,
        files,
    })
}

/// Whether there is room for what the guest may overwrite: of how much nothing is known beforehand, so for an eighth of each disk,
/// beside the mark at which the pull is ended again.
async fn room(
    world: &World,
    settings: &BackupSettings,
    domain: &DomainRef,
    disks: &[BackupDisk],
) -> Result<(), Fault> {
    let mut needed: BTreeMap<u64, (u64, Space, &Path)> = BTreeMap::new();
    for disk in disks {
        let folder = disk.scratch.parent().unwrap_or(&disk.scratch);
        let space = world.storage.space(folder).await;
        let space = space
            .map_err(|e| e.fault(codes::NO_DISK_SPACE_INFORMATION, DOING, folder.display().to_string()))?;
        let room = Space { total: space.total, free: space.free };
        let entry = needed.entry(space.dev).or_insert((0, room, folder));
        entry.0 = entry.0.saturating_add(disk.virtual_size / 8);
    }
    match needed.into_values().find(|(bytes, space, _)| !settings.low_water.allows(*space, *bytes)) {
        None => Ok(()),
        Some((bytes, space, folder)) => {
            let cause = format!(
                "what the guest overwrites meanwhile may take {} there and {} must stay free, {} are free",
                text::bytes(bytes),
                text::bytes(settings.low_water.mark(space.total)),
                text::bytes(space.free)
            );
            let object = folder.display().to_string();
            Err(Fault::permanent(codes::NOT_ENOUGH_DISK_SPACE, DOING, object, cause).remedy(format!(
                "Make room there for {}, or name another folder: backup.scratch_dir",
                domain.name
            )))
        }
    }
}

/// The size of a disk, and why its image cannot have a bitmap.
fn look(chain: &[Layer], block: bool) -> std::io::Result<(u64, Option<String>)> {
    let Some(top) = chain.first() else { return Err(std::io::Error::other("there is none")) };
    let file = File::open(&top.path)?;
    if top.format != "qcow2" {
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        let what = if block { "a block device" } else { "an image of this format" };
        return Ok((size, Some(format!("{what} cannot hold a bitmap"))));
    }
    let header = Header::read(&file).map_err(std::io::Error::other)?;
    let why = match &header {
        _ if block => Some("a block device cannot hold a bitmap"),
        header if header.version < 3 => Some("an image of this old version cannot hold a bitmap"),
        header if header.data_file => {
            Some("an image whose data lie in another file does not prove its bitmap")
        }
        _ => None,
    };
    Ok((header.virtual_size, why.map(str::to_owned)))
}

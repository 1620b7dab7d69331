//! Whether a domain can be backed up, and which of its disks.
//!
//! Everything that can be known beforehand is asked before anything is touched, and each refusal has its own code. What
//! is left out is left out by rule, and named: a backup never holds less than its owner believes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use vmkeep_workflow::{Code, Fault};

use super::facts::LeftOutDisk;
use super::options::{Settings, SnapshotOptions};
use super::rule::{cannot_take_part, transient};
use super::{devices, machine, off};
use crate::codes;
use crate::hypervisor::{
    DiskDef, DiskSource, DomainId, DomainRef, Layer, Mirror, Observation, Qemu, RunState, Target, Trouble,
};
use crate::image::device;
use crate::save;
use crate::snapshot::disk::overlay_job;
use crate::snapshot::{World, fence, mark};

const DOING: &str = "back the domain up";

/// A disk that takes part: its target and its chain, from the top down. QEMU's if it runs, else what the next QEMU will
/// make of it.
pub(super) struct Chosen {
    pub(super) disk: DiskDef,
    pub(super) chain: Vec<Layer>,
}

/// What takes part and what does not.
pub(super) struct Choice {
    pub(super) disks: Vec<Chosen>,
    pub(super) left_out: Vec<LeftOutDisk>,
    pub(super) warnings: Vec<String>,
    /// The QEMU process; nothing if the domain is off.
    pub(super) instance: Option<String>,
    /// It is off, and this is libvirt's image of its memory.
    pub(super) saved: Option<PathBuf>,
}

/// How long planning waits for libvirt to be done with the domain before it refuses, and how often it looks. Whoever
/// starts, stops or saves a domain is done within seconds, or goes on for minutes.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(100));

/// Waits until libvirt is not busy with the domain, for a while. What is still going on then is for [`choose`] to refuse.
pub(crate) async fn wait_until_free(world: &World, domain: &DomainId) {
    let free = async {
        while !matches!(fence::busy(&*world.hypervisor, domain).await, Ok(None)) {
            tokio::time::sleep(PATIENCE.1).await;
        }
    };
    // A timeout is an answer too.
    let _ = tokio::time::timeout(PATIENCE.0, free).await;
}

pub(crate) async fn observe(world: &World, domain: &DomainId) -> Result<Observation, Fault> {
    world.hypervisor.observe(domain).await.map_err(|e| match e.trouble {
        Trouble::TimedOut | Trouble::Busy => {
            let fault = e.fault(codes::DOMAIN_BUSY_ELSEWHERE, "look at the domain", domain.to_string());
            fault.remedy(format!(
                "See what libvirt does with it (virsh domcontrol {domain}), and whether its QEMU is stopped or waits \
                 for storage (ps: state T or D)"
            ))
        }
        Trouble::NoSuchDomain => {
            let fault = e.fault(codes::CANNOT_FIND_MACHINE, "find the domain", domain.to_string());
            fault.remedy("vmkeep domains lists them")
        }
        _ => e.fault(codes::CANNOT_FIND_MACHINE, "find the domain", domain.to_string()),
    })
}

pub(super) async fn choose(
    world: &World,
    settings: &Settings,
    options: &SnapshotOptions,
    seen: &Observation,
) -> Result<Choice, Fault> {
    let domain = &seen.domain;
    // First what has no remedy: nobody is to be told to start a domain that cannot be backed up then either.
    state_outside_disks(seen, options)?;
    let qemu = power(seen)?;
    owner(seen, settings)?;
    if let Some(what) = fence::busy(&*world.hypervisor, &domain.id)
        .await
        .map_err(|e| e.fault(codes::DOMAIN_BUSY_ELSEWHERE, DOING, &domain.name))?
    {
        return Err(refuse(codes::DOMAIN_BUSY_ELSEWHERE, domain, what)
            .remedy(format!("Wait for its end: virsh domjobinfo {}", domain.id)));
    }
    let external: Vec<_> =
        seen.snapshots.iter().filter(|(_, external)| *external).map(|(name, _)| name.as_str()).collect();
    if !external.is_empty() {
        return Err(refuse(
            codes::FOREIGN_SNAPSHOT,
            domain,
            format!("libvirt manages external snapshots of it: {}", external.join(", ")),
        )
        .remedy(format!("Delete or merge them first: virsh snapshot-list {}", domain.id)));
    }
    if options.save.is_some() && matches!(seen.state, RunState::Paused(_)) {
        return Err(save::paused(domain, DOING));
    }
    let (disks, left_out) = disks(seen, qemu, settings, options).await?;
    devices::can_take_part(seen, settings, options, &disks)?;
    let mut warnings = Vec::new();
    let memory = options.memory.is_some() || options.save.is_some();
    if qemu.is_none() && memory && !seen.managed_save {
        warnings.push(
            "the domain is off, so there is no memory to take: the disks alone are backed up".to_owned(),
        );
    }
    let internal: Vec<_> = seen.snapshots.iter().map(|(name, _)| name.as_str()).collect();
    if !internal.is_empty() {
        warnings.push(format!(
            "the domain's internal snapshots ({}) are not part of the backup as snapshots: libvirt's records of them \
             are not kept",
            internal.join(", ")
        ));
    }
    warnings.extend(left_out.iter().map(|disk| format!("disk {} is left out: {}", disk.target, disk.reason)));
    let saved = saved_image(world, seen, &disks).await?;
    Ok(Choice { disks, left_out, warnings, instance: qemu.map(|qemu| qemu.instance.clone()), saved })
}

pub(super) fn refuse(code: Code, domain: &DomainRef, cause: impl Into<String>) -> Fault {
    Fault::permanent(code, DOING, domain.name.clone(), cause.into())
}

/// Its QEMU, if it runs; nothing if it is off. In between nothing is begun.
fn power(seen: &Observation) -> Result<Option<&Qemu>, Fault> {
    let domain = &seen.domain;
    match (&seen.qemu, seen.state) {
        (_, RunState::Off) => Ok(None),
        (Some(qemu), RunState::Running | RunState::Paused(_)) => {
            if seen.persistent.is_none() {
                return Err(transient(domain));
            }
            Ok(Some(qemu))
        }
        _ => Err(refuse(codes::DOMAIN_NOT_RUNNING, domain, "it neither runs nor is it off")
            .remedy(format!("virsh domstate --reason {}", domain.id))),
    }
}

/// libvirt's image of the memory of a domain that is off, if there is one. It must be of these very disks: the saved
/// machine comes back on those that the image names.
async fn saved_image(world: &World, seen: &Observation, disks: &[Chosen]) -> Result<Option<PathBuf>, Fault> {
    if !seen.managed_save || seen.state != RunState::Off {
        return Ok(None);
    }
    let domain = &seen.domain;
    let remedy = format!(
        "Start it (virsh start {0}) and back it up running, or give its memory up: virsh managedsave-remove {0}",
        domain.id
    );
    let fault = |cause: String| refuse(codes::DOMAIN_NOT_RUNNING, domain, cause).remedy(remedy.clone());
    let hypervisor = &world.hypervisor;
    let own = hypervisor.own_folders().await.map_err(|e| fault(e.to_string()))?;
    let image = own.save.join(format!("{}.save", domain.name));
    let text = hypervisor.memory_image_definition(&image).await.map_err(|e| {
        fault(format!("libvirt's image of its memory, {}, cannot be read: {e}", image.display()))
    })?;
    let definition = hypervisor.parse_definition(&text).map_err(|e| fault(e.to_string()))?;
    let named = |d: &Chosen| definition.disk(&d.disk.target).map(|disk| &disk.source) == Some(&d.disk.source);
    match disks.iter().find(|disk| !named(disk)) {
        None => Ok(Some(image)),
        Some(disk) => Err(fault(format!(
            "libvirt's image of its memory names another file for disk {} than the definition does",
            disk.disk.target
        ))),
    }
}

/// Nobody else's, and no leftovers of our own.
fn owner(seen: &Observation, settings: &Settings) -> Result<(), Fault> {
    for marker in [&seen.marker, &seen.persistent_marker].into_iter().flatten() {
        if marker.store != settings.store {
            return Err(mark::foreign(&seen.domain, marker));
        }
    }
    let definitions = [&seen.persistent, &seen.live].into_iter().flatten();
    let named = definitions.flat_map(|d| &d.disks).filter_map(|disk| match &disk.source {
        DiskSource::File(path) => Some((disk.target.clone(), path.as_path())),
        _ => None,
    });
    let used = seen.qemu.iter().flat_map(|qemu| &qemu.disks);
    let used = used.flat_map(|disk| disk.chain.iter().map(|l| (disk.target.clone(), l.path.as_path())));
    for (target, path) in named.chain(used) {
        if let Some(job) = overlay_job(path) {
            return Err(refuse(
                codes::OUR_LEFTOVERS,
                &seen.domain,
                format!("disk {target} uses {}, an overlay of job {job}", path.display()),
            )
            .remedy(format!(
                "If that job is known here: vmkeep job explain {job}. Else commit it: virsh blockcommit {} {target} \
                 --shallow --active --pivot, and remove the file",
                seen.domain.id
            )));
        }
    }
    Ok(())
}

/// State that is neither on the disks nor in memory.
fn state_outside_disks(seen: &Observation, options: &SnapshotOptions) -> Result<(), Fault> {
    machine::can_be_kept(seen)?;
    let Some(live) = seen.live.as_ref().or(seen.persistent.as_ref()) else { return Ok(()) };
    if (options.memory.is_some() || options.save.is_some()) && !live.devices.unsaveable.is_empty() {
        return Err(refuse(
            codes::MEMORY_UNSAVEABLE,
            &seen.domain,
            format!("its memory cannot be saved because of {}", live.devices.unsaveable.join(", ")),
        )
        .remedy("Back up its disks only"));
    }
    Ok(())
}

async fn disks(
    seen: &Observation,
    qemu: Option<&Qemu>,
    settings: &Settings,
    options: &SnapshotOptions,
) -> Result<(Vec<Chosen>, Vec<LeftOutDisk>), Fault> {
    let domain = &seen.domain;
    let Some(persistent) = &seen.persistent else { return Ok((Vec::new(), Vec::new())) };
    let all = seen.live.as_ref().unwrap_or(persistent);
    let only_defined: Vec<_> =
        persistent.disks.iter().filter(|disk| all.disk(&disk.target).is_none()).collect();
    let known = |name: &str| all.disks.iter().chain(only_defined.iter().copied()).any(|d| d.target.0 == name);
    if let Some(unknown) = options.disks.iter().find(|name| !known(name)) {
        return Err(refuse(codes::NO_SUCH_DISK, domain, format!("it has no disk {unknown}"))
            .remedy(format!("virsh domblklist {}", domain.id)));
    }
    let (mut chosen, mut left_out) = (Vec::new(), Vec::new());
    for disk in all.disks.iter().chain(only_defined.iter().copied()) {
        let asked = options.disks.contains(&disk.target.0);
        let rule = cannot_take_part(disk, settings.overlay_dir.as_deref());
        let reason = match rule.or_else(|| not_there_yet(disk, &only_defined)) {
            Some(reason) if asked => {
                let cause = format!("disk {} cannot take part: {reason}", disk.target);
                let fault = refuse(codes::DISK_CANNOT_TAKE_PART, domain, cause);
                return Err(match &disk.source {
                    DiskSource::Block(_) if settings.overlay_dir.is_none() => {
                        fault.remedy(devices::NO_FOLDER)
                    }
                    _ => fault,
                });
            }
            None if !options.disks.is_empty() && !asked => Some("it was not asked for".to_owned()),
            reason => reason,
        };
        match reason {
            Some(reason) => left_out.push(LeftOutDisk { target: disk.target.0.clone(), reason }),
            None => chosen.push(match qemu {
                Some(qemu) => one(seen, qemu, disk)?,
                None => off::one(&seen.domain, disk).await?,
            }),
        }
    }
    if chosen.is_empty() {
        let reasons: Vec<_> = left_out.iter().map(|d| format!("{}: {}", d.target, d.reason)).collect();
        let cause = if reasons.is_empty() { "it has no disks".to_owned() } else { reasons.join("; ") };
        return Err(refuse(codes::NO_DISK_TO_BACK_UP, domain, cause));
    }
    Ok((chosen, left_out))
}

/// Why a disk that only the persistent definition has does not take part: nothing is known of it at the instant of the
/// others. Somebody else may be writing to it, and the guest's memory knows nothing of it.
fn not_there_yet(disk: &DiskDef, only_defined: &[&DiskDef]) -> Option<String> {
    only_defined
        .iter()
        .any(|other| other.target == disk.target)
        .then(|| "the running guest does not have it: it is only defined, for the next start".to_owned())
}

/// All who have an opinion on the disk agree, and nobody works on it.
fn one(seen: &Observation, qemu: &Qemu, disk: &DiskDef) -> Result<Chosen, Fault> {
    let domain = &seen.domain;
    let target = &disk.target;
    if let Some(job) = qemu.job(target) {
        return Err(refuse(
            codes::DOMAIN_BUSY_ELSEWHERE,
            domain,
            format!("a block job ({}) works on disk {target}", job.id),
        )
        .remedy(format!("Wait for its end: virsh blockjob {} {target}", domain.id)));
    }
    if disk.mirror == Some(Mirror::Pivoting) {
        return Err(refuse(
            codes::HYPERVISOR_LOST_TRACK,
            domain,
            format!("libvirt believes that disk {target} is being moved, QEMU knows nothing of it"),
        )
        .remedy("Shut the domain down and start it again; do not save or migrate it before"));
    }
    let chain: Vec<Layer> = qemu.disk(target).map(|disk| disk.chain.clone()).unwrap_or_default();
    let Some(top) = chain.first() else {
        return Err(refuse(codes::CHAIN_UNREADABLE, domain, format!("QEMU does not know disk {target}")));
    };
    let opinions = [("the persistent definition", &seen.persistent), ("libvirt", &seen.live)];
    for (whose, definition) in opinions {
        let named = definition.as_ref().and_then(|d| d.file(target)).map(|path| path.as_path());
        if !named.is_some_and(|named| device::same(named, &top.path)) {
            return Err(disagreement(domain, target, &chain, whose, named));
        }
    }
    Ok(Chosen { disk: disk.clone(), chain })
}

/// QEMU writes to another file than somebody's definition names. A commit is proposed only if it would end on the named
/// file: anywhere else it would write into an image that others may build on.
fn disagreement(
    domain: &DomainRef,
    target: &Target,
    chain: &[Layer],
    whose: &str,
    named: Option<&Path>,
) -> Fault {
    let top = chain.first().map(|layer| layer.path.display().to_string()).unwrap_or_default();
    let found = match named {
        Some(named) => format!("{whose} names {}", named.display()),
        None => format!("{whose} does not name that disk"),
    };
    let remedy = match named {
        Some(named) if chain.iter().skip(1).any(|layer| layer.path == named) => {
            // The base must be told: without it a commit ends at the bottom of the chain.
            format!(
                "Let whoever moved it finish, or commit it to the file that the definition names: virsh blockcommit {} \
                 {target} --base {} --active --pivot",
                domain.id,
                named.display()
            )
        }
        Some(_) => "Make the definition and the guest agree (virsh edit, or shut the guest down and start it again), or \
                    leave the disk out with --disks"
            .to_owned(),
        None => format!(
            "Add the disk to the definition as well (virsh attach-disk {} … {target} --config), detach it, or leave it \
             out with --disks",
            domain.id
        ),
    };
    refuse(codes::ON_OVERLAY_OF_OTHERS, domain, format!("QEMU writes disk {target} to {top}, {found}"))
        .remedy(remedy)
}

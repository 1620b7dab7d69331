//! Whether a domain can be backed up live, and which of its disks.
//!
//! Everything that can be known beforehand is asked before anything is touched, and each refusal has its own code. What
//! is left out is left out by rule, and named: a backup never holds less than its owner believes.

use std::path::Path;
use std::time::Duration;

use vmkeep_workflow::{Code, Fault};

use super::facts::LeftOutDisk;
use super::options::{Settings, SnapshotOptions};
use super::rule::cannot_take_part;
use crate::codes;
use crate::hypervisor::{
    DiskDef, DiskSource, DomainId, DomainRef, Layer, Mirror, Observation, Qemu, RunState, Target, Trouble,
};
use crate::snapshot::disk::overlay_job;
use crate::snapshot::{World, fence, mark};

const DOING: &str = "back the domain up";

/// A disk that takes part: its target and QEMU's chain, from the top down.
pub(super) struct Chosen {
    pub(super) disk: DiskDef,
    pub(super) chain: Vec<Layer>,
}

/// What takes part and what does not.
pub(super) struct Choice {
    pub(super) disks: Vec<Chosen>,
    pub(super) left_out: Vec<LeftOutDisk>,
    pub(super) warnings: Vec<String>,
}

/// How long planning waits for libvirt to be done with the domain before it refuses, and how often it looks. Whoever
/// starts, stops or saves a domain is done within seconds, or goes on for minutes.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(100));

/// Waits until libvirt is not busy with the domain, for a while. What is still going on then is for [`choose`] to refuse.
pub(super) async fn wait_until_free(world: &World, domain: &DomainId) {
    let free = async {
        while !matches!(fence::busy(&*world.hypervisor, domain).await, Ok(None)) {
            tokio::time::sleep(PATIENCE.1).await;
        }
    };
    // A timeout is an answer too.
    let _ = tokio::time::timeout(PATIENCE.0, free).await;
}

pub(super) async fn observe(world: &World, domain: &DomainId) -> Result<Observation, Fault> {
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
    let qemu = running(seen)?;
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
    let (disks, left_out) = disks(seen, qemu, options)?;
    let mut warnings = Vec::new();
    let internal: Vec<_> = seen.snapshots.iter().map(|(name, _)| name.as_str()).collect();
    if !internal.is_empty() {
        warnings.push(format!(
            "the domain's internal snapshots ({}) are not part of the backup as snapshots: libvirt's records of them \
             are not kept",
            internal.join(", ")
        ));
    }
    warnings.extend(left_out.iter().map(|disk| format!("disk {} is left out: {}", disk.target, disk.reason)));
    Ok(Choice { disks, left_out, warnings })
}

fn refuse(code: Code, domain: &DomainRef, cause: impl Into<String>) -> Fault {
    Fault::permanent(code, DOING, domain.name.clone(), cause.into())
}

/// It runs, and is there to stay.
fn running(seen: &Observation) -> Result<&Qemu, Fault> {
    let domain = &seen.domain;
    match (&seen.qemu, seen.state) {
        (Some(qemu), RunState::Running | RunState::Paused(_)) => {
            if seen.persistent.is_none() {
                return Err(refuse(
                    codes::DOMAIN_TRANSIENT,
                    domain,
                    "it is transient: a crash in the middle would lose the knowledge which files are its disks",
                )
                .remedy("virsh define makes it persistent"));
            }
            Ok(qemu)
        }
        _ => Err(refuse(codes::DOMAIN_NOT_RUNNING, domain, "it does not run")
            .remedy(format!("virsh start {}", domain.id))),
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
    let Some(live) = seen.live.as_ref().or(seen.persistent.as_ref()) else { return Ok(()) };
    if let Some(nvram) = &live.devices.nvram {
        return Err(refuse(
            codes::FIRMWARE_STATE_UNSUPPORTED,
            &seen.domain,
            format!("it keeps firmware variables ({nvram}), which cannot be captured yet"),
        ));
    }
    if live.devices.tpm {
        return Err(refuse(
            codes::FIRMWARE_STATE_UNSUPPORTED,
            &seen.domain,
            "it has a TPM, whose state cannot be captured yet",
        ));
    }
    if options.memory.is_some() && !live.devices.unsaveable.is_empty() {
        return Err(refuse(
            codes::MEMORY_UNSAVEABLE,
            &seen.domain,
            format!("its memory cannot be saved because of {}", live.devices.unsaveable.join(", ")),
        )
        .remedy("Back up its disks only"));
    }
    Ok(())
}

fn disks(
    seen: &Observation,
    qemu: &Qemu,
    options: &SnapshotOptions,
) -> Result<(Vec<Chosen>, Vec<LeftOutDisk>), Fault> {
    let domain = &seen.domain;
    let Some(persistent) = &seen.persistent else { return Ok((Vec::new(), Vec::new())) };
    let all = seen.live.as_ref().unwrap_or(persistent);
    if let Some(unknown) = options.disks.iter().find(|name| all.disks.iter().all(|d| d.target.0 != **name)) {
        return Err(refuse(codes::NO_SUCH_DISK, domain, format!("it has no disk {unknown}"))
            .remedy(format!("virsh domblklist {}", domain.id)));
    }
    let (mut chosen, mut left_out) = (Vec::new(), Vec::new());
    for disk in &all.disks {
        let asked = options.disks.contains(&disk.target.0);
        let reason = match cannot_take_part(disk) {
            Some(reason) if asked => {
                return Err(refuse(
                    codes::DISK_CANNOT_TAKE_PART,
                    domain,
                    format!("disk {} cannot take part: {reason}", disk.target),
                ));
            }
            None if !options.disks.is_empty() && !asked => Some("it was not asked for".to_owned()),
            reason => reason,
        };
        match reason {
            Some(reason) => left_out.push(LeftOutDisk { target: disk.target.0.clone(), reason }),
            None => chosen.push(one(seen, qemu, disk)?),
        }
    }
    if chosen.is_empty() {
        let reasons: Vec<_> = left_out.iter().map(|d| format!("{}: {}", d.target, d.reason)).collect();
        let cause = if reasons.is_empty() { "it has no disks".to_owned() } else { reasons.join("; ") };
        return Err(refuse(codes::NO_DISK_TO_BACK_UP, domain, cause));
    }
    Ok((chosen, left_out))
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
        if named != Some(top.path.as_path()) {
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

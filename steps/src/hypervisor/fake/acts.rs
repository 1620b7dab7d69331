//! What the larger calls do, part by part: anything may happen between two of them.

use std::path::{Path, PathBuf};

use super::effects::part;
use super::events::{drain, memory_image};
use super::{Def, Domain, Inner, Job, Part, Process, io, no};
use crate::hypervisor::*;

pub(super) fn observed(inner: &Inner, id: &DomainId) -> HvResult<Observation> {
    let Some(domain) = inner.domains.get(id) else {
        return no(Trouble::NoSuchDomain, "there is no such domain");
    };
    let process = domain.process.as_ref();
    let noted = domain.persistent.as_ref().and_then(|def| def.marker.clone());
    Ok(Observation {
        domain: DomainRef { id: *id, name: domain.name.clone() },
        state: process.map_or(RunState::Off, |p| p.run),
        persistent: domain.persistent.as_ref().map(Def::told),
        live: process.map(live_told),
        qemu: process.map(|p| qemu(p, inner.boot)),
        marker: process.map_or_else(|| noted.clone(), |p| p.live.marker.clone()),
        persistent_marker: noted.clone(),
        managed_save: inner.managed_save(id).is_some_and(|image| image.exists()),
        saved: if process.is_some() { None } else { domain.saved },
        crashed: process.is_none() && domain.crashed,
        autostart: domain.autostart,
        snapshots: Vec::new(),
        checkpoints: domain.checkpoints.clone(),
    })
}

/// The live definition, with the block jobs that libvirt knows of.
fn live_told(process: &Process) -> Definition {
    let mut live = process.live.clone();
    for disk in &mut live.disks {
        let known = process.jobs.get(&disk.target).filter(|job| job.known);
        disk.mirror =
            disk.mirror.or(known.map(|job| if job.ready { Mirror::Ready } else { Mirror::Running }));
    }
    live.told()
}

pub(super) fn qemu(process: &Process, boot: u32) -> Qemu {
    let disk = |open: &super::Open| QemuDisk {
        target: open.target.clone(),
        chain: open.chain.clone(),
        read_only: false,
    };
    let job = |(target, job): (&Target, &Job)| BlockJob {
        id: format!("commit-{target}"),
        target: Some(target.clone()),
        kind: BlockJobKind::Commit,
        ready: job.ready,
        done: u64::from(job.ready),
        total: 1,
        error: None,
    };
    let open = process.disks.iter().flat_map(|open| &open.chain).map(|layer| layer.path.clone());
    let open = open.chain(process.stray.iter().cloned());
    let copies = process.pull.iter().flat_map(super::pulls::Pulled::told_jobs);
    let open = open.chain(process.pull.iter().flat_map(super::pulls::Pulled::open));
    Qemu {
        instance: format!("{} on boot {boot}", process.number),
        disks: process.disks.iter().map(disk).collect(),
        jobs: process.jobs.iter().map(job).chain(copies).collect(),
        open: open.collect(),
    }
}

/// The persistent definition becomes another one, and then durable: two parts.
pub(super) fn redefined(
    id: DomainId,
    change: impl FnOnce(&mut Def) -> HvResult<()> + Send + 'static,
) -> Vec<Part> {
    let write = part(move |inner| match &mut inner.domain(&id)?.persistent {
        Some(def) => change(def),
        None => no(Trouble::Refused, "it has no persistent definition"),
    });
    vec![write, synced(id)]
}

/// The live definition, if there is one, bears this marker.
pub(super) fn marked(id: DomainId, marker: Option<Marker>) -> Part {
    part(move |inner| {
        if let Some(process) = &mut inner.domain(&id)?.process {
            process.live.marker = marker;
        }
        Ok(())
    })
}

pub(super) fn synced(id: DomainId) -> Part {
    part(move |inner| {
        inner.domain(&id)?.sync();
        Ok(())
    })
}

fn saved_now(inner: &mut Inner, id: &DomainId, file: &Path, whole: bool) -> HvResult<()> {
    let process = inner.process(id)?;
    let was_running = matches!(process.run, RunState::Running | RunState::Paused(PauseReason::Job));
    let image = memory_image(&process.live.text(), &process.mind(), was_running, whole)?;
    std::fs::write(file, image).map_err(io)?;
    let when = inner.stamp();
    std::fs::File::open(file).and_then(|file| file.set_modified(when)).map_err(io)
}

/// A guest's memory goes to a file, and QEMU ends: torn file, guest stopped and file whole, QEMU gone.
pub(super) fn save(id: DomainId, file: PathBuf, operation: &'static str) -> Vec<Part> {
    let (torn, whole) = (file.clone(), file);
    vec![
        part(move |inner| {
            if torn.exists() {
                return no(Trouble::Exists, format!("{} exists already", torn.display()));
            }
            inner.process(&id)?.free_of_pulls()?;
            inner.process(&id)?.saving = Some(operation);
            inner.process(&id)?.aborted = false;
            saved_now(inner, &id, &torn, false)
        }),
        part(move |inner| {
            let process = inner.process(&id)?;
            if std::mem::take(&mut process.aborted) {
                process.saving = None;
                let _ = std::fs::remove_file(&whole);
                return no(Trouble::Cancelled, "canceled by client");
            }
            if process.run == RunState::Running {
                process.run = RunState::Paused(PauseReason::Job);
            }
            saved_now(inner, &id, &whole, true)
        }),
        part(move |inner| {
            inner.process(&id)?;
            inner.ended(&id, true, false);
            Ok(())
        }),
    ]
}

/// A snapshot onto prepared overlays: memory, QEMU's transaction, libvirt's notes.
pub(super) fn take(id: DomainId, take: Take) -> Vec<Part> {
    let (begin, end) = (take.clone(), take.clone());
    vec![
        part(move |inner| {
            if let Some((_, missing)) = begin.disks.iter().find(|(_, overlay)| !overlay.exists()) {
                return no(Trouble::Missing, format!("missing existing file {}", missing.display()));
            }
            if begin.memory.is_some() && inner.domain(&id)?.process.is_none() {
                return no(Trouble::Refused, "a snapshot with memory needs a domain that runs");
            }
            if let Ok(process) = inner.process(&id) {
                process.free_of_pulls()?;
            }
            if let Some(memory) = &begin.memory
                && let Ok(process) = inner.process(&id)
            {
                process.saving = Some("snapshot");
                process.aborted = false;
                saved_now(inner, &id, memory, false)?;
            }
            Ok(())
        }),
        part(move |inner| transaction(inner, &id, &take)),
        part(move |inner| noted(inner.domain(&id)?, &end)),
    ]
}

fn transaction(inner: &mut Inner, id: &DomainId, take: &Take) -> HvResult<()> {
    if inner.process(id).is_err() {
        // libvirt gives a domain that is off its new files all the same.
        return Ok(());
    }
    if let Some(memory) = &take.memory {
        let process = inner.process(id)?;
        if std::mem::take(&mut process.aborted) {
            process.saving = None;
            let _ = std::fs::remove_file(memory);
            return no(Trouble::Cancelled, "canceled by client");
        }
        if process.run == RunState::Running {
            process.run = RunState::Paused(PauseReason::Job);
        }
        saved_now(inner, id, memory, true)?;
    }
    let process = inner.process(id)?;
    let moves = match moves(process, take) {
        Ok(moves) => moves,
        Err(e) => {
            // The guest goes on as if nothing had been asked for, and its memory is not kept.
            if process.saving.take().is_some() && process.run == RunState::Paused(PauseReason::Job) {
                process.run = RunState::Running;
            }
            if let Some(memory) = &take.memory {
                let _ = std::fs::remove_file(memory);
            }
            return Err(e);
        }
    };
    for (target, chain) in moves {
        Inner::moves(process, &target, chain)?;
    }
    Ok(())
}

/// Where the disks go: all of them, or none.
fn moves(process: &mut Process, take: &Take) -> HvResult<Vec<(Target, Vec<Layer>)>> {
    let mut moves = Vec::new();
    for (target, overlay) in &take.disks {
        let Some(open) = process.disks.iter().find(|open| open.target == *target) else {
            return no(Trouble::Refused, format!("no such disk {target}"));
        };
        if process.disks.iter().flat_map(|open| &open.chain).any(|layer| layer.path == *overlay) {
            return no(Trouble::Locked, "Failed to get \"write\" lock");
        }
        let top = Layer { path: overlay.clone(), format: "qcow2".to_owned() };
        // What turns out to be no image stays open all the same.
        if let Err(e) = local::inspect(&top) {
            process.stray.push(overlay.clone());
            return Err(e);
        }
        moves.push((target.clone(), [vec![top], open.chain.clone()].concat()));
    }
    Ok(moves)
}

/// libvirt writes down where the disks are; of the persistent definition only what named the same file as the live one.
fn noted(domain: &mut Domain, take: &Take) -> HvResult<()> {
    let live = domain.process.as_ref().map(|p| p.live.clone());
    for (target, overlay) in &take.disks {
        let layer = Layer { path: overlay.clone(), format: "qcow2".to_owned() };
        let was =
            live.as_ref().and_then(|def| def.disks.iter().find(|d| d.target == *target)).map(|d| &d.layer);
        if let Some(disk) = domain.persistent.as_mut().and_then(|def| def.disk(target))
            && was.is_none_or(|was| *was == disk.layer)
        {
            let below =
                live.is_some().then(|| [vec![disk.layer.clone()], disk.backing.take().unwrap_or_default()]);
            (disk.layer, disk.backing) = (layer.clone(), below.map(|below| below.concat()));
        }
        if let Some(disk) = domain.process.as_mut().and_then(|process| process.live.disk(target)) {
            let below = [vec![disk.layer.clone()], disk.backing.take().unwrap_or_default()].concat();
            (disk.layer, disk.backing) = (layer, Some(below));
        }
    }
    if let Some(process) = &mut domain.process {
        process.saving = None;
        if process.run == RunState::Paused(PauseReason::Job) {
            process.run = RunState::Running;
        }
    }
    Ok(())
}

/// Which chain is under an overlay, by QEMU.
pub(super) fn chain_of(process: &Process, commit: &Commit) -> HvResult<Vec<Layer>> {
    let open = process.disks.iter().find(|open| open.target == commit.target);
    match open.map(|open| open.chain.clone()) {
        Some(chain) if chain.len() > 1 && chain[0].path == commit.overlay => Ok(chain),
        _ => no(Trouble::Refused, "could not find image beneath"),
    }
}

pub(super) fn pivot(id: DomainId, commit: Commit) -> Vec<Part> {
    let (move_it, note, notes) = (commit.clone(), commit.clone(), commit.through == Through::Libvirt);
    let live = id;
    vec![
        part(move |inner| {
            let process = inner.process(&id)?;
            if !process.jobs.get(&move_it.target).is_some_and(|job| job.ready) {
                return match process.jobs.contains_key(&move_it.target) {
                    true => no(Trouble::Busy, "disk not ready for pivot yet"),
                    false => no(Trouble::Refused, "disk does not have an active block job"),
                };
            }
            let chain = chain_of(process, &move_it)?;
            drain(inner, &chain)?;
            let process = inner.process(&id)?;
            process.jobs.remove(&move_it.target);
            if notes && let Some(disk) = process.live.disk(&move_it.target) {
                disk.mirror = Some(Mirror::Pivoting);
            }
            Inner::moves(process, &move_it.target, chain[1..].to_vec())
        }),
        part(move |inner| {
            let process = inner.process(&live)?;
            let open = process.disks.iter().find(|open| open.target == note.target);
            let chain = open.map(|open| open.chain.clone()).unwrap_or_default();
            if let (Some(disk), [top, below @ ..]) = (process.live.disk(&note.target), chain.as_slice()) {
                (disk.mirror, disk.layer, disk.backing) = (None, top.clone(), Some(below.to_vec()));
            }
            Ok(())
        }),
        part(move |inner| {
            if !notes {
                return Ok(());
            }
            // What was said to lie below it tells as well; what was found out it does not.
            let process = inner.process(&id)?;
            let found = process.live.disk(&commit.target).is_some_and(|disk| disk.found);
            let open = process.disks.iter().find(|open| open.target == commit.target);
            let chain = open.map(|open| open.chain.clone()).unwrap_or_default();
            let def = inner.domain(&id)?.persistent.as_mut();
            if let (Some(disk), [top, below @ ..]) =
                (def.and_then(|def| def.disk(&commit.target)), chain.as_slice())
                && disk.layer.path == commit.overlay
            {
                (disk.layer, disk.backing) = (top.clone(), (!found).then(|| below.to_vec()));
            }
            Ok(())
        }),
    ]
}

/// A file gets another name as well, and then loses the one that it had.
pub(super) fn moved_aside(from: PathBuf, to: PathBuf) -> Vec<Part> {
    let old = from.clone();
    vec![
        part(move |_| match std::fs::hard_link(&from, &to) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            done => done.map_err(io),
        }),
        part(move |_| match std::fs::remove_file(&old) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(io),
        }),
    ]
}

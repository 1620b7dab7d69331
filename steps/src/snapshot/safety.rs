//! Setting free a guest that we hold.
//!
//! Needs no journal and no plan: the marker in the live definition says that the hold is ours. This is what runs first
//! after every start of the daemon and after every reconnection, and what the steps themselves use at the end of a
//! hold, whether they succeeded or not.
//!
//! A guest that we have suspended may be resumed only when the persistent definition names what QEMU writes to:
//! as long as it stands still base and chain are equal, afterwards they are not. The one other file that a definition
//! may name is an empty overlay right on top of what QEMU writes to. That is the state between the switch of the
//! definition and the snapshot, and it must be left alone: a snapshot that is still under way would move QEMU there.
//!
//! Only disks on which we work are touched: those whose definition, or whose QEMU, has an overlay of ours. Any other
//! difference between a definition and QEMU is somebody's pending change.

use crate::hypervisor::{
    Definition, DiskChange, DomainId, Hold, HvError, Layer, Marker, Observation, Qemu, RunState, Trouble,
};

use super::disk::overlay_job;
use super::{World, fence};
use crate::image::device;

/// What was done about a hold.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Release {
    /// We hold nothing.
    NotHeld,
    /// libvirt has a job on the domain that we started, or a call that may still stop the guest; it must end first.
    Waiting,
    /// The guest's file systems were thawed.
    Thawed,
    /// The guest was resumed; these disks' definition had to be made right before.
    Resumed {
        /// The targets.
        redefined: Vec<String>,
    },
}

/// Whether a marker says that the guest is held.
pub(crate) fn holds(marker: &Marker) -> bool {
    !matches!(marker.hold, None | Some(Hold::Resumed))
}

/// Sets a domain's guest free if it is this store that holds it.
///
/// # Errors
/// When the hypervisor did not do it, or did not answer. To be repeated.
pub async fn release(world: &World, store: &str, domain: &DomainId) -> Result<Release, HvError> {
    // The note alone first: a QEMU that does not answer is no trouble as long as we hold nothing there.
    let ours = |marker: &Marker| marker.store == store && marker.hold.is_some();
    if !world.hypervisor.marker(domain).await?.as_ref().is_some_and(ours) {
        return Ok(Release::NotHeld);
    }
    let seen = world.hypervisor.observe(domain).await?;
    let Some(marker) = seen.marker.clone().filter(ours) else {
        return Ok(Release::NotHeld);
    };
    match marker.hold {
        None | Some(Hold::Begun | Hold::Resumed) => Ok(Release::NotHeld),
        Some(_) if !seen.state.is_active() => Ok(Release::NotHeld),
        Some(Hold::Frozen) => {
            world.hypervisor.thaw(domain).await?;
            let free = Marker { hold: None, ..marker };
            world.hypervisor.set_hold(domain, &free).await?;
            Ok(Release::Thawed)
        }
        Some(Hold::Reloaded) => {
            if fence::busy(&*world.hypervisor, domain).await?.is_some() {
                return Ok(Release::Waiting);
            }
            if let Some(target) = seen.qemu.iter().find_map(without_its_base) {
                let message = format!("QEMU has opened the overlay of {target} without what lies under it");
                return Err(HvError::new(Trouble::Refused, message));
            }
            let free = Marker { hold: None, ..marker.clone() };
            // From the guest's first instruction on the state must never be loaded again.
            let used = Marker { hold: Some(Hold::Resumed), ..marker };
            world.hypervisor.note(domain, &used).await?;
            if matches!(seen.state, RunState::Paused(_)) {
                world.hypervisor.resume(domain).await?;
            }
            world.hypervisor.set_hold(domain, &free).await?;
            Ok(Release::Resumed { redefined: Vec::new() })
        }
        Some(Hold::Suspended) => {
            let mut seen = seen;
            if !matches!(seen.state, RunState::Paused(_)) {
                // The call that was to stop it may be on its way still, from one who is gone. Without the note nobody would
                // know whose pause it is, and it would last.
                if fence::busy(&*world.hypervisor, domain).await?.is_some() {
                    return Ok(Release::Waiting);
                }
                seen = world.hypervisor.observe(domain).await?;
            } else if world.hypervisor.domain_job(domain).await?.is_some() {
                return Ok(Release::Waiting);
            }
            let redefined = match seen.state {
                RunState::Paused(_) => {
                    let redefined = align(world, &seen).await?;
                    world.hypervisor.resume(domain).await?;
                    redefined
                }
                _ => Vec::new(),
            };
            let free = Marker { hold: None, ..marker };
            world.hypervisor.set_hold(domain, &free).await?;
            Ok(Release::Resumed { redefined })
        }
    }
}

/// Makes the persistent definition name what QEMU writes to, durably; says for which disks that was needed. To be
/// called only while the guest stands still.
pub(crate) async fn align(world: &World, seen: &Observation) -> Result<Vec<String>, HvError> {
    let (Some(definition), Some(qemu)) = (&seen.persistent, &seen.qemu) else { return Ok(Vec::new()) };
    let mut wrong = Vec::new();
    for (target, layer) in differing(definition, qemu) {
        if !empty_on_top(world, definition, &target, &layer).await? {
            wrong.push((target, layer));
        }
    }
    if wrong.is_empty() {
        world.hypervisor.sync_definitions().await?;
        return Ok(Vec::new());
    }
    let targets = wrong.iter().map(|(target, _)| target.to_string()).collect();
    world.hypervisor.redefine_disks(&seen.domain.id, &DiskChange::Point(wrong)).await?;
    Ok(targets)
}

/// A disk on an overlay of ours that QEMU has opened alone: its guest would read zeroes.
fn without_its_base(qemu: &Qemu) -> Option<&crate::hypervisor::Target> {
    let alone = |disk: &&crate::hypervisor::QemuDisk| {
        disk.chain.len() == 1 && disk.chain.iter().any(|top| overlay_job(&top.path).is_some())
    };
    qemu.disks.iter().find(alone).map(|disk| &disk.target)
}

/// Disks of ours for which the definition names another file than QEMU writes to, with QEMU's. The definition is wrong if
/// it names an overlay of ours, or an image below the one that QEMU writes to. One that names anything else is not ours.
fn differing(definition: &Definition, qemu: &Qemu) -> Vec<(crate::hypervisor::Target, Layer)> {
    let mut out = Vec::new();
    for disk in &definition.disks {
        let (Some(file), Some(used)) = (disk.source.image(), qemu.disk(&disk.target)) else { continue };
        let below = || used.chain.iter().skip(1).any(|layer| device::same(&layer.path, file));
        if let Some(top) = used.chain.first()
            && !used.read_only
            && !device::same(&top.path, file)
            && (overlay_job(file).is_some() || (overlay_job(&top.path).is_some() && below()))
        {
            out.push((disk.target.clone(), top.clone()));
        }
    }
    out
}

/// Whether the definition names an empty overlay right on top of what QEMU writes to.
async fn empty_on_top(
    world: &World,
    definition: &Definition,
    target: &crate::hypervisor::Target,
    top: &Layer,
) -> Result<bool, HvError> {
    let Some(file) = definition.file(target).filter(|file| overlay_job(file).is_some()) else {
        return Ok(false);
    };
    let format = definition.disk(target).and_then(|disk| disk.format.clone()).unwrap_or_default();
    let image = world.storage.inspect(&Layer { path: file.clone(), format }).await?;
    Ok(image.is_some_and(|image| {
        image.empty && image.backing.is_some_and(|below| device::same(&below.path, &top.path))
    }))
}

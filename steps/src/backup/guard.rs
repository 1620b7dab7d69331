//! Looking after the guest while a pull lasts.
//!
//! What the guest overwrites goes into the scratch files first, and one that cannot grow stops the guest. So a pull is ended
//! while there is still room, at once and before anything is written down: everything but the guest can be repeated.
//!
//! The step that reads does this for its own pull. One that no job goes on with, since its job was given up, or the journal that
//! knew it was lost or put back from an older copy, has [`look_after`].

use std::path::PathBuf;
use std::time::Duration;

use super::end::{end, is_gone};
use crate::hypervisor::{DomainId, HvError, Layer, PauseReason, RunState};
use crate::image::space::{LowWater, Space};
use crate::snapshot::World;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(200);
/// How often it is looked whether a pull of nobody's is still there, which asks QEMU.
const THERE: Duration = Duration::from_secs(5);

/// Looks after a guest as long as the pull with these scratch files lasts, which no job goes on with. It is ended when QEMU has
/// stopped the guest, and, with a mark of low water, when room beside the files runs low; why it was, or nothing if it has gone by
/// itself.
pub async fn look_after(
    world: &World,
    domain: &DomainId,
    scratch: &[PathBuf],
    low: Option<LowWater>,
) -> Option<String> {
    let rooms = if low.is_some() { scratch } else { &[] };
    let gone = async {
        loop {
            match is_gone(world, domain, scratch).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(e) => tracing::debug!(error = %e, "could not look at a backup job of nobody's"),
            }
            tokio::time::sleep(THERE).await;
        }
    };
    let why = tokio::select! {
        why = alarm(world, domain, rooms, low.unwrap_or_default()) => why,
        () = gone => return None,
    };
    loop {
        // A guest that stands still for another reason than a pull is not let run.
        let ended = match is_gone(world, domain, scratch).await {
            Ok(true) => return None,
            Ok(false) => end(world, domain, scratch).await,
            Err(e) => Err(e),
        };
        match ended {
            Ok(_) => return Some(why),
            Err(e) => tracing::debug!(error = %e, "could not end a backup job of nobody's yet"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Why the pull must be ended now; does not return before.
pub(super) async fn alarm(world: &World, domain: &DomainId, scratch: &[PathBuf], low: LowWater) -> String {
    loop {
        match look(world, domain, scratch, low).await {
            Ok(None) => {}
            Ok(Some(why)) => return why,
            // The next look will tell: no pull is ended because libvirt is being restarted.
            Err(e) => tracing::debug!(error = %e, "could not look at the scratch files"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn look(
    world: &World,
    domain: &DomainId,
    scratch: &[PathBuf],
    low: LowWater,
) -> Result<Option<String>, HvError> {
    // Room first: it is known whatever libvirt does.
    for file in scratch {
        let folder = file.parent().unwrap_or(file);
        let space = world.storage.space(folder).await?;
        if low.reached(Space { total: space.total, free: space.free }) {
            return Ok(Some(format!("{} bytes are left beside {}", space.free, file.display())));
        }
    }
    let state = world.hypervisor.state(domain).await?;
    Ok((state == RunState::Paused(PauseReason::IoError))
        .then(|| "QEMU has stopped the guest because something could not be written".to_owned()))
}

/// Whether the room beside the scratch files lasts for so long if the guest goes on as it has since then. What is not known does
/// not last.
pub(super) async fn lasts(
    world: &World,
    scratch: &[PathBuf],
    low: LowWater,
    since: Duration,
    span: Duration,
) -> bool {
    for file in scratch {
        let layer = Layer { path: file.clone(), format: "qcow2".to_owned() };
        let (Ok(Some(image)), Ok(space)) =
            (world.storage.inspect(&layer).await, world.storage.space(file.parent().unwrap_or(file)).await)
        else {
            return false;
        };
        let rate = image.allocated as f64 / since.as_secs_f64().max(1.0);
        // Each may grow at the cost of all others.
        let needed = rate * span.as_secs_f64() * scratch.len() as f64;
        if !low.allows(Space { total: space.total, free: space.free }, needed as u64) {
            return false;
        }
    }
    true
}

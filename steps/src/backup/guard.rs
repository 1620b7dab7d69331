//! Looking after the guest while a pull lasts.
//!
//! What the guest overwrites goes into the scratch files first, and one that cannot grow stops the guest. So a pull is ended
//! while there is still room, at once and before anything is written down: everything but the guest can be repeated.

use std::path::PathBuf;
use std::time::Duration;

use crate::hypervisor::{DomainId, HvError, Layer, PauseReason, RunState};
use crate::image::space::{LowWater, Space};
use crate::snapshot::World;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(200);

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

//! How much room the overlays leave, while a copy takes its time.
//!
//! An overlay grows with every write of the guest, on the guest's own file system. When that is full QEMU stops the
//! guest; and committing an overlay may need as much room again, because its clusters need not exist in the base yet.
//! A copy is therefore given up while what is free still suffices to bring the overlays home.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::World;
use super::disk::JobDisk;
use crate::hypervisor::{DomainId, HvError, PauseReason, RunState};
use crate::image::space::{LowWater, Space};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);

/// Why the overlays must be committed now; nothing while there is room.
///
/// # Errors
/// When it could not be found out.
pub async fn outgrown(
    world: &World,
    domain: &DomainId,
    disks: &[JobDisk],
    low: LowWater,
) -> Result<Option<String>, HvError> {
    if world.hypervisor.state(domain).await? == RunState::Paused(PauseReason::IoError) {
        return Ok(Some("QEMU has stopped the guest because a disk could not be written".to_owned()));
    }
    let mut taken: BTreeMap<u64, (u64, Space)> = BTreeMap::new();
    for disk in disks {
        let Some(image) = world.storage.inspect(&disk.overlay_layer()).await? else { continue };
        let room = world.storage.space(&disk.base.path).await?;
        let entry = taken.entry(room.dev).or_insert((0, Space { total: room.total, free: room.free }));
        entry.0 += image.allocated;
    }
    Ok(taken.into_values().find(|(needed, space)| !enough(*needed, *space, low)).map(|(needed, space)| {
        format!(
            "{} bytes are left on the guest's file system; the overlays take {needed}, and may need that once more \
             to be committed",
            space.free
        )
    }))
}

/// Whether overlays of that size can still be committed without touching the low-water mark.
fn enough(needed: u64, space: Space, low: LowWater) -> bool {
    low.allows(space, needed)
}

/// Looks now and then, for somebody who cannot wait for an answer.
#[derive(Debug)]
pub struct Watch {
    found: Arc<Mutex<Option<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Watch {
    /// Begins to look. Ends when dropped.
    #[must_use]
    pub fn start(world: World, domain: DomainId, disks: Vec<JobDisk>, low: LowWater) -> Self {
        let found = Arc::new(Mutex::new(None));
        let place = Arc::clone(&found);
        let task = tokio::spawn(async move {
            loop {
                match outgrown(&world, &domain, &disks, low).await {
                    Ok(None) => {}
                    Ok(Some(why)) => {
                        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                        return;
                    }
                    // The next look will tell; a copy is not given up because libvirt is being restarted.
                    Err(e) => tracing::debug!(error = %e, "could not look at the overlays"),
                }
                tokio::time::sleep(LOOK).await;
            }
        });
        Self { found, task }
    }

    /// Why the overlays must be committed now.
    #[must_use]
    pub fn alarm(&self) -> Option<String> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_is_given_up_while_the_overlays_still_fit_into_their_bases() {
        let low = LowWater { bytes: 100, percent: 0 };
        let space = |free| Space { total: 10_000, free };
        assert!(enough(0, space(100), low));
        assert!(!enough(0, space(99), low));
        assert!(enough(500, space(600), low));
        assert!(!enough(500, space(599), low));
    }
}

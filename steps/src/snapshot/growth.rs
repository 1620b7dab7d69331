//! How much room the overlays leave, while a copy takes its time.
//!
//! An overlay grows with every write of the guest, on the guest's own file system. When that is full QEMU stops the
//! guest; and committing an overlay may need as much room again, or more: nothing of it need exist in the base yet. A
//! raw base may be sparse; a qcow2 base allocates whole clusters, which may be larger than the overlay's; and whatever
//! part of a base shares its blocks with another file (a template that it was cloned from, or the very copy that is
//! being made, where the file system can clone) gets new ones when it is written to. What is free tells nothing of
//! that, so nothing is assumed to be overwritten in place ([`to_commit`]).
//!
//! A copy is therefore given up while what is free still suffices to bring the overlays home. A block device has all its room:
//! what goes back to one needs none, and only where its overlay grows is looked at.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::World;
use super::disk::JobDisk;
use crate::hypervisor::{DomainId, HvError, Image, PauseReason, RunState, Trouble};
use crate::image::space::{LowWater, Space};

/// How often it is looked whether the guest still runs; the room is measured at every so manieth look.
const LOOK: Duration = Duration::from_millis(200);
const MEASURE: u32 = 5;

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
    if let Some(why) = stopped(world, domain).await? {
        return Ok(Some(why));
    }
    let mut taken: BTreeMap<u64, (u64, Space)> = BTreeMap::new();
    for disk in disks {
        let Some(overlay) = world.storage.inspect(&disk.overlay_layer()).await? else { continue };
        // A base that is reached through a link is not looked into; its clusters are taken for the overlay's.
        let base = match world.storage.inspect(&disk.base).await {
            Err(e) if e.trouble == Trouble::Refused => None,
            base => base?,
        };
        let mut rooms = vec![(world.storage.space(&disk.overlay).await?, 0)];
        if !disk.device {
            rooms.push((world.storage.space(&disk.base.path).await?, to_commit(&overlay, base.as_ref())));
        }
        for (room, needed) in rooms {
            let entry = taken.entry(room.dev).or_insert((0, Space { total: room.total, free: room.free }));
            entry.0 = entry.0.saturating_add(needed);
        }
    }
    Ok(taken.into_values().find(|(needed, space)| !enough(*needed, *space, low)).map(|(needed, space)| {
        format!(
            "{} bytes are left on the guest's file system; to commit the overlays may take {needed} of them",
            space.free
        )
    }))
}

/// Whether it is too late: QEMU has stopped the guest.
async fn stopped(world: &World, domain: &DomainId) -> Result<Option<String>, HvError> {
    let state = world.hypervisor.state(domain).await?;
    let why = || "QEMU has stopped the guest because a disk could not be written".to_owned();
    Ok((state == RunState::Paused(PauseReason::IoError)).then(why))
}

/// Bytes that it may take to commit an overlay into its base, if nothing can be overwritten in place.
fn to_commit(overlay: &Image, base: Option<&Image>) -> u64 {
    // Where the file system compresses, the overlay takes less than it holds; the base need not be compressed.
    let holds = overlay.size.max(overlay.allocated);
    // In the worst case each of its clusters lies alone in one of the base's.
    let clusters = holds.div_ceil(overlay.cluster.max(1));
    let spread = clusters.saturating_mul(base.map_or(0, |base| base.cluster));
    let data = holds.max(spread).min(overlay.virtual_size.max(holds));
    // Second-level tables and reference counts: 10 bytes for a cluster, of which there may be many small ones.
    let cluster = base.map_or(overlay.cluster, |base| base.cluster.max(512));
    let tables = match base {
        Some(base) if base.format != "qcow2" => 0,
        _ => data.div_ceil(cluster.max(512)).saturating_mul(10),
    };
    data.saturating_add(tables)
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
            for look in 0_u32.. {
                let found = if look % MEASURE == 0 {
                    outgrown(&world, &domain, &disks, low).await
                } else {
                    stopped(&world, &domain).await
                };
                match found {
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

    fn image(format: &str, size: u64, allocated: u64, cluster: u64) -> Image {
        Image {
            path: "/i".into(),
            id: crate::hypervisor::FileId { dev: 1, ino: 1 },
            size,
            allocated,
            format: format.to_owned(),
            virtual_size: 1 << 30,
            cluster,
            backing: None,
            empty: false,
        }
    }

    #[test]
    fn a_base_is_taken_to_need_new_room_for_all_that_its_overlay_holds() {
        let overlay = |mib: u64| image("qcow2", mib << 20, mib << 20, 64 << 10);
        let raw = image("raw", 1 << 30, 0, 512);
        assert_eq!(
            to_commit(&overlay(10), Some(&raw)),
            10 << 20,
            "a sparse base, or one that shares its blocks"
        );
        let compressed = Image { allocated: 1 << 20, ..overlay(10) };
        assert_eq!(to_commit(&compressed, Some(&raw)), 10 << 20, "what it holds, not what it takes");
        let coarse = image("qcow2", 1 << 20, 1 << 20, 2 << 20);
        let needed = to_commit(&overlay(10), Some(&coarse));
        assert!(needed >= 320 << 20, "each of its clusters in another one of the base's: {needed}");
        assert!(to_commit(&overlay(1000), Some(&coarse)) < (1 << 30) + (1 << 20), "never more than the disk");
        let fine = image("qcow2", 1 << 20, 1 << 20, 512);
        assert!(
            to_commit(&overlay(100), Some(&fine)) >= (100 << 20) + (100 << 20) / 512 * 8,
            "its tables too"
        );
        assert!(to_commit(&overlay(10), None) >= 10 << 20);
    }
}

//! Letting a guest run again that QEMU has stopped because an overlay of ours could not grow.
//!
//! A guest on overlays writes to nothing else, so when QEMU stops it for want of space it is our overlay's file system
//! that was full: what we copied onto it, or somebody else's files, or the guest itself. QEMU does not try again by
//! itself; it waits until somebody says "resume", and then repeats the write that failed, so that the guest goes on as if
//! nothing had happened. That is done here as soon as there is room, whoever made it: the copy that was given up, an
//! operator, or the guest's own file system that was grown.
//!
//! Nothing is done about a guest that we hold: whoever holds it sets it free. If the room does not help (a quota, say,
//! that nobody tells of) QEMU stops the guest again, and the caller waits longer from time to time.
//!
//! What a guest on its own images waits for is not ours, but for one case: it was brought home while overlays that are no
//! longer needed still took the room that it lacks, and could not write there either. So it is let run once more when the
//! job leaves it ([`at_home`]), after the overlays have gone.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

use super::disk::overlay_job;
use super::fence::{Fence, fence};
use super::{World, safety};
use crate::hypervisor::{DomainId, HvError, PauseReason, RunState};

/// So much must be free beside an overlay before the guest is let run: with less it would stand still again at once.
pub const ROOM: u64 = 8 << 20;

/// How long a resume whose outcome is not known is waited for: longer than libvirt queues a call.
const FENCED: Duration = Duration::from_secs(60);
const APART: Duration = Duration::from_millis(250);

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rescue {
    /// It is not stopped by an I/O error, or that is not ours to end.
    NotOurs,
    /// It runs again.
    Resumed {
        /// The files that it writes to: overlays, or its own images.
        files: Vec<PathBuf>,
    },
    /// There is still no room beside this file.
    NoRoom {
        /// One that it writes to.
        file: PathBuf,
        /// Bytes free there.
        free: u64,
    },
}

/// Lets a domain's guest run if QEMU has stopped it on an overlay of this store's job and there is room now.
///
/// # Errors
/// When the hypervisor did not do it, or did not answer. To be repeated.
pub async fn rescue(world: &World, store: &str, domain: &DomainId) -> Result<Rescue, HvError> {
    let on_overlays = |mut tops: Vec<PathBuf>| {
        tops.retain(|top| overlay_job(top).is_some());
        tops
    };
    let_run(world, store, domain, on_overlays).await
}

/// Lets a domain's guest run if QEMU has stopped it on its own images, this store's job is about to leave it, and there is
/// room now.
///
/// # Errors
/// As [`rescue`].
pub async fn at_home(world: &World, store: &str, domain: &DomainId) -> Result<Rescue, HvError> {
    let all_at_home = |tops: Vec<PathBuf>| match tops.iter().any(|top| overlay_job(top).is_some()) {
        true => Vec::new(),
        false => tops,
    };
    let_run(world, store, domain, all_at_home).await
}

/// The guest that nobody holds runs, if there is room beside those of its files that it is to run for.
async fn let_run(
    world: &World,
    store: &str,
    domain: &DomainId,
    of_these: impl FnOnce(Vec<PathBuf>) -> Vec<PathBuf>,
) -> Result<Rescue, HvError> {
    let stopped = RunState::Paused(PauseReason::IoError);
    if world.hypervisor.state(domain).await? != stopped {
        return Ok(Rescue::NotOurs);
    }
    let _alone = world.in_hand(domain).await;
    let seen = world.hypervisor.observe(domain).await?;
    let marker = seen.marker.as_ref().filter(|marker| marker.store == store);
    if seen.state != stopped || marker.is_none_or(safety::holds) {
        return Ok(Rescue::NotOurs);
    }
    let tops = seen.qemu.iter().flat_map(|qemu| &qemu.disks).filter_map(|disk| disk.chain.first());
    let files = of_these(tops.map(|top| top.path.clone()).collect());
    if files.is_empty() {
        return Ok(Rescue::NotOurs);
    }
    for file in &files {
        let free = world.storage.space(file).await?.free;
        if free < ROOM {
            return Ok(Rescue::NoRoom { file: file.clone(), free });
        }
    }
    match world.hypervisor.resume(domain).await {
        Ok(()) => Ok(Rescue::Resumed { files }),
        Err(e) => {
            // It may yet come, and must not come in the middle of somebody's act.
            let since = Instant::now();
            while e.in_doubt && since.elapsed() < FENCED {
                if matches!(fence(&*world.hypervisor, domain).await, Ok(Fence::Closed)) {
                    break;
                }
                tokio::time::sleep(APART).await;
            }
            Err(e)
        }
    }
}

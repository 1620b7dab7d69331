//! What a plan was built on, and whether it still holds.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmkeep_workflow::Fault;

use crate::codes;
use crate::hypervisor::{DomainRef, Observation, Trouble};
use crate::snapshot::disk::JobDisk;
use crate::snapshot::fence;
use crate::snapshot::stand::Stand;
use crate::snapshot::switch::{Names, names};
use crate::snapshot::{World, mark};

/// A disk that does not take part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOutDisk {
    /// Which.
    pub target: String,
    /// Why.
    pub reason: String,
}

/// What was observed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The domain.
    pub domain: DomainRef,
    /// The store of the daemon that planned.
    pub store: String,
    /// The QEMU process.
    pub instance: String,
    /// The persistent definition's hash, see [`crate::hypervisor::Definition::bare`].
    pub definition: String,
    /// Whether the guest ran.
    pub running: bool,
    /// Its memory in bytes.
    pub memory: u64,
    /// The disks that take part.
    pub disks: Vec<JobDisk>,
    /// Their chains as QEMU has them, from the top down.
    pub chains: Vec<Vec<PathBuf>>,
    /// Those that do not.
    pub left_out: Vec<LeftOutDisk>,
}

impl Facts {
    /// What differs from the facts right before the first change, or (`taking`) right before the snapshot.
    pub(super) async fn differ(&self, world: &World, taking: bool) -> Result<Option<String>, Fault> {
        let doing = "look at the domain once more";
        let seen = match world.hypervisor.observe(&self.domain.id).await {
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(Some("the domain is gone".to_owned())),
            seen => seen.map_err(|e| e.fault(codes::CANNOT_TAKE_SNAPSHOT, doing, &self.domain.name))?,
        };
        if let Some(what) = self.compare(&seen, taking) {
            return Ok(Some(what));
        }
        let busy = fence::busy(&*world.hypervisor, &self.domain.id)
            .await
            .map_err(|e| e.fault(codes::CANNOT_TAKE_SNAPSHOT, doing, &self.domain.name))?;
        Ok(busy)
    }

    fn same_process(&self, seen: &Observation) -> bool {
        seen.qemu.as_ref().is_some_and(|qemu| qemu.instance == self.instance)
    }

    fn compare(&self, seen: &Observation, taking: bool) -> Option<String> {
        if !self.same_process(seen) {
            return Some("the domain has ended, or was started anew".to_owned());
        }
        let Some(persistent) = &seen.persistent else {
            return Some("the domain has no persistent definition any more".to_owned());
        };
        if persistent.bare != self.definition {
            return Some("somebody has changed the domain's definition".to_owned());
        }
        let wanted = if taking { Names::Overlays } else { Names::Bases };
        if names(persistent, &self.disks) != wanted {
            return Some("somebody has changed the disks of the persistent definition".to_owned());
        }
        if let Some(marker) = seen.marker.as_ref().filter(|marker| marker.store != self.store) {
            return Some(mark::foreign(&self.domain, marker).cause);
        }
        for (disk, chain) in self.disks.iter().zip(&self.chains) {
            match Stand::of(seen, disk) {
                Stand::OnBase { .. } => {}
                // The effect of an attempt that was cut off; the step itself tells what it is worth.
                Stand::OnOverlay { .. } if taking => continue,
                _ => return Some(format!("QEMU writes disk {} to another file", disk.target)),
            }
            let qemu = seen.qemu.as_ref()?;
            let now: Vec<_> = qemu.disk(&disk.target)?.chain.iter().map(|layer| &layer.path).collect();
            if now != chain.iter().collect::<Vec<_>>() {
                return Some(format!("the images under disk {} have changed", disk.target));
            }
            if let Some(job) = qemu.job(&disk.target) {
                return Some(format!("a block job ({}) works on disk {}", job.id, disk.target));
            }
        }
        None
    }
}

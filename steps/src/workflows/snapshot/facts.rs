//! What a plan was built on, and whether it still holds.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmkeep_workflow::Fault;

use crate::codes;
use crate::hypervisor::{DomainRef, Observation, RunState, Trouble};
use crate::save::AfterReboot;
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
    /// The QEMU process; nothing if the domain was off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// It was off with its memory saved by libvirt.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saved: bool,
    /// The persistent definition's hash, see [`crate::hypervisor::Definition::bare`].
    pub definition: String,
    /// Whether the guest ran.
    pub running: bool,
    /// The host's boot, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// What becomes of the guest when the host goes down meanwhile.
    #[serde(default)]
    pub after_reboot: AfterReboot,
    /// Its memory in bytes.
    pub memory: u64,
    /// The disks that take part.
    pub disks: Vec<JobDisk>,
    /// Their chains, from the top down.
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
        seen.qemu.as_ref().map(|qemu| &qemu.instance) == self.instance.as_ref()
    }

    fn compare(&self, seen: &Observation, taking: bool) -> Option<String> {
        if !self.same_process(seen) || (self.instance.is_none() && seen.state != RunState::Off) {
            return Some("the domain has ended, or was started anew".to_owned());
        }
        if self.instance.is_none() && seen.managed_save != self.saved {
            return Some("the domain was started, or saved (virsh managedsave)".to_owned());
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
        // Of a domain that is off there is no QEMU to compare with.
        self.instance.as_ref()?;
        let known = |name: &str| {
            self.disks.iter().map(|disk| disk.target.0.as_str()).any(|known| known == name)
                || self.left_out.iter().any(|disk| disk.target == name)
        };
        let plugged = seen.live.iter().flat_map(|live| &live.disks).find(|disk| !known(&disk.target.0));
        if let Some(disk) = plugged {
            return Some(format!("somebody has plugged in disk {}", disk.target));
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

//! The classic act: the guest's state is saved to a file, loaded again onto empty overlays, and let run.
//!
//! The guest is down between the save and the resume, so this is about one thing more than a live snapshot is: *that it
//! comes back, and comes back as one machine*. Memory and disks must be of one instant. libvirt loads a state onto disks
//! that were written since without a word, so the rules are kept here:
//!
//! 1. **The persistent definition names the empty overlays before the guest goes down.** Whoever starts it then
//!    (an operator, autostart after a reboot) starts it on overlays that equal its disks. Its saved state is stale from
//!    that moment, and is never loaded over it.
//! 2. **A state is loaded only onto disks that are provably as they were** ([`state::usable`]): each overlay the very file
//!    that was made, holding no data; each base unchanged since the save; the state itself the very file that was
//!    written.
//! 3. **Once the guest has been let run its state is used up.** That is noted in the persistent definition, durably,
//!    before its first instruction ([`Hold::Resumed`](crate::hypervisor::Hold)). After that note a guest that is found
//!    off is started cold: the disks are the truth.
//! 4. **The way back to running closes the switch, before the merge does** ([`reload`], [`resume`], both for the guest's
//!    safety): it runs whenever a save may have been *begun*, whatever became of it, before anything else of the job, and
//!    nothing is committed as long as it has not succeeded.
//!
//! A start that left no trace on any overlay (a firmware that found nothing to boot) is not noticed when vmkeepd was not
//! there to see it. Memory and disks then still agree.
//!
//! | module | what it holds |
//! |---|---|
//! | [`ram_disk`] | where the state goes |
//! | [`state`] | what is known of a saved state, and whether it may be loaded |
//! | [`guest`] | the save |
//! | [`reload`], [`resume`] | the way back to running |
//! | [`keep`] | the state becomes part of the backup, and leaves the RAM disk |

pub mod guest;
pub mod keep;
pub mod ram_disk;
pub mod reload;
pub mod resume;
pub mod state;

#[cfg(test)]
mod tests;

pub use guest::SaveGuest;
pub use keep::{ClearState, RetainState};
pub use reload::ReloadGuest;
pub use resume::ResumeGuest;

use serde::{Deserialize, Serialize};

use vmkeep_workflow::Fault;

use crate::codes;
use crate::hypervisor::{DomainRef, Hold, Marker, Observation};

/// What becomes of a guest that the end of the host took down in the middle of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AfterReboot {
    /// It is started if it ran before: with its state if that is still there, else cold.
    #[default]
    Start,
    /// It stays off.
    Leave,
}

/// What to do when the saved state is lost before it is in the backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WithoutState {
    /// No backup then.
    #[default]
    Fail,
    /// A backup of the disks alone.
    DiskOnly,
}

/// A marker of this job.
fn marker(store: &str, job: vmkeep_workflow::JobId, hold: Option<Hold>) -> Marker {
    Marker { store: store.to_owned(), job: job.to_string(), hold }
}

/// Whether a marker is this job's, with this hold.
fn is_ours(marker: Option<&Marker>, store: &str, job: vmkeep_workflow::JobId, hold: Hold) -> bool {
    marker.is_some_and(|m| m.store == store && m.job == job.to_string() && m.hold == Some(hold))
}

/// Why a guest that stands still is not saved: loaded again, QEMU would keep its disks closed until somebody resumed it,
/// and nothing could be committed until then.
pub(crate) fn paused(domain: &DomainRef, doing: &'static str) -> Fault {
    let cause =
        "the guest is paused; saved and loaded again, its disks would stay closed until it is resumed";
    Fault::permanent(codes::MEMORY_UNSAVEABLE, doing, domain.name.clone(), cause)
        .remedy(format!("virsh resume {}, or back up its disks only", domain.id))
}

/// Whether the guest's saved state was let run, or is about to be.
fn used_up(seen: &Observation, store: &str, job: vmkeep_workflow::JobId) -> bool {
    is_ours(seen.persistent_marker.as_ref(), store, job, Hold::Resumed)
}

/// What the steps from the save to the resume have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saving {
    /// The domain.
    pub domain: DomainRef,
    /// The store of this daemon.
    pub store: String,
    /// The QEMU process that the plan was made for.
    pub instance: String,
    /// The host's boot that the plan was made in.
    pub boot: String,
    /// The disks, each with the step that made its overlay.
    pub disks: Vec<(crate::snapshot::disk::JobDisk, vmkeep_workflow::StepName)>,
    /// Where the state goes.
    pub file: std::path::PathBuf,
    /// Whether that is on a RAM disk.
    pub ram_disk: bool,
    /// Whether the guest ran when the plan was made.
    pub running: bool,
    /// What becomes of it after a reboot.
    pub after_reboot: AfterReboot,
}

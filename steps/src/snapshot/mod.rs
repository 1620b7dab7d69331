//! The steps of a live snapshot.
//!
//! Why they stand in this order, what each may rely on, and what every kind of crash leaves behind is in `STEPS.md`
//! beside this crate's manifest; its six rules are the invariants of this folder. In short: at every instant at which
//! the guest can run, the persistent definition durably names a file that holds every write the guest has flushed.
//!
//! | module | what it holds |
//! |---|---|
//! | [`disk`] | a disk of the job; the names of overlays |
//! | [`stand`] | where a disk stands, from all three who have an opinion: the decision table |
//! | [`fence`] | whether a call that was cut off can still take effect |
//! | [`safety`] | setting a guest free that we hold, without a journal |
//! | [`mark`], [`overlay`], [`switch`] | the preparations |
//! | [`freeze`], [`take`], [`memory`] | the act |
//! | [`folder`], [`copy`], [`growth`], [`publish`] | the backup |
//! | [`commit`], [`pivot`], [`tidy`] | the way back |

pub mod commit;
pub mod copy;
pub mod disk;
pub mod fence;
pub mod folder;
pub mod freeze;
pub mod growth;
pub mod mark;
pub mod memory;
pub mod overlay;
pub mod pivot;
pub mod publish;
pub mod safety;
pub mod stand;
pub mod switch;
pub mod take;
pub mod tidy;

use std::sync::Arc;

use vmkeep_workflow::{Code, Fault, Verdict};

use crate::hypervisor::{DomainId, HvError, Hypervisor, Observation, Storage};
use crate::image::root::Roots;

/// The world that the steps work in.
#[derive(Clone)]
pub struct World {
    /// libvirt and QEMU.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The images beside the guest's own.
    pub storage: Arc<dyn Storage>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

impl World {
    /// Everything there is to see of a domain; a failure becomes the step's.
    pub(crate) async fn observe(&self, domain: &DomainId, code: Code) -> Result<Observation, Fault> {
        self.hypervisor
            .observe(domain)
            .await
            .map_err(|e| e.fault(code, "look at the domain", domain.to_string()))
    }
}

/// Where backups may be written.
#[derive(Clone, Debug)]
pub struct Places {
    /// The configured roots.
    pub roots: Arc<Roots>,
}

/// What a probe says when it could not look.
pub(crate) fn cannot_look<T>(error: &HvError) -> Verdict<T> {
    Verdict::Unknown(error.to_string())
}

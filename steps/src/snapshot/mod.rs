//! The steps of a snapshot.
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
//! | [`rescue`] | letting a guest run again that was stopped because our overlay could not grow |
//! | [`mark`], [`overlay`], [`switch`] | the preparations |
//! | [`freeze`], [`take`], [`memory`] | the act |
//! | [`rest`], [`saved`] | the act where the domain is off, or saved by libvirt |
//! | [`machine`] | firmware variables and TPM state |
//! | [`folder`], [`copy`], `transfer`, [`growth`], [`publish`] | the backup |
//! | [`commit`], [`pivot`], [`tidy`] | the way back |

pub mod commit;
pub mod copy;
pub mod disk;
pub mod fence;
pub mod folder;
pub mod freeze;
pub mod growth;
pub mod machine;
pub mod mark;
pub mod memory;
pub mod overlay;
pub mod pivot;
pub mod publish;
pub mod rescue;
pub mod rest;
pub mod safety;
pub mod saved;
pub mod stand;
pub mod switch;
pub mod take;
pub mod tidy;
pub(crate) mod transfer;

#[cfg(test)]
pub(crate) mod tests;

use std::path::Path;
use std::sync::Arc;

use vmkeep_workflow::{Class, Code, Fault, Verdict};

use crate::codes;
use crate::hypervisor::{DomainId, DomainRef, HvError, Hypervisor, InHand, Observation, Storage, Trouble};
use crate::image::root::{Folder, RootError, Roots, TargetRoot};

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
    /// Takes a guest in hand, before it is looked whether it runs and until it was let run or made to stand still.
    pub(crate) async fn in_hand(&self, domain: &DomainId) -> Option<InHand> {
        match self.hypervisor.standstills() {
            Some(guests) => Some(guests.take(domain).await),
            None => None,
        }
    }

    /// Everything there is to see of a domain; a failure becomes the step's. That one could not look is never final:
    /// a QEMU that is just dying, or a libvirtd that is just starting, answers the strangest things.
    pub(crate) async fn observe(&self, domain: &DomainId, code: Code) -> Result<Observation, Fault> {
        self.hypervisor
            .observe(domain)
            .await
            .map_err(|e| not_looked(e, code, "look at the domain", &domain.to_string()))
    }
}

/// The failure of a look.
pub(crate) fn not_looked(e: HvError, code: Code, doing: &str, object: &str) -> Fault {
    let gone = e.trouble == Trouble::NoSuchDomain;
    let fault = e.fault(code, doing, object);
    if gone { fault } else { fault.class(Class::Transient) }
}

/// The failure of a step on the way back. It is tried again for as long as its policy says: the guest has to come home,
/// and who refuses now (a QEMU that is dying, a domain that is being started) may not refuse the next time. Only what no
/// patience can change is final.
pub(crate) fn on_the_way_back(e: HvError, code: Code, doing: &str, object: &str) -> Fault {
    let hopeless = matches!(e.trouble, Trouble::Denied | Trouble::Unsupported | Trouble::NoSuchDomain);
    let fault = e.fault(code, doing, object);
    if hopeless { fault } else { fault.class(Class::Transient) }
}

/// The failure of a step that would have to end, on the way back, what somebody else runs by now. It is not taken from them.
pub(crate) fn theirs(doing: &str, domain: &DomainRef, what_they_did: &str) -> Fault {
    let cause = format!("{what_they_did}: it is theirs now");
    let remedy = format!("If it is not needed: virsh destroy {}; then settle the job", domain.id);
    Fault::permanent(codes::UNDO_FAILED, doing, &domain.name, cause).remedy(remedy)
}

/// Where backups may be written.
#[derive(Clone, Debug)]
pub struct Places {
    /// The configured roots.
    pub roots: Arc<Roots>,
}

impl Places {
    /// Opens a folder below a root. One that is not, but that the owner of this program has named himself, or that
    /// holds an image of the very domain that is worked on (`own`), counts as a root of its own.
    pub(crate) fn open(&self, path: &Path, own: bool) -> Result<Folder, RootError> {
        if own { TargetRoot::open(path)?.folder().try_clone() } else { self.roots.open_folder(path) }
    }
}

/// What a probe says when it could not look.
pub(crate) fn cannot_look<T>(error: &HvError) -> Verdict<T> {
    Verdict::Unknown(error.to_string())
}

//! What the world is at this moment, for the journal: the boot, and the instances that execute our calls.
//!
//! The engine asks without waiting, in the middle of an append; so the facts are gathered beforehand, on every (re-)
//! connection and now and then, and handed out from memory. A fact that is some seconds old is good enough: it is
//! compared after a crash with what is then, and an instance that ended in between differs from both.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use vmkeep_steps::hypervisor::Hypervisor;

/// The facts. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Facts(Arc<RwLock<BTreeMap<String, String>>>);

impl Facts {
    /// Facts that hold the boot id only.
    #[must_use]
    pub fn new() -> Self {
        let facts = Self::default();
        facts.set(BTreeMap::new());
        facts
    }

    /// Asks the hypervisor anew. Without an answer only the boot remains: what is not known is not claimed.
    pub async fn refresh(&self, hypervisor: &dyn Hypervisor) {
        match hypervisor.environment().await {
            Ok(found) => self.set(found),
            Err(error) => {
                tracing::debug!(%error, "the hypervisor's instances are not known");
                self.set(BTreeMap::new());
            }
        }
    }

    fn set(&self, mut found: BTreeMap<String, String>) {
        if let Ok(boot) = vmkeep_libvirt::instance::boot_id() {
            found.entry("boot".to_owned()).or_insert(boot);
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = found;
    }
}

impl vmkeep_workflow::Environment for Facts {
    fn facts(&self) -> BTreeMap<String, String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

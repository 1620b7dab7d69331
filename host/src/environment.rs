//! What the world is at this moment, for the journal: the boot, the libvirtd that executes our calls, and the QEMU
//! processes of the domains that jobs work on.
//!
//! The engine asks without waiting, in the middle of an append; so the facts are gathered beforehand (when a connection
//! is made, when a domain starts or stops, when a job is asked for) and handed out from memory. A fact that is a moment
//! old is good enough: it is compared after a crash with what is then, and an instance that ended in between differs
//! from both.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

use vmkeep_workflow::Engine;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::summary::JobStatus;

use crate::hypervisor::Libvirt;

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

    /// Asks anew. Without an answer only the boot remains: what is not known is not claimed.
    pub async fn refresh(&self, libvirt: &Libvirt, engine: &Engine) {
        if let Err(error) = libvirt.reachable() {
            tracing::debug!(%error, "the hypervisor's instances are not known");
            return self.set(BTreeMap::new());
        }
        let mut found = libvirt.instances();
        let open = JobFilter {
            status: vec![
                JobStatus::Queued,
                JobStatus::Running,
                JobStatus::Paused,
                JobStatus::Unwinding,
                JobStatus::NeedsAttention,
            ],
            ..JobFilter::default()
        };
        let jobs = engine.jobs(&open).await.unwrap_or_default();
        let uuids: BTreeSet<uuid::Uuid> = jobs.iter().filter_map(|job| job.subject.id.parse().ok()).collect();
        let asked = uuids.into_iter().map(|uuid| async move { (uuid, libvirt.qemu_instance(uuid).await) });
        for (uuid, instance) in futures_util::future::join_all(asked).await {
            if let Some(instance) = instance {
                found.insert(format!("qemu/{uuid}"), instance);
            }
        }
        self.set(found);
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

//! What a job can still do when its journal is full.
//!
//! The store keeps a reserve for that, but somebody else may take the room that was given up. Then no step begins any more,
//! also none that would thaw or resume a guest. So its guest is set free without an event, as after a start: by the note in the
//! domain. The steps find it free when there is room again.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use vmkeep_steps::hypervisor::DomainId;
use vmkeep_steps::snapshot::World;
use vmkeep_steps::snapshot::safety::{Release, release};
use vmkeep_workflow::event::Subject;
use vmkeep_workflow::{Environment, JobId};

use crate::environment::Facts;

/// The facts about the world, and what sets guests free in it.
pub(super) struct Surroundings {
    pub(super) facts: Facts,
    pub(super) world: World,
    pub(super) store: String,
    /// The domains on which it is at work: one that does not answer is asked once.
    pub(super) asked: Arc<Mutex<HashSet<DomainId>>>,
}

impl Environment for Surroundings {
    fn facts(&self) -> BTreeMap<String, String> {
        self.facts.facts()
    }

    fn no_room(&self, job: JobId, subject: &Subject) {
        let Ok(uuid) = subject.id.parse() else { return };
        let (world, store, domain) = (self.world.clone(), self.store.clone(), DomainId(uuid));
        let asked = Arc::clone(&self.asked);
        if !asked.lock().unwrap_or_else(PoisonError::into_inner).insert(domain) {
            return;
        }
        tokio::spawn(async move {
            match release(&world, &store, &domain).await {
                Ok(Release::NotHeld) => {}
                Ok(act) => {
                    tracing::warn!(%job, %domain, ?act, "the journal is full: the guest was set free without an event")
                }
                Err(error) => {
                    tracing::error!(%job, %domain, %error, "the journal is full, and the guest may be held: it could not be set free")
                }
            }
            asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&domain);
        });
    }
}

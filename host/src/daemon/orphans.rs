//! Pulls that no job of this journal goes on with: their guests are looked after all the same.
//!
//! A backup job of libvirt's lives in QEMU, and outlives the journal of the job that began it: one that was lost, or put back
//! from an older copy, or a job that was given up. What the guest overwrites still goes into its scratch files first, and nobody
//! watches the room beside them. So vmkeepd does, whoever's they are: the names of the scratch files tell that they are a
//! vmkeep's. *Whether the job may be ended for good is not decided here*: that is asked for (`doctor --repair`), because what
//! looks like nobody's may be another vmkeep's. It is ended only for the guest's sake:
//!
//! - **QEMU has stopped the guest.** A pull can be repeated, and a guest that stands still cannot wait; another vmkeep would do
//!   the same at once.
//! - **Room runs low**, unless another store's note is in the domain: its vmkeepd sees to that.
//!
//! What was done is in the log and in the store's stream of what was done for guests.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use vmkeep_steps::backup::end::rescue;
use vmkeep_steps::backup::guard::look_after;
use vmkeep_steps::hypervisor::{DomainRef, HvError, PauseReason, RunState, Trouble};
use vmkeep_steps::image::space::LowWater;
use vmkeep_steps::reconcile::{Leftover, Owner, What};
use vmkeep_steps::snapshot::World;
use vmkeep_steps::snapshot::disk::scratch_job;
use vmkeep_workflow::EventStore;

/// What it works with.
#[derive(Clone)]
pub(super) struct Orphans {
    world: World,
    store: Arc<dyn EventStore>,
    low: LowWater,
    /// The pulls that are looked after, by domain and job.
    guarded: Arc<Mutex<HashSet<(String, String)>>>,
}

impl Orphans {
    pub(super) fn new(world: World, store: Arc<dyn EventStore>, low: LowWater) -> Self {
        Self { world, store, low, guarded: Arc::default() }
    }

    /// Guests that QEMU has stopped because of a pull run again, whatever the journal says. Nothing is waited for.
    pub(super) fn free(&self) {
        let own = self.clone();
        tokio::spawn(async move {
            match own.world.hypervisor.domains().await {
                Ok(domains) => domains.into_iter().for_each(|domain| own.free_one(domain)),
                Err(error) => {
                    tracing::warn!(%error, "whether a guest stands still because of a backup job is not known");
                }
            }
        });
    }

    /// The same for one domain.
    pub(super) fn free_one(&self, domain: DomainRef) {
        let own = self.clone();
        tokio::spawn(async move {
            match own.stopped(&domain).await {
                Ok(true) => own.tell(&domain, None, "QEMU had stopped the guest").await,
                Ok(false) => {}
                Err(e) if matches!(e.trouble, Trouble::NoSuchDomain | Trouble::NotRunning) => {}
                Err(error) => {
                    tracing::warn!(domain = %domain.name, %error, "a guest that stands still could not be seen to");
                }
            }
        });
    }

    async fn stopped(&self, domain: &DomainRef) -> Result<bool, HvError> {
        let stopped = RunState::Paused(PauseReason::IoError);
        if self.world.hypervisor.state(&domain.id).await? != stopped {
            return Ok(false);
        }
        rescue(&self.world, &domain.id).await
    }

    /// Looks after the pulls among what was found, until each is gone.
    pub(super) fn guard(&self, found: &[Leftover]) {
        let mut pulls: BTreeMap<(String, String), (DomainRef, bool, Vec<PathBuf>)> = BTreeMap::new();
        for one in found.iter().filter(|one| !matches!(one.owner, Owner::Open(_) | Owner::NotOurs)) {
            let What::Pull { domain, path, .. } = &one.what else { continue };
            let key = (domain.id.to_string(), scratch_job(path).unwrap_or_default().to_owned());
            let elsewhere = matches!(one.owner, Owner::Elsewhere { .. });
            pulls.entry(key).or_insert_with(|| (domain.clone(), elsewhere, Vec::new())).2.push(path.clone());
        }
        for (key, (domain, elsewhere, scratch)) in pulls {
            if !self.guarded().insert(key.clone()) {
                continue;
            }
            let (own, low) = (self.clone(), (!elsewhere).then_some(self.low));
            tokio::spawn(async move {
                let ended = look_after(&own.world, &domain.id, &scratch, low).await;
                own.guarded().remove(&key);
                if let Some(why) = ended {
                    own.tell(&domain, Some(&key.1), &why).await;
                }
            });
        }
    }

    fn guarded(&self) -> std::sync::MutexGuard<'_, HashSet<(String, String)>> {
        self.guarded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn tell(&self, domain: &DomainRef, job: Option<&str>, why: &str) {
        tracing::warn!(domain = %domain.name, why, "a backup job that no job here goes on with was ended");
        let act = "ended a backup job that no job here goes on with, and let the guest run";
        let told = crate::guests::intervened(&*self.store, domain, job, act, &format!("done: {why}")).await;
        if let Err(error) = told {
            tracing::warn!(domain = %domain.name, %error, "what was done for the guest could not be written down");
        }
    }
}

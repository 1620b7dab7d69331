//! Following libvirt: waiting for it, and seeing to the guests whenever it comes back.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch as channel;
use vmkeep_libvirt::Event;
use vmkeep_libvirt::event::Lifecycle;
use vmkeep_steps::hypervisor::{DomainId, DomainRef, Hold, Hypervisor};
use vmkeep_steps::snapshot::World;
use vmkeep_workflow::{Engine, Fault, JobId};

use super::orphans::Orphans;
use super::reboot;
use super::safety::{self, Freed};
use crate::api::types::DaemonPhase;
use crate::codes;
use crate::config::Config;
use crate::environment::Facts;
use crate::hypervisor::{Libvirt, this_boot};
use crate::site::leftovers;

/// How often the log is told that libvirt is still waited for.
const STILL_WAITING: Duration = Duration::from_secs(60);

/// What is followed, and who is told.
pub(super) struct Watched {
    pub(super) libvirt: Libvirt,
    pub(super) world: World,
    pub(super) store: String,
    pub(super) engine: Engine,
    pub(super) facts: Facts,
    pub(super) phase: Arc<channel::Sender<DaemonPhase>>,
    pub(super) config: Config,
    pub(super) orphans: Orphans,
}

/// Brings the daemon up as soon as libvirt answers, and then sees to the guests at every reconnection.
pub(super) async fn watch(watched: Watched) {
    let mut events = watched.libvirt.client().events();
    loop {
        match watched.libvirt.client().connected(STILL_WAITING).await {
            Ok(_) => break,
            Err(error) => {
                tracing::warn!(%error, "libvirt does not answer; vmkeepd waits for it, and so do its jobs")
            }
        }
    }
    watched.bring_up().await;
    loop {
        match events.recv().await {
            Ok(Event::Connected { generation, .. }) if generation > 1 => {
                watched.reconnected(generation).await
            }
            Ok(
                Event::IoError { domain, .. } | Event::Lifecycle { domain, what: Lifecycle::Suspended, .. },
            ) if watched.engine.holder(&domain.uuid.to_string()).is_none() => {
                watched.orphans.free_one(DomainRef { id: DomainId(domain.uuid), name: domain.name });
            }
            Ok(Event::Lifecycle { what: Lifecycle::Started | Lifecycle::Stopped, .. }) => {
                watched.facts.refresh(&watched.libvirt, &watched.engine).await;
            }
            Ok(_) => {}
            // Some events were missed, a reconnection perhaps among them.
            Err(RecvError::Lagged(_)) => watched.reconnected(0).await,
            Err(RecvError::Closed) => return,
        }
    }
}

impl Watched {
    async fn bring_up(&self) {
        self.phase.send_replace(DaemonPhase::Recovering);
        // Nothing comes before the guests.
        self.orphans.free();
        let freed = self.set_free().await;
        self.learn_versions();
        self.facts.refresh(&self.libvirt, &self.engine).await;
        match self.engine.recover().await {
            Ok(recovery) => {
                tracing::info!(
                    resumed = recovery.resumed.len(),
                    parked = recovery.parked.len(),
                    "jobs were taken over"
                );
            }
            Err(fault) => {
                // Reads still work, and the next start tries again; new jobs on top of unknown ones must not begin.
                tracing::error!(%fault, "the jobs could not be taken over; vmkeepd takes no requests");
                return;
            }
        }
        self.facts.refresh(&self.libvirt, &self.engine).await;
        for one in freed {
            record(&self.engine, one).await;
        }
        if let Some(boot) = this_boot() {
            reboot::start_again(&self.engine, &self.world, &boot).await;
        }
        self.phase.send_if_modified(|phase| {
            let ready = *phase == DaemonPhase::Recovering;
            if ready {
                *phase = DaemonPhase::Ready;
            }
            ready
        });
        tokio::spawn(crate::retention::watch(self.engine.clone()));
        self.reconcile();
        super::notify::tell(super::notify::READY);
        tracing::info!("vmkeepd is ready");
    }

    async fn reconnected(&self, generation: u64) {
        tracing::info!(generation, "libvirt is back");
        self.orphans.free();
        let freed = self.set_free().await;
        self.learn_versions();
        self.facts.refresh(&self.libvirt, &self.engine).await;
        for one in freed {
            record(&self.engine, one).await;
        }
        self.reconcile();
    }

    /// Compares the journals with the world. What is a job's that goes on is settled by that job; the rest is told, and guests
    /// with a pull of nobody's are looked after.
    fn reconcile(&self) {
        let (libvirt, engine, config) = (self.libvirt.clone(), self.engine.clone(), self.config.clone());
        let orphans = self.orphans.clone();
        tokio::spawn(async move {
            match leftovers::around(&libvirt, engine.store(), &config).await {
                Ok(found) => {
                    leftovers::tell(&found);
                    orphans.guard(&found);
                }
                Err(fault) => tracing::warn!(%fault, "what jobs have left is not known"),
            }
        });
    }

    /// Asked for beforehand, because the first question may take libvirt seconds, and a job's plan needs the answer.
    fn learn_versions(&self) {
        let (libvirt, engine, facts) = (self.libvirt.clone(), self.engine.clone(), self.facts.clone());
        tokio::spawn(async move {
            match libvirt.environment().await {
                Ok(_) => facts.refresh(&libvirt, &engine).await,
                Err(error) => tracing::debug!(%error, "the hypervisor's version is not known"),
            }
        });
    }

    /// The guest-safety pass. A job that this process drives knows what it holds and goes on by itself; to resume its
    /// guest in the middle of a pivot would be to saw at its branch. Every other domain is closed to jobs until it has
    /// been seen to, which may be long after this has returned.
    async fn set_free(&self) -> Vec<Freed> {
        let claim = |domain: &DomainRef| {
            // Closed already: somebody is at it.
            let subject = domain.id.to_string();
            self.engine.closed(&subject).is_none() && self.engine.close(&subject, not_free(domain))
        };
        let pass = safety::pass(&self.world, &self.store, safety::PATIENCE, &claim).await;
        for (domain, _) in &pass.free {
            self.engine.open(&domain.id.to_string());
        }
        for (domain, act) in pass.waiting {
            if self.is_seen_to(&domain).await {
                tracing::warn!(domain = %domain.name, "the guest is not thawed yet: its job and the watchdog go on trying");
                act.abort();
                self.engine.open(&domain.id.to_string());
                continue;
            }
            let engine = self.engine.clone();
            tokio::spawn(async move {
                let freed = act.await.ok().flatten();
                engine.open(&domain.id.to_string());
                tracing::info!(domain = %domain.name, "the domain answers again");
                if let Some(freed) = freed {
                    record(&engine, freed).await;
                }
            });
        }
        pass.free.into_iter().filter_map(|(_, freed)| freed).collect()
    }

    /// Whether a guest that does not answer is only frozen, and by a job that goes on. An agent may be silent for good, and
    /// thawing the guest is that job's own next act, and the watchdog's; whatever else the job has under way on the domain must
    /// not wait for it.
    async fn is_seen_to(&self, domain: &DomainRef) -> bool {
        let Ok(Some(marker)) = self.world.hypervisor.marker(&domain.id).await else { return false };
        let Ok(job) = marker.job.parse::<JobId>() else { return false };
        if marker.store != self.store || marker.hold != Some(Hold::Frozen) {
            return false;
        }
        matches!(self.engine.store().job(job).await, Ok(Some(row)) if row.ended.is_none())
    }
}

fn not_free(domain: &DomainRef) -> Fault {
    Fault::transient(
        codes::CANNOT_LOCK_MACHINE,
        "reserve the domain",
        &domain.name,
        "an earlier job may have left its guest paused or frozen, and it does not answer, so that it could not be set \
         free yet",
    )
    .remedy(
        "vmkeepd goes on trying. See what keeps its QEMU: a process that is stopped (state T in `ps`) or waits for \
         storage (state D)",
    )
}

/// Into the journal of the job that held the guest; where that takes nothing any more, into the host's own.
async fn record(engine: &Engine, one: Freed) {
    let job = one.job.as_deref().and_then(|job| job.parse::<JobId>().ok());
    if let Some(job) = job
        && engine.intervened(job, one.act.clone(), one.outcome.clone()).await.is_ok()
    {
        return;
    }
    let store = &**engine.store();
    let told =
        crate::guests::intervened(store, &one.domain, one.job.as_deref(), &one.act, &one.outcome).await;
    if let Err(error) = told {
        tracing::warn!(domain = %one.domain.name, %error, "what was done for the guest could not be written down");
    }
}

//! Following libvirt: waiting for it, and seeing to the guests whenever it comes back.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch as channel;
use vmkeep_libvirt::Event;
use vmkeep_libvirt::event::Lifecycle;
use vmkeep_steps::snapshot::World;
use vmkeep_workflow::{Engine, JobId};

use super::safety::{self, Freed};
use crate::api::types::DaemonPhase;
use crate::environment::Facts;
use crate::hypervisor::Libvirt;

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
        self.facts.refresh(&self.libvirt, &self.engine).await;
        let freed = safety::pass(&self.world, &self.store, &|_| false).await;
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
        self.record(freed).await;
        self.phase.send_if_modified(|phase| {
            let ready = *phase == DaemonPhase::Recovering;
            if ready {
                *phase = DaemonPhase::Ready;
            }
            ready
        });
        super::notify::tell(super::notify::READY);
        tracing::info!("vmkeepd is ready");
    }

    /// A job that this process drives knows what it holds and goes on by itself; to resume its guest in the middle of
    /// a pivot would be to saw at its branch. Everything else is set free as at the start.
    async fn reconnected(&self, generation: u64) {
        tracing::info!(generation, "libvirt is back");
        self.facts.refresh(&self.libvirt, &self.engine).await;
        let parked: Vec<JobId> = self.engine.parked().into_iter().map(|(job, _)| job).collect();
        let busy = |domain: &vmkeep_steps::hypervisor::DomainId| {
            self.engine.holder(&domain.to_string()).is_some_and(|job| !parked.contains(&job))
        };
        let freed = safety::pass(&self.world, &self.store, &busy).await;
        self.record(freed).await;
    }

    async fn record(&self, freed: Vec<Freed>) {
        for one in freed {
            let Some(job) = one.job.as_deref().and_then(|job| job.parse::<JobId>().ok()) else { continue };
            if let Err(fault) = self.engine.intervened(job, one.act, one.outcome).await {
                tracing::warn!(%job, %fault, "what was done for the guest could not be written into its job's journal");
            }
        }
    }
}

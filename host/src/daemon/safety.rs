//! The guest-safety pass: guests that a job of ours froze or suspended are set free before anything else happens.
//!
//! Whether a paused or frozen guest is ours to set free is read from the domain itself: the job wrote its store's id and
//! the hold into the live definition before it acted. So the pass needs no journal, cannot touch what an operator or
//! another program holds, and works with a store that can only be read.

use std::time::Duration;

use vmkeep_steps::hypervisor::{DomainId, DomainRef};
use vmkeep_steps::snapshot::World;
use vmkeep_steps::snapshot::safety::{Release, release};

/// How often, and how far apart, a guest is tried that could not be set free at once.
const TRIES: u32 = 30;
const APART: Duration = Duration::from_secs(1);

/// What was done to one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// The guest.
    pub(super) domain: DomainRef,
    /// The job that held it, by the domain's own word.
    pub(super) job: Option<String>,
    /// What was done.
    pub(super) act: String,
    /// How it went.
    pub(super) outcome: String,
}

/// Sets every guest free that a job of this store holds, except those that `busy` says are being worked on by this
/// very process. What could not be done is in the log and in the answer.
pub(super) async fn pass(
    world: &World,
    store: &str,
    busy: &(dyn Fn(&DomainId) -> bool + Sync),
) -> Vec<Freed> {
    let domains = match world.hypervisor.domains().await {
        Ok(domains) => domains,
        Err(error) => {
            tracing::error!(%error, "the guest-safety pass could not list the domains");
            return Vec::new();
        }
    };
    let tasks =
        domains.into_iter().filter(|domain| !busy(&domain.id)).map(|domain| one(world, store, domain));
    futures_util::future::join_all(tasks).await.into_iter().flatten().collect()
}

async fn one(world: &World, store: &str, domain: DomainRef) -> Option<Freed> {
    let job = holding_job(world, &domain.id).await;
    for attempt in 1..=TRIES {
        let (act, outcome) = match release(world, store, &domain.id).await {
            Ok(Release::NotHeld) => return None,
            Ok(Release::Thawed) => ("thawed the guest".to_owned(), "done".to_owned()),
            Ok(Release::Resumed { redefined }) if redefined.is_empty() => {
                ("resumed the guest".to_owned(), "done".to_owned())
            }
            Ok(Release::Resumed { redefined }) => (
                format!(
                    "made the definition name what QEMU writes to ({}), then resumed the guest",
                    redefined.join(", ")
                ),
                "done".to_owned(),
            ),
            Ok(Release::Waiting) if attempt < TRIES => {
                tokio::time::sleep(APART).await;
                continue;
            }
            Err(error) if attempt < TRIES && error.is_transient() => {
                tracing::warn!(domain = %domain.name, %error, "a guest that we hold could not be set free yet");
                tokio::time::sleep(APART).await;
                continue;
            }
            Ok(Release::Waiting) => ("resume the guest".to_owned(), "libvirt's own job goes on".to_owned()),
            Err(error) => ("set the guest free".to_owned(), format!("failed: {error}")),
        };
        if outcome == "done" {
            tracing::warn!(domain = %domain.name, act, "a guest that a job of ours held was set free");
        } else {
            tracing::error!(domain = %domain.name, act, outcome, "a guest that a job of ours holds could not be set free");
        }
        return Some(Freed { domain, job, act, outcome });
    }
    None
}

async fn holding_job(world: &World, domain: &DomainId) -> Option<String> {
    world.hypervisor.observe(domain).await.ok()?.marker.map(|marker| marker.job)
}

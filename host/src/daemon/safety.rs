//! The guest-safety pass: guests that a job of ours froze or suspended are set free before anything else happens.
//!
//! Whether a paused or frozen guest is ours to set free is read from the domain itself: the job wrote its store's id and
//! the hold into the live definition before it acted. So the pass needs no journal, cannot touch what an operator or
//! another program holds, and works with a store that can only be read.
//!
//! **Each domain is a fault domain of its own, and the pass ends in time.** The note is read without asking QEMU. Only
//! where it says that we hold the guest (or where not even the note could be read) is anybody waited for, by a task that
//! goes on until the guest is free; the pass itself waits for these tasks for a while and hands out those that are not
//! done. Whoever calls it closes such a domain before ([`Claim`]): a job that went on there could suspend its guest
//! again for a reason, and be crossed in the middle of it.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use vmkeep_steps::hypervisor::{DomainRef, Trouble};
use vmkeep_steps::snapshot::World;
use vmkeep_steps::snapshot::safety::{Release, release};

/// How long the pass waits for those who do not answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How far apart the tries are, and how often the log is told that they go on.
const APART: Duration = Duration::from_millis(500);
const TELL: Duration = Duration::from_secs(60);
/// Notes that are read at the same time.
const AT_ONCE: usize = 8;

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

/// Asked before anything is done about a domain: whether it is the pass's to do.
pub(super) type Claim<'a> = &'a (dyn Fn(&DomainRef) -> bool + Sync);

/// The domains that were claimed.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// Those that are free, each with what had to be done for it.
    pub(super) free: Vec<(DomainRef, Option<Freed>)>,
    /// Those that do not answer yet, each with the task that goes on trying.
    pub(super) waiting: Vec<(DomainRef, JoinHandle<Option<Freed>>)>,
}

/// Sets every guest free that a job of this store holds and that `claim` leaves to the pass; waits no longer than
/// `patience` for those who do not answer.
pub(super) async fn pass(world: &World, store: &str, patience: Duration, claim: Claim<'_>) -> Pass {
    let mut pass = Pass::default();
    let domains = match world.hypervisor.domains().await {
        Ok(domains) => domains,
        Err(error) => {
            tracing::error!(%error, "the guest-safety pass could not list the domains");
            return pass;
        }
    };
    let looks = domains.into_iter().map(|domain| async move {
        let held = is_held(world, store, &domain).await;
        held.then_some(domain)
    });
    let held: Vec<Option<DomainRef>> =
        futures_util::stream::iter(looks).buffer_unordered(AT_ONCE).collect().await;
    let mut acts = Vec::new();
    for domain in held.into_iter().flatten().filter(|domain| claim(domain)) {
        let act = set_free(world.clone(), store.to_owned(), domain.clone());
        acts.push((domain, tokio::spawn(act)));
    }
    let deadline = Instant::now() + patience;
    for (domain, mut act) in acts {
        match tokio::time::timeout_at(deadline, &mut act).await {
            Ok(ended) => pass.free.push((domain, ended.ok().flatten())),
            Err(_) => {
                tracing::error!(domain = %domain.name, "a guest that a job of ours may hold does not answer; it is tried on");
                pass.waiting.push((domain, act));
            }
        }
    }
    pass
}

/// Whether a domain has to be seen to: its note says so, or cannot be read.
async fn is_held(world: &World, store: &str, domain: &DomainRef) -> bool {
    match world.hypervisor.marker(&domain.id).await {
        Ok(marker) => marker.is_some_and(|marker| marker.store == store && marker.hold.is_some()),
        Err(error) if error.trouble == Trouble::NoSuchDomain => false,
        Err(error) => {
            tracing::warn!(domain = %domain.name, %error, "whether a job of ours holds the guest is not known yet");
            true
        }
    }
}

/// Tries until the guest is free, or cannot be set free by trying again. What was done is in the log and in the answer;
/// nothing if nothing had to be.
async fn set_free(world: World, store: String, domain: DomainRef) -> Option<Freed> {
    let mut job = None;
    let mut told: Option<Instant> = None;
    loop {
        if job.is_none() {
            job = world.hypervisor.marker(&domain.id).await.ok().flatten().map(|marker| marker.job);
        }
        let (act, outcome) = match release(&world, &store, &domain.id).await {
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
            Ok(Release::Waiting) => {
                later(&mut told, &domain, "libvirt's own job goes on").await;
                continue;
            }
            Err(error) if error.trouble == Trouble::NoSuchDomain => return None,
            Err(error) if error.is_transient() => {
                later(&mut told, &domain, &error.message).await;
                continue;
            }
            Err(error) => ("set the guest free".to_owned(), format!("failed: {error}")),
        };
        if outcome == "done" {
            tracing::warn!(domain = %domain.name, act, "a guest that a job of ours held was set free");
        } else {
            tracing::error!(domain = %domain.name, act, outcome, "a guest that a job of ours holds could not be set free");
        }
        return Some(Freed { domain, job, act, outcome });
    }
}

async fn later(told: &mut Option<Instant>, domain: &DomainRef, why: &str) {
    if told.is_none_or(|at| at.elapsed() >= TELL) {
        *told = Some(Instant::now());
        tracing::warn!(domain = %domain.name, why, "a guest that we hold could not be set free yet");
    }
    tokio::time::sleep(APART).await;
}

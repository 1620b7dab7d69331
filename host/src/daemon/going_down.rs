//! The host goes down while backup jobs of libvirt's go on.
//!
//! A vmkeepd that is restarted leaves them alone: the next one goes on within the same point in time. With the host they are lost
//! in any case, and until then they are in the way: beside one libvirt neither saves a guest nor migrates it, and
//! `libvirt-guests`, which does that for every guest when a host goes down, would leave it to be cut off. So each is ended before
//! vmkeepd ends, and its job is told why its point in time is lost.
//!
//! **How the two are told apart.** systemd says `stopping` from the moment when its shutdown has been queued, which is before it
//! stops the first unit; `systemctl` asks it over a socket of its own and needs no bus. A manager that does not say so, or none,
//! means a restart. That vmkeepd is stopped before `libvirt-guests` does its work is the unit's matter (`After=`, since units
//! are stopped in the reverse order; `packaging/systemd`).

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::task::JoinSet;
use vmkeep_steps::backup::end::end;
use vmkeep_steps::hypervisor::{DomainRef, HvResult, Trouble};
use vmkeep_steps::snapshot::World;
use vmkeep_steps::snapshot::disk::scratch_job;
use vmkeep_workflow::{Engine, JobId};

/// How long systemd may take to say how it is.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How long all pulls together may take to end. The unit's time to stop is longer.
const ENDED_WITHIN: Duration = Duration::from_secs(45);

/// Whether the host goes down, and not vmkeepd alone.
pub(super) async fn is_it() -> bool {
    let mut ask = tokio::process::Command::new("systemctl");
    ask.arg("is-system-running").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(ANSWERS_WITHIN, ask.output()).await {
        // Its status is that of a system that is well.
        Ok(Ok(answer)) => says_so(&answer.stdout),
        Ok(Err(error)) => {
            tracing::debug!(%error, "there is no systemd to ask whether the host goes down");
            false
        }
        Err(_) => {
            tracing::warn!(
                "systemd does not say whether the host goes down; it is taken for a restart of vmkeepd"
            );
            false
        }
    }
}

fn says_so(answer: &[u8]) -> bool {
    answer.trim_ascii() == b"stopping"
}

/// Ends every pull of a vmkeep's on this host; each is an event of its job.
pub(super) async fn end_pulls(world: &World, engine: &Engine) {
    if tokio::time::timeout(ENDED_WITHIN, end_all(world, engine)).await.is_err() {
        tracing::error!(
            "a backup job could not be ended in time; its guest can neither be saved nor migrated"
        );
    }
}

async fn end_all(world: &World, engine: &Engine) {
    let domains = match world.hypervisor.domains().await {
        Ok(domains) => domains,
        Err(error) => {
            tracing::error!(%error, "backup jobs could not be ended before the host goes down");
            return;
        }
    };
    // Each by itself: one that does not answer holds up no other.
    let mut ends = JoinSet::new();
    for domain in domains {
        let (world, engine) = (world.clone(), engine.clone());
        ends.spawn(async move {
            match end_of(&world, &domain).await {
                Ok(false) => {}
                Ok(true) => tell(&engine, &domain).await,
                Err(e) if matches!(e.trouble, Trouble::NoSuchDomain | Trouble::NotRunning) => {}
                Err(error) => {
                    tracing::error!(domain = %domain.name, %error, "its backup job could not be ended before the host goes down");
                }
            }
        });
    }
    while ends.join_next().await.is_some() {}
}

/// Ends the pull of a domain, if it has one of a vmkeep's.
async fn end_of(world: &World, domain: &DomainRef) -> HvResult<bool> {
    let seen = world.hypervisor.observe_from_outside(&domain.id).await?;
    let open = seen.qemu.into_iter().flat_map(|qemu| qemu.open);
    let scratch: Vec<PathBuf> = open.filter(|path| scratch_job(path).is_some()).collect();
    if scratch.is_empty() {
        return Ok(false);
    }
    end(world, &domain.id, &scratch).await?;
    Ok(true)
}

/// Into the journal of the job that has lost its point in time by it, else into the host's own.
async fn tell(engine: &Engine, domain: &DomainRef) {
    let act = "ended the backup job because the host goes down: beside it the guest could be neither saved nor migrated";
    tracing::warn!(domain = %domain.name, act, "for the host's shutdown");
    let job: Option<JobId> = engine.holder(&domain.id.to_string());
    if let Some(job) = job
        && engine.intervened(job, act.to_owned(), "done".to_owned()).await.is_ok()
    {
        return;
    }
    let job = job.map(|job| job.to_string());
    let told = crate::guests::intervened(&**engine.store(), domain, job.as_deref(), act, "done").await;
    if let Err(error) = told {
        tracing::warn!(domain = %domain.name, %error, "what was done could not be written down");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_manager_that_says_so_means_the_hosts_end() {
        assert!(says_so(b"stopping\n"));
        for other in ["running\n", "degraded\n", "starting\n", "maintenance\n", "offline\n", "unknown\n", ""]
        {
            assert!(!says_so(other.as_bytes()), "{other}");
        }
    }
}

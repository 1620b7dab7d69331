//! Whether a call that was cut off can still take effect.
//!
//! libvirt executes calls of clients that are gone: a snapshot queued behind a QEMU that stood still was taken minutes
//! after its client had been killed. "It is not there" therefore means nothing until it can no longer come. That is
//! the case when (a) libvirt is busy with the domain neither by a call nor by an asynchronous job, and (b) no call of
//! ours can still be queued. Both questions of (a) are needed: the first does not see a save in progress, and the
//! second waits 30 s behind a call.

use std::time::Duration;

use vmkeep_workflow::Verdict;

use crate::hypervisor::{Control, DomainId, HvError, Hypervisor, Trouble};

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fence {
    /// Nothing can take effect any more.
    Closed,
    /// Something is going on, or may yet begin.
    Open(String),
}

/// A call that takes longer than this is no mere look at the domain.
const LOOK_MS: u64 = 1500;

/// How often a domain that is being looked at is asked again, and how far apart.
const AGAIN: (u32, Duration) = (60, Duration::from_millis(40));

/// What libvirt is doing with a domain at this moment, if anything. Whoever merely looks at it (monitoring does so all
/// the time) makes it busy for some milliseconds; that does not count.
///
/// # Errors
/// When the hypervisor could not be asked.
pub async fn busy(hypervisor: &dyn Hypervisor, domain: &DomainId) -> Result<Option<String>, HvError> {
    // A domain that is off, or gone, has no call in progress.
    let gone = |e: &HvError| matches!(e.trouble, Trouble::NotRunning | Trouble::NoSuchDomain);
    let (mut looks, mut lost) = (0, 0);
    loop {
        match hypervisor.control(domain).await {
            Ok(Control::Idle) => {}
            Ok(Control::Busy { for_ms }) if for_ms < LOOK_MS && looks < AGAIN.0 => {
                looks += 1;
                tokio::time::sleep(AGAIN.1).await;
                continue;
            }
            Ok(Control::Busy { for_ms }) => {
                return Ok(Some(format!("libvirt has been busy with the domain for {for_ms} ms")));
            }
            Ok(Control::Broken) => return Ok(Some("libvirt cannot talk to QEMU".to_owned())),
            Err(e) if gone(&e) => return Ok(None),
            Err(e) => return Err(e),
        }
        match hypervisor.domain_job(domain).await {
            Ok(job) => return Ok(job.map(|job| format!("libvirt's job \"{}\" is going on", job.operation))),
            Err(e) if gone(&e) => return Ok(None),
            // A backup that is being begun may say so too, between two of its calls to QEMU.
            Err(e) if e.trouble == Trouble::JobLost && lost < LOST_LOOKS.0 => {
                lost += 1;
                tokio::time::sleep(LOST_LOOKS.1).await;
            }
            Err(e) if e.trouble == Trouble::JobLost => return Ok(Some(never_ends())),
            Err(e) => return Err(e),
        }
    }
}

/// How often, and how far apart, libvirt must say in a row that it has lost a job.
const LOST_LOOKS: (u32, Duration) = (20, Duration::from_millis(250));

/// What libvirt never ends by itself. Seen with libvirt 9.0.
pub const LOST: &str =
    "libvirt was killed while it began a backup, and now waits for ever for a job that is not there";
/// What ends it.
pub const LOST_REMEDY: &str = "stop libvirtd, take async='backup' and asyncStarted out of <job> in the domain's file below \
    /run/libvirt/qemu, and start libvirtd: the guest runs on; or shut the domain down, restart libvirtd, and start it again";

fn never_ends() -> String {
    format!("{LOST}: {LOST_REMEDY}")
}

/// Whether libvirt has locked the domain for ever. Not known of one that libvirt is busy with at this moment.
///
/// # Errors
/// When the hypervisor could not be asked.
pub async fn is_locked(hypervisor: &dyn Hypervisor, domain: &DomainId) -> Result<bool, HvError> {
    match hypervisor.control(domain).await {
        Ok(Control::Idle) => {}
        Ok(_) => return Ok(false),
        Err(e) if matches!(e.trouble, Trouble::NotRunning | Trouble::NoSuchDomain) => return Ok(false),
        Err(e) => return Err(e),
    }
    match hypervisor.domain_job(domain).await {
        Err(e) if e.trouble == Trouble::JobLost => {
            Ok(busy(hypervisor, domain).await?.is_some_and(|what| what == never_ends()))
        }
        // What else keeps it from answering is somebody else's to tell.
        _ => Ok(false),
    }
}

/// Whether a call of ours can still take effect on a domain.
///
/// # Errors
/// When the hypervisor could not be asked.
pub async fn fence(hypervisor: &dyn Hypervisor, domain: &DomainId) -> Result<Fence, HvError> {
    match busy(hypervisor, domain).await? {
        Some(what) if what != never_ends() => return Ok(Fence::Open(what)),
        // Behind a lock that nothing ends nobody's call begins any more.
        Some(_) | None => {}
    }
    Ok(hypervisor.stragglers(domain).await?.map_or(Fence::Closed, Fence::Open))
}

/// The verdict on a step whose effect is not there: not done, if it can no longer come.
pub(crate) async fn not_done<T>(
    hypervisor: &dyn Hypervisor,
    domain: &DomainId,
    still_running: bool,
) -> Verdict<T> {
    if still_running {
        return Verdict::InFlight("the call has not returned".to_owned());
    }
    match fence(hypervisor, domain).await {
        Ok(Fence::Closed) => Verdict::NotDone,
        Ok(Fence::Open(what)) => Verdict::InFlight(what),
        Err(e) => super::cannot_look(&e),
    }
}

/// The verdict on a step as long as something is still under way on the domain; none when the world may be looked at.
pub(crate) async fn under_way<T>(
    hypervisor: &dyn Hypervisor,
    domain: &DomainId,
    still_running: bool,
) -> Option<Verdict<T>> {
    if still_running {
        return Some(Verdict::InFlight("the call has not returned".to_owned()));
    }
    match busy(hypervisor, domain).await {
        Ok(None) => None,
        Ok(Some(what)) => Some(Verdict::InFlight(what)),
        Err(e) => Some(super::cannot_look(&e)),
    }
}

//! Whether a call that was cut off can still take effect.
//!
//! libvirt executes calls of clients that are gone. Three kinds of calls can still come:
//! 1. one of this process that has not returned;
//! 2. one of this process whose answer was lost with the connection, as long as that very libvirtd lives;
//! 3. one of this process's *predecessor*, which nobody remembers. If libvirtd is younger than this process it has
//!    forgotten it. Otherwise it may be queued behind another call for libvirt's lock timeout, counted from our start.
//!
//! **A shortcut, and why it holds.** A call is queued only while another one holds the domain's lock: whoever waits is
//! woken the moment the lock is free. So while libvirt says, again and again over a second, that neither a call nor an
//! asynchronous job is active, nobody can be waiting; and a request that had not been picked up at all when its client
//! died was picked up before ours, since they are served in order. Then the rest of the lock timeout need not be
//! waited for. The shortcut is not taken where a guest's agent is involved: its queue is a different one that libvirt
//! does not tell about.

use std::time::{Duration, Instant};

use vmkeep_libvirt::flags::{JobStatsFlags, XmlFlags};
use vmkeep_libvirt::xml::DomainXml;
use vmkeep_libvirt::{Control, InFlightCall, Status};
use vmkeep_steps::hypervisor::{DomainId, HvResult, Trouble};

use super::{Libvirt, calls};

/// libvirt's lock timeout, and a little more for the call to notice.
const LOCK_TIMEOUT: Duration = Duration::from_secs(31);
/// How often, and how far apart, the domain must be found quiet.
const LOOKS: u32 = 10;
const APART: Duration = Duration::from_millis(100);
/// A question that takes longer had to wait for the lock.
const AT_ONCE: Duration = Duration::from_millis(500);

impl Libvirt {
    pub(super) async fn find_stragglers(&self, domain: &DomainId) -> HvResult<Option<String>> {
        let in_flight = self.client.in_flight();
        for call in in_flight.list() {
            match standing(&call, domain) {
                Standing::Unconcerned => {}
                Standing::MayCome(what) => return Ok(Some(what)),
                Standing::Over => in_flight.forget(call.id),
            }
        }
        self.predecessor(domain).await
    }

    async fn predecessor(&self, domain: &DomainId) -> HvResult<Option<String>> {
        let age = self.began.at.elapsed();
        if forgotten(age, self.daemon_start(), self.began.tick) || self.is_quiet(domain).await? {
            return Ok(None);
        }
        Ok(Some(format!("a call from before vmkeepd's start {} s ago may still be queued", age.as_secs())))
    }

    /// When libvirtd was started, in the kernel's ticks since boot.
    fn daemon_start(&self) -> Option<u64> {
        match self.client.status() {
            Status::Connected { instance, .. } => instance.map(|daemon| daemon.process.start),
            Status::Disconnected { .. } => None,
        }
    }

    /// The shortcut.
    async fn is_quiet(&self, domain: &DomainId) -> HvResult<bool> {
        let definition = self.look_at(domain, "agent", |d| d.xml(XmlFlags::NONE)).await;
        let disk = match definition {
            Ok(text) => match DomainXml::parse(&text) {
                Ok(xml) if !xml.has_agent_channel() => xml.disks().into_iter().next().map(|disk| disk.target),
                _ => return Ok(false),
            },
            // Without a domain there is no lock, and nothing that a queued call could find.
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(true),
            Err(e) => return Err(e),
        };
        for look in 0..LOOKS {
            if look > 0 {
                tokio::time::sleep(APART).await;
            }
            match self.glance(domain, "control", |d| d.control()).await {
                Ok(Control::Idle) => {
                    let stats = self.look_at(domain, "job", |d| d.job_stats(JobStatsFlags::NONE)).await?;
                    if stats.phase.is_active() {
                        return Ok(false);
                    }
                }
                Ok(_) => return Ok(false),
                Err(e) if e.trouble == Trouble::NotRunning => {
                    let Some(disk) = disk.clone() else { return Ok(false) };
                    let asked = Instant::now();
                    let answer = self.look_at(domain, "size", move |d| d.block_info(&disk)).await;
                    if answer.is_err() || asked.elapsed() > AT_ONCE {
                        return Ok(false);
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}

/// What a call in flight means for a domain.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    /// It changes nothing, or another domain.
    Unconcerned,
    /// It may still take effect, and why.
    MayCome(String),
    /// Older than the lock timeout: it is being executed, which the domain's job shows, or it never will be.
    Over,
}

fn standing(call: &InFlightCall, domain: &DomainId) -> Standing {
    if !calls::changes(&call.what) || !may_concern(call, domain) {
        return Standing::Unconcerned;
    }
    let (what, secs) = (&call.what, call.age.as_secs());
    if !call.answer_lost {
        return Standing::MayCome(format!("the call \"{what}\" has not returned for {secs} s"));
    }
    if call.age < LOCK_TIMEOUT {
        return Standing::MayCome(format!("the answer to \"{what}\" was lost {secs} s ago"));
    }
    Standing::Over
}

/// Whether what our predecessor asked for is forgotten by now, without a look at the domain: too old to be queued still,
/// or asked of a libvirtd that is gone.
fn forgotten(age: Duration, daemon_start: Option<u64>, our_start: Option<u64>) -> bool {
    age >= LOCK_TIMEOUT || matches!((daemon_start, our_start), (Some(daemon), Some(ours)) if daemon > ours)
}

/// Whether a call is about a domain. Calls that make or replace definitions belong to none, and name the one they mean;
/// whatever says nothing at all may concern everybody.
fn may_concern(call: &InFlightCall, domain: &DomainId) -> bool {
    match call.domain {
        Some(uuid) => uuid == domain.0,
        None => match call.what.split_whitespace().find_map(|word| word.parse::<uuid::Uuid>().ok()) {
            Some(uuid) => uuid == domain.0,
            None => true,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use uuid::Uuid;

    use super::*;

    fn call(what: &str, domain: Option<Uuid>, secs: u64, answer_lost: bool) -> InFlightCall {
        InFlightCall {
            id: 1,
            what: what.to_owned(),
            domain,
            instance: None,
            since: SystemTime::now(),
            age: Duration::from_secs(secs),
            abandoned: answer_lost,
            answer_lost,
        }
    }

    #[test]
    fn a_call_may_come_until_it_has_returned_or_can_no_longer_be_queued() {
        let (ours, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let of = |call: InFlightCall| standing(&call, &DomainId(ours));
        let may_come = |standing| matches!(standing, Standing::MayCome(_));
        assert!(may_come(of(call("pivot", Some(ours), 0, false))));
        assert!(
            may_come(of(call("pivot", Some(ours), 3600, false))),
            "it has not returned, however old it is"
        );
        assert!(may_come(of(call("pivot", Some(ours), 30, true))));
        assert_eq!(of(call("pivot", Some(ours), 31, true)), Standing::Over);
        assert_eq!(of(call("pivot", Some(other), 0, false)), Standing::Unconcerned);
        assert_eq!(of(call("look: state", Some(ours), 0, false)), Standing::Unconcerned);
        assert!(may_come(of(call(&format!("define the disks of {ours}"), None, 0, false))));
        assert_eq!(of(call(&format!("define the disks of {other}"), None, 0, false)), Standing::Unconcerned);
        assert!(may_come(of(call("whatever", None, 0, false))), "it may concern everybody");
    }

    #[test]
    fn what_a_predecessor_asked_for_is_over_with_the_lock_timeout_or_with_its_libvirtd() {
        let secs = Duration::from_secs;
        assert!(forgotten(secs(31), None, None));
        assert!(!forgotten(secs(30), None, None));
        assert!(forgotten(secs(0), Some(8), Some(7)), "libvirtd is younger than we are");
        assert!(!forgotten(secs(0), Some(7), Some(7)), "in doubt it is not");
        assert!(!forgotten(secs(0), Some(8), None));
    }
}

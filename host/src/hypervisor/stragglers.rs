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

use std::time::Duration;

use vmkeep_libvirt::flags::{JobStatsFlags, XmlFlags};
use vmkeep_libvirt::xml::DomainXml;
use vmkeep_libvirt::{Control, Status};
use vmkeep_steps::hypervisor::{DomainId, HvResult, Trouble};

use super::{Libvirt, calls};

/// libvirt's lock timeout, and a little more for the call to notice.
const LOCK_TIMEOUT: Duration = Duration::from_secs(31);
/// How often, and how far apart, the domain must be found quiet.
const LOOKS: u32 = 10;
const APART: Duration = Duration::from_millis(100);

impl Libvirt {
    pub(super) async fn find_stragglers(&self, domain: &DomainId) -> HvResult<Option<String>> {
        let in_flight = self.client.in_flight();
        for call in in_flight.list() {
            if !calls::changes(&call.what) || !may_concern(&call, domain) {
                continue;
            }
            if !call.answer_lost {
                return Ok(Some(format!(
                    "the call \"{}\" has not returned for {} s",
                    call.what,
                    call.age.as_secs()
                )));
            }
            if call.age < LOCK_TIMEOUT {
                return Ok(Some(format!(
                    "the answer to \"{}\" was lost {} s ago",
                    call.what,
                    call.age.as_secs()
                )));
            }
            // Older than the lock timeout: it is executed, which the domain's job shows, or it never will be.
            in_flight.forget(call.id);
        }
        self.predecessor(domain).await
    }

    async fn predecessor(&self, domain: &DomainId) -> HvResult<Option<String>> {
        let age = self.began.at.elapsed();
        if age >= LOCK_TIMEOUT || self.daemon_is_younger() || self.is_quiet(domain).await? {
            return Ok(None);
        }
        Ok(Some(format!("a call from before vmkeepd's start {} s ago may still be queued", age.as_secs())))
    }

    fn daemon_is_younger(&self) -> bool {
        match (self.client.status(), self.began.tick) {
            (Status::Connected { instance: Some(daemon), .. }, Some(tick)) => daemon.process.start > tick,
            _ => false,
        }
    }

    /// The shortcut.
    async fn is_quiet(&self, domain: &DomainId) -> HvResult<bool> {
        let definition = self.look_at(domain, "agent", |d| d.xml(XmlFlags::NONE)).await;
        match definition {
            Ok(text) => match DomainXml::parse(&text) {
                Ok(xml) if !xml.has_agent_channel() => {}
                _ => return Ok(false),
            },
            // Without a domain there is no lock, and nothing that a queued call could find.
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(true),
            Err(e) => return Err(e),
        }
        for look in 0..LOOKS {
            if look > 0 {
                tokio::time::sleep(APART).await;
            }
            match self.glance(domain, "control", |d| d.control()).await {
                Ok(Control::Idle) => {}
                Ok(_) => return Ok(false),
                // Off: its lock cannot be looked at, so the shortcut is not open.
                Err(e) if e.trouble == Trouble::NotRunning => return Ok(false),
                Err(e) => return Err(e),
            }
            let stats = self.look_at(domain, "job", |d| d.job_stats(JobStatsFlags::NONE)).await?;
            if stats.phase.is_active() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Whether a call is about a domain. Calls that make or replace definitions belong to none, and name the one they mean;
/// whatever says nothing at all may concern everybody.
fn may_concern(call: &vmkeep_libvirt::InFlightCall, domain: &DomainId) -> bool {
    match call.domain {
        Some(uuid) => uuid == domain.0,
        None => match call.what.split_whitespace().find_map(|word| word.parse::<uuid::Uuid>().ok()) {
            Some(uuid) => uuid == domain.0,
            None => true,
        },
    }
}

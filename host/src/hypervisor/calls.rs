//! How calls are made: what kind they are, and how long they are waited for.
//!
//! libvirt itself waits 30 s for a domain's job lock and then says so; every limit here is longer, so that libvirt's
//! own, certain answer is heard wherever there is one. A limit that passes means [`Trouble::TimedOut`], in doubt for
//! what changes something; the call itself goes on in its thread and stays in the list of calls in flight.

use std::time::Duration;

use vmkeep_libvirt::{Connection, Domain, ProcessId, Result as LibvirtResult};
use vmkeep_steps::hypervisor::{DomainId, HvError, HvResult, Trouble};

use super::{Libvirt, trouble};

/// What only looks, and may have to wait for a lock.
const LOOK: Duration = Duration::from_secs(40);
/// What answers at once, whatever the domain does.
const GLANCE: Duration = Duration::from_secs(10);
/// What changes something.
const CHANGE: Duration = Duration::from_secs(120);
/// How long the guest's agent is waited for, in seconds.
pub(super) const AGENT_SECS: i32 = 10;

/// Calls whose names begin so change nothing: that they are in flight means nothing to anybody.
const LOOKS: &str = "look: ";

/// Whether a call in flight may change something.
pub(super) fn changes(what: &str) -> bool {
    !what.starts_with(LOOKS)
}

/// A process, as text: number, start and boot.
pub(super) fn instance_name(process: &ProcessId) -> String {
    format!("{}@{}@{}", process.pid, process.start, process.boot)
}

impl Libvirt {
    /// Looks at something that is no domain.
    pub(super) async fn look<T, F>(&self, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> LibvirtResult<T> + Send + 'static,
    {
        let name = format!("{LOOKS}{what}");
        let call = self.client.call(&name, f);
        heard(tokio::time::timeout(LOOK, call).await, what, LOOK, false)
    }

    /// Looks at a domain.
    pub(super) async fn look_at<T, F>(&self, domain: &DomainId, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> LibvirtResult<T> + Send + 'static,
    {
        let handle = self.client.domain(domain.0);
        let name = format!("{LOOKS}{what}");
        let call = handle.call(&name, f);
        heard(tokio::time::timeout(LOOK, call).await, what, LOOK, false)
    }

    /// Looks at what is known without waiting for anybody.
    pub(super) async fn glance<T, F>(&self, domain: &DomainId, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> LibvirtResult<T> + Send + 'static,
    {
        let handle = self.client.domain(domain.0);
        let name = format!("{LOOKS}{what}");
        let call = handle.urgent(&name, f);
        heard(tokio::time::timeout(GLANCE, call).await, what, GLANCE, false)
    }

    /// Changes a domain.
    pub(super) async fn change<T, F>(&self, domain: &DomainId, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> LibvirtResult<T> + Send + 'static,
    {
        let handle = self.client.domain(domain.0);
        let call = handle.call(what, f);
        heard(tokio::time::timeout(CHANGE, call).await, what, CHANGE, true)
    }

    /// Changes something that is no domain yet.
    pub(super) async fn change_anything<T, F>(&self, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> LibvirtResult<T> + Send + 'static,
    {
        let call = self.client.call(what, f);
        heard(tokio::time::timeout(CHANGE, call).await, what, CHANGE, true)
    }

    /// Changes a domain, for as long as it takes.
    pub(super) async fn change_patiently<T, F>(&self, domain: &DomainId, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> LibvirtResult<T> + Send + 'static,
    {
        self.client.domain(domain.0).call(what, f).await.map_err(|e| trouble::doubtful(&e))
    }

    /// Brings a guest to safety: never waits behind other calls of ours.
    pub(super) async fn urgent<T, F>(&self, domain: &DomainId, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> LibvirtResult<T> + Send + 'static,
    {
        let handle = self.client.domain(domain.0);
        let call = handle.urgent(what, f);
        heard(tokio::time::timeout(CHANGE, call).await, what, CHANGE, true)
    }
}

fn heard<T>(
    answer: Result<LibvirtResult<T>, tokio::time::error::Elapsed>,
    what: &str,
    limit: Duration,
    changes: bool,
) -> HvResult<T> {
    match answer {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) if changes => Err(trouble::doubtful(&error)),
        Ok(Err(error)) => Err(trouble::of(&error)),
        Err(_) => {
            let text = format!("no answer within {} s: {what}", limit.as_secs());
            let error = HvError::new(Trouble::TimedOut, text);
            Err(if changes { error.in_doubt() } else { error })
        }
    }
}

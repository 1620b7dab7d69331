//! How calls are made: what kind they are, and how long they are waited for.
//!
//! libvirt itself waits 30 s for a domain's job lock and then says so; every limit here is longer, so that libvirt's
//! own, certain answer is heard wherever there is one. A limit that passes means [`Trouble::TimedOut`], in doubt for
//! what changes something; the call itself goes on in its thread and stays in the list of calls in flight.
//!
//! **A domain that does not answer must cost nobody but itself.** A call that asks a QEMU which stands still hangs until
//! it answers or ends, and keeps one of libvirtd's threads busy; it has five to begin with, and seen were five such calls
//! that made it deaf for half a minute. So looks at one domain come one after the other, and while one of them has waited
//! for so long that nobody can be answering there, no other is sent after it: the caller hears at once what it would hear
//! half a minute later. The call that hangs is the one that notices when the domain answers again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

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
const AGENT_SECS: i32 = 10;

/// Calls whose names begin so change nothing: that they are in flight means nothing to anybody.
const LOOKS: &str = "look: ";
/// Those of them that wait for nobody.
const GLANCES: &str = "look: at once: ";
/// Those of them that wait for the guest's agent.
const AGENT: &str = "look: agent: ";
/// A look that has not returned by then shows that nobody answers.
const SILENT: Duration = Duration::from_secs(10);

/// Whether a call in flight may change something.
pub(super) fn changes(what: &str) -> bool {
    !what.starts_with(LOOKS)
}

/// Whose turn it is to look at which domain.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns(Arc<Mutex<HashMap<Uuid, Arc<Semaphore>>>>);

impl Turns {
    fn of(&self, domain: Uuid) -> Arc<Semaphore> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody uses are those of domains that may be gone.
        all.retain(|id, turns| *id == domain || Arc::strong_count(turns) > 1);
        Arc::clone(all.entry(domain).or_insert_with(|| Arc::new(Semaphore::new(1))))
    }
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
        self.silent(domain, LOOKS, SILENT, what)?;
        let turn = self.turn(domain, what).await?;
        let handle = self.client.domain(domain.0);
        let name = format!("{LOOKS}{what}");
        let call = handle.call(&name, move |d| {
            // Kept until the call returns, whoever still waits for it.
            let _turn = turn;
            f(d)
        });
        heard(tokio::time::timeout(LOOK, call).await, what, LOOK, false)
    }

    /// Asks a guest's agent, which libvirt does besides everything else.
    pub(super) async fn ask_agent(&self, domain: &DomainId, command: &'static str) -> HvResult<String> {
        let handle = self.client.domain(domain.0);
        let name = format!("{AGENT}{command}");
        let call = handle.call(&name, move |d| d.agent_command(command, Some(AGENT_SECS)));
        heard(tokio::time::timeout(LOOK, call).await, "ask the agent", LOOK, false)
    }

    async fn turn(&self, domain: &DomainId, what: &str) -> HvResult<OwnedSemaphorePermit> {
        let turns = self.turns.of(domain.0);
        match tokio::time::timeout(SILENT, turns.acquire_owned()).await {
            Ok(Ok(turn)) => Ok(turn),
            _ => Err(no_answer(what, SILENT)),
        }
    }

    /// Refuses to send another call after one that has not returned for so long.
    fn silent(&self, domain: &DomainId, kind: &str, limit: Duration, what: &str) -> HvResult<()> {
        let hung = self.client.in_flight().of_domain(domain.0).into_iter();
        let hung = hung.filter(|call| {
            let of_kind = call.what.starts_with(kind) && !call.what.starts_with(AGENT);
            of_kind && !call.answer_lost && call.age >= limit
        });
        match hung.map(|call| call.age).max() {
            Some(age) => Err(no_answer(what, age)),
            None => Ok(()),
        }
    }

    /// Looks at what is known without waiting for anybody.
    pub(super) async fn glance<T, F>(&self, domain: &DomainId, what: &str, f: F) -> HvResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> LibvirtResult<T> + Send + 'static,
    {
        self.silent(domain, GLANCES, GLANCE, what)?;
        let handle = self.client.domain(domain.0);
        let name = format!("{GLANCES}{what}");
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
            let error = no_answer(what, limit);
            Err(if changes { error.in_doubt() } else { error })
        }
    }
}

fn no_answer(what: &str, since: Duration) -> HvError {
    HvError::new(Trouble::TimedOut, format!("no answer within {} s: {what}", since.as_secs()))
}

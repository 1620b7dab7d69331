//! Calls that have not come back.
//!
//! Invariant: from before a call is made until its effect can no longer come, it is in this list, no
//! matter what became of whoever asked for it. That is: until it returned; and if it returned because
//! the connection broke, until the daemon that took it is gone, because a daemon goes on executing the
//! calls of clients it has lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;
use uuid::Uuid;

use crate::instance::DaemonInstance;

/// A call that has not come back, or whose answer was lost.
#[derive(Debug, Clone)]
pub struct InFlightCall {
    /// Counts up.
    pub id: u64,
    /// What was asked for, in the caller's words.
    pub what: String,
    /// The domain it is about.
    pub domain: Option<Uuid>,
    /// The daemon that took it.
    pub instance: Option<DaemonInstance>,
    /// When it was made.
    pub since: SystemTime,
    /// How long ago that is.
    pub age: Duration,
    /// Nobody waits for it any more.
    pub abandoned: bool,
    /// The connection broke before its answer came; the daemon may still execute it.
    pub answer_lost: bool,
}

#[derive(Debug)]
struct Record {
    what: String,
    domain: Option<Uuid>,
    instance: Option<DaemonInstance>,
    since: SystemTime,
    started: Instant,
    abandoned: Arc<AtomicBool>,
    answer_lost: bool,
}

#[derive(Debug, Default)]
struct Shared {
    records: Mutex<BTreeMap<u64, Record>>,
    next: AtomicU64,
    changed: Notify,
}

/// The list of calls that have not come back. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct InFlight(Arc<Shared>);

/// Keeps a call on the list while it runs; held by the thread that makes it.
pub(crate) struct Guard {
    list: InFlight,
    id: u64,
    keep: bool,
    pub(crate) abandoned: Arc<AtomicBool>,
}

impl Guard {
    /// The answer was lost: the call stays on the list until its daemon is gone.
    pub(crate) fn answer_lost(mut self) {
        self.keep = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut records = self.list.records();
        if self.keep {
            if let Some(record) = records.get_mut(&self.id) {
                record.answer_lost = true;
            }
        } else {
            records.remove(&self.id);
        }
        drop(records);
        self.list.0.changed.notify_waiters();
    }
}

impl InFlight {
    fn records(&self) -> MutexGuard<'_, BTreeMap<u64, Record>> {
        // The map is never left half changed, so a panic elsewhere does not spoil it.
        self.0.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, what: &str, domain: Option<Uuid>, instance: Option<DaemonInstance>) -> Guard {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed) + 1;
        let abandoned = Arc::new(AtomicBool::new(false));
        let record = Record {
            what: what.to_owned(),
            domain,
            instance,
            since: SystemTime::now(),
            started: Instant::now(),
            abandoned: Arc::clone(&abandoned),
            answer_lost: false,
        };
        self.records().insert(id, record);
        Guard { list: self.clone(), id, keep: false, abandoned }
    }

    /// All calls that have not come back and can still take effect.
    pub fn list(&self) -> Vec<InFlightCall> {
        let mut records = self.records();
        // A lost call ends with the daemon that took it.
        records.retain(|_, r| {
            !r.answer_lost || r.instance.as_ref().is_none_or(|daemon| daemon.process.is_alive())
        });
        records
            .iter()
            .map(|(id, r)| InFlightCall {
                id: *id,
                what: r.what.clone(),
                domain: r.domain,
                instance: r.instance.clone(),
                since: r.since,
                age: r.started.elapsed(),
                abandoned: r.abandoned.load(Ordering::Relaxed),
                answer_lost: r.answer_lost,
            })
            .collect()
    }

    /// Those about one domain.
    pub fn of_domain(&self, uuid: Uuid) -> Vec<InFlightCall> {
        self.list().into_iter().filter(|c| c.domain == Some(uuid)).collect()
    }

    /// How many are about one domain.
    pub fn count(&self, uuid: Uuid) -> usize {
        self.of_domain(uuid).len()
    }

    /// Takes a lost call off the list: the caller has other proof that it cannot take effect (another
    /// QEMU process, or libvirt's lock timeout has passed). A call that still runs stays.
    pub fn forget(&self, id: u64) {
        self.records().retain(|i, r| *i != id || !r.answer_lost);
        self.0.changed.notify_waiters();
    }

    /// Waits until no call about the domain is in flight; `false` when that took longer than `limit`.
    pub async fn idle(&self, uuid: Uuid, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.until(|list| list.count(uuid) == 0)).await.is_ok()
    }

    /// Waits until nobody is in a call any more, whatever may still come of those whose answer was lost.
    pub(crate) async fn all_back(&self) {
        self.until(|list| list.list().iter().all(|call| call.answer_lost)).await;
    }

    async fn until(&self, so: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.0.changed.notified();
            if so(self) {
                return;
            }
            // The end of a daemon is not announced to this list, so look now and then.
            let _ = tokio::time::timeout(Duration::from_millis(200), changed).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::ProcessId;

    #[test]
    fn a_call_is_listed_until_it_returned() {
        let list = InFlight::default();
        let uuid = Uuid::from_u128(7);
        let guard = list.begin("save", Some(uuid), None);
        guard.abandoned.store(true, Ordering::Relaxed);
        let calls = list.of_domain(uuid);
        assert_eq!((calls.len(), calls[0].what.as_str(), calls[0].abandoned), (1, "save", true));
        assert_eq!(list.count(Uuid::from_u128(8)), 0);
        drop(guard);
        assert_eq!(list.count(uuid), 0);
    }

    #[test]
    fn a_call_whose_answer_was_lost_is_listed_until_its_daemon_is_gone() {
        let mut daemon = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let instance =
            DaemonInstance { process: ProcessId::of(daemon.id()).unwrap(), name: "libvirtd".into() };
        let list = InFlight::default();
        let uuid = Uuid::from_u128(7);
        list.begin("save", Some(uuid), Some(instance)).answer_lost();
        assert!(list.of_domain(uuid)[0].answer_lost);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        assert_eq!(list.count(uuid), 0);
    }

    #[tokio::test]
    async fn waiting_for_quiet_ends_when_the_last_call_returns() {
        let list = InFlight::default();
        let uuid = Uuid::from_u128(7);
        let guard = list.begin("save", Some(uuid), None);
        assert!(!list.idle(uuid, Duration::from_millis(20)).await);
        let waiting = tokio::spawn({
            let list = list.clone();
            async move { list.idle(uuid, Duration::from_secs(60)).await }
        });
        drop(guard);
        assert!(waiting.await.unwrap());
    }
}

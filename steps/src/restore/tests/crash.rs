//! The process ends before or after every event, and what the next one makes of it.
//!
//! A life is a runtime of its own. At the chosen event its store stops answering for ever, as it does to a process that
//! is dead; then the runtime is taken down, and another one begins with the same store and the same world.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, broadcast};
use vmkeep_workflow::journal::{Append, AppendError, Appended, JobFilter, Record, Reserve, StoreError};
use vmkeep_workflow::{JobSummary, Seq, StreamId};

use super::*;

struct Mortal {
    inner: Arc<MemoryStore>,
    left: AtomicUsize,
    /// Whether the last event is still stored.
    after: bool,
    died: Notify,
}

impl Mortal {
    fn dead(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
    }

    fn gone<T>(&self) -> Result<T, StoreError> {
        Err(StoreError::Io("the process is dead".to_owned()))
    }
}

#[async_trait::async_trait]
impl EventStore for Mortal {
    fn id(&self) -> uuid::Uuid {
        self.inner.id()
    }

    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match left {
            Ok(n) if n > 1 => return self.inner.append(append).await,
            Ok(_) if self.after => {
                self.inner.append(append).await?;
            }
            _ => {}
        }
        self.died.notify_one();
        std::future::pending().await
    }

    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        if self.dead() { self.gone() } else { self.inner.put_row(job, row, value).await }
    }

    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
        if self.dead() { self.gone() } else { self.inner.clear_rows(job).await }
    }

    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        self.inner.read(stream, from, limit).await
    }
    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError> {
        self.inner.last(stream).await
    }
    async fn streams(&self) -> Result<Vec<StreamId>, StoreError> {
        self.inner.streams().await
    }
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        self.inner.jobs(filter).await
    }
    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError> {
        self.inner.job(job).await
    }
    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError> {
        self.inner.key(key).await
    }
    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        self.inner.rows(job).await
    }
    fn subscribe(&self) -> broadcast::Receiver<Record> {
        self.inner.subscribe()
    }
    async fn reserve(&self) -> Result<Reserve, StoreError> {
        self.inner.reserve().await
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

enum Life {
    /// It died at its event; the job may have been accepted.
    Died,
    /// It reached the end of the job.
    Ended,
}

/// One life that ends at its `events`-th event.
fn live(host: &Host, inner: &Arc<MemoryStore>, request: &JobRequest, events: usize, after: bool) -> Life {
    let runtime = runtime();
    let life = runtime.block_on(async {
        let left = AtomicUsize::new(events);
        let store = Arc::new(Mortal { inner: inner.clone(), left, after, died: Notify::new() });
        let engine = host.engine(store.clone());
        let whole = async {
            engine.recover().await.unwrap();
            let job = engine.request(request.clone()).await.unwrap();
            engine.wait(job).await.unwrap();
        };
        tokio::select! {
            () = whole => Life::Ended,
            () = store.died.notified() => Life::Died,
        }
    });
    // What is in the middle of a system call finishes it, as it does when a process is killed.
    runtime.shutdown_timeout(Duration::from_secs(60));
    life
}

/// Another life, which comes to the end of whatever job there is.
fn finish(host: &Host, inner: &Arc<MemoryStore>, request: &JobRequest) -> JobView {
    runtime().block_on(async {
        let engine = host.engine(inner.clone());
        engine.recover().await.unwrap();
        let job = engine.request(request.clone()).await.unwrap();
        engine.wait(job).await.unwrap();
        engine.view(job).await.unwrap()
    })
}

fn at_every_event(prepare: impl Fn() -> Host, more: &Value, check: impl Fn(&str, &Host, &JobView, DomainId)) {
    for after in [false, true] {
        for event in 1.. {
            assert!(event < 200, "the job never ends");
            let host = prepare();
            let inner = Arc::new(MemoryStore::new());
            let (mut request, id) = request(host.options(more));
            request.key = Some("the same request".to_owned());
            let life = live(&host, &inner, &request, event, after);
            let view = finish(&host, &inner, &request);
            let side = if after { "after" } else { "before" };
            check(&format!("{side} event {event}"), &host, &view, id);
            if matches!(life, Life::Ended) {
                break;
            }
        }
    }
}

#[test]
fn a_restore_that_dies_at_any_event_ends_whole_and_memory_never_meets_disks_that_moved_on() {
    at_every_event(
        || Host::new().with_original(),
        &json!({ "then": "running" }),
        |case, host, view, id| {
            assert_eq!(view.summary.status, JobStatus::Succeeded, "{case}: {:?}", view.summary.fault);
            host.assert_restored(id);
            let running = host.hypervisor.inner().running[&id].clone();
            assert!(!running.paused, "{case}");
            assert!(running.pulled || !running.memory, "{case}: its cables are in");
        },
    );
}

#[test]
fn a_cold_restore_that_dies_at_any_event_ends_whole() {
    at_every_event(Host::new, &json!({ "cold": true }), |case, host, view, id| {
        assert_eq!(view.summary.status, JobStatus::Succeeded, "{case}: {:?}", view.summary.fault);
        host.assert_restored(id);
        assert!(host.hypervisor.inner().running.is_empty(), "{case}");
    });
}

#[test]
fn a_restore_that_fails_and_dies_at_any_event_of_its_way_back_leaves_nothing() {
    at_every_event(
        || {
            let host = Host::new().with_original();
            host.hypervisor.inner().fail = vec!["start_from_memory"; 10];
            host
        },
        &json!({ "then": "running" }),
        |case, host, view, _| {
            let fault = &view.summary.fault;
            assert_eq!(view.summary.status, JobStatus::RolledBack, "{case}: {fault:?}");
            let left: Vec<_> = host.everything().into_iter().filter(|p| p.contains("images/")).collect();
            assert_eq!(left, Vec::<String>::new(), "{case}");
            assert_eq!(host.hypervisor.inner().defined.len(), 1, "{case}: only the original");
        },
    );
}

//! For tests: the process ends before or after an event, and another one takes over.
//!
//! A life is a runtime of its own. At the chosen event its store stops answering for ever, as it does to a process that
//! is dead; then the runtime is taken down, and another one begins with the same store and the same world.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, broadcast};
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{Config, JobView, Limits, NoEnvironment, SystemClock};
use vmkeep_workflow::journal::{Append, AppendError, Appended, JobFilter, Record, Reserve, StoreError};
use vmkeep_workflow::{Engine, EventStore, JobId, JobRequest, JobSummary, Registry, Seq, StreamId};

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

/// An engine for one test: with no limits but its own, and a panic for whatever is fatal.
pub(crate) fn engine(store: Arc<dyn EventStore>, registry: Registry) -> Engine {
    Engine::new(Config {
        store,
        registry,
        clock: Arc::new(SystemClock),
        environment: Arc::new(NoEnvironment),
        limits: Limits::default(),
        on_fatal: Arc::new(|why| panic!("{why}")),
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub(crate) enum Life {
    /// It died at its event; the job may have been accepted.
    Died,
    /// It reached the end of the job.
    Ended,
}

/// One life that ends at its `events`-th event.
pub(crate) fn live(
    engine: &dyn Fn(Arc<dyn EventStore>) -> Engine,
    inner: &Arc<MemoryStore>,
    request: &JobRequest,
    events: usize,
    after: bool,
) -> Life {
    let runtime = runtime();
    let life = runtime.block_on(async {
        let left = AtomicUsize::new(events);
        let store = Arc::new(Mortal { inner: inner.clone(), left, after, died: Notify::new() });
        let engine = engine(store.clone());
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
pub(crate) fn finish(
    engine: &dyn Fn(Arc<dyn EventStore>) -> Engine,
    inner: &Arc<MemoryStore>,
    request: &JobRequest,
) -> JobView {
    runtime().block_on(async {
        let engine = engine(inner.clone());
        engine.recover().await.unwrap();
        let job = engine.request(request.clone()).await.unwrap();
        engine.wait(job).await.unwrap();
        engine.view(job).await.unwrap()
    })
}

//! The journal of a job that is recorded: it tells of each append and each note once it is durable, so that it is known for every
//! instant what a restart finds in it.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{Config, Limits, NoEnvironment, SystemClock};
use vmkeep_workflow::journal::{Append, AppendError, Appended, JobFilter, Record, Reserve, StoreError};
use vmkeep_workflow::{
    Actor, Engine, EventStore, IfBusy, JobId, JobRequest, JobStatus, JobSummary, Registry, Seq, StreamId,
    Subject,
};

use crate::workload::say;

/// A journal that tells what is durable in it.
pub(crate) struct Telling(pub(crate) Arc<MemoryStore>);

#[async_trait]
impl EventStore for Telling {
    fn id(&self) -> uuid::Uuid {
        self.0.id()
    }

    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let records: Vec<String> =
            append.records.iter().map(|bytes| String::from_utf8(bytes.clone()).unwrap()).collect();
        let told = json!({
            "stream": append.stream.to_string(), "expected": append.expected.0, "records": records,
            "summary": append.summary,
        });
        let appended = self.0.append(append).await?;
        say(&format!("append {told}"));
        Ok(appended)
    }

    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        self.0.put_row(job, row, value).await?;
        say(&format!("row {}", json!({ "job": job.to_string(), "row": row, "value": value })));
        Ok(())
    }

    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
        self.0.clear_rows(job).await?;
        say(&format!("clear {}", json!({ "job": job.to_string() })));
        Ok(())
    }

    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        self.0.read(stream, from, limit).await
    }

    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError> {
        self.0.last(stream).await
    }

    async fn streams(&self) -> Result<Vec<StreamId>, StoreError> {
        self.0.streams().await
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        self.0.jobs(filter).await
    }

    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError> {
        self.0.job(job).await
    }

    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError> {
        self.0.key(key).await
    }

    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        self.0.rows(job).await
    }

    fn subscribe(&self) -> broadcast::Receiver<Record> {
        self.0.subscribe()
    }

    async fn reserve(&self) -> Result<Reserve, StoreError> {
        self.0.reserve().await
    }
}

pub(crate) fn who() -> Actor {
    Actor { who: "test".to_owned(), why: None }
}

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

/// Goes on with the job of a journal, if there is one, or takes it back. How it ended.
pub(crate) async fn go_on(
    store: Arc<dyn EventStore>,
    registry: Registry,
    cancels: bool,
) -> Option<JobSummary> {
    let jobs = store.jobs(&JobFilter::default()).await.unwrap();
    let job = jobs.first().map(|job| job.job)?;
    let engine = engine(store, registry);
    engine.recover().await.unwrap();
    if cancels {
        // One that is over cannot be cancelled any more.
        let _ = engine.cancel(job, who()).await;
    }
    Some(engine.wait(job).await.unwrap())
}

/// Lets a job of a workflow succeed, and tells what becomes durable.
pub(crate) async fn succeed(workflow: &'static str, registry: Registry) {
    let engine = engine(Arc::new(Telling(Arc::new(MemoryStore::new()))), registry);
    let request = JobRequest {
        workflow: workflow.into(),
        subject: Subject { id: "copy".to_owned(), label: "copy".to_owned() },
        options: Value::Null,
        key: None,
        by: who(),
        if_busy: IfBusy::Refuse,
        limits: Vec::new(),
        retry_of: None,
    };
    let job = engine.request(request).await.unwrap();
    let summary = engine.wait(job).await.unwrap();
    assert_eq!(summary.status, JobStatus::Succeeded, "{:?}", summary.fault);
}

/// A journal of which so much was durable. What it says of files is put into words of those that are there.
pub(crate) async fn filled<'a>(
    lines: impl Iterator<Item = &'a str>,
    translate: impl Fn(&mut Value, JobId),
) -> Arc<MemoryStore> {
    let store = Arc::new(MemoryStore::new());
    for line in lines {
        let Some((what, told)) = line.split_once(' ') else { continue };
        if !["append", "row", "clear"].contains(&what) {
            continue;
        }
        let told: Value = serde_json::from_str(told).unwrap();
        if what == "append" {
            let summary: Option<JobSummary> = serde_json::from_value(told["summary"].clone()).unwrap();
            let records = told["records"].as_array().unwrap().iter().map(|record| {
                let mut record: Value = serde_json::from_str(record.as_str().unwrap()).unwrap();
                if let Some(summary) = &summary {
                    translate(&mut record, summary.job);
                }
                record.to_string().into_bytes()
            });
            let append = Append {
                stream: StreamId::from(told["stream"].as_str().unwrap().to_owned()),
                expected: Seq(told["expected"].as_u64().unwrap()),
                records: records.collect(),
                summary: summary.clone(),
                key: None,
            };
            store.append(append).await.unwrap();
            continue;
        }
        let job: JobId = told["job"].as_str().unwrap().parse().unwrap();
        if what == "clear" {
            store.clear_rows(job).await.unwrap();
            continue;
        }
        let mut value = told["value"].clone();
        translate(&mut value, job);
        store.put_row(job, told["row"].as_str().unwrap(), &value).await.unwrap();
    }
    store
}

/// Says of files in a journal what they are now. Whose journal it is.
pub(crate) fn translated(lines: &mut [String], translate: impl Fn(&mut Value, JobId)) -> Option<JobId> {
    let mut job = None;
    for line in lines {
        let Some((what, told)) = line.split_once(' ') else { continue };
        if !["append", "row", "clear"].contains(&what) {
            continue;
        }
        let mut told: Value = serde_json::from_str(told).unwrap();
        let summary: Option<JobSummary> = serde_json::from_value(told["summary"].clone()).unwrap();
        job = summary.map(|summary| summary.job).or_else(|| told["job"].as_str()?.parse().ok()).or(job);
        let Some(job) = job else { continue };
        for record in told["records"].as_array_mut().into_iter().flatten() {
            let mut inner: Value = serde_json::from_str(record.as_str().unwrap()).unwrap();
            translate(&mut inner, job);
            *record = json!(inner.to_string());
        }
        translate(&mut told["value"], job);
        *line = format!("{what} {told}");
    }
    job
}

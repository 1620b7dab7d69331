//! Durable appends per second, against a plain file that grows by append and fdatasync, on the same file system.
//!
//! Records have 300 bytes; each append carries the job's summary, as the engine's do, so projections are on.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use vmkeep_store::{EngineName, Store, StoreConfig, open};
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::Append;
use vmkeep_workflow::{Actor, JobStatus, JobSummary, Subject, WorkflowName};

use crate::table::{Row, Samples, Target};

const ROUNDS: usize = 9;
const SLICE: Duration = Duration::from_secs(1);
const WRITERS: usize = 64;

/// An event of 300 bytes.
fn event(n: u64) -> Vec<u8> {
    let head = format!(
        r#"{{"v":1,"at":"2026-01-01T00:00:00Z","body":{{"type":"bench","data":{{"n":{n:020},"fill":""#
    );
    let tail = r#""}}}"#;
    format!("{head}{}{tail}", "x".repeat(300 - head.len() - tail.len())).into_bytes()
}

fn summary(job: JobId) -> JobSummary {
    let now = Timestamp::now();
    JobSummary {
        job,
        workflow: WorkflowName::from("snapshot"),
        subject: Subject { id: job.to_string(), label: "web1".to_owned() },
        title: "back up web1 live: two disks and its memory".to_owned(),
        status: JobStatus::Running,
        by: Actor { who: "admin".to_owned(), why: None },
        requested: now,
        updated: now,
        ended: None,
        seq: Seq(0),
        steps: 24,
        steps_done: 0,
        fault: None,
        items: Vec::new(),
    }
}

/// Appends to a new file, each durable before the next; appends per second.
fn plain_file(dir: &Path) -> f64 {
    let path = dir.join("plain.log");
    let _ = std::fs::remove_file(&path);
    let mut file = File::options().create_new(true).append(true).open(&path).expect("a file");
    file.sync_all().expect("synced");
    let (begin, mut count) = (Instant::now(), 0_u64);
    while begin.elapsed() < SLICE {
        count += 1;
        file.write_all(&event(count)).expect("written");
        file.sync_data().expect("synced");
    }
    count as f64 / begin.elapsed().as_secs_f64()
}

async fn write(store: Arc<dyn Store>, until: Instant) -> u64 {
    let job = JobId::new();
    let (stream, mut seq, mut summary) = (StreamId::job(job), Seq(0), summary(job));
    while Instant::now() < until {
        summary.seq = seq.next();
        summary.updated = Timestamp::now();
        summary.steps_done += 1;
        let append = Append {
            stream: stream.clone(),
            expected: seq,
            records: vec![event(seq.0)],
            summary: Some(summary.clone()),
            key: None,
        };
        seq = store.append(append).await.expect("appended").last;
    }
    seq.0
}

/// So many writers, each with a job of its own; appends per second of all together.
async fn writers(store: &Arc<dyn Store>, count: usize) -> f64 {
    let begin = Instant::now();
    let tasks: Vec<_> = (0..count).map(|_| tokio::spawn(write(Arc::clone(store), begin + SLICE))).collect();
    let mut total = 0;
    for task in tasks {
        total += task.await.expect("a writer");
    }
    total as f64 / begin.elapsed().as_secs_f64()
}

pub fn run() -> Vec<Row> {
    // Beside what cargo builds: never a RAM disk, as /tmp may be.
    let folder =
        tempfile::Builder::new().prefix("store-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let make = |engine: EngineName| {
        let path = folder.path().join(engine.to_string());
        open(&StoreConfig { engine, ..StoreConfig::new(path) }).expect("a store")
    };
    let (store, second) = (make(EngineName::Sqlite), make(EngineName::Sled));
    let (mut file, mut one, mut many) = (Vec::new(), Vec::new(), Vec::new());
    let (mut sled_one, mut sled_many) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let results = [
            plain_file(folder.path()),
            runtime.block_on(writers(&store, 1)),
            runtime.block_on(writers(&store, WRITERS)),
            runtime.block_on(writers(&second, 1)),
            runtime.block_on(writers(&second, WRITERS)),
        ];
        // The first round warms up.
        if round > 0 {
            file.push(results[0]);
            one.push(results[1]);
            many.push(results[2]);
            sled_one.push(results[3]);
            sled_many.push(results[4]);
        }
    }
    let (file, one, many) = (Samples(file), Samples(one), Samples(many));
    let (sled_one, sled_many) = (Samples(sled_one), Samples(sled_many));
    vec![
        Row::against(
            "store: sqlite, 1 writer",
            "appends/s",
            &one,
            "a file, append + fdatasync",
            &file,
            Target::AtLeast(0.8),
        ),
        Row::against(
            "store: sqlite, 64 writers",
            "appends/s",
            &many,
            "sqlite, 1 writer",
            &one,
            Target::AtLeast(5.0),
        ),
        Row::beside("store: sled, 1 writer", "appends/s", &sled_one, "sqlite, 1 writer", &one),
        Row::beside("store: sled, 64 writers", "appends/s", &sled_many, "sqlite, 64 writers", &many),
    ]
}

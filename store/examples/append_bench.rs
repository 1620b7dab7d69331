//! Durable appends per second, against a plain file that grows by append and fdatasync.
//!
//! Sides alternate round by round after a warm-up, on the same file system (`--dir`, the current folder by default, which
//! must not be a RAM disk). Records have 300 bytes; each append carries the job's summary. Prints one JSON line per
//! target: `{name, value, unit, peer, peer_value, ratio, target, met}`, with the spread of the rounds; `met` is null
//! when the spread of the ratio exceeds its margin.
//!
//! ```text
//! cargo run --release -p vmkeep-store --example append_bench -- [--dir DIR] [--rounds N] [--seconds S]
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::json;
use vmkeep_store::{Options, SqliteStore};
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{Append, EventStore};
use vmkeep_workflow::{Actor, JobStatus, JobSummary, Subject, WorkflowName};

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

struct Arguments {
    dir: PathBuf,
    rounds: usize,
    time: Duration,
}

fn arguments() -> Outcome<Arguments> {
    let mut parsed = Arguments { dir: PathBuf::from("."), rounds: 7, time: Duration::from_secs(1) };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or("an option needs a value")?;
        match word.as_str() {
            "--dir" => parsed.dir = value.into(),
            "--rounds" => parsed.rounds = value.parse()?,
            "--seconds" => parsed.time = Duration::from_secs_f64(value.parse()?),
            _ => return Err(format!("unknown option {word}").into()),
        }
    }
    Ok(parsed)
}

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

/// Appends to a file of its own; appends per second.
fn file_round(dir: &Path, time: Duration) -> Outcome<f64> {
    let path = dir.join("plain.log");
    let _ = std::fs::remove_file(&path);
    let mut file = std::fs::File::options().create_new(true).append(true).open(&path)?;
    file.sync_all()?;
    let (start, mut count) = (Instant::now(), 0_u64);
    while start.elapsed() < time {
        count += 1;
        file.write_all(&event(count))?;
        file.sync_data()?;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

async fn write(store: Arc<dyn EventStore>, until: Instant) -> Outcome<u64> {
    let job = JobId::new();
    let stream = StreamId::job(job);
    let (mut seq, mut summary) = (Seq(0), summary(job));
    while Instant::now() < until {
        summary.seq = seq.next();
        summary.updated = Timestamp::now();
        summary.steps_done = u32::try_from(seq.0)?;
        let append = Append {
            stream: stream.clone(),
            expected: seq,
            records: vec![event(seq.0)],
            summary: Some(summary.clone()),
            key: None,
        };
        seq = store.append(append).await?.last;
    }
    Ok(seq.0)
}

/// So many writers, each with a job of its own; appends per second in all.
async fn store_round(store: &Arc<SqliteStore>, writers: usize, time: Duration) -> Outcome<f64> {
    let start = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|_| tokio::spawn(write(Arc::clone(store) as Arc<dyn EventStore>, start + time)))
        .collect();
    let mut count = 0;
    for task in tasks {
        count += task.await??;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// Median, least and greatest.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

fn report(name: &str, ours: &[f64], peer: &str, theirs: &[f64], target: f64) {
    let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
    let (ratio, low, high) = spread(ratios);
    let (value, value_low, value_high) = spread(ours.to_vec());
    let (peer_value, peer_low, peer_high) = spread(theirs.to_vec());
    let clear = low >= target || high < target;
    let met = clear.then_some(ratio >= target);
    println!(
        "{}",
        json!({
            "name": name, "value": value.round(), "unit": "appends/s", "peer": peer, "peer_value": peer_value.round(),
            "ratio": (ratio * 1000.0).round() / 1000.0, "target": target, "met": met,
            "rounds": ours.len(), "spread": [value_low.round(), value_high.round()],
            "peer_spread": [peer_low.round(), peer_high.round()], "ratio_spread": [low, high],
        })
    );
}

fn main() -> Outcome<()> {
    let Arguments { dir, rounds, time } = arguments()?;
    let folder = tempfile::Builder::new().prefix("append-bench").tempdir_in(dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let store = Arc::new(SqliteStore::open(folder.path().join("store"), Options::default())?);
    let (mut file, mut one, mut many) = (Vec::new(), Vec::new(), Vec::new());
    if std::env::var_os("N").is_some() {
        let n: u64 = std::env::var("N")?.parse()?;
        let job = JobId::new();
        let stream = StreamId::job(job);
        let mut sum = summary(job);
        let st = Instant::now();
        runtime.block_on(async {
            let mut seq = Seq(0);
            while seq.0 < n {
                sum.seq = seq.next();
                sum.updated = Timestamp::now();
                let a = Append {
                    stream: stream.clone(),
                    expected: seq,
                    records: vec![event(seq.0)],
                    summary: Some(sum.clone()),
                    key: None,
                };
                seq = store.append(a).await?.last;
            }
            Outcome::Ok(())
        })?;
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        let w: Vec<&str> = stat.split(' ').collect();
        let io = std::fs::read_to_string("/proc/self/io")?;
        println!(
            "wall {:.1} user {:.1} sys {:.1} us/append {}",
            st.elapsed().as_secs_f64() * 1e6 / n as f64,
            w[13].parse::<f64>()? * 1e4 / n as f64,
            w[14].parse::<f64>()? * 1e4 / n as f64,
            io.lines()
                .filter(|l| l.starts_with("wchar") || l.starts_with("syscw"))
                .collect::<Vec<_>>()
                .join(" ")
        );
        return Ok(());
    }
    if std::env::var_os("ONLY").is_some() {
        let f = file_round(folder.path(), time)?;
        let o = if std::env::var("ONLY").unwrap() == "2" {
            runtime.block_on(async {
                let n = write(store.clone() as Arc<dyn EventStore>, Instant::now() + time).await?;
                Outcome::Ok(n as f64 / time.as_secs_f64())
            })?
        } else {
            runtime.block_on(store_round(&store, 1, time))?
        };
        println!("file {f:.0} one {o:.0} {:.3}", o / f);
        return Ok(());
    }
    for round in 0..=rounds {
        let results = [
            file_round(folder.path(), time)?,
            runtime.block_on(store_round(&store, 1, time))?,
            runtime.block_on(store_round(&store, 64, time))?,
        ];
        eprintln!(
            "round {round}: file {:.0}, one writer {:.0}, 64 writers {:.0}",
            results[0], results[1], results[2]
        );
        // The first round warms up.
        if round > 0 {
            file.push(results[0]);
            one.push(results[1]);
            many.push(results[2]);
        }
    }
    report("store/sqlite append, 1 writer", &one, "plain file, append + fdatasync", &file, 0.8);
    report("store/sqlite append, 64 writers", &many, "store/sqlite append, 1 writer", &one, 5.0);
    Ok(())
}

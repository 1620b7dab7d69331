//! A full disk and I/O errors at every call of a store that changes a file: nothing acknowledged is lost, a failed fsync of the
//! journal is the last thing that the process is told, and whatever failed works again afterwards.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use replay_tests::faults::{self, Error, Fault, Lasts, Operation};
use vmkeep_store::conformance::sample::append;
use vmkeep_store::{EngineName, Store, StoreConfig, open};
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::AppendError;

use crate::stores::{Acknowledged, acknowledged, copy, judge, number, run, workshop};
use crate::workload::{Act, WRITERS, program, runtime, say, writer};

/// The exit status of a program that must not write any more.
const FATAL: i32 = 70;
/// That of one whose store does not open.
const REFUSED: i32 = 71;
/// So often an append is tried again before its writer gives up.
const TRIES: usize = 5;

/// Writers that react to failures as the engine does: they try again what was not written, read what may have been, and
/// end the process when the store can vouch for nothing any more.
pub(crate) async fn endure(settings: StoreConfig) {
    let store: Arc<dyn Store> = match open(&settings) {
        Ok(store) => store,
        Err(error) => {
            say(&format!("refused: {error}"));
            std::process::exit(REFUSED);
        }
    };
    say("open");
    let writers = (0..WRITERS).map(|n| {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            let name = writer(n);
            let Ok(mut last) = store.last(&StreamId::from(name.clone())).await.map(|last| last.0) else {
                return;
            };
            for _ in 0..6 {
                match enduring(&*store, &name, last).await {
                    Some(now) => last = now,
                    None => return,
                }
                say(&format!("ack {name} {last}"));
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    say("end");
}

async fn enduring(store: &dyn Store, name: &str, last: u64) -> Option<u64> {
    let stream = StreamId::from(name.to_owned());
    let count = 1 + last % 5;
    for _ in 0..TRIES {
        match store.append(append(name, last, count)).await {
            Ok(appended) => return Some(appended.last.0),
            Err(error @ (AppendError::Full(_) | AppendError::Rejected(_))) => {
                say(&format!("again: {error}"));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(AppendError::Unknown(why)) => {
                say(&format!("unknown: {why}"));
                match store.read(&stream, Seq(last + 1), 0).await {
                    Ok(found) if found.is_empty() => {}
                    Ok(found) => {
                        assert_eq!(found.len() as u64, count, "a part of an append");
                        return Some(last + count);
                    }
                    Err(error) => fatal(&error.to_string()),
                }
            }
            Err(error) => fatal(&error.to_string()),
        }
    }
    say("gives up");
    None
}

fn fatal(why: &str) -> ! {
    say(&format!("fatal: {why}"));
    std::process::exit(FATAL)
}

/// One run under a fault, judged. Returns what was met.
fn tried(
    faulty: &Path,
    engine: EngineName,
    (aged, before): (&Path, &Acknowledged),
    fault: Option<Fault>,
) -> Result<(Vec<Operation>, String), String> {
    let place = workshop();
    let root = place.path().join("root");
    copy(aged, &root);
    let log = place.path().join("log");
    let (program, arguments, environment) = program(&engine.to_string(), Act::Endure, &root);
    let done = Command::new("timeout")
        .arg("60")
        .arg(faulty)
        .args(faults::arguments(&log, fault, &[&root]))
        .arg(program)
        .args(arguments)
        .envs(environment)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    let met = faults::read(&log).unwrap();
    let hit = met.iter().find(|call| call.failed);
    let why = |what: String| {
        let hit = hit.map(|hit| format!("{} of {}", hit.call, hit.path.display()));
        let heard = String::from_utf8_lossy(&done.stderr);
        format!(
            "{engine}, {}, {hit:?}: {what}\n{said}\n{heard}",
            fault.map_or_else(String::new, |f| f.to_string())
        )
    };
    let lines: Vec<&str> = said.lines().collect();
    let ended = match done.status.code() {
        Some(0) if lines.contains(&"end") => "went on",
        Some(FATAL) => "ended",
        Some(REFUSED) => "refused to open",
        code => return Err(why(format!("it ended with {code:?}"))),
    };
    // What became of the pages after a failed fsync nobody can know.
    if let Some(at) =
        met.iter().position(|call| call.failed && call.call.ends_with("sync") && holds_records(call))
    {
        // What is removed is not relied on.
        let mut later =
            met[at..].iter().take_while(|call| !(call.call == "unlink" && call.path == met[at].path));
        let later = later.find(|call| call.call.contains("write") && holds_records(call));
        if let (Some(later), Lasts::Once) = (later, fault.map_or(Lasts::Once, |fault| fault.lasts)) {
            return Err(why(format!("after a failed fsync it went on with {later:?}")));
        }
    }
    let sure = acknowledged(before, lines.into_iter());
    runtime().block_on(judge(engine, &sure, &root)).map_err(why)?;
    Ok((met, ended.to_owned()))
}

/// Whether a call is about a file that holds records.
fn holds_records(call: &Operation) -> bool {
    let name = call.path.file_name().unwrap_or_default().to_string_lossy();
    ["journal.db", "journal.db-wal", "db", "head"].contains(&&*name)
}

/// What a call does to which file; one of them stands for many.
pub(crate) fn sort(call: &Operation) -> String {
    let name = call.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    format!("{} {name}", call.call)
}

/// The faults to try: all, or so many of them, of each sort of call the same number.
pub(crate) fn chosen(calls: &[Operation], default: u64) -> Vec<Fault> {
    let kinds = [
        (Error::Io, Lasts::Once),
        (Error::Io, Lasts::Broken),
        (Error::NoSpace, Lasts::Once),
        (Error::NoSpace, Lasts::Full),
    ];
    let mut sorts = BTreeMap::<String, Vec<Fault>>::new();
    for (nth, call) in (1..).zip(calls) {
        let faults = kinds.map(|(error, lasts)| Fault { nth, error, lasts });
        sorts.entry(sort(call)).or_default().extend(faults);
    }
    if std::env::var("VMKEEP_FAULTS").is_ok_and(|word| word == "all") {
        return sorts.into_values().flatten().collect();
    }
    let mut rng = Rng::with_seed(number("VMKEEP_SEED", fastrand::u64(..)));
    sorts.values_mut().for_each(|faults| rng.shuffle(faults));
    let wanted = usize::try_from(number("VMKEEP_FAULTS", default)).unwrap();
    let mut chosen = Vec::new();
    while chosen.len() < wanted && sorts.values().any(|faults| !faults.is_empty()) {
        chosen.extend(sorts.values_mut().filter_map(Vec::pop));
    }
    chosen
}

fn endures(engine: EngineName, aged: bool) {
    let place = tempfile::tempdir().unwrap();
    let faulty = place.path().join("faulty");
    faults::build(&faulty).unwrap();
    let root = place.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let said = if aged { run(engine, Act::Write, &root) } else { String::new() };
    let start = (root.as_path(), &acknowledged(&Acknowledged::new(), said.lines()));
    let (clean, _) = tried(&faulty, engine, start, None).unwrap_or_else(|why| panic!("{why}"));
    let (mut ends, mut met) = (BTreeMap::<String, usize>::new(), BTreeMap::<String, usize>::new());
    let faults = chosen(&clean, 120);
    for fault in &faults {
        let (calls, ended) =
            tried(&faulty, engine, start, Some(*fault)).unwrap_or_else(|why| panic!("{why}"));
        *ends.entry(ended).or_default() += 1;
        if let Some(hit) = calls.iter().find(|call| call.failed) {
            *met.entry(sort(hit)).or_default() += 1;
        }
    }
    println!(
        "{engine}, aged: {aged}: {} faults at {} calls: {ends:?}; met: {met:?}",
        faults.len(),
        clean.len()
    );
    assert!(met.values().sum::<usize>() * 10 > faults.len() * 8, "too few faults met anything");
}

#[test]
fn a_full_disk_or_an_io_error_at_any_call_costs_a_young_sqlite_store_nothing_that_was_acknowledged() {
    endures(EngineName::Sqlite, false);
}

#[test]
fn a_full_disk_or_an_io_error_at_any_call_costs_an_aged_sqlite_store_nothing_that_was_acknowledged() {
    endures(EngineName::Sqlite, true);
}

#[test]
fn a_full_disk_or_an_io_error_at_any_call_costs_a_young_sled_store_nothing_that_was_acknowledged() {
    endures(EngineName::Sled, false);
}

#[test]
fn a_full_disk_or_an_io_error_at_any_call_costs_an_aged_sled_store_nothing_that_was_acknowledged() {
    endures(EngineName::Sled, true);
}

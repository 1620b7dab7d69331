//! Events, exports, signed heads, plans, and the files of a store.

use std::io::Cursor;
use std::path::Path;

use uuid::Uuid;
use vmkeep_store::conformance::sample::Job;
use vmkeep_store::export::{Item, Reader, Selection, export as write_export};
use vmkeep_store::heads::{Heads, Line, Trust};
use vmkeep_store::import::import;
use vmkeep_store::verify::verify;
use vmkeep_store::{EngineName, MemoryStore, StoreConfig, open, open_read_only};
use vmkeep_workflow::EventStore;
use vmkeep_workflow::event::{Body, Event};
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::Append;
use vmkeep_workflow::plan::Plan;
use vmkeep_workflow::{replay, summary::JobSummary};

use super::{ACCEPTED, NO_TEXT, kept, refused, text};

fn now<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// Nothing that is fed may be made up anew in each run, or a seed would not repeat it.
fn fixed(job: u128) -> JobId {
    JobId::from(Uuid::from_u128(job))
}

/// The exports that are kept as golden histories.
fn histories() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("histories");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap())
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// The events of an export, as they stand in it.
fn events_of(export: &[u8]) -> Vec<Vec<u8>> {
    let mut reader = Reader::new(Cursor::new(export)).unwrap();
    let mut events = Vec::new();
    while let Some(item) = reader.next_item().unwrap() {
        if let Item::Record(record, _) = item {
            events.push(record.bytes);
        }
    }
    events
}

pub(crate) fn event_seeds() -> Vec<Vec<u8>> {
    let mut seeds = kept("event");
    let mut kinds = std::collections::HashSet::new();
    for event in histories().iter().flat_map(|export| events_of(export)) {
        let kind = serde_json::from_slice::<Event>(&event).map(|event| event.body.type_name()).unwrap_or("");
        // A few of each kind: they differ in what they hold.
        if (0..4).any(|n| kinds.insert((kind, n))) {
            seeds.push(event);
        }
    }
    seeds
}

/// What is read is written, and read again as the same; and what is written once is written the same ever after.
pub(crate) fn event(input: &[u8]) -> u64 {
    let event: Event = match serde_json::from_slice(input) {
        Ok(event) => event,
        Err(e) => return refused(&e),
    };
    let written = serde_json::to_vec(&event).unwrap();
    let again: Event = serde_json::from_slice(&written).expect("what was written is read");
    assert_eq!(again, event);
    assert_eq!(serde_json::to_vec(&again).unwrap(), written);
    ACCEPTED
}

pub(crate) fn journal_seeds() -> Vec<Vec<u8>> {
    let lines = |export: &Vec<u8>| events_of(export).join(&b'\n');
    kept("journal").into_iter().chain(histories().iter().map(lines)).collect()
}

/// Each line is an event of one job. Whatever they are, the store takes them as bytes; they are exported and read again; and
/// replaying and importing them says yes or no.
pub(crate) fn journal(input: &[u8]) -> u64 {
    let Some(text) = text(input) else { return NO_TEXT };
    let records: Vec<Vec<u8>> = text
        .split('\n')
        .filter(|line| !line.is_empty())
        .take(200)
        .map(|line| line.as_bytes().to_vec())
        .collect();
    let job = fixed(1);
    let mut summary: Option<JobSummary> = None;
    for event in records.iter().filter_map(|record| serde_json::from_slice::<Event>(record).ok()) {
        match &mut summary {
            Some(summary) => summary.apply(&event),
            None => summary = JobSummary::first(job, &event),
        }
    }
    now(async {
        let store = MemoryStore::with_id(Uuid::from_u128(1));
        let stream = StreamId::job(job);
        let append = Append { stream: stream.clone(), expected: Seq(0), records, summary, key: None };
        if let Err(error) = store.append(append).await {
            return refused(&error);
        }
        let mut exported = Vec::new();
        write_export(&store, Selection::Whole, &mut exported).await.expect("what is stored is exported");
        let stored = store.read(&stream, Seq(1), 0).await.unwrap();
        let mut reader = Reader::new(Cursor::new(&exported)).expect("an export is one");
        let mut read = Vec::new();
        while let Some(item) = reader.next_item().expect("an export is read") {
            if let Item::Record(record, _) = item {
                read.push(record);
            }
        }
        assert_eq!(read, stored, "byte for byte");
        let replayed = replay::check(&stored);
        let other = MemoryStore::with_id(store.id());
        match (import(&other, &mut Cursor::new(&exported)).await, replayed) {
            (Ok(_), replayed) => {
                let report = verify(&other).await.unwrap();
                assert!(report.is_whole(), "{:?}", report.findings);
                replayed.map_or_else(|divergence| refused(&divergence), |_| ACCEPTED)
            }
            (Err(error), _) => refused(&error),
        }
    })
}

pub(crate) fn export_seeds() -> Vec<Vec<u8>> {
    let whole = now(async {
        let store = MemoryStore::with_id(Uuid::from_u128(1));
        let mut job = Job::new();
        job.id = fixed(1);
        store.append(job.request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
        store.append(job.next(1, vec![Body::JobRecovered])).await.unwrap();
        store.append(job.refuse(2)).await.unwrap();
        vmkeep_store::burial::bury(
            &store,
            job.id,
            Default::default(),
            vmkeep_store::conformance::sample::at(3),
        )
        .await
        .unwrap();
        let mut other = Job::new();
        other.id = fixed(2);
        store.append(other.request(4, "restore", "db 'x'", None)).await.unwrap();
        let mut text = Vec::new();
        write_export(&store, Selection::Whole, &mut text).await.unwrap();
        text
    });
    kept("export").into_iter().chain([whole]).chain(histories()).collect()
}

/// What is accepted to its end is taken in, or refused with a reason; and what was taken in is whole, and given out again.
pub(crate) fn export(input: &[u8]) -> u64 {
    let mut reader = match Reader::new(Cursor::new(input)) {
        Ok(reader) => reader,
        Err(e) => return refused(&e),
    };
    let store = reader.header().store;
    loop {
        match reader.next_item() {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(e) => return refused(&e),
        }
    }
    now(async {
        let taken = MemoryStore::with_id(store);
        if let Err(error) = import(&taken, &mut Cursor::new(input)).await {
            // A pruned or cut one is accepted, and cannot be taken in.
            refused(&error);
            return ACCEPTED;
        }
        let report = verify(&taken).await.unwrap();
        assert!(report.is_whole(), "{:?}", report.findings);
        let mut text = Vec::new();
        write_export(&taken, Selection::Whole, &mut text).await.unwrap();
        let mut reader = Reader::new(Cursor::new(&text)).unwrap();
        while reader.next_item().expect("it is read again").is_some() {}
        ACCEPTED
    })
}

/// A line that is accepted comes back to the byte; a file is accepted only if each of its lines is.
pub(crate) fn heads(input: &[u8]) -> u64 {
    let lines: Vec<_> =
        input.split(|byte| *byte == b'\n').filter_map(text).map(|line| (line, Line::parse(line))).collect();
    for (text, line) in &lines {
        if let Ok(line) = line {
            assert_eq!(line.render(), *text);
        }
    }
    match Heads::read(Cursor::new(input), Trust::Named) {
        Ok(heads) => {
            let good = lines.iter().filter(|(_, line)| matches!(line, Ok(Line::Head(_)))).count();
            assert!(good >= heads.commits().len());
            assert!(!heads.commits().contains(&0));
            assert!(Heads::read(Cursor::new(input), Trust::Keys(&[])).is_err(), "nobody trusts nobody");
            ACCEPTED
        }
        Err(e) => refused(&e),
    }
}

pub(crate) fn plan_seeds() -> Vec<Vec<u8>> {
    let mut seeds = kept("plan");
    for event in histories().iter().flat_map(|export| events_of(export)) {
        if let Ok(Event { body: Body::JobPlanned(plan), .. }) = serde_json::from_slice(&event) {
            seeds.push(serde_json::to_vec(&plan).unwrap());
        }
    }
    seeds
}

/// A plan that can be made compiles, comes back, and compiles again.
pub(crate) fn plan(input: &[u8]) -> u64 {
    let plan: Plan = match serde_json::from_slice(input) {
        Ok(plan) => plan,
        Err(e) => return refused(&e),
    };
    // As it stands: its hash does not fit, mostly.
    let _ = plan.clone().compile();
    let Plan { workflow, workflow_version, title, steps, point_of_no_return, facts, .. } = plan;
    let made = match Plan::new(workflow, workflow_version, title, steps, point_of_no_return, facts) {
        Ok(made) => made,
        Err(e) => return refused(&e),
    };
    let again: Plan = serde_json::from_slice(&serde_json::to_vec(&made).unwrap()).unwrap();
    assert_eq!(again, made);
    made.compile().expect("what was made compiles");
    again.compile().expect("and so does what came back");
    ACCEPTED
}

pub(crate) fn store_config(input: &[u8]) -> u64 {
    let config: StoreConfig = match serde_json::from_slice(input) {
        Ok(config) => config,
        Err(e) => return refused(&e),
    };
    let again: StoreConfig = serde_json::from_slice(&serde_json::to_vec(&config).unwrap()).unwrap();
    assert_eq!(again, config);
    ACCEPTED
}

fn small(path: &Path) -> StoreConfig {
    StoreConfig { engine: EngineName::Sqlite, reserve: 0, ..StoreConfig::new(path) }
}

/// A new database has an id and instants of its own, so here a seed repeats the choices, and not every byte.
pub(crate) fn database_seeds() -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    now(async {
        let store = open(&small(&folder.path().join("store"))).unwrap();
        let mut job = Job::new();
        store.append(job.request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
        store.append(job.refuse(1)).await.unwrap();
    });
    let database = std::fs::read(folder.path().join("store/journal.db")).unwrap();
    kept("sqlite-file").into_iter().chain([database]).collect()
}

/// A database that cannot be trusted is refused, or read as far as it goes; and what verifies can be exported.
pub(crate) fn database(input: &[u8]) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("journal.db"), input).unwrap();
    // The folder has another name each time.
    let refused = |why: &dyn std::fmt::Display| {
        refused(&why.to_string().replace(&*folder.path().to_string_lossy(), ""))
    };
    let store = match open_read_only(&small(&path)) {
        Ok(store) => store,
        Err(e) => return refused(&e),
    };
    now(async {
        match verify(&*store).await {
            Ok(report) if report.is_whole() => {
                write_export(&*store, Selection::Whole, &mut Vec::new())
                    .await
                    .expect("what is whole is exported");
                ACCEPTED
            }
            Ok(report) => refused(&report.findings[0]),
            Err(e) => refused(&e),
        }
    })
}

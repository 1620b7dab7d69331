//! No event can be changed, removed or moved without it being found; nor a whole journal replaced, if heads were kept.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "audit/flip.rs"]
mod flip;
#[path = "audit/kinds.rs"]
mod kinds;
#[path = "audit/tamper.rs"]
mod tamper;

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flip::{Spot, flipped, spots};
use tamper::Tamper;
use vmkeep_store::burial::bury;
use vmkeep_store::chain::{Digest, genesis, hex, link};
use vmkeep_store::conformance::sample::{append, at};
use vmkeep_store::export::{Reader, Selection, export};
use vmkeep_store::heads::{Contradiction, Heads, Line, Notary, Trust, Vouched};
use vmkeep_store::migrate::migrate;
use vmkeep_store::verify::{Problem, verify};
use vmkeep_store::{
    Adoption, Commit, EngineName, Options, SledStore, SqliteStore, Store, StoreConfig, open, open_read_only,
};

use vmkeep_workflow::event::Actor;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{self, Record};

const ENGINES: [EngineName; 2] = [EngineName::Sqlite, EngineName::Sled];

struct Bench {
    folder: tempfile::TempDir,
    engine: EngineName,
}

impl Bench {
    fn new(engine: EngineName) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), engine }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn config(&self) -> StoreConfig {
        StoreConfig { engine: self.engine, reserve: 0, ..StoreConfig::new(self.path()) }
    }

    fn open(&self) -> Arc<dyn Store> {
        open(&self.config()).unwrap()
    }

    fn look(&self) -> Arc<dyn Store> {
        open_read_only(&self.config()).unwrap()
    }

    fn tamper(&self) -> Tamper {
        Tamper::open(self.engine, &self.path())
    }

    /// Whoever reads it without the daemon is told of something.
    async fn is_found(&self) -> bool {
        match open_read_only(&self.config()) {
            Ok(store) => verify(&*store).await.is_ok_and(|report| !report.is_whole()),
            Err(_) => true,
        }
    }
}

type Act = Box<dyn Fn(&mut Tamper)>;

/// A journal with every kind of event, in two streams in turns.
async fn filled(store: &dyn Store) {
    for (n, append) in kinds::appends().into_iter().enumerate() {
        store.append(append).await.unwrap();
        if n % 5 == 0 {
            store.append(self::append("catalogue", n as u64 / 5, 1)).await.unwrap();
        }
    }
}

async fn records(store: &dyn Store) -> Vec<Record> {
    store.history(0, 10_000).await.unwrap().into_iter().map(|placed| placed.record).collect()
}

fn text(record: &Record) -> &str {
    std::str::from_utf8(&record.bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_every_kind_of_event_that_is_changed_in_a_store_is_found() {
    for engine in ENGINES {
        let bench = Bench::new(engine);
        filled(&*bench.open()).await;
        let records = records(&*bench.look()).await;
        let fields: Vec<Vec<Spot>> = records.iter().map(|record| spots(text(record))).collect();
        let most = fields.iter().map(Vec::len).max().unwrap();
        let mut flips = 0;
        // One field of each record at a time: a finding for each, and for no other.
        for round in 0..most {
            let changed: Vec<(&Record, String)> = records
                .iter()
                .zip(&fields)
                .filter_map(|(record, fields)| Some((record, flipped(text(record), fields.get(round)?))))
                .collect();
            flips += changed.len();
            let mut tamper = bench.tamper();
            for (record, changed) in &changed {
                tamper.rewrite(&record.stream, record.seq, changed.as_bytes());
            }
            drop(tamper);
            let report = verify(&*bench.look()).await.unwrap();
            let found: BTreeSet<(StreamId, Seq)> = (report.findings.iter())
                .filter(|finding| finding.problem == Problem::Chain)
                .map(|finding| (finding.stream.clone().unwrap(), finding.seq.unwrap()))
                .collect();
            let expected = changed.iter().map(|(record, _)| (record.stream.clone(), record.seq)).collect();
            assert_eq!(found, expected, "{engine}, round {round}");
            let mut tamper = bench.tamper();
            for (record, _) in &changed {
                tamper.rewrite(&record.stream, record.seq, &record.bytes);
            }
        }
        assert!(flips > 400, "{flips}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_record_that_is_removed_from_a_store_moved_in_it_or_given_another_hash_is_found() {
    for engine in ENGINES {
        let bench = Bench::new(engine);
        filled(&*bench.open()).await;
        let records = records(&*bench.look()).await;
        let copy = bench.folder.path().join("kept");
        tamper::copy(&bench.path(), &copy);
        let mut acts: Vec<(String, Act)> = Vec::new();
        for record in &records {
            let (stream, seq) = (record.stream.clone(), record.seq);
            acts.push((format!("{stream} {seq} is removed"), {
                let stream = stream.clone();
                Box::new(move |tamper| tamper.remove(&stream, seq))
            }));
            let mut hash = record.hash;
            hash[31] ^= 1;
            acts.push((format!("{stream} {seq} has another hash"), {
                let stream = stream.clone();
                Box::new(move |tamper| tamper.rehash(&stream, seq, hash))
            }));
            if seq > Seq(1) {
                acts.push((
                    format!("{stream} {seq} changes places"),
                    Box::new(move |tamper| tamper.exchange(&stream, Seq(seq.0 - 1), seq)),
                ));
            }
        }
        for (what, act) in acts {
            act(&mut bench.tamper());
            assert!(bench.is_found().await, "{engine}: {what}");
            std::fs::remove_dir_all(bench.path()).unwrap();
            tamper::copy(&copy, &bench.path());
        }
        assert!(!bench.is_found().await);
    }
}

#[tokio::test]
async fn every_field_of_every_line_of_an_export_that_is_changed_is_found_and_every_line_that_is_moved() {
    let bench = Bench::new(EngineName::Sqlite);
    filled(&*bench.open()).await;
    let mut bytes = Vec::new();
    export(&*bench.look(), Selection::Whole, &mut bytes).await.unwrap();
    let whole = String::from_utf8(bytes).unwrap();
    let readable = |text: &str| {
        let mut reader = Reader::new(Cursor::new(text.as_bytes().to_vec()))?;
        while reader.next_item()?.is_some() {}
        Ok::<(), vmkeep_store::export::ReadError>(())
    };
    readable(&whole).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let mut flips = 0;
    for (n, line) in lines.iter().enumerate() {
        for spot in spots(line) {
            // When the store was made is no event, and sealed by nothing.
            if n == 0 && line[..spot.0.start].ends_with("\"created\":\"") {
                continue;
            }
            let changed = flipped(line, &spot);
            let mut with = lines.clone();
            with[n] = &changed;
            assert!(readable(&(with.join("\n") + "\n")).is_err(), "line {}: {changed}", n + 1);
            flips += 1;
        }
        let mut without = lines.clone();
        without.remove(n);
        assert!(readable(&(without.join("\n") + "\n")).is_err(), "without line {}", n + 1);
        for other in n + 1..lines.len() {
            let mut swapped = lines.clone();
            swapped.swap(n, other);
            assert!(readable(&(swapped.join("\n") + "\n")).is_err(), "{} and {other} swapped", n + 1);
        }
    }
    assert!(flips > 600, "{flips}");
}

/// Signs the head of a store, and returns all heads so far.
async fn sign(notary: &mut Notary, store: &dyn Store, lines: &mut String) {
    let head = store.head().await.unwrap().unwrap();
    let signed = notary.sign(&head, at(0)).unwrap().unwrap();
    lines.push_str(&Line::Head(signed).render());
    lines.push('\n');
}

async fn held(store: &dyn Store, lines: &str, notary: &Notary) -> Result<Vouched, Vec<Contradiction>> {
    let heads = Heads::read(Cursor::new(lines), Trust::Keys(&[notary.public_key()])).unwrap();
    heads.compare_store(store).await.unwrap()
}

/// What somebody makes of a journal who can write everything: each event as he wants it, all hashes computed anew, up to
/// some commit.
async fn forged(
    original: &dyn Store,
    folder: &Path,
    engine: EngineName,
    upto: u64,
    change: impl Fn(&Record) -> Vec<u8>,
) -> Arc<dyn Store> {
    let mut adoption = Adoption::default();
    let mut ends = std::collections::HashMap::new();
    let (mut previous, mut digest) = (genesis(original.id()), Digest::default());
    let placed = original.history(0, 10_000).await.unwrap();
    let mut placed = placed.into_iter().filter(|placed| placed.commit <= upto).peekable();
    while let Some(mut next) = placed.next() {
        let record = &mut next.record;
        record.bytes = change(record);
        let end = ends.entry(record.stream.clone()).or_insert([0; 32]);
        record.hash = journal::link(end, &record.bytes);
        *end = record.hash;
        digest.add(&record.stream, record.seq, &record.hash);
        let number = next.commit;
        adoption.records.push(next);
        if placed.peek().is_none_or(|following| following.commit != number) {
            let digest = std::mem::take(&mut digest).finish();
            previous = link(&previous, number, &digest);
            adoption.commits.push(Commit { number, digest, link: previous });
        }
    }
    let options = Options { reserve: 0, id: Some(original.id()), created: Some(original.created()) };
    let store: Arc<dyn Store> = match engine {
        EngineName::Sled => Arc::new(SledStore::open(folder, options).unwrap()),
        _ => Arc::new(SqliteStore::open(folder, options).unwrap()),
    };
    store.adopt(adoption).await.unwrap();
    store
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_of_everything_and_a_cut_tail_pass_the_chains_and_are_found_by_the_heads() {
    for engine in ENGINES {
        let bench = Bench::new(engine);
        let store = bench.open();
        let (mut notary, _) = Notary::open(&bench.folder.path().join("audit"), store.id()).unwrap();
        let mut lines = String::new();
        // Streams that are no job's, so that no summary gives a forger away.
        for n in 0..10 {
            store.append(append("catalogue", n * 2, 2)).await.unwrap();
            if n % 3 == 2 {
                sign(&mut notary, &*store, &mut lines).await;
            }
        }
        let vouched = held(&*store, &lines, &notary).await.unwrap();
        assert_eq!((vouched.heads, vouched.newest.commit, vouched.after), (3, 9, 1));

        let same = forged(&*store, &bench.folder.path().join("same"), engine, 10, |r| r.bytes.clone()).await;
        assert!(held(&*same, &lines, &notary).await.is_ok(), "what is the same is the same");

        let folder = bench.folder.path().join("rewritten");
        let rewritten = forged(&*store, &folder, engine, 10, |record| match record.seq {
            Seq(8) => b"{\"it\":\"never happened\"}".to_vec(),
            _ => record.bytes.clone(),
        });
        let rewritten = rewritten.await;
        assert!(verify(&*rewritten).await.unwrap().is_whole(), "the chains know no better");
        let found = held(&*rewritten, &lines, &notary).await.unwrap_err();
        assert_eq!(found, [6, 9].map(|commit| Contradiction::Differs { at: at(0), commit }));

        for last in [8, 5, 1] {
            let folder = bench.folder.path().join(format!("cut {last}"));
            let cut = forged(&*store, &folder, engine, last, |record| record.bytes.clone()).await;
            assert!(verify(&*cut).await.unwrap().is_whole(), "the chains know no better");
            let found = held(&*cut, &lines, &notary).await.unwrap_err();
            assert!(found.contains(&Contradiction::Beyond { at: at(0), commit: 9, last }), "{found:?}");
        }
        // The stated limit: what came after the last head.
        let folder = bench.folder.path().join("cut after the last head");
        let cut = forged(&*store, &folder, engine, 9, |record| record.bytes.clone()).await;
        assert_eq!(held(&*cut, &lines, &notary).await.unwrap().after, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_store_is_found_and_one_that_went_another_way() {
    for engine in ENGINES {
        let bench = Bench::new(engine);
        let store = bench.open();
        let (mut notary, _) = Notary::open(&bench.folder.path().join("audit"), store.id()).unwrap();
        let mut lines = String::new();
        store.append(append("catalogue", 0, 1)).await.unwrap();
        sign(&mut notary, &*store, &mut lines).await;
        drop(store);
        let copy = bench.folder.path().join("copy");
        tamper::copy(&bench.path(), &copy);
        let store = bench.open();
        store.append(append("catalogue", 1, 1)).await.unwrap();
        sign(&mut notary, &*store, &mut lines).await;
        drop(store);

        std::fs::remove_dir_all(bench.path()).unwrap();
        tamper::copy(&copy, &bench.path());
        let store = bench.open();
        assert!(verify(&*store).await.unwrap().is_whole());
        let beyond = Contradiction::Beyond { at: at(0), commit: 2, last: 1 };
        assert_eq!(held(&*store, &lines, &notary).await, Err(vec![beyond]));
        store.append(append("another", 0, 1)).await.unwrap();
        store.append(append("another", 1, 1)).await.unwrap();
        let differs = Contradiction::Differs { at: at(0), commit: 2 };
        assert_eq!(held(&*store, &lines, &notary).await, Err(vec![differs]));
        // Nor does a fresh store pass for the old one.
        let other = vmkeep_store::MemoryStore::new();
        assert_eq!(held(&other, &lines, &notary).await.unwrap_err().len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_that_were_signed_before_hold_after_pruning_and_after_a_move_to_the_other_engine() {
    for (engine, to) in [(EngineName::Sqlite, EngineName::Sled), (EngineName::Sled, EngineName::Sqlite)] {
        let bench = Bench::new(engine);
        let store = bench.open();
        let (mut notary, _) = Notary::open(&bench.folder.path().join("audit"), store.id()).unwrap();
        let mut lines = String::new();
        let mut job = vmkeep_store::conformance::sample::Job::new();
        store.append(job.request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
        sign(&mut notary, &*store, &mut lines).await;
        store.append(job.refuse(1)).await.unwrap();
        sign(&mut notary, &*store, &mut lines).await;
        bury(&*store, job.id, Actor::default(), at(9)).await.unwrap();
        assert_eq!(held(&*store, &lines, &notary).await.unwrap().after, 1);
        let before = store.head().await.unwrap().unwrap();
        sign(&mut notary, &*store, &mut lines).await;
        drop(store);
        let moved = migrate(&bench.config(), to, false).await.unwrap();
        assert_eq!(moved.link, hex(&before.link));
        let store = open(&StoreConfig { engine: to, ..bench.config() }).unwrap();
        assert_eq!(store.head().await.unwrap(), Some(before));
        assert_eq!(held(&*store, &lines, &notary).await.unwrap().after, 0);
        // And in an export of it.
        let mut text = Vec::new();
        let exported = export(&*store, Selection::Whole, &mut text).await.unwrap();
        assert_eq!(exported.link, Some(before.link));
    }
}

//! The store engines.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use fastrand::Rng;
use replay_tests::powercut::disk::Disk;
use replay_tests::powercut::trace;
use vmkeep_store::conformance::sample::{append, record};
use vmkeep_store::verify::verify;
use vmkeep_store::{EngineName, open};
use vmkeep_workflow::ids::{Seq, StreamId};

use crate::workload::{Act, WRITERS, program, runtime, settings, writer};

pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Where images are built: in memory if there is such a place, since all of them are synced when they are opened.
pub(crate) fn workshop() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// A program that writes into a store, recorded.
struct Recording {
    engine: EngineName,
    aged: bool,
    disk: Disk,
    /// What had been acknowledged before it began.
    before: Acknowledged,
}

/// The end of each stream.
pub(crate) type Acknowledged = BTreeMap<String, u64>;

pub(crate) fn acknowledged<'a>(before: &Acknowledged, said: impl Iterator<Item = &'a str>) -> Acknowledged {
    let mut all = before.clone();
    for line in said {
        if let ["ack", stream, last] = line.split(' ').collect::<Vec<_>>()[..] {
            all.insert(stream.to_owned(), last.parse().unwrap());
        }
    }
    all
}

impl Recording {
    fn of(engine: EngineName, aged: bool) -> Self {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("root");
        fs::create_dir(&root).unwrap();
        let copied = place.path().join("before");
        let mut before = Acknowledged::new();
        if aged {
            let said = run(engine, Act::Age, &root);
            before = acknowledged(&before, said.lines());
            copy(&root, &copied);
        }
        let (program, arguments, environment) = program(&engine.to_string(), Act::Write, &root);
        let environment = environment.iter().map(|(name, value)| (*name, OsStr::new(value)));
        let calls = trace::record(&program, &arguments, environment);
        let disk = Disk::of(&calls, &root, aged.then_some(copied.as_path())).unwrap();
        Self { engine, aged, disk, before }
    }

    /// Cuts the power at an instant that the seed chooses, and opens what is left. Returns how many records had been
    /// acknowledged, and how many are there.
    fn cut(&self, seed: u64) -> Result<(u64, u64), String> {
        let mut rng = Rng::with_seed(seed);
        let at = self.disk.instant(&mut rng);
        let image = self.disk.cut(at, &mut rng);
        let workshop = workshop();
        image.write(workshop.path()).unwrap();
        let acknowledged = acknowledged(&self.before, image.said());
        runtime().block_on(judge(self.engine, &acknowledged, workshop.path())).map_err(|why| {
            format!("{}, aged: {}, VMKEEP_SEED={seed}, at {at}: {why}", self.engine, self.aged)
        })
    }
}

/// Opens what a cut left, and says what is wrong with it.
pub(crate) async fn judge(
    engine: EngineName,
    acknowledged: &Acknowledged,
    folder: &Path,
) -> Result<(u64, u64), String> {
    let store = open(&settings(engine, folder)).map_err(|e| format!("it does not open: {e}"))?;
    let (mut promised, mut found) = (0, 0);
    for n in 0..WRITERS {
        let name = writer(n);
        let records =
            store.read(&StreamId::from(name.clone()), Seq(1), 0).await.map_err(|e| e.to_string())?;
        let last = records.len() as u64;
        let sure = acknowledged.get(&name).copied().unwrap_or_default();
        if last < sure {
            return Err(format!("{name} ends at {last}, {sure} was acknowledged"));
        }
        if let Some((n, _)) = (1..).zip(&records).find(|(n, found)| found.bytes != record(&name, *n)) {
            return Err(format!("{name} holds something else at {n}"));
        }
        // An append is there as a whole or not at all.
        let mut end = 0;
        while end < last {
            end += 1 + end % 5;
        }
        if end != last {
            return Err(format!("{name} holds a part of an append: it ends at {last}"));
        }
        store.append(append(&name, last, 1)).await.map_err(|e| format!("it takes nothing: {e:?}"))?;
        promised += sure;
        found += last;
    }
    let report = verify(&*store).await.map_err(|e| e.to_string())?;
    match report.findings.first() {
        Some(finding) => Err(finding.to_string()),
        None => Ok((promised, found)),
    }
}

fn survives(engine: EngineName, aged: bool) {
    let recording = Recording::of(engine, aged);
    let (seed, images) = (number("VMKEEP_SEED", fastrand::u64(..)), number("VMKEEP_IMAGES", 300));
    let (mut promised, mut found) = (0, 0);
    for n in 0..images {
        let (sure, there) = recording.cut(seed.wrapping_add(n)).unwrap_or_else(|why| panic!("{why}"));
        promised += sure;
        found += there;
    }
    println!(
        "{engine}, aged: {aged}: {images} of {images} images of {} instants opened, with all of {promised} acknowledged \
         events and {} others (VMKEEP_SEED={seed})",
        recording.disk.instants(),
        found - promised
    );
    assert!(promised > 0, "no cut came after an acknowledgement");
}

/// Lets the program run without a recording; returns what it said.
pub(crate) fn run(engine: EngineName, act: Act, root: &Path) -> String {
    let (program, arguments, environment) = program(&engine.to_string(), act, root);
    let done = std::process::Command::new(program).args(arguments).envs(environment).output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{said}");
    said
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, target): (PathBuf, PathBuf) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(path, target).unwrap();
        }
    }
}

#[test]
fn a_power_cut_costs_a_young_sqlite_store_nothing_that_was_acknowledged() {
    survives(EngineName::Sqlite, false);
}

#[test]
fn a_power_cut_costs_an_aged_sqlite_store_nothing_that_was_acknowledged() {
    survives(EngineName::Sqlite, true);
}

#[test]
fn a_power_cut_costs_a_young_sled_store_nothing_that_was_acknowledged() {
    survives(EngineName::Sled, false);
}

#[test]
fn a_power_cut_costs_an_aged_sled_store_nothing_that_was_acknowledged() {
    survives(EngineName::Sled, true);
}

/// Each sync that the engines make is needed: without it a cut is found that costs something.
#[test]
fn a_sync_that_is_left_out_is_found_out() {
    for (engine, aged, name) in [
        (EngineName::Sqlite, true, "journal.db-wal"),
        (EngineName::Sqlite, false, "journal.db-wal"),
        (EngineName::Sqlite, false, "journal.db"),
        (EngineName::Sqlite, false, "store"),
        (EngineName::Sled, true, "db"),
        (EngineName::Sled, false, "conf"),
        (EngineName::Sled, false, "store"),
    ] {
        let mut recording = Recording::of(engine, aged);
        recording.disk.without_syncs_of(name);
        let found = (0..3000).position(|seed| recording.cut(seed).is_err());
        println!(
            "{engine}, aged: {aged}, without the syncs of {name}: the first cut that costs something is {found:?}"
        );
        assert!(found.is_some(), "{engine}, aged: {aged}: nobody misses the syncs of {name}");
    }
}

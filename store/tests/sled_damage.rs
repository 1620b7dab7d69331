//! Damage to a sled store, done behind its back: it is found before anything was touched, or nothing is lost.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmkeep_store::conformance::sample::{Job, append, assert_holds, assert_whole, of};
use vmkeep_store::{Options, SledStore};
use vmkeep_workflow::EventStore;
use vmkeep_workflow::ids::StreamId;
use vmkeep_workflow::journal::StoreError;

const SEGMENT: usize = 512 << 10;

struct Stage {
    place: tempfile::TempDir,
    kept: BTreeMap<PathBuf, Vec<u8>>,
    job: Job,
}

fn open(folder: &Path) -> Result<SledStore, StoreError> {
    SledStore::open(folder, Options { reserve: 0, ..Options::default() })
}

impl Stage {
    fn folder(&self) -> PathBuf {
        self.place.path().join("store")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join("journal.sled").join(name)
    }

    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(self.folder().join("journal.sled")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                found.insert(path.clone(), std::fs::read(path).unwrap());
            }
        }
        found
    }

    /// Makes the files what they were.
    fn restore(&self) {
        for path in self.files().keys() {
            std::fs::remove_file(path).unwrap();
        }
        for (path, content) in &self.kept {
            std::fs::write(path, content).unwrap();
        }
    }

    /// Either the damage is found, and all files are as they were found, or nothing is lost. Whether it was found.
    async fn finds_or_keeps(&self, what: &str) -> bool {
        let before = self.files();
        match open(&self.folder()) {
            Err(StoreError::Damaged(_)) => {
                assert!(self.files() == before, "{what}: a damaged store was touched");
                true
            }
            Err(other) => panic!("{what}: {other}"),
            Ok(store) => {
                assert_whole(&store).await;
                self.holds_all(&store).await;
                false
            }
        }
    }

    async fn holds_all(&self, store: &SledStore) {
        assert_holds(store, "a", 300).await;
        assert_eq!(store.last(&StreamId::from("bulk")).await.unwrap().0, 30);
        assert_eq!(store.job(self.job.id).await.unwrap(), self.job.summary);
        assert_eq!(store.key("nightly").await.unwrap(), Some(self.job.stream()));
    }
}

/// A store of several segments, aged by being opened again, closed.
async fn stage() -> Stage {
    let place = tempfile::tempdir().unwrap();
    let mut stage = Stage { place, kept: BTreeMap::new(), job: Job::new() };
    for round in 0..3 {
        let store = open(&stage.folder()).unwrap();
        if round == 0 {
            let request = stage.job.request(0, "snapshot", "web1", Some("nightly"));
            store.append(request).await.unwrap();
        }
        let record = format!("\"{}\"", "x".repeat(60_000)).into_bytes();
        for n in 0..10 {
            store.append(append("a", 100 * round + 10 * n, 10)).await.unwrap();
            store.append(of("bulk", 10 * round + n, vec![record.clone()])).await.unwrap();
        }
    }
    stage.kept = stage.files();
    stage
}

#[tokio::test]
async fn a_bit_that_flips_is_found_or_loses_nothing() {
    let stage = stage().await;
    let (path, mut found) = (stage.file("db"), 0);
    let length = stage.kept[&path].len();
    assert!(length > 4 * SEGMENT, "{length}");
    let tries: usize = 60;
    for n in 0..tries {
        let mut bytes = stage.kept[&path].clone();
        // Spread over all segments, their headers included.
        let at = if n % 6 == 0 { (n / 6 * SEGMENT) % length + n % 20 } else { n * length / tries + 7 * n };
        bytes[at] ^= 0x10;
        std::fs::write(&path, bytes).unwrap();
        found += u32::from(stage.finds_or_keeps(&format!("byte {at}")).await);
        stage.restore();
    }
    assert!(found > 5, "only {found} of {tries} did any harm");
}

#[tokio::test]
async fn an_end_that_is_cut_off_is_found() {
    let stage = stage().await;
    let path = stage.file("db");
    let whole = &stage.kept[&path];
    let used = whole.iter().rposition(|&byte| byte != 0).unwrap();
    for cut in [1, 40, 300, 5000, SEGMENT, 2 * SEGMENT, used] {
        std::fs::write(&path, &whole[..used - cut.min(used)]).unwrap();
        stage.finds_or_keeps(&format!("{cut} bytes cut off")).await;
        stage.restore();
    }
    std::fs::write(&path, &whole[..used - SEGMENT]).unwrap();
    assert!(stage.finds_or_keeps("a segment cut off").await);
}

#[tokio::test]
async fn a_segment_that_is_lost_is_found_or_held_nothing() {
    let stage = stage().await;
    let (path, mut found) = (stage.file("db"), 0);
    let segments = stage.kept[&path].len().div_ceil(SEGMENT);
    for n in 0..segments {
        let mut bytes = stage.kept[&path].clone();
        let end = bytes.len().min((n + 1) * SEGMENT);
        bytes[n * SEGMENT..end].fill(0);
        std::fs::write(&path, bytes).unwrap();
        found += usize::from(stage.finds_or_keeps(&format!("segment {n}")).await);
        stage.restore();
    }
    assert!(found > segments / 3, "only {found} of {segments} segments held anything");
}

/// sled itself sees nothing wrong in this one.
#[tokio::test]
async fn an_older_state_of_its_files_is_found() {
    let stage = stage().await;
    let store = open(&stage.folder()).unwrap();
    store.append(append("a", 300, 1)).await.unwrap();
    drop(store);
    let head = std::fs::read(stage.file("head")).unwrap();
    stage.restore();
    stage.finds_or_keeps("all as it was").await;
    stage.restore();
    std::fs::write(stage.file("head"), head).unwrap();
    let outcome = open(&stage.folder());
    assert!(
        matches!(&outcome, Err(StoreError::Damaged(why)) if why.contains("its end was lost")),
        "{:?}",
        outcome.err()
    );
    // For reading it is still of use, and says itself what it lacks.
    let store = SledStore::open_read_only(stage.folder()).unwrap();
    stage.holds_all(&store).await;
    assert!(!vmkeep_store::verify::verify(&store).await.unwrap().is_whole());
}

#[tokio::test]
async fn a_missing_or_torn_file_of_the_store_is_found_or_not_needed() {
    let stage = stage().await;
    for path in stage.kept.keys() {
        let name = path.file_name().unwrap().to_str().unwrap();
        std::fs::remove_file(path).unwrap();
        let missing = stage.finds_or_keeps(&format!("without {name}")).await;
        stage.restore();
        let half = stage.kept[path].len() / 2;
        std::fs::write(path, &stage.kept[path][..half]).unwrap();
        stage.finds_or_keeps(&format!("half of {name}")).await;
        stage.restore();
        assert!(missing || !["head", "identity", "db"].contains(&name), "{name} was not missed");
    }
}

#[tokio::test]
async fn a_key_or_a_place_that_is_lost_is_found() {
    let stage = stage().await;
    for prefix in [&b"k"[..], b"p", b"s", b"c", b"r", b"j", b"x"] {
        let db = sled::open(stage.folder().join("journal.sled")).unwrap();
        let (key, _) = db.scan_prefix(prefix).next_back().unwrap().unwrap();
        db.remove(key).unwrap();
        drop(db);
        let name = String::from_utf8_lossy(prefix).into_owned();
        assert!(stage.finds_or_keeps(&name).await, "an entry {name} was not missed");
        stage.restore();
    }
}

#[tokio::test]
async fn what_interrupted_work_left_is_no_hindrance() {
    let stage = stage().await;
    std::fs::write(stage.file("snap.FFFFFFFFFFFFFFFF.generating"), "torn").unwrap();
    std::fs::create_dir_all(stage.folder().join("journal.new/blobs")).unwrap();
    std::fs::write(stage.folder().join("journal.new/conf"), "torn").unwrap();
    for left in ["reserve.new", "spare.new", "spare", "room.probe"] {
        std::fs::write(stage.folder().join(left), "torn").unwrap();
    }
    let store = open(&stage.folder()).unwrap();
    stage.holds_all(&store).await;
    assert_whole(&store).await;
}

//! Damage to a sqlite store, done behind its back, is found, and told with its place.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

use rusqlite::Connection;
use vmkeep_store::conformance::sample::{Job, append, assert_holds, assert_whole};
use vmkeep_store::verify::{Problem, Report, verify};
use vmkeep_store::{Options, SqliteStore};
use vmkeep_workflow::EventStore;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{StoreError, link};

struct Stage {
    place: tempfile::TempDir,
    jobs: Vec<Job>,
}

impl Stage {
    fn folder(&self) -> PathBuf {
        self.place.path().join("store")
    }

    fn open(&self) -> SqliteStore {
        SqliteStore::open(self.folder(), Options { reserve: 0, ..Options::default() }).unwrap()
    }

    fn refusal(&self) -> StoreError {
        match SqliteStore::open(self.folder(), Options::default()) {
            Ok(_) => panic!("the store was opened"),
            Err(error) => error,
        }
    }

    fn sql(&self, sql: &str) {
        Connection::open(self.folder().join("journal.db")).unwrap().execute_batch(sql).unwrap();
    }

    async fn report(&self) -> Report {
        verify(&self.open()).await.unwrap()
    }

    /// What is found, as `place: problem`.
    async fn found(&self) -> Vec<String> {
        let mut found: Vec<String> = self.report().await.findings.iter().map(ToString::to_string).collect();
        for (n, job) in self.jobs.iter().enumerate() {
            for text in &mut found {
                *text = text.replace(&job.id.to_string(), &format!("#{n}"));
            }
        }
        found
    }
}

/// A store with two jobs and a stream `a` of five records, closed.
async fn stage() -> Stage {
    let mut stage = Stage { place: tempfile::tempdir().unwrap(), jobs: vec![Job::new(), Job::new()] };
    let store = stage.open();
    let request = stage.jobs[0].request(0, "snapshot", "web1", Some("nightly"));
    store.append(request).await.unwrap();
    for n in 0..5 {
        store.append(append("a", n, 1)).await.unwrap();
    }
    let request = stage.jobs[1].request(1, "restore", "db1", None);
    store.append(request).await.unwrap();
    assert_whole(&store).await;
    stage
}

#[tokio::test]
async fn a_bit_that_flips_in_the_file_is_found() {
    let stage = stage().await;
    let path = stage.folder().join("journal.db");
    let mut bytes = std::fs::read(&path).unwrap();
    let wanted = br#"{"seq":3,"stream":"a"}"#;
    let at = bytes.windows(wanted.len()).position(|window| window == wanted).unwrap();
    bytes[at + 7] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let outcome = stage.open().read(&StreamId::from("a"), Seq(1), 0).await;
    assert!(matches!(&outcome, Err(StoreError::Damaged(text)) if text.contains("record 3")), "{outcome:?}");
    assert_eq!(stage.found().await, [r#"stream "a", record 3: its bytes do not fit its hash"#]);
}

#[tokio::test]
async fn a_missing_record_is_found() {
    let stage = stage().await;
    stage.sql("DELETE FROM records WHERE seq = 3");
    let outcome = stage.open().read(&StreamId::from("a"), Seq(2), 0).await;
    assert!(
        matches!(&outcome, Err(StoreError::Damaged(text)) if text.contains("record 3: it is missing")),
        "{outcome:?}"
    );
    let outcome = stage.open().read(&StreamId::from("a"), Seq(4), 0).await;
    assert!(
        matches!(&outcome, Err(StoreError::Damaged(text)) if text.contains("record 3: it is missing")),
        "{outcome:?}"
    );
    let expected = [
        "commit 4: its records are missing",
        r#"stream "a", record 4: it follows on record 2: what belongs in between is missing"#,
    ];
    assert_eq!(stage.found().await, expected);
}

#[tokio::test]
async fn a_missing_stream_is_found() {
    let stage = stage().await;
    stage.sql("DELETE FROM records WHERE stream = 2; DELETE FROM streams WHERE key = 2");
    let expected: Vec<String> = (2..=6).map(|n| format!("commit {n}: its records are missing")).collect();
    assert_eq!(stage.found().await, expected);
}

#[tokio::test]
async fn a_stream_whose_chain_was_recomputed_is_found_by_its_seals() {
    let stage = stage().await;
    let database = Connection::open(stage.folder().join("journal.db")).unwrap();
    let mut hash = [0; 32];
    for seq in 1..=5 {
        let text = format!(r#"{{"seq":{seq},"stream":"forged"}}"#);
        hash = link(&hash, text.as_bytes());
        database
            .execute(
                "UPDATE records SET bytes = ?1, hash = ?2 WHERE stream = 2 AND seq = ?3",
                (text, hash, seq),
            )
            .unwrap();
    }
    drop(database);
    let expected: Vec<String> =
        (2..=6).map(|n| format!("commit {n}: its records are not those that were sealed")).collect();
    assert_eq!(stage.found().await, expected);
}

#[tokio::test]
async fn a_commit_that_was_changed_or_removed_is_found() {
    let stage = stage().await;
    stage.sql("UPDATE commits SET link = zeroblob(32) WHERE number = 3");
    let expected =
        ["commit 3: it does not fit the commit before it", "commit 4: it does not fit the commit before it"];
    assert_eq!(stage.found().await, expected);
    stage.sql("DELETE FROM commits WHERE number = 3");
    assert_eq!(stage.found().await[0], "commit 3: it is missing");
}

#[tokio::test]
async fn a_summary_that_is_not_what_the_events_give_is_found() {
    let stage = stage().await;
    stage.sql("UPDATE jobs SET summary = json_set(summary, '$.status', 'succeeded', '$.title', 'x') WHERE stream = 1");
    assert_eq!(
        stage.found().await,
        [r#"stream "job/#0": the job's summary is not what its events give: status, title"#]
    );
    stage.sql("DELETE FROM jobs WHERE stream = 1");
    assert_eq!(stage.found().await, [r#"stream "job/#0": the job's summary is missing"#]);
}

#[tokio::test]
async fn a_key_that_is_lost_or_moved_is_found() {
    let stage = stage().await;
    stage.sql("UPDATE keys SET stream = 'a'");
    assert_eq!(stage.found().await, [r#"stream "job/#0": the job's key "nightly" is claimed by a"#]);
    stage.sql("DELETE FROM keys");
    assert_eq!(stage.found().await, [r#"stream "job/#0": the job's key "nightly" is not claimed"#]);
}

#[tokio::test]
async fn an_event_of_a_newer_release_is_named_and_hides_nothing_else() {
    let mut stage = stage().await;
    let mut unheard = stage.jobs[0].next(5, vec![vmkeep_workflow::Body::JobRecovered]);
    unheard.records[0] = br#"{"v":9,"at":"2030-01-01T00:00:00Z","body":{"type":"unheard_of"}}"#.to_vec();
    let store = stage.open();
    store.append(unheard).await.unwrap();
    drop(store);
    let report = stage.report().await;
    assert_eq!(report.found, 1);
    assert_eq!(report.findings[0].seq, Some(Seq(2)));
    assert!(matches!(report.findings[0].problem, Problem::NotUnderstood { .. }), "{:?}", report.findings);
}

/// What an unkeyed chain cannot show, and what can.
#[tokio::test]
async fn a_tail_that_was_cut_off_shows_only_against_a_link_kept_elsewhere() {
    let stage = stage().await;
    let kept = stage.report().await.link;
    stage.sql(
        "DELETE FROM records WHERE commit_number = 7; DELETE FROM commits WHERE number = 7;
         DELETE FROM jobs WHERE stream = 3; DELETE FROM streams WHERE key = 3",
    );
    let report = stage.report().await;
    assert!(report.is_whole());
    assert_ne!(report.link, kept);
}

#[tokio::test]
async fn a_page_that_makes_no_sense_is_reported_and_not_fallen_over() {
    let stage = stage().await;
    let path = stage.folder().join("journal.db");
    let mut bytes = std::fs::read(&path).unwrap();
    let wanted = br#"{"seq":3,"stream":"a"}"#;
    let at = bytes.windows(wanted.len()).position(|window| window == wanted).unwrap();
    let page = at / 4096 * 4096;
    bytes[page..page + 64].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    match SqliteStore::open(stage.folder(), Options::default()) {
        Ok(store) => assert!(!verify(&store).await.unwrap().is_whole()),
        Err(error) => assert!(matches!(error, StoreError::Damaged(_)), "{error:?}"),
    }
}

#[tokio::test]
async fn a_log_without_its_database_is_refused() {
    let stage = stage().await;
    let store = stage.open();
    store.append(append("b", 0, 1)).await.unwrap();
    let log = stage.folder().join("journal.db-wal");
    let content = std::fs::read(&log).unwrap();
    drop(store);
    std::fs::write(&log, &content).unwrap();
    std::fs::remove_file(stage.folder().join("journal.db")).unwrap();
    assert!(matches!(stage.refusal(), StoreError::Damaged(text) if text.contains("journal.db-wal")));
    assert!(std::fs::read(&log).unwrap() == content, "it may be all that is left");
}

#[tokio::test]
async fn an_empty_file_and_a_database_of_others_are_refused_and_left_alone() {
    let stage = stage().await;
    let path = stage.folder().join("journal.db");
    let foreign = stage.place.path().join("foreign.db");
    Connection::open(&foreign).unwrap().execute_batch("CREATE TABLE t (x); PRAGMA user_version = 1").unwrap();
    for content in [Vec::new(), std::fs::read(&foreign).unwrap()] {
        std::fs::write(&path, &content).unwrap();
        assert!(matches!(stage.refusal(), StoreError::Damaged(_)));
        assert!(std::fs::read(&path).unwrap() == content);
    }
}

/// A reader that touches nothing, not even the log's index, is one for its whole process.
#[tokio::test]
async fn a_store_that_this_process_reads_untouched_is_not_opened_for_writing_until_it_is_closed() {
    let mut stage = stage().await;
    let store = stage.open();
    store.append(append("late", 0, 1)).await.unwrap();
    // As a crash leaves it: with the log and its index.
    let crashed = tempfile::tempdir().unwrap();
    std::fs::create_dir(crashed.path().join("store")).unwrap();
    for file in ["journal.db", "journal.db-wal", "journal.db-shm"] {
        std::fs::copy(stage.folder().join(file), crashed.path().join("store").join(file)).unwrap();
    }
    drop(store);
    stage.place = crashed;
    let reading = SqliteStore::open_read_only(stage.folder()).unwrap();
    assert_holds(&reading, "late", 1).await;
    assert!(matches!(stage.refusal(), StoreError::InUse { holder, .. } if holder.contains("for reading")));
    assert_whole(&reading).await;
    drop(reading);
    let store = stage.open();
    store.append(append("late", 1, 1)).await.unwrap();
    assert_whole(&store).await;
}

#[tokio::test]
async fn what_an_interrupted_creation_left_is_no_hindrance() {
    let place = tempfile::tempdir().unwrap();
    let stage = Stage { place, jobs: Vec::new() };
    std::fs::create_dir(stage.folder()).unwrap();
    for left in ["journal.new", "journal.new-wal", "journal.new-journal", "reserve.new", "room.probe"] {
        std::fs::write(stage.folder().join(left), "torn").unwrap();
    }
    let store = stage.open();
    store.append(append("a", 0, 3)).await.unwrap();
    assert!(!stage.folder().join("journal.new").exists());
    drop(store);
    assert_holds(&stage.open(), "a", 3).await;
}

#[tokio::test]
async fn the_log_does_not_grow_with_what_is_appended() {
    let stage = stage().await;
    let store = stage.open();
    let log = stage.folder().join("journal.db-wal");
    let ahead = std::fs::metadata(&log).unwrap().len();
    let record = format!("\"{}\"", "x".repeat(1 << 20)).into_bytes();
    for n in 0..50 {
        let append = vmkeep_store::conformance::sample::of("bulk", n, vec![record.clone()]);
        store.append(append).await.unwrap();
    }
    let now = std::fs::metadata(&log).unwrap().len();
    assert!(now <= ahead + (2 << 20), "50 MiB were appended, and the log went from {ahead} to {now} bytes");
    assert_whole(&store).await;
}

/// A folder that was copied without the log's index, on a medium that cannot be written to.
#[test]
fn a_copy_on_a_read_only_medium_can_be_read() {
    const FOLDER: &str = "VMKEEP_STORE_MEDIUM";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(folder) = std::env::var_os(FOLDER) {
        let store = SqliteStore::open_read_only(folder).unwrap();
        runtime.block_on(async {
            assert_holds(&store, "a", 5).await;
            assert_holds(&store, "late", 1).await;
            assert_whole(&store).await;
        });
        return;
    }
    let stage = runtime.block_on(stage());
    let store = stage.open();
    runtime.block_on(store.append(append("late", 0, 1))).unwrap();
    for (name, files) in
        [("with log", &["journal.db", "journal.db-wal"][..]), ("closed", &["journal.db"][..])]
    {
        let medium = stage.place.path().join(name);
        std::fs::create_dir(&medium).unwrap();
        if name == "closed" {
            let copy = |from: &Path, to: &Path| std::fs::copy(from, to).map(drop);
            copy(&stage.folder().join("journal.db"), &medium.join("journal.db")).unwrap();
            copy(&stage.folder().join("journal.db-wal"), &medium.join("journal.db-wal")).unwrap();
            drop(SqliteStore::open(&medium, Options { reserve: 0, ..Options::default() }).unwrap());
            assert!(!medium.join("journal.db-wal").exists());
        } else {
            for file in files {
                std::fs::copy(stage.folder().join(file), medium.join(file)).unwrap();
            }
        }
        let script = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" || exit 77; exec \"$@\"";
        let root = rustix::process::geteuid().is_root();
        let output = std::process::Command::new("unshare")
            .args(if root { &["-m"][..] } else { &["-U", "-r", "-m"] })
            .args(["sh", "-c", script])
            .arg(&medium)
            .arg(std::env::current_exe().unwrap())
            .args(["a_copy_on_a_read_only_medium_can_be_read", "--exact", "--nocapture"])
            .env(FOLDER, &medium)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {said}{}", String::from_utf8_lossy(&output.stdout));
    }
}

//! A journal moves between engines whole, or not at all.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde_json::json;
use vmkeep_store::burial::bury;
use vmkeep_store::conformance::sample::{Job, append, assert_holds, assert_whole, at, of};
use vmkeep_store::migrate::{MigrateError, Migrated, migrate};
use vmkeep_store::verify::verify;
use vmkeep_store::{EngineName, Store, StoreConfig, engine_of, open, open_read_only};
use vmkeep_workflow::event::{Actor, Body};
use vmkeep_workflow::journal::{JobFilter, StoreError};

use EngineName::{Sled, Sqlite};

fn config(engine: EngineName, path: &Path) -> StoreConfig {
    StoreConfig { engine, reserve: 1 << 20, ..StoreConfig::new(path) }
}

/// The store in a folder, whatever keeps it.
fn any(path: &Path) -> Arc<dyn Store> {
    open(&config(engine_of(path).unwrap().unwrap(), path)).unwrap()
}

async fn moved(path: &Path, to: EngineName) -> Result<Migrated, MigrateError> {
    migrate(&config(Sqlite, path), to, false).await
}

/// A store with all that a journal can hold. Returns its head.
async fn filled(path: &Path, engine: EngineName) -> String {
    let store = open(&config(engine, path)).unwrap();
    let mut jobs = vec![Job::new(), Job::new(), Job::new()];
    for (n, job) in (0..).zip(&mut jobs) {
        store.append(job.request(n, "snapshot", "web1", Some(&format!("key {n}")))).await.unwrap();
        store.append(job.next(n, vec![Body::JobRecovered; 50])).await.unwrap();
    }
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                for n in 0..60 {
                    store.append(append(&format!("writer {writer}"), n, 1)).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    store.append(of("large", 0, vec![format!("\"{}\"", "x".repeat(3 << 20)).into_bytes()])).await.unwrap();
    store.append(jobs[0].refuse(50)).await.unwrap();
    store.put_row(jobs[1].id, "copy/vda", &json!({ "done": 7 })).await.unwrap();
    let mut claim = append("claims", 0, 1);
    claim.key = Some("a key of no job".to_owned());
    store.append(claim).await.unwrap();
    bury(&*store, jobs[0].id, Actor::default(), at(60)).await.unwrap();
    let report = verify(&*store).await.unwrap();
    assert!(report.is_whole());
    report.link
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_goes_there_and_back_with_the_same_head() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("store");
    let link = filled(&path, Sqlite).await;
    let (id, created) = {
        let store = any(&path);
        (store.id(), store.created())
    };
    let rows = |store: Arc<dyn Store>| async move {
        let mut all = Vec::new();
        for job in store.jobs(&JobFilter::default()).await.unwrap() {
            all.push((job.job, store.rows(job.job).await.unwrap()));
        }
        all
    };
    let before = rows(any(&path)).await;
    for (from, to) in [(Sqlite, Sled), (Sled, Sqlite)] {
        let done = moved(&path, to).await.unwrap();
        assert_eq!((done.from, done.to, &done.link, done.store), (from, to, &link, id));
        assert_eq!(engine_of(&path), Ok(Some(to)));
        let kept = done.kept.unwrap();
        let name = kept.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with(&format!("store.{from}-")), "{name}");
        for path in [&path, &kept] {
            let store = any(path);
            assert_eq!((store.id(), store.created()), (id, created));
            assert_eq!(verify(&*store).await.unwrap().link, link);
            assert_whole(&*store).await;
            assert_eq!(store.key("a key of no job").await.unwrap().unwrap().as_str(), "claims");
            assert_eq!(verify(&*store).await.unwrap().pruned.len(), 1);
            drop(store);
            assert_eq!(rows(any(path)).await, before);
        }
    }
    // It is a store like any other.
    let store = any(&path);
    store.append(append("writer 0", 60, 1)).await.unwrap();
    assert_holds(&*store, "writer 0", 61).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_open_is_not_moved() {
    for engine in [Sqlite, Sled] {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("store");
        filled(&path, engine).await;
        let store = any(&path);
        let to = if engine == Sqlite { Sled } else { Sqlite };
        let outcome = moved(&path, to).await;
        assert!(matches!(outcome, Err(MigrateError::Store(StoreError::InUse { .. }))), "{outcome:?}");
        store.append(append("writer 0", 60, 1)).await.unwrap();
        drop(store);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "nothing was made beside it");
        moved(&path, to).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_stays_as_it_is() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("store");
    assert!(matches!(moved(&path, Sled).await, Err(MigrateError::Store(StoreError::Io(_)))));
    assert!(!path.exists());
    let link = filled(&path, Sqlite).await;
    assert!(matches!(moved(&path, Sqlite).await, Err(MigrateError::Already { .. })));
    assert!(matches!(moved(&path, EngineName::Memory).await, Err(MigrateError::KeepsNothing(_))));
    let rehearsed = migrate(&config(Sqlite, &path), Sled, true).await.unwrap();
    assert_eq!((rehearsed.link, rehearsed.kept), (link, None));
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "a rehearsal leaves nothing");
    assert_eq!(engine_of(&path), Ok(Some(Sqlite)));
    // Damage is not carried over.
    rusqlite::Connection::open(path.join("journal.db"))
        .unwrap()
        .execute_batch("UPDATE records SET bytes = '{}' WHERE position = 7")
        .unwrap();
    let outcome = moved(&path, Sled).await;
    assert!(matches!(outcome, Err(MigrateError::NotWhole { .. })), "{outcome:?}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
    assert_eq!(engine_of(&path), Ok(Some(Sqlite)));
}

const ACT: &str = "VMKEEP_MIGRATE_ACT";
const FOLDER: &str = "VMKEEP_MIGRATE_FOLDER";

/// What the child does; nothing when the test program runs as usual.
#[test]
fn child() {
    let (Ok(act), Some(folder)) = (std::env::var(ACT), std::env::var_os(FOLDER)) else { return };
    let path = PathBuf::from(folder);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match act.as_str() {
            "move" => loop {
                let to = if engine_of(&path).unwrap() == Some(Sled) { Sqlite } else { Sled };
                let done = moved(&path, to).await.unwrap();
                // Under another name first: a kill may come while it is being removed.
                let gone = path.with_file_name("gone");
                let _ = std::fs::remove_dir_all(&gone);
                std::fs::rename(done.kept.unwrap(), &gone).unwrap();
            },
            "fill" => full(&path.join("store")).await,
            other => panic!("unknown act {other}"),
        }
    });
}

fn this_program(command: &mut Command, act: &str, folder: &Path) {
    command.args(["child", "--exact", "--nocapture"]).env(ACT, act).env(FOLDER, folder);
}

#[test]
fn kill_9_in_the_middle_leaves_the_one_or_the_other_and_it_can_be_repeated() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("store");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let link = runtime.block_on(filled(&path, Sqlite));
    let (mut unfinished, mut engines) = (0, Vec::new());
    for round in 0..30_u64 {
        let mut command = Command::new(std::env::current_exe().unwrap());
        this_program(&mut command, "move", &path);
        // What a killed process leaves among temporary files goes with the test's own folder.
        let temporary = place.path().join("tmp");
        std::fs::create_dir_all(&temporary).unwrap();
        command.env("TMPDIR", temporary);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The delay only spreads the kills; nothing depends on what the child has done by then.
        std::thread::sleep(std::time::Duration::from_millis(20 + round * 37));
        child.kill().unwrap();
        child.wait().unwrap();
        unfinished += u32::from(place.path().join("store.migrating").exists());
        runtime.block_on(async {
            let engine = engine_of(&path).unwrap().unwrap();
            engines.push(engine);
            let store = open_read_only(&config(engine, &path)).unwrap();
            let report = verify(&*store).await.unwrap();
            assert_eq!((report.found, &report.link), (0, &link), "round {round}: {:?}", report.findings);
            drop(store);
            if round % 3 == 0 {
                let to = if engine == Sled { Sqlite } else { Sled };
                moved(&path, to).await.unwrap();
                assert!(!place.path().join("store.migrating").exists());
                assert_eq!(verify(&*any(&path)).await.unwrap().link, link);
            }
        });
    }
    assert!(unfinished > 3, "only {unfinished} kills came in the middle");
    // Whatever lies beside it is a whole store.
    for entry in std::fs::read_dir(place.path()).unwrap() {
        let beside = entry.unwrap().path();
        let name = beside.file_name().unwrap().to_str().unwrap().to_owned();
        if name.starts_with("store.s") {
            let store = any(&beside);
            assert_eq!(runtime.block_on(verify(&*store)).unwrap().link, link, "{name}");
        }
    }
}

#[test]
fn a_full_disk_leaves_the_store_as_it_is() {
    let place = tempfile::tempdir().unwrap();
    let mount = place.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let script = "mount -t tmpfs -o size=160m none \"$MOUNT\" || exit 77; exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(if rustix::process::geteuid().is_root() { &["-m"][..] } else { &["-U", "-r", "-m"] })
        .args(["sh", "-c", script, "sh"])
        .arg(std::env::current_exe().unwrap())
        .env("MOUNT", &mount);
    this_program(&mut command, "fill", &mount);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
}

async fn full(path: &Path) {
    let link = filled(path, Sqlite).await;
    let ballast = path.with_file_name("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    let error = std::io::copy(&mut std::io::repeat(7), &mut file).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    for free in [0, 1 << 20, 2 << 20, 6 << 20] {
        let length = file.metadata().unwrap().len();
        file.set_len(length - free).unwrap();
        let outcome = moved(path, Sled).await;
        assert!(outcome.is_err(), "{free} bytes were enough");
        assert_eq!(engine_of(path), Ok(Some(Sqlite)));
        let store = open_read_only(&config(Sqlite, path)).unwrap();
        assert_eq!(verify(&*store).await.unwrap().link, link);
    }
    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    moved(path, Sled).await.unwrap();
    assert_eq!(verify(&*any(path)).await.unwrap().link, link);
}

//! What the sqlite engine answers when the file system fails it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faults;

use vmkeep_store::conformance::sample::{append, assert_holds, assert_whole, of};
use vmkeep_store::{Options, SqliteStore};
use vmkeep_workflow::EventStore;
use vmkeep_workflow::ids::{JobId, StreamId};
use vmkeep_workflow::journal::{AppendError, Reserve};

use faults::{EDQUOT, EIO, ENOSPC, Stage, assert_an_append_is_one_fsync, under_faults};

fn open(stage: &Stage) -> SqliteStore {
    SqliteStore::open(&stage.folder, Options { reserve: 1 << 20, ..Options::default() }).unwrap()
}

#[test]
fn a_durable_append_costs_one_fsync_and_a_row_none() {
    under_faults("a_durable_append_costs_one_fsync_and_a_row_none", async |stage| {
        assert_an_append_is_one_fsync(&open(stage), stage).await;
    });
}

#[test]
fn a_failed_fsync_is_fatal_and_nothing_is_written_after_it() {
    under_faults("a_failed_fsync_is_fatal_and_nothing_is_written_after_it", async |stage| {
        let log = stage.folder.join("journal.db-wal");
        let store = open(stage);
        store.append(append("a", 0, 3)).await.unwrap();
        stage.fail("fsync", EIO, "-wal");
        let outcome = store.append(append("a", 3, 1)).await;
        assert!(matches!(outcome, Err(AppendError::Fatal(_))), "{outcome:?}");
        stage.heal();
        let (fsyncs, content) = (stage.fsyncs(), std::fs::read(&log).unwrap());
        // It works again now, but what the kernel did with the pages is not known.
        for _ in 0..3 {
            let outcome = store.append(append("a", 3, 1)).await;
            assert!(matches!(outcome, Err(AppendError::Fatal(_))), "{outcome:?}");
        }
        assert!(store.put_row(JobId::new(), "copy", &serde_json::json!(1)).await.is_err());
        assert_holds(&store, "a", 3).await;
        drop(store);
        assert_eq!(stage.fsyncs(), fsyncs, "closing must not fsync either");
        assert!(std::fs::read(&log).unwrap() == content, "the log is left to the next process");
        // Which finds what was acknowledged, and perhaps the record in doubt.
        let store = open(stage);
        let last = store.last(&StreamId::from("a")).await.unwrap().0;
        assert!(last == 3 || last == 4, "{last}");
        assert_holds(&store, "a", last).await;
        store.append(append("a", last, 1)).await.unwrap();
        assert_whole(&store).await;
    });
}

#[test]
fn a_failed_fsync_of_a_checkpoint_is_fatal() {
    under_faults("a_failed_fsync_of_a_checkpoint_is_fatal", async |stage| {
        let store = open(stage);
        stage.fail("fsync", EIO, "journal.db");
        let record = format!("\"{}\"", "x".repeat(1 << 20)).into_bytes();
        let mut last = 0;
        let error = loop {
            match store.append(of("a", last, vec![record.clone()])).await {
                Ok(appended) => last = appended.last.0,
                Err(error) => break error,
            }
            assert!(last < 100, "there was no checkpoint, or its failure was not noticed");
        };
        assert!(matches!(error, AppendError::Fatal(_)), "{error:?}");
        stage.heal();
        drop(store);
        let store = open(stage);
        assert_eq!(store.last(&StreamId::from("a")).await.unwrap().0, last);
        assert_whole(&store).await;
    });
}

#[test]
fn a_full_disk_gives_up_the_reserve_and_is_full_only_then() {
    under_faults("a_full_disk_gives_up_the_reserve_and_is_full_only_then", async |stage| {
        let store = open(stage);
        store.append(append("a", 0, 1)).await.unwrap();
        for (round, operation) in (1..).zip(["write", "torn"]) {
            assert_eq!(store.reserve().await, Ok(Reserve::Intact));
            stage.fail(operation, ENOSPC, "-wal");
            let outcome = store.append(append("a", round, 1)).await;
            assert!(matches!(outcome, Err(AppendError::Full(_))), "{operation}: {outcome:?}");
            assert!(!stage.folder.join("reserve").exists(), "{operation}: the reserve was kept back");
            assert_holds(&store, "a", round).await;
            stage.heal();
            store.append(append("a", round, 1)).await.unwrap();
            assert_holds(&store, "a", round + 1).await;
        }
        assert_eq!(store.reserve().await, Ok(Reserve::Intact), "there is room again");
        assert_whole(&store).await;
    });
}

#[test]
fn a_spent_quota_is_a_full_disk() {
    under_faults("a_spent_quota_is_a_full_disk", async |stage| {
        let store = open(stage);
        store.append(append("a", 0, 1)).await.unwrap();
        stage.fail("write", EDQUOT, "*");
        let outcome = store.append(append("a", 1, 1)).await;
        assert!(matches!(outcome, Err(AppendError::Full(_))), "{outcome:?}");
        assert!(!stage.folder.join("reserve").exists());
        stage.heal();
        store.append(append("a", 1, 1)).await.unwrap();
        assert_whole(&store).await;
    });
}

#[test]
fn a_write_that_fails_at_the_commit_leaves_the_outcome_unknown() {
    under_faults("a_write_that_fails_at_the_commit_leaves_the_outcome_unknown", async |stage| {
        let store = open(stage);
        store.append(append("a", 0, 1)).await.unwrap();
        for (round, operation) in (1..).zip(["write", "torn"]) {
            stage.fail(operation, EIO, "-wal");
            let outcome = store.append(append("a", round, 1)).await;
            assert!(matches!(outcome, Err(AppendError::Unknown(_))), "{operation}: {outcome:?}");
            assert_eq!(store.reserve().await, Ok(Reserve::Intact), "that is no want of room");
            stage.heal();
            // Whoever reads the stream learns that nothing was written, and goes on.
            assert_eq!(store.last(&StreamId::from("a")).await.unwrap().0, round);
            store.append(append("a", round, 1)).await.unwrap();
        }
        drop(store);
        let store = open(stage);
        assert_holds(&store, "a", 3).await;
        assert_whole(&store).await;
    });
}

#[test]
fn rows_that_find_no_room_do_not_spend_the_reserve() {
    under_faults("rows_that_find_no_room_do_not_spend_the_reserve", async |stage| {
        let store = open(stage);
        store.append(append("a", 0, 1)).await.unwrap();
        stage.fail("write", ENOSPC, "-wal");
        let job = JobId::new();
        assert!(store.put_row(job, "copy", &serde_json::json!(1)).await.is_err());
        assert!(stage.folder.join("reserve").exists());
        stage.heal();
        store.put_row(job, "copy", &serde_json::json!(2)).await.unwrap();
        assert_eq!(store.rows(job).await.unwrap().len(), 1);
        store.append(append("a", 1, 1)).await.unwrap();
    });
}

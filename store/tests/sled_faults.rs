//! What the sled engine answers when the file system fails it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faults;

use vmkeep_store::conformance::sample::{append, assert_holds, assert_whole, of};
use vmkeep_store::{Options, SledStore};
use vmkeep_workflow::EventStore;
use vmkeep_workflow::ids::{JobId, StreamId};
use vmkeep_workflow::journal::AppendError;

use faults::{EIO, ENOSPC, Stage, assert_an_append_is_one_fsync, under_faults};

fn open(stage: &Stage) -> SledStore {
    SledStore::open(&stage.folder, Options { reserve: 1 << 20, ..Options::default() }).unwrap()
}

#[test]
fn a_durable_append_is_fsynced_once_and_a_row_never() {
    under_faults("a_durable_append_is_fsynced_once_and_a_row_never", async |stage| {
        assert_an_append_is_one_fsync(&open(stage), stage).await;
    });
}

#[test]
fn a_failed_fsync_is_fatal_and_nothing_is_written_after_it() {
    under_faults("a_failed_fsync_is_fatal_and_nothing_is_written_after_it", async |stage| {
        for file in ["/db", "/head"] {
            // sled is not closed after this, so each store is one of its own.
            let folder = stage.folder.join(file.trim_matches('/'));
            let store = SledStore::open(&folder, Options { reserve: 1 << 20, ..Options::default() }).unwrap();
            store.append(append("a", 0, 3)).await.unwrap();
            stage.fail("fsync", EIO, file);
            let outcome = store.append(append("a", 3, 1)).await;
            assert!(matches!(outcome, Err(AppendError::Fatal(_))), "{file}: {outcome:?}");
            stage.heal();
            let (fsyncs, log) = (stage.fsyncs(), folder.join("journal.sled/db"));
            let content = std::fs::read(&log).unwrap();
            // It works again now, but what the kernel did with the pages is not known.
            for _ in 0..3 {
                let outcome = store.append(append("a", 3, 1)).await;
                assert!(matches!(outcome, Err(AppendError::Fatal(_))), "{file}: {outcome:?}");
            }
            assert!(store.put_row(JobId::new(), "copy", &serde_json::json!(1)).await.is_err());
            assert!(store.last(&StreamId::from("a")).await.is_err(), "what sled shows need not be on disk");
            drop(store);
            assert_eq!(stage.fsyncs(), fsyncs, "{file}: closing must not fsync either");
            assert!(std::fs::read(&log).unwrap() == content, "{file}: the log is left to the next process");
            // Which finds what was acknowledged, and perhaps the record in doubt.
            let store = SledStore::open_read_only(&folder).unwrap();
            let last = store.last(&StreamId::from("a")).await.unwrap().0;
            assert!(last == 3 || last == 4, "{file}: {last}");
            assert_holds(&store, "a", last).await;
            assert_whole(&store).await;
        }
    });
}

#[test]
fn a_write_that_fails_writes_nothing_and_is_survived() {
    under_faults("a_write_that_fails_writes_nothing_and_is_survived", async |stage| {
        let store = open(stage);
        store.append(append("a", 0, 1)).await.unwrap();
        let record = format!("\"{}\"", "x".repeat(3 << 20)).into_bytes();
        for (round, operation) in (1..).zip(["write", "torn", "write", "torn"]) {
            // A group of one segment, and one of many: sled's own threads then fail at several places at once.
            let wanted = if round > 2 { of("bulk", 0, vec![record.clone()]) } else { append("a", round, 1) };
            let kept = store.last(&wanted.stream).await.unwrap();
            for errno in [EIO, ENOSPC] {
                stage.fail(operation, errno, "/db");
                let outcome = store.append(wanted.clone()).await;
                // sled may not even open again while writes fail: then the process has to end.
                if let Err(AppendError::Fatal(_)) = outcome {
                    return;
                }
                assert!(
                    matches!(outcome, Err(AppendError::Full(_) | AppendError::Rejected(_))),
                    "{operation} {errno}: {outcome:?}"
                );
                stage.heal();
                assert_eq!(store.last(&wanted.stream).await, Ok(kept));
                assert_whole(&store).await;
            }
            store.append(wanted).await.unwrap();
        }
        drop(store);
        assert_whole(&open(stage)).await;
    });
}

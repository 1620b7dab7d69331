//! Streams: what is appended, what is refused, what comes back.

use std::collections::HashSet;
use std::sync::Arc;

use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{AppendError, Appended, StoreError};

use super::Stage;
use super::sample::{self, Job, append, assert_holds, assert_whole, conflict, of, read};
use crate::verify::Problem;

pub async fn records_come_back_in_order_with_a_chain_that_fits(stage: &Stage) {
    let store = stage.open();
    assert_eq!(store.append(append("a", 0, 3)).await, Ok(Appended { last: Seq(3) }));
    assert_eq!(store.append(append("b", 0, 1)).await, Ok(Appended { last: Seq(1) }));
    assert_eq!(store.append(append("a", 3, 2)).await, Ok(Appended { last: Seq(5) }));
    assert_holds(&*store, "a", 5).await;
    assert_holds(&*store, "b", 1).await;
    assert_eq!(store.last(&StreamId::from("a")).await, Ok(Seq(5)));
    assert_eq!(store.streams().await.unwrap(), [StreamId::from("a"), StreamId::from("b")]);
}

pub async fn a_part_of_a_stream_can_be_read(stage: &Stage) {
    let store = stage.open();
    store.append(append("a", 0, 9)).await.unwrap();
    let all = read(&*store, "a").await;
    let a = StreamId::from("a");
    assert_eq!(store.read(&a, Seq(0), 2).await.unwrap(), all[..2]);
    assert_eq!(store.read(&a, Seq(1), 2).await.unwrap(), all[..2]);
    assert_eq!(store.read(&a, Seq(4), 3).await.unwrap(), all[3..6]);
    assert_eq!(store.read(&a, Seq(8), 0).await.unwrap(), all[7..]);
    assert_eq!(store.read(&a, Seq(9), 100).await.unwrap(), all[8..]);
    assert_eq!(store.read(&a, Seq(10), 0).await.unwrap(), []);
    assert_eq!(store.read(&a, Seq(u64::MAX), 0).await.unwrap(), []);
}

pub async fn a_stream_that_nobody_wrote_is_empty(stage: &Stage) {
    let store = stage.open();
    let none = StreamId::from("none");
    assert_eq!(store.last(&none).await, Ok(Seq(0)));
    assert_eq!(store.read(&none, Seq(1), 0).await, Ok(Vec::new()));
    assert_eq!(store.streams().await, Ok(Vec::new()));
    assert_eq!(store.job(Job::new().id).await, Ok(None));
    assert_eq!(store.key("none").await, Ok(None));
}

pub async fn a_conflict_writes_nothing_and_tells_where_the_stream_ends(stage: &Stage) {
    let store = stage.open();
    store.append(append("a", 0, 2)).await.unwrap();
    for wrong in [0, 1, 3, u64::from(u32::MAX)] {
        let expected =
            AppendError::Conflict { stream: StreamId::from("a"), expected: Seq(wrong), actual: Seq(2) };
        assert_eq!(store.append(append("a", wrong, 1)).await, Err(expected));
    }
    assert_eq!(conflict(&store.append(append("b", 1, 1)).await), Some(Seq(0)));
    assert_eq!(store.streams().await.unwrap(), [StreamId::from("a")]);
    assert_holds(&*store, "a", 2).await;
    store.append(append("a", 2, 1)).await.unwrap();
    assert_holds(&*store, "a", 3).await;
}

pub async fn a_refused_append_leaves_no_trace(stage: &Stage) {
    let store = stage.open();
    let mut job = Job::new();
    let mut request = job.request(0, "snapshot", "web1", Some("nightly"));
    request.expected = Seq(1);
    if let Some(summary) = &mut request.summary {
        summary.seq = Seq(2);
    }
    assert_eq!(conflict(&store.append(request).await), Some(Seq(0)));
    assert_eq!(store.key("nightly").await, Ok(None));
    assert_eq!(store.job(job.id).await, Ok(None));
    assert_eq!(store.streams().await, Ok(Vec::new()));
    assert_eq!(store.history(0, 10).await, Ok(Vec::new()));
    assert_eq!(store.commits(0, 10).await, Ok(Vec::new()));
}

pub async fn what_no_stream_may_hold_is_refused(stage: &Stage) {
    let store = stage.open();
    let mut foreign = Job::new().request(0, "snapshot", "web1", None);
    foreign.stream = Job::new().stream();
    let mut ahead = Job::new().request(0, "snapshot", "web1", None);
    ahead.summary.as_mut().unwrap().seq = Seq(2);
    let refused = [
        of("a", 0, vec![]),
        of("a", 0, vec![vec![]]),
        of("a", 0, vec![b"{}".to_vec(), b"{\n}".to_vec()]),
        of("a", 0, vec![b"\"\xff\"".to_vec()]),
        of("a", 0, vec![vec![b' '; crate::MAX_RECORD + 1]]),
        of("", 0, vec![b"{}".to_vec()]),
        of("a", u64::MAX, vec![b"{}".to_vec()]),
        foreign,
        ahead,
    ];
    for append in refused {
        let what = format!("{:.200}", format!("{append:?}"));
        let outcome = store.append(append).await;
        assert!(matches!(outcome, Err(AppendError::Rejected(_))), "{what}: {outcome:?}");
    }
    assert_eq!(store.streams().await, Ok(Vec::new()));
    store.append(append("a", 0, 1)).await.unwrap();
}

pub async fn large_records_come_back(stage: &Stage) {
    let store = stage.open();
    let plan = |size: usize, fill: char| format!("\"{}\"", fill.to_string().repeat(size)).into_bytes();
    let records = vec![plan(1 << 20, 'a'), plan(3, 'b'), plan(12 << 20, 'c'), plan(1 << 20, 'd')];
    store.append(of("large", 0, records.clone())).await.unwrap();
    let found: Vec<Vec<u8>> = read(&*store, "large").await.into_iter().map(|r| r.bytes).collect();
    assert!(found == records, "they must come back unchanged");
    assert_whole(&*store).await;
}

pub async fn streams_with_odd_names_are_kept_apart(stage: &Stage) {
    let store = stage.open();
    let names = [
        "catalogue",
        "Catalogue",
        "catalogue ",
        "a/../b",
        "..",
        "-",
        "'; DROP TABLE records; --",
        "a\"b",
        "$(id)",
        "line\nbreak",
        "nul\0byte",
        "nul",
        "tab\t",
        "é",
        "e\u{301}",
        "日本",
        "\u{1f980}",
        "%",
        "_",
        "job/",
        "job/no-uuid",
    ];
    for name in names {
        store.append(append(name, 0, 1)).await.unwrap();
        store.append(append(name, 1, 1)).await.unwrap();
    }
    let mut expected: Vec<StreamId> = names.iter().map(|name| StreamId::from(*name)).collect();
    expected.sort();
    assert_eq!(store.streams().await.unwrap(), expected);
    for name in names {
        assert_holds(&*store, name, 2).await;
    }
    assert_whole(&*store).await;
}

pub async fn writers_of_many_streams_lose_nothing(stage: &Stage) {
    let store = stage.open();
    let writers: Vec<_> = (0..64)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let name = format!("writer {writer}");
                for n in 0..20 {
                    store.append(append(&name, n, 1)).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    for writer in 0..64 {
        assert_holds(&*store, &format!("writer {writer}"), 20).await;
    }
    assert_whole(&*store).await;
}

pub async fn writers_that_fight_for_a_stream_lose_nothing(stage: &Stage) {
    let store = stage.open();
    let writers: Vec<_> = (0..64)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let (mut end, mut conflicts) = (Seq(0), 0_u64);
                for n in 0..8 {
                    loop {
                        let record = format!("\"{writer}/{n}\"").into_bytes();
                        match store.append(of("ring", end.0, vec![record])).await {
                            Ok(appended) => {
                                end = appended.last;
                                break;
                            }
                            Err(AppendError::Conflict { actual, .. }) => {
                                assert_ne!(actual, end, "a conflict names another end");
                                (end, conflicts) = (actual, conflicts + 1);
                            }
                            Err(other) => panic!("{other}"),
                        }
                    }
                }
                conflicts
            })
        })
        .collect();
    let mut conflicts = 0;
    for writer in writers {
        conflicts += writer.await.unwrap();
    }
    assert!(conflicts > 0, "nobody fought");
    let records = read(&*store, "ring").await;
    let different: HashSet<&[u8]> = records.iter().map(|record| record.bytes.as_slice()).collect();
    assert_eq!((records.len(), different.len()), (512, 512));
    assert_whole(&*store).await;
}

pub async fn a_flipped_bit_is_found_by_reading_and_by_verifying(stage: &Stage) {
    let store = stage.open();
    for n in 0..5 {
        store.append(append("a", n, 1)).await.unwrap();
        store.append(append("b", n, 1)).await.unwrap();
    }
    let a = StreamId::from("a");
    // An engine with files is closed for this; the others give the same store again.
    drop(store);
    stage.engine().tamper(&stage.folder(), &a, Seq(3));
    let store = stage.open();
    for (from, limit) in [(1, 0), (3, 1), (2, 2)] {
        let outcome = store.read(&a, Seq(from), limit).await;
        let Err(StoreError::Damaged(text)) = outcome else { panic!("{outcome:?}") };
        assert!(text.contains("\"a\", record 3"), "{text}");
    }
    assert_eq!(store.read(&a, Seq(4), 0).await.unwrap().len(), 2, "what follows can still be read");
    assert_eq!(store.read(&a, Seq(1), 2).await.unwrap().len(), 2);
    let report = crate::verify::verify(&*store).await.unwrap();
    let found: Vec<_> = report.findings.iter().map(|f| (f.stream.clone(), f.seq, &f.problem)).collect();
    assert_eq!(found, [(Some(a), Some(Seq(3)), &Problem::Chain)]);
    sample::assert_holds(&*store, "b", 5).await;
}

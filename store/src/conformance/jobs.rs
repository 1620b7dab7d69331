//! Jobs: summaries, lists, keys and rows.

use std::sync::Arc;

use serde_json::json;
use vmkeep_workflow::event::Body;
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{AppendError, JobFilter};
use vmkeep_workflow::summary::{JobStatus, JobSummary};

use super::Stage;
use super::sample::{Job, assert_whole, at, of};
use crate::Store;

pub async fn a_summary_becomes_visible_with_its_events(stage: &Stage) {
    let store = stage.open();
    let mut job = Job::new();
    store.append(job.request(0, "snapshot", "web1", None)).await.unwrap();
    assert_eq!(store.job(job.id).await.unwrap(), job.summary);
    store.append(job.next(1, vec![Body::JobRecovered, Body::JobRecovered])).await.unwrap();
    assert_eq!(store.job(job.id).await.unwrap(), job.summary);
    assert_eq!(job.summary.as_ref().unwrap().seq, Seq(3));
    store.append(job.refuse(2)).await.unwrap();
    let summary = store.job(job.id).await.unwrap().unwrap();
    assert_eq!(summary.status, JobStatus::Refused);
    assert_eq!(Some(&summary), job.summary.as_ref());
    assert_eq!(store.jobs(&JobFilter::default()).await.unwrap(), [summary]);
    assert_whole(&*store).await;
}

pub async fn jobs_are_listed_by_subject_workflow_state_and_time(stage: &Stage) {
    let store = stage.open();
    let mut jobs = Vec::new();
    for (second, workflow, subject) in [
        (10, "snapshot", "web1"),
        (20, "restore", "web1"),
        (20, "snapshot", "db 'x'"),
        (30, "snapshot", "web1"),
    ] {
        let mut job = Job::new();
        store.append(job.request(second, workflow, subject, None)).await.unwrap();
        jobs.push(job);
    }
    store.append(jobs[0].refuse(40)).await.unwrap();
    let expected = |wanted: &[usize]| -> Vec<JobSummary> {
        let mut found: Vec<JobSummary> = wanted.iter().map(|&n| jobs[n].summary.clone().unwrap()).collect();
        found.sort_by_key(|job| std::cmp::Reverse((job.requested, job.job)));
        found
    };
    let all = JobFilter::default;
    let cases: Vec<(JobFilter, &[usize])> = vec![
        (all(), &[0, 1, 2, 3]),
        (JobFilter { subject: Some("web1".to_owned()), ..all() }, &[0, 1, 3]),
        (JobFilter { subject: Some("db 'x'".to_owned()), ..all() }, &[2]),
        (JobFilter { subject: Some("none".to_owned()), ..all() }, &[]),
        (JobFilter { workflow: Some("restore".to_owned()), ..all() }, &[1]),
        (JobFilter { status: vec![JobStatus::Queued], ..all() }, &[1, 2, 3]),
        (JobFilter { status: vec![JobStatus::Refused, JobStatus::Running], ..all() }, &[0]),
        (JobFilter { since: Some(at(20)), ..all() }, &[1, 2, 3]),
        (JobFilter { until: Some(at(20)), ..all() }, &[0]),
        (JobFilter { since: Some(at(11)), until: Some(at(30)), ..all() }, &[1, 2]),
        (
            JobFilter {
                subject: Some("web1".to_owned()),
                status: vec![JobStatus::Queued],
                since: Some(at(25)),
                ..all()
            },
            &[3],
        ),
    ];
    for (filter, wanted) in cases {
        assert_eq!(store.jobs(&filter).await.unwrap(), expected(wanted), "{filter:?}");
    }
    // The newest request first, the rest cut off.
    let three = store.jobs(&JobFilter { limit: 3, ..all() }).await.unwrap();
    assert_eq!(three, expected(&[0, 1, 2, 3])[..3]);
    assert_eq!(three[0].job, jobs[3].id);
}

pub async fn a_key_is_claimed_once_and_the_loser_writes_nothing(stage: &Stage) {
    let store = stage.open();
    let (mut first, mut second) = (Job::new(), Job::new());
    store.append(first.request(0, "snapshot", "web1", Some("nightly ' \u{1f980}"))).await.unwrap();
    let lost = store.append(second.request(0, "snapshot", "web1", Some("nightly ' \u{1f980}"))).await;
    assert_eq!(lost, Err(AppendError::KeyTaken(first.stream())));
    assert_eq!(store.key("nightly ' \u{1f980}").await.unwrap(), Some(first.stream()));
    assert_eq!(store.key("nightly").await.unwrap(), None);
    assert_eq!(store.last(&second.stream()).await.unwrap(), Seq(0));
    assert_eq!(store.job(second.id).await.unwrap(), None);
    assert_eq!(store.streams().await.unwrap(), [first.stream()]);
    assert_eq!(Store::keys(&*store).await.unwrap().len(), 1);
    // The holder may name it again.
    let mut again = first.next(1, vec![Body::JobRecovered]);
    again.key = Some("nightly ' \u{1f980}".to_owned());
    store.append(again).await.unwrap();
    assert_whole(&*store).await;
}

pub async fn a_key_that_many_claim_has_one_winner(stage: &Stage) {
    let store = stage.open();
    let claims: Vec<_> = (0..32)
        .map(|n| {
            let store = Arc::clone(&store);
            let name = format!("claim {n}");
            tokio::spawn(async move {
                let mut claim = of(&name, 0, vec![b"{}".to_vec()]);
                claim.key = Some("the key".to_owned());
                (name, store.append(claim).await)
            })
        })
        .collect();
    let mut winners = Vec::new();
    let mut losers = Vec::new();
    for claim in claims {
        match claim.await.unwrap() {
            (name, Ok(_)) => winners.push(StreamId::from(name)),
            (_, Err(AppendError::KeyTaken(holder))) => losers.push(holder),
            (_, Err(other)) => panic!("{other}"),
        }
    }
    assert_eq!((winners.len(), losers.len()), (1, 31));
    assert!(losers.iter().all(|holder| *holder == winners[0]), "all losers are told of the winner");
    assert_eq!(store.streams().await.unwrap(), winners);
    assert_eq!(store.key("the key").await.unwrap().as_ref(), winners.first());
}

pub async fn rows_are_kept_by_name_and_cleared_by_job(stage: &Stage) {
    let store = stage.open();
    let (one, other) = (JobId::new(), JobId::new());
    assert_eq!(store.rows(one).await.unwrap(), []);
    store.put_row(one, "copy/vdb", &json!({ "done": 1 })).await.unwrap();
    store.put_row(one, "copy/vda", &json!({ "done": 2, "text": "' \n \u{1f980}" })).await.unwrap();
    store.put_row(other, "copy/vda", &json!(null)).await.unwrap();
    store.put_row(one, "copy/vdb", &json!([3])).await.unwrap();
    let expected = [
        ("copy/vda".to_owned(), json!({ "done": 2, "text": "' \n \u{1f980}" })),
        ("copy/vdb".to_owned(), json!([3])),
    ];
    assert_eq!(store.rows(one).await.unwrap(), expected);
    store.clear_rows(one).await.unwrap();
    assert_eq!(store.rows(one).await.unwrap(), []);
    assert_eq!(store.rows(other).await.unwrap(), [("copy/vda".to_owned(), json!(null))]);
    // Rows are outside of the chain.
    assert_eq!(store.commits(0, 10).await.unwrap(), []);
}

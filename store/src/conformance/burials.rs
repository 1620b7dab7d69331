//! Letting the history of old jobs go, taking parts of a journal out, and moving it whole.

use std::io::Cursor;
use std::sync::Arc;

use vmkeep_workflow::event::{Actor, Body};
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{AppendError, JobFilter, StoreError};
use vmkeep_workflow::summary::JobStatus;

use super::sample::{Job, append, assert_whole, at, of, read};
use super::{Stage, small};
use crate::burial::{self, BurialError, bury};
use crate::chain::{Commit, Placed, hex};
use crate::export::{Choice, Part, Reader, Selection, export};
use crate::import::{ImportError, import};
use crate::verify::{Problem, verify};
use crate::{Adoption, Burial, Store, Tombstone};

fn admin() -> Actor {
    Actor { who: "admin".to_owned(), why: Some("room".to_owned()) }
}

/// Two jobs that ended, the second with a large plan, one that has not, and a stream of something else, in turns.
async fn filled(store: &dyn Store) -> Vec<Job> {
    let mut jobs = vec![Job::new(), Job::new(), Job::new()];
    store.append(jobs[0].request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
    store.append(append("catalogue", 0, 3)).await.unwrap();
    store.append(jobs[1].request(10, "restore", "db1", None)).await.unwrap();
    store.append(jobs[2].request(20, "snapshot", "web1", None)).await.unwrap();
    store.append(jobs[0].next(30, vec![Body::JobRecovered; 4])).await.unwrap();
    store.append(jobs[1].next(35, vec![Body::JobRecovered; 200])).await.unwrap();
    store.put_row(jobs[0].id, "copy/vda", &serde_json::json!(7)).await.unwrap();
    store.append(jobs[0].refuse(40)).await.unwrap();
    store.append(append("catalogue", 3, 1)).await.unwrap();
    store.append(jobs[1].refuse(50)).await.unwrap();
    jobs
}

async fn all(store: &dyn Store) -> (Vec<Placed>, Vec<Commit>) {
    (store.history(0, 10_000).await.unwrap(), store.commits(0, 10_000).await.unwrap())
}

pub async fn a_buried_job_leaves_its_tombstone_and_the_order_stays_proven(stage: &Stage) {
    let store = stage.open();
    let jobs = filled(&*store).await;
    let (stream, id) = (jobs[0].stream(), jobs[0].id);
    let events = read(&*store, stream.as_str()).await;
    let before = all(&*store).await;
    let tombstone = bury(&*store, id, admin(), at(99)).await.unwrap();
    let expected = Tombstone {
        stream: stream.clone(),
        events: 6,
        first: at(0),
        last: at(40),
        hash: hex(&events[5].hash),
        workflow: "snapshot".into(),
        subject: jobs[0].summary.clone().unwrap().subject,
        status: JobStatus::Refused,
        key: Some("nightly".to_owned()),
        by: admin(),
    };
    assert_eq!(tombstone, expected);

    // The same places, commits, seals and hashes, and one commit more, with the tombstone.
    let after = all(&*store).await;
    let (known, new) = after.0.split_at(before.0.len());
    for (was, is) in before.0.iter().zip(known) {
        let mut was = was.clone();
        if was.record.stream == stream {
            was.record.bytes.clear();
        }
        assert_eq!(was, *is);
    }
    assert_eq!(after.1[..before.1.len()], before.1);
    assert_eq!((new.len(), after.1.len()), (1, before.1.len() + 1));
    assert_eq!(new[0].record.stream.as_str(), burial::STREAM);
    let report = verify(&*store).await.unwrap();
    assert_eq!((report.findings, report.pruned), (vec![], vec![expected]));

    // What is asked about the job is answered accordingly.
    let gone = StoreError::Pruned { stream: stream.clone(), events: 6, hash: tombstone.hash };
    assert_eq!(store.read(&stream, Seq(1), 0).await, Err(gone.clone()));
    assert_eq!(store.read(&stream, Seq(6), 1).await, Err(gone));
    assert_eq!(store.last(&stream).await, Ok(Seq(6)));
    assert!(!store.streams().await.unwrap().contains(&stream));
    assert_eq!(store.job(id).await, Ok(None));
    assert_eq!(store.rows(id).await, Ok(vec![]));
    let listed: Vec<_> = store.jobs(&JobFilter::default()).await.unwrap().iter().map(|job| job.job).collect();
    assert_eq!(listed, [jobs[2].id, jobs[1].id]);
    let mut late = append(stream.as_str(), 6, 1);
    assert!(matches!(store.append(late.clone()).await, Err(AppendError::Rejected(_))));
    late.expected = Seq(0);
    assert!(matches!(store.append(late).await, Err(AppendError::Conflict { actual: Seq(6), .. })));
    assert!(matches!(bury(&*store, id, admin(), at(99)).await, Err(BurialError::NoJob(_))));

    // A key that was used once stays taken.
    assert_eq!(store.key("nightly").await, Ok(Some(stream.clone())));
    let again = store.append(Job::new().request(100, "snapshot", "web1", Some("nightly"))).await;
    assert_eq!(again, Err(AppendError::KeyTaken(stream.clone())));

    // The others are what they were; so is all of this after reopening.
    bury(&*store, jobs[1].id, admin(), at(100)).await.unwrap();
    drop(store);
    let store = stage.open();
    assert_eq!(store.job(jobs[2].id).await.unwrap(), jobs[2].summary);
    assert_eq!(read(&*store, "catalogue").await.len(), 4);
    assert!(matches!(store.read(&stream, Seq(1), 0).await, Err(StoreError::Pruned { events: 6, .. })));
    assert!(matches!(store.append(append(stream.as_str(), 6, 1)).await, Err(AppendError::Rejected(_))));
    assert_eq!(verify(&*store).await.unwrap().pruned.len(), 2);
    assert_whole(&*store).await;
}

pub async fn what_has_not_ended_or_went_on_is_not_buried(stage: &Stage) {
    let store = stage.open();
    let mut jobs = filled(&*store).await;
    let before = all(&*store).await;
    let outcome = bury(&*store, jobs[2].id, admin(), at(99)).await;
    assert!(matches!(outcome, Err(BurialError::NotEnded { status: JobStatus::Queued, .. })), "{outcome:?}");
    assert!(matches!(bury(&*store, Job::new().id, admin(), at(99)).await, Err(BurialError::NoJob(_))));
    // An engine buries exactly what its caller has seen.
    let note = append(burial::STREAM, 0, 1);
    for events in [1, 5, 7] {
        let burial = Burial { job: jobs[0].id, events: Seq(events), note: note.clone() };
        let outcome = store.bury(burial).await;
        assert!(matches!(outcome, Err(AppendError::Conflict { actual: Seq(6), .. })), "{outcome:?}");
    }
    let mut foreign = Burial { job: jobs[0].id, events: Seq(6), note: note.clone() };
    foreign.note.stream = jobs[1].stream();
    assert!(matches!(store.bury(foreign).await, Err(AppendError::Rejected(_))));
    let late = Burial { job: jobs[0].id, events: Seq(6), note: append(burial::STREAM, 1, 1) };
    assert!(matches!(store.bury(late).await, Err(AppendError::Conflict { actual: Seq(0), .. })));
    assert_eq!(all(&*store).await, before);
    store.append(jobs[0].next(41, vec![Body::JobRecovered])).await.unwrap();
    assert_whole(&*store).await;
}

pub async fn bytes_that_are_gone_without_a_tombstone_are_damage(stage: &Stage) {
    let store = stage.open();
    let jobs = filled(&*store).await;
    let (mut records, commits) = all(&*store).await;
    let keys = Store::keys(&*store).await.unwrap();
    for placed in &mut records {
        if placed.record.stream == jobs[0].stream() {
            placed.record.bytes.clear();
        }
    }
    let options = crate::Options { id: Some(store.id()), ..small() };
    let other = stage.engine().open(&stage.elsewhere(), options).unwrap();
    let summaries = jobs[1..].iter().filter_map(|job| job.summary.clone()).collect();
    other.adopt(Adoption { commits, records, jobs: summaries, keys }).await.unwrap();
    let report = verify(&*other).await.unwrap();
    let found: Vec<_> = report.findings.iter().map(|f| (f.stream.clone(), &f.problem)).collect();
    assert_eq!(found, [(Some(jobs[0].stream()), &Problem::Tombstone)]);
}

pub async fn a_journal_that_was_pruned_is_exported_whole_and_not_imported(stage: &Stage) {
    let store = stage.open();
    let jobs = filled(&*store).await;
    let tombstone = bury(&*store, jobs[0].id, admin(), at(99)).await.unwrap();
    let mut text = Vec::new();
    let exported = export(&*store, Selection::Whole, &mut text).await.unwrap();
    let check = |text: &str| {
        let mut reader = Reader::new(Cursor::new(text.to_owned())).unwrap();
        while reader.next_item()?.is_some() {}
        Ok::<_, crate::export::ReadError>((reader.seen(), reader.tombstones()))
    };
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.matches("\"pruned\":true").count(), 6);
    assert_eq!(check(&text).unwrap(), (exported, vec![tombstone]));
    // The seals vouch for the hashes of what is gone, and only a tombstone makes it right.
    let gone = text.lines().find(|line| line.contains("\"pruned\":true")).unwrap();
    for (what, edited) in [
        ("a hash is another", text.replace(gone, &gone.replacen("\"hash\":\"", "\"hash\":\"0", 1))),
        ("one more is gone", {
            let event = text.lines().find(|line| line.contains(&jobs[1].stream().to_string())).unwrap();
            let end = event.find(",\"event\":").unwrap();
            text.replacen(event, &format!("{},\"pruned\":true}}", &event[..end]), 1)
        }),
    ] {
        assert!(check(&edited).is_err(), "{what}");
    }
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    let outcome = import(&*other, &mut Cursor::new(&text)).await;
    assert!(
        matches!(&outcome, Err(ImportError::Pruned(stream)) if *stream == jobs[0].stream()),
        "{outcome:?}"
    );
    assert_eq!(other.streams().await.unwrap(), []);
    let outcome = export(&*store, Selection::Parts(&[Part::whole(jobs[0].stream())]), &mut Vec::new()).await;
    assert!(outcome.is_err(), "a single stream that is gone cannot be exported");
}

pub async fn a_journal_verifies_while_jobs_are_buried(stage: &Stage) {
    let store = stage.open();
    let mut jobs = Vec::new();
    for n in 0..60 {
        let mut job = Job::new();
        store.append(job.request(n, "snapshot", "web1", Some(&format!("key {n}")))).await.unwrap();
        store.append(job.next(n, vec![Body::JobRecovered; 20])).await.unwrap();
        store.append(job.refuse(n)).await.unwrap();
        jobs.push(job);
    }
    let undertaker = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for job in jobs {
                bury(&*store, job.id, admin(), at(99)).await.unwrap();
            }
        })
    };
    let mut checks = 0;
    while !undertaker.is_finished() || checks == 0 {
        assert_whole(&*store).await;
        checks += 1;
    }
    undertaker.await.unwrap();
    let report = verify(&*store).await.unwrap();
    assert_eq!((report.pruned.len(), report.jobs, report.found), (60, 0, 0));
}

pub async fn a_part_of_a_journal_is_taken_by_time_subject_and_state(stage: &Stage) {
    let store = stage.open();
    let jobs = filled(&*store).await;
    // A stream that is not a job's, with a record each ten seconds.
    let told = |n: i64| format!(r#"{{"at":"{}","n":{n}}}"#, at(10 * n)).into_bytes();
    store.append(of("notes", 0, (0..6).map(told).collect())).await.unwrap();
    let names = |wanted: &[usize]| wanted.iter().map(|&n| jobs[n].stream()).collect::<Vec<_>>();
    let choice = Choice::default;
    let cases: Vec<(Choice, Vec<StreamId>)> = vec![
        (Choice { job: Some(jobs[1].id), ..choice() }, names(&[1])),
        (Choice { subject: Some("web1".to_owned()), ..choice() }, names(&[0, 2])),
        (Choice { subject: Some("the web1".to_owned()), ..choice() }, names(&[0, 2])),
        (Choice { status: vec![JobStatus::Refused], ..choice() }, names(&[0, 1])),
        // Alive within the span: one that has not ended is alive for ever.
        (
            Choice { status: vec![JobStatus::Queued, JobStatus::Refused], since: Some(at(45)), ..choice() },
            names(&[1, 2]),
        ),
        (Choice { subject: Some("web1".to_owned()), until: Some(at(20)), ..choice() }, names(&[0])),
    ];
    for (choice, wanted) in cases {
        let expected: Vec<Part> = wanted.into_iter().map(Part::whole).collect();
        assert_eq!(choice.parts(&*store).await.unwrap(), expected, "{choice:?}");
    }
    // By time alone other streams come along, cut.
    let span = Choice { since: Some(at(20)), until: Some(at(40)), ..choice() };
    let parts = span.parts(&*store).await.unwrap();
    let mut text = Vec::new();
    export(&*store, Selection::Parts(&parts), &mut text).await.unwrap();
    let mut reader = Reader::new(Cursor::new(&text)).unwrap();
    let mut records = Vec::new();
    while let Some(crate::export::Item::Record(record, _)) = reader.next_item().unwrap() {
        records.push(record);
    }
    let of_stream = |name: &str| records.iter().filter(|r| r.stream.as_str() == name).count();
    assert_eq!((of_stream("notes"), of_stream("catalogue")), (2, 4), "what tells no time comes along");
    assert!(jobs.iter().all(|job| of_stream(job.stream().as_str()) > 0));
    let cuts: Vec<_> = reader.cuts().iter().map(|c| (c.stream.to_string(), c.from, c.to, c.of)).collect();
    assert_eq!(cuts, [("notes".to_owned(), Seq(3), Seq(4), Seq(6))]);
    // Its chain is checkable from where it begins.
    let edited = String::from_utf8(text.clone()).unwrap().replace("\"n\":3", "\"n\":7");
    let mut reader = Reader::new(Cursor::new(edited)).unwrap();
    let outcome = loop {
        match reader.next_item() {
            Ok(Some(_)) => {}
            outcome => break outcome,
        }
    };
    assert!(outcome.is_err());
    // Nobody can take in what has no beginning.
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    let outcome = import(&*other, &mut Cursor::new(&text)).await;
    assert!(matches!(&outcome, Err(ImportError::Cut { from: Seq(3), last: Seq(0), .. })), "{outcome:?}");
    assert_eq!(other.streams().await.unwrap(), []);
}

pub async fn an_adopted_journal_has_the_same_head(stage: &Stage) {
    let store = stage.open();
    let jobs = filled(&*store).await;
    bury(&*store, jobs[0].id, admin(), at(99)).await.unwrap();
    let (records, commits) = all(&*store).await;
    let options = crate::Options { id: Some(store.id()), created: Some(store.created()), ..small() };
    let other = stage.engine().open(&stage.elsewhere(), options).unwrap();
    // Some commits, then the rest; nothing that does not follow.
    let (some, rest) = commits.split_at(3);
    let of = |commits: &[Commit]| -> Vec<Placed> {
        let in_it = |placed: &&Placed| commits.iter().any(|commit| commit.number == placed.commit);
        records.iter().filter(in_it).cloned().collect()
    };
    let adoption = |commits: &[Commit]| Adoption {
        commits: commits.to_vec(),
        records: of(commits),
        ..Adoption::default()
    };
    assert!(matches!(other.adopt(adoption(rest)).await, Err(AppendError::Rejected(_))));
    other.adopt(adoption(some)).await.unwrap();
    assert!(matches!(other.adopt(adoption(some)).await, Err(AppendError::Rejected(_))));
    let last = Adoption {
        jobs: store.jobs(&JobFilter::default()).await.unwrap(),
        keys: Store::keys(&*store).await.unwrap(),
        ..adoption(rest)
    };
    other.adopt(last).await.unwrap();
    assert_eq!(all(&*other).await, all(&*store).await);
    let (one, two) = (verify(&*store).await.unwrap(), verify(&*other).await.unwrap());
    assert_eq!((one.link, one.pruned, one.found), (two.link, two.pruned, two.found));
    assert_eq!(other.created(), store.created());
    // It goes on from there.
    other.append(append("catalogue", 4, 1)).await.unwrap();
    assert!(matches!(
        other.append(append(jobs[0].stream().as_str(), 6, 1)).await,
        Err(AppendError::Rejected(_))
    ));
    assert_whole(&*other).await;
    drop(other);
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    assert_eq!(other.jobs(&JobFilter::default()).await, store.jobs(&JobFilter::default()).await);
    assert_whole(&*other).await;
}

//! One event of every kind, with all that each can hold.

use std::collections::BTreeMap;

use serde_json::json;
use vmkeep_store::conformance::sample::at;
use vmkeep_workflow::event::{
    Actor, Body, Cause, Event, IfBusy, Item, JobRequest, Settle, Subject, Timer, Verdict,
};
use vmkeep_workflow::fault::{Code, Fault};
use vmkeep_workflow::ids::{JobId, Phase, Seq, StepKind, StreamId};
use vmkeep_workflow::journal::Append;
use vmkeep_workflow::plan::{Plan, StepSpec};
use vmkeep_workflow::summary::JobSummary;

fn by() -> Actor {
    Actor { who: "admin".to_owned(), why: Some("before the \"upgrade\"".to_owned()) }
}

fn fault() -> Fault {
    Fault::permanent(Code::SUBJECT_BUSY, "copy", "web1, vda", "no \\ room \u{1f980}").remedy("make room")
}

fn bodies() -> Vec<Body> {
    use Phase::{Forward, Undo};
    let (step, attempt) = (|| "copy-vda".into(), 2);
    let kind = StepKind::new("copy", 3);
    let steps = vec![
        StepSpec::new(
            "freeze",
            StepKind::new("freeze", 1),
            "freeze the guest",
            json!({ "mounts": ["/", "/srv"] }),
        ),
        StepSpec::new("copy-vda", kind, "copy vda", json!({ "from": "/a", "bytes": 7 }))
            .after("freeze")
            .undoable(),
    ];
    let plan =
        Plan::new("snapshot", 4, "a backup of web1", steps, None, json!({ "digest": "ab12" })).unwrap();
    let request = JobRequest {
        workflow: "snapshot".into(),
        subject: Subject { id: "11111111-1111-4111-8111-111111111111".to_owned(), label: "web1".to_owned() },
        options: json!({ "live": true, "rate": 1.0e3, "none": null, "list": [1, "two"] }),
        key: Some("nightly".to_owned()),
        by: by(),
        if_busy: IfBusy::Queue,
        limits: vec!["root:/backups".to_owned()],
        retry_of: Some(JobId::new()),
    };
    let item = || Item { step: step(), phase: Undo, fault: fault() };
    let cause = || Cause::Failure { step: step(), fault: fault() };
    vec![
        Body::JobRequested(request),
        Body::JobPlanned(Box::new(plan)),
        Body::FactsChecked { before: step(), difference: Some("vda grew".to_owned()) },
        Body::StepStarted { step: step(), phase: Forward, attempt, resume: Some(json!({ "at": 4096 })) },
        Body::StepSucceeded { step: step(), phase: Forward, attempt, output: json!({ "hash": "ff" }) },
        Body::StepFailed { step: step(), phase: Undo, attempt, fault: fault() },
        Body::StepStalled { step: step(), phase: Forward, attempt },
        Body::StepProbed { step: step(), phase: Forward, attempt, verdict: Verdict::Partial(json!([1, 2])) },
        Body::RetryScheduled { step: step(), phase: Forward, attempt: 3, at: at(60) },
        Body::SignalAwaited { step: step(), until: at(90) },
        Body::TimerFired(Timer::Deadline { step: step(), phase: Forward, attempt }),
        Body::SignalReceived { name: "go".to_owned(), value: json!(false), by: by() },
        Body::JobRecovered,
        Body::CancelRequested(by()),
        Body::PauseRequested { by: by(), until: at(99) },
        Body::ResumeRequested(by()),
        Body::SettleRequested { by: by(), how: Settle::Undo },
        Body::Intervened { act: "thawed the guest".to_owned(), outcome: "it runs".to_owned() },
        Body::UnwindBegan(cause()),
        Body::JobNeedsAttention(vec![item(), item()]),
        Body::JobSucceeded,
        Body::JobRolledBack(cause()),
        Body::JobAbandoned { by: by(), left: vec!["/overlay".to_owned()] },
        Body::JobRefused(fault()),
    ]
}

/// The appends of a journal of one job, an event each. No job's journal really goes like that; no store minds.
pub(crate) fn appends() -> Vec<Append> {
    let job = JobId::new();
    let mut summary: Option<JobSummary> = None;
    let append = |(n, body): (u64, Body)| {
        let env = BTreeMap::from([("boot".to_owned(), "b00t".to_owned())]);
        let event = Event::new(at(i64::try_from(n).unwrap()), env, body);
        match &mut summary {
            Some(summary) => summary.apply(&event),
            None => summary = JobSummary::first(job, &event),
        }
        Append {
            stream: StreamId::job(job),
            expected: Seq(n),
            records: vec![serde_json::to_vec(&event).unwrap()],
            summary: summary.clone(),
            key: (n == 0).then(|| "nightly".to_owned()),
        }
    };
    (0..).zip(bodies()).map(append).collect()
}

#[test]
fn every_kind_of_event_that_there_is_takes_part() {
    let source = include_str!("../../../workflow/src/event.rs");
    let names = source.split_once("fn type_name").unwrap().1;
    let names: Vec<&str> = names.split('"').skip(1).step_by(2).collect();
    let mut ours: Vec<&str> = bodies().iter().map(Body::type_name).collect();
    ours.sort_unstable();
    let mut all = names.clone();
    all.sort_unstable();
    assert_eq!(ours, all);
}

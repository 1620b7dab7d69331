//! The engine over a real store, with a world of switches: what holds whatever is cut off where.

mod world;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::json;
use vmkeep_store::MemoryStore;
use vmkeep_workflow::event::{Body, Verdict};
use vmkeep_workflow::journal::{EventStore, JobFilter};
use vmkeep_workflow::{Class, Code, Engine, Fault, IfBusy, JobStatus, Seq, Settle, StreamId, replay};
use world::{Forgetful, Script, Tripwire, World, engine, request, who};

#[tokio::test]
async fn a_job_runs_to_its_end_and_its_history_replays() {
    let store = Arc::new(MemoryStore::new());
    let world = World::new();
    let engine = engine(store.clone(), &world);
    let job = engine.request(request("web1")).await.unwrap();
    let summary = engine.wait(job).await.unwrap();
    assert_eq!(summary.status, JobStatus::Succeeded);
    assert_eq!((summary.steps, summary.steps_done), (5, 5));
    assert_eq!(world.on(), ["a", "b1", "b2", "close", "commit"]);
    let records = store.read(&StreamId::job(job), Seq(1), 0).await.unwrap();
    let report = replay::check(&records).unwrap();
    assert_eq!(report.summary.unwrap(), summary);
    assert_eq!(report.decisions, 6, "five starts and the end");
    assert!(engine.holder("web1").is_none());
}

/// Whoever dies right before an event is durable has done nothing of what it announces.
#[tokio::test]
async fn no_effect_is_there_before_the_event_that_announces_it() {
    for cut in 2..=12 {
        let world = World::new();
        let memory = Arc::new(MemoryStore::new());
        let tripwire = Arc::new(Tripwire::new(memory.clone(), cut, false));
        let engine = engine(tripwire.clone(), &world);
        let job = engine.request(request("web1")).await.unwrap();
        tokio::select! {
            _ = engine.wait(job) => continue,
            () = tripwire.tripped() => {}
        }
        let records = memory.read(&StreamId::job(job), Seq(1), 0).await.unwrap();
        let text: String =
            records.iter().map(|record| String::from_utf8_lossy(&record.bytes).into_owned()).collect();
        for effect in world.on() {
            let started = format!(r#""type":"step_started","data":{{"step":"{effect}""#);
            assert!(text.contains(&started), "cut before {cut}: {effect} is there, and no event says so");
        }
    }
}

#[tokio::test]
async fn a_job_cut_off_before_or_after_any_append_goes_on_to_the_same_end() {
    let clean = {
        let world = World::new();
        let store = Arc::new(MemoryStore::new());
        let engine = engine(store.clone(), &world);
        let job = engine.request(request("web1")).await.unwrap();
        engine.wait(job).await.unwrap();
        store.last(&StreamId::job(job)).await.unwrap().0
    };
    for failing in [None, Some("commit"), Some("b2")] {
        for durable in [false, true] {
            for cut in 2..=clean + 8 {
                let world = World::new();
                if let Some(step) = failing {
                    world.script(step, Script::Fail(Class::Permanent));
                }
                let memory = Arc::new(MemoryStore::new());
                let tripwire = Arc::new(Tripwire::new(memory.clone(), cut, durable));
                let first = engine(tripwire.clone(), &world);
                let job = first.request(request("web1")).await.unwrap();
                tokio::select! {
                    _ = first.wait(job) => {}
                    () = tripwire.tripped() => {}
                }
                world.abandon_calls();
                let second = engine(memory.clone(), &world);
                second.recover().await.unwrap();
                let summary = second.wait(job).await.unwrap();
                let case = format!("cut at {cut}, durable {durable}, failing {failing:?}");
                if failing.is_none() {
                    assert_eq!(summary.status, JobStatus::Succeeded, "{case}: {:?}", summary.fault);
                    assert_eq!(world.on(), ["a", "b1", "b2", "close", "commit"], "{case}");
                } else {
                    assert_eq!(summary.status, JobStatus::RolledBack, "{case}");
                    assert_eq!(world.on(), ["close"], "{case}: only the closer stays");
                }
                let records = memory.read(&StreamId::job(job), Seq(1), 0).await.unwrap();
                replay::check(&records).unwrap_or_else(|e| panic!("{case}: {e}"));
            }
        }
    }
}

#[tokio::test]
async fn a_busy_subject_refuses_a_second_job_or_queues_it() {
    let world = World::new();
    let gate = world.block("a");
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let first = engine.request(request("web1")).await.unwrap();
    gate.reached().await;
    let refused = engine.request(request("web1")).await.unwrap_err();
    assert_eq!(refused.code, Code::SUBJECT_BUSY);
    assert!(refused.cause.contains(&first.to_string()), "{refused}");
    let mut queued = request("web1");
    queued.if_busy = IfBusy::Queue;
    let second = engine.request(queued).await.unwrap();
    let other = engine.request(request("db1")).await.unwrap();
    assert_eq!(engine.wait(other).await.unwrap().status, JobStatus::Succeeded, "another subject is free");
    assert_eq!(engine.summary(second).await.unwrap().status, JobStatus::Queued);
    gate.open();
    assert_eq!(engine.wait(first).await.unwrap().status, JobStatus::Succeeded);
    assert_eq!(engine.wait(second).await.unwrap().status, JobStatus::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_saw_a_job_end_may_ask_for_the_next_one_at_once() {
    let engine = engine(Arc::new(MemoryStore::new()), &World::new());
    for _ in 0..200 {
        let job = engine.request(request("web1")).await.unwrap();
        assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Succeeded);
    }
}

#[tokio::test]
async fn the_lock_of_a_job_that_needs_attention_outlives_a_restart_and_ends_when_it_is_settled() {
    let store = Arc::new(MemoryStore::new());
    let world = World::new();
    world.script("close", Script::Fail(Class::Permanent));
    let first = engine(store.clone(), &world);
    let job = first.request(request("web1")).await.unwrap();
    assert_eq!(first.wait(job).await.unwrap().status, JobStatus::NeedsAttention);
    first.shutdown().await;
    let second = engine(store.clone(), &world);
    second.recover().await.unwrap();
    let refused = second.request(request("web1")).await.unwrap_err();
    assert_eq!(refused.code, Code::NEEDS_ATTENTION);
    assert!(refused.remedy.contains(&format!("vmkeep job settle {job}")), "{refused}");
    world.script("close", Script::Work);
    second.settle(job, who("ann"), Settle::Retry).await.unwrap();
    assert_eq!(second.wait(job).await.unwrap().status, JobStatus::Succeeded);
    second.request(request("web1")).await.unwrap();
}

#[tokio::test]
async fn a_closed_subject_keeps_its_job_waiting_and_lets_all_others_go_on() {
    let store = Arc::new(MemoryStore::new());
    let world = World::new();
    let gate = world.block("b1");
    let first = engine(store.clone(), &world);
    let job = first.request(request("web1")).await.unwrap();
    gate.reached().await;
    let why = || Fault::transient(Code::INVALID_STATE, "start a job", "web1", "QEMU does not answer");
    assert!(!first.close("web1", why()), "a job that is being driven sees to its subject itself");
    drop(first);
    world.abandon_calls();

    let second = engine(store.clone(), &world);
    assert!(second.close("web1", why()));
    let recovery = second.recover().await.unwrap();
    assert_eq!(recovery.resumed, [job]);
    let mut patient = request("web1");
    patient.if_busy = IfBusy::Queue;
    let queued = second.request(patient).await.unwrap();
    let refused = second.request(request("web1")).await.unwrap_err();
    assert_eq!((refused.code, refused.cause.as_str()), (Code::INVALID_STATE, "QEMU does not answer"));
    let other = second.request(request("db1")).await.unwrap();
    assert_eq!(second.wait(other).await.unwrap().status, JobStatus::Succeeded);
    assert_eq!(second.holder("web1"), Some(job));
    let refused = second.cancel(job, who("ann")).await.unwrap_err();
    assert!(refused.cause.contains("does not answer"), "{refused}");
    assert_eq!(second.summary(job).await.unwrap().status, JobStatus::Running);
    let begun = second.history(job).await.unwrap().len();

    second.open("web1");
    assert_eq!(second.wait(job).await.unwrap().status, JobStatus::Succeeded);
    assert_eq!(second.wait(queued).await.unwrap().status, JobStatus::Succeeded);
    let history = second.history(job).await.unwrap();
    assert!(matches!(history[begun].1.body, Body::JobRecovered), "nothing happened to it while it waited");
    let records = store.read(&StreamId::job(job), Seq(1), 0).await.unwrap();
    replay::check(&records).unwrap();
}

#[tokio::test]
async fn a_pause_that_has_to_wait_for_a_safe_place_says_so_and_says_when_it_takes_effect() {
    let world = World::new();
    let gate = world.block("b1");
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let mut asked = request("web1");
    asked.options = json!({ "critical": true });
    let job = engine.request(asked).await.unwrap();
    gate.reached().await;
    engine.pause(job, who("ann"), Timestamp::MAX).await.unwrap();
    assert_eq!(engine.view(job).await.unwrap().safe_after, ["switch close"]);
    gate.open();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Succeeded);
    let told = async |job| {
        let lines = vmkeep_workflow::explain::explain(&engine.history(job).await.unwrap());
        lines.into_iter().map(|line| line.text).collect::<Vec<String>>()
    };
    let tale = told(job).await;
    let tells = |a: &str, b: &str| tale.iter().any(|line| line.contains(a) && line.contains(b));
    assert!(tells("ann asked to pause", "it takes effect after \"switch close\", because"), "{tale:#?}");
    assert!(tells("Done: \"switch close\"", "now the pause takes effect"), "{tale:#?}");

    // A job that rolls back does not pause on its way.
    let gate = world.block("b1");
    let mut asked = request("web1");
    asked.options = json!({ "critical": true });
    let job = engine.request(asked).await.unwrap();
    gate.reached().await;
    engine.pause(job, who("ann"), Timestamp::MAX).await.unwrap();
    engine.cancel(job, who("ann")).await.unwrap();
    gate.open();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Cancelled);
    let tale = told(job).await;
    assert!(!tale.iter().any(|line| line.contains("now the pause takes effect")), "{tale:#?}");
}

#[tokio::test]
async fn a_job_given_up_frees_its_subject_and_says_what_is_left() {
    let store = Arc::new(MemoryStore::new());
    let world = World::new();
    world.script("close", Script::Fail(Class::Permanent));
    let engine = engine(store.clone(), &world);
    let job = engine.request(request("web1")).await.unwrap();
    engine.wait(job).await.unwrap();
    engine.abandon(job, who("ann")).await.unwrap();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Abandoned);
    let history = engine.history(job).await.unwrap();
    let Body::JobAbandoned { left, .. } = &history.last().unwrap().1.body else { panic!() };
    assert!(left[0].contains("close"), "{left:?}");
    world.script("close", Script::Work);
    engine.request(request("web1")).await.unwrap();
    let again = engine.abandon(job, who("ann")).await.unwrap_err();
    assert_eq!(again.code, Code::INVALID_STATE);
}

#[tokio::test]
async fn the_same_key_is_the_same_job_and_never_another_request() {
    let world = World::new();
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let mut keyed = request("web1");
    keyed.key = Some("nightly".to_owned());
    let first = engine.request(keyed.clone()).await.unwrap();
    assert_eq!(engine.request(keyed.clone()).await.unwrap(), first);
    engine.wait(first).await.unwrap();
    assert_eq!(engine.request(keyed.clone()).await.unwrap(), first, "also after it has ended");
    keyed.options = json!({"other": true});
    assert_eq!(engine.request(keyed).await.unwrap_err().code, Code::DUPLICATE_KEY);
}

#[tokio::test]
async fn a_cancel_waits_for_the_running_step_and_rolls_back() {
    let world = World::new();
    let gate = world.block("b1");
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let job = engine.request(request("web1")).await.unwrap();
    gate.reached().await;
    engine.cancel(job, who("ann")).await.unwrap();
    gate.open();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Cancelled);
    assert_eq!(world.on(), ["close"]);
}

#[tokio::test]
async fn a_panic_in_a_step_is_a_coded_failure_of_that_job_alone() {
    let world = World::new();
    world.script("b1", Script::Panic);
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let job = engine.request(request("web1")).await.unwrap();
    let summary = engine.wait(job).await.unwrap();
    assert_eq!(summary.status, JobStatus::RolledBack);
    assert_eq!(summary.fault.unwrap().code, Code::UNDEFINED);
    let other = engine.request(request("db1")).await;
    assert!(other.is_ok());
}

#[tokio::test]
async fn while_a_call_has_not_returned_nothing_there_proves_nothing() {
    let world = World::new();
    let gate = world.block("a");
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let mut hasty = request("web1");
    hasty.options = json!({"deadline_ms": 50});
    let job = engine.request(hasty).await.unwrap();
    gate.reached().await;
    let mut probes = engine.store().subscribe();
    loop {
        let record = probes.recv().await.unwrap();
        let text = String::from_utf8(record.bytes).unwrap();
        if text.contains("step_probed") {
            assert!(text.contains("in_flight"), "{text}");
            break;
        }
    }
    gate.open();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Succeeded, "it was only late");
}

#[tokio::test]
async fn a_step_without_progress_is_looked_at() {
    let world = World::new();
    let gate = world.block("a");
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let mut slow = request("web1");
    slow.options = json!({"stall_ms": 50});
    let job = engine.request(slow).await.unwrap();
    gate.reached().await;
    let mut events = engine.store().subscribe();
    loop {
        let record = events.recv().await.unwrap();
        if String::from_utf8(record.bytes).unwrap().contains("step_stalled") {
            break;
        }
    }
    gate.open();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Succeeded);
}

#[tokio::test]
async fn a_shutdown_stops_a_step_that_can_go_on_later_and_the_next_engine_carries_on_from_there() {
    let store = Arc::new(MemoryStore::new());
    let world = World::new();
    world.script("b1", Script::Resumable);
    let first = engine(store.clone(), &world);
    let job = first.request(request("web1")).await.unwrap();
    world.resumable_reached().await;
    first.shutdown().await;
    let history = first.history(job).await.unwrap();
    assert!(
        !history.iter().any(|(_, e)| matches!(e.body, Body::StepFailed { .. })),
        "giving way is no failure"
    );
    let second = engine(store.clone(), &world);
    second.recover().await.unwrap();
    assert_eq!(second.wait(job).await.unwrap().status, JobStatus::Succeeded);
    let history = second.history(job).await.unwrap();
    let partial = history.iter().any(|(_, e)| {
        matches!(&e.body, Body::StepProbed { verdict: Verdict::Partial(token), .. } if *token == json!({"offset": 7}))
    });
    assert!(partial, "the saved token came back through a probe");
    assert_eq!(world.resumed_from(), Some(json!({"offset": 7})));
}

#[tokio::test]
async fn a_job_that_cannot_be_read_keeps_its_subject_and_stops_no_other() {
    let store = Arc::new(MemoryStore::new());
    let world = World::new();
    let gate = world.block("a");
    let first = engine(store.clone(), &world);
    let odd = first.request(request("web1")).await.unwrap();
    gate.reached().await;
    world.abandon_calls();
    // Another release writes an event that this one does not know.
    let last = store.last(&StreamId::job(odd)).await.unwrap();
    let bytes = br#"{"v":1,"at":"2026-01-01T00:00:00Z","body":{"type":"invented_later","data":{}}}"#.to_vec();
    let append = vmkeep_workflow::journal::Append {
        stream: StreamId::job(odd),
        expected: last,
        records: vec![bytes],
        summary: None,
        key: None,
    };
    store.append(append).await.unwrap();
    let fresh = World::new();
    let second = engine(store.clone(), &fresh);
    let recovery = second.recover().await.unwrap();
    assert_eq!(recovery.parked.len(), 1);
    assert_eq!(recovery.parked[0].1.code, Code::UNKNOWN_STEP_KIND);
    assert_eq!(second.request(request("web1")).await.unwrap_err().code, Code::NEEDS_ATTENTION);
    let other = second.request(request("db1")).await.unwrap();
    assert_eq!(second.wait(other).await.unwrap().status, JobStatus::Succeeded);
    assert!(second.view(odd).await.unwrap().parked.is_some());
    second.abandon(odd, who("ann")).await.unwrap();
    assert_eq!(second.summary(odd).await.unwrap().status, JobStatus::Abandoned);
    let free = second.request(request("web1")).await.unwrap();
    assert_eq!(second.wait(free).await.unwrap().status, JobStatus::Succeeded);
    let third = engine(store.clone(), &fresh);
    assert!(third.recover().await.unwrap().parked.is_empty(), "given up for good");
}

#[tokio::test]
async fn a_plan_that_cannot_be_made_refuses_the_job_with_its_reason() {
    let world = World::new();
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let mut bad = request("web1");
    bad.options = json!({"refuse": true});
    let fault = engine.dry_run(bad.clone()).await.unwrap_err();
    assert_eq!(fault.code, Code(23));
    let job = engine.request(bad).await.unwrap();
    let summary = engine.wait(job).await.unwrap();
    assert_eq!((summary.status, summary.fault.unwrap().code), (JobStatus::Refused, Code(23)));
    let mut unknown = request("web1");
    unknown.workflow = "no-such".into();
    assert_eq!(engine.request(unknown).await.unwrap_err().code, Code::UNKNOWN_STEP_KIND);
}

#[tokio::test]
async fn a_dry_run_shows_the_plan_and_stores_nothing() {
    let store = Arc::new(MemoryStore::new());
    let engine = engine(store.clone(), &World::new());
    let plan = engine.dry_run(request("web1")).await.unwrap();
    assert_eq!(plan.steps.len(), 5);
    assert!(store.jobs(&JobFilter::default()).await.unwrap().is_empty());
    assert!(store.streams().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_paused_job_waits_and_goes_on_when_told_or_when_its_time_is_up() {
    let world = World::new();
    let gate = world.block("a");
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let job = engine.request(request("web1")).await.unwrap();
    gate.reached().await;
    let soon = Timestamp::now() + Duration::from_millis(300);
    engine.pause(job, who("ann"), soon).await.unwrap();
    assert_eq!(engine.summary(job).await.unwrap().status, JobStatus::Paused);
    gate.open();
    let summary = engine.wait(job).await.unwrap();
    assert_eq!(summary.status, JobStatus::Succeeded);
    assert!(summary.ended.unwrap() >= soon, "nothing new was started before the pause ended");
    assert_eq!(engine.resume(job, who("ann")).await.unwrap_err().code, Code::INVALID_STATE);
}

#[tokio::test]
async fn a_queued_job_can_be_cancelled() {
    let world = World::new();
    let gate = world.block("a");
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    engine.request(request("web1")).await.unwrap();
    gate.reached().await;
    let mut queued = request("web1");
    queued.if_busy = IfBusy::Queue;
    let second = engine.request(queued).await.unwrap();
    engine.cancel(second, who("ann")).await.unwrap();
    assert_eq!(engine.wait(second).await.unwrap().status, JobStatus::Cancelled);
    gate.open();
}

#[tokio::test]
async fn a_store_that_fails_for_good_ends_the_process() {
    let world = World::new();
    let memory = Arc::new(MemoryStore::new());
    let store = Arc::new(world::Fatal::new(memory, 4));
    let (engine, mut died) = world::engine_that_tells(store, &world);
    engine.request(request("web1")).await.unwrap();
    assert!(died.recv().await.unwrap().contains("fsync"));
}

#[tokio::test]
async fn a_store_that_lives_on_its_reserve_begins_no_job_until_there_is_room_again() {
    let world = World::new();
    let store = Arc::new(world::Narrow::new(Arc::new(MemoryStore::new())));
    let engine = engine(store.clone(), &world);
    let fault = engine.request(request("web1")).await.unwrap_err();
    assert_eq!((fault.code, fault.object.as_str()), (Code::STORE_RESERVE_SPENT, "web1"));
    assert!(fault.cause.contains("full") && fault.remedy.contains("Free space"), "{fault}");
    assert!(store.streams().await.unwrap().is_empty(), "nothing of it was stored");
    store.full.store(false, std::sync::atomic::Ordering::SeqCst);
    let job = engine.request(request("web1")).await.unwrap();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Succeeded);
}

#[tokio::test]
async fn a_result_that_is_not_known_is_read_again_and_never_repeated_blind() {
    let world = World::new();
    let memory = Arc::new(MemoryStore::new());
    for written in [false, true] {
        let store = Arc::new(world::Unsure::new(memory.clone(), 3, written));
        let engine = engine(store, &world);
        let job = engine.request(request(if written { "web1" } else { "web2" })).await.unwrap();
        assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Succeeded);
        let records = memory.read(&StreamId::job(job), Seq(1), 0).await.unwrap();
        replay::check(&records).unwrap();
    }
}

#[tokio::test]
async fn the_decisions_of_a_changed_history_are_found_out() {
    let store = Arc::new(MemoryStore::new());
    let engine: Engine = engine(store.clone(), &World::new());
    let job = engine.request(request("web1")).await.unwrap();
    engine.wait(job).await.unwrap();
    let history: Vec<_> = engine.history(job).await.unwrap().into_iter().map(|(_, event)| event).collect();
    replay::decisions(&history).unwrap();
    let first_start = history.iter().position(|e| matches!(e.body, Body::StepStarted { .. })).unwrap();
    let mut early = history.clone();
    early[first_start] =
        vmkeep_workflow::Event::new(history[first_start].at, Default::default(), Body::JobSucceeded);
    assert!(matches!(replay::decisions(&early), Err(replay::Divergence::Decision { .. })));
    let mut without = history.clone();
    without.remove(first_start);
    assert!(matches!(replay::decisions(&without), Err(replay::Divergence::Illegal(_))));
}

#[tokio::test]
async fn a_history_is_told_in_plain_words() {
    let world = World::new();
    world.script("b1", Script::Fail(Class::Permanent));
    let engine = engine(Arc::new(MemoryStore::new()), &world);
    let job = engine.request(request("web1")).await.unwrap();
    engine.wait(job).await.unwrap();
    let tale: Vec<String> = vmkeep_workflow::explain::explain(&engine.history(job).await.unwrap())
        .into_iter()
        .map(|line| line.text)
        .collect();
    assert!(tale[0].contains("ann asked for toy of web1"), "{tale:#?}");
    assert!(tale.iter().any(|line| line.starts_with("Failed: \"switch b1\"")), "{tale:#?}");
    assert!(tale.last().unwrap().starts_with("Rolled back"), "{tale:#?}");
}

/// Asked without end, a store that answers at once takes the whole process with it.
#[tokio::test]
async fn a_disk_that_does_not_write_is_asked_again_after_a_while_and_not_at_once() {
    let world = World::new();
    let dead = Arc::new(world::Dead::new(Arc::new(MemoryStore::new()), 3, 2));
    let engine = engine(dead.clone(), &world);
    let began = std::time::Instant::now();
    let job = engine.request(request("web1")).await.unwrap();
    let summary = engine.wait(job).await.unwrap();
    assert_eq!(summary.status, JobStatus::Succeeded);
    // Waits may take longer, never less.
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
}

/// Otherwise it would do what it may do only if the token is found after a crash.
#[tokio::test]
async fn what_an_attempt_could_not_store_is_in_the_store_before_the_next_goes_on_from_it() {
    let memory = Arc::new(MemoryStore::new());
    let world = World::new();
    world.script("a", Script::Careful);
    let engine = engine(Arc::new(Forgetful::new(memory.clone(), 1)), &world);
    let job = engine.request(request("web1")).await.unwrap();
    world.resumable_reached().await;
    let rows = memory.rows(job).await.unwrap();
    let (_, row) = rows.iter().find(|(name, _)| name == "forward/a").expect("a row");
    assert_eq!(row["token"], json!({"offset": 7}));
    world.let_go_on();
    assert_eq!(engine.wait(job).await.unwrap().status, JobStatus::Succeeded);
}

/// What was stored right before an effect is all that is known of it when there never was an output.
#[tokio::test]
async fn an_undo_knows_what_the_attempts_of_its_step_had_stored_also_in_another_process() {
    for cut in 4..=16 {
        let world = World::new();
        world.script("b1", Script::Halfway);
        let memory = Arc::new(MemoryStore::new());
        let tripwire = Arc::new(Tripwire::new(memory.clone(), cut, true));
        let first = engine(tripwire.clone(), &world);
        let job = first.request(request("web1")).await.unwrap();
        tokio::select! {
            _ = first.wait(job) => {}
            () = tripwire.tripped() => {}
        }
        world.abandon_calls();
        let second = engine(memory.clone(), &world);
        second.recover().await.unwrap();
        assert_eq!(second.wait(job).await.unwrap().status, JobStatus::RolledBack, "cut at {cut}");
        assert_eq!(world.left("b1"), Some(json!({"offset": 7})), "cut at {cut}");
        assert_eq!(world.left("a"), None, "cut at {cut}: it stored nothing");
        assert_eq!(world.on(), ["close"], "cut at {cut}");
    }
}

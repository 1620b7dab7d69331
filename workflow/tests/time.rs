//! A wall clock that is set, by an hour or a year, in either direction, at any event of a job: every wait is as long as it
//! would have been, and the order of events does not depend on it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::time::Instant;
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{Clock, Config, Limits};
use vmkeep_workflow::event::{IfBusy, JobRequest, Subject};
use vmkeep_workflow::journal::EventStore;
use vmkeep_workflow::plan::{Millis, Probing, Retry};
use vmkeep_workflow::{
    Actor, Code, Engine, Environment, Event, Fault, JobStatus, Plan, PlanContext, Registry, Seq, Step,
    StepContext, StepKind, StepSpec, StreamId, Verdict, Workflow, WorkflowName, replay,
};

/// Time that passes as the runtime's does, and a wall clock that can be set.
#[derive(Clone)]
struct Wall(Arc<(Instant, Mutex<SignedDuration>)>);

impl Wall {
    fn set_on(&self, by: SignedDuration) {
        *self.0.1.lock().unwrap() += by;
    }
}

#[async_trait]
impl Clock for Wall {
    fn now(&self) -> Timestamp {
        let noon: Timestamp = "2026-06-01T12:00:00Z".parse().unwrap();
        noon + self.passed() + *self.0.1.lock().unwrap()
    }

    fn passed(&self) -> Duration {
        self.0.0.elapsed()
    }

    async fn sleep(&self, wait: Duration) {
        tokio::time::sleep(wait).await;
    }
}

/// Sets the clock when it is asked for the n-th time what the world is: at requests, plans and starts of attempts.
struct Setting {
    clock: Wall,
    left: AtomicU32,
    by: SignedDuration,
}

impl Environment for Setting {
    fn facts(&self) -> BTreeMap<String, String> {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.clock.set_on(self.by);
        }
        BTreeMap::new()
    }
}

/// Fails at first; then hangs past its deadline, and is in flight for some minutes more; then works.
#[derive(Default)]
struct Slow {
    since: Mutex<Option<Instant>>,
}

#[async_trait]
impl Step for Slow {
    const KIND: StepKind = StepKind::new("slow", 1);
    type Input = ();
    type Output = ();

    async fn run(&self, cx: &StepContext, (): ()) -> Result<(), Fault> {
        match cx.attempt {
            1 => Err(Fault::transient(Code(9), "work", "it", "not yet")),
            2 => {
                *self.since.lock().unwrap() = Some(Instant::now());
                cx.stop.cancelled().await;
                Err(Fault::stopped("work", "it").in_doubt())
            }
            _ => Ok(()),
        }
    }

    async fn probe(&self, _: &StepContext, (): ()) -> Verdict<()> {
        let since = *self.since.lock().unwrap();
        match since {
            Some(since) if since.elapsed() < Duration::from_secs(400) => {
                Verdict::InFlight("queued".to_owned())
            }
            _ => Verdict::NotDone,
        }
    }
}

struct Recipe;

#[async_trait]
impl Workflow for Recipe {
    fn name(&self) -> WorkflowName {
        "recipe".into()
    }

    async fn plan(&self, _: &PlanContext) -> Result<Plan, Fault> {
        let retry = Retry { attempts: 4, first: Millis::secs(30), most: Millis::secs(30) };
        let probing = Probing { limit: Millis::secs(600), first: Millis::secs(5), most: Millis::secs(20) };
        let slow = StepSpec::new("slow", Slow::KIND, "be slow".to_owned(), json!(null))
            .retry(retry)
            .probing(probing)
            .deadline(Millis::secs(60));
        Plan::new("recipe", 1, "a recipe", vec![slow], None, json!({}))
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan", "it", e))
    }
}

fn engine(store: &Arc<MemoryStore>, clock: &Wall, at: u32, by: SignedDuration) -> Engine {
    Engine::new(Config {
        store: store.clone(),
        registry: Registry::new().step(Slow::default()).workflow(Recipe),
        clock: Arc::new(clock.clone()),
        environment: Arc::new(Setting { clock: clock.clone(), left: AtomicU32::new(at), by }),
        limits: Limits::default(),
        on_fatal: Arc::new(|why| panic!("{why}")),
    })
}

fn request() -> JobRequest {
    JobRequest {
        workflow: "recipe".into(),
        subject: Subject { id: "it".to_owned(), label: "it".to_owned() },
        options: json!({}),
        key: None,
        by: Actor { who: "ann".to_owned(), why: None },
        if_busy: IfBusy::Refuse,
        limits: vec![],
        retry_of: None,
    }
}

/// Runs the job with the clock set by so much at some moment: its events without their instants, the spans between them, and how
/// long it took.
async fn run(at: u32, by: SignedDuration) -> (Vec<String>, Vec<i64>, Duration) {
    let begun = Instant::now();
    let clock = Wall(Arc::new((begun, Mutex::default())));
    let store = Arc::new(MemoryStore::new());
    let engine = engine(&store, &clock, at, by);
    let job = engine.request(request()).await.unwrap();
    let summary = engine.wait(job).await.unwrap();
    assert_eq!(summary.status, JobStatus::Succeeded, "set by {by} at {at}: {:?}", summary.fault);
    let records = store.read(&StreamId::job(job), Seq(1), 0).await.unwrap();
    replay::check(&records).unwrap();
    let events: Vec<Event> = records.iter().map(|r| serde_json::from_slice(&r.bytes).unwrap()).collect();
    let kinds = events.iter().map(|event| {
        let body = serde_json::to_value(&event.body).unwrap();
        format!("{} {}", body["type"], body["data"]["verdict"])
    });
    // From the first event of the driver on: what was requested was requested by the wall clock.
    let spans = events[1..].windows(2).map(|two| two[1].at.duration_since(two[0].at).as_secs());
    (kinds.collect(), spans.collect(), begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_wall_clock_that_is_set_changes_no_wait_and_no_order() {
    let (kinds, spans, took) = run(0, SignedDuration::ZERO).await;
    assert!(took > Duration::from_secs(400) && took < Duration::from_secs(600), "{took:?}");
    let (hour, year) = (SignedDuration::from_hours(1), SignedDuration::from_hours(365 * 24));
    for by in [hour, -hour, year, -year] {
        for at in 1..=5 {
            let (now_kinds, now_spans, now_took) = run(at, by).await;
            assert_eq!(now_kinds, kinds, "set by {by} at {at}");
            assert_eq!(now_spans, spans, "set by {by} at {at}");
            assert_eq!(now_took.as_secs(), took.as_secs(), "set by {by} at {at}");
        }
    }
}

/// The next process takes the wall clock as it is: what was waited for before may be over, but nothing hangs, no instant goes
/// back, and the job ends as it would have.
#[tokio::test(start_paused = true)]
async fn a_clock_that_was_set_between_two_processes_leaves_no_job_hanging() {
    let (hour, year) = (SignedDuration::from_hours(1), SignedDuration::from_hours(365 * 24));
    for by in [hour, -hour, year, -year] {
        for wait in [10, 50, 120, 300] {
            let clock = Wall(Arc::new((Instant::now(), Mutex::default())));
            let store = Arc::new(MemoryStore::new());
            let first = engine(&store, &clock, 0, SignedDuration::ZERO);
            let job = first.request(request()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(wait)).await;
            first.shutdown().await;
            drop(first);
            clock.set_on(by);
            let begun = Instant::now();
            let second = engine(&store, &clock, 0, SignedDuration::ZERO);
            second.recover().await.unwrap();
            let summary = second.wait(job).await.unwrap();
            assert_eq!(
                summary.status,
                JobStatus::Succeeded,
                "set by {by} after {wait} s: {:?}",
                summary.fault
            );
            assert!(
                begun.elapsed() < Duration::from_secs(1200),
                "set by {by} after {wait} s: {:?}",
                begun.elapsed()
            );
            let records = store.read(&StreamId::job(job), Seq(1), 0).await.unwrap();
            replay::check(&records).unwrap();
            let events: Vec<Event> =
                records.iter().map(|r| serde_json::from_slice(&r.bytes).unwrap()).collect();
            assert!(events.is_sorted_by_key(|event| event.at), "an instant went back");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_pause_lasts_as_long_as_was_asked_whatever_the_clock_was_when_the_job_began() {
    let year = SignedDuration::from_hours(365 * 24);
    for by in [year, -year] {
        let clock = Wall(Arc::new((Instant::now(), Mutex::default())));
        let store = Arc::new(MemoryStore::new());
        let engine = engine(&store, &clock, 0, SignedDuration::ZERO);
        let job = engine.request(request()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        clock.set_on(by);
        let until = clock.now() + SignedDuration::from_secs(1200);
        engine.pause(job, Actor { who: "ann".to_owned(), why: None }, until).await.unwrap();
        let begun = Instant::now();
        let summary = engine.wait(job).await.unwrap();
        assert_eq!(summary.status, JobStatus::Succeeded);
        let took = begun.elapsed().as_secs();
        assert!((1200..2400).contains(&took), "set by {by}: {took} s");
    }
}

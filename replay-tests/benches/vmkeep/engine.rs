//! The engine on the memory store: what a step costs when it does nothing, and what recovery costs.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use serde_json::{Value, json};
use vmkeep_store::MemoryStore;
use vmkeep_workflow::decide::decide;
use vmkeep_workflow::engine::{Config, Limits, NoEnvironment, SystemClock};
use vmkeep_workflow::event::{Body, IfBusy, JobRequest, Subject};
use vmkeep_workflow::journal::EventStore;
use vmkeep_workflow::state::State;
use vmkeep_workflow::{
    Actor, Code, Engine, Event, Fault, JobStatus, Phase, Plan, PlanContext, Registry, Step, StepContext,
    StepKind, StepSpec, StreamId, Verdict, Workflow, WorkflowName,
};

use crate::table::{Row, Samples, Target};

const ROUNDS: usize = 7;

struct Noop;

#[async_trait]
impl Step for Noop {
    const KIND: StepKind = StepKind::new("noop", 1);
    type Input = Value;
    type Output = ();
    async fn run(&self, _: &StepContext, _: Value) -> Result<(), Fault> {
        Ok(())
    }
    async fn probe(&self, _: &StepContext, _: Value) -> Verdict<()> {
        Verdict::NotDone
    }
}

/// A chain of so many steps.
struct Chain;

#[async_trait]
impl Workflow for Chain {
    fn name(&self) -> WorkflowName {
        "chain".into()
    }
    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let count = cx.request.options["steps"].as_u64().unwrap_or(1);
        let step = |at: u64| StepSpec::new(format!("s{at}"), Noop::KIND, "nothing", Value::Null);
        let steps =
            (0..count).map(|at| if at == 0 { step(0) } else { step(at).after(format!("s{}", at - 1)) });
        Plan::new("chain", 1, "a chain", steps.collect(), None, json!({}))
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan", "chain", e))
    }
}

fn engine(store: Arc<MemoryStore>) -> Engine {
    Engine::new(Config {
        store,
        registry: Registry::new().step(Noop).workflow(Chain),
        clock: Arc::new(SystemClock),
        environment: Arc::new(NoEnvironment),
        limits: Limits::default(),
        on_fatal: Arc::new(|why| panic!("{why}")),
    })
}

fn request(steps: u64) -> JobRequest {
    JobRequest {
        workflow: "chain".into(),
        subject: Subject { id: uuid(), label: "bench".into() },
        options: json!({ "steps": steps }),
        key: None,
        by: Actor::default(),
        if_busy: IfBusy::Refuse,
        limits: vec![],
        retry_of: None,
    }
}

fn uuid() -> String {
    vmkeep_workflow::JobId::new().to_string()
}

/// Runs a job of so many steps; returns microseconds per step and records per step.
async fn chain(steps: u64) -> (f64, f64) {
    let store = Arc::new(MemoryStore::new());
    let engine = engine(store.clone());
    let begin = Instant::now();
    let job = engine.request(request(steps)).await.expect("requested");
    let summary = engine.wait(job).await.expect("waited");
    let took = begin.elapsed();
    assert_eq!(summary.status, JobStatus::Succeeded);
    let records = store.last(&StreamId::job(job)).await.expect("read").0;
    // The request, the plan and the end belong to the job and not to its steps.
    (took.as_secs_f64() * 1e6 / steps as f64, (records - 3) as f64 / steps as f64)
}

/// So many jobs that were cut off, each with so many events.
fn histories(jobs: usize, events: usize) -> Vec<Vec<Vec<u8>>> {
    let steps: Vec<StepSpec> = (0..events)
        .map(|at| {
            let step = StepSpec::new(format!("s{at}"), Noop::KIND, "nothing", Value::Null);
            if at == 0 { step } else { step.after(format!("s{}", at - 1)) }
        })
        .collect();
    let plan = Plan::new("chain", 1, "a chain", steps, None, json!({})).expect("a plan");
    (0..jobs)
        .map(|_| {
            let mut bodies =
                vec![Body::JobRequested(request(events as u64)), Body::JobPlanned(Box::new(plan.clone()))];
            for at in 0.. {
                let step = || format!("s{at}").into();
                bodies.push(Body::StepStarted {
                    step: step(),
                    phase: Phase::Forward,
                    attempt: 1,
                    resume: None,
                });
                if bodies.len() == events {
                    break;
                }
                bodies.push(Body::StepSucceeded {
                    step: step(),
                    phase: Phase::Forward,
                    attempt: 1,
                    output: Value::Null,
                });
                if bodies.len() == events {
                    break;
                }
            }
            let now = jiff::Timestamp::now();
            bodies
                .into_iter()
                .map(|body| serde_json::to_vec(&Event::new(now, Default::default(), body)).expect("json"))
                .collect()
        })
        .collect()
}

fn resident_kib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or("");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0.0)
}

/// Growth of the process, in KiB, while one state takes in so many events that only repeat themselves.
fn growth(events: usize) -> f64 {
    let now = jiff::Timestamp::now();
    let mut state = State::new();
    let plan = Plan::new(
        "chain",
        1,
        "a chain",
        vec![StepSpec::new("s0", Noop::KIND, "nothing", Value::Null)],
        None,
        json!({}),
    );
    let start = Body::StepStarted { step: "s0".into(), phase: Phase::Forward, attempt: 1, resume: None };
    for body in [
        Body::JobRequested(request(1)),
        Body::JobPlanned(Box::new(plan.expect("a plan"))),
        start,
        Body::JobRecovered,
    ] {
        state.apply(&Event::new(now, Default::default(), body)).expect("legal");
    }
    let before = resident_kib();
    for _ in 0..events {
        let verdict = Verdict::InFlight("still at it".to_owned());
        let body = Body::StepProbed { step: "s0".into(), phase: Phase::Forward, attempt: 1, verdict };
        state.apply(&Event::new(now, Default::default(), body)).expect("legal");
    }
    assert!(!decide(&state).is_empty());
    resident_kib() - before
}

pub fn run() -> Vec<Row> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let mut small = Vec::new();
    let mut large = Vec::new();
    let mut appends = Vec::new();
    runtime.block_on(async {
        chain(1000).await;
        for _ in 0..ROUNDS {
            let (time, records) = chain(1000).await;
            small.push(time);
            appends.push(records);
            large.push(chain(10_000).await.0);
        }
    });
    let histories = histories(1000, 100);
    let mut folding = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for history in &histories {
            let mut state = State::new();
            for bytes in history {
                let event: Event = serde_json::from_slice(bytes).expect("an event");
                state.apply(&event).expect("legal");
            }
            assert!(!decide(&state).is_empty());
        }
        folding.push(begin.elapsed().as_secs_f64());
    }
    growth(1000);
    let grown: Vec<f64> = (0..ROUNDS).map(|_| growth(100_000).max(1.0)).collect();
    let (small, large) = (Samples(small), Samples(large));
    vec![
        Row::limit("engine: a no-op step", "µs", &small, 100.0),
        Row::limit("engine: durable appends a step", "", &Samples(appends), 2.0),
        Row::against(
            "engine: a step of 10,000",
            "µs",
            &large,
            "a step of 1,000",
            &small,
            Target::AtMost(1.5),
        ),
        Row::limit("engine: fold and decide 1,000 jobs, 100,000 events", "s", &Samples(folding), 2.0),
        Row::limit("engine: memory for 100,000 further events", "KiB", &Samples(grown), 1024.0),
    ]
}

//! The fold and the decision rules against a small world of their own: random plans, random failures, crashes at any
//! point, and the claims that must hold whatever happened.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::decide::{Command, decide};
use crate::event::{IfBusy, Subject};
use crate::ids::StepKind;
use crate::plan::{Millis, Retry, StepSpec};
use crate::replay;

const KIND: StepKind = StepKind::new("toy", 1);

fn spec(name: &str) -> StepSpec {
    StepSpec::new(name.to_owned(), KIND, name.to_owned(), json!({}))
}

fn request() -> Body {
    Body::JobRequested(JobRequest {
        workflow: "toy".into(),
        subject: Subject { id: "s".into(), label: "s".into() },
        options: json!({}),
        key: None,
        by: Actor::default(),
        if_busy: IfBusy::Refuse,
        limits: vec![],
        retry_of: None,
    })
}

fn plan(steps: Vec<StepSpec>, barrier: Option<&'static str>) -> Body {
    Body::JobPlanned(Box::new(Plan::new("toy", 1, "toy", steps, barrier.map(Into::into), json!({})).unwrap()))
}

/// A job under test: its events so far and their fold.
struct Sim {
    state: State,
    events: Vec<Event>,
    at: Timestamp,
}

impl Sim {
    fn new(steps: Vec<StepSpec>, barrier: Option<&'static str>) -> Self {
        let mut sim = Self { state: State::new(), events: vec![], at: Timestamp::UNIX_EPOCH };
        sim.put(request());
        sim.put(plan(steps, barrier));
        sim
    }

    fn put(&mut self, body: Body) {
        self.at += SignedDuration::from_millis(10);
        let event = Event::new(self.at, BTreeMap::new(), body);
        self.state.apply(&event).unwrap_or_else(|e| panic!("{e}\n{:#?}", self.events));
        self.events.push(event);
    }

    /// Records every decision that is due; returns what is to hold then.
    fn settle(&mut self) -> Vec<Command> {
        loop {
            let due = decide(&self.state);
            let records: Vec<Body> = due
                .iter()
                .filter_map(|command| match command {
                    Command::Record(body) => Some(body.clone()),
                    _ => None,
                })
                .collect();
            if records.is_empty() {
                return due;
            }
            records.into_iter().for_each(|body| self.put(body));
        }
    }

    fn done(&mut self, step: &'static str) {
        self.outcome(step, Phase::Forward, Ok(json!(null)));
    }

    fn fails(&mut self, step: &'static str, fault: Fault) {
        self.outcome(step, Phase::Forward, Err(fault));
    }

    fn undone(&mut self, step: &'static str) {
        self.outcome(step, Phase::Undo, Ok(json!(null)));
    }

    fn outcome(&mut self, step: &'static str, phase: Phase, result: Result<Value, Fault>) {
        self.settle();
        let step: StepName = step.into();
        let attempt = self.state.track(self.state.place(&step).unwrap(), phase).attempts;
        self.put(match result {
            Ok(output) => Body::StepSucceeded { step, phase, attempt, output },
            Err(fault) => Body::StepFailed { step, phase, attempt, fault },
        });
        self.settle();
    }

    fn probed(&mut self, step: &'static str, phase: Phase, verdict: Verdict) {
        self.settle();
        let step: StepName = step.into();
        let attempt = self.state.track(self.state.place(&step).unwrap(), phase).attempts;
        self.put(Body::StepProbed { step, phase, attempt, verdict });
        self.settle();
    }

    fn started(&self, phase: Phase) -> Vec<String> {
        self.events
            .iter()
            .filter_map(|event| match &event.body {
                Body::StepStarted { step, phase: p, .. } if *p == phase => Some(step.to_string()),
                _ => None,
            })
            .collect()
    }

    fn last(&self) -> &Body {
        &self.events.last().unwrap().body
    }
}

use crate::event::Verdict;

fn broken(class: Class) -> Fault {
    Fault::permanent(Code(9), "do it", "it", "broken").class(class)
}

#[test]
fn steps_without_an_edge_between_them_run_side_by_side() {
    let mut sim = Sim::new(vec![spec("a"), spec("b"), spec("c").after("a").after("b")], None);
    sim.settle();
    assert_eq!(sim.started(Phase::Forward), ["a", "b"]);
    sim.done("b");
    assert_eq!(sim.started(Phase::Forward), ["a", "b"]);
    sim.done("a");
    sim.done("c");
    assert_eq!(sim.last(), &Body::JobSucceeded);
}

#[test]
fn a_failure_waits_for_parallel_work_before_anything_is_undone() {
    let mut sim = Sim::new(
        vec![spec("a").undoable(), spec("b").undoable().after("a"), spec("c").undoable().after("a")],
        None,
    );
    sim.done("a");
    sim.fails("b", broken(Class::Permanent));
    assert_eq!(sim.state.mode(), Mode::Settling);
    assert!(sim.started(Phase::Undo).is_empty(), "c still runs");
    let asked_to_stop =
        decide(&sim.state).iter().any(|c| matches!(c, Command::Stop { step, .. } if step.as_str() == "c"));
    assert!(asked_to_stop);
    sim.done("c");
    assert_eq!(sim.started(Phase::Undo), ["b", "c"], "the failed step is undone as well, and a comes last");
    sim.undone("c");
    sim.undone("b");
    assert_eq!(sim.started(Phase::Undo), ["b", "c", "a"]);
    sim.undone("a");
    assert!(matches!(sim.last(), Body::JobRolledBack(Cause::Failure { .. })));
}

#[test]
fn a_closer_runs_whether_the_work_under_its_opener_succeeded_or_not() {
    let steps = || {
        vec![
            spec("open").undoable(),
            spec("work").undoable().after("open"),
            spec("publish").undoable().after("work"),
            spec("close").after("publish").closes("open"),
        ]
    };
    let mut sim = Sim::new(steps(), Some("publish"));
    for step in ["open", "work", "publish", "close"] {
        sim.done(step);
    }
    assert_eq!(sim.last(), &Body::JobSucceeded);

    let mut sim = Sim::new(steps(), Some("publish"));
    sim.done("open");
    sim.fails("work", broken(Class::Permanent));
    assert_eq!(sim.started(Phase::Forward), ["open", "work", "close"]);
    sim.undone("work");
    assert_eq!(sim.started(Phase::Undo), ["work"], "the opener is undone only after its closer is done");
    sim.done("close");
    sim.undone("open");
    assert!(matches!(sim.last(), Body::JobRolledBack(_)));

    let mut sim = Sim::new(
        vec![spec("first"), spec("open").after("first"), spec("close").after("open").closes("open")],
        None,
    );
    sim.fails("first", broken(Class::Permanent));
    assert_eq!(sim.started(Phase::Forward), ["first"], "an opener that never started needs no closer");
    assert!(matches!(sim.last(), Body::JobRolledBack(_)));
}

#[test]
fn a_closer_that_sets_the_guest_free_runs_before_the_others_and_even_beside_a_stuck_step() {
    let steps = || {
        vec![
            spec("freeze").critical(),
            spec("take").after("freeze"),
            spec("thaw").after("take").closes("freeze").safety(),
            spec("copy").after("thaw"),
            spec("merge").after("copy").closes("take"),
        ]
    };
    let mut sim = Sim::new(steps(), None);
    sim.done("freeze");
    sim.fails("take", broken(Class::Permanent));
    assert_eq!(sim.started(Phase::Forward), ["freeze", "take", "thaw"]);
    sim.done("thaw");
    assert_eq!(sim.started(Phase::Forward), ["freeze", "take", "thaw", "merge"]);

    let mut sim = Sim::new(steps(), None);
    sim.done("freeze");
    sim.fails("take", broken(Class::Fatal));
    assert_eq!(sim.started(Phase::Forward), ["freeze", "take", "thaw"], "thawed although take is stuck");
    sim.done("thaw");
    assert!(matches!(sim.last(), Body::JobNeedsAttention(items) if items[0].step.as_str() == "take"));
    assert!(sim.started(Phase::Undo).is_empty());
}

#[test]
fn past_the_point_of_no_return_a_failure_needs_attention_and_a_cancel_comes_too_late() {
    let mut sim = Sim::new(
        vec![spec("a").undoable(), spec("commit").after("a"), spec("tidy").after("commit")],
        Some("commit"),
    );
    sim.done("a");
    sim.done("commit");
    sim.put(Body::CancelRequested(Actor::default()));
    assert!(sim.state.cancelled_too_late().is_some());
    sim.fails("tidy", broken(Class::Permanent));
    assert!(matches!(sim.last(), Body::JobNeedsAttention(_)));
    sim.put(Body::SettleRequested { by: Actor::default(), how: Settle::Retry });
    sim.probed("tidy", Phase::Forward, Verdict::NotDone);
    sim.done("tidy");
    assert_eq!(sim.last(), &Body::JobSucceeded);
    assert!(sim.started(Phase::Undo).is_empty());
}

#[test]
fn the_point_of_no_return_itself_may_fail_and_roll_back_only_when_the_world_shows_no_trace_of_it() {
    let steps = || vec![spec("a").undoable(), spec("commit").after("a").retry(Retry::NEVER)];
    let mut sim = Sim::new(steps(), Some("commit"));
    sim.done("a");
    sim.fails("commit", broken(Class::Permanent));
    assert!(sim.started(Phase::Undo).is_empty(), "the world is asked first");
    sim.probed("commit", Phase::Forward, Verdict::NotDone);
    assert_eq!(sim.started(Phase::Undo), ["a"]);

    let mut sim = Sim::new(steps(), Some("commit"));
    sim.done("a");
    sim.fails("commit", broken(Class::Permanent));
    sim.probed("commit", Phase::Forward, Verdict::Done(json!(null)));
    assert_eq!(sim.last(), &Body::JobSucceeded);

    let mut sim = Sim::new(steps(), Some("commit"));
    sim.done("a");
    sim.fails("commit", broken(Class::Permanent));
    sim.probed("commit", Phase::Forward, Verdict::Partial(json!(1)));
    assert!(matches!(sim.last(), Body::JobNeedsAttention(_)), "half a commit is not rolled back");
}

#[test]
fn a_partial_effect_without_a_token_goes_on_without_one_also_when_it_is_read_again() {
    let mut sim = Sim::new(vec![spec("a")], None);
    sim.fails("a", broken(Class::Transient));
    sim.put(Body::TimerFired(Timer::Retry { step: "a".into(), phase: Phase::Forward, attempt: 2 }));
    sim.probed("a", Phase::Forward, Verdict::Partial(json!(null)));
    let body = sim.last().clone();
    assert!(matches!(body, Body::StepStarted { attempt: 2, .. }), "{body:?}");
    let again: Body = serde_json::from_slice(&serde_json::to_vec(&body).unwrap()).unwrap();
    assert_eq!(again, body);
}

#[test]
fn a_transient_failure_is_repeated_after_a_probe_and_only_so_often() {
    let retry = Retry { attempts: 2, first: Millis(100), most: Millis(100) };
    let mut sim = Sim::new(vec![spec("a").retry(retry)], None);
    sim.fails("a", broken(Class::Transient));
    let Body::RetryScheduled { at, attempt: 2, .. } = sim.last().clone() else { panic!("{:?}", sim.last()) };
    assert_eq!(at, sim.events[sim.events.len() - 2].at + SignedDuration::from_millis(100));
    sim.put(Body::TimerFired(Timer::Retry { step: "a".into(), phase: Phase::Forward, attempt: 2 }));
    sim.probed("a", Phase::Forward, Verdict::NotDone);
    assert_eq!(sim.started(Phase::Forward), ["a", "a"]);
    sim.fails("a", broken(Class::Transient));
    assert!(matches!(sim.state.cause(), Some(Cause::Failure { .. })), "two attempts were allowed");
}

#[test]
fn a_deadline_leads_to_a_probe_and_never_straight_to_an_undo() {
    let mut sim = Sim::new(vec![spec("a").undoable().deadline(Millis(500)).retry(Retry::NEVER)], None);
    sim.settle();
    sim.put(Body::TimerFired(Timer::Deadline { step: "a".into(), phase: Phase::Forward, attempt: 1 }));
    let due = sim.settle();
    assert!(due.iter().any(|c| matches!(c, Command::Probe { .. })));
    assert!(due.iter().any(|c| matches!(c, Command::Stop { .. })));
    sim.probed("a", Phase::Forward, Verdict::InFlight("still at it".into()));
    assert!(sim.started(Phase::Undo).is_empty());
    sim.done("a");
    assert_eq!(sim.last(), &Body::JobSucceeded, "it was only late");
}

#[test]
fn a_step_that_was_late_or_stood_still_and_has_done_nothing_fails_with_the_limit_that_it_exceeded() {
    let (step, phase, attempt): (StepName, _, _) = ("a".into(), Phase::Forward, 1);
    let late = Body::TimerFired(Timer::Deadline { step: step.clone(), phase, attempt });
    for (body, code) in
        [(late, Code::STEP_DEADLINE), (Body::StepStalled { step, phase, attempt }, Code::STEP_STALLED)]
    {
        let limited = spec("a").undoable().deadline(Millis(500)).stall(Millis(500)).retry(Retry::NEVER);
        let mut sim = Sim::new(vec![limited], None);
        sim.settle();
        sim.put(body);
        sim.probed("a", Phase::Forward, Verdict::NotDone);
        let Some(Cause::Failure { fault, .. }) = sim.state.cause() else { panic!("{:?}", sim.state.cause()) };
        assert_eq!((fault.code, fault.object.as_str()), (code, "a"), "{fault}");
        assert!(fault.cause.contains("1 s") && !fault.remedy.is_empty(), "{fault}");
    }
}

#[test]
fn a_doubt_that_no_probe_can_end_needs_attention_and_nothing_is_undone() {
    let mut sim = Sim::new(vec![spec("a").undoable(), spec("b").undoable().after("a")], None);
    sim.done("a");
    sim.put(Body::JobRecovered);
    sim.probed("b", Phase::Forward, Verdict::Unknown("no answer".into()));
    sim.at += SignedDuration::from_secs(700);
    sim.probed("b", Phase::Forward, Verdict::Unknown("no answer".into()));
    assert!(
        matches!(sim.last(), Body::JobNeedsAttention(items) if items[0].fault.code == Code::EFFECT_UNKNOWN)
    );
    assert!(sim.started(Phase::Undo).is_empty());
    sim.put(Body::SettleRequested { by: Actor::default(), how: Settle::Probe });
    sim.probed("b", Phase::Forward, Verdict::Done(json!(null)));
    assert_eq!(sim.last(), &Body::JobSucceeded);
}

#[test]
fn a_failed_undo_needs_attention_and_neither_it_nor_what_it_rests_on_is_undone() {
    let mut sim = Sim::new(vec![spec("a").undoable(), spec("b").undoable().after("a")], None);
    sim.done("a");
    sim.fails("b", broken(Class::Permanent));
    sim.outcome("b", Phase::Undo, Err(broken(Class::Permanent)));
    assert!(matches!(sim.last(), Body::JobNeedsAttention(items) if items[0].phase == Phase::Undo));
    assert_eq!(sim.started(Phase::Undo), ["b"]);
    sim.put(Body::SettleRequested { by: Actor::default(), how: Settle::Retry });
    sim.probed("b", Phase::Undo, Verdict::NotDone);
    sim.undone("b");
    sim.undone("a");
    assert!(matches!(sim.last(), Body::JobRolledBack(_)));
}

#[test]
fn facts_that_changed_before_anything_was_touched_lead_to_one_new_plan_and_later_to_a_failure() {
    let steps = || vec![spec("a").undoable().check_facts(), spec("b").after("a").check_facts()];
    let mut sim = Sim::new(steps(), None);
    assert_eq!(sim.settle(), [Command::CheckFacts { before: "a".into() }]);
    sim.put(Body::FactsChecked { before: "a".into(), difference: Some("a disk more".into()) });
    assert_eq!(sim.settle(), [Command::Plan]);
    sim.put(plan(steps(), None));
    sim.put(Body::FactsChecked { before: "a".into(), difference: None });
    sim.done("a");
    sim.put(Body::FactsChecked { before: "b".into(), difference: Some("a disk less".into()) });
    sim.settle();
    assert_eq!(sim.started(Phase::Forward), ["a"]);
    assert_eq!(sim.started(Phase::Undo), ["a"]);
    assert!(
        matches!(sim.state.cause(), Some(Cause::Failure { fault, .. }) if fault.code == Code::FACTS_CHANGED)
    );
}

#[test]
fn a_pause_begins_only_in_a_safe_place_and_ends_by_itself() {
    let mut sim = Sim::new(
        vec![
            spec("freeze").critical(),
            spec("thaw").after("freeze").closes("freeze"),
            spec("copy").after("thaw"),
        ],
        None,
    );
    sim.done("freeze");
    let until = sim.at + SignedDuration::from_secs(60);
    sim.put(Body::PauseRequested { by: Actor::default(), until });
    let wanted: Vec<_> = sim.state.until_safe().iter().map(|step| step.name.to_string()).collect();
    assert_eq!(wanted, ["thaw"]);
    sim.done("thaw");
    assert!(sim.state.until_safe().is_empty());
    let due = sim.settle();
    assert_eq!(sim.started(Phase::Forward), ["freeze", "thaw"], "thawed first, then paused");
    assert_eq!(due, [Command::Arm { timer: Timer::Pause, at: until }]);
    sim.put(Body::TimerFired(Timer::Pause));
    sim.settle();
    assert_eq!(sim.started(Phase::Forward), ["freeze", "thaw", "copy"]);
}

#[test]
fn a_signal_is_awaited_until_its_limit_and_then_answered_by_its_default() {
    let wait = AwaitSignal { name: "go".into(), limit: Millis::secs(5), default: json!("merge anyway") };
    let steps = || vec![StepSpec::signal("wait", "wait for go", wait.clone()), spec("b").after("wait")];
    let mut sim = Sim::new(steps(), None);
    sim.settle();
    sim.put(Body::SignalReceived { name: "go".into(), value: json!(7), by: Actor::default() });
    sim.settle();
    assert_eq!(sim.started(Phase::Forward), ["b"]);
    assert_eq!(sim.state.cells()[0].output.as_ref().unwrap()["value"], 7);
    let mut sim = Sim::new(steps(), None);
    sim.settle();
    sim.put(Body::TimerFired(Timer::Signal { step: "wait".into() }));
    assert_eq!(sim.state.cells()[0].output.as_ref().unwrap()["value"], "merge anyway");
    assert_eq!(sim.state.cells()[0].output.as_ref().unwrap()["timed_out"], true);
}

#[test]
fn a_cancel_before_the_plan_ends_the_job_untouched() {
    let mut sim = Sim { state: State::new(), events: vec![], at: Timestamp::UNIX_EPOCH };
    sim.put(request());
    assert_eq!(sim.settle(), [Command::Plan]);
    sim.put(Body::CancelRequested(Actor::default()));
    sim.settle();
    assert!(matches!(sim.last(), Body::JobRolledBack(Cause::Cancel(_))));
}

use crate::plan::AwaitSignal;

/// What a random job lives in: which steps have an effect, and dice.
struct World {
    dice: u64,
    effect: HashSet<usize>,
    flying: HashMap<(usize, Phase), u32>,
}

impl World {
    fn roll(&mut self, sides: u64) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice % sides
    }
}

fn random_plan(world: &mut World) -> (Vec<StepSpec>, Option<&'static str>) {
    const NAMES: [&str; 10] = ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9"];
    let count = 2 + usize::try_from(world.roll(7)).unwrap();
    let barrier = (world.roll(2) == 0).then(|| usize::try_from(world.roll(count as u64)).unwrap());
    let mut steps = Vec::new();
    for (at, name) in NAMES.iter().enumerate().take(count) {
        let mut step = spec(name).retry(Retry { attempts: 2, first: Millis(1), most: Millis(1) });
        for (before, earlier) in NAMES.iter().enumerate().take(at) {
            let crosses = barrier.is_some_and(|b| (at == b) || (before == b));
            if crosses || world.roll(3) == 0 {
                step = step.after(*earlier);
            }
        }
        if world.roll(4) != 0 {
            step = step.undoable();
        }
        steps.push(step);
    }
    // A closer for the first step, last in the plan.
    if world.roll(2) == 0 {
        let all: Vec<&str> = NAMES.iter().copied().take(count).collect();
        steps
            .push(spec("closer").after_all(all.iter().map(|s| StepName::from((*s).to_owned()))).closes("s0"));
    }
    (steps, barrier.map(|b| NAMES[b]))
}

/// Plays a job to its end with failures, doubts, crashes and cancels as the dice fall.
fn play(seed: u64) -> (Sim, World) {
    let mut world = World { dice: seed | 1, effect: HashSet::new(), flying: HashMap::new() };
    let (steps, barrier) = random_plan(&mut world);
    let mut sim = Sim::new(steps, barrier);
    for _ in 0..2000 {
        let due = sim.settle();
        if sim.state.mode() == Mode::Ended {
            return (sim, world);
        }
        if sim.state.mode() == Mode::Attention {
            let how = if world.roll(2) == 0 { Settle::Retry } else { Settle::Probe };
            sim.put(Body::SettleRequested { by: Actor::default(), how });
            continue;
        }
        if world.roll(12) == 0 {
            // A crash: every call under way takes effect, or not.
            let flying: Vec<_> = world.flying.drain().collect();
            for ((place, phase), _) in flying {
                if world.roll(2) == 0 {
                    land(&mut world, place, phase);
                }
            }
            sim.put(Body::JobRecovered);
            continue;
        }
        if world.roll(40) == 0 {
            sim.put(Body::CancelRequested(Actor::default()));
            continue;
        }
        let pick = usize::try_from(world.roll(due.len() as u64)).unwrap();
        answer(&mut sim, &mut world, due[pick].clone());
    }
    panic!("seed {seed} does not end: {:#?}", sim.events);
}

fn land(world: &mut World, place: usize, phase: Phase) {
    match phase {
        Phase::Forward => world.effect.insert(place),
        Phase::Undo => world.effect.remove(&place),
    };
}

fn answer(sim: &mut Sim, world: &mut World, command: Command) {
    match command {
        Command::Attempt { step, phase, attempt } => {
            let place = sim.state.place(&step).unwrap();
            world.flying.insert((place, phase), attempt);
            let outcome = world.roll(10);
            if outcome == 9 {
                return; // still under way
            }
            world.flying.remove(&(place, phase));
            sim.put(match outcome {
                0..=6 => {
                    land(world, place, phase);
                    Body::StepSucceeded { step, phase, attempt, output: json!(attempt) }
                }
                7 => {
                    if world.roll(2) == 0 {
                        land(world, place, phase);
                    }
                    Body::StepFailed { step, phase, attempt, fault: broken(Class::Transient).in_doubt() }
                }
                _ => {
                    let class = if world.roll(2) == 0 { Class::Transient } else { Class::Permanent };
                    Body::StepFailed { step, phase, attempt, fault: broken(class) }
                }
            });
        }
        Command::Probe { step, phase, attempt, .. } => {
            let place = sim.state.place(&step).unwrap();
            let verdict = if world.roll(5) == 0 {
                Verdict::Unknown("fog".into())
            } else if world.effect.contains(&place) == (phase == Phase::Forward) {
                Verdict::Done(json!(attempt))
            } else {
                Verdict::NotDone
            };
            sim.put(Body::StepProbed { step, phase, attempt, verdict });
        }
        Command::Arm { timer, at } => {
            sim.at = sim.at.max(at);
            sim.put(Body::TimerFired(timer));
        }
        Command::Stop { .. } | Command::CheckFacts { .. } | Command::Plan | Command::Record(_) => {}
    }
}

/// What must be true of a job that has ended, whatever happened to it.
fn judge(sim: &Sim, world: &World) {
    let plan = sim.state.plan().unwrap();
    match sim.last() {
        Body::JobSucceeded => assert_eq!(world.effect.len(), plan.len()),
        Body::JobRolledBack(_) => {
            for place in 0..plan.len() {
                let name = &plan.step(place).name;
                let there = world.effect.contains(&place);
                let opened = plan.opener(place).map(|opener| sim.state.cells()[opener].forward.attempts > 0);
                match opened {
                    Some(opened) => {
                        assert_eq!(there, opened, "closer {name} runs if and only if its opener was started")
                    }
                    None => assert!(!there || plan.step(place).undo.is_none(), "{name} is left behind"),
                }
            }
            if let Some(barrier) = plan.barrier() {
                assert!(!world.effect.contains(&barrier) || plan.step(barrier).undo.is_none());
            }
        }
        other => panic!("{other:?}"),
    }
    // An undo begins only when everything that was started after its step is undone.
    let mut started: Vec<usize> = Vec::new();
    let mut undone: HashSet<usize> = HashSet::new();
    for event in &sim.events {
        match &event.body {
            Body::StepStarted { step, phase, .. } => {
                let place = plan.place(step).unwrap();
                if *phase == Phase::Forward {
                    started.push(place);
                } else {
                    let after = plan.descendants(place);
                    for &later in
                        started.iter().filter(|&&later| after[later] && plan.step(later).undo.is_some())
                    {
                        assert!(undone.contains(&later), "{step} is undone before {}", plan.step(later).name);
                    }
                }
            }
            Body::StepSucceeded { step, phase: Phase::Undo, .. }
            | Body::StepProbed { step, phase: Phase::Undo, verdict: Verdict::Done(_), .. } => {
                undone.insert(plan.place(step).unwrap());
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_a_job_ends_whole_or_rolled_back(seed in any::<u64>()) {
        let (sim, world) = play(seed);
        judge(&sim, &world);
    }

    #[test]
    fn every_prefix_of_every_history_folds_and_replays_with_the_same_decisions(seed in any::<u64>()) {
        let (sim, _) = play(seed);
        let report = replay::decisions(&sim.events).unwrap();
        prop_assert_eq!(report.events, sim.events.len());
        let mut prefix = State::new();
        for event in &sim.events {
            prefix.apply(event).unwrap();
            // Asking twice gives the same answer, and a fresh fold gives the same as the one that went along.
            prop_assert_eq!(decide(&prefix), decide(&prefix.clone()));
        }
        prop_assert_eq!(prefix.mode(), sim.state.mode());
    }
}

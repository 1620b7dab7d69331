//! Who plays runs, on all processors, and keeps account of how they ended.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vmkeep_workflow::state::State;
use vmkeep_workflow::{JobStatus, replay};

use super::families::{seed, setting};
use super::run::{Acts, Ran, run};
use super::scenario::Scenario;

/// A run to be made.
pub struct Case {
    pub scenario: &'static Scenario,
    pub acts: Acts,
}

/// What became of all of them.
#[derive(Default)]
pub struct Tally {
    pub runs: usize,
    /// Runs in which a vmkeepd died and another one came to the end.
    pub recovered: usize,
    lives: usize,
    events: usize,
    ends: BTreeMap<String, usize>,
    /// Each as it is seen again, with what is wrong.
    bad: Vec<String>,
}

impl Case {
    /// What `VMKEEP_SIM_AGAIN` takes.
    fn again(&self) -> String {
        serde_json::to_string(&(self.scenario.name, &self.acts)).unwrap()
    }

    fn play(&self, tally: &Mutex<Tally>) {
        let trace = setting("VMKEEP_SIM_TRACE").is_some();
        if trace {
            eprintln!("plays {}", self.again());
        }
        let ran = std::panic::catch_unwind(AssertUnwindSafe(|| run(self.scenario, &self.acts)));
        if trace {
            eprintln!("played {}", self.again());
        }
        let (end, wrong) = match &ran {
            Err(_) => ("panic".to_owned(), vec!["the run itself panicked".to_owned()]),
            Ok(ran) => {
                let mut wrong = ran.verdict.wrong.clone();
                wrong.extend(prefixes(ran));
                (self.end(ran), wrong)
            }
        };
        let mut tally = tally.lock().unwrap();
        tally.runs += 1;
        if let Ok(ran) = ran {
            tally.events += ran.history.len();
            tally.lives += ran.lives;
            tally.recovered += usize::from(ran.lives > 1);
        }
        *tally.ends.entry(end).or_default() += 1;
        if !wrong.is_empty() {
            tally.bad.push(format!("VMKEEP_SIM_AGAIN='{}'\n    {}", self.again(), wrong.join("\n    ")));
        }
    }

    /// How a run ended, in few words.
    fn end(&self, ran: &Ran) -> String {
        let kills = self.acts.values().any(|act| act.kills());
        if kills && ran.lives == 1 {
            return "not reached".to_owned();
        }
        let status = ran.verdict.status.map_or("none".to_owned(), |status| format!("{status:?}"));
        if ran.verdict.status != Some(JobStatus::NeedsAttention) {
            return status;
        }
        let code = |what: &str| what.split(' ').take(2).collect::<Vec<_>>().join(" ");
        let codes: Vec<_> = ran.verdict.attention.split("; ").map(code).collect();
        format!("{status} ({})", codes.join(", "))
    }
}

/// Plays whatever comes next, on all processors, until nothing does.
pub fn all(next: impl Fn() -> Option<Case> + Sync) -> Tally {
    let tally = Mutex::new(Tally::default());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(case) = next() {
                    case.play(&tally);
                }
            });
        }
    });
    tally.into_inner().unwrap()
}

impl Tally {
    /// Prints it; fails with all that went wrong.
    pub fn tell(mut self, family: &str, began: Instant) {
        let took = began.elapsed();
        println!(
            "{family}: {} runs, {} lives, {} events in {:.1} s ({:.0} runs a minute), seed {}",
            self.runs,
            self.lives,
            self.events,
            took.as_secs_f64(),
            a_minute(self.runs, took),
            seed()
        );
        for (end, times) in &self.ends {
            println!("    {times:6} {end}");
        }
        let bad = self.bad.len();
        self.bad.truncate(12);
        assert!(bad == 0, "{bad} of {} runs of \"{family}\" went wrong:\n{}", self.runs, self.bad.join("\n"));
    }
}

pub fn a_minute(runs: usize, took: Duration) -> f64 {
    runs as f64 / took.as_secs_f64() * 60.0
}

/// Every prefix of what was written folds, and every decision in it is taken again.
fn prefixes(ran: &Ran) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut state = State::new();
    for (at, event) in ran.history.iter().enumerate() {
        if let Err(illegal) = state.apply(event) {
            wrong.push(format!("event {} does not fold: {illegal}", at + 1));
            return wrong;
        }
        // Whatever may follow, what is to be done next is known.
        let _ = vmkeep_workflow::decide::decide(&state);
    }
    if let Err(divergence) = replay::decisions(&ran.history) {
        wrong.push(format!("replayed, another decision is taken: {divergence}"));
    }
    wrong
}

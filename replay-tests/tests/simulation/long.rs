//! Runs for as long as somebody wants, of all families, by a seed: `scripts/simulation`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::director::{Act, Reached};
use super::families::{
    deaths, failures, failures_on_disk, killed_somehow, others, scenarios, seed, setting, undisturbed,
};
use super::player::{self, Case, a_minute};
use super::run::Acts;
use super::scenario::Scenario;

/// Processor time of this process, over all threads.
fn worked() -> Duration {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(spent.tv_sec).unwrap(), u32::try_from(spent.tv_nsec).unwrap())
}

type Undisturbed = (&'static Scenario, Vec<Reached>);

/// The run of this number: the same for the same seed, whoever plays it, and however many are played.
fn case(all: &[Undisturbed], number: u64) -> Case {
    let mut random = fastrand::Rng::with_seed(seed().wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
    let (scenario, reached) = &all[random.usize(..all.len())];
    let acts = loop {
        if let Some(acts) = acts(&mut random, reached) {
            break acts;
        }
    };
    Case { scenario, acts }
}

/// What is done; `None` where nothing of the kind can be. Of single acts there are so few that all of them would soon have been
/// seen: mostly it is two, and of twenty runs somebody dies in seventeen.
fn acts(random: &mut fastrand::Rng, reached: &[Reached]) -> Option<Acts> {
    let at = random.usize(..reached.len());
    let (first, then) = (at + 1, at + 2 + random.usize(..60));
    let place = &reached[at];
    let some = |random: &mut fastrand::Rng, kinds: Vec<Act>| {
        (!kinds.is_empty()).then(|| kinds[random.usize(..kinds.len())])
    };
    let (one, two) = match random.u8(..20) {
        0..=1 => (some(random, deaths(place))?, None),
        2..=11 => (killed_somehow(random), Some(killed_somehow(random))),
        12..=16 => (Act::Cancel, Some(killed_somehow(random))),
        17 => (Act::Cancel, Some(Act::FailForEver)),
        18 => (some(random, [failures(place), failures_on_disk(place)].concat())?, None),
        _ => (some(random, others(place))?, None),
    };
    Some(std::iter::once((first, one)).chain(two.map(|act| (then, act))).collect())
}

/// Runs until the time is over; without `VMKEEP_SIM_SECONDS` none.
#[test]
fn for_as_long_as_somebody_wants_every_run_ends_and_the_world_is_whole() {
    let Some(seconds) = setting("VMKEEP_SIM_SECONDS") else { return };
    let wanted = Duration::from_secs(seconds.parse().unwrap());
    let all: Vec<_> = scenarios().map(|scenario| (scenario, undisturbed(scenario).reached)).collect();
    let (began, before, number) = (Instant::now(), worked(), AtomicU64::new(0));
    let tally = player::all(|| {
        (began.elapsed() < wanted).then(|| case(&all, number.fetch_add(1, Ordering::Relaxed)))
    });
    let (took, work) = (began.elapsed(), worked().saturating_sub(before));
    println!(
        "{} runs in which vmkeepd died and another one went on, {:.0} of them a minute; {:.2} ms of processor for a run",
        tally.recovered,
        a_minute(tally.recovered, took),
        work.as_secs_f64() * 1000.0 / tally.runs.max(1) as f64
    );
    tally.tell("everything", began);
}

//! The families. Each is a list of runs for every scenario, made from an undisturbed run of it; where a list is too long for a
//! test, a seed picks from it. What fails is printed with all that is needed to see it again.

use std::sync::Mutex;
use std::time::Instant;

use vmkeep_steps::simulation::{Hands, Side};
use vmkeep_workflow::{Body, JobStatus};

use super::director::{Act, LOOKS, ROOM, Reached, Trouble_};
use super::player::{self, Case};
use super::run::{Acts, Ran, run};
use super::scenario::{INCREMENTAL, Purpose, SCENARIOS, Scenario};

pub fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The seed of everything that is picked: the environment's, else always the same.
pub fn seed() -> u64 {
    setting("VMKEEP_SIM_SEED").map_or(1, |seed| seed.parse().unwrap())
}

/// How many runs a family makes at most: enough for a test, or as many as the environment says (0: all).
fn most(test: usize) -> usize {
    match setting("VMKEEP_SIM_RUNS").map(|runs| runs.parse().unwrap()) {
        Some(0) => usize::MAX,
        Some(runs) => runs,
        None => test,
    }
}

pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    let only = setting("VMKEEP_SIM_SCENARIO");
    SCENARIOS.iter().filter(move |s| only.as_ref().is_none_or(|only| s.name.contains(only.as_str())))
}

/// Leaves so many of them, by the seed.
fn picked(mut cases: Vec<Case>, at_most: usize) -> Vec<Case> {
    fastrand::Rng::with_seed(seed()).shuffle(&mut cases);
    cases.truncate(at_most);
    cases
}

/// What is undisturbed, by which the places are numbered.
pub fn undisturbed(scenario: &'static Scenario) -> Ran {
    let ran = run(scenario, &Acts::new());
    assert!(ran.verdict.wrong.is_empty(), "{}: {:?}", scenario.name, ran.verdict.wrong);
    ran
}

fn each(kinds: impl Fn(&Reached) -> Vec<Act>) -> Vec<Case> {
    let mut cases = Vec::new();
    for scenario in scenarios() {
        for (at, place) in undisturbed(scenario).reached.iter().enumerate() {
            let acts = kinds(place).into_iter().map(|act| Acts::from([(at + 1, act)]));
            cases.extend(acts.map(|acts| Case { scenario, acts }));
        }
    }
    cases
}

/// All ways in which others can die with vmkeepd, and what was begun then can come late.
pub fn deaths(place: &Reached) -> Vec<Act> {
    let mut acts = vec![
        Act::KilledWithQemu,
        Act::KilledWithLibvirtd,
        Act::Host { autostart: true },
        Act::Host { autostart: false },
    ];
    if matches!(place.hands, Hands::Libvirt | Hands::Vault) && place.side != Side::After {
        acts.extend([Act::KilledAndLate(500), Act::KilledAndLate(20_000)]);
    }
    acts
}

/// All ways in which a call can fail.
pub fn failures(place: &Reached) -> Vec<Act> {
    match (place.hands, place.side) {
        (Hands::Own | Hands::Disk | Hands::Look, _) => Vec::new(),
        (Hands::Libvirt | Hands::Vault, Side::Before) => vec![
            Act::Fail(Trouble_::Transient),
            Act::Fail(Trouble_::Permanent),
            Act::Fail(Trouble_::NoSpace),
            Act::Lost,
            Act::LostAndLate(500),
            Act::LostAndLate(20_000),
            Act::FailForEver,
        ],
        (Hands::Helper, Side::Before) => vec![Act::Fail(Trouble_::Transient), Act::Fail(Trouble_::Permanent)],
        (_, Side::After) => vec![Act::Fail(Trouble_::Transient)],
        (Hands::Libvirt | Hands::Vault, _) => vec![Act::Lost, Act::LostAndLate(20_000)],
        (Hands::Helper, _) => vec![Act::Fail(Trouble_::Permanent)],
    }
}

/// An I/O error, no right, no room; once, and again and again.
pub fn failures_on_disk(place: &Reached) -> Vec<Act> {
    if place.hands != Hands::Disk {
        return Vec::new();
    }
    let mut acts = vec![
        Act::Fail(Trouble_::Transient),
        Act::Fail(Trouble_::Permanent),
        Act::Fail(Trouble_::NoSpace),
        Act::FailForEver,
    ];
    if ROOM.contains(&place.what.as_str()) {
        acts.push(Act::Full);
    }
    acts
}

/// What others do to the domain while vmkeepd lives.
pub fn others(_: &Reached) -> Vec<Act> {
    let them = [Act::Start, Act::Destroy, Act::Pause, Act::Resume];
    [Act::Libvirtd, Act::Qemu, Act::QemuAndStart].into_iter().chain(them).collect()
}

/// Plays them all; fails with all that went wrong.
fn play(family: &str, cases: Vec<Case>) {
    let began = Instant::now();
    let cases = Mutex::new(cases.into_iter());
    player::all(|| cases.lock().unwrap().next()).tell(family, began);
}

#[test]
fn undisturbed_every_workflow_does_what_it_is_for() {
    for scenario in scenarios() {
        let ran = undisturbed(scenario);
        assert_eq!(ran.verdict.status, Some(JobStatus::Succeeded), "{}", scenario.name);
        let (places, looks, events) = (ran.reached.len(), ran.looked.len(), ran.history.len());
        println!("{}: {places} places, {looks} looks, {events} events", scenario.name);
        if setting("VMKEEP_SIM_PLACES").is_some() {
            ran.reached.iter().enumerate().for_each(|(n, place)| println!("  {} {place:?}", n + 1));
        }
    }
}

#[test]
fn a_backup_after_another_one_reads_what_has_changed() {
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == INCREMENTAL).unwrap();
    let ran = undisturbed(scenario);
    let outputs: Vec<_> = ran
        .history
        .iter()
        .filter_map(|event| match &event.body {
            Body::StepSucceeded { output, .. } => Some(output),
            _ => None,
        })
        .collect();
    let read = outputs.iter().find(|output| output.get("manifest").is_some()).unwrap();
    assert_eq!(read["kind"], "incremental");
    for disk in read["disks"].as_array().unwrap() {
        let (dirty, all) = (disk["disk"]["dirty"].as_u64().unwrap(), scenario.disk_size());
        assert!((1..all).contains(&dirty), "{dirty} of {all} bytes are said to have changed");
    }
    let deleted = outputs.iter().find_map(|output| output.get("deleted")).and_then(|names| names.as_array());
    assert_eq!(deleted.map(Vec::len), None, "the full backup's stays: {outputs:#?}");
}

#[test]
fn every_workflow_of_the_product_is_simulated() {
    let known = super::run::workflows();
    let simulated: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.workflow).collect();
    for name in &known {
        assert!(simulated.contains(&name.as_str()), "no scenario for the workflow {name}");
    }
    assert!(known.len() >= 8, "{known:?}");
}

#[test]
fn the_same_acts_are_the_same_run() {
    for scenario in scenarios() {
        let acts = Acts::from([(40, Act::Killed), (90, Act::Host { autostart: true })]);
        let (one, two) = (run(scenario, &acts), run(scenario, &acts));
        assert_eq!(one.reached, two.reached, "{}", scenario.name);
        assert_eq!(one.verdict.status, two.verdict.status, "{}", scenario.name);
        let kinds =
            |ran: &Ran| ran.history.iter().map(|e| std::mem::discriminant(&e.body)).collect::<Vec<_>>();
        assert_eq!(kinds(&one), kinds(&two), "{}", scenario.name);
    }
}

/// Repeats one run, as it was printed by a family that failed.
#[test]
fn again() {
    let Some(again) = setting("VMKEEP_SIM_AGAIN") else { return };
    let (name, acts): (String, Acts) = serde_json::from_str(&again).unwrap();
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name).unwrap();
    let ran = run(scenario, &acts);
    for (n, place) in ran.reached.iter().enumerate() {
        println!("{:4} {:?} {:?} {} {:?}", n + 1, place.side, place.hands, place.what, acts.get(&(n + 1)));
    }
    for (n, event) in ran.history.iter().enumerate() {
        let text = serde_json::to_string(&event.body).unwrap();
        println!("{:3} {}", n + 1, text.chars().take(400).collect::<String>());
    }
    println!("{:#?}", ran.verdict);
    assert!(ran.verdict.wrong.is_empty());
}

#[test]
fn vmkeepd_killed_at_every_boundary_ends_as_if_it_had_not_been() {
    let cases = each(|_| vec![Act::Killed]);
    play("killed at every boundary", picked(cases, most(150)));
}

#[test]
fn whatever_dies_with_vmkeepd_at_whatever_boundary_the_world_is_whole_in_the_end() {
    play("dead at every boundary", picked(each(deaths), most(150)));
}

/// Wherever it is, also in the middle of what libvirt does for seconds: the guest runs, and the memory that was begun is gone.
#[test]
fn a_save_that_is_told_to_stop_leaves_the_guest_running_and_no_state() {
    let saves = ["the classic act", "the classic act with a RAM disk", "memory of a running guest"];
    let mut cases = Vec::new();
    for scenario in scenarios().filter(|scenario| saves.contains(&scenario.name)) {
        for (at, place) in undisturbed(scenario).reached.iter().enumerate() {
            let cancel = |act| Case { scenario, acts: Acts::from([(at + 1, act)]) };
            let saves = ["save", "take"].contains(&place.what.as_str());
            if place.hands == Hands::Libvirt {
                cases.extend(
                    [1_000, 100_000].map(|ms| cancel(Act::CancelInCall(ms))).into_iter().filter(|_| saves),
                );
            }
            cases.push(cancel(Act::Cancel));
        }
    }
    // Those in the middle of a save all, of the others some.
    let (within, others): (Vec<_>, Vec<_>) =
        cases.into_iter().partition(|case| case.acts.values().any(|act| *act != Act::Cancel));
    let cases = within.into_iter().chain(picked(others, most(20))).collect();
    play("a save is told to stop", cases);
}

/// Two acts: one at every place, the other some places later.
fn pairs(count: usize, pick: impl Fn(&mut fastrand::Rng, &[Reached]) -> Acts) -> Vec<Case> {
    let mut random = fastrand::Rng::with_seed(seed());
    let all: Vec<_> = scenarios().map(|scenario| (scenario, undisturbed(scenario).reached)).collect();
    let mut case = || {
        let (scenario, reached) = &all[random.usize(..all.len())];
        Case { scenario, acts: pick(&mut random, reached) }
    };
    (0..count).map(|_| case()).collect()
}

pub fn killed_somehow(random: &mut fastrand::Rng) -> Act {
    let all = [
        Act::Killed,
        Act::Killed,
        Act::KilledAndLate(500),
        Act::KilledAndLate(20_000),
        Act::KilledWithQemu,
        Act::Host { autostart: true },
        Act::Host { autostart: false },
    ];
    all[random.usize(..all.len())]
}

fn many(test: usize) -> usize {
    match most(test) {
        usize::MAX => 20_000,
        some => some,
    }
}

#[test]
fn killed_again_while_it_recovers_a_job_still_ends_and_the_world_is_whole() {
    let cases = pairs(many(120), |random, reached| {
        let first = 1 + random.usize(..reached.len());
        let second = first + 1 + random.usize(..60);
        Acts::from([(first, killed_somehow(random)), (second, killed_somehow(random))])
    });
    play("killed, and killed again", cases);
}

/// From the plan to the switch nothing of the save has begun, and nobody else starts the guest; going back, neither.
#[test]
fn a_guest_that_was_to_be_saved_is_started_again_wherever_the_host_went_down() {
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == "the classic act").unwrap();
    let places = undisturbed(scenario).reached.len();
    let host = Act::Host { autostart: false };
    let planned = (10..places).step_by(7).map(|at| Acts::from([(at, host)]));
    let going_back = (60..100).step_by(5).map(|at| Acts::from([(60, Act::Cancel), (at + 1, host)]));
    let cases = planned.chain(going_back).map(|acts| Case { scenario, acts }).collect();
    play("the host goes down around a save", cases);
}

/// Somebody starts a guest that is saved, and it ends before anybody looks: what it wrote is the truth, and the memory of before
/// is nobody's any more.
#[test]
fn memory_that_was_saved_is_never_loaded_onto_disks_on_which_a_guest_has_run_since() {
    let cases = SCENARIOS.iter().filter(|scenario| scenario.name.starts_with("the classic act"));
    let cases = cases.flat_map(|scenario| {
        let reached = undisturbed(scenario).reached;
        let saved = reached.iter().rposition(|place| place.what == "save").unwrap() + 1;
        let loaded = reached.iter().position(|place| place.what == "start-from-memory").unwrap() + 1;
        let started = (saved..loaded).flat_map(|at| [1, 4, 8].map(|later| (at, at + later)));
        started.map(move |(at, then)| {
            let acts = Acts::from([(at, Act::Start), (then, Act::KilledWithQemu)]);
            Case { scenario, acts }
        })
    });
    play("started between save and load", cases.collect());
}

/// QEMU has moved, and libvirt, killed in the middle of it, believes otherwise from then on: QEMU itself is asked.
#[test]
fn a_job_finds_the_disks_where_qemu_has_them_when_libvirt_died_before_it_noted_that() {
    let moves = |place: &Reached| {
        matches!(place.what.as_str(), "take" | "commit-pivot") && matches!(place.side, Side::Within(_))
    };
    let cases = each(|place| moves(place).then_some(Act::KilledWithLibvirtd).into_iter().collect());
    play("libvirt is wrong about QEMU", cases);
}

/// Its note is in the domain before it stands still, and stays there as long as it may yet come to that.
#[test]
fn a_guest_that_is_stopped_after_whoever_asked_for_it_has_died_runs_again() {
    let cases = scenarios().flat_map(|scenario| {
        let reached = undisturbed(scenario).reached;
        let stops = reached.iter().enumerate().filter(|(_, place)| place.what == "suspend");
        let late = stops.flat_map(|(at, _)| [500, 20_000].map(|ms| (at + 1, Act::KilledAndLate(ms))));
        let cases = late.map(|(at, act)| Case { scenario, acts: Acts::from([(at, act)]) });
        cases.collect::<Vec<_>>()
    });
    play("stopped late", cases.collect());
}

/// Of the removal vmkeepd heard nothing, libvirt was not done with it, and the job ended: its note does not come back with the host.
#[test]
fn a_mark_whose_removal_nobody_heard_of_does_not_come_back_with_the_host() {
    let exchanges = SCENARIOS.iter().filter(|scenario| matches!(scenario.purpose, Purpose::Exchange));
    let cases = exchanges.flat_map(|scenario| {
        let reached = undisturbed(scenario).reached;
        let removed =
            reached.iter().rposition(|place| place.what == "clear-marker" && place.side == Side::Within(2));
        let killed = 1 + removed.unwrap();
        let host = Act::Host { autostart: true };
        let ends = (killed + 8..killed + 22)
            .map(move |at| Acts::from([(killed, Act::KilledAndLate(500)), (at, host)]));
        ends.map(move |acts| Case { scenario, acts })
    });
    play("the host goes down behind a mark", cases.collect());
}

/// Between two looks of the way back too: what somebody runs has the definition that names its disks.
#[test]
fn a_machine_that_somebody_starts_while_its_exchange_goes_back_is_never_one_that_its_definition_does_not_name()
 {
    let exchanges = SCENARIOS.iter().filter(|scenario| matches!(scenario.purpose, Purpose::Exchange));
    let cases: Vec<Case> = exchanges
        .flat_map(|scenario| {
            let reached = undisturbed(scenario).reached;
            let begun = reached.iter().rposition(|place| place.what.starts_with("start")).unwrap();
            let cancelled = begun + 2;
            let starts = cancelled + 1..cancelled + 60;
            starts
                .map(move |at| Acts::from([(cancelled, Act::Cancel), (at, Act::Start)]))
                .map(move |acts| Case { scenario, acts })
        })
        .collect();
    play("started on the way back", picked(cases, most(120)));
}

/// Others (a start with the host) have let it run: its disks and its TPM have moved on, and going back would lose that.
#[test]
fn a_machine_that_others_have_run_is_started_again_and_not_taken_back() {
    let exchanges = SCENARIOS.iter().filter(|scenario| matches!(scenario.purpose, Purpose::Exchange));
    let mut cases = Vec::new();
    for scenario in exchanges {
        let reached = undisturbed(scenario).reached;
        let started = 2 + reached.iter().rposition(|place| place.what.starts_with("start")).unwrap();
        let (runs, stays) = (Act::Host { autostart: true }, Act::Host { autostart: false });
        let ends = (started + 12..started + 30).step_by(3);
        cases.extend(ends.map(|at| Case { scenario, acts: Acts::from([(started, runs), (at, stays)]) }));
    }
    play("run by others, and ended", cases);
}

#[test]
fn whatever_call_fails_in_whatever_way_the_job_ends_or_goes_back() {
    play("failing at every call", picked(each(failures), most(150)));
}

/// A copy that fails begins again, or the job goes back.
#[test]
fn whatever_change_of_a_file_fails_in_whatever_way_the_job_ends_or_goes_back() {
    play("failing at every change of a file", picked(each(failures_on_disk), most(150)));
}

/// An I/O error, or no right, on an image, a memory, a manifest, a record: once, and from there on for a long time. What cannot
/// be read is not taken for what is not there.
#[test]
fn whatever_file_cannot_be_read_the_job_ends_or_goes_back() {
    let mut cases = Vec::new();
    for scenario in scenarios() {
        let looked = undisturbed(scenario).looked;
        for at in 1..=looked.len() {
            let acts = [Act::Fail(Trouble_::Transient), Act::Fail(Trouble_::Permanent), Act::FailForEver];
            cases.extend(acts.map(|act| Case { scenario, acts: Acts::from([(LOOKS + at, act)]) }));
        }
    }
    play("failing at every look at a file", picked(cases, most(70)));
}

/// Nor is it left out of the record of what is kept aside, or left behind when that goes.
#[test]
fn what_cannot_be_looked_at_is_neither_left_out_of_a_record_nor_left_behind() {
    let mut cases = Vec::new();
    for scenario in scenarios() {
        if matches!(scenario.purpose, Purpose::Exchange | Purpose::Discard) {
            let looked = undisturbed(scenario).looked;
            let looks = looked.iter().enumerate().filter(|(_, what)| **what == "look at");
            let refused = looks.map(|(at, _)| Acts::from([(LOOKS + at + 1, Act::Fail(Trouble_::Permanent))]));
            cases.extend(refused.map(|acts| Case { scenario, acts }));
        }
    }
    play("failing at a look at a file of an exchange", picked(cases, most(40)));
}

#[test]
fn cancelled_anywhere_and_killed_while_it_goes_back_a_job_goes_back_all_the_same() {
    let cases = pairs(many(120), |random, reached| {
        let first = 1 + random.usize(..reached.len());
        let second = first + 1 + random.usize(..60);
        Acts::from([(first, Act::Cancel), (second, killed_somehow(random))])
    });
    play("cancelled, and killed on the way back", cases);
}

/// An attempt leaves a note of what it has done, another one fails, and the undo, which goes by the notes, is done twice.
#[test]
fn what_an_attempt_that_failed_has_left_is_taken_back_though_the_undo_is_cut_off() {
    let mut random = fastrand::Rng::with_seed(seed());
    let mut cases = Vec::new();
    for scenario in scenarios().filter(|scenario| scenario.workflow.starts_with("restore")) {
        for (at, place) in undisturbed(scenario).reached.iter().enumerate() {
            if place.hands == Hands::Disk {
                let (fails, dies) = (at + 1, at + 2 + random.usize(..40));
                let fault = [Act::Fail(Trouble_::Permanent), Act::FailForEver][random.usize(..2)];
                cases.push(Case {
                    scenario,
                    acts: Acts::from([(fails, fault), (dies, killed_somehow(&mut random))]),
                });
            }
        }
    }
    play("failed on disk, and killed on the way back", picked(cases, most(40)));
}

#[test]
fn an_undo_that_fails_leaves_the_guest_running_and_nothing_lost() {
    let cases = pairs(many(80), |random, reached| {
        let first = 1 + random.usize(..reached.len());
        let second = first + 1 + random.usize(..40);
        Acts::from([(first, Act::Cancel), (second, Act::FailForEver)])
    });
    play("cancelled, and the way back fails", cases);
}

#[test]
fn whatever_others_do_at_whatever_moment_no_write_is_lost_and_no_memory_misled() {
    play("others at every boundary", picked(each(others), most(150)));
}

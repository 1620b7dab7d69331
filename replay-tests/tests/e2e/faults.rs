//! vmkeepd with a full disk and I/O errors at every call that changes a file: of its journal, and of what its steps write (overlays,
//! copies, manifests, restored images) and remove. A backup is made, restored and deleted; one call fails, or that one and all
//! that follow. Then the disk is well again, and vmkeepd is started anew.
//!
//! `VMKEEP_FAULTS` sets how many faults are tried (`all`: each), `VMKEEP_SEED` repeats the choice.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;
use replay_tests::faults::{self, Error, Fault, Lasts, Operation};
use replay_tests::testbed::{DiskSpec, Guest, MIB};
use serde_json::Value;

use crate::holds::frozen;
use crate::kinds::{assert_off, off};
use crate::support::bed::{Bed, configure, default_root, folder, judge_backup, small};
use crate::support::{Daemon, Host, about, disks, files_below, in_time, until};

/// A disk that stays broken is given so long to bring a job to rest; then vmkeepd is ended and the disk is mended.
const BROKEN: Duration = Duration::from_secs(10);

struct Stage {
    host: Host,
    guest: Guest,
    own: BTreeMap<String, PathBuf>,
    last: u64,
    faulty: PathBuf,
    log: PathBuf,
    /// What is below these is made to fail.
    roots: Vec<PathBuf>,
    known: BTreeSet<String>,
}

/// How one run went.
#[derive(Default)]
struct Run {
    met: Vec<Operation>,
    /// How many calls there were before it served.
    start: usize,
    /// How vmkeepd ended, if it did.
    ended: Option<i32>,
    /// What became of the jobs.
    jobs: Vec<String>,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

impl Stage {
    fn new(engine: &str, roots: impl Fn(&Host) -> Vec<PathBuf>) -> Self {
        let host = Host::new();
        configure(&host, &format!("[store]\nengine = \"{engine}\"\n"));
        let (guest, last) = off(&host, &small("web1"));
        let faulty = host.hypervisor.dir().join("bin/faulty");
        faults::build(&faulty).unwrap();
        let log = folder(&host, &host.hypervisor.dir().join("faults")).join("log");
        let roots = roots(&host);
        Self { own: disks(&guest), guest, last, faulty, log, roots, known: BTreeSet::new(), host }
    }

    /// Starts vmkeepd with a fault; `None` with its exit status if it ends instead of serving.
    fn start(&self, fault: Option<Fault>) -> Result<Daemon, i32> {
        faults::forget(&self.log).unwrap();
        let roots: Vec<&Path> = self.roots.iter().map(PathBuf::as_path).collect();
        let mut daemon = self.host.daemon_under(&self.faulty, &faults::arguments(&self.log, fault, &roots));
        let ended = until("vmkeepd to serve or to end", || match daemon.ended() {
            Some(status) => Some(Some(status.code().unwrap_or(-1))),
            None => self.host.ready().then_some(None),
        });
        match ended {
            Some(status) => Err(status),
            None => Ok(daemon),
        }
    }

    /// Asks for a job and lets it come to rest, vmkeepd end, or the patience with a broken disk run out.
    fn ask(&self, daemon: &mut Daemon, args: &[&str]) -> Option<Value> {
        let mut all = vec!["--json"];
        all.extend(args);
        all.push("--no-wait");
        let asked = self.host.vmkeep(&all);
        let answer: Value = serde_json::from_slice(&asked.stdout).unwrap_or_default();
        let answer = if answer.is_array() { answer[0].clone() } else { answer };
        let job = answer["id"].as_str().or(answer["job"]["id"].as_str())?.to_owned();
        let end = Instant::now() + BROKEN;
        until("a job to come to rest, or vmkeepd to end", || {
            if daemon.ended().is_some() || Instant::now() > end {
                return Some(None);
            }
            let shown = self.host.vmkeep(&["--json", "job", "show", &job]);
            let row: Value = serde_json::from_slice(&shown.stdout).unwrap_or_default();
            let row = row["job"].clone();
            (row["ended"].is_string() || row["status"] == "needs_attention").then_some(Some(row))
        })
    }

    /// A backup is made, restored and deleted under a fault; the disk is mended, and everything is judged.
    fn run(&mut self, fault: Option<Fault>) -> Run {
        let case = fault.map_or_else(|| "no fault".to_owned(), |fault| fault.to_string());
        let mut run = Run::default();
        match self.start(fault) {
            Err(status) => run.ended = Some(status),
            Ok(mut daemon) => {
                run.start = faults::read(&self.log).unwrap_or_default().len();
                self.ask(&mut daemon, &["snapshot", "web1"]);
                let listed = self.host.vmkeep(&["--json", "list"]);
                let listed: Value = serde_json::from_slice(&listed.stdout).unwrap_or_default();
                if let Some(id) = listed["backups"][0]["id"].as_str() {
                    self.ask(&mut daemon, &["restore", id, "--as", "copy"]);
                    self.ask(&mut daemon, &["delete", id, "--last-copy", "--reason", "test"]);
                }
                match daemon.ended() {
                    Some(status) => run.ended = Some(status.code().unwrap_or(-1)),
                    None => daemon.kill(),
                }
            }
        }
        run.met = faults::read(&self.log).unwrap_or_default();
        let hit = run.met.iter().find(|call| call.failed);
        let case = format!("{case}, {:?}", hit.map(|hit| format!("{} {}", hit.call, hit.path.display())));
        let _daemon = self.host.daemon();
        run.jobs = self.judge(&case);
        run
    }

    /// With the disk well again every job ends, and says how; what is there is whole.
    fn judge(&mut self, case: &str) -> Vec<String> {
        let host = &self.host;
        let mut ends = Vec::new();
        let jobs = host.jobs();
        for job in jobs.iter().rev() {
            let id = job["id"].as_str().unwrap().to_owned();
            if !self.known.insert(id.clone()) {
                continue;
            }
            let mut row = host.at_rest(&id);
            let mut end = String::new();
            if row["status"] == "needs_attention" {
                end = "needed attention, ".to_owned();
                let told = host.vmkeep(&["job", "settle", &id, "--how", "retry", "--reason", "mended"]);
                assert!(told.status.success(), "{case}: {told:?}\n{}", host.story(&id));
                row = host.settled(&id);
            }
            end += row["status"].as_str().unwrap();
            if row["status"] != "succeeded" {
                let fault = &row["fault"];
                assert!(fault["code"].is_u64(), "{case}: no code: {row:#}");
                for word in ["cause", "remedy"] {
                    assert!(!fault[word].as_str().unwrap_or_default().is_empty(), "{case}: {row:#}");
                }
                end += &format!(" ({})", fault["name"].as_str().unwrap_or_default());
            }
            host.ok(&["replay", &id]);
            ends.push(format!("{} {end}", row["workflow"].as_str().unwrap()));
        }
        host.ok(&["audit", "verify"]);
        assert_off(&self.guest, &self.own, self.last);
        for backup in host.backups() {
            assert!(judge_backup(host, &backup) >= self.last, "{case}");
            fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
        }
        let left = files_below(&default_root(host));
        assert!(left.is_empty(), "{case}: left of {ends:?}: {left:?}\n{}", host.log());
        if host.hypervisor.domains().unwrap().contains(&"copy".to_owned()) {
            assert!(ends.iter().any(|end| end == "restore succeeded"), "{case}: {ends:?}");
            host.hypervisor.virsh(["undefine", "copy"]).unwrap();
            fs::remove_dir_all(host.restored().join("copy")).unwrap();
        }
        let left = files_below(&host.restored());
        assert!(left.is_empty(), "{case}: left of {ends:?}: {left:?}");
        // To judge took jobs of its own.
        self.known.extend(host.jobs().iter().map(|job| job["id"].as_str().unwrap().to_owned()));
        ends
    }

    /// Every sort of call of an undisturbed run in turn, or so many faults.
    fn endure(&mut self, what: &str, default: usize, from: impl Fn(&Run) -> usize) {
        let clean = self.run(None);
        let wanted = ["snapshot succeeded", "restore succeeded", "delete succeeded"];
        assert_eq!(clean.jobs, wanted, "{}", self.host.log());
        let again = self.run(None);
        let (mut ends, mut met) = (BTreeMap::<String, usize>::new(), BTreeSet::new());
        let mut ran = 0;
        let calls: Vec<(u64, String)> =
            (1..).zip(&again.met).skip(from(&again)).map(|(nth, call)| (nth, sort(call))).collect();
        for fault in chosen(&calls, default) {
            let begun = Instant::now();
            let run = self.run(Some(fault));
            ran += 1;
            met.extend(run.met.iter().find(|call| call.failed).map(sort));
            let hit = run.met.iter().find(|call| call.failed).map(sort);
            println!(
                "{fault}: {hit:?}: {:?}, {:?} ({:.1} s)",
                run.ended,
                run.jobs,
                begun.elapsed().as_secs_f32()
            );
            if let Some(status) = run.ended {
                *ends.entry(format!("vmkeepd ended ({status})")).or_default() += 1;
            }
            for end in run.jobs {
                *ends.entry(end).or_default() += 1;
            }
        }
        println!("{what}: {ran} faults at {} calls of {} sorts: {ends:#?}", calls.len(), met.len());
    }
}

/// What a call does to what kind of file; one of them stands for many.
fn sort(call: &Operation) -> String {
    let name = call.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Names that hold a job's id.
    let name = if name.len() > 30 { "…".to_owned() + &name[name.len() - 9..] } else { name };
    format!("{} {name}", call.call)
}

/// The faults to try: of each sort of call the same number, or all.
fn chosen(calls: &[(u64, String)], default: usize) -> Vec<Fault> {
    let kinds = [
        (Error::Io, Lasts::Once),
        (Error::NoSpace, Lasts::Full),
        (Error::NoSpace, Lasts::Once),
        (Error::Io, Lasts::Broken),
    ];
    let mut sorts = BTreeMap::<&str, Vec<Fault>>::new();
    for (nth, sort) in calls {
        let faults = kinds.map(|(error, lasts)| Fault { nth: *nth, error, lasts });
        sorts.entry(sort).or_default().extend(faults);
    }
    let seed = number("VMKEEP_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("VMKEEP_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let all = std::env::var("VMKEEP_FAULTS").is_ok_and(|word| word == "all");
    let wanted = number("VMKEEP_FAULTS").map_or(default, |n| usize::try_from(n).unwrap());
    let mut sorts: Vec<Vec<Fault>> = sorts.into_values().collect();
    sorts.iter_mut().for_each(|faults| rng.shuffle(faults));
    let mut chosen = Vec::new();
    while sorts.iter().any(|faults| !faults.is_empty()) {
        rng.shuffle(&mut sorts);
        chosen.extend(sorts.iter_mut().filter_map(Vec::pop));
    }
    chosen.truncate(if all { usize::MAX } else { wanted });
    chosen
}

fn of_the_journal(engine: &str) {
    let store = |host: &Host| vec![host.hypervisor.dir().join("state/vmkeep/store")];
    // How a store opens is tried without vmkeepd; here it is about the jobs.
    Stage::new(engine, store).endure(&format!("the journal in {engine}"), 6, |run| run.start);
}

#[test]
fn a_fault_of_the_journals_disk_ends_vmkeepd_or_is_waited_out_and_nothing_is_lost_sqlite() {
    of_the_journal("sqlite");
}

#[test]
fn a_fault_of_the_journals_disk_ends_vmkeepd_or_is_waited_out_and_nothing_is_lost_sled() {
    of_the_journal("sled");
}

#[test]
fn a_fault_of_any_file_that_a_step_writes_or_removes_leaves_a_whole_backup_or_none() {
    let places = |host: &Host| vec![default_root(host), host.restored(), host.hypervisor.images()];
    Stage::new("sqlite", places).endure("the steps' files", 12, |_| 0);
}

/// The number of calls before the append of a certain event, by an undisturbed run: each append ends with one fsync of the log.
fn before(history: &[Value], calls: &[Operation], start: usize, kind: &str, step: &str) -> u64 {
    let event =
        history.iter().position(|row| about(row, kind, step)).unwrap_or_else(|| panic!("no {kind} {step}"));
    let mut instants: Vec<&str> =
        history[..event].iter().map(|row| row["event"]["at"].as_str().unwrap()).collect();
    instants.dedup();
    let syncs = (1..).zip(calls).skip(start).filter(|(_, call)| call.call == "fdatasync").map(|(nth, _)| nth);
    syncs.take(instants.len()).last().unwrap()
}

/// The journal's disk is full, its reserve taken by somebody else, right before an event. The guest runs all the same, neither paused
/// nor frozen; and when there is room again the job comes to its end.
fn let_go(bed: &Bed, args: &[&str], events: &[(&str, &str)]) {
    let host = &bed.host;
    let faulty = host.hypervisor.dir().join("bin/faulty");
    faults::build(&faulty).unwrap();
    let log = folder(host, &host.hypervisor.dir().join("faults")).join("log");
    let store = host.hypervisor.dir().join("state/vmkeep/store");
    let start = |fault| {
        faults::forget(&log).unwrap();
        let daemon = host.daemon_under(&faulty, &faults::arguments(&log, fault, &[&store]));
        host.until_ready();
        (daemon, faults::read(&log).unwrap().len())
    };
    // The first makes what the others find.
    bed.undisturbed(args);
    let (daemon, started) = start(None);
    let job = host.begin(args);
    let row = host.at_rest(&job);
    let (history, calls) = (host.history(&job), faults::read(&log).unwrap());
    bed.judge("undisturbed", &row);
    // In order, here as below: a store that was closed makes its log anew when it is opened.
    assert_eq!(daemon.end(), Some(0));
    for (kind, step) in events {
        let nth = before(&history, &calls, started, kind, step) + 1;
        let fault = Fault { nth, error: Error::NoSpace, lasts: Lasts::Full };
        let case = format!("full before {kind} {step}");
        let (mut daemon, _) = start(Some(fault));
        let job = host.begin(args);
        until("the disk to be full", || {
            faults::read(&log).unwrap().iter().any(|call| call.failed).then_some(())
        });
        let reached = host.vmkeep(&["--json", "job", "history", &job]);
        let reached: Value = serde_json::from_slice(&reached.stdout).unwrap_or_default();
        let last = reached.as_array().and_then(|rows| rows.last().cloned()).unwrap_or_default();
        let held = bed.guest.state().unwrap();
        let since = Instant::now();
        let mut next = None;
        let free = in_time(|| {
            // A write of SQLite's that fails in the wrong place leaves it stuck: vmkeepd ends, and is started again.
            if next.is_none() && daemon.ended().is_some() {
                next = Some(host.daemon());
            }
            let state = bed.guest.state().ok()?.state;
            // Saved, and not loaded yet: that takes a step, and a step its event. One call earlier or later decides.
            (state == "shut off" || (state == "running" && !frozen(&bed.guest))).then_some(())
        });
        assert!(free.is_some(), "{case}: the guest is held\n{}", host.log());
        let freed = since.elapsed();
        if bed.guest.state().unwrap().state == "running" {
            bed.guest.wait_more(3).unwrap();
        }
        if let Some(status) = daemon.ended() {
            println!("{case}: vmkeepd ended ({status}), and the guest runs after {freed:?}");
            faults::mend(&log).unwrap();
            let daemon = next.unwrap_or_else(|| host.daemon());
            bed.judge(&case, &host.at_rest(&job));
            assert_eq!(daemon.end(), Some(0));
            continue;
        }
        assert!(!host.job(&job)["ended"].is_string(), "{case}: the journal was not full");
        println!(
            "{case}: after {} of {} the guest was {}; free within {freed:?}",
            last["event"]["body"]["type"], last["event"]["body"]["data"]["step"], held.state
        );
        faults::mend(&log).unwrap();
        let row = host.at_rest(&job);
        bed.judge(&case, &row);
        assert_eq!(daemon.end(), Some(0));
    }
}

#[test]
fn a_full_journal_keeps_no_guest_frozen() {
    let bed = Bed::boot(&small("web1").disk(DiskSpec::new(32 * MIB).ext4()).agent());
    let events = [
        ("step_succeeded", "freeze"),
        ("step_started", "take"),
        ("step_succeeded", "take"),
        ("step_started", "thaw"),
    ];
    let_go(&bed, &["snapshot", "web1", "--disk-only"], &events);
}

#[test]
fn a_full_journal_keeps_no_guest_paused() {
    let bed = Bed::boot(&small("web1").agent());
    let events = [("step_succeeded", "reload"), ("step_started", "resume")];
    let_go(&bed, &["snapshot", "web1", "--save"], &events);
}

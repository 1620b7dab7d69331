//! A restore in place, its undo and its discard, with everybody killed: vmkeepd, QEMU, libvirtd, the whole host; and with
//! somebody who starts the domain in between. At every instant the persistent definition names the disks of the old
//! machine or those of the new one, all of them; and in the end one of the two runs, whole, and the other is kept.
//!
//! A case costs a guest that comes to rest and another that goes on, so only those moments are taken at which the world
//! and the journal differ: a step was begun and has done nothing, or has done all and nobody has noted it. That the
//! engine goes on in the same way from any two neighbouring events is proved in its own crate.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::bed::{Bed, configure, judge_backup};
use crate::support::renames::Renames;
use crate::support::{Daemon, assert_ticks, disks, files_below, until};

type Disks = BTreeMap<String, PathBuf>;

const RESTORE: &str = "restore-in-place";
const UNDO: &str = "restore-undo";
const DISCARD: &str = "restore-discard";

/// The quickest way to bring a guest to rest: it does not listen to its power button.
const PULL_THE_PLUG: [&str; 3] = ["--destroy", "--shutdown-time", "0s"];

fn tiny() -> GuestSpec {
    GuestSpec::new("web1")
        .memory_mib(96)
        .disk(DiskSpec::new(32 * MIB).data(2 * MIB))
        .disk(DiskSpec::new(16 * MIB).raw().data(MIB))
}

/// A running guest, the machine that is kept aside, and all that must hold of both.
struct Stage {
    bed: Bed,
    id: String,
    present: RefCell<Disks>,
    /// The job that keeps a machine aside, and the disks of that machine.
    kept: RefCell<Option<(String, Disks)>>,
}

impl Stage {
    fn new() -> Self {
        let bed = Bed::boot(&tiny());
        configure(&bed.host, "[limits]\nwatch = \"250ms\"\n");
        let daemon = bed.host.daemon();
        bed.host.ok(&["snapshot", "web1"]);
        let backup = bed.host.backups().remove(0);
        judge_backup(&bed.host, &backup);
        daemon.end();
        let id = backup["id"].as_str().unwrap().to_owned();
        Self { present: RefCell::new(bed.own.clone()), kept: RefCell::new(None), id, bed }
    }

    /// What restores this backup.
    fn restore(&self, more: &[&str]) -> Vec<String> {
        words(&[&["restore", self.id.as_str(), "--in-place"], more])
    }

    /// What brings the machine back that is kept, or removes it.
    fn of_kept(&self, verb: &str, more: &[&str]) -> Vec<String> {
        let kept = self.kept.borrow();
        let (job, _) = kept.as_ref().expect("a machine is kept aside");
        words(&[&["restore", verb, job.as_str()], more])
    }

    /// Lets a job run undisturbed; judges it and returns its history.
    fn undisturbed(&self, args: &[String]) -> Vec<Value> {
        let daemon = self.bed.host.daemon();
        let job = self.bed.host.begin(&strs(args));
        let row = self.bed.host.settled(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        let history = self.bed.host.history(&job);
        self.judge("undisturbed", &row);
        daemon.end();
        history
    }

    /// What must hold at every instant: the definition names all disks of one machine, and they are all there.
    fn never_a_mixture(&self, case: &str) -> Disks {
        let (now, present) = (disks(&self.bed.guest), self.present.borrow());
        let old = now.iter().filter(|(disk, path)| present[*disk] == **path).count();
        assert!(old == 0 || old == now.len(), "{case}: a mixture: {now:?} of {present:?}");
        for path in now.values().chain(present.values()) {
            assert!(path.exists(), "{case}: {} is gone", path.display());
        }
        now
    }

    /// After an exchange has ended, however it did: the machine in place runs, is the one that the job's end promises,
    /// and the other is kept.
    fn judge(&self, case: &str, row: &Value) {
        let (host, guest) = (&self.bed.host, &self.bed.guest);
        println!("{case}: {}", row["status"]);
        let now = self.never_a_mixture(case);
        let present = self.present.borrow().clone();
        let done = row["status"] == "succeeded";
        assert_eq!(now != present, done, "{case}: {row:#}\n{}", host.log());
        let state = guest.state().unwrap();
        assert_eq!(state.state, "running", "{case}: {state:?}\n{}", host.log());
        guest.wait_more(2).unwrap_or_else(|e| panic!("{case}: {e}\n{}", host.log()));
        let qemu = host.hypervisor.disk_files_in_qemu(guest.uuid()).unwrap();
        let qemu: Disks = qemu.into_iter().map(|(disk, at)| (disk, at.file)).collect();
        assert_eq!(qemu, now, "{case}: the files that QEMU writes to");
        let xml = guest.virsh("dumpxml", &["--inactive"]).unwrap() + &guest.virsh("dumpxml", &[]).unwrap();
        assert!(!xml.contains("<vmkeep:"), "{case}: a marker is left");
        if done {
            // The machine that was there is whole.
            assert_ticks(&present["vda"], &present["vdb"]);
            *self.kept.borrow_mut() = Some((row["id"].as_str().unwrap().to_owned(), present));
        } else {
            assert!(row["fault"]["code"].as_u64().is_some_and(|code| code > 1), "{case}: {row:#}");
        }
        *self.present.borrow_mut() = now;
        self.judge_kept(case);
    }

    /// Just the machine is kept that should be, whole, and nothing else lies about.
    fn judge_kept(&self, case: &str) {
        let host = &self.bed.host;
        let kept = host.json(&["status"])["kept"].as_array().unwrap().clone();
        let jobs: Vec<_> = kept.iter().map(|kept| kept["job"].as_str().unwrap()).collect();
        let expected = self.kept.borrow();
        assert_eq!(jobs, expected.iter().map(|(job, _)| job.as_str()).collect::<Vec<_>>(), "{case}");
        if expected.is_none() {
            let left = files_below(&host.restored().join("kept"));
            assert_eq!(left, Vec::<PathBuf>::new(), "{case}: left of what was kept");
        }
        let present = self.present.borrow();
        let other = expected.iter().flat_map(|(_, disks)| disks.values());
        let known: Vec<&PathBuf> = present.values().chain(other).collect();
        assert!(known.iter().all(|path| path.exists()), "{case}: {known:?}");
        let stray: Vec<_> = files_below(&host.hypervisor.images())
            .into_iter()
            .filter(|path| {
                let path = path.to_string_lossy();
                path.contains("restored-") || path.contains(".vmkeep-")
            })
            .filter(|path| !known.contains(&path))
            .collect();
        assert_eq!(stray, Vec::<PathBuf>::new(), "{case}: left beside the images");
    }

    /// Removes what is kept, so that the next case begins anew.
    fn discard(&self) {
        if self.kept.borrow().is_some() {
            let row = self.bed.host.settled(&self.bed.host.begin(&strs(&self.of_kept("--discard", &[]))));
            assert_eq!(row["status"], "succeeded", "{row:#}");
            *self.kept.borrow_mut() = None;
            self.judge_kept("discarded");
        }
    }

    fn afresh(&self) {
        let daemon = self.bed.host.daemon();
        self.discard();
        daemon.end();
    }

    /// vmkeepd dies at a place in a job of these arguments, something happens, and another vmkeepd brings it to its end.
    fn dies(
        &self,
        workflow: &str,
        place: &Place,
        args: &[String],
        meanwhile: impl FnOnce(),
    ) -> (Daemon, Value) {
        let host = &self.bed.host;
        let newest = || {
            let jobs = host.vmkeep(&["--json", "jobs", "--workflow", workflow, "--limit", "1"]);
            let jobs: Value = serde_json::from_slice(&jobs.stdout).unwrap_or_default();
            // Nobody answers while vmkeepd is dead.
            jobs.get(0).cloned().unwrap_or_default()
        };
        let mut doomed =
            host.daemon_that_dies(Some(&format!("append/{}/{workflow}/{}", place.side, place.seq)));
        host.until_ready();
        let before = newest()["id"].clone();
        let mut all = strs(args);
        all.push("--no-wait");
        let _ = host.vmkeep(&all);
        let died = doomed.dies_or(|| {
            let newest = newest();
            newest["id"] != before && newest["ended"].is_string()
        });
        drop(doomed);
        assert!(died, "{place:?}: the place was never reached");
        meanwhile();
        let daemon = host.daemon();
        let job = newest()["id"].as_str().unwrap().to_owned();
        assert_ne!(Value::from(job.clone()), before, "{place:?}: the job is gone");
        let row = self.bed.host.at_rest(&job);
        assert!(
            row["ended"].is_string(),
            "{place:?}: {row:#}\n{}\n{}",
            host.ok(&["job", "explain", &job]),
            host.log()
        );
        host.ok(&["replay", &job]);
        (daemon, row)
    }
}

fn words(parts: &[&[&str]]) -> Vec<String> {
    parts.concat().into_iter().map(str::to_owned).collect()
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Where vmkeepd dies: right before its journal gets an event, or right after.
#[derive(Debug)]
#[allow(dead_code, reason = "what it is stands in the messages")]
struct Place {
    side: &'static str,
    seq: usize,
    what: String,
}

/// After the beginnings of these steps, and before the good ends of those, in the order in which they come. Of steps that
/// run side by side only the first of each kind is worth a case.
fn places(history: &[Value], begun: &[&str], done: &[&str]) -> Vec<Place> {
    let mut chosen = Vec::new();
    let mut seen = Vec::new();
    for (at, row) in history.iter().enumerate() {
        let data = &row["event"]["body"]["data"];
        let kind = data["step"].as_str().unwrap_or_default().split('/').next().unwrap_or_default();
        let (side, wanted) = match row["event"]["body"]["type"].as_str() {
            Some("step_started") => ("after", begun.contains(&kind)),
            Some("step_succeeded") => ("before", done.contains(&kind)),
            _ => continue,
        };
        if wanted && !seen.contains(&(side, kind)) {
            seen.push((side, kind));
            let what = format!("{side} {} {}", row["event"]["body"]["type"], data["step"]);
            chosen.push(Place { side, seq: at + 1, what });
        }
    }
    assert_eq!(seen.len(), begun.len() + done.len(), "of {begun:?} and {done:?}: {seen:?}");
    chosen
}

fn count(ends: &mut BTreeMap<String, usize>, row: &Value) {
    *ends.entry(row["status"].as_str().unwrap().to_owned()).or_default() += 1;
}

#[test]
fn vmkeepd_killed_around_every_step_of_a_restore_in_place_leaves_one_machine_running_and_whole() {
    let stage = Stage::new();
    let args = stage.restore(&["--save-old"]);
    let history = stage.undisturbed(&args);
    stage.afresh();
    let done = ["memory", "rest", "aside", "swap", "begin", "resume", "unmark"];
    let mut ends = BTreeMap::new();
    for place in places(&history, &["rest", "begin", "resume"], &done) {
        let (daemon, row) = stage.dies(RESTORE, &place, &args, || drop(stage.never_a_mixture(&place.what)));
        stage.judge(&place.what, &row);
        stage.discard();
        count(&mut ends, &row);
        daemon.end();
    }
    println!("{ends:?}");
}

/// Each undo brings back what the one before has kept, so that one restore serves them all.
#[test]
fn vmkeepd_killed_around_every_step_of_an_undo_leaves_one_machine_running_and_the_other_kept() {
    let stage = Stage::new();
    stage.undisturbed(&stage.restore(&["--save-old"]));
    let history = stage.undisturbed(&stage.of_kept("--undo", &["--save-old"]));
    let done = ["keep", "rest", "aside", "swap", "back", "begin", "resume", "forget", "unmark"];
    let boot = stage.bed.guest.boot_id();
    let mut ends = BTreeMap::new();
    for place in places(&history, &["rest", "back", "resume"], &done) {
        let args = stage.of_kept("--undo", &["--save-old"]);
        let (daemon, row) = stage.dies(UNDO, &place, &args, || drop(stage.never_a_mixture(&place.what)));
        stage.judge(&place.what, &row);
        // Both machines are kept with their memory, and the backup was one of the same boot: nobody ever boots.
        assert_eq!(stage.bed.guest.boot_id(), boot, "{}: a memory was lost", place.what);
        count(&mut ends, &row);
        daemon.end();
    }
    println!("{ends:?}");
}

/// What a discard has begun to remove it removes to the end; a domain that is off stays off.
#[test]
fn vmkeepd_killed_at_every_event_of_a_discard_removes_all_of_the_old_machine_and_nothing_else() {
    let stage = Stage::new();
    let (bed, host) = (&stage.bed, &stage.bed.host);
    bed.guest.shutdown().unwrap();
    let args = stage.restore(&["--cold"]);
    let keep_one = || {
        let daemon = host.daemon();
        let row = host.settled(&host.begin(&strs(&args)));
        assert_eq!(row["status"], "succeeded", "{row:#}");
        let present = stage.present.replace(disks(&bed.guest));
        *stage.kept.borrow_mut() = Some((row["id"].as_str().unwrap().to_owned(), present));
        stage.judge_kept("restored");
        daemon.end();
    };
    keep_one();
    let events = {
        let daemon = host.daemon();
        let job = host.begin(&strs(&stage.of_kept("--discard", &[])));
        assert_eq!(host.settled(&job)["status"], "succeeded");
        *stage.kept.borrow_mut() = None;
        let events = host.history(&job).len();
        daemon.end();
        events
    };
    for (seq, side) in (1..=events).flat_map(|seq| [(seq, "before"), (seq, "after")]).skip(1) {
        keep_one();
        let place = Place { side, seq, what: format!("discard, {side} event {seq} of {events}") };
        let old = stage.kept.borrow().as_ref().unwrap().1.clone();
        let (daemon, row) = stage.dies(DISCARD, &place, &stage.of_kept("--discard", &[]), || {});
        assert_eq!(row["status"], "succeeded", "{}: {row:#}", place.what);
        assert!(old.values().all(|path| !path.exists()), "{}: {old:?}", place.what);
        *stage.kept.borrow_mut() = None;
        stage.judge_kept(&place.what);
        assert_eq!(bed.guest.state().unwrap().state, "shut off");
        daemon.end();
    }
    bed.guest.start().unwrap();
    bed.guest.wait_more(3).unwrap();
}

/// What happens while vmkeepd is dead.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    /// Somebody starts the domain.
    Started,
    /// QEMU is killed.
    Qemu,
    /// The host reboots: all of vmkeepd, libvirtd and QEMU end at once, and autostart is faster than vmkeepd.
    Reboot,
}

impl Meanwhile {
    fn happens(self, bed: &Bed) {
        let hypervisor = &bed.host.hypervisor;
        if matches!(self, Self::Qemu | Self::Reboot) {
            let libvirtd = hypervisor.libvirtd();
            if let (Self::Reboot, Some(libvirtd)) = (self, libvirtd) {
                libvirtd.signal(Signal::KILL);
                libvirtd.wait_gone(Duration::from_secs(20)).unwrap();
            }
            let _ = hypervisor.kill_qemu(bed.guest.name());
            if matches!(self, Self::Reboot) {
                hypervisor.start_libvirtd().unwrap();
            }
            until("the domain to be off", || {
                bed.guest.state().is_ok_and(|state| state.state == "shut off").then_some(())
            });
        }
        if matches!(self, Self::Started | Self::Reboot) {
            // Refused where it runs already.
            let _ = bed.guest.virsh("start", &[]);
        }
    }
}

/// vmkeepd dies, something happens, and vmkeepd comes back. The domain was running, so it runs in the end: whoever ended
/// it, and whichever machine it is.
fn meanwhile(stage: &Stage, what: Meanwhile, workflow: &str, place: &Place, args: &[String]) -> Value {
    let case = format!("{what:?}, {}", place.what);
    let (daemon, row) = stage.dies(workflow, place, args, || {
        stage.never_a_mixture(&case);
        what.happens(&stage.bed);
        stage.never_a_mixture(&case);
    });
    if matches!(what, Meanwhile::Qemu) && stage.bed.guest.state().unwrap().state == "shut off" {
        // It was killed while it was the old machine's, before the job had asked anything of it, or after the guest had
        // been let go for good: nobody's wish is to start it again.
        stage.bed.guest.virsh("start", &[]).unwrap();
    }
    stage.judge(&case, &row);
    if workflow == RESTORE {
        stage.discard();
    }
    daemon.end();
    row
}

fn in_a_restore(what: Meanwhile, more: &[&str], begun: &[&str], done: &[&str]) {
    let stage = Stage::new();
    let args = stage.restore(more);
    let history = stage.undisturbed(&args);
    stage.afresh();
    let mut ends = BTreeMap::new();
    for place in places(&history, begun, done) {
        count(&mut ends, &meanwhile(&stage, what, RESTORE, &place, &args));
    }
    println!("{what:?}: {ends:?}");
}

fn in_an_undo(what: Meanwhile, more: &[&str], begun: &[&str], done: &[&str]) {
    let stage = Stage::new();
    stage.undisturbed(&stage.restore(more));
    let history = stage.undisturbed(&stage.of_kept("--undo", more));
    let mut ends = BTreeMap::new();
    for place in places(&history, begun, done) {
        count(&mut ends, &meanwhile(&stage, what, UNDO, &place, &stage.of_kept("--undo", more)));
    }
    println!("{what:?}, undo: {ends:?}");
}

#[test]
fn somebody_who_starts_the_domain_while_it_is_down_for_a_restore_finds_one_machine_whole() {
    in_a_restore(
        Meanwhile::Started,
        &PULL_THE_PLUG,
        &["aside", "begin"],
        &["rest", "aside", "swap", "begin"],
    );
}

#[test]
fn somebody_who_starts_the_domain_while_it_is_down_for_an_undo_finds_one_machine_whole() {
    in_an_undo(Meanwhile::Started, &["--save-old"], &["begin"], &["rest", "aside", "swap", "back"]);
}

#[test]
fn qemu_killed_in_a_restore_in_place_leaves_one_machine_whole() {
    in_a_restore(Meanwhile::Qemu, &["--save-old"], &["rest", "resume"], &["mark", "begin", "resume", "seen"]);
}

#[test]
fn a_reboot_of_the_host_in_a_restore_in_place_leaves_one_machine_whole() {
    let done = ["image", "rest", "aside", "swap", "begin", "resume"];
    in_a_restore(Meanwhile::Reboot, &PULL_THE_PLUG, &["rest"], &done);
}

#[test]
fn a_reboot_of_the_host_in_an_undo_leaves_one_machine_whole() {
    let done = ["rest", "aside", "swap", "back", "begin", "resume", "forget"];
    in_an_undo(Meanwhile::Reboot, &["--save-old"], &[], &done);
}

/// libvirtd is killed right before each change of its own notes that says something of the domain's definition or state.
#[test]
fn libvirtd_killed_before_any_note_of_its_own_leaves_one_machine_whole() {
    let stage = Stage::new();
    let (bed, host) = (&stage.bed, &stage.bed.host);
    let daemon = host.daemon();
    let args = stage.restore(&PULL_THE_PLUG);
    let (all, row) = Renames::undisturbed(bed, &strs(&args));
    stage.judge("undisturbed", &row);
    stage.discard();
    let config = bed.files_of_libvirt().remove(1);
    let worth = |nth: &usize| {
        let rename = &all[nth - 1];
        rename.to == config || rename.change.1.contains("state=") || rename.change.1.contains("vmkeep")
    };
    let chosen: Vec<usize> = (1..=all.len()).filter(worth).collect();
    println!("{} notes, {} of them worth a case", all.len(), chosen.len());
    let mut ends = BTreeMap::new();
    for nth in chosen {
        let (job, change) =
            Renames::killed_before(bed, Box::new(move |number, _| number == nth), &strs(&args));
        let case = format!("libvirtd killed before note {nth}: {:?}", all[nth - 1].change.1);
        if change.is_some() {
            host.hypervisor.start_libvirtd().unwrap();
        }
        let row = bed.host.at_rest(&job);
        assert!(row["ended"].is_string(), "{case}: {row:#}\n{}", host.ok(&["job", "explain", &job]));
        count(&mut ends, &row);
        stage.judge(&case, &row);
        stage.discard();
    }
    println!("{ends:?}");
    daemon.end();
}

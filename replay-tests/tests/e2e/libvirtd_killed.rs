//! libvirtd dies at every moment at which QEMU has done something that libvirt has not noted: the guest ends on its own
//! images with everything it has flushed, and the job ends, or says what it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use replay_tests::testbed::{QemuDisk, disk_files};
use rustix::process::Signal;
use serde_json::Value;

use crate::killed::all_places;
use crate::support::bed::{Bed, in_the_middle, large, small};
use crate::support::renames::{Act, Rename, Renames};
use crate::support::{about, disks, in_time, signal, until};

/// What the three who have an opinion on a disk say of it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone)]
struct Opinions {
    qemu: &'static str,
    live: &'static str,
    persistent: &'static str,
    pivoting: bool,
}

fn opinions(bed: &Bed) -> BTreeSet<Opinions> {
    let (hypervisor, id) = (&bed.host.hypervisor, bed.guest.uuid());
    let qemu = hypervisor.disk_files_in_qemu(id).unwrap();
    let live = hypervisor.virsh(["dumpxml", id]).unwrap();
    let persistent = hypervisor.virsh(["dumpxml", "--inactive", id]).unwrap();
    compared(bed, &qemu, &live, &persistent)
}

/// The same while libvirtd is dead: what it has noted, and what QEMU says when it is asked past it.
fn opinions_without_libvirtd(bed: &Bed) -> BTreeSet<Opinions> {
    let [live, persistent] = [0, 1].map(|of| std::fs::read_to_string(&bed.files_of_libvirt()[of]).unwrap());
    let qemu = bed.host.hypervisor.disk_files_without_libvirtd(bed.guest.name(), &live).unwrap();
    compared(bed, &qemu, &live, &persistent)
}

fn compared(bed: &Bed, qemu: &BTreeMap<String, QemuDisk>, xml: &str, persistent: &str) -> BTreeSet<Opinions> {
    let (live, persistent) = (disk_files(xml).unwrap(), disk_files(persistent).unwrap());
    let says = |disk: &str, file: &PathBuf| if *file == bed.own[disk] { "base" } else { "overlay" };
    bed.own
        .keys()
        .map(|disk| Opinions {
            qemu: says(disk, &qemu[disk].file),
            live: says(disk, &live[disk]),
            persistent: says(disk, &persistent[disk]),
            pivoting: xml.contains("ready='pivot'"),
        })
        .collect()
}

/// libvirtd is killed, in one backup after the other, right before each time that it changes its status or its
/// definition of the domain: so at every moment at which QEMU has done something that libvirt has not noted.
/// Among them are those between the snapshot and the note of it, and between the pivot and the note of it.
///
/// Nothing that the guest has flushed is lost, it runs on its own images in the end, and no job ends without saying
/// how. Where libvirt itself is left with a wrong idea, the job needs attention, says so with a code, and the remedy
/// that it names is one.
#[test]
fn libvirtd_killed_before_any_note_of_its_own_leaves_guest_and_backup_whole() {
    let bed = Bed::boot(&small("web1"));
    let daemon = bed.host.daemon();
    let args = ["snapshot", "web1"];

    let (all, row) = Renames::undisturbed(&bed, &args);
    bed.judge("undisturbed", &row);
    println!("{} notes", all.len());
    let mut seen = BTreeMap::<Opinions, usize>::new();
    let mut ends = BTreeMap::<String, usize>::new();
    let mut forgotten = 0_usize;
    for nth in worth_a_case(&all) {
        let begun = Instant::now();
        let vmkeepd = daemon.pid();
        let (job, change) = Renames::killed_before(&bed, Box::new(move |number, _| number == nth), &args);
        let Some(change) = change else {
            println!("{nth}: not reached");
            bed.judge("undisturbed", &bed.host.at_rest(&job));
            continue;
        };
        // vmkeepd waits, so that the world can be looked at before anybody mends it.
        signal(vmkeepd, Signal::STOP);
        for opinion in opinions_without_libvirtd(&bed) {
            *seen.entry(opinion).or_default() += 1;
        }
        let case = format!("{nth} of {}, {change:?}", all.len());
        let (row, forgot) = brought_to_rest(&bed, vmkeepd, &job, forgotten.is_multiple_of(2));
        forgotten += usize::from(forgot);
        bed.judge(&case, &row);
        *ends.entry(row["status"].as_str().unwrap().to_owned()).or_default() += 1;
        println!("  {:?}", begun.elapsed());
    }
    println!("{ends:?}, forgotten {forgotten} times\n{seen:#?}");
    let behind = |qemu: &str, note: &str| seen.keys().any(|of| of.qemu == qemu && of.live == note);
    assert!(behind("overlay", "base"), "killed between the snapshot and the note of it: {seen:#?}");
    assert!(behind("base", "overlay"), "killed between the pivot and the note of it: {seen:#?}");
    bed.judge_disks();
}

/// The same in a backup that saves the guest: it is off for a while, and is brought back with its memory, or is told to
/// have lost it.
#[test]
fn libvirtd_killed_before_any_note_of_its_own_in_a_save_leaves_guest_and_backup_whole() {
    let bed = Bed::boot(&small("web1"));
    let daemon = bed.host.daemon();
    let args = ["snapshot", "web1", "--save"];
    let (all, row) = Renames::undisturbed(&bed, &args);
    bed.judge("undisturbed", &row);
    let mut forgotten = 0_usize;
    // Half of it is the half of the backup that is the same without a save.
    let every = if all_places() { 1 } else { 2 };
    for nth in worth_a_case(&all).into_iter().step_by(every) {
        let (job, change) = Renames::killed_before(&bed, Box::new(move |number, _| number == nth), &args);
        let case = format!("{nth} of {}, {change:?}", all.len());
        println!("{case}");
        let row = if change.is_some() {
            signal(daemon.pid(), Signal::STOP);
            let (row, forgot) = brought_to_rest(&bed, daemon.pid(), &job, forgotten.is_multiple_of(2));
            forgotten += usize::from(forgot);
            row
        } else {
            bed.host.at_rest(&job)
        };
        if bed.guest.state().unwrap().state == "shut off" {
            // libvirt ends a QEMU that it was starting when it died.
            println!("  off: {}", row["fault"]);
            bed.guest.start().unwrap();
        }
        bed.judge(&case, &row);
    }
    bed.judge_disks();
}

/// The numbers of the changes, from 1, but for those that only count a commit's states: it goes on as QEMU's alone.
fn worth_a_case(all: &[Rename]) -> Vec<usize> {
    let counts =
        |of: &str| ["state='new'", "state='running'", "newstate='ready'"].iter().any(|s| of.contains(s));
    let worth = |nth: &usize| {
        let (old, new) = &all[nth - 1].change;
        !old.starts_with("<blockjob ") || !(counts(old) || counts(new))
    };
    (1..=all.len()).filter(worth).collect()
}

/// The way out after libvirtd was killed in a job: libvirtd comes back, then vmkeepd, which stands still until now, and
/// whatever the job asks for is done. Returns its row, and whether libvirt had forgotten the domain, which is told it
/// again (`mend`), or loses its QEMU.
fn brought_to_rest(bed: &Bed, vmkeepd: u32, job: &str, mend: bool) -> (Value, bool) {
    let noted = std::fs::read_to_string(&bed.files_of_libvirt()[0]).unwrap_or_default();
    bed.host.hypervisor.start_libvirtd().unwrap();
    let found = in_time(|| {
        // A libvirtd that has just begun may close its first connections.
        let state = bed.guest.state().ok()?;
        let qemu = bed.host.hypervisor.qmp("web1", &serde_json::json!({"execute": "query-status"}));
        (state.state == "shut off" || qemu.is_ok()).then_some(state)
    });
    let state = found.unwrap_or_else(|| {
        // Seen once: libvirt does not get hold of a QEMU that it was starting when it died: its operator ends it.
        println!("  libvirt does not find its QEMU: {:?}", bed.guest.state());
        let _ = bed.host.hypervisor.kill_qemu("web1");
        bed.guest.wait_state("shut off").unwrap();
        bed.guest.state().unwrap()
    });
    let forgotten = state.state == "shut off" && noted.contains("state='pivoting'");
    println!("  {state:?}, forgotten: {forgotten}");
    let mut row = if forgotten {
        libvirt_has_forgotten(bed, vmkeepd, job, mend)
    } else {
        signal(vmkeepd, Signal::CONT);
        bed.host.at_rest(job)
    };
    if row["status"] == "needs_attention" {
        remedy(bed, &row);
        row = bed.host.at_rest(job);
    }
    (row, forgotten)
}

/// The same, brought about at will.
#[test]
fn a_domain_that_libvirt_has_forgotten_is_left_alone_until_it_is_known_again_or_its_qemu_is_gone() {
    let bed = Bed::boot(&small("web1"));
    let daemon = bed.host.daemon();
    for mend in [true, false] {
        forgotten_in_a_pivot(&bed, daemon.pid(), mend);
    }
    bed.judge_disks();
}

fn forgotten_in_a_pivot(bed: &Bed, vmkeepd: u32, mend: bool) {
    let pivoting = |_, rename: &Rename| rename.change.0.contains("state='pivoting'");
    let (job, change) = Renames::killed_before(bed, Box::new(pivoting), &["snapshot", "web1"]);
    assert!(change.is_some(), "the job ended without a pivot");
    let status = &bed.files_of_libvirt()[0];
    let noted = std::fs::read_to_string(status).unwrap();
    let unreadable = noted.replace(" job='active-commit'", " job=''");
    assert_ne!(noted, unreadable);
    std::fs::write(status, unreadable).unwrap();
    signal(vmkeepd, Signal::STOP);
    let (row, forgotten) = brought_to_rest(bed, vmkeepd, &job, mend);
    assert!(forgotten, "libvirt knows the domain");
    bed.judge("forgotten by libvirt", &row);
}

/// libvirtd died between QEMU's transaction and its own status file: it believes that the domain is on its bases while
/// QEMU writes to the overlays. Brought about at will, by giving it back the status file from before.
#[test]
fn a_libvirtd_that_missed_the_snapshot_is_healed_through_the_monitor() {
    missed_the_snapshot(&Bed::boot(&large("web1")));
}

pub(crate) fn missed_the_snapshot(bed: &Bed) {
    let host = &bed.host;
    let _daemon = host.daemon();
    let status = &bed.files_of_libvirt()[0];
    let before = std::fs::read(status).unwrap();
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "8M"]);
    host.hypervisor.kill_libvirtd().unwrap();
    std::fs::write(status, &before).unwrap();
    host.hypervisor.start_libvirtd().unwrap();
    assert!(opinions(bed).iter().all(|of| (of.qemu, of.live) == ("overlay", "base")), "libvirt is wrong");
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    bed.judge("the snapshot was missed", &row);
    bed.judge_disks();
}

/// For an instant in the middle of a pivot libvirt's status file is one that libvirt itself cannot read. Killed then, it
/// comes back without knowledge of the domain: QEMU runs on, stopped for the pivot, and libvirt says "shut off".
///
/// A second QEMU cannot be started beside it (its serial file and its images are in use). vmkeepd leaves all alone, and
/// the job says what to do, and goes on trying. Both ways out are taken: libvirt's note is mended, or that QEMU is ended.
/// Then the domain is brought home, and everything is there.
fn libvirt_has_forgotten(bed: &Bed, vmkeepd: u32, job: &str, mend: bool) -> Value {
    let qemu = bed.host.hypervisor.qemu("web1").unwrap();
    if !mend {
        // Whatever libvirt says, and whatever becomes of its note: it removes that when a start fails.
        let refused = bed.guest.virsh("start", &[]).expect_err("a second QEMU on the same images");
        println!("  libvirt has forgotten the domain; to start it: {refused}");
    }
    signal(vmkeepd, Signal::CONT);
    let fault = until("the job to say what is in the way", || {
        let history = bed.host.history(job);
        let mut failed = history.into_iter().filter(|row| about(row, "step_failed", "pivot"));
        // The first is that libvirt was gone.
        let failed = failed.find(|row| row["event"]["body"]["data"]["fault"]["code"] != 83)?;
        Some(failed["event"]["body"]["data"].clone())
    });
    println!("  {fault}");
    assert_eq!(fault["fault"]["code"], 63, "{fault}");
    assert!(fault["fault"]["cause"].as_str().unwrap().contains(&qemu.id.pid.to_string()), "{fault}");
    assert!(fault["fault"]["remedy"].as_str().unwrap().contains("job='active-commit'"), "{fault}");
    assert!(qemu.id.is_alive());
    let held = bed.host.hypervisor.files_held_by_qemu("web1").unwrap();
    assert!(held.iter().all(|file| file.exists()), "a file was removed under QEMU: {held:?}");
    let status = &bed.files_of_libvirt()[0];
    if mend {
        bed.host.hypervisor.kill_libvirtd().unwrap();
        let noted = std::fs::read_to_string(status).unwrap();
        std::fs::write(status, noted.replace(" job=''", " job='active-commit'")).unwrap();
        bed.host.hypervisor.start_libvirtd().unwrap();
        let row = bed.host.at_rest(job);
        assert!(qemu.id.is_alive(), "the guest went on");
        return row;
    }
    qemu.id.kill().unwrap();
    let row = bed.host.at_rest(job);
    if row["ended"].is_string() {
        bed.guest.start().unwrap();
    }
    row
}

/// libvirt believes in a pivot that is over: the guest is safe, the operator is told what to do, and that helps.
fn remedy(bed: &Bed, row: &Value) {
    assert_eq!(row["fault"]["code"], 103, "{row:#}");
    assert_eq!(bed.guest.state().unwrap().state, "running");
    bed.guest.wait_more(3).unwrap();
    let qemu = bed.host.hypervisor.disk_files_in_qemu(bed.guest.uuid()).unwrap();
    let qemu: BTreeMap<_, _> = qemu.into_iter().map(|(disk, at)| (disk, at.file)).collect();
    assert_eq!(qemu, bed.own, "QEMU");
    assert_eq!(disks(&bed.guest), bed.own, "the next start");
    bed.guest.shutdown().unwrap();
    bed.guest.start().unwrap();
    bed.host.ok(&["job", "settle", row["id"].as_str().unwrap()]);
    let job = row["id"].as_str().unwrap();
    until("the job to end", || bed.host.job(job)["ended"].is_string().then_some(()));
}

/// QEMU stands still when the snapshot is asked for, and vmkeepd dies. libvirt takes the snapshot when QEMU goes on,
/// for nobody. It must be known for what it is, whether it comes before vmkeepd is back or after.
#[test]
fn a_snapshot_that_is_taken_after_vmkeepd_has_died_is_recognised_and_ended_whole() {
    let bed = Bed::boot(&small("web1"));
    for vmkeepd_first in [false, true] {
        let daemon = bed.host.daemon();
        let qemu = bed.host.hypervisor.qemu("web1").unwrap().id;
        let act = Act {
            // The last thing before the snapshot is asked for: the note that the guest may be held for it.
            when: Box::new(|_, rename| rename.change.1.contains("hold=\"suspended\"")),
            act: Box::new(move || qemu.signal(Signal::STOP)),
        };
        let watch = Renames::watch(&bed, Some(act));
        let job = bed.host.begin(&["snapshot", "web1"]);
        until("QEMU to stand still", || watch.acted().then_some(()));
        drop(watch);
        until("libvirt to wait for QEMU", || {
            let control = bed.guest.virsh("domcontrol", &[]).unwrap();
            (control.trim() != "ok").then_some(())
        });
        daemon.kill();
        let daemon = if vmkeepd_first {
            let daemon = bed.host.daemon_that_dies(None);
            until("vmkeepd to take over its jobs", || {
                let status = bed.host.vmkeep(&["--json", "status"]);
                let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
                (status["daemon"]["phase"] == "recovering").then_some(())
            });
            qemu.signal(Signal::CONT);
            bed.host.until_ready();
            daemon
        } else {
            qemu.signal(Signal::CONT);
            until("the snapshot to be taken for nobody", || {
                opinions(&bed).iter().all(|of| of.qemu == "overlay").then_some(())
            });
            bed.host.daemon()
        };
        let row = bed.host.at_rest(&job);
        bed.judge(&format!("vmkeepd was back first: {vmkeepd_first}"), &row);
        daemon.end();
    }
    bed.judge_disks();
}

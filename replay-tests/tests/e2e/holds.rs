//! Guests that are paused or frozen: those that a job holds are set free, whoever dies, before anything else happens and
//! whatever state vmkeepd's own store is in; those that somebody else holds are never touched.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB, ProcessId};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::bed::{Bed, manifest_of, small};
use crate::support::renames::{Act, Renames};
use crate::support::{Host, about, assert_untouched, until};

/// The guest stands still for the pivot, and vmkeepd dies; then libvirtd with it. Whoever sets it free must not wait
/// for the job, and must have made the definition right before.
#[test]
fn a_guest_stopped_for_the_pivot_runs_again_as_soon_as_vmkeepd_is_back() {
    let bed = Bed::boot(&small("web1"));
    for libvirtd_too in [false, true] {
        let daemon = bed.host.daemon();
        let (vmkeepd, libvirtd) =
            (ProcessId::of(daemon.pid()).unwrap(), bed.host.hypervisor.libvirtd().unwrap());
        let act = Act {
            when: Box::new(|_, rename| rename.change.1.contains("state='paused' reason='user'")),
            act: Box::new(move || {
                vmkeepd.signal(Signal::KILL);
                if libvirtd_too {
                    libvirtd.signal(Signal::KILL);
                }
            }),
        };
        let watch = Renames::watch(&bed, Some(act));
        bed.host.begin(&["snapshot", "web1", "--disk-only"]);
        until("the guest to be stopped", || watch.acted().then_some(()));
        drop(watch);
        daemon.kill();
        if libvirtd_too {
            libvirtd.wait_gone(Duration::from_secs(20)).unwrap();
            bed.host.hypervisor.start_libvirtd().unwrap();
        }
        // libvirt itself has not noted it.
        let status =
            bed.host.hypervisor.qmp("web1", &serde_json::json!({"execute": "query-status"})).unwrap();
        assert_eq!(status["running"], false, "{status}");
        let before = bed.guest.last_tick();
        let daemon = bed.host.daemon_that_dies(None);
        let since = Instant::now();
        until("the guest to run", || (bed.guest.state().unwrap().state == "running").then_some(()));
        let took = since.elapsed();
        println!("libvirtd killed too: {libvirtd_too}; the guest ran {took:?} after vmkeepd was started");
        assert!(took < Duration::from_secs(10), "{took:?}");
        bed.guest.wait_tick(before + 1).unwrap();
        bed.host.until_ready();
        let row = bed.host.at_rest(&bed.newest());
        bed.judge("vmkeepd killed while the guest stood still", &row);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        daemon.end();
    }
    bed.judge_disks();
}

/// A guest that its operator pauses while it is backed up stays paused: after the job, after vmkeepd and libvirtd were
/// started anew.
#[test]
fn a_guest_that_its_operator_has_paused_is_left_paused() {
    let bed = Bed::boot(&small("web1"));
    let daemon = bed.host.daemon();
    let job = bed.host.begin(&["snapshot", "web1", "--bandwidth", "4M"]);
    bed.host.reached(&job, "step_started", "copy/vda.qcow2");
    bed.guest.virsh("suspend", &[]).unwrap();
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    let paused = || bed.guest.state().unwrap().state == "paused";
    assert!(paused(), "after the job");
    daemon.kill();
    let daemon = bed.host.daemon();
    assert!(paused(), "after a start of vmkeepd");
    bed.host.hypervisor.restart_libvirtd().unwrap();
    until("vmkeepd to reach libvirt again", || bed.host.vmkeep(&["domains"]).status.success().then_some(()));
    assert!(paused(), "after a start of libvirtd");
    bed.guest.virsh("resume", &[]).unwrap();
    bed.judge("paused by its operator", &row);
    daemon.end();
    bed.judge_disks();
}

pub(crate) fn frozen(guest: &Guest) -> bool {
    let answer = guest.virsh("qemu-agent-command", &[r#"{"execute":"guest-fsfreeze-status"}"#]).unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    answer["return"] == "frozen"
}

/// File systems are frozen for the instant of a disk-only backup and thawed in every case: also when vmkeepd dies in
/// between. What somebody else has frozen stays frozen.
#[test]
fn a_freeze_of_ours_always_ends_and_that_of_somebody_else_is_never_touched() {
    let bed = Bed::boot(&small("web1").disk(DiskSpec::new(32 * MIB).ext4()).agent());
    let args = ["snapshot", "web1", "--disk-only"];
    let clean = bed.undisturbed(&args);
    assert!(!frozen(&bed.guest));
    for step in ["freeze", "thaw"] {
        let event = clean.iter().find(|row| about(row, "step_succeeded", step)).unwrap();
        assert_ne!(event["event"]["body"]["data"]["output"]["file_systems"], 0, "{event:#}");
    }

    for (side, kind, step) in [("before", "step_succeeded", "freeze"), ("after", "step_started", "take")] {
        bed.die_at(&clean, side, kind, step, &args);
        assert!(frozen(&bed.guest), "{side} {kind} {step}");
        let daemon = bed.host.daemon_that_dies(None);
        let since = Instant::now();
        until("the guest to be thawed", || (!frozen(&bed.guest)).then_some(()));
        let took = since.elapsed();
        println!("thawed {took:?} after vmkeepd was started");
        assert!(took < Duration::from_secs(10), "{took:?}");
        bed.host.until_ready();
        let row = bed.host.at_rest(&bed.newest());
        bed.judge("vmkeepd killed while the guest was frozen", &row);
        assert!(!frozen(&bed.guest));
        daemon.end();
    }

    let daemon = bed.host.daemon();
    bed.host.ok(&["snapshot", "web1", "--disk-only", "--quiesce"]);
    assert_eq!(manifest_of(&bed.host.backups()[0])["consistency"], "quiesced");
    bed.guest.virsh("domfsfreeze", &[]).unwrap();
    bed.host.fails(&["snapshot", "web1", "--disk-only", "--quiesce"], 101, &["domfsthaw"]);
    assert!(frozen(&bed.guest), "after a backup that failed for it");
    bed.host.ok(&args);
    assert!(frozen(&bed.guest), "after a backup that went on without");
    daemon.kill();
    let _daemon = bed.host.daemon();
    assert!(frozen(&bed.guest), "after a start of vmkeepd");
    bed.guest.virsh("domfsthaw", &[]).unwrap();
    assert_untouched(&bed.guest, &bed.own);
}

/// A job that no journal knows: setting a guest free must not need one.
pub(crate) const JOB: &str = "019e0000-0000-7000-8000-0123456789ab";

pub(crate) fn boot(host: &Host, name: &str) -> Guest {
    let guest = Guest::boot(&host.hypervisor, &GuestSpec::new(name).disk(DiskSpec::new(32 * MIB))).unwrap();
    guest.wait_tick(3).unwrap();
    guest
}

/// What a job does right before it suspends a guest, and the suspension.
pub(crate) fn hold(guest: &Guest, store: &str, job: &str) {
    let marker = format!("<job store='{store}' job='{job}' hold='suspended'/>");
    guest
        .virsh("metadata", &["--uri", "urn:vmkeep:job:1", "--key", "vmkeep", "--live", "--set", &marker])
        .unwrap();
    guest.virsh("suspend", &[]).unwrap();
}

fn state_of(guest: &Guest) -> String {
    guest.state().unwrap().state
}

pub(crate) fn store_of(host: &Host) -> String {
    host.json(&["status"])["daemon"]["store"].as_str().unwrap().to_owned()
}

fn set_mode(folder: &Path, files: u32, own: u32) {
    for entry in fs::read_dir(folder).unwrap() {
        fs::set_permissions(entry.unwrap().path(), fs::Permissions::from_mode(files)).unwrap();
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(own)).unwrap();
}

#[test]
fn a_guest_that_a_job_of_ours_holds_is_set_free_at_the_start_and_nobody_elses_is() {
    let host = Host::new();
    let (ours, theirs, operators) = (boot(&host, "ours"), boot(&host, "theirs"), boot(&host, "operators"));
    let daemon = host.daemon();
    let store = store_of(&host);
    daemon.kill();
    hold(&ours, &store, JOB);
    hold(&theirs, "00000000-0000-4000-8000-00000000beef", JOB);
    operators.virsh("suspend", &[]).unwrap();

    let _daemon = host.daemon();

    assert_eq!(state_of(&ours), "running", "{}", host.log());
    ours.wait_more(3).unwrap();
    assert!(!ours.virsh("dumpxml", &[]).unwrap().contains("hold="), "the hold is over");
    assert_eq!(state_of(&theirs), "paused", "another store's job holds it");
    assert_eq!(state_of(&operators), "paused", "an operator paused it");
    // The job that held it is not known here: the host's own history tells of it.
    let acts = host.json(&["audit", "guests"]);
    let act = &acts[0]["event"]["body"]["data"];
    assert!(act["name"] == "ours" && act["job"] == JOB && act["act"] == "resumed the guest", "{acts:#}");
    host.ok(&["audit", "verify"]);
}

#[test]
fn a_store_that_cannot_be_written_does_not_keep_a_guest_paused() {
    let host = Host::new();
    let guest = boot(&host, "held");
    let daemon = host.daemon();
    let store = store_of(&host);
    assert_eq!(daemon.end(), Some(0));
    hold(&guest, &store, JOB);
    let folder = host.hypervisor.dir().join("state/vmkeep/store");
    set_mode(&folder, 0o400, 0o500);

    let mut daemon = host.daemon_that_dies(None);

    let status = until("vmkeepd to give up", || daemon.ended());
    assert_eq!(status.code(), Some(124), "{}", host.log());
    assert!(host.log().contains("STORE_UNAVAILABLE"), "{}", host.log());
    assert_eq!(state_of(&guest), "running", "{}", host.log());
    guest.wait_more(3).unwrap();
    set_mode(&folder, 0o600, 0o700);
    let _daemon = host.daemon();
}

#[test]
fn libvirt_is_waited_for_and_guests_are_set_free_each_time_it_comes_back() {
    let host = Host::new();
    let guest = boot(&host, "held");
    let daemon = host.daemon();
    let store = store_of(&host);
    daemon.kill();
    hold(&guest, &store, JOB);
    host.hypervisor.kill_libvirtd().unwrap();

    let _daemon = host.daemon_that_dies(None);

    let phase = || {
        let output = host.vmkeep(&["--json", "status"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["daemon"]["phase"].as_str().map(str::to_owned)
    };
    until("vmkeepd to say that it waits", || (phase()? == "waiting_for_libvirt").then_some(()));
    host.fails(&["snapshot", "held"], 83, &["libvirt", "HYPERVISOR_UNREACHABLE"]);
    host.hypervisor.start_libvirtd().unwrap();
    host.until_ready();
    assert_eq!(state_of(&guest), "running", "{}", host.log());

    // Again, while vmkeepd runs: libvirtd is away while a guest is held that no job of this process works on.
    hold(&guest, &store, JOB);
    host.hypervisor.restart_libvirtd().unwrap();
    until("the guest to be set free", || (state_of(&guest) == "running").then_some(()));
    host.ok(&["snapshot", "held", "--disk-only"]);
}

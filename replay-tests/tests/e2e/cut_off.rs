//! QEMU dies, or the whole host, at every turn of a backup, and somebody starts the domain before vmkeepd is about it: it
//! must start on a file that holds everything it has flushed, and be brought home from there.

use crate::support::assert_home;
use crate::support::bed::{Bed, small};

/// The host is cut off at every turn of a backup: vmkeepd, libvirtd and QEMU are gone at once. The domain is started
/// again before vmkeepd is there, as autostart would, and the guest writes on: on whichever file its definition names.
///
/// That must always be the one with everything that it has flushed, and vmkeepd must bring it home from there.
#[test]
fn a_host_that_goes_down_and_starts_its_guests_before_vmkeepd_loses_no_flushed_write() {
    let bed = Bed::boot(&small("web1"));
    let args = ["snapshot", "web1"];
    let clean = bed.undisturbed(&args);
    for (side, kind, step) in [
        ("before", "step_succeeded", "switch"),
        ("after", "step_started", "take"),
        ("before", "step_succeeded", "take"),
        ("after", "step_started", "copy/vda.qcow2"),
        ("before", "step_succeeded", "publish"),
        ("before", "step_succeeded", "commit/vda"),
        ("after", "step_started", "pivot"),
        ("before", "step_succeeded", "pivot"),
        ("before", "step_succeeded", "tidy"),
    ] {
        let case = format!("cut off {side} {kind} {step}");
        bed.die_at(&clean, side, kind, step, &args);
        bed.host.hypervisor.kill_libvirtd().unwrap();
        bed.host.hypervisor.kill_qemu("web1").unwrap();
        bed.host.hypervisor.start_libvirtd().unwrap();
        bed.guest.wait_state("shut off").unwrap();
        bed.guest.start().unwrap();
        bed.guest.wait_more(3).unwrap();
        let daemon = bed.host.daemon();
        let row = bed.host.at_rest(&bed.newest());
        bed.judge(&case, &row);
        daemon.end();
    }
    bed.judge_disks();
}

/// QEMU dies at every turn of a backup, and somebody starts the domain while the job is still about it.
#[test]
fn qemu_killed_at_any_turn_and_the_domain_started_by_somebody_loses_no_flushed_write() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    for (kind, step) in [
        ("step_started", "take"),
        ("step_succeeded", "take"),
        ("step_started", "copy/vda.qcow2"),
        ("step_started", "commit/vda"),
        ("step_started", "pivot"),
        ("step_succeeded", "pivot"),
    ] {
        let job = bed.host.begin(&["snapshot", "web1", "--bandwidth", "8M"]);
        bed.host.reached(&job, kind, step);
        bed.host.hypervisor.kill_qemu("web1").unwrap();
        bed.guest.wait_state("shut off").unwrap();
        start(&bed);
        bed.guest.wait_more(3).unwrap();
        let row = bed.host.at_rest(&job);
        bed.judge(&format!("QEMU killed at {kind} {step}"), &row);
    }
    bed.judge_disks();
}

/// As somebody who does not know of the job. An overlay of a domain that is off is being committed then, and gives way; but
/// QEMU may ask for the image's lock in the very moment before. Such a start is refused by name, once.
fn start(bed: &Bed) {
    match bed.guest.start() {
        Err(e) if e.to_string().contains("\"write\" lock") => {
            println!("refused: {e}");
            bed.guest.start().unwrap();
        }
        started => started.unwrap(),
    }
}

/// Whoever shuts the domain down, and whoever resets it, at any turn of a backup, is not in its way, nor it in theirs.
#[test]
fn a_domain_shut_down_or_reset_by_somebody_at_any_turn_of_its_backup_loses_no_flushed_write() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    for (kind, step) in [
        ("step_succeeded", "mark"),
        ("step_succeeded", "switch"),
        ("step_started", "take"),
        ("step_succeeded", "take"),
        ("step_started", "commit/vda"),
        ("step_started", "pivot"),
        ("step_succeeded", "pivot"),
    ] {
        let args = ["snapshot", "web1", "--bandwidth", "8M"];
        let job = bed.host.begin(&args);
        bed.host.reached(&job, kind, step);
        let boots = bed.guest.boots();
        bed.guest.virsh("reset", &[]).unwrap();
        bed.guest.wait_up(boots).unwrap();
        let row = bed.host.at_rest(&job);
        bed.judge(&format!("reset at {kind} {step}"), &row);

        let job = bed.host.begin(&args);
        bed.host.reached(&job, kind, step);
        bed.guest.shutdown().unwrap();
        let row = bed.host.at_rest(&job);
        assert_home(&bed.guest, &bed.own);
        bed.guest.start().unwrap();
        bed.judge(&format!("shut down at {kind} {step}"), &row);
    }
    bed.judge_disks();
}

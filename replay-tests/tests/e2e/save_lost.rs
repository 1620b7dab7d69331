//! QEMU, or the whole host, ends in the middle of a save; or somebody starts the domain meanwhile. Memory is given back
//! only where it fits the disks, and a guest that ran runs again where policy says so.

use replay_tests::testbed::GuestSpec;
use serde_json::Value;

use crate::save::{SAVE, output};
use crate::support::bed::{Bed, default_root, judge_backup, small};
use crate::support::ram::RamDisk;
use crate::support::{Daemon, about, files_below, until};

fn boot() -> (Bed, GuestSpec) {
    let spec = small("web1");
    (Bed::boot(&spec), spec)
}

/// All of the host's programs end at once; then the host is up again, and vmkeepd with it.
fn reboot(bed: &Bed, ram: Option<&RamDisk>, autostart: bool) {
    let hypervisor = &bed.host.hypervisor;
    if hypervisor.qemu("web1").is_ok() {
        hypervisor.kill_qemu("web1").unwrap();
    }
    hypervisor.kill_libvirtd().unwrap();
    let _ = hypervisor.kill_virtlogd();
    if let Some(ram) = ram {
        ram.empty();
    }
    hypervisor.start_libvirtd().unwrap();
    if autostart {
        bed.guest.start().unwrap();
    }
}

/// Ends vmkeepd, and then the host, right after an event of a save; returns the next vmkeepd, and the job when it is over.
fn rebooted_after(
    bed: &Bed,
    ram: Option<&RamDisk>,
    clean: &[Value],
    at: (&str, &str),
    autostart: bool,
) -> (Daemon, Value) {
    bed.die_at(clean, "after", at.0, at.1, &SAVE);
    reboot(bed, ram, autostart);
    let daemon = bed.host.daemon_with(&[("VMKEEP_TEST_BOOT", "another")]);
    bed.host.until_ready();
    let row = bed.host.at_rest(&bed.newest());
    (daemon, row)
}

/// Every place at which the guest is in another state.
const PLACES: [(&str, &str); 8] = [
    ("step_succeeded", "switch"),
    ("step_started", "save"),
    ("step_succeeded", "save"),
    ("step_succeeded", "reload"),
    ("step_started", "resume"),
    ("step_succeeded", "resume"),
    ("step_succeeded", "publish"),
    ("step_started", "pivot"),
];

#[test]
fn a_host_that_goes_down_at_any_phase_of_a_save_finds_its_guest_started_again() {
    let (bed, _) = boot();
    let clean = bed.undisturbed(&SAVE);
    for at in PLACES {
        let boots = bed.guest.boots();
        let (daemon, row) = rebooted_after(&bed, None, &clean, at, false);
        let job = row["id"].as_str().unwrap();
        let state = bed.guest.state().unwrap().state;
        println!("{at:?}: {}, {state}, {}", row["status"], output(&bed, job, "resume"));
        assert!(row["ended"].is_string(), "{at:?}: {row:#}\n{}", bed.host.log());
        match at {
            // The state was durable and nothing had run since: the host's end is as if it had not been.
            ("step_succeeded", "save" | "reload") | ("step_started", "resume") => {
                assert_eq!(state, "running", "{at:?}");
                bed.guest.wait_more(3).unwrap();
                assert_eq!(bed.guest.boots(), boots, "{at:?}: with its memory");
                assert_eq!(row["status"], "succeeded", "{row:#}");
            }
            // Its state was never whole, or it ran by itself when the host went down.
            _ => bed.guest.wait_up(boots).unwrap(),
        }
        bed.judge(&format!("{at:?}"), &row);
        daemon.end();
    }
    bed.judge_disks();
}

#[test]
fn a_host_that_goes_down_with_the_ram_disk_gets_its_guest_back_without_memory_and_no_backup() {
    let (bed, _) = boot();
    let ram = RamDisk::new(&bed.host, "");
    let clean = bed.undisturbed(&SAVE);
    for at in [("step_started", "save"), ("step_succeeded", "save"), ("step_succeeded", "reload")] {
        let boots = bed.guest.boots();
        let (daemon, row) = rebooted_after(&bed, Some(&ram), &clean, at, false);
        assert_eq!(row["status"], "rolled_back", "{at:?}: {row:#}\n{}", bed.host.log());
        let back = output(&bed, row["id"].as_str().unwrap(), "resume");
        assert_eq!(back["back"], "cold", "{at:?}: {back}");
        if at != ("step_started", "save") {
            assert_eq!(row["fault"]["code"], 44, "{row:#}");
        }
        bed.guest.wait_up(boots).unwrap();
        bed.judge(&format!("{at:?}"), &row);
        daemon.end();
    }
    bed.judge_disks();
}

#[test]
fn a_host_that_goes_down_in_a_live_backup_finds_its_guest_started_again_unless_told_otherwise() {
    let (bed, _) = boot();
    for (args, policy) in
        [(["snapshot", "web1", "--live"], "start"), (["snapshot", "web1", "--disk-only"], "leave")]
    {
        let ram = RamDisk::new(&bed.host, &format!("after_reboot = {policy:?}"));
        let clean = bed.undisturbed(&args);
        let boots = bed.guest.boots();
        bed.die_at(&clean, "after", "step_succeeded", "take", &args);
        reboot(&bed, None, false);
        let daemon = bed.host.daemon_with(&[("VMKEEP_TEST_BOOT", "another")]);
        bed.host.until_ready();
        let row = bed.host.at_rest(&bed.newest());
        assert_eq!(row["status"], "succeeded", "{args:?}: {row:#}\n{}", bed.host.log());
        if policy == "start" {
            bed.guest.wait_up(boots).unwrap();
        } else {
            assert_eq!(bed.guest.state().unwrap().state, "shut off");
            bed.guest.start().unwrap();
        }
        bed.judge(policy, &row);
        daemon.end();
        drop(ram);
    }
    bed.judge_disks();
}

#[test]
fn a_lost_state_leaves_a_backup_of_the_disks_if_that_is_wanted() {
    let (bed, _) = boot();
    let ram = RamDisk::new(&bed.host, "");
    let args = ["snapshot", "web1", "--save", "--without-state", "disk-only"];
    let clean = bed.undisturbed(&args);
    let boots = bed.guest.boots();
    bed.die_at(&clean, "after", "step_succeeded", "save", &args);
    reboot(&bed, Some(&ram), false);
    let _daemon = bed.host.daemon_with(&[("VMKEEP_TEST_BOOT", "another")]);
    bed.host.until_ready();
    let job = bed.newest();
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}\n{}", bed.host.log());
    bed.guest.wait_up(boots).unwrap();
    let backup = bed.host.backups().remove(0);
    assert_eq!(backup["memory"], false);
    let shown = bed.host.json(&["show", backup["id"].as_str().unwrap()])["manifest"]["warnings"].to_string();
    assert!(shown.contains("did not come back with its memory"), "{shown}");
    judge_backup(&bed.host, &backup);
    bed.assert_back_home();
}

#[test]
fn a_guest_that_is_not_to_be_started_after_a_reboot_stays_off() {
    let (bed, _) = boot();
    let ram = RamDisk::new(&bed.host, "after_reboot = \"leave\"");
    let clean = bed.undisturbed(&SAVE);
    let (_daemon, row) = rebooted_after(&bed, Some(&ram), &clean, ("step_succeeded", "save"), false);
    assert!(row["ended"].is_string(), "{row:#}");
    assert_eq!(bed.guest.state().unwrap().state, "shut off");
    bed.guest.start().unwrap();
    bed.judge("left off", &row);
}

#[test]
fn a_guest_that_somebody_starts_while_it_is_saved_is_never_given_its_old_memory() {
    let (bed, _) = boot();
    let clean = bed.undisturbed(&SAVE);
    for (at, reboots) in [(("step_succeeded", "save"), false), (("step_succeeded", "save"), true)] {
        let boots = bed.guest.boots();
        let (daemon, row) = if reboots {
            // Autostart is faster than vmkeepd.
            rebooted_after(&bed, None, &clean, at, true)
        } else {
            bed.die_at(&clean, "after", at.0, at.1, &SAVE);
            bed.guest.start().unwrap();
            let daemon = bed.host.daemon();
            let row = bed.host.at_rest(&bed.newest());
            (daemon, row)
        };
        let job = row["id"].as_str().unwrap();
        assert_eq!(row["status"], "succeeded", "{row:#}\n{}", bed.host.log());
        assert_eq!(output(&bed, job, "resume")["back"], "by_others");
        assert_eq!(bed.guest.boots(), boots + 1, "it goes on in the boot that somebody started");
        assert_eq!(bed.host.backups()[0]["memory"], true, "the state belongs to the backup all the same");
        bed.judge("started by somebody", &row);
        daemon.end();
    }
    bed.judge_disks();
}

#[test]
fn a_guest_that_somebody_started_and_ended_while_it_was_saved_stays_off() {
    let (bed, _) = boot();
    let clean = bed.undisturbed(&SAVE);
    bed.die_at(&clean, "after", "step_succeeded", "save", &SAVE);
    bed.guest.start().unwrap();
    bed.guest.wait_more(3).unwrap();
    bed.guest.destroy().unwrap();
    let _daemon = bed.host.daemon();
    let row = bed.host.at_rest(&bed.newest());
    let back = output(&bed, row["id"].as_str().unwrap(), "resume");
    assert_eq!(back["back"], "off", "{back}");
    assert_eq!(bed.guest.state().unwrap().state, "shut off");
    bed.guest.start().unwrap();
    bed.judge("started and ended", &row);
    bed.judge_disks();
}

/// Nobody wished the one off, and somebody did the other. vmkeepd is not there to see which; libvirt is.
#[test]
fn a_guest_whose_qemu_dies_in_its_save_is_started_again_and_one_that_is_destroyed_in_it_stays_off() {
    let (bed, _) = boot();
    let clean = bed.undisturbed(&SAVE);
    for destroyed in [false, true] {
        let boots = bed.guest.boots();
        bed.die_at(&clean, "after", "step_started", "save", &SAVE);
        match destroyed {
            true => bed.guest.destroy().unwrap(),
            false => bed.host.hypervisor.kill_qemu("web1").unwrap(),
        }
        bed.guest.wait_state("shut off").unwrap();
        let daemon = bed.host.daemon();
        let row = bed.host.at_rest(&bed.newest());
        let back = output(&bed, row["id"].as_str().unwrap(), "resume");
        let why = back["why"].as_str().unwrap_or_default();
        if destroyed {
            assert_eq!(
                (back["back"].as_str(), bed.guest.state().unwrap().state.as_str()),
                (Some("off"), "shut off")
            );
            bed.guest.start().unwrap();
        } else {
            assert_eq!(back["back"], "cold", "{back}");
            assert!(why.contains("by itself"), "{back}");
            bed.guest.wait_up(boots).unwrap();
        }
        bed.judge(if destroyed { "destroyed" } else { "died" }, &row);
        daemon.end();
    }
    bed.judge_disks();
}

/// vmkeepd is not there when somebody removes the folder that libvirt writes the guest's memory into.
#[test]
fn a_guest_whose_state_vanishes_with_the_target_while_it_is_saved_is_started_again() {
    let (bed, _) = boot();
    let boots = bed.guest.boots();
    let daemon = bed.host.daemon();
    let job = bed.host.begin(&SAVE);
    until("libvirt to write the guest's state", || {
        let written = files_below(&default_root(&bed.host));
        written.iter().any(|file| file.file_name().is_some_and(|name| name == "memory.save")).then_some(())
    });
    daemon.kill();
    bed.guest.wait_state("shut off").unwrap();
    bed.remove_unpublished();
    let _daemon = bed.host.daemon();
    let row = bed.host.at_rest(&job);
    let back = output(&bed, &job, "resume");
    assert_eq!(back["back"], "cold", "{back}\n{}", bed.host.story(&job));
    bed.guest.wait_up(boots).unwrap();
    bed.judge("the target vanished", &row);
    bed.judge_disks();
}

/// QEMU dies as a step of the save begins, or right after; the guest is where it should be, or off for a reason that
/// is told.
#[test]
fn qemu_killed_at_each_effect_of_a_save_loses_nothing() {
    let (bed, _) = boot();
    let daemon = bed.host.daemon();
    for step in ["save", "reload", "resume", "commit/vda", "pivot"] {
        for _ in 0..2 {
            let job = bed.host.begin(&SAVE);
            until("the step to begin, or the job to end", || {
                let history = bed.host.history(&job);
                let there = history.iter().any(|row| about(row, "step_started", step));
                (there || bed.host.job(&job)["ended"].is_string()).then_some(())
            });
            let killed = bed.host.hypervisor.kill_qemu("web1").is_ok();
            let row = bed.host.at_rest(&job);
            let state = bed.guest.state().unwrap().state;
            let back = output(&bed, &job, "resume");
            println!("{step}: killed {killed}: {}, {state}, {back}", row["status"]);
            assert!(row["ended"].is_string(), "{step}: {row:#}\n{}", bed.host.log());
            if state == "shut off" {
                bed.guest.start().unwrap();
            } else {
                bed.guest.wait_more(3).unwrap();
            }
            bed.judge(step, &row);
        }
    }
    daemon.end();
    bed.judge_disks();
}

//! The classic act on a real guest: saved, loaded again, let run. Whoever dies, and whenever, the guest comes back by
//! itself, with its memory wherever memory and disks still are of one instant.

use std::path::PathBuf;

use replay_tests::testbed::Guest;
use serde_json::Value;

use crate::killed::at_every_boundary;
use crate::support::bed::{Bed, default_root, folder, give, judge_backup, small};
use crate::support::mount::Mount;
use crate::support::ram::RamDisk;
use crate::support::{Host, disks, files_below};

pub(crate) const SAVE: [&str; 3] = ["snapshot", "web1", "--save"];

/// The output of a step of a job.
pub(crate) fn output(bed: &Bed, job: &str, step: &str) -> Value {
    let detail = bed.host.json(&["job", "show", job]);
    let steps = detail["steps"].as_array().unwrap().clone();
    let found = steps.iter().find(|row| row["name"] == step);
    found.unwrap_or_else(|| panic!("no step {step}: {steps:#?}"))["output"].clone()
}

/// The backup of a job that holds memory.
fn with_memory(bed: &Bed, job: &str) -> Value {
    let backup = bed.host.backups().into_iter().find(|backup| backup["job"] == job).expect("a backup");
    assert_eq!(backup["memory"], true, "{backup:#}");
    backup
}

/// A backup of a saved guest, restored beside it, goes on in the very same boot.
fn judge_memory(bed: &Bed, backup: &Value) {
    let point = judge_backup(&bed.host, backup);
    bed.host.ok(&["restore", backup["id"].as_str().unwrap(), "--as", "copy", "--start"]);
    let copy = Guest::attach(&bed.host.hypervisor, "copy").unwrap();
    copy.wait_tick(point + 10).unwrap();
    assert_eq!(copy.boot_id(), bed.guest.boot_id(), "the very same boot goes on");
    copy.destroy().unwrap();
    let of_copy = disks(&copy);
    let reports = crate::support::assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
    assert_eq!(reports[0].boots.len(), 1);
    copy.virsh("undefine", &[]).unwrap();
}

fn cycle(ram_disk: bool) {
    let bed = Bed::boot(&small("web1"));
    let ram = ram_disk.then(|| RamDisk::new(&bed.host, ""));
    let _daemon = bed.host.daemon();
    bed.guest.wait_tick(10).unwrap();
    let before = bed.guest.last_tick();

    let job = bed.host.begin(&SAVE);
    let row = bed.host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}\n{}", bed.host.log());
    bed.assert_back_home();
    assert_eq!(bed.guest.boots(), 1, "it never booted again");

    let resumed = output(&bed, &job, "resume");
    assert_eq!(resumed["back"], "resumed", "{resumed:#}");
    let downtime = resumed["downtime_ms"].as_u64().expect("the downtime is measured");
    let told = bed.host.ok(&["job", "explain", &job]);
    assert!(told.contains("it was down for") && told.contains("Its phases took: snapshot"), "{told}");
    let detail = bed.host.json(&["job", "show", &job]);
    let phases: Vec<_> =
        detail["phases"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(phases, ["snapshot", "retain", "merge"]);
    assert!(detail["phases"].as_array().unwrap().iter().all(|p| p["duration_ms"].is_u64()), "{detail:#}");

    let backup = with_memory(&bed, &job);
    let shown = bed.host.json(&["show", backup["id"].as_str().unwrap()]);
    assert_eq!(shown["manifest"]["memory"]["saved"]["downtime_ms"].as_u64(), Some(downtime), "{shown:#}");
    assert!(bed.host.ok(&["show", backup["id"].as_str().unwrap()]).contains("the guest was down for"));
    if let Some(ram) = &ram {
        assert_eq!(ram.files(), Vec::<PathBuf>::new());
    }
    let point = judge_backup(&bed.host, &backup);
    assert!(point >= before, "{before} <= {point}");
    judge_memory(&bed, &backup);
    bed.assert_back_home();
}

#[test]
fn a_guest_is_saved_to_the_target_loaded_again_and_let_run() {
    cycle(false);
}

#[test]
fn a_guest_is_saved_to_a_ram_disk_which_is_empty_afterwards() {
    cycle(true);
}

#[test]
fn a_save_is_planned_without_changing_anything() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    let text = bed.host.ok(&["snapshot", "web1", "--save", "--dry-run"]);
    for word in ["save", "reload", "resume", "retain", "merge"] {
        assert!(text.contains(word), "{text}");
    }
    bed.assert_nothing_changed();
}

#[test]
fn a_ram_disk_that_will_not_do_is_refused_if_required_and_else_left_out_with_a_warning() {
    let bed = Bed::boot(&small("web1"));
    let ram = RamDisk::new(&bed.host, "");
    std::fs::remove_dir(ram.path()).unwrap();
    let _daemon = bed.host.daemon();
    bed.refused(
        &["snapshot", "web1", "--save", "--ram-disk", "require"],
        3,
        &["CONFIGURED_RAM_DISK_IS_NOT_VALUD"],
    );
    let job = bed.host.begin(&SAVE);
    assert_eq!(bed.host.settled(&job)["status"], "succeeded");
    let backup = with_memory(&bed, &job);
    let shown = bed.host.json(&["show", backup["id"].as_str().unwrap()]);
    let warnings = shown["manifest"]["warnings"].to_string();
    assert!(warnings.contains("CONFIGURED_RAM_DISK_IS_NOT_VALUD"), "{warnings}");
    bed.assert_back_home();
}

#[test]
fn a_ram_disk_that_is_too_small_is_refused_if_required() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "ram", 100) else { return };
    let config = format!("[snapshot]\nram_disk = {:?}\n", mount.0);
    let dir = folder(&host, &host.hypervisor.dir().join("config/vmkeep"));
    std::fs::write(dir.join("vmkeep.toml"), config).unwrap();
    give(&host, &dir.join("vmkeep.toml"));
    let bed = Bed::boot_on(host, Some(mount), &small("web1"));
    let _daemon = bed.host.daemon();
    bed.refused(
        &["snapshot", "web1", "--save", "--ram-disk", "require"],
        4,
        &["NOT_ENOUGH_SPACE_ON_RAM_DISK"],
    );
}

#[test]
fn a_guest_that_is_paused_is_not_saved_and_a_domain_that_is_off_is_backed_up_as_one() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    bed.guest.virsh("suspend", &[]).unwrap();
    bed.host.fails(&SAVE, 95, &["paused", "virsh resume", "disks only"]);
    assert_eq!(bed.guest.state().unwrap().state, "paused");
    bed.guest.virsh("resume", &[]).unwrap();
    bed.guest.destroy().unwrap();
    let job = bed.host.begin(&SAVE);
    assert_eq!(bed.host.settled(&job)["status"], "succeeded");
    let backup = bed.host.backups().remove(0);
    assert_eq!(backup["memory"], false, "{backup:#}");
    bed.guest.start().unwrap();
    bed.judge("off", &bed.host.job(&job));
}

#[test]
fn the_merge_is_no_faster_than_it_may_be_by_qemus_own_account() {
    let bed = Bed::boot(&small("web1"));
    let args = [&SAVE[..], &["--merge-bandwidth", "7M"]].concat();
    let clean = bed.undisturbed(&args);
    // The commit is ready and goes on following the guest, and nobody is there to pivot.
    bed.die_at(&clean, "after", "step_succeeded", "commit/vda", &args);
    let jobs =
        bed.host.hypervisor.qmp("web1", &serde_json::json!({ "execute": "query-block-jobs" })).unwrap();
    let jobs = jobs.as_array().unwrap();
    assert!(!jobs.is_empty(), "a commit is under way");
    for job in jobs {
        assert_eq!((&job["type"], &job["speed"]), (&"commit".into(), &(7 << 20).into()), "{job:#}");
    }
    let _daemon = bed.host.daemon();
    let row = bed.host.at_rest(&bed.newest());
    assert_eq!(row["status"], "succeeded", "{row:#}");
    bed.judge("limited", &row);
}

/// Removes a backup; nothing else may be in the root.
pub(crate) fn clear(bed: &Bed, case: &str) {
    for backup in bed.host.backups() {
        std::fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
    }
    let left = files_below(&default_root(&bed.host));
    assert!(left.is_empty(), "{case}: left in the root: {left:?}");
}

fn killed(side: &str) {
    let bed = Bed::boot(&small("web1"));
    let ram = RamDisk::new(&bed.host, "");
    at_every_boundary(side, "snapshot", &bed.host, &SAVE, |case, row| {
        println!("{case}: {}", row["status"]);
        bed.assert_back_home();
        // However vmkeepd died: it was never QEMU or the host, so the guest never lost its memory.
        assert_eq!(bed.guest.boots(), 1, "{case}: it was started anew");
        assert_eq!(ram.files(), Vec::<PathBuf>::new(), "{case}");
        if row["status"] == "succeeded" {
            judge_backup(&bed.host, &with_memory(&bed, row["id"].as_str().unwrap()));
        }
        clear(&bed, case);
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_save_brings_the_guest_back_with_its_memory() {
    killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_save_brings_the_guest_back_with_its_memory() {
    killed("after");
}

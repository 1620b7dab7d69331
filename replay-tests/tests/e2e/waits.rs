//! The phases of a backup, and a job that waits between them: for a word, for a time, and for no longer than there is
//! room.

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};
use serde_json::Value;

use crate::support::bed::{Bed, small};
use crate::support::mount::Mount;
use crate::support::{Host, about, until};

/// The signal that a job waits for.
fn awaited(bed: &Bed, job: &str) -> Option<String> {
    let detail = bed.host.json(&["job", "show", job]);
    let steps = detail["steps"].as_array()?.clone();
    steps.iter().find_map(|step| Some(step["awaits"].as_str()?.to_owned()))
}

fn waits_for(bed: &Bed, job: &str, signal: &str) {
    until(&format!("the job to wait for {signal}"), || (awaited(bed, job)? == signal).then_some(()));
}

fn phase(bed: &Bed, job: &str, name: &str) -> Value {
    let detail = bed.host.json(&["job", "show", job]);
    let phases = detail["phases"].as_array().unwrap().clone();
    phases.into_iter().find(|phase| phase["name"] == name).unwrap()
}

#[test]
fn a_backup_waits_between_its_phases_for_a_word() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    for kind in [&["--disk-only"][..], &["--live"], &["--save"]] {
        let mut args = vec!["snapshot", "web1", "--wait-before", "retain,merge"];
        args.extend(kind);
        let job = bed.host.begin(&args);
        waits_for(&bed, &job, "retain");
        assert_eq!(phase(&bed, &job, "snapshot")["state"], "done");
        assert_eq!(phase(&bed, &job, "retain")["state"], "pending");
        assert!(bed.host.backups().is_empty());
        bed.guest.wait_more(3).unwrap();
        bed.host.fails(&["job", "signal", &job, "lunch"], 81, &["no such signal"]);
        bed.host.ok(&["job", "signal", &job, "retain", "--reason", "the database is told"]);
        waits_for(&bed, &job, "merge");
        assert_eq!(phase(&bed, &job, "retain")["state"], "done");
        assert_eq!(bed.host.backups().len(), 1, "published before the merge");
        let shown = bed.host.ok(&["job", "show", &job]);
        assert!(shown.contains("waits for the signal merge until"), "{shown}");
        bed.host.ok(&["job", "signal", &job, "merge"]);
        let row = bed.host.at_rest(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        let told = bed.host.ok(&["job", "explain", &job]);
        assert!(told.contains("the database is told"), "{told}");
        bed.judge(kind[0], &row);
    }
}

#[test]
fn without_the_word_it_goes_on_by_itself_and_says_so_also_when_vmkeepd_dies_meanwhile() {
    let bed = Bed::boot(&small("web1"));
    let daemon = bed.host.daemon();
    let job = bed.host.begin(&["snapshot", "web1", "--save", "--wait-before", "merge", "--wait-limit", "8s"]);
    waits_for(&bed, &job, "merge");
    daemon.kill();
    let _daemon = bed.host.daemon();
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    let fired = bed.host.history(&job).iter().any(|row| about(row, "timer_fired", ""));
    assert!(fired, "{:#?}", bed.host.history(&job));
    let told = bed.host.ok(&["job", "explain", &job]);
    assert!(told.contains("Nobody answered in time"), "{told}");
    bed.judge("deadline", &row);
}

#[test]
fn a_job_that_is_cancelled_while_it_waits_merges_at_once() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    let job = bed.host.begin(&["snapshot", "web1", "--wait-before", "retain"]);
    waits_for(&bed, &job, "retain");
    bed.host.ok(&["job", "cancel", &job]);
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "cancelled", "{row:#}");
    bed.assert_back_home();
    assert!(bed.host.backups().is_empty());
}

#[test]
fn a_job_that_waits_goes_on_when_the_overlays_leave_too_little_room() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "guests", 700) else { return };
    let spec = GuestSpec::new("web1")
        .disk(DiskSpec::new(64 * MIB).data(6 * MIB).at(&mount.0.join("a.qcow2")))
        .disk(DiskSpec::new(32 * MIB).raw().at(&mount.0.join("b.raw")));
    let bed = Bed::boot_on(host, Some(mount), &spec);
    let _daemon = bed.host.daemon();
    let job = bed.host.begin(&["snapshot", "web1", "--disk-only", "--wait-before", "merge"]);
    waits_for(&bed, &job, "merge");
    bed.mount().fill(100 * MIB);
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    let told = bed.host.ok(&["job", "explain", &job]);
    assert!(told.contains("vmkeepd sent the signal merge") && told.contains("bytes are left"), "{told}");
    bed.mount().clear();
    bed.assert_back_home();
}

//! vmkeepd killed with -9 at every event boundary of a backup and of a restore, and in the middle of a copy.

use std::collections::BTreeMap;
use std::path::Path;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};
use serde_json::Value;

use crate::support::bed::{Bed, judge_backup, small};
use crate::support::{Host, about, assert_ticks, disks, files_below, until};

/// Whether no place is to be left out, however long that takes: `VMKEEP_ALL_PLACES=1`.
pub(crate) fn all_places() -> bool {
    std::env::var_os("VMKEEP_ALL_PLACES").is_some()
}

/// Runs a command with vmkeepd killed once at every boundary on one side of the journal, and judges each run.
pub(crate) fn at_every_boundary(
    side: &str,
    workflow: &str,
    host: &Host,
    args: &[&str],
    mut judge: impl FnMut(&str, &Value),
) {
    let mut known = Vec::new();
    let clean = {
        let daemon = host.daemon();
        let job = host.begin(args);
        let row = host.settled(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        let events = host.history(&job).len();
        judge("uninterrupted", &row);
        daemon.end();
        known.push(job);
        events
    };
    let mut ends = BTreeMap::<String, usize>::new();
    // After one event, and before the next: what is durable is the same. So one side may leave out every other place.
    let every = if side == "after" && !all_places() { 2 } else { 1 };
    for seq in (1..=clean).step_by(every) {
        let case = format!("killed {side} event {seq} of {clean}");
        let place = format!("append/{side}/{workflow}/{seq}");
        let mut doomed = host.daemon_that_dies(Some(&place));
        host.until_ready();
        let mut all = args.to_vec();
        all.push("--no-wait");
        let _ = host.vmkeep(&all);
        let is_new =
            |job: &Value| job["workflow"] == workflow && known.iter().all(|known| job["id"] != *known);
        let died = doomed.dies_or(|| {
            let jobs = host.vmkeep(&["--json", "jobs"]);
            let jobs: Value = serde_json::from_slice(&jobs.stdout).unwrap_or_default();
            let ended = |jobs: &Vec<Value>| jobs.iter().any(|job| is_new(job) && job["ended"].is_string());
            jobs.as_array().is_some_and(ended)
        });
        drop(doomed);
        let daemon = host.daemon();
        let job = host.jobs().into_iter().find(is_new);
        match job {
            None => assert_eq!(
                (side, seq),
                ("before", 1),
                "{case}: only a request that was never durable may be gone"
            ),
            Some(job) => {
                assert!(died || seq > clean - 3, "{case}: the place was never reached");
                let id = job["id"].as_str().unwrap();
                let row = host.settled(id);
                known.push(id.to_owned());
                *ends.entry(row["status"].as_str().unwrap().to_owned()).or_default() += 1;
                host.ok(&["replay", id]);
                judge(&case, &row);
            }
        }
        daemon.end();
    }
    println!("{workflow}, {side} each of {clean} events: {ends:?}");
}

fn snapshot_killed(side: &str, args: &[&str]) {
    snapshot_of_killed(&Bed::boot(&small("web1")), side, args);
}

pub(crate) fn snapshot_of_killed(bed: &Bed, side: &str, args: &[&str]) {
    let host = &bed.host;
    at_every_boundary(side, "snapshot", host, args, |case, row| {
        println!("{case}: {}", row["status"]);
        bed.assert_back_home();
        let backups = host.backups();
        if row["status"] == "succeeded" {
            let ours = backups.iter().find(|backup| backup["job"] == row["id"]);
            judge_backup(host, ours.unwrap_or_else(|| panic!("{case}: no backup")));
        }
        for backup in &backups {
            std::fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
        }
        let root = Path::new(backups.first().map_or("", |b| b["folder"].as_str().unwrap()))
            .parent()
            .map(Path::to_owned);
        let left = root.map(|root| files_below(&root)).unwrap_or_default();
        assert!(left.is_empty(), "{case}: left in the root: {left:?}");
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_snapshot_ends_whole() {
    snapshot_killed("before", &["snapshot", "web1"]);
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_snapshot_ends_whole() {
    snapshot_killed("after", &["snapshot", "web1"]);
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_snapshot_of_the_disks_alone_ends_whole() {
    snapshot_killed("after", &["snapshot", "web1", "--disk-only"]);
}

fn restore_killed(side: &str) {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let (id, point) = {
        let daemon = host.daemon();
        host.ok(&["snapshot", "web1"]);
        let backup = host.backups().remove(0);
        let point = judge_backup(host, &backup);
        daemon.end();
        (backup["id"].as_str().unwrap().to_owned(), point)
    };
    let folder = host.restored().join("copy");
    let args = ["restore", &id, "--as", "copy", "--start"];
    at_every_boundary(side, "restore", host, &args, |case, row| {
        println!("{case}: {}", row["status"]);
        bed.assert_back_home();
        let there = host.hypervisor.domains().unwrap().contains(&"copy".to_owned());
        if row["status"] == "succeeded" {
            assert!(there, "{case}: the new domain is not there");
            let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
            copy.wait_tick(point + 3).unwrap();
            copy.destroy().unwrap();
            let of_copy = disks(&copy);
            assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
            copy.virsh("undefine", &[]).unwrap();
            std::fs::remove_dir_all(&folder).unwrap();
        } else {
            assert!(!there, "{case}: the new domain is left");
            let left = files_below(&folder);
            assert!(left.is_empty(), "{case}: left: {left:?}");
        }
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_restore_ends_whole() {
    restore_killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_restore_ends_whole() {
    restore_killed("after");
}

#[test]
fn a_copy_that_was_cut_off_goes_on_from_where_it_stood() {
    let disk = DiskSpec::new(256 * MIB).data(96 * MIB);
    let bed = Bed::boot(&GuestSpec::new("web1").disk(disk).disk(DiskSpec::new(32 * MIB).raw()));
    let host = &bed.host;
    let daemon = host.daemon();
    let job = host.begin(&["snapshot", "web1", "--bandwidth", "16M"]);
    until("some of the copy to be durable", || {
        let steps = host.json(&["job", "show", &job])["steps"].clone();
        let copy = steps.as_array()?.iter().find(|step| step["name"] == "copy/vda.qcow2")?;
        (copy["progress"]["done"].as_u64()? > 48 * MIB).then_some(())
    });
    daemon.kill();
    let _daemon = host.daemon();
    let row = host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    let history = host.history(&job);
    let resumed = history.iter().any(|row| {
        about(row, "step_probed", "copy/vda.qcow2")
            && row["event"]["body"]["data"]["verdict"]["verdict"] == "partial"
    });
    assert!(resumed, "{:#?}", history);
    bed.assert_back_home();
    judge_backup(host, &host.backups()[0]);
}

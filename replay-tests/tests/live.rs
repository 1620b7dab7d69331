//! A running guest, backed up live and restored, on a real libvirt and QEMU; and vmkeepd killed at every event boundary
//! of both.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};

use replay_tests::testbed::{DiskSpec, Format, Guest, GuestSpec, MIB};
use serde_json::Value;
use support::{Host, about, assert_ticks, assert_untouched, disks, files_below};

fn small(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .disk(DiskSpec::new(64 * MIB).data(6 * MIB))
        .disk(DiskSpec::new(32 * MIB).raw().data(4 * MIB))
}

/// The images of a backup, by disk.
fn image(backup: &Value, disk: &str) -> PathBuf {
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    let found: Vec<_> = files_below(&folder)
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(disk)))
        .collect();
    assert_eq!(found.len(), 1, "images of {disk}: {found:?}");
    found.into_iter().next().unwrap()
}

fn judge_backup(host: &Host, backup: &Value) -> u64 {
    host.ok(&["verify", backup["id"].as_str().unwrap()]);
    let reports = assert_ticks((&image(backup, "vda"), Format::Qcow2), (&image(backup, "vdb"), Format::Raw));
    reports[0].last
}

#[test]
fn a_running_guest_is_backed_up_live_and_restored_with_its_memory() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    let own = disks(&guest);
    let _daemon = host.daemon();
    guest.wait_tick(10).unwrap();
    let before = guest.last_tick();

    host.ok(&["snapshot", "web1"]);

    let after = guest.last_tick();
    assert_untouched(&guest, &own);
    let backups = host.backups();
    assert_eq!(backups.len(), 1);
    assert_eq!(backups[0]["memory"], true);
    let point = judge_backup(&host, &backups[0]);
    assert!((before..=after).contains(&point), "{before} <= {point} <= {after}");

    let id = backups[0]["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "web1 copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "web1 copy").unwrap();
    copy.wait_tick(point + 20).unwrap();
    assert_eq!(copy.boot_id(), guest.boot_id(), "the very same boot goes on");
    assert_ne!(copy.uuid(), guest.uuid());
    copy.destroy().unwrap();
    let of_copy = disks(&copy);
    let reports = assert_ticks((&of_copy["vda"], Format::Qcow2), (&of_copy["vdb"], Format::Raw));
    assert_eq!(reports[0].boots.len(), 1);
    assert!(reports[0].last >= point + 20);
    assert_untouched(&guest, &own);
}

#[test]
fn a_backup_of_the_disks_alone_restores_cold() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    let own = disks(&guest);
    let _daemon = host.daemon();
    guest.wait_tick(10).unwrap();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    assert_untouched(&guest, &own);
    let backup = host.backups().remove(0);
    assert_eq!(backup["memory"], false);
    let point = judge_backup(&host, &backup);
    let id = backup["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(point + 5).unwrap();
    assert_ne!(copy.boot_id(), guest.boot_id(), "it booted anew");
}

/// Runs a command with vmkeepd killed once at every boundary on one side of the journal, and judges each run.
fn at_every_boundary(
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
    let mut ends = std::collections::BTreeMap::<String, usize>::new();
    for seq in 1..=clean {
        let case = format!("killed {side} event {seq} of {clean}");
        let place = format!("append/{side}/{workflow}/{seq}");
        let mut doomed = host.daemon_that_dies(Some(&place));
        support::until("vmkeepd to be ready", || host.ready().then_some(()));
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

fn snapshot_killed(side: &str) {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    let own = disks(&guest);
    at_every_boundary(side, "snapshot", &host, &["snapshot", "web1"], |case, row| {
        println!("{case}: {}", row["status"]);
        assert_untouched(&guest, &own);
        let backups = host.backups();
        if row["status"] == "succeeded" {
            let ours = backups.iter().find(|backup| backup["job"] == row["id"]);
            judge_backup(&host, ours.unwrap_or_else(|| panic!("{case}: no backup")));
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
    snapshot_killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_snapshot_ends_whole() {
    snapshot_killed("after");
}

fn restore_killed(side: &str) {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    let own = disks(&guest);
    let (id, point) = {
        let daemon = host.daemon();
        host.ok(&["snapshot", "web1"]);
        let backup = host.backups().remove(0);
        let point = judge_backup(&host, &backup);
        daemon.end();
        (backup["id"].as_str().unwrap().to_owned(), point)
    };
    let folder = host.restored().join("copy");
    let args = ["restore", &id, "--as", "copy", "--start"];
    at_every_boundary(side, "restore", &host, &args, |case, row| {
        println!("{case}: {}", row["status"]);
        assert_untouched(&guest, &own);
        let there = host.hypervisor.domains().unwrap().contains(&"copy".to_owned());
        if row["status"] == "succeeded" {
            assert!(there, "{case}: the new domain is not there");
            let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
            copy.wait_tick(point + 3).unwrap();
            copy.destroy().unwrap();
            let of_copy = disks(&copy);
            assert_ticks((&of_copy["vda"], Format::Qcow2), (&of_copy["vdb"], Format::Raw));
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
    let host = Host::new();
    let guest = Guest::boot(
        &host.hypervisor,
        &GuestSpec::new("web1")
            .disk(DiskSpec::new(256 * MIB).data(96 * MIB))
            .disk(DiskSpec::new(32 * MIB).raw()),
    )
    .unwrap();
    let own = disks(&guest);
    let daemon = host.daemon();
    let job = host.begin(&["snapshot", "web1", "--bandwidth", "16M"]);
    support::until("some of the copy to be durable", || {
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
    assert_untouched(&guest, &own);
    judge_backup(&host, &host.backups()[0]);
}

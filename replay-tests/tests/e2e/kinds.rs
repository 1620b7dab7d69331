//! Every kind of domain that is not simply a running one with plain files: off, paused, … Each is backed up and
//! brought back on a real libvirt and QEMU, with somebody starting and stopping it at the worst moments, and with
//! vmkeepd killed at every event boundary.

use std::collections::BTreeMap;
use std::path::PathBuf;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};
use serde_json::Value;

use crate::killed::at_every_boundary;
use crate::support::bed::{define, give, judge_backup as judge, refused, small};
use crate::support::{Host, assert_home, assert_ticks, assert_untouched, disks, run};

/// A guest that has run for a while and was shut down; the last tick that it printed.
pub(crate) fn off(host: &Host, spec: &GuestSpec) -> (Guest, u64) {
    let guest = Guest::boot(&host.hypervisor, spec).unwrap();
    guest.wait_tick(10).unwrap();
    guest.shutdown().unwrap();
    let last = guest.last_tick();
    (guest, last)
}

/// The domain is off, on its own files, with nothing left of any job; its disks hold all ticks.
pub(crate) fn assert_off(guest: &Guest, own: &BTreeMap<String, PathBuf>, last: u64) {
    assert_eq!(guest.state().unwrap().state, "shut off");
    assert_home(guest, own);
    let reports = assert_ticks(&own["vda"], &own["vdb"]);
    assert!(reports[0].last >= last, "{} on the disks, {last} were printed", reports[0].last);
}

#[test]
fn a_domain_that_is_off_is_backed_up_and_restored() {
    let host = Host::new();
    let (guest, last) = off(&host, &small("web1"));
    let own = disks(&guest);
    // libvirt leaves an empty element behind where the marker was.
    let definition = || {
        let text = guest.virsh("dumpxml", &["--inactive"]).unwrap();
        text.lines().filter(|line| line.trim() != "<metadata/>").map(str::to_owned).collect::<Vec<_>>()
    };
    let before = definition();
    let _daemon = host.daemon();
    for args in [&["snapshot", "web1", "--dry-run"][..], &["snapshot", "web1"]] {
        let said = host.ok(args);
        assert!(said.contains("off"), "{said}");
    }
    assert_off(&guest, &own, last);
    assert_eq!(definition(), before);
    let backup = host.backups().remove(0);
    assert_eq!(backup["memory"], false);
    assert!(judge(&host, &backup) >= last);
    let shown = host.json(&["show", backup["id"].as_str().unwrap()]);
    assert_eq!(shown["manifest"]["consistency"], "off", "{shown:#}");
    host.ok(&["restore", backup["id"].as_str().unwrap(), "--as", "copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(last + 5).unwrap();
    guest.start().unwrap();
    guest.wait_more(3).unwrap();
}

/// Begins a backup whose copy lasts while something else happens, and returns its job when the disks may be copied.
fn being_copied(host: &Host, more: &[&str]) -> String {
    let job = host.begin(&[&["snapshot", "web1", "--bandwidth", "2M"], more].concat());
    host.reached(&job, "step_succeeded", "take");
    job
}

#[test]
fn a_domain_that_is_started_while_it_is_copied_runs_on_and_loses_nothing() {
    let host = Host::new();
    let (guest, last) = off(&host, &small("web1"));
    let own = disks(&guest);
    let _daemon = host.daemon();
    let job = being_copied(&host, &[]);
    guest.start().unwrap();
    guest.wait_more(10).unwrap();
    let row = host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    assert_untouched(&guest, &own);
    let backup = host.backups().remove(0);
    assert_eq!(judge(&host, &backup), last, "the backup is of before the start");
}

#[test]
fn a_domain_that_is_started_and_stopped_again_while_it_is_copied_keeps_what_it_wrote() {
    let host = Host::new();
    let (guest, last) = off(&host, &small("web1"));
    let own = disks(&guest);
    let _daemon = host.daemon();
    let job = being_copied(&host, &[]);
    guest.start().unwrap();
    guest.wait_more(10).unwrap();
    guest.shutdown().unwrap();
    let after = guest.last_tick();
    let row = host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    assert_off(&guest, &own, after);
    assert_eq!(judge(&host, &host.backups().remove(0)), last);
}

#[test]
fn a_running_domain_that_is_rebooted_or_stopped_while_it_is_copied_keeps_what_it_wrote() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    guest.wait_tick(10).unwrap();
    let own = disks(&guest);
    let _daemon = host.daemon();
    let job = being_copied(&host, &["--disk-only"]);
    let boots = guest.boots();
    guest.virsh("reset", &[]).unwrap();
    guest.wait_up(boots).unwrap();
    guest.wait_more(5).unwrap();
    let row = host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    assert_untouched(&guest, &own);
    let job = being_copied(&host, &["--disk-only"]);
    guest.wait_more(5).unwrap();
    guest.shutdown().unwrap();
    let after = guest.last_tick();
    let row = host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    assert_off(&guest, &own, after);
}

#[test]
fn a_guest_that_its_operator_has_paused_stays_paused_and_its_disks_are_backed_up() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    guest.wait_tick(10).unwrap();
    let own = disks(&guest);
    guest.virsh("suspend", &[]).unwrap();
    let last = guest.last_tick();
    let _daemon = host.daemon();
    // Memory of a paused guest is not taken: QEMU would close its disks until somebody resumed it.
    for args in [&["snapshot", "web1"][..], &["snapshot", "web1", "--disk-only"]] {
        host.ok(args);
        let state = guest.state().unwrap();
        assert_eq!((state.state.as_str(), guest.last_tick()), ("paused", last), "{args:?}: {state:?}");
        assert_home(&guest, &own);
    }
    host.fails(&["snapshot", "web1", "--on-busy-memory", "fail"], 95, &["paused", "virsh resume"]);
    assert_eq!(guest.state().unwrap().state, "paused");
    assert_home(&guest, &own);
    for backup in &host.backups() {
        assert_eq!(backup["memory"], false);
        judge(&host, backup);
    }
    guest.virsh("resume", &[]).unwrap();
    guest.wait_more(3).unwrap();
}

#[test]
fn a_guest_paused_by_its_operator_while_it_is_copied_stays_paused() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    guest.wait_tick(10).unwrap();
    let own = disks(&guest);
    let _daemon = host.daemon();
    let job = being_copied(&host, &[]);
    guest.wait_more(3).unwrap();
    guest.virsh("suspend", &[]).unwrap();
    assert_eq!(host.settled(&job)["status"], "succeeded");
    assert_eq!(guest.state().unwrap().state, "paused");
    assert_home(&guest, &own);
    guest.virsh("resume", &[]).unwrap();
    assert_untouched(&guest, &own);
}

fn off_killed(side: &str) {
    let host = Host::new();
    let (guest, last) = off(&host, &small("web1"));
    let own = disks(&guest);
    at_every_boundary(side, "snapshot", &host, &["snapshot", "web1"], |case, row| {
        println!("{case}: {}", row["status"]);
        assert_off(&guest, &own, last);
        let backups = host.backups();
        if row["status"] == "succeeded" {
            let ours = backups.iter().find(|backup| backup["job"] == row["id"]);
            assert!(judge(&host, ours.unwrap_or_else(|| panic!("{case}: no backup"))) >= last);
        }
        for backup in &backups {
            std::fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
        }
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_backup_of_a_domain_that_is_off_ends_whole() {
    off_killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_backup_of_a_domain_that_is_off_ends_whole() {
    off_killed("after");
}

/// Whoever starts the domain at any event of the job, and stops it at a later one, finds all its data.
#[test]
fn a_domain_started_at_every_event_of_its_backup_starts_and_loses_nothing() {
    let host = Host::new();
    let (guest, mut last) = off(&host, &small("web1"));
    let own = disks(&guest);
    let events = {
        let daemon = host.daemon();
        let job = host.begin(&["snapshot", "web1"]);
        assert_eq!(host.settled(&job)["status"], "succeeded");
        let events = host.history(&job).len();
        daemon.end();
        events
    };
    let mut ends = BTreeMap::<String, usize>::new();
    for seq in 1..=events {
        let case = format!("started at event {seq} of {events}");
        let place = format!("append/before/snapshot/{seq}");
        let mut doomed = host.daemon_that_dies(Some(&place));
        host.until_ready();
        let _ = host.vmkeep(&["snapshot", "web1", "--no-wait"]);
        doomed.dies_or(|| {
            let jobs = host.vmkeep(&["--json", "jobs", "--limit", "1"]);
            let jobs: Value = serde_json::from_slice(&jobs.stdout).unwrap_or_default();
            jobs[0]["ended"].is_string()
        });
        drop(doomed);
        // Now, with nobody at work, the domain is started, writes, and goes on while the job does.
        guest.start().unwrap_or_else(|e| panic!("{case}: a backup stands in the way of the start: {e}"));
        assert!(guest.last_tick() >= last, "{case}");
        guest.wait_more(5).unwrap();
        let daemon = host.daemon();
        let job = host.jobs().into_iter().next();
        if let Some(job) = job {
            let row = host.settled(job["id"].as_str().unwrap());
            *ends.entry(row["status"].as_str().unwrap().to_owned()).or_default() += 1;
        }
        assert_untouched(&guest, &own);
        daemon.end();
        guest.shutdown().unwrap();
        last = guest.last_tick();
        assert_off(&guest, &own, last);
    }
    println!("started at each of {events} events: {ends:?}");
}

#[test]
fn a_domain_saved_by_libvirt_is_backed_up_with_that_memory_and_starts_with_it() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    guest.wait_tick(10).unwrap();
    let own = disks(&guest);
    let boot = guest.boot_id();
    guest.virsh("managedsave", &[]).unwrap();
    let last = guest.last_tick();
    let _daemon = host.daemon();
    for args in [&["snapshot", "web1"][..], &["snapshot", "web1", "--disk-only"]] {
        host.ok(args);
        assert_eq!(guest.state().unwrap().state, "shut off");
        assert_home(&guest, &own);
        assert!(guest.virsh("dominfo", &[]).unwrap().contains("Managed save:   yes"));
    }
    // Both are of the same instant, that of the save: their order says nothing.
    let mut backups = host.backups();
    backups.sort_by_key(|backup| backup["memory"] == true);
    assert_eq!(backups.iter().map(|b| b["memory"] == true).collect::<Vec<_>>(), [false, true]);
    for backup in &backups {
        assert!(judge(&host, backup) >= last.saturating_sub(1));
    }
    let consistency = |backup: &Value| {
        host.json(&["show", backup["id"].as_str().unwrap()])["manifest"]["consistency"].clone()
    };
    assert_eq!(consistency(&backups[0]), "crash");
    assert_eq!(consistency(&backups[1]), "memory-and-disks");
    host.ok(&["restore", backups[1]["id"].as_str().unwrap(), "--as", "copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(last + 5).unwrap();
    assert_eq!(copy.boot_id(), boot, "the very same boot goes on");
    guest.virsh("start", &[]).unwrap();
    assert_untouched(&guest, &own);
    assert_eq!(guest.boots(), 1, "it came back with its memory");
}

#[test]
fn a_saved_domain_that_is_started_while_it_is_copied_starts_and_its_backup_fails() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    guest.wait_tick(10).unwrap();
    let own = disks(&guest);
    guest.virsh("managedsave", &[]).unwrap();
    let _daemon = host.daemon();
    let job = being_copied(&host, &[]);
    guest.virsh("start", &[]).unwrap();
    guest.wait_more(10).unwrap();
    let row = host.settled(&job);
    assert_eq!(
        (row["status"].as_str(), row["fault"]["code"].as_i64()),
        (Some("rolled_back"), Some(116)),
        "{row:#}"
    );
    assert_untouched(&guest, &own);
    assert!(host.backups().is_empty());
}

#[test]
fn an_encrypted_disk_is_left_out_and_one_whose_data_lie_in_another_file_is_refused_unless_left_out() {
    let host = Host::new();
    let images = host.hypervisor.images();
    let spec =
        GuestSpec::new("odd").disk(DiskSpec::new(8 * MIB).plain()).disk(DiskSpec::new(8 * MIB).plain());
    let guest = Guest::define(&host.hypervisor, &spec).unwrap();
    let own = disks(&guest);
    let xml = guest.virsh("dumpxml", &["--inactive"]).unwrap();
    let place = own["vdb"].to_str().unwrap();
    let secret = "<secret type='passphrase' uuid='0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f'/>";
    let encrypted =
        format!("<source file='{place}'><encryption format='luks'>{secret}</encryption></source>");
    define(&host, &xml.replace(&format!("<source file='{place}'/>"), &encrypted));
    let _daemon = host.daemon();
    host.ok(&["snapshot", "odd"]);
    assert_home(&guest, &own);
    let backup = host.backups().remove(0);
    let shown = host.ok(&["show", backup["id"].as_str().unwrap()]);
    assert!(shown.contains("disk vdb is not in it: it is encrypted by QEMU"), "{shown}");
    refused(&host, &["snapshot", "odd", "--disks", "vdb"], 115, &["encrypted"]);

    define(&host, &xml);
    let (data, size) = (images.join("data.raw"), "8M");
    std::fs::remove_file(&own["vdb"]).unwrap();
    let option = format!("data_file={}", data.display());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, place, size]);
    for file in [&own["vdb"], &data] {
        give(&host, file);
    }
    refused(&host, &["snapshot", "odd"], 114, &["vdb", "external data file"]);
    host.ok(&["snapshot", "odd", "--disks", "vda"]);
    assert_home(&guest, &own);
}

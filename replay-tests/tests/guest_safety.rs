//! Guests that a job holds are set free before anything else happens, whatever state vmkeepd's own store is in; and
//! nobody else's hold is touched.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};
use support::{Host, until};

/// A job that no journal knows: setting a guest free must not need one.
const JOB: &str = "019e0000-0000-7000-8000-0123456789ab";

fn boot(host: &Host, name: &str) -> Guest {
    let guest = Guest::boot(&host.hypervisor, &GuestSpec::new(name).disk(DiskSpec::new(32 * MIB))).unwrap();
    guest.wait_tick(3).unwrap();
    guest
}

/// What a job does right before it suspends a guest, and the suspension.
fn hold(guest: &Guest, store: &str) {
    let marker = format!("<job store='{store}' job='{JOB}' hold='suspended'/>");
    guest
        .virsh("metadata", &["--uri", "urn:vmkeep:job:1", "--key", "vmkeep", "--live", "--set", &marker])
        .unwrap();
    guest.virsh("suspend", &[]).unwrap();
}

fn state(guest: &Guest) -> String {
    guest.state().unwrap().state
}

fn store_of(host: &Host) -> String {
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
    hold(&ours, &store);
    hold(&theirs, "00000000-0000-4000-8000-00000000beef");
    operators.virsh("suspend", &[]).unwrap();

    let _daemon = host.daemon();

    assert_eq!(state(&ours), "running", "{}", host.log());
    ours.wait_more(3).unwrap();
    assert!(!ours.virsh("dumpxml", &[]).unwrap().contains("hold="), "the hold is over");
    assert_eq!(state(&theirs), "paused", "another store's job holds it");
    assert_eq!(state(&operators), "paused", "an operator paused it");
}

#[test]
fn a_store_that_cannot_be_written_does_not_keep_a_guest_paused() {
    let host = Host::new();
    let guest = boot(&host, "held");
    let daemon = host.daemon();
    let store = store_of(&host);
    assert_eq!(daemon.end(), Some(0));
    hold(&guest, &store);
    let folder = host.hypervisor.dir().join("state/vmkeep/store");
    set_mode(&folder, 0o400, 0o500);

    let mut daemon = host.daemon_that_dies(None);

    let status = until("vmkeepd to give up", || daemon.ended());
    assert_eq!(status.code(), Some(77), "{}", host.log());
    assert_eq!(state(&guest), "running", "{}", host.log());
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
    hold(&guest, &store);
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
    until("vmkeepd to be ready", || host.ready().then_some(()));
    assert_eq!(state(&guest), "running", "{}", host.log());

    // Again, while vmkeepd runs: libvirtd is away while a guest is held that no job of this process works on.
    hold(&guest, &store);
    host.hypervisor.restart_libvirtd().unwrap();
    until("the guest to be set free", || (state(&guest) == "running").then_some(()));
    host.ok(&["snapshot", "held", "--disk-only"]);
}

//! A running guest, backed up live and restored, on a real libvirt and QEMU.

use replay_tests::testbed::Guest;

use crate::support::bed::{Bed, judge_backup, manifest_of, small};
use crate::support::{assert_ticks, disks};

#[test]
fn a_running_guest_is_backed_up_live_and_restored_with_its_memory() {
    let bed = Bed::boot(&small("web1"));
    let (host, guest) = (&bed.host, &bed.guest);
    let _daemon = host.daemon();
    guest.wait_tick(10).unwrap();
    let before = guest.last_tick();

    host.ok(&["snapshot", "web1"]);

    let after = guest.last_tick();
    bed.assert_back_home();
    let backups = host.backups();
    assert_eq!(backups.len(), 1);
    assert_eq!(backups[0]["memory"], true);
    assert_eq!(manifest_of(&backups[0])["consistency"], "memory-and-disks");
    let point = judge_backup(host, &backups[0]);
    assert!((before..=after).contains(&point), "{before} <= {point} <= {after}");

    let id = backups[0]["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "web1 copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "web1 copy").unwrap();
    copy.wait_tick(point + 20).unwrap();
    assert_eq!(copy.boot_id(), guest.boot_id(), "the very same boot goes on");
    assert_ne!(copy.uuid(), guest.uuid());
    copy.destroy().unwrap();
    let of_copy = disks(&copy);
    let reports = assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
    assert_eq!(reports[0].boots.len(), 1);
    assert!(reports[0].last >= point + 20);
    bed.assert_back_home();
}

#[test]
fn a_backup_of_the_disks_alone_restores_cold() {
    let bed = Bed::boot(&small("web1"));
    let (host, guest) = (&bed.host, &bed.guest);
    let _daemon = host.daemon();
    guest.wait_tick(10).unwrap();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    assert_eq!(backup["memory"], false);
    assert_eq!(manifest_of(&backup)["consistency"], "crash");
    let point = judge_backup(host, &backup);
    let id = backup["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(point + 5).unwrap();
    assert_ne!(copy.boot_id(), guest.boot_id(), "it booted anew");
}

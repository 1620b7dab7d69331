//! Disks on block devices: raw, beside disks on files in one backup, with their overlays in a folder of their own. On real loop
//! devices, by the guest's own ticks.

use std::path::{Path, PathBuf};

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB, images_equal};
use rustix::process::Signal;

use crate::killed::snapshot_of_killed;
use crate::libvirtd_killed::missed_the_snapshot;
use crate::support::bed::*;
use crate::support::loops::LoopDevice;
use crate::support::mount::Mount;
use crate::support::{Host, assert_home, assert_ticks, assert_untouched, disks, files_below, signal, until};

/// A qcow2 file and a block device with ticks, and a raw file with data.
fn mixed(device: &LoopDevice) -> GuestSpec {
    GuestSpec::new("web1")
        .disk(DiskSpec::new(128 * MIB).data(48 * MIB))
        .disk(DiskSpec::new(32 * MIB).on_device(device.path()).data(4 * MIB))
        .disk(DiskSpec::new(16 * MIB).raw().plain().data(2 * MIB))
}

/// A host with a device, and vmkeepd's configuration with a folder for overlays.
fn host() -> Option<(LoopDevice, PathBuf, Host)> {
    let host = Host::new();
    let device = LoopDevice::new(&host, "volume", 32 * MIB)?;
    let overlays = folder(&host, &host.hypervisor.dir().join("overlays"));
    configure(&host, &format!("[snapshot]\noverlay_dir = {overlays:?}\n"));
    Some((device, overlays, host))
}

const SLOW: [&str; 5] = ["snapshot", "web1", "--disk-only", "--bandwidth", "8M"];

fn assert_empty(overlays: &Path) {
    assert_eq!(files_below(overlays), Vec::<PathBuf>::new(), "left among the overlays");
}

#[test]
fn disks_on_files_and_on_a_block_device_are_in_one_backup_and_come_back_as_files() {
    let Some((device, overlays, host)) = host() else { return };
    let bed = Bed::boot_on(host, None, &mixed(&device));
    let (host, guest) = (&bed.host, &bed.guest);
    let _daemon = host.daemon();
    assert_eq!(bed.own["vdb"], device.path());
    let shown = host.ok(&["domains"]);
    assert!(shown.contains(device.path().to_str().unwrap()) && !shown.contains("overlay_dir"), "{shown}");
    guest.wait_tick(10).unwrap();
    let before = guest.last_tick();

    host.ok(&["snapshot", "web1"]);

    let after = guest.last_tick();
    bed.assert_back_home();
    assert_empty(&overlays);
    let backup = host.backups().remove(0);
    let manifest = manifest_of(&backup);
    assert_eq!(manifest["consistency"], "memory-and-disks");
    assert!(manifest["left_out"].as_array().is_none_or(Vec::is_empty), "{manifest:#}");
    let point = judge_backup(host, &backup);
    assert!((before..=after).contains(&point), "{before} <= {point} <= {after}");
    let copied = std::fs::metadata(image(&backup, "vdb")).unwrap();
    assert_eq!(copied.len(), 32 * MIB);
    assert!(
        std::os::unix::fs::MetadataExt::blocks(&copied) * 512 < 16 * MIB,
        "the copy of the device is not sparse"
    );

    // It goes on from its memory, on files of its own.
    let id = backup["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(point + 10).unwrap();
    assert_eq!(copy.boot_id(), guest.boot_id(), "the very same boot goes on");
    let xml = copy.virsh("dumpxml", &["--inactive"]).unwrap();
    assert!(!xml.contains("type='block'") && !xml.contains("/dev/loop"), "{xml}");
    copy.destroy().unwrap();
    let of_copy = disks(&copy);
    assert!(of_copy.values().all(|file| file.is_file()), "{of_copy:?}");
    assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
    bed.assert_back_home();

    // To the device itself nothing is restored, and nothing is touched.
    let place = device.path().to_str().unwrap();
    refused(
        host,
        &["restore", id, "--in-place", "--cold"],
        115,
        &["DISK_CANNOT_TAKE_PART", "vdb", place, "--disks"],
    );
    bed.assert_back_home();
    let one = ["restore", id, "--in-place", "--cold", "--disks", "vdc"];
    // Memory that is kept aside could not be told from one that the device has left behind.
    refused(host, &[&one[..], &["--save-old"]].concat(), 95, &["MEMORY_UNSAVEABLE", "vdb", "--save-old"]);
    guest.virsh("managedsave", &[]).unwrap();
    refused(host, &one, 95, &["MEMORY_UNSAVEABLE", "vdb", "managedsave-remove"]);
    guest.virsh("start", &[]).unwrap();
    bed.assert_back_home();
    host.ok(&[&one[..], &["--destroy", "--shutdown-time", "0s"]].concat());
    guest.wait_more(3).unwrap();
    let now = disks(guest);
    assert_eq!((&now["vda"], &now["vdb"]), (&bed.own["vda"], &bed.own["vdb"]));
    assert_ne!(now["vdc"], bed.own["vdc"]);
    bed.judge_disks();
    // Nor for a domain that is gone, whose definition would have a file made there.
    guest.virsh("undefine", &[]).unwrap();
    refused(host, &["restore", id, "--in-place", "--cold"], 115, &["DISK_CANNOT_TAKE_PART", "vdb", place]);
}

#[test]
fn a_domain_that_is_off_is_backed_up_from_its_device_byte_for_byte_also_if_somebody_starts_it() {
    let Some((device, overlays, host)) = host() else { return };
    let guest = Guest::boot(&host.hypervisor, &mixed(&device)).unwrap();
    guest.wait_tick(10).unwrap();
    guest.shutdown().unwrap();
    let (own, last) = (disks(&guest), guest.last_tick());
    let _daemon = host.daemon();
    host.ok(&["snapshot", "web1"]);
    assert_home(&guest, &own);
    assert_empty(&overlays);
    let backup = host.backups().remove(0);
    assert!(judge_backup(&host, &backup) >= last);
    for (disk, at) in &own {
        images_equal(&image(&backup, disk), at).unwrap().unwrap_or_else(|why| panic!("{disk}: {why}"));
    }
    std::fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();

    // However long the guest takes to start, it does so on its overlays.
    let job = host.begin(&["snapshot", "web1", "--wait-before", "merge"]);
    host.reached(&job, "step_succeeded", "take");
    guest.start().unwrap();
    guest.wait_more(10).unwrap();
    assert_eq!(files_below(&overlays).len(), 1, "the overlay of the device");
    until("the job to wait for its merge", || {
        host.vmkeep(&["job", "signal", &job, "merge"]).status.success().then_some(())
    });
    assert_eq!(ended(&host, &job), ("succeeded".to_owned(), 0), "{}", host.story(&job));
    assert_untouched(&guest, &own);
    assert_empty(&overlays);
    let backup = backup_of(&host, &job);
    assert_eq!(judge_backup(&host, &backup), last, "the backup is of before the start");
    guest.shutdown().unwrap();
    let printed = guest.last_tick();
    for report in assert_ticks(&own["vda"], &own["vdb"]) {
        assert!(report.last >= printed, "tick {printed} was printed; {report:?}");
    }
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_backup_with_a_block_device_ends_whole() {
    let Some((device, overlays, host)) = host() else { return };
    let bed = Bed::boot_on(host, None, &mixed(&device));
    snapshot_of_killed(&bed, "after", &["snapshot", "web1"]);
    assert_empty(&overlays);
    bed.judge_disks();
}

#[test]
fn a_guest_whose_qemu_is_killed_starts_on_the_overlay_of_its_device_and_loses_nothing() {
    let Some((device, overlays, host)) = host() else { return };
    let bed = Bed::boot_on(host, None, &mixed(&device));
    let (host, guest) = (&bed.host, &bed.guest);
    let _daemon = host.daemon();
    for again in [true, false] {
        let job = in_the_middle(host, &SLOW);
        guest.wait_more(5).unwrap();
        host.hypervisor.kill_qemu("web1").unwrap();
        guest.wait_state("shut off").unwrap();
        if again {
            guest.start().unwrap();
            guest.wait_more(5).unwrap();
        }
        assert_eq!(ended(host, &job), ("succeeded".to_owned(), 0), "{}", host.story(&job));
        if !again {
            assert_home(guest, &bed.own);
            guest.start().unwrap();
            guest.wait_more(5).unwrap();
        }
        bed.assert_back_home();
        assert_empty(&overlays);
        judge_backup(host, &backup_of(host, &job));
    }
    bed.judge_disks();
}

/// libvirt believes that the disks are on their bases, the device among them: they are committed through QEMU's monitor.
#[test]
fn a_libvirtd_that_missed_the_snapshot_of_a_device_is_healed_through_the_monitor() {
    let Some((device, overlays, host)) = host() else { return };
    missed_the_snapshot(&Bed::boot_on(host, None, &mixed(&device)));
    assert!(!overlays.exists() || files_below(&overlays).is_empty());
}

/// By whatever name the definition calls the device, and whether or not QEMU calls it by another.
#[test]
fn a_device_is_the_same_under_every_name() {
    let Some((device, overlays, host)) = host() else { return };
    let name = host.hypervisor.images().join("volume by another name");
    std::os::unix::fs::symlink(device.path(), &name).unwrap();
    let bed = Bed::boot_on(host, None, &mixed(&device));
    let (host, guest) = (&bed.host, &bed.guest);
    let renamed = guest.virsh("dumpxml", &["--inactive"]).unwrap();
    let renamed =
        renamed.replace(&format!("dev='{}'", device.path().display()), &format!("dev='{}'", name.display()));
    define(host, &renamed);
    let defined = disks(guest);
    assert_eq!(defined["vdb"], name);
    let _daemon = host.daemon();
    host.ok(&["snapshot", "web1"]);
    judge_backup(host, &host.backups().remove(0));
    assert_eq!(disks(guest), defined, "the definition is what it was");
    assert_eq!(host.hypervisor.disk_files_in_live_xml("web1").unwrap(), bed.own);
    assert_empty(&overlays);
    // Off, started by its other name, killed, and led home.
    guest.shutdown().unwrap();
    guest.start().unwrap();
    guest.wait_more(3).unwrap();
    let job = in_the_middle(host, &SLOW);
    host.hypervisor.kill_qemu("web1").unwrap();
    guest.wait_state("shut off").unwrap();
    assert_eq!(ended(host, &job), ("succeeded".to_owned(), 0), "{}", host.story(&job));
    assert_home(guest, &defined);
    assert_empty(&overlays);
    let printed = guest.last_tick();
    for report in assert_ticks(&bed.own["vda"], &bed.own["vdb"]) {
        assert!(report.last + 1 >= printed, "tick {printed} was printed; {report:?}");
    }
}

#[test]
fn without_a_place_for_its_overlay_a_device_is_left_out_by_name_and_what_would_need_its_age_is_refused() {
    let host = Host::new();
    let Some(device) = LoopDevice::new(&host, "volume", 32 * MIB) else { return };
    let bed = Bed::boot_on(host, None, &mixed(&device));
    let host = &bed.host;
    let place = device.path().to_str().unwrap();
    let daemon = host.daemon();
    let asked = ["snapshot", "web1", "--disks", "vdb"];
    bed.refused(&asked, 115, &["DISK_CANNOT_TAKE_PART", "vdb", place, "overlay_dir", "[snapshot]"]);
    let shown = host.ok(&["domains"]);
    assert!(shown.contains("overlay_dir"), "{shown}");
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    let shown = host.ok(&["show", backup["id"].as_str().unwrap()]);
    assert!(shown.contains("disk vdb is not in it: it is the block device"), "{shown}");
    std::fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
    daemon.end();

    for (unfit, why) in [("/dev", "lives in memory"), ("/nothing/there", "cannot be used")] {
        configure(host, &format!("[snapshot]\noverlay_dir = {unfit:?}\n"));
        let daemon = host.daemon();
        refused(
            host,
            &["snapshot", "web1"],
            115,
            &["DISK_CANNOT_TAKE_PART", "vdb", unfit, why, "overlay_dir"],
        );
        bed.assert_back_home();
        let examined = host.vmkeep(&["doctor"]);
        assert!(String::from_utf8_lossy(&examined.stdout).contains(why), "{examined:?}");
        daemon.end();
    }

    let overlays = folder(host, &host.hypervisor.dir().join("overlays"));
    configure(host, &format!("[snapshot]\noverlay_dir = {overlays:?}\n"));
    let _daemon = host.daemon();
    refused(host, &["snapshot", "web1", "--save"], 95, &["MEMORY_UNSAVEABLE", "vdb", "--disks"]);
    bed.assert_back_home();
    bed.guest.virsh("managedsave", &[]).unwrap();
    refused(host, &["snapshot", "web1"], 86, &["DOMAIN_NOT_RUNNING", "vdb", "virsh start"]);
    assert_empty(&overlays);
    // With its memory: it goes on, and does not boot.
    bed.guest.virsh("start", &[]).unwrap();
    bed.assert_back_home();
}

/// Only where the overlay of a device grows can room run short; the device has all of its own.
#[test]
fn a_copy_is_given_up_when_the_folder_of_overlays_fills_up() {
    let host = Host::new();
    let Some(device) = LoopDevice::new(&host, "volume", 64 * MIB) else { return };
    let Some(mount) = Mount::on_disk(&host, "overlays", 700) else { return };
    configure(&host, &format!("[snapshot]\noverlay_dir = {:?}\n", mount.0));
    let spec = GuestSpec::new("web1")
        .disk(DiskSpec::new(64 * MIB).on_device(device.path()).data(48 * MIB))
        .disk(DiskSpec::new(32 * MIB).raw().data(4 * MIB));
    let bed = Bed::boot_on(host, Some(mount), &spec);
    let (host, mount) = (&bed.host, bed.mount());
    let daemon = host.daemon();
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "4M"];

    let job = in_the_middle(host, &slow);
    mount.fill(20 * MIB);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 102), "{}", host.story(&job));
    // Too little to begin with.
    refused(host, &slow, 47, &["NOT_ENOUGH_DISK_SPACE", mount.0.to_str().unwrap()]);
    mount.clear();
    bed.assert_back_home();
    assert_empty(&mount.0);

    let job = in_the_middle(host, &slow);
    // Else the guest might be home before the last byte is taken.
    signal(daemon.pid(), Signal::STOP);
    mount.fill(0);
    bed.guest.wait_state("paused").unwrap();
    signal(daemon.pid(), Signal::CONT);
    // With room again before anybody has looked, guest and copy would both go on.
    host.reached(&job, "step_failed", "");
    mount.clear();
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 102), "{}", host.story(&job));
    bed.assert_back_home();
    assert_empty(&mount.0);
    assert!(host.backups().is_empty());
    bed.judge_disks();
}

/// Whoever writes to a device while it is copied makes the backup fail: nothing else could tell.
#[test]
fn a_device_that_somebody_writes_to_while_it_is_copied_makes_the_backup_fail_and_nothing_else() {
    let Some((device, overlays, host)) = host() else { return };
    let bed = Bed::boot_on(host, None, &mixed(&device));
    let host = &bed.host;
    let daemon = host.daemon();
    let job = in_the_middle(host, &SLOW);
    signal(daemon.pid(), Signal::STOP);
    let open = std::fs::File::options().write(true).open(device.path()).unwrap();
    // Where neither ticks nor data lie.
    std::os::unix::fs::FileExt::write_all_at(&open, &[0; 512], 32 * MIB - 512).unwrap();
    drop(open);
    signal(daemon.pid(), Signal::CONT);
    until("the job to end", || host.job(&job)["ended"].is_string().then_some(()));
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 116), "{}", host.story(&job));
    bed.assert_back_home();
    assert_empty(&overlays);
    assert!(host.backups().is_empty());
}

//! Too little room: refused before anything is touched, and survived when it happens in the middle.

use std::fs;
use std::path::PathBuf;

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};
use rustix::process::Signal;

use crate::support::bed::*;
use crate::support::mount::Mount;
use crate::support::{Host, files_below, signal};

#[test]
fn too_little_room_is_refused_before_anything_is_touched() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "small", 16) else { return };
    configure(&host, &root_is(&mount.0));
    let bed = Bed::boot_on(host, Some(mount), &small("web1"));
    let mount = bed.mount();
    let _daemon = bed.host.daemon();
    for mode in ["--live", "--disk-only", "--dry-run"] {
        let words = &["NOT_ENOUGH_DISK_SPACE", "are needed", "are free", mount.0.to_str().unwrap()];
        refused(&bed.host, &["snapshot", "web1", mode], 47, words);
        bed.assert_nothing_changed();
    }
    assert_eq!(fs::read_dir(&mount.0).unwrap().count(), 0);
    // A memory limit that cannot do is named as such.
    let strict = ["snapshot", "web1", "--memory-limit", "1M", "--on-busy-memory", "fail"];
    refused(&bed.host, &strict, 96, &["MEMORY_TOO_LARGE", "web1", "--on-busy-memory"]);
    bed.assert_nothing_changed();
}

#[test]
fn memory_that_is_too_large_beforehand_is_left_out_if_that_was_chosen() {
    let host = Host::new();
    // Room for the disks, and not for the memory.
    let Some(mount) = Mount::new(&host, "small", 150) else { return };
    let default = default_root(&host);
    configure(&host, &format!("[targets]\nroots = [{default:?}, {:?}]\n", mount.0));
    let bed = Bed::boot_on(host, Some(mount), &small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let to = bed.mount().0.to_str().unwrap();
    let (limit, place) = (["--memory-limit", "1M"], ["--to", to]);
    for (case, why) in [(limit, "the image may have 1.0 MiB"), (place, "there is no room for it")] {
        for choice in ["pause", "fail"] {
            let code = if case == limit { 96 } else { 47 };
            let args = ["snapshot", "web1", case[0], case[1], "--on-busy-memory", choice];
            host.fails(&args, code, &["remedy "]);
            bed.assert_nothing_changed();
        }
        let args = ["snapshot", "web1", case[0], case[1]];
        let plan = host.ok(&[&args[..], &["--dry-run"]].concat());
        assert!(plan.contains("its memory left out") && plan.contains(why), "{plan}");
        let job = host.begin(&args);
        assert_eq!(ended(host, &job), ("succeeded".to_owned(), 0), "{}", host.ok(&["job", "explain", &job]));
        let said = host.ok(&["job", "explain", &job]);
        assert!(said.contains("Only the disks were taken") && said.contains(why), "{said}");
        bed.assert_back_home();
        let backup = backup_of(host, &job);
        let manifest = manifest_of(&backup);
        assert_eq!(manifest["consistency"], "crash");
        assert!(manifest["memory"]["none"]["reason"].as_str().unwrap().contains(why), "{manifest:#}");
        assert!(manifest["warnings"].to_string().contains(why), "{manifest:#}");
        judge_backup(host, &backup);
    }
}

#[test]
fn a_target_that_fills_up_in_the_middle_is_survived() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "small", 256) else { return };
    configure(&host, &root_is(&mount.0));
    let bed = Bed::boot_on(host, Some(mount), &large("web1"));
    let (host, mount) = (&bed.host, bed.mount());
    let _daemon = host.daemon();
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "8M"]);
    mount.fill(0);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 47), "{}", host.ok(&["job", "explain", &job]));
    bed.assert_back_home();
    mount.clear();
    assert_eq!(files_below(&mount.0), Vec::<PathBuf>::new(), "left on the target");
    assert!(host.backups().is_empty());
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    judge_backup(host, &host.backups()[0]);
}

#[test]
fn a_copy_is_given_up_when_the_guests_own_file_system_fills_up() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "guests", 700) else { return };
    let spec = GuestSpec::new("web1")
        .disk(DiskSpec::new(128 * MIB).data(48 * MIB).at(&mount.0.join("a.qcow2")))
        .disk(DiskSpec::new(32 * MIB).raw().at(&mount.0.join("b.raw")));
    let bed = Bed::boot_on(host, Some(mount), &spec);
    let (host, mount) = (&bed.host, bed.mount());
    let daemon = host.daemon();
    let before = files_below(&mount.0);
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "4M"];

    // Low: the copy is given up while there is still room to bring the overlays home.
    let job = in_the_middle(host, &slow);
    mount.fill(100 * MIB);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 102), "{}", host.ok(&["job", "explain", &job]));
    assert_eq!(host.job(&job)["fault"]["name"], "OVERLAYS_OUTGREW_SPACE");
    mount.clear();
    bed.assert_back_home();
    assert_eq!(files_below(&mount.0), before);

    // Full: QEMU stops the guest, before vmkeepd can see it coming. It comes back by itself once there is room.
    let job = in_the_middle(host, &slow);
    signal(daemon.pid(), Signal::STOP);
    mount.fill(0);
    bed.guest.wait_state("paused").unwrap();
    signal(daemon.pid(), Signal::CONT);
    mount.clear();
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 102), "{}", host.ok(&["job", "explain", &job]));
    bed.assert_back_home();
    assert_eq!(files_below(&mount.0), before);
    assert!(host.backups().is_empty());
}

//! The system's libvirt: vmkeepd and libvirtd as root, QEMU as somebody else.
//!
//! There QEMU reaches only what libvirt hands to it: images change hands when a domain starts and when it ends, and
//! overlays, backups and restored files must have an owner and a mode with which all of that works, and no more.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use replay_tests::testbed::{Guest, GuestSpec, Hypervisor, Options};

use crate::support::bed::{Bed, judge_backup, small};
use crate::support::{Host, assert_ticks, disks, files_below};

/// Owner, group and mode.
fn rights(path: &Path) -> (u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777)
}

/// libvirt's notes about the owner before it took a file over, which belong to one file on one host.
fn libvirts_notes(path: &Path) -> Vec<String> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::listxattr(path, &mut names).unwrap();
    names[..length]
        .split(|byte| *byte == 0)
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .filter(|name| name.contains("libvirt"))
        .collect()
}

fn system(spec: &GuestSpec) -> Bed {
    assert!(rustix::process::geteuid().is_root(), "the system's libvirt runs as root");
    let options = Options { system: true, ..Options::default() };
    let host = Host::on(Hypervisor::start_temp_with(&options).expect("a test hypervisor"));
    Bed::boot_on(host, None, spec)
}

#[test]
fn on_the_systems_libvirt_images_keep_their_owners_and_backups_are_roots_alone() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can run the system's libvirt");
        return;
    }
    let bed = system(&small("web1"));
    let (host, guest) = (&bed.host, &bed.guest);
    let qemu_user = host.hypervisor.user().uid;
    // Owners as an administrator, or the tool that made the machine, may have left them.
    guest.destroy().unwrap();
    let [vda, vdb] = ["vda", "vdb"].map(|disk| bed.own[disk].clone());
    chown(&vda, Some(12_345), Some(12_346)).unwrap();
    fs::set_permissions(&vda, fs::Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(&vdb, fs::Permissions::from_mode(0o600)).unwrap();
    let at_rest = [rights(&vda), rights(&vdb)];
    assert_eq!(at_rest, [(12_345, 12_346, 0o640), (0, 0, 0o600)]);
    guest.start().unwrap();
    let qemu = host.hypervisor.qemu("web1").unwrap();
    assert_eq!(fs::metadata(format!("/proc/{}", qemu.id.pid)).unwrap().uid(), qemu_user, "QEMU's user");
    let in_use = [rights(&vda), rights(&vdb)];
    assert_eq!(in_use.map(|(owner, ..)| owner), [qemu_user; 2], "libvirt hands images to QEMU");

    let _daemon = host.daemon();
    guest.wait_more(10).unwrap();
    host.ok(&["snapshot", "web1"]);
    bed.assert_back_home();
    assert_eq!([rights(&vda), rights(&vdb)], in_use, "the guest runs on: its images are QEMU's");
    let backup = host.backups().remove(0);
    assert_eq!(backup["memory"], true);
    let point = judge_backup(host, &backup);
    let folder = backup["folder"].as_str().unwrap();
    for path in files_below(Path::new(folder)) {
        assert_eq!(rights(&path), (0, 0, 0o600), "{}", path.display());
        assert_eq!(libvirts_notes(&path), Vec::<String>::new(), "{}", path.display());
    }

    // A copy runs, under the same user. At rest it is root's alone: a number of another host's user means nothing here.
    let id = backup["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(point + 20).unwrap();
    assert_eq!(copy.boot_id(), guest.boot_id(), "the very same boot goes on");
    copy.destroy().unwrap();
    let of_copy = disks(&copy);
    assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
    assert_eq!(["vda", "vdb"].map(|disk| rights(&of_copy[disk])), [(0, 0, 0o600); 2], "the copy at rest");

    // The domain starts, runs and stops afterwards as before, and its images go back to whom they belong.
    guest.destroy().unwrap();
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "the original at rest");
    assert_eq!([libvirts_notes(&vda), libvirts_notes(&vdb)], [Vec::<String>::new(), Vec::new()]);
    guest.start().unwrap();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    guest.destroy().unwrap();
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "at rest after a second backup");
}

//! The system's libvirt: vmkeepd and libvirtd as root, QEMU as somebody else.
//!
//! There QEMU reaches only what libvirt hands to it: images change hands when a domain starts and when it ends, and
//! overlays, backups and restored files must have an owner and a mode with which all of that works, and no more.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, Hypervisor, MIB, Options};
use serde_json::Value;

use crate::sealed::{own_folder, sealed};
use crate::support::bed::{Bed, configure, ended, in_the_middle, judge_backup, small};
use crate::support::{Host, assert_home, assert_ticks, disks, files_below, until};

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

/// Access control list, label and whatever else hangs on a file, but libvirt's own notes.
fn attributes(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::listxattr(path, &mut names).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let names = names.map(|name| String::from_utf8_lossy(name).into_owned());
    let value = |name: &String| {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::getxattr(path, name.as_str(), &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    names.filter(|name| !name.contains("libvirt")).map(|name| (name.clone(), value(&name))).collect()
}

/// Lets user 4242 read and write, and gives the file a label, as SELinux would.
fn decorate(path: &Path) {
    let mut list = vec![2, 0, 0, 0];
    for (tag, rights, id) in
        [(1_u16, 6_u16, u32::MAX), (2, 6, 4242), (4, 4, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
    {
        list.extend(tag.to_le_bytes().into_iter().chain(rights.to_le_bytes()).chain(id.to_le_bytes()));
    }
    for (name, value) in [
        ("system.posix_acl_access", list.as_slice()),
        ("security.selinux", b"system_u:object_r:virt_image_t:s0\0"),
    ] {
        rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
}

fn host() -> Option<Host> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can run the system's libvirt");
        return None;
    }
    let options = Options { system: true, ..Options::default() };
    Some(Host::on(Hypervisor::start_temp_with(&options).expect("a test hypervisor")))
}

#[test]
fn on_the_systems_libvirt_images_keep_their_owners_and_backups_are_roots_alone() {
    let Some(host) = host() else { return };
    let bed = Bed::boot_on(host, None, &small("web1"));
    let (host, guest) = (&bed.host, &bed.guest);
    let qemu_user = host.hypervisor.user().uid;
    // Owners as an administrator, or the tool that made the machine, may have left them.
    guest.destroy().unwrap();
    let [vda, vdb] = ["vda", "vdb"].map(|disk| bed.own[disk].clone());
    chown(&vda, Some(12_345), Some(12_346)).unwrap();
    fs::set_permissions(&vdb, fs::Permissions::from_mode(0o600)).unwrap();
    decorate(&vda);
    fs::set_permissions(&vda, fs::Permissions::from_mode(0o660)).unwrap();
    let decorated = [attributes(&vda), attributes(&vdb)];
    assert_eq!(decorated[0].len(), 2, "{decorated:?}");
    let at_rest = [rights(&vda), rights(&vdb)];
    assert_eq!(at_rest, [(12_345, 12_346, 0o660), (0, 0, 0o600)]);
    guest.start().unwrap();
    let qemu = host.hypervisor.qemu("web1").unwrap();
    assert_eq!(fs::metadata(format!("/proc/{}", qemu.id.pid)).unwrap().uid(), qemu_user, "QEMU's user");
    let in_use = [rights(&vda), rights(&vdb)];
    assert_eq!(in_use.map(|(owner, ..)| owner), [qemu_user; 2], "libvirt hands images to QEMU");

    let daemon = host.daemon();
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
        assert_eq!(attributes(&path), BTreeMap::new(), "{}", path.display());
    }

    // A copy runs, under the same user. At rest it is whose the original is at rest; lists and labels stay behind.
    let id = backup["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "copy", "--start"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(point + 20).unwrap();
    assert_eq!(copy.boot_id(), guest.boot_id(), "the very same boot goes on");
    copy.destroy().unwrap();
    let of_copy = disks(&copy);
    assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
    assert_eq!(["vda", "vdb"].map(|disk| rights(&of_copy[disk])), at_rest, "the copy at rest");
    assert_eq!(["vda", "vdb"].map(|disk| attributes(&of_copy[disk])), [BTreeMap::new(), BTreeMap::new()]);
    assert_eq!(rights(of_copy["vda"].parent().unwrap()), (0, 0, 0o711), "its folder");

    // The domain starts, runs and stops afterwards as before, and its images go back to whom they belong.
    guest.destroy().unwrap();
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "the original at rest");
    assert_eq!([libvirts_notes(&vda), libvirts_notes(&vdb)], [Vec::<String>::new(), Vec::new()]);
    guest.start().unwrap();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    guest.destroy().unwrap();
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "at rest after a second backup");
    guest.start().unwrap();
    host.ok(&["snapshot", "web1", "--save"]);
    bed.assert_back_home();
    guest.destroy().unwrap();
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "at rest after it was saved");
    assert_eq!([attributes(&vda), attributes(&vdb)], decorated, "lists and labels stay");
    guest.start().unwrap();
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "1M"]);
    guest.destroy().unwrap();
    assert_eq!(ended(host, &job).0, "succeeded");
    assert_home(guest, &bed.own);
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "at rest after it ended on its overlays");
    host.ok(&["snapshot", "web1"]);
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "at rest after a backup at rest");

    // In place: the images that come are whose those were, the ones that go stay whose they are.
    host.ok(&["restore", id, "--in-place", "--cold"]);
    let now = disks(guest);
    assert_ne!([&now["vda"], &now["vdb"]], [&vda, &vdb]);
    assert_eq!(["vda", "vdb"].map(|disk| rights(&now[disk])), at_rest, "in place, at rest");
    assert_eq!([rights(&vda), rights(&vdb)], at_rest, "kept aside");
    guest.start().unwrap();
    guest.destroy().unwrap();
    assert_eq!(["vda", "vdb"].map(|disk| rights(&now[disk])), at_rest, "in place, at rest after it ran");

    // As configured.
    daemon.end();
    let configured = "[restore]\nowner = 12399\ngroup = 12398\nmode = \"0664\"\ndirectory_mode = \"0751\"\n";
    configure(host, configured);
    let file = host.hypervisor.dir().join("config/vmkeep/vmkeep.toml");
    let _daemon = host.daemon_with(&[("VMKEEP_CONFIG", file.to_str().unwrap())]);
    host.until_ready();
    host.ok(&["restore", id, "--as", "configured", "--cold", "--start"]);
    let configured = Guest::attach(&host.hypervisor, "configured").unwrap();
    let of_it = disks(&configured);
    configured.destroy().unwrap();
    assert_eq!(["vda", "vdb"].map(|disk| rights(&of_it[disk])), [(12_399, 12_398, 0o664); 2]);
    assert_eq!(rights(of_it["vda"].parent().unwrap()), (12_399, 12_398, 0o751));
}

/// What the doctor says of QEMU's files.
fn doctor(host: &Host) -> Vec<(String, String, String)> {
    let output = host.vmkeep(&["--json", "doctor"]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let of_qemu = findings.iter().filter(|finding| finding["topic"] == "QEMU's files");
    of_qemu.map(|finding| (text(finding, "grade"), text(finding, "text"), text(finding, "remedy"))).collect()
}

#[test]
fn the_doctor_tries_each_kind_of_file_as_qemus_user_and_says_what_is_missing() {
    let Some(host) = host() else { return };
    let spec = GuestSpec::new("web1").disk(DiskSpec::new(16 * MIB).plain());
    let guest = Guest::define(&host.hypervisor, &spec).unwrap();
    let _daemon = host.daemon();
    let images = disks(&guest)["vda"].parent().unwrap().to_owned();
    let before = files_below(host.hypervisor.dir());
    let found = doctor(&host);
    let user = &host.hypervisor.user().name;
    assert_eq!(found.len(), 3, "{found:#?}");
    for (what, at) in
        [("overlays", images.as_path()), ("restored images", &host.restored()), ("states", Path::new(""))]
    {
        let of = |(grade, text, _): &&(String, String, String)| {
            grade == "good"
                && text.contains(user)
                && text.contains(what)
                && text.contains(at.to_str().unwrap())
        };
        assert!(found.iter().any(|finding| of(&finding)), "{what} in {}: {found:#?}", at.display());
    }
    // A folder on the way that QEMU's user cannot pass: named, with the mend.
    fs::set_permissions(&images, fs::Permissions::from_mode(0o700)).unwrap();
    let found = doctor(&host);
    let (_, text, remedy) =
        found.iter().find(|(grade, ..)| grade == "bad").unwrap_or_else(|| panic!("{found:#?}"));
    assert!(text.contains(user) && text.contains("overlays") && text.contains("cannot pass"), "{text}");
    assert!(remedy.contains("setfacl") && remedy.contains(images.to_str().unwrap()), "{remedy}");
    assert_eq!(found.iter().filter(|(grade, ..)| grade == "bad").count(), 1, "{found:#?}");
    assert_eq!(host.vmkeep(&["doctor"]).status.code(), Some(1));
    fs::set_permissions(&images, fs::Permissions::from_mode(0o755)).unwrap();
    // What vmkeepd writes of itself, and libvirt of what QEMU can do.
    let others = |path: &PathBuf| {
        ["/store/", "/cache/"].iter().any(|part| path.to_string_lossy().contains(part))
            || path.ends_with("vmkeepd.log")
    };
    let left =
        files_below(host.hypervisor.dir()).into_iter().filter(|path| !before.contains(path) && !others(path));
    assert_eq!(left.collect::<Vec<_>>(), Vec::<PathBuf>::new(), "left by the doctor");
}

#[test]
fn on_the_systems_libvirt_firmware_variables_and_a_tpms_state_belong_to_whom_they_did() {
    let Some(host) = host() else { return };
    let (guest, variables, state) = sealed(&host);
    let template = fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").unwrap();
    until("the firmware to write its variables", || {
        (fs::read(&variables).unwrap() != template).then_some(())
    });
    until("the TPM to have a state", || state.exists().then_some(()));
    let qemu = host.hypervisor.user().uid;
    let of_swtpm = rights(&state);
    assert!(![0, qemu].contains(&of_swtpm.0), "swtpm runs as a user of its own: {of_swtpm:?}");
    assert_eq!(rights(&variables).0, qemu);
    let _daemon = host.daemon();
    host.ok(&["snapshot", "sealed"]);
    guest.destroy().unwrap();
    let at_rest = rights(&variables);
    let backup = host.backups().remove(0);
    for path in files_below(Path::new(backup["folder"].as_str().unwrap())) {
        assert_eq!(rights(&path), (0, 0, 0o600), "{}", path.display());
    }

    let id = backup["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "copy"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    let own = host.restored().join("copy/copy_VARS.fd");
    let of_copy = own_folder(&host, "swtpm").join(copy.uuid()).join("tpm2/tpm2-00.permall");
    copy.virsh("resume", &[]).unwrap();
    assert_eq!(rights(&own).0, qemu, "QEMU has its variables");
    assert_eq!(rights(&of_copy), of_swtpm, "swtpm has its state");
    copy.destroy().unwrap();
    assert_eq!(rights(&own), at_rest, "the copy's variables at rest");

    // In place, and back.
    host.ok(&["restore", id, "--in-place", "--cold", "--start"]);
    assert_eq!(rights(&state), of_swtpm);
    let xml = guest.virsh("dumpxml", &[]).unwrap();
    assert!(!xml.contains(">/var/lib/libvirt/qemu/nvram/sealed_VARS.fd<"), "{xml}");
    guest.destroy().unwrap();
    assert_eq!(rights(&variables), at_rest, "kept aside");
    let job = host.jobs()[0]["id"].as_str().unwrap().to_owned();
    host.ok(&["restore", "--undo", &job, "--start"]);
    assert_eq!((rights(&variables).0, rights(&state)), (qemu, of_swtpm));
    guest.destroy().unwrap();
    assert_eq!(rights(&variables), at_rest, "back");
}

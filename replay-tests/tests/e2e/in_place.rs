//! A backup takes the place of the running domain that it is of, with memory and cold, whole and in part; what was there
//! is kept aside, brought back, and discarded. Whatever fails before the new guest's first instruction leaves the old
//! one as it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use replay_tests::testbed::{DiskSpec, Format, Guest, GuestSpec, MIB, TickLine, images_equal};
use serde_json::Value;

use crate::support::bed::{Bed, assert_same, definitions, image, judge_backup, small};
use crate::support::mount::Mount;
use crate::support::{Daemon, Host, assert_ticks, disks, files_below, until};

/// A host with a running guest and a backup of it that is well behind it.
struct Scene {
    bed: Bed,
    backup: Value,
    id: String,
    /// The last tick in the backup.
    point: u64,
}

impl Scene {
    fn new(spec: &GuestSpec, args: &[&str]) -> (Self, Daemon) {
        Self::on(Bed::boot(spec), args)
    }

    fn on(bed: Bed, args: &[&str]) -> (Self, Daemon) {
        let daemon = bed.host.daemon();
        let mut all = vec!["snapshot", bed.guest.name()];
        all.extend(args);
        bed.host.ok(&all);
        let backup = bed.host.backups().remove(0);
        let point = judge_backup(&bed.host, &backup);
        bed.guest.wait_tick(point + 60).unwrap();
        let id = backup["id"].as_str().unwrap().to_owned();
        (Self { bed, backup, id, point }, daemon)
    }

    fn host(&self) -> &Host {
        &self.bed.host
    }

    fn guest(&self) -> &Guest {
        &self.bed.guest
    }

    fn restore(&self, more: &[&str]) -> String {
        let mut args = vec!["restore", &self.id, "--in-place"];
        args.extend(more);
        self.done(&args)
    }

    /// Runs a command to the good end of its job.
    fn done(&self, args: &[&str]) -> String {
        let job = self.host().begin(args);
        let row = self.host().settled(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}\n{}", self.host().log());
        self.host().ok(&["replay", &job]);
        job
    }

    fn failed(&self, args: &[&str]) -> u64 {
        let job = self.host().begin(args);
        let row = self.host().settled(&job);
        assert_eq!(row["status"], "rolled_back", "{row:#}\n{}", self.host().log());
        self.host().ok(&["replay", &job]);
        row["fault"]["code"].as_u64().unwrap()
    }

    /// QEMU, live and persistent agree on the guest's disks, none of which is an old one.
    fn new_disks(&self) -> BTreeMap<String, PathBuf> {
        let now = disks(self.guest());
        assert!(now.iter().all(|(disk, path)| self.bed.own[disk] != *path), "{now:?}");
        let hypervisor = &self.host().hypervisor;
        let qemu = hypervisor.disk_files_in_qemu(self.guest().uuid()).unwrap();
        let qemu: BTreeMap<_, _> = qemu.into_iter().map(|(disk, at)| (disk, at.file)).collect();
        assert_eq!(qemu, now, "the files that QEMU writes to");
        assert_eq!(hypervisor.disk_files_in_live_xml(self.guest().uuid()).unwrap(), now);
        self.unmarked();
        now
    }

    fn unmarked(&self) {
        for flags in [&[][..], &["--inactive"]] {
            let xml = self.guest().virsh("dumpxml", flags).unwrap();
            assert!(!xml.contains("<vmkeep:"), "a marker is left: {xml}");
        }
    }

    fn kept(&self) -> Vec<Value> {
        self.host().json(&["status"])["kept"].as_array().unwrap().clone()
    }

    /// The persistent definition to the last byte.
    fn old_definition(&self) {
        assert_same("the persistent definition", &definitions(self.guest()).1, &self.bed.definitions.1);
    }

    fn state(&self) -> String {
        self.guest().state().unwrap().state
    }

    fn nothing_kept(&self) {
        assert_eq!(self.kept(), Vec::<Value>::new());
        let left = files_below(&self.host().restored().join("kept"));
        assert_eq!(left, Vec::<PathBuf>::new(), "left of what was kept");
        assert_eq!(files_below(&self.host().hypervisor.images()), self.bed.images, "files beside the images");
    }
}

fn ticks(disks: &BTreeMap<String, PathBuf>) -> u64 {
    let reports = assert_ticks(&disks["vda"], &disks["vdb"]);
    assert!(reports.iter().all(|report| report.is_whole()));
    reports[0].last
}

/// The guest goes on right after a point in time, from wherever it was.
fn went_back(guest: &Guest, point: u64) {
    guest.wait_more(5).unwrap();
    let all = guest.console().ticks();
    // A tick may be on both disks and not printed yet when its guest is stopped. Another boot in between may have come
    // to just this number.
    let went_on = |pair: &[TickLine]| pair[1].number == pair[0].number + 1 && pair[1].boot == pair[0].boot;
    let back = all.windows(2).any(|pair| (point..=point + 1).contains(&pair[1].number) && !went_on(pair));
    assert!(back, "it did not go on at {}: {:?}", point + 1, &all[all.len().saturating_sub(9)..]);
}

#[test]
fn a_backup_with_memory_takes_the_running_originals_place_and_everything_can_be_undone() {
    let (scene, _daemon) = Scene::new(&small("web1"), &[]);
    let boot = scene.guest().boot_id();

    let job = scene.restore(&[]);
    went_back(scene.guest(), scene.point);
    assert_eq!(scene.guest().boot_id(), boot, "it goes on from its memory: the very same boot");
    let new = scene.new_disks();
    let old = ticks(&scene.bed.own);
    assert!(old >= scene.point + 60, "the old images hold everything up to the shutdown: {old}");
    let kept = scene.kept();
    assert_eq!((kept.len(), kept[0]["job"].as_str()), (1, Some(job.as_str())), "{kept:#?}");
    assert!(kept[0]["bytes"].as_u64().unwrap() > MIB);
    let said = scene.host().ok(&["status"]);
    assert!(said.contains("restore --undo") && said.contains("restore --discard"), "{said}");
    let said = scene.host().ok(&["show", &job]);
    assert!(
        said.contains("web1") && scene.bed.own.values().all(|path| said.contains(path.to_str().unwrap())),
        "{said}"
    );
    scene.guest().wait_tick(scene.point + 10).unwrap();

    let undo = scene.done(&["restore", "--undo", &job[24..]]);
    until("the old machine to boot: it was shut down", || (scene.guest().boot_id() != boot).then_some(()));
    scene.guest().wait_tick(old + 1).unwrap();
    scene.old_definition();
    assert_eq!(disks(scene.guest()), scene.bed.own);
    assert!(ticks(&new) >= scene.point + 10, "what was there meanwhile is kept in turn");
    let kept = scene.kept();
    assert_eq!((kept.len(), kept[0]["job"].as_str()), (1, Some(undo.as_str())), "{kept:#?}");

    scene.host().ok(&["restore", "--discard", &undo, "--dry-run"]);
    assert!(new["vda"].exists());
    scene.done(&["restore", "--discard", &undo]);
    scene.nothing_kept();
    scene.guest().wait_more(3).unwrap();
    scene.host().fails(&["restore", "--undo", &undo], 43, &["remedy "]);
    scene.host().fails(&["restore", "--discard", &undo], 43, &["remedy "]);
}

#[test]
fn memory_that_was_saved_with_the_old_machine_comes_back_with_it() {
    let (scene, _daemon) = Scene::new(&small("web1"), &["--disk-only"]);
    let boot = scene.guest().boot_id();
    let job = scene.restore(&["--save-old"]);
    until("the restored guest to boot", || (scene.guest().boot_id() != boot).then_some(()));
    scene.new_disks();
    let old = ticks(&scene.bed.own);
    assert!(scene.kept()[0]["memory"].as_bool().unwrap());

    let undo = scene.done(&["restore", "--undo", &job, "--destroy", "--shutdown-time", "1s"]);
    went_back(scene.guest(), old);
    assert_eq!(scene.guest().boot_id(), boot, "it goes on from its memory");
    scene.old_definition();
    scene.done(&["restore", "--discard", &undo]);
    scene.nothing_kept();
}

#[test]
fn a_single_disk_of_a_domain_that_is_off_is_restored_and_brought_back() {
    let spec = small("web1").disk(DiskSpec::new(16 * MIB).raw().plain().data(MIB));
    let (scene, _daemon) = Scene::new(&spec, &[]);
    scene.host().fails(&["restore", &scene.id, "--in-place", "--disks", "vda"], 64, &["--cold"]);
    scene.host().fails(&["restore", &scene.id, "--in-place", "--disks", "vdx", "--cold"], 92, &["vda"]);
    scene.guest().shutdown().unwrap();
    let job = scene.restore(&["--disks", "vda", "--cold"]);
    assert_eq!(scene.state(), "shut off", "it was off, and stays so");
    let now = disks(scene.guest());
    assert_eq!((&now["vdb"], &now["vdc"]), (&scene.bed.own["vdb"], &scene.bed.own["vdc"]));
    images_equal(&now["vda"], &image(&scene.backup, "vda")).unwrap().unwrap();

    // Another one on top: what the first one keeps is still needed by nobody else, and each can be discarded.
    let second = scene.restore(&["--disks", "vdb", "--cold"]);
    assert_eq!(scene.kept().len(), 2);
    scene.host().fails(&["restore", "--discard", &second], 12, &["belongs to what job"]);
    scene.done(&["restore", "--undo", &second]);
    assert_eq!(disks(scene.guest()), now);
    scene.done(&["restore", "--undo", &job]);
    assert_eq!(disks(scene.guest()), scene.bed.own);
    scene.old_definition();
    assert_eq!(scene.state(), "shut off");
    // The last undo keeps a machine with a disk that the first one keeps as well.
    while let Some(kept) = scene.kept().into_iter().next_back() {
        scene.done(&["restore", "--discard", kept["job"].as_str().unwrap()]);
    }
    scene.nothing_kept();
}

#[test]
fn a_managed_save_image_and_checkpoints_are_set_aside_and_come_back() {
    let (scene, _daemon) = Scene::new(&small("web1"), &["--disk-only"]);
    let boot = scene.guest().boot_id();
    for name in ["one", "two"] {
        let args = [name, "--diskspec", "vda", "--diskspec", "vdb,checkpoint=no"];
        scene.guest().virsh("checkpoint-create-as", &args).unwrap();
    }
    let checkpoints = || scene.guest().virsh("checkpoint-list", &["--tree"]).unwrap();
    let tree = checkpoints();
    assert!(tree.contains("one") && tree.contains("two"), "{tree}");
    scene.guest().virsh("managedsave", &[]).unwrap();
    let last = ticks(&scene.bed.own);
    let save = scene.host().hypervisor.dir().join("config/libvirt/qemu/save/web1.save");
    assert!(save.exists());

    let job = scene.restore(&["--start"]);
    until("the restored guest to boot", || (scene.guest().boot_id() != boot).then_some(()));
    assert!(!save.exists(), "the next start would load it onto other disks");
    assert_eq!(checkpoints().trim(), "", "old bitmaps must not come back to life");

    let undo = scene.done(&["restore", "--undo", &job, "--destroy", "--shutdown-time", "1s"]);
    assert_eq!(scene.state(), "shut off", "it was off");
    assert_eq!(checkpoints(), tree);
    // libvirt does not know of the image that was given back, and loads it all the same: a backup takes it along, and puts
    // nothing under it.
    scene.done(&["snapshot", "web1"]);
    let backups = scene.host().backups();
    assert!(backups.iter().any(|backup| backup["memory"] == true), "{backups:?}");
    assert!(save.exists() && scene.state() == "shut off");
    scene.guest().virsh("start", &[]).unwrap();
    went_back(scene.guest(), last);
    assert_eq!(scene.guest().boot_id(), boot, "its managed save image was loaded");
    scene.done(&["restore", "--discard", &undo]);
    scene.nothing_kept();
}

#[test]
fn a_guest_that_cannot_shut_down_is_left_alone_unless_the_plug_may_be_pulled() {
    let (scene, _daemon) = Scene::new(&small("web1"), &["--disk-only"]);
    scene.guest().virsh("suspend", &[]).unwrap();
    let args = ["restore", scene.id.as_str(), "--in-place"];
    assert_eq!(scene.failed(&args), 122);
    assert_eq!(scene.host().jobs()[0]["fault"]["name"], "CANNOT_BRING_TO_REST");
    assert_eq!(scene.state(), "paused");
    scene.nothing_kept();
    scene.old_definition();
    let job = scene.restore(&["--destroy"]);
    assert_eq!(scene.state(), "paused", "it was paused, and the new one waits before its first instruction");
    scene.new_disks();
    scene.done(&["restore", "--undo", &job, "--destroy"]);
    assert_eq!(scene.state(), "paused");
    scene.guest().virsh("resume", &[]).unwrap();
    scene.guest().wait_tick(scene.point + 61).unwrap();
}

/// Changes a file of a backup and lets its manifest speak of the new content.
fn forge(backup: &Value, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    let mut bytes = fs::read(folder.join(name)).unwrap();
    change(&mut bytes);
    fs::write(folder.join(name), &bytes).unwrap();
    let path = folder.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let files = manifest["files"].as_array_mut().unwrap();
    let entry = files.iter_mut().find(|file| file["name"] == name).unwrap();
    entry["blake3"] = blake3::hash(&bytes).to_hex().to_string().into();
    fs::write(&path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
}

#[test]
fn a_restore_that_fails_brings_the_old_machine_back_running_on_its_own_images() {
    let (scene, _daemon) = Scene::new(&small("web1"), &[]);
    let boot = scene.guest().boot_id();
    // A stream that QEMU cannot load: everything before has worked by then, the old guest is down.
    forge(&scene.backup, "memory.save", |bytes| {
        let half = bytes.len() / 2;
        bytes[half..].fill(0xA5);
    });
    let args = ["restore", scene.id.as_str(), "--in-place"];
    assert_eq!(scene.failed(&args), 21);
    scene.guest().wait_more(5).unwrap();
    scene.bed.assert_back_home();
    scene.nothing_kept();
    assert_ne!(scene.guest().boot_id(), boot, "it was shut down and started again");
    // With its memory saved it does not even notice, but for the time.
    let (boot, last) = (scene.guest().boot_id(), scene.guest().last_tick());
    assert_eq!(scene.failed(&["restore", &scene.id, "--in-place", "--save-old"]), 21);
    scene.guest().wait_tick(last + 20).unwrap();
    assert_eq!(scene.guest().boot_id(), boot);
    scene.bed.assert_back_home();
    scene.nothing_kept();
    // Damage that the hash tells: the guest is never asked to shut down.
    let folder = PathBuf::from(scene.backup["folder"].as_str().unwrap());
    let mut bytes = fs::read(folder.join("vdb.raw")).unwrap();
    bytes[MIB as usize] ^= 1;
    fs::write(folder.join("vdb.raw"), &bytes).unwrap();
    assert_eq!(scene.failed(&["restore", &scene.id, "--in-place", "--cold"]), 38);
    assert_eq!(scene.guest().boot_id(), boot);
    scene.bed.assert_back_home();
    scene.nothing_kept();
}

#[test]
fn a_place_that_fills_up_in_the_middle_costs_the_old_guest_nothing() {
    let (scene, _daemon) = Scene::new(&small("web1"), &[]);
    let Some(mount) = Mount::new(scene.host(), "small", 24) else { return };
    crate::support::bed::configure(scene.host(), &crate::support::bed::root_is(&mount.0));
    drop(_daemon);
    let _daemon = scene.host().daemon();
    let folder = PathBuf::from(scene.backup["folder"].as_str().unwrap());
    let boot = scene.guest().boot_id();
    let args = ["restore", "--from", folder.to_str().unwrap(), "--trust-definition", "--in-place", "--cold"];
    let mut all = args.to_vec();
    all.extend(["--folder", mount.0.to_str().unwrap(), "--bandwidth", "4M"]);
    let job = scene.host().begin(&all);
    until("the copy to have begun", || {
        let held: u64 = files_below(&mount.0).iter().map(|file| fs::metadata(file).unwrap().len()).sum();
        (held > 0).then_some(())
    });
    mount.fill(0);
    let row = scene.host().settled(&job);
    assert_eq!(
        (row["status"].as_str(), row["fault"]["code"].as_u64()),
        (Some("rolled_back"), Some(47)),
        "{row:#}"
    );
    assert_eq!(scene.guest().boot_id(), boot);
    scene.bed.assert_back_home();
    scene.nothing_kept();
    mount.clear();
    assert_eq!(files_below(&mount.0), Vec::<PathBuf>::new());
}

#[test]
fn the_backups_definition_comes_back_only_if_it_is_asked_for() {
    let (scene, _daemon) = Scene::new(&small("web1"), &["--disk-only"]);
    scene.guest().virsh("desc", &["--config", "changed", "since"]).unwrap();
    let changed = || scene.guest().virsh("dumpxml", &["--inactive"]).unwrap().contains("changed since");
    assert!(changed());
    let job = scene.restore(&["--destroy", "--shutdown-time", "1s"]);
    assert!(changed(), "only its disks are other ones");
    scene.done(&["restore", "--undo", &job, "--destroy", "--shutdown-time", "1s"]);
    let job = scene.restore(&["--definition", "--destroy", "--shutdown-time", "1s"]);
    assert!(!changed(), "the definition is the backup's");
    scene.done(&["restore", "--undo", &job, "--destroy", "--shutdown-time", "1s"]);
    assert!(changed());
}

#[test]
fn a_domain_that_is_gone_comes_back_as_itself_and_at_its_own_place() {
    let (scene, _daemon) = Scene::new(&small("web1"), &[]);
    let uuid = scene.guest().uuid().to_owned();
    let boot = scene.guest().boot_id();
    scene.guest().destroy().unwrap();
    scene.guest().virsh("undefine", &[]).unwrap();
    // Its images are still there, and nothing is ever overwritten.
    scene.host().fails(&["restore", &scene.id, "--in-place", "--start"], 110, &["remedy "]);
    for path in scene.bed.own.values() {
        fs::remove_file(path).unwrap();
    }
    scene.restore(&["--start"]);
    let guest = Guest::attach(&scene.host().hypervisor, "web1").unwrap();
    guest.wait_more(5).unwrap();
    assert_eq!((guest.uuid(), guest.boot_id()), (uuid.as_str(), boot));
    assert_eq!(disks(&guest), scene.bed.own);
    assert_eq!(scene.kept(), Vec::<Value>::new(), "nothing was there to be kept");
    scene.unmarked();
}

fn copied(from: &Path, to: &Path, host: &Host) {
    fs::create_dir_all(to).unwrap();
    crate::support::bed::give(host, to);
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        fs::copy(&path, &target).unwrap();
        crate::support::bed::give(host, &target);
    }
}

#[test]
fn a_backup_folder_alone_is_enough_on_another_host() {
    let (scene, daemon) = Scene::new(&small("web1"), &[]);
    daemon.end();
    let other = Host::new();
    let folder = other.hypervisor.dir().join("brought");
    copied(Path::new(scene.backup["folder"].as_str().unwrap()), &folder, &other);
    let folder = folder.to_str().unwrap();
    let _daemon = other.daemon();

    // Its definition writes to files of the host: whoever brings it has to answer for it.
    other.fails(
        &["restore", "--from", folder, "--as", "copy"],
        123,
        &["DEFINITION_NOT_TRUSTED", "serial", "--trust-definition"],
    );
    assert_eq!(other.hypervisor.domains().unwrap(), Vec::<String>::new());
    fs::create_dir_all(scene.host().hypervisor.dir().join("serial")).unwrap();
    let restored = other.restored();
    let args = ["restore", "--from", folder, "--trust-definition"];
    let mut whole = args.to_vec();
    whole.extend(["--in-place", "--cold"]);
    // A definition from elsewhere does not choose where files are made.
    other.fails(&whole, 105, &["remedy "]);
    let place = restored.join("web1");
    whole.extend(["--folder", place.to_str().unwrap()]);
    let job = other.begin(&whole);
    assert_eq!(other.settled(&job)["status"], "succeeded");
    assert_eq!(other.hypervisor.domains().unwrap(), ["web1"]);
    let there = other.hypervisor.disk_files_in_inactive_xml("web1").unwrap();
    for disk in ["vda", "vdb"] {
        images_equal(&there[disk], &image(&scene.backup, disk)).unwrap().unwrap();
    }
    assert_eq!(Format::probe(&there["vda"]).unwrap(), Format::Qcow2);

    let mut beside = args.to_vec();
    beside.extend(["--as", "copy", "--cold"]);
    let job = other.begin(&beside);
    assert_eq!(other.settled(&job)["status"], "succeeded");
    assert_eq!(other.hypervisor.domains().unwrap().len(), 2);
    other.fails(&["restore", "--from", "/nonexistent", "--as", "x"], 109, &["remedy "]);
}

/// Whether anybody uses what a discard removes is asked of every domain of the host, and of no QEMU: libvirt would note
/// that on the domain, as tampering.
#[test]
fn a_discard_sees_what_other_guests_have_open_without_asking_them() {
    let (scene, _daemon) = Scene::new(&small("web1"), &["--disk-only"]);
    scene.guest().shutdown().unwrap();
    let job = scene.restore(&["--disks", "vdb", "--cold"]);
    let old = scene.bed.own["vdb"].to_str().unwrap();
    let disk = DiskSpec::new(16 * MIB);
    let other =
        Guest::boot(&scene.host().hypervisor, &GuestSpec::new("web2").disk(disk.clone()).disk(disk)).unwrap();
    other
        .virsh("attach-disk", &[old, "vdz", "--subdriver", "raw", "--targetbus", "virtio", "--live"])
        .unwrap();
    scene.host().fails(&["restore", "--discard", &job], 12, &["web2", old]);
    other.virsh("detach-disk", &["vdz", "--live"]).unwrap();
    until("web2 to have closed it", || {
        let held = scene.host().hypervisor.files_held_by_qemu("web2").unwrap();
        (!held.contains(&scene.bed.own["vdb"])).then_some(())
    });
    scene.done(&["restore", "--discard", &job]);
    let noted = other.virsh("dominfo", &[]).unwrap();
    assert!(!noted.contains("custom monitor"), "{noted}");
}

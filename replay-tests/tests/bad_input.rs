//! What vmkeep is given that it cannot use: each is refused with its code, cause and remedy, and changes nothing; or it
//! is survived in the middle, and the guest is back on its own files. On a real libvirt, QEMU and guest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use replay_tests::testbed::{DiskSpec, Format, Guest, GuestSpec, MIB, image_info, pattern_on};
use serde_json::Value;
use support::{Host, about, assert_ticks, assert_untouched, disks, files_below, until};

/// A file system of its own, in memory. Unmounted when dropped, so it must be dropped before its host.
struct Mount(PathBuf);

impl Mount {
    /// Only root can mount: elsewhere the test says that it proves nothing, and ends.
    fn new(host: &Host, name: &str, mib: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root can mount a small file system");
            return None;
        }
        let at = host.hypervisor.dir().join(name);
        fs::create_dir(&at).unwrap();
        let user = host.hypervisor.user();
        let options = format!("size={mib}m,mode=755,uid={},gid={}", user.uid, user.gid);
        run("mount", &["-t", "tmpfs", "-o", &options, "vmkeep-test", at.to_str().unwrap()]);
        Some(Self(at))
    }

    /// Takes all room but `spare` bytes, as root may.
    fn fill(&self, spare: u64) {
        let room = rustix::fs::statvfs(&self.0).unwrap();
        let free = room.f_bavail * room.f_frsize;
        let filler = fs::File::create(self.0.join("filler")).unwrap();
        for at in (0..free.saturating_sub(spare)).step_by(65536) {
            // The last of it somebody else may have been quicker to take.
            let _ = rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), at, 65536);
        }
    }

    fn clear(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a process of the test bed that holds a file there ends soon after.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A file of the hypervisor's user.
fn give(host: &Host, path: &Path) {
    if rustix::process::geteuid().is_root() {
        let user = host.hypervisor.user();
        chown(path, Some(user.uid), Some(user.gid)).unwrap();
    }
}

/// A folder of the hypervisor's user.
fn folder(host: &Host, path: &Path) -> PathBuf {
    fs::create_dir_all(path).unwrap();
    give(host, path);
    path.to_owned()
}

fn configure(host: &Host, roots: &[&Path]) {
    let dir = folder(host, &host.hypervisor.dir().join("config/vmkeep"));
    let roots: Vec<String> = roots.iter().map(|root| format!("{root:?}")).collect();
    fs::write(dir.join("vmkeep.toml"), format!("[targets]\nroots = [{}]\n", roots.join(", "))).unwrap();
    give(host, &dir.join("vmkeep.toml"));
}

fn default_root(host: &Host) -> PathBuf {
    host.hypervisor.dir().join("state/vmkeep/backups")
}

fn small(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .disk(DiskSpec::new(64 * MIB).data(6 * MIB))
        .disk(DiskSpec::new(32 * MIB).raw().data(4 * MIB))
}

/// With enough data that a throttled copy takes long enough to be met in the middle.
fn large(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .disk(DiskSpec::new(128 * MIB).data(48 * MIB))
        .disk(DiskSpec::new(32 * MIB).raw().data(4 * MIB))
}

/// Definitions of a domain as libvirt prints them: the live one, whose elements change places when libvirt is
/// restarted, and the persistent one.
type Definitions = (Vec<String>, Vec<String>);

fn definitions(guest: &Guest) -> Definitions {
    let lines = |xml: String| {
        // libvirt leaves this behind where there was metadata once.
        xml.lines().filter(|line| line.trim() != "<metadata/>").map(str::to_owned).collect::<Vec<_>>()
    };
    let mut live = lines(guest.virsh("dumpxml", &[]).unwrap());
    live.sort();
    (live, lines(guest.virsh("dumpxml", &["--inactive"]).unwrap()))
}

fn assert_same(what: &str, now: &[String], before: &[String]) {
    let lost: Vec<_> = before.iter().filter(|line| !now.contains(line)).collect();
    let new: Vec<_> = now.iter().filter(|line| !before.contains(line)).collect();
    assert!(now == before, "{what}: lost {lost:#?}, new {new:#?}");
}

/// A guest and everything about it that a refusal must leave alone.
struct Bed {
    guest: Guest,
    own: BTreeMap<String, PathBuf>,
    definitions: Definitions,
    images: Vec<PathBuf>,
    mount: Option<Mount>,
    host: Host,
}

impl Bed {
    fn boot(spec: &GuestSpec) -> Self {
        Self::boot_on(Host::new(), None, spec)
    }

    fn boot_on(host: Host, mount: Option<Mount>, spec: &GuestSpec) -> Self {
        let guest = Guest::boot(&host.hypervisor, spec).unwrap();
        guest.wait_tick(5).unwrap();
        Self {
            own: disks(&guest),
            definitions: definitions(&guest),
            images: files_below(&host.hypervisor.images()),
            guest,
            mount,
            host,
        }
    }

    fn mount(&self) -> &Mount {
        self.mount.as_ref().unwrap()
    }

    /// Definitions to the last byte, files, and the guest's ticks.
    fn assert_nothing_changed(&self) {
        assert_same("the live definition", &definitions(&self.guest).0, &self.definitions.0);
        self.assert_back_home();
    }

    /// After a job that began: the persistent definition to the last byte, the guest on its own files, no leftovers.
    fn assert_back_home(&self) {
        assert_same("the persistent definition", &definitions(&self.guest).1, &self.definitions.1);
        assert_eq!(files_below(&self.host.hypervisor.images()), self.images, "files beside the images");
        assert_untouched(&self.guest, &self.own);
    }

    /// A refusal: with code, name, words and a remedy, without a backup, and nothing changed.
    fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        refused(&self.host, args, code, words);
        self.assert_nothing_changed();
        let root = default_root(&self.host);
        assert_eq!(files_below(&root), Vec::<PathBuf>::new(), "written for {args:?}");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "folders made for {args:?}");
    }
}

fn refused(host: &Host, args: &[&str], code: i32, words: &[&str]) {
    let number = format!("code   {code} ");
    let mut all = vec![number.as_str(), "remedy "];
    all.extend(words);
    host.fails(args, code, &all);
}

/// How far the copy of a disk is, in bytes, as far as it has told.
fn copied(host: &Host, job: &str) -> u64 {
    let detail = host.json(&["job", "show", job]);
    let steps = detail["steps"].as_array().unwrap().clone();
    let copies = steps.iter().filter(|step| step["name"].as_str().unwrap().starts_with("copy/"));
    copies.filter_map(|step| step["progress"]["done"].as_u64()).sum()
}

/// Begins a backup and waits until it is in the middle of copying, the guest on its overlays.
fn in_the_middle(host: &Host, args: &[&str]) -> String {
    let job = host.begin(args);
    until("the copy to have begun", || {
        let row = host.job(&job);
        assert!(!row["ended"].is_string(), "it ended too early: {row:#}\n{}", host.log());
        (copied(host, &job) > MIB).then_some(())
    });
    job
}

/// Waits for the end of a job, whatever it is: its status and its code (0 without one).
fn ended(host: &Host, job: &str) -> (String, u64) {
    let row = host.settled(job);
    (row["status"].as_str().unwrap().to_owned(), row["fault"]["code"].as_u64().unwrap_or(0))
}

fn backup_of(host: &Host, job: &str) -> Value {
    let backups = host.backups();
    let found = backups.iter().find(|backup| backup["job"].as_str().is_some_and(|of| of == job));
    found.unwrap_or_else(|| panic!("no backup of {job}: {backups:#?}")).clone()
}

/// The image of a disk in a backup.
fn image(backup: &Value, disk: &str) -> PathBuf {
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    files_below(&folder)
        .into_iter()
        .find(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            ["qcow2", "raw"].iter().any(|format| name == format!("{disk}.{format}"))
        })
        .unwrap_or_else(|| panic!("no image of {disk} in {:?}", files_below(&folder)))
}

/// A backup that must be whole: by its manifest and by the guest's ticks.
fn judge(host: &Host, backup: &Value) {
    host.ok(&["verify", backup["id"].as_str().unwrap()]);
    let (vda, vdb) = (image(backup, "vda"), image(backup, "vdb"));
    assert_ticks((&vda, Format::probe(&vda).unwrap()), (&vdb, Format::probe(&vdb).unwrap()));
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn what_does_not_exist_is_refused_by_name() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    let none = "00000000-0000-4000-8000-000000000000";
    for domain in ["web2", "WEB1", "web1 ", "", "*", "../web1", none, "$(id)", "wéb"] {
        bed.refused(
            &["snapshot", domain],
            23,
            &["CANNOT_FIND_MACHINE", "find the domain", domain, "vmkeep domains"],
        );
    }
    let words = &["NO_SUCH_DISK", "vdz", "web1", "virsh domblklist"];
    bed.refused(&["snapshot", "web1", "--disks", "vda,vdz"], 92, words);
    bed.refused(&["snapshot", "web1", "--disks", "../vda"], 92, &["NO_SUCH_DISK", "../vda"]);
    bed.refused(&["snapshot", "web1", "--disks", "vdz", "--dry-run"], 92, &["NO_SUCH_DISK"]);
    for verb in ["show", "verify"] {
        bed.refused(&[verb, "ffffffff"], 109, &["NO_SUCH_BACKUP", "ffffffff", "vmkeep list"]);
    }
    for verb in ["show", "watch", "explain", "history", "cancel", "pause", "resume", "settle", "abandon"] {
        bed.refused(&["job", verb, "ffffffff"], 66, &["NO_SUCH_JOB", "ffffffff"]);
    }
}

#[test]
fn words_that_make_no_sense_exit_64() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    for args in [
        &[][..],
        &["bakcup", "web1"],
        &["snapshot"],
        &["snapshot", "web1", "--nosuch"],
        &["snapshot", "web1", "--live", "--disk-only"],
        &["snapshot", "web1", "--quiesce", "--no-quiesce"],
        &["snapshot", "web1", "--bandwidth", "fast"],
        &["snapshot", "web1", "--bandwidth", "-1"],
        &["snapshot", "web1", "--bandwidth", "99999999999G"],
        &["snapshot", "web1", "--memory-time", "soon"],
        &["snapshot", "web1", "--on-busy-memory", "panic"],
        &["snapshot", "web1", "--quiesce"],
        &["restore", "x"],
        &["restore", "x", "--as", "y", "--start", "--paused"],
        &["restore", "x", "--as", "y", "--disk", "vda"],
        &["restore", "x", "--as", "y", "--disk", "vda=/a", "--disk", "vda=/b"],
        &["jobs", "--state", "happy"],
        &["job"],
        &["diagram", "nosuch"],
    ] {
        bed.host.fails(args, 64, &[]);
    }
    bed.assert_nothing_changed();
    assert!(bed.host.jobs().is_empty(), "{:#?}", bed.host.jobs());
}

#[test]
fn a_target_outside_the_roots_or_reached_by_a_detour_is_refused() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let root = default_root(host);
    let elsewhere = folder(host, &host.hypervisor.dir().join("elsewhere"));
    let to = |path: &Path| path.to_str().unwrap().to_owned();
    for outside in [to(&elsewhere), "/".to_owned(), "/tmp".to_owned(), format!("{}x", to(&root))] {
        for mode in ["--live", "--disk-only", "--dry-run"] {
            let words = &["TARGET_OUTSIDE_ROOTS", "use the target", outside.as_str()];
            bed.refused(&["snapshot", "web1", mode, "--to", &outside], 105, words);
        }
    }
    // Dots: they climb out, or would if they were followed.
    for climbing in [format!("{}/../../elsewhere", to(&root)), format!("{}/a/../b", to(&root))] {
        bed.refused(&["snapshot", "web1", "--to", &climbing], 106, &["UNSAFE_PATH", "use the target"]);
    }
    // A link below the root leads out of it.
    std::os::unix::fs::symlink(&elsewhere, root.join("link")).unwrap();
    for linked in ["link", "link/deeper"] {
        let linked = to(&root.join(linked));
        refused(host, &["snapshot", "web1", "--to", &linked], 106, &["UNSAFE_PATH", &linked]);
        refused(host, &["show", &linked], 106, &["UNSAFE_PATH"]);
    }
    fs::remove_file(root.join("link")).unwrap();
    // A file is no folder.
    fs::write(root.join("file"), "").unwrap();
    let file = to(&root.join("file"));
    let output = host.vmkeep(&["snapshot", "web1", "--to", &file]);
    assert!([6, 106].contains(&output.status.code().unwrap()), "{output:?}");
    fs::remove_file(root.join("file")).unwrap();
    bed.assert_nothing_changed();
    assert_eq!(files_below(&elsewhere), Vec::<PathBuf>::new());
}

#[test]
fn a_target_that_cannot_be_written_is_refused_and_changes_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::new();
    let closed = folder(&host, &host.hypervisor.dir().join("closed"));
    configure(&host, &[&closed]);
    let bed = Bed::boot_on(host, None, &small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    for mode in ["--live", "--disk-only"] {
        let words = &["CANNOT_WRITE_TO_BACKUP_LOCATION", closed.to_str().unwrap()];
        refused(host, &["snapshot", "web1", mode], 6, words);
        bed.assert_nothing_changed();
    }
    // Gone since vmkeepd started: whatever was mounted there is not.
    fs::rename(&closed, closed.with_extension("away")).unwrap();
    refused(
        host,
        &["snapshot", "web1"],
        26,
        &["BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST", closed.to_str().unwrap()],
    );
    bed.assert_nothing_changed();
    daemon.end();
    // Not there from the start: everything else works, and it says so.
    let _daemon = host.daemon();
    refused(host, &["snapshot", "web1"], 26, &["BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST"]);
    bed.assert_nothing_changed();
}

#[test]
fn too_little_room_is_refused_before_anything_is_touched() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "small", 16) else { return };
    configure(&host, &[&mount.0]);
    let bed = Bed::boot_on(host, Some(mount), &small("web1"));
    let mount = bed.mount();
    let _daemon = bed.host.daemon();
    for mode in ["--live", "--disk-only", "--dry-run"] {
        let words = &["NOT_ENOUGH_DISK_SPACE", "bytes are needed", "are free", mount.0.to_str().unwrap()];
        refused(&bed.host, &["snapshot", "web1", mode], 47, words);
        bed.assert_nothing_changed();
    }
    assert_eq!(fs::read_dir(&mount.0).unwrap().count(), 0);
    // A memory limit that cannot do is named as such.
    refused(&bed.host, &["snapshot", "web1", "--memory-limit", "1M"], 96, &["MEMORY_TOO_LARGE", "web1"]);
    bed.assert_nothing_changed();
}

#[test]
fn a_target_that_fills_up_in_the_middle_is_survived() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "small", 256) else { return };
    configure(&host, &[&mount.0]);
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
    judge(host, &host.backups()[0]);
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
    let _daemon = host.daemon();
    let before = files_below(&mount.0);
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "4M"];

    // Low: the copy is given up while there is still room to bring the overlays home.
    let job = in_the_middle(host, &slow);
    mount.fill(100 * MIB);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 102), "{}", host.ok(&["job", "explain", &job]));
    mount.clear();
    bed.assert_back_home();
    assert_eq!(files_below(&mount.0), before);

    // Full: QEMU stops the guest. It comes back by itself once there is room.
    let job = in_the_middle(host, &slow);
    mount.fill(0);
    bed.guest.wait_state("paused").unwrap();
    mount.clear();
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 102), "{}", host.ok(&["job", "explain", &job]));
    bed.assert_back_home();
    assert_eq!(files_below(&mount.0), before);
    assert!(host.backups().is_empty());
}

#[test]
fn a_domain_that_another_job_of_ours_holds_is_refused_or_waited_for() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "8M"];
    let first = in_the_middle(host, &slow);
    let short = host.job(&first)["short"].as_str().unwrap().to_owned();
    refused(host, &["snapshot", "web1"], 67, &["SUBJECT_BUSY", "web1"]);
    let said = host.vmkeep(&["snapshot", bed.guest.uuid(), "--disk-only"]);
    assert_eq!(said.status.code(), Some(67));
    let said = String::from_utf8_lossy(&said.stderr).into_owned() + &String::from_utf8_lossy(&said.stdout);
    assert!(said.contains(&short), "it names the job {short}: {said}");
    // Waiting in the queue, and given up there.
    let queued = host.begin(&["snapshot", "web1", "--disk-only", "--queue"]);
    let given_up = host.begin(&["snapshot", "web1", "--disk-only", "--queue"]);
    assert_eq!(host.job(&queued)["status"], "queued");
    host.ok(&["job", "cancel", &given_up]);
    assert_eq!(ended(host, &given_up).0, "cancelled");
    assert_eq!(ended(host, &first).0, "succeeded");
    assert_eq!(ended(host, &queued).0, "succeeded");
    bed.assert_back_home();
    assert_eq!(host.backups().len(), 2);
    judge(host, &backup_of(host, &first));
    judge(host, &backup_of(host, &queued));
    for verb in ["cancel", "pause", "resume", "settle", "abandon"] {
        host.fails(&["job", verb, &first], 81, &["INVALID_STATE"]);
    }
}

#[test]
fn a_domain_that_somebody_else_works_on_is_refused() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let dir = folder(host, &host.hypervisor.dir().join("elsewhere"));
    let root = default_root(host);
    let busy = |what: &str| {
        for mode in ["--live", "--disk-only"] {
            println!("{what} {mode}");
            refused(host, &["snapshot", "web1", mode], 88, &["DOMAIN_BUSY_ELSEWHERE", "web1"]);
        }
        assert_eq!(files_below(&root), Vec::<PathBuf>::new());
    };
    // A block job.
    let copy = dir.join("mirror.qcow2");
    let copy = copy.to_str().unwrap();
    bed.guest
        .virsh("blockcopy", &["vda", copy, "--transient-job", "--bytes", "--bandwidth", "65536"])
        .unwrap();
    busy("block copy");
    bed.guest.virsh("blockjob", &["vda", "--abort"]).unwrap();
    // A backup of libvirt's own.
    let xml = dir.join("backup.xml");
    let scratch = dir.join("scratch");
    fs::write(
        &xml,
        format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{0}/nbd'/><disks>\
             <disk name='vda' backup='yes' type='file'><scratch file='{1}'/></disk><disk name='vdb' backup='no'/></disks>\
             </domainbackup>",
            dir.display(),
            scratch.display()
        ),
    )
    .unwrap();
    bed.guest.virsh("backup-begin", &[xml.to_str().unwrap()]).unwrap();
    busy("backup");
    bed.guest.virsh("domjobabort", &[]).unwrap();
    until("the backup to be over", || {
        bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None").then_some(())
    });
    bed.assert_back_home();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
}

#[test]
fn a_domain_on_an_overlay_that_is_not_accounted_for_is_refused() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let images = host.hypervisor.images();
    let onto = |file: &str, more: &[&str]| {
        let disk = format!("vda,file={}", images.join(file).display());
        let mut args = vec!["--disk-only", "--diskspec", &disk, "--diskspec", "vdb,snapshot=no"];
        args.extend(more);
        bed.guest.virsh("snapshot-create-as", &args).unwrap();
    };
    let home = || {
        bed.guest.virsh("blockcommit", &["vda", "--active", "--pivot", "--wait"]).unwrap();
    };
    let still = |args: &[&str], code: i32, words: &[&str]| {
        let (before, files) = (definitions(&bed.guest), files_below(&images));
        refused(host, args, code, words);
        assert_eq!(definitions(&bed.guest), before);
        assert_eq!(files_below(&images), files);
        bed.guest.wait_more(3).unwrap();
        assert_eq!(files_below(&default_root(host)), Vec::<PathBuf>::new());
    };
    // Ours, of a job that nobody knows any more.
    let ours = "vmkeep-0123456789ab-vda.qcow2";
    onto(ours, &["--no-metadata"]);
    for mode in ["--live", "--disk-only", "--dry-run"] {
        let words = &["OUR_LEFTOVERS", "web1", "vda", "0123456789ab", "virsh blockcommit"];
        still(&["snapshot", "web1", mode], 90, words);
    }
    home();
    fs::remove_file(images.join(ours)).unwrap();
    // A snapshot that libvirt keeps track of.
    onto("theirs.qcow2", &["--name", "before the upgrade"]);
    let words = &["FOREIGN_SNAPSHOT", "web1", "before the upgrade", "virsh snapshot-list"];
    still(&["snapshot", "web1"], 91, words);
    bed.guest.virsh("snapshot-delete", &["before the upgrade", "--metadata"]).unwrap();
    home();
    fs::remove_file(images.join("theirs.qcow2")).unwrap();
    // Somebody is in the middle: QEMU writes to an overlay that the next start does not know.
    let known = bed.definitions.1.join("\n");
    onto("half.qcow2", &["--no-metadata"]);
    define(host, &known);
    let words = &["ON_OVERLAY_OF_OTHERS", "web1", "vda", "half.qcow2", "the persistent definition"];
    still(&["snapshot", "web1"], 118, words);
}

fn define(host: &Host, xml: &str) {
    let file = host.hypervisor.dir().join("state/definition.xml");
    fs::write(&file, xml).unwrap();
    give(host, &file);
    host.hypervisor.virsh(["define", "--file", file.to_str().unwrap()]).unwrap();
}

#[test]
fn internal_snapshots_are_told_of_and_hinder_nothing() {
    let spec =
        GuestSpec::new("web1").disk(DiskSpec::new(64 * MIB).data(4 * MIB)).disk(DiskSpec::new(32 * MIB));
    let bed = Bed::boot(&spec);
    let host = &bed.host;
    let _daemon = host.daemon();
    bed.guest.virsh("snapshot-create-as", &["before the upgrade"]).unwrap();
    host.ok(&["snapshot", "web1"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    judge(host, &backup);
    let shown = host.ok(&["show", backup["id"].as_str().unwrap()]);
    assert!(shown.contains("internal snapshots (before the upgrade) are not part of the backup"), "{shown}");
    assert!(bed.guest.virsh("snapshot-list", &["--name"]).unwrap().contains("before the upgrade"));
}

#[test]
fn a_definition_that_changes_in_the_middle_is_noticed_and_the_change_is_kept() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    // Killed right after the definition was switched, before the snapshot: the request, the plan, and two events for
    // each of five steps.
    let mut daemon = host.daemon_that_dies(Some("append/after/snapshot/12"));
    until("vmkeepd to be ready", || host.ready().then_some(()));
    let job = host.begin(&["snapshot", "web1", "--disk-only"]);
    let died = daemon.dies_or(|| false);
    drop(daemon);
    assert!(died, "the crash point was not met");
    let switched = bed.guest.virsh("dumpxml", &["--inactive"]).unwrap();
    assert!(switched.contains("vmkeep-"), "{switched}");
    define(host, &switched.replace("<memory ", "<description>by hand</description><memory "));
    let _daemon = host.daemon();
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 69), "{}", host.ok(&["job", "explain", &job]));
    let now = bed.guest.virsh("dumpxml", &["--inactive"]).unwrap();
    assert!(now.contains("<description>by hand</description>"), "the change was lost: {now}");
    assert_untouched(&bed.guest, &bed.own);
    assert_eq!(files_below(&default_root(host)), Vec::<PathBuf>::new());
    host.ok(&["snapshot", "web1", "--disk-only"]);
    assert_untouched(&bed.guest, &bed.own);
}

#[test]
fn vmkeepd_waits_for_libvirt_and_says_so() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let libvirt_is_away = |phase: &str| {
        let status = host.json(&["status"]);
        assert_eq!(status["daemon"]["phase"], phase);
        assert_eq!(status["libvirt"]["reachable"], false, "{status:#}");
        assert_eq!(status["libvirt"]["fault"]["code"], 83, "{status:#}");
        let text = host.ok(&["status"]);
        assert!(text.contains("does not answer"), "{text}");
        refused(host, &["snapshot", "web1"], 83, &["HYPERVISOR_UNREACHABLE"]);
        refused(host, &["domains"], 83, &["HYPERVISOR_UNREACHABLE"]);
        host.ok(&["list"]);
        host.ok(&["jobs"]);
    };
    let back = || {
        host.hypervisor.start_libvirtd().unwrap();
        until("vmkeepd to see libvirt again", || {
            (host.ready() && host.json(&["status"])["libvirt"]["reachable"] == true).then_some(())
        });
    };
    host.hypervisor.kill_libvirtd().unwrap();
    let _daemon = host.daemon_that_dies(None);
    until("vmkeepd to answer", || host.vmkeep(&["status"]).status.success().then_some(()));
    libvirt_is_away("waiting_for_libvirt");
    back();
    // libvirt reads the live definition from its own notes, and words it otherwise, so the persistent one is compared.
    bed.assert_back_home();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    host.hypervisor.kill_libvirtd().unwrap();
    until("vmkeepd to notice", || (host.json(&["status"])["libvirt"]["reachable"] == false).then_some(()));
    libvirt_is_away("ready");
    back();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    assert_eq!(host.backups().len(), 2);
}

#[test]
fn a_domain_whose_state_cannot_be_captured_is_refused() {
    let host = Host::new();
    let _daemon = host.daemon();
    let images = host.hypervisor.images();
    let before = |guest: &Guest| guest.virsh("dumpxml", &["--inactive"]).unwrap();
    let refuses = |guest: &Guest, code: i32, words: &[&str]| {
        let definition = before(guest);
        for mode in ["--live", "--disk-only", "--dry-run"] {
            refused(&host, &["snapshot", guest.name(), mode], code, words);
        }
        assert_eq!(before(guest), definition);
        assert!(files_below(&images).iter().all(|path| !path.to_string_lossy().contains("vmkeep-")));
        assert_eq!(files_below(&default_root(&host)), Vec::<PathBuf>::new());
    };
    let plain = || DiskSpec::new(8 * MIB).plain();
    // Shut off: libvirt would silently redefine it onto an overlay.
    let off = Guest::define(&host.hypervisor, &GuestSpec::new("off").disk(plain())).unwrap();
    refuses(&off, 86, &["DOMAIN_NOT_RUNNING", "off", "virsh start"]);
    // Firmware variables and a TPM.
    let tpm = "<tpm model='tpm-crb'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>";
    let spec = GuestSpec::new("sealed").disk(plain()).extra_devices(tpm);
    let sealed = Guest::define(&host.hypervisor, &spec).unwrap();
    refuses(&sealed, 94, &["FIRMWARE_STATE_UNSUPPORTED", "sealed", "TPM"]);
    let uefi = Guest::define(&host.hypervisor, &GuestSpec::new("uefi").disk(plain())).unwrap();
    let with_variables = before(&uefi).replace(
        "<boot dev='hd'/>",
        "<loader readonly='yes' type='pflash'>/nosuch/code.fd</loader><nvram>/nosuch/vars.fd</nvram>",
    );
    define(&host, &with_variables);
    refuses(&uefi, 94, &["FIRMWARE_STATE_UNSUPPORTED", "uefi", "firmware variables"]);
    // Nothing that could take part.
    let none = GuestSpec::new("diskless").disk(plain().raw().options("<readonly/>"));
    let none = Guest::define(&host.hypervisor, &none).unwrap();
    host.hypervisor.virsh(["start", "--paused", "--domain", "diskless"]).unwrap();
    refuses(&none, 93, &["NO_DISK_TO_BACK_UP", "diskless", "vda: it is read-only"]);
    // One that is gone with its QEMU.
    let spec = GuestSpec::new("passing").disk(plain());
    let passing = Guest::define(&host.hypervisor, &spec).unwrap();
    host.hypervisor.virsh(["start", "--paused", "--domain", "passing"]).unwrap();
    passing.virsh("undefine", &[]).unwrap();
    refused(&host, &["snapshot", "passing"], 87, &["DOMAIN_TRANSIENT", "passing", "virsh define"]);
    // A chain with a hole in it.
    let spec = GuestSpec::new("clone").disk(DiskSpec::new(8 * MIB).plain().chain(1));
    let clone = Guest::define(&host.hypervisor, &spec).unwrap();
    host.hypervisor.virsh(["start", "--paused", "--domain", "clone"]).unwrap();
    fs::rename(images.join("clone-vda-base0.qcow2"), images.join("moved.qcow2")).unwrap();
    refuses(&clone, 114, &["CHAIN_UNREADABLE", "vda", "clone-vda-base0.qcow2"]);
    // `domains` says so beforehand.
    let text = host.ok(&["domains"]);
    for words in ["it has a TPM", "it has UEFI variables", "none of its disks can take part"] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn disks_that_cannot_take_part_are_left_out_by_rule_and_named() {
    let host = Host::new();
    let iso = host.hypervisor.images().join("medium.iso");
    fs::write(&iso, vec![7; 65536]).unwrap();
    give(&host, &iso);
    let cdrom = format!(
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='sda' bus='sata'/><readonly/></disk>\
         <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>",
        iso.display()
    );
    let spec = small("web1")
        .disk(DiskSpec::new(8 * MIB).raw().plain().options("<readonly/>"))
        .disk(DiskSpec::new(8 * MIB).raw().plain().options("<shareable/>"))
        .extra_devices(&cdrom);
    let bed = Bed::boot_on(host, None, &spec);
    let host = &bed.host;
    let _daemon = host.daemon();
    for (disk, why) in
        [("vdc", "read-only"), ("vdd", "other guests"), ("sda", "CD drive"), ("sdb", "CD drive")]
    {
        bed.refused(&["snapshot", "web1", "--disks", disk], 115, &["DISK_CANNOT_TAKE_PART", disk, why]);
    }
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    judge(host, &backup);
    let shown = host.ok(&["show", backup["id"].as_str().unwrap()]);
    for words in [
        "disk vdc is not in it: it is read-only",
        "disk vdd is not in it: other guests may write to it at the same time",
        "disk sda is not in it: it is a CD drive",
        "disk sdb is not in it: it is a CD drive",
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
    // And what was not asked for.
    host.ok(&["snapshot", "web1", "--disk-only", "--disks", "vdb"]);
    bed.assert_back_home();
    let one = host.backups().into_iter().find(|one| one["id"] != backup["id"]).unwrap();
    let shown = host.ok(&["show", one["id"].as_str().unwrap()]);
    assert!(shown.contains("disk vda is not in it: it was not asked for"), "{shown}");
}

/// Moves every image of the hypervisor away while `work` runs, so that nothing can lean on them.
fn with_images_away(host: &Host, work: impl FnOnce()) {
    let (images, away) = (host.hypervisor.images(), host.hypervisor.dir().join("away"));
    fs::rename(&images, &away).unwrap();
    work();
    fs::rename(&away, &images).unwrap();
}

#[test]
fn chains_and_linked_clones_are_captured_whole() {
    let host = Host::new();
    let template = host.hypervisor.images().join("template.qcow2");
    let made = GuestSpec::new("maker").disk(DiskSpec::new(64 * MIB).data(4 * MIB).at(&template));
    Guest::define(&host.hypervisor, &made).unwrap();
    let spec = GuestSpec::new("web1")
        .disk(DiskSpec::new(64 * MIB).data(6 * MIB).chain(2))
        .disk(DiskSpec::new(64 * MIB).linked_to(&template, Format::Qcow2));
    let bed = Bed::boot_on(host, None, &spec);
    let host = &bed.host;
    let _daemon = host.daemon();
    host.ok(&["snapshot", "web1"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    host.ok(&["verify", backup["id"].as_str().unwrap()]);
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    let tops: Vec<PathBuf> = ["vda", "vdb"]
        .map(|disk| {
            let manifest: Value =
                serde_json::from_slice(&fs::read(folder.join("manifest.json")).unwrap()).unwrap();
            let entry = manifest["disks"].as_array().unwrap().iter().find(|one| one["target"] == disk);
            let entry = entry.unwrap();
            let name =
                entry["chain"][0].as_str().or(entry["image"].as_str()).unwrap_or_else(|| panic!("{entry:#}"));
            folder.join(name)
        })
        .into();
    with_images_away(host, || {
        let elsewhere = host.hypervisor.dir().join("moved backup");
        fs::rename(&folder, &elsewhere).unwrap();
        let tops: Vec<_> = tops.iter().map(|top| elsewhere.join(top.file_name().unwrap())).collect();
        assert_ticks((&tops[0], Format::Qcow2), (&tops[1], Format::Qcow2));
        for (top, data) in [(&tops[0], 6), (&tops[1], 4)] {
            let offset = replay_tests::testbed::data_offset(64 * MIB);
            assert_eq!(pattern_on(top, Format::Qcow2, offset, data * MIB, 1).unwrap(), None, "{top:?}");
            let mut image = top.clone();
            let mut layers = 1;
            while let Some(backing) = image_info(&image).unwrap().full_backing_filename {
                assert_eq!(backing.parent(), Some(elsewhere.as_path()), "it leans on {backing:?}");
                image = backing;
                layers += 1;
            }
            assert_eq!(layers, if data == 6 { 3 } else { 2 }, "{top:?}");
            run("qemu-img", &["check", "-q", top.to_str().unwrap()]);
        }
        fs::rename(&elsewhere, &folder).unwrap();
    });
}

#[test]
fn nasty_names_pass_through_everything_unharmed() {
    let name = "web 'one' \"two\" $(touch pwned) `id` ; & \\ %41 ~ ü ß 日本 -x";
    let host = Host::new();
    let newline = GuestSpec::new("with\nnewline").disk(DiskSpec::new(8 * MIB).plain());
    assert!(Guest::define(&host.hypervisor, &newline).is_err(), "libvirt lets no newline into a name");
    let images = folder(&host, &host.hypervisor.images().join("Bilder $(touch pwned) 'ä' \"b\" ;\\"));
    let spec = GuestSpec::new(name)
        .disk(DiskSpec::new(64 * MIB).data(2 * MIB).at(&images.join("disk 'ö' $(id).qcow2")))
        .disk(DiskSpec::new(32 * MIB).raw().at(&images.join("-o raw\"ß\".raw")));
    let bed = Bed::boot_on(host, None, &spec);
    let host = &bed.host;
    let _daemon = host.daemon();
    let root = default_root(host);
    let target = root.join("Ziel $(touch pwned)\nzweite Zeile 'ä' \"b\" ;\\ -rf");
    let to = target.to_str().unwrap();
    host.ok(&["snapshot", name, "--to", to, "--reason", "weil's \"so\" $(ist)\nüberall"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    assert_eq!(backup["domain"], name);
    assert!(backup["folder"].as_str().unwrap().starts_with(to), "{backup:#}");
    judge(host, &backup);
    assert_eq!(host.json(&["list", name])["backups"].as_array().unwrap().len(), 1);
    assert!(host.json(&["list", "web"])["backups"].as_array().unwrap().is_empty());
    for by in [backup["id"].as_str().unwrap(), backup["folder"].as_str().unwrap()] {
        let shown = host.ok(&["show", by]);
        // Printed so that it cannot be mistaken for anything else.
        assert!(shown.contains(&name.replace('\\', "\\\\")), "{shown}");
        host.ok(&["verify", by]);
    }
    for verb in [&["status"][..], &["domains"], &["jobs"], &["jobs", "--domain", name]] {
        let text = host.ok(verb);
        assert!(text.contains("日本"), "{verb:?}: {text}");
        assert!(!text.contains("$(touch pwned)\nzweite"), "a newline of a name breaks the line: {text}");
    }
    // Onto the host's own terminal nothing gets through that would move its cursor.
    let escape = host.vmkeep(&["snapshot", "\u{1b}[2J\u{7}bell"]);
    assert_eq!(escape.status.code(), Some(23));
    assert!(!escape.stderr.contains(&0x1b) && !escape.stderr.contains(&7), "{escape:?}");
    host.ok(&["snapshot", bed.guest.uuid(), "--disk-only", "--to", to]);
    bed.assert_back_home();
    assert_eq!(host.json(&["list", name])["backups"].as_array().unwrap().len(), 2);
    let pwned: Vec<_> = files_below(host.hypervisor.dir())
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|file| file == OsStr::new("pwned")))
        .collect();
    assert!(pwned.is_empty(), "{pwned:?}");
}

#[test]
fn a_backup_that_is_not_what_its_manifest_says_is_refused() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    let id = backup["id"].as_str().unwrap();
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    let manifest = folder.join("manifest.json");
    let (vda, vdb) = (image(&backup, "vda"), image(&backup, "vdb"));
    let outside = host.hypervisor.dir().join("secret");
    fs::write(&outside, "secret").unwrap();
    give(host, &outside);

    // Images.
    let flip = |path: &Path, at: u64| {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    let middle = fs::metadata(&vda).unwrap().len() / 2;
    flip(&vda, middle);
    refused(host, &["verify", id], 38, &["CORRUPT_DISK_IMAGE_FOUND", "vda.qcow2"]);
    flip(&vda, middle);
    flip(&vdb, 20 * MIB + 5);
    refused(host, &["verify", id], 38, &["CORRUPT_DISK_IMAGE_FOUND", "vdb.raw"]);
    flip(&vdb, 20 * MIB + 5);
    host.ok(&["verify", id]);
    fs::OpenOptions::new().append(true).open(&vdb).unwrap().set_len(32 * MIB + 512).unwrap();
    refused(host, &["verify", id], 107, &["MANIFEST_MISMATCH", "vdb.raw"]);
    fs::OpenOptions::new().append(true).open(&vdb).unwrap().set_len(32 * MIB).unwrap();
    fs::rename(&vdb, folder.join("aside")).unwrap();
    refused(host, &["verify", id], 37, &["MISSING_NECESSARY_FILES", "vdb.raw is missing"]);
    // A link to the very same bytes is no file of the backup either.
    std::os::unix::fs::symlink(folder.join("aside"), &vdb).unwrap();
    refused(host, &["verify", id], 37, &["MISSING_NECESSARY_FILES", "vdb.raw is not a regular file"]);
    fs::remove_file(&vdb).unwrap();
    fs::rename(folder.join("aside"), &vdb).unwrap();
    // An image that somebody made lean on a file of the host.
    let kept = fs::read(&vda).unwrap();
    run("qemu-img", &["rebase", "-u", "-F", "raw", "-b", outside.to_str().unwrap(), vda.to_str().unwrap()]);
    let words = &["MANIFEST_MISMATCH", "vda.qcow2 has another header"];
    let output = host.vmkeep(&["verify", id]);
    assert!([38, 107].contains(&output.status.code().unwrap()), "{output:?}, {words:?}");
    fs::write(&vda, &kept).unwrap();
    host.ok(&["verify", id]);

    // The manifest.
    let text = fs::read_to_string(&manifest).unwrap();
    let edited = |what: &str, by: &dyn Fn(&str) -> String| {
        fs::write(&manifest, by(&text)).unwrap();
        println!("{what}");
        for verb in ["show", "verify"] {
            refused(host, &[verb, folder.to_str().unwrap()], 107, &["MANIFEST_MISMATCH"]);
        }
        let list = host.ok(&["list"]);
        assert!(list.contains("cannot be read"), "{what}: it vanished from the list: {list}");
    };
    let replaced = |from: &'static str, to: &'static str| {
        move |text: &str| {
            assert!(text.contains(from), "{from}: {text}");
            text.replace(from, to)
        }
    };
    edited("a name that climbs", &replaced("\"vdb.raw\"", "\"../../secret\""));
    edited("an absolute name", &replaced("\"vdb.raw\"", "\"/etc/passwd\""));
    edited("half of it", &|text| text[..text.len() / 2].to_owned());
    edited("nothing", &|_| String::new());
    // Readable, but of other bytes.
    let parsed: Value = serde_json::from_str(&text).unwrap();
    for file in parsed["files"].as_array().unwrap() {
        let (name, hash) = (file["name"].as_str().unwrap(), file["blake3"].as_str().unwrap());
        let other: String = hash.chars().map(|c| if c == '0' { '1' } else { '0' }).collect();
        fs::write(&manifest, text.replace(hash, &other)).unwrap();
        refused(host, &["verify", id], 38, &["CORRUPT_DISK_IMAGE_FOUND", name]);
    }
    fs::write(&manifest, &text).unwrap();
    host.ok(&["verify", id]);
    // A newer form is named as such, and left alone.
    let newer = text.replacen("\"min_reader\": 1", "\"min_reader\": 2", 1);
    assert_ne!(newer, text);
    fs::write(&manifest, newer).unwrap();
    refused(host, &["show", folder.to_str().unwrap()], 108, &["MANIFEST_TOO_NEW"]);
    // A manifest that is a link.
    fs::write(&manifest, &text).unwrap();
    fs::rename(&manifest, host.hypervisor.dir().join("manifest.json")).unwrap();
    std::os::unix::fs::symlink(host.hypervisor.dir().join("manifest.json"), &manifest).unwrap();
    refused(host, &["show", folder.to_str().unwrap()], 107, &["MANIFEST_MISMATCH"]);
    bed.assert_back_home();
}

#[test]
fn a_store_that_is_damaged_newer_or_in_use_is_refused_untouched() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    let store = host.hypervisor.dir().join("state/vmkeep/store");
    let refuses = |code: i32, name: &str| {
        // One that starts after all must not keep this test for ever.
        let mut command = host.hypervisor.command("timeout");
        let output = command.arg("60").arg(host.hypervisor.dir().join("bin/vmkeepd")).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        for word in [name, "remedy ", store.to_str().unwrap()] {
            assert!(said.contains(word), "{word}: {said}");
        }
    };
    // Often, because such a process ends while libvirt's threads in it begin.
    for _ in 0..20 {
        refuses(79, "STORE_IN_USE");
    }
    host.ok(&["status"]);
    assert_eq!(daemon.end(), Some(0));
    let content = || -> BTreeMap<PathBuf, Vec<u8>> {
        files_below(&store).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    };
    let kept = content();
    let restore = || {
        for path in files_below(&store) {
            fs::remove_file(path).unwrap();
        }
        for (path, bytes) in &kept {
            fs::write(path, bytes).unwrap();
            give(host, path);
        }
    };
    let database =
        kept.iter().max_by_key(|(_, bytes)| bytes.starts_with(b"SQLite format 3")).unwrap().0.clone();
    let edit = |at: u64, bytes: &[u8]| {
        // What the log ahead of the database holds would stand before the edit. A store that was closed needs no log.
        for path in files_below(&store) {
            if path.to_string_lossy().ends_with("-wal") || path.to_string_lossy().ends_with("-shm") {
                fs::remove_file(path).unwrap();
            }
        }
        fs::File::options().write(true).open(&database).unwrap().write_all_at(bytes, at).unwrap();
    };
    // The user version of an SQLite database stands at byte 60.
    edit(60, &999_u32.to_be_bytes());
    let newer = fs::read(&database).unwrap();
    refuses(80, "STORE_TOO_NEW");
    assert_eq!(fs::read(&database).unwrap(), newer, "a store of a newer release was changed");
    restore();
    // A database that is none.
    edit(0, b"something else..");
    refuses(77, "STORE_DAMAGED");
    restore();
    // Bytes of an event: the daemon either does not start, or says so when it is asked to verify.
    let bytes = &kept[&database];
    let at = bytes.windows(9).rposition(|window| window == b"succeeded").unwrap();
    edit(at as u64, b"sUcceeded");
    let mut daemon = host.hypervisor.command(host.hypervisor.dir().join("bin/vmkeepd"));
    let mut daemon = daemon.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let ended = until("vmkeepd to start or to refuse", || match daemon.try_wait().unwrap() {
        Some(status) => Some(status.code()),
        None => host.ready().then_some(None),
    });
    match ended {
        None => host.fails(&["audit", "verify"], 77, &["STORE_DAMAGED"]),
        Some(code) => assert_eq!(code, 77),
    }
    let _ = daemon.kill();
    daemon.wait().unwrap();
    restore();
    let _daemon = host.daemon();
    host.ok(&["audit", "verify"]);
    assert_eq!(host.jobs().len(), 1);
    bed.assert_back_home();
}

#[test]
fn a_client_that_is_killed_leaves_its_job_alone_and_two_domains_are_copied_at_once() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let other = Guest::boot(&host.hypervisor, &large("web2")).unwrap();
    let of_other = disks(&other);
    let daemon = host.daemon();
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "12M"];
    let mut client = host.hypervisor.command(host.hypervisor.dir().join("bin/vmkeep"));
    let mut client = client.args(slow).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let first = until("the job", || host.jobs().first().map(|job| job["id"].as_str().unwrap().to_owned()));
    let second = host.begin(&["snapshot", "web2", "--disk-only", "--bandwidth", "12M"]);
    until("both copies at once", || {
        (copied(host, &first) > MIB && copied(host, &second) > MIB).then_some(())
    });
    client.kill().unwrap();
    client.wait().unwrap();
    // A daemon that stands still for a while is only late.
    signal(daemon.pid(), rustix::process::Signal::STOP);
    bed.guest.wait_more(20).unwrap();
    signal(daemon.pid(), rustix::process::Signal::CONT);
    assert_eq!(ended(host, &first).0, "succeeded");
    assert_eq!(ended(host, &second).0, "succeeded");
    judge(host, &backup_of(host, &first));
    judge(host, &backup_of(host, &second));
    assert_untouched(&other, &of_other);
    assert_untouched(&bed.guest, &bed.own);
}

#[test]
fn a_daemon_that_is_asked_to_end_in_the_middle_goes_on_after_its_next_start() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    let job = in_the_middle(host, &["snapshot", "web1", "--bandwidth", "6M"]);
    let asked = std::time::Instant::now();
    assert_eq!(daemon.end(), Some(0));
    let took = asked.elapsed();
    println!("vmkeepd ended after {took:?}");
    assert!(took.as_secs() < 20, "it took {took:?} to end");
    bed.guest.wait_more(5).unwrap();
    let _daemon = host.daemon();
    assert_eq!(ended(host, &job).0, "succeeded", "{}", host.ok(&["job", "explain", &job]));
    bed.assert_back_home();
    judge(host, &backup_of(host, &job));
    host.ok(&["replay", &job]);
}

#[test]
fn a_job_that_is_cancelled_or_paused_at_any_step_brings_the_guest_home() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    for (kind, step) in [
        ("job_requested", ""),
        ("step_started", "mark"),
        ("step_started", "overlay/vda"),
        ("step_started", "switch"),
        ("step_started", "take"),
        ("step_succeeded", "take"),
        ("step_started", "copy/vda.qcow2"),
        ("step_started", "publish"),
        ("step_succeeded", "publish"),
        ("step_started", "pivot"),
    ] {
        let case = format!("{kind} {step}");
        let job = host.begin(&["snapshot", "web1", "--bandwidth", "4M"]);
        host.reached(&job, kind, step);
        // It may have come to its end meanwhile.
        let cancelled = host.vmkeep(&["job", "cancel", &job, "--reason", "tired of it"]);
        assert!([0, 81].contains(&cancelled.status.code().unwrap()), "{case}: {cancelled:?}");
        let (status, _) = ended(host, &job);
        println!("cancelled at {case}: {status}");
        assert!(["cancelled", "succeeded"].contains(&status.as_str()), "{case}: {status}");
        bed.assert_back_home();
        let backups = host.backups();
        assert_eq!(backups.len(), usize::from(status == "succeeded"), "{case}");
        for backup in backups {
            judge(host, &backup);
            fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
        }
        assert_eq!(files_below(&default_root(host)), Vec::<PathBuf>::new(), "{case}");
        host.ok(&["replay", &job]);
    }
    // Paused: only ever where the guest is at home, and it goes on when it is told to.
    let job = host.begin(&["snapshot", "web1"]);
    host.ok(&["job", "pause", &job, "--for", "1h"]);
    bed.guest.wait_more(20).unwrap();
    if !host.history(&job).iter().any(|row| about(row, "step_started", "take")) {
        for (disk, at) in &host.hypervisor.disk_files_in_qemu(bed.guest.uuid()).unwrap() {
            assert_eq!(at.file, bed.own[disk], "it pauses with the guest on an overlay");
        }
        assert!(!host.job(&job)["ended"].is_string());
        host.ok(&["job", "resume", &job]);
    }
    assert_eq!(ended(host, &job).0, "succeeded");
    bed.assert_back_home();
    judge(host, &backup_of(host, &job));
}

#[test]
fn a_target_that_is_removed_in_the_middle_is_survived() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "8M"]);
    fs::remove_dir_all(default_root(host).join("web1")).unwrap();
    let (status, code) = ended(host, &job);
    assert_eq!(status, "rolled_back", "{}", host.ok(&["job", "explain", &job]));
    assert_ne!(code, 0);
    bed.assert_back_home();
    assert!(host.backups().is_empty());
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    judge(host, &host.backups()[0]);
}

#[test]
fn a_domain_that_is_undefined_or_ends_in_the_middle_loses_nothing() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "8M"];
    // Pulled out in the middle of the copy, and started again by somebody faster than any daemon.
    let job = in_the_middle(host, &slow);
    bed.guest.destroy().unwrap();
    bed.guest.start().unwrap();
    let (status, _) = ended(host, &job);
    println!("ended and started again: {status}\n{}", host.ok(&["job", "explain", &job]));
    bed.guest.wait_more(5).unwrap();
    bed.assert_back_home();
    // And left off.
    let job = in_the_middle(host, &slow);
    bed.guest.destroy().unwrap();
    let (status, _) = ended(host, &job);
    println!("ended: {status}\n{}", host.ok(&["job", "explain", &job]));
    assert_eq!(disks(&bed.guest), bed.own);
    assert_eq!(files_below(&host.hypervisor.images()), bed.images);
    bed.guest.start().unwrap();
    bed.guest.wait_more(5).unwrap();
    bed.assert_back_home();
    for backup in host.backups() {
        judge(host, &backup);
    }
}

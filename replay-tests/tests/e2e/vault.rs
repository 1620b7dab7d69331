//! Backups into a vault: what a guest's disks held at one instant comes back byte for byte, an incremental one reads what has
//! changed, and the guest never leaves its own images.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB, images_equal};
use rustix::process::Signal;
use serde_json::Value;

use crate::holds::frozen;
use crate::killed::at_every_boundary;
use crate::support::bed::{Bed, configure, folder, give, large, refused, small};
use crate::support::mount::Mount;
use crate::support::strace::Connections;
use crate::support::{Host, about, assert_ticks, assert_untouched, files_below, run, signal, until};
use crate::vault_attacks::read;

/// A host with an empty vault, and a guest on it.
pub(crate) fn bed(spec: &GuestSpec) -> Bed {
    let host = Host::new();
    let place = folder(&host, &host.hypervisor.dir().join("state/vault"));
    configure(&host, &format!("[vaults.main]\nurl = \"file://{}\"\n", place.display()));
    host.ok(&["vault", "init", "main", "--plain"]);
    Bed::boot_on(host, None, spec)
}

/// The disks of a guest that stands still, as they are.
pub(crate) fn recorded(bed: &Bed, name: &str) -> BTreeMap<String, PathBuf> {
    let into = bed.host.hypervisor.dir().join("state").join(name);
    std::fs::create_dir_all(&into).unwrap();
    let copy = |(target, path): (&String, &PathBuf)| {
        let raw = into.join(format!("{target}.raw"));
        let format = replay_tests::testbed::image_info(path).unwrap().format;
        let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
        run("qemu-img", &["convert", "-U", "-f", &format, "-O", "raw", from, to]);
        (target.clone(), raw)
    };
    bed.own.iter().map(copy).collect()
}

/// A backup of a guest that is stopped for the time of its begin, and its disks as they were then.
pub(crate) fn backed_up(bed: &Bed, name: &str, more: &[&str]) -> (Value, BTreeMap<String, PathBuf>) {
    bed.guest.virsh("suspend", &[]).unwrap();
    let then = recorded(bed, name);
    let job = bed.host.begin(&[&["backup", "web1"], more].concat());
    bed.host.reached(&job, "step_succeeded", "begin");
    bed.guest.virsh("resume", &[]).unwrap();
    let row = bed.host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{}", bed.host.story(&job));
    (row, then)
}

/// Whether a backup holds exactly these disks.
pub(crate) fn holds(bed: &Bed, job: &Value, name: &str, then: &BTreeMap<String, PathBuf>) {
    let to = folder(&bed.host, &bed.host.hypervisor.dir().join("state/exports")).join(name);
    let id = job["id"].as_str().unwrap();
    bed.host.ok(&["vault", "export", "main", id, "--to", to.to_str().unwrap()]);
    for (target, raw) in then {
        let exported = find(&to, target);
        assert_eq!(images_equal(&exported, raw).unwrap(), Ok(()), "{target} of {name}");
    }
}

/// The exported file of a disk.
pub(crate) fn find(folder: &Path, target: &str) -> PathBuf {
    let files = crate::support::files_below(folder);
    let named = |path: &&PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.contains(target) && name.ends_with(".raw"))
    };
    files.iter().find(named).cloned().unwrap_or_else(|| panic!("no {target} among {files:?}"))
}

/// What the step has said of a disk.
pub(crate) fn disk_of(host: &Host, job: &Value, target: &str) -> Value {
    let history = host.history(job["id"].as_str().unwrap());
    let read = history.iter().find(|row| about(row, "step_succeeded", "read")).unwrap();
    let disks = read["event"]["body"]["data"]["output"]["disks"].as_array().unwrap();
    disks.iter().map(|disk| &disk["disk"]).find(|disk| disk["target"] == target).unwrap().clone()
}

pub(crate) fn checkpoints(bed: &Bed) -> Vec<String> {
    bed.guest.virsh("checkpoint-list", &["--name"]).unwrap().split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_running_guest_is_backed_up_again_and_again_and_each_backup_comes_back_byte_for_byte() {
    let bed = bed(&small("web1"));
    let _daemon = bed.host.daemon();
    let (first, then) = backed_up(&bed, "first", &[]);
    holds(&bed, &first, "first", &then);
    assert_eq!(checkpoints(&bed).len(), 1);
    assert_untouched(&bed.guest, &bed.own);
    bed.guest.send("fill vda 9M 1M 7").unwrap();
    let (second, after) = backed_up(&bed, "second", &[]);
    let (whole, changed) = (disk_of(&bed.host, &first, "vda"), disk_of(&bed.host, &second, "vda"));
    assert_eq!(changed["unchanged_since"], first["id"].as_str().unwrap().replace('-', ""));
    let (before, now) = (whole["dirty"].as_u64().unwrap(), changed["dirty"].as_u64().unwrap());
    assert!(now * 4 < before, "an incremental backup read {now} bytes, the first {before}");
    holds(&bed, &second, "second", &after);
    holds(&bed, &first, "first again", &then);
    assert_eq!(checkpoints(&bed).len(), 2, "the full backup's, for a differential one, and the newest");
    let (third, later) = backed_up(&bed, "third", &["--differential"]);
    assert_eq!(
        disk_of(&bed.host, &third, "vda")["unchanged_since"],
        first["id"].as_str().unwrap().replace('-', "")
    );
    holds(&bed, &third, "third", &later);
    let (fourth, last) = backed_up(&bed, "fourth", &["--full"]);
    assert_eq!(disk_of(&bed.host, &fourth, "vda")["unchanged_since"], Value::Null);
    holds(&bed, &fourth, "fourth", &last);
    assert_eq!(checkpoints(&bed).len(), 1);
    bed.assert_back_home();
}

#[test]
fn vmkeepd_killed_in_the_middle_goes_on_with_the_same_point_in_time() {
    let bed = bed(&large("web1"));
    let daemon = bed.host.daemon();
    bed.guest.virsh("suspend", &[]).unwrap();
    let then = recorded(&bed, "then");
    let job = bed.host.begin(&["backup", "web1", "--bandwidth", "8M"]);
    bed.host.reached(&job, "step_started", "read");
    bed.guest.virsh("resume", &[]).unwrap();
    bed.guest.wait_more(3).unwrap();
    daemon.kill();
    bed.guest.send("fill vda 60M 1M 7").unwrap();
    let _daemon = bed.host.daemon();
    let row = bed.host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{}", bed.host.story(&job));
    holds(&bed, &row, "then", &then);
    bed.assert_back_home();
}

#[test]
fn a_guest_that_is_shut_down_in_the_middle_loses_only_the_backup() {
    let bed = bed(&large("web1"));
    let _daemon = bed.host.daemon();
    let job = bed.host.begin(&["backup", "web1", "--bandwidth", "4M"]);
    bed.host.reached(&job, "step_started", "read");
    bed.guest.shutdown().unwrap();
    let row = bed.host.settled(&job);
    assert_eq!(failed(&bed.host, &job), "POINT_IN_TIME_LOST", "{row:#}");
    bed.guest.start().unwrap();
    bed.guest.wait_more(3).unwrap();
    let (again, then) = backed_up(&bed, "again", &[]);
    holds(&bed, &again, "again", &then);
    bed.assert_back_home();
}

#[test]
fn a_qemu_that_is_killed_leaves_bitmaps_that_nobody_believes() {
    let bed = bed(&small("web1"));
    let _daemon = bed.host.daemon();
    let (first, _) = backed_up(&bed, "first", &[]);
    let boots = bed.guest.boots();
    bed.host.hypervisor.kill_qemu("web1").unwrap();
    bed.guest.wait_state("shut off").unwrap();
    bed.guest.start().unwrap();
    bed.guest.wait_up(boots).unwrap();
    let (second, then) = backed_up(&bed, "second", &[]);
    let disk = disk_of(&bed.host, &second, "vda");
    assert_eq!(disk["unchanged_since"], Value::Null);
    assert!(disk["whole_because"].as_str().unwrap().contains("bitmap"), "{disk:#}");
    holds(&bed, &second, "second", &then);
    assert_ne!(first["id"], second["id"]);
    bed.assert_back_home();
}

#[test]
fn a_libvirtd_that_is_killed_in_the_middle_costs_the_backup_nothing() {
    let bed = bed(&large("web1"));
    let _daemon = bed.host.daemon();
    bed.guest.virsh("suspend", &[]).unwrap();
    let then = recorded(&bed, "then");
    let job = bed.host.begin(&["backup", "web1", "--bandwidth", "8M"]);
    bed.host.reached(&job, "step_started", "read");
    bed.guest.virsh("resume", &[]).unwrap();
    bed.host.hypervisor.kill_libvirtd().unwrap();
    bed.host.hypervisor.start_libvirtd().unwrap();
    let row = bed.host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{}", bed.host.story(&job));
    holds(&bed, &row, "then", &then);
    bed.assert_back_home();
}

/// Its scratch files grow as long as it lasts, and nobody looks after them once all is read.
#[test]
fn a_guest_that_cannot_be_thawed_does_not_keep_the_backup_job_open() {
    let bed = bed(&small("web1").disk(DiskSpec::new(32 * MIB).ext4()).agent());
    let args = ["backup", "web1", "--quiesce"];
    let daemon = bed.host.daemon();
    let clean = bed.host.settled(&bed.host.begin(&args));
    let clean = bed.host.history(clean["id"].as_str().unwrap());
    daemon.end();
    let begun = clean.iter().position(|row| about(row, "step_succeeded", "begin")).unwrap();
    let mut doomed = bed.host.daemon_that_dies(Some(&format!("append/after/backup/{}", begun + 1)));
    bed.host.until_ready();
    let _ = bed.host.vmkeep(&[&args[..], &["--no-wait"]].concat());
    doomed.dies_or(|| false);
    assert!(frozen(&bed.guest));
    bed.guest.send("sh kill -STOP $(pidof qemu-ga)").unwrap();

    let _daemon = bed.host.daemon();
    let jobs = bed.host.json(&["jobs", "--workflow", "backup", "--limit", "1"]);
    let job = jobs[0]["id"].as_str().unwrap();
    bed.host.reached(job, "step_succeeded", "end");
    let history = bed.host.history(job);
    for later in [("step_succeeded", "thaw"), ("step_started", "commit")] {
        assert!(
            !history.iter().any(|row| about(row, later.0, later.1)),
            "{later:?}: {}",
            bed.host.story(job)
        );
    }
    bed.guest.send("sh kill -CONT $(pidof qemu-ga)").unwrap();
    assert_eq!(bed.host.settled(job)["status"], "succeeded", "{}", bed.host.story(job));
    assert!(!frozen(&bed.guest));
    bed.assert_back_home();
}

#[test]
fn a_cancelled_backup_leaves_neither_a_job_nor_a_checkpoint() {
    let bed = bed(&large("web1"));
    let _daemon = bed.host.daemon();
    let job = bed.host.begin(&["backup", "web1", "--bandwidth", "4M"]);
    bed.host.reached(&job, "step_started", "read");
    bed.host.ok(&["job", "cancel", &job]);
    let row = bed.host.settled(&job);
    assert_eq!(row["status"], "cancelled", "{}", bed.host.story(&job));
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    assert!(bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None"));
    let leases = bed.host.json(&["vault", "leases", "main"]);
    assert_eq!(leases, Value::Array(Vec::new()), "somebody still uses the vault");
    bed.assert_back_home();
}

#[test]
fn a_transient_domain_is_backed_up_into_a_vault() {
    let bed = bed(&small("web1"));
    let _daemon = bed.host.daemon();
    bed.guest.virsh("undefine", &["--keep-nvram"]).unwrap();
    let (job, then) = backed_up(&bed, "then", &[]);
    holds(&bed, &job, "then", &then);
    assert_untouched_by_qemu(&bed);
}

/// Of a transient domain there is no definition to ask.
fn assert_untouched_by_qemu(bed: &Bed) {
    let now: BTreeMap<String, PathBuf> = bed
        .host
        .hypervisor
        .disk_files_in_qemu("web1")
        .unwrap()
        .into_iter()
        .map(|(target, disk)| (target, disk.file))
        .collect();
    assert_eq!(now, bed.own);
    until("the guest to run", || (bed.guest.state().unwrap().state == "running").then_some(()));
}

#[test]
fn a_domain_that_is_off_is_backed_up_whoever_starts_it_and_its_bitmaps_stay_good() {
    let bed = bed(&large("web1"));
    let _daemon = bed.host.daemon();
    let (first, _) = backed_up(&bed, "first", &[]);
    bed.guest.shutdown().unwrap();
    let then = recorded(&bed, "off");
    let row = bed.host.begin(&["backup", "web1"]);
    let row = bed.host.settled(&row);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    holds(&bed, &row, "off", &then);
    // Started in the middle, it writes to its overlays, and is off again before they are committed.
    let job = bed.host.begin(&["backup", "web1", "--bandwidth", "8M"]);
    bed.host.reached(&job, "step_started", "read");
    let boots = bed.guest.boots();
    bed.guest.start().unwrap();
    bed.guest.wait_up(boots).unwrap();
    bed.guest.send("fill vda 60M 1M 7").unwrap();
    bed.guest.shutdown().unwrap();
    let row = bed.host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{}", bed.host.story(&job));
    holds(&bed, &row, "started meanwhile", &then);
    assert_untouched_when_off(&bed);
    let boots = bed.guest.boots();
    bed.guest.start().unwrap();
    bed.guest.wait_up(boots).unwrap();
    // The bitmap of the first backup's checkpoint has seen all of it.
    let (last, now) = backed_up(&bed, "last", &[]);
    assert_eq!(
        disk_of(&bed.host, &last, "vda")["unchanged_since"],
        first["id"].as_str().unwrap().replace('-', "")
    );
    holds(&bed, &last, "last", &now);
    bed.assert_back_home();
}

/// The definition names the domain's own images, and nothing lies beside them.
fn assert_untouched_when_off(bed: &Bed) {
    assert_eq!(bed.host.hypervisor.disk_files_in_inactive_xml("web1").unwrap(), bed.own);
    assert_eq!(files_below(&bed.host.hypervisor.images()), bed.images);
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_backup_of_a_domain_that_is_off_leaves_it_whole_or_gone() {
    let bed = bed(&small("web1"));
    bed.guest.shutdown().unwrap();
    let then = recorded(&bed, "off");
    at_every_boundary("before", "backup", &bed.host, &["backup", "web1"], |case, row| {
        let status = row["status"].as_str().unwrap();
        assert!(["succeeded", "rolled_back"].contains(&status), "{case}: {row:#}");
        assert_untouched_when_off(&bed);
        if status == "succeeded" {
            holds(&bed, row, &case.replace(' ', "-"), &then);
        }
    });
}

/// A guest on a small file system, which its scratch files share.
pub(crate) fn cramped() -> Option<Bed> {
    let host = Host::new();
    let mount = Mount::new(&host, "guests", 700)?;
    let place = folder(&host, &host.hypervisor.dir().join("state/vault"));
    configure(&host, &format!("[vaults.main]\nurl = \"file://{}\"\n", place.display()));
    host.ok(&["vault", "init", "main", "--plain"]);
    let spec = GuestSpec::new("web1")
        .disk(DiskSpec::new(128 * MIB).data(48 * MIB).at(&mount.0.join("a.qcow2")))
        .disk(DiskSpec::new(32 * MIB).raw().at(&mount.0.join("b.raw")));
    Some(Bed::boot_on(host, Some(mount), &spec))
}

#[test]
fn a_backup_is_ended_while_there_is_still_room_for_what_the_guest_overwrites() {
    let Some(bed) = cramped() else { return };
    let (host, mount) = (&bed.host, bed.mount());
    let _daemon = host.daemon();
    let before = files_below(&mount.0);
    let job = host.begin(&["backup", "web1", "--bandwidth", "4M"]);
    host.reached(&job, "step_started", "read");
    mount.fill(200 * MIB);
    host.settled(&job);
    assert_eq!(failed(host, &job), "SCRATCH_RAN_LOW", "{}", host.story(&job));
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    refused(host, &["backup", "web1"], 47, &["NOT_ENOUGH_DISK_SPACE", mount.0.to_str().unwrap()]);
    mount.clear();
    assert_eq!(files_below(&mount.0), before, "no scratch file is left");
    bed.guest.wait_more(3).unwrap();
    assert_untouched(&bed.guest, &bed.own);
}

#[test]
fn a_guest_that_its_scratch_file_has_stopped_runs_again_as_soon_as_vmkeepd_can_act() {
    let Some(bed) = cramped() else { return };
    let (host, mount) = (&bed.host, bed.mount());
    let daemon = host.daemon();
    let job = host.begin(&["backup", "web1", "--bandwidth", "4M"]);
    host.reached(&job, "step_started", "read");
    until("some of it to be read", || (read(host, &job).0 > 0).then_some(()));
    signal(daemon.pid(), Signal::STOP);
    mount.fill(0);
    bed.guest.wait_state("paused").unwrap();
    signal(daemon.pid(), Signal::CONT);
    bed.guest.wait_state("running").unwrap_or_else(|e| panic!("{e}\n{}", host.story(&job)));
    host.settled(&job);
    let why = failed(host, &job);
    assert!(["POINT_IN_TIME_LOST", "SCRATCH_RAN_LOW"].contains(&why.as_str()), "{}", host.story(&job));
    mount.clear();
    bed.guest.wait_more(5).unwrap();
    assert_untouched(&bed.guest, &bed.own);
}

/// QEMU never answers again when a pull is ended while a client is in its handshake (STEPS.md, E30).
#[test]
fn a_scratch_file_that_is_full_while_vmkeepd_connects_costs_the_guest_nothing() {
    let Some(bed) = cramped() else { return };
    let (host, mount) = (&bed.host, bed.mount());
    let daemon = host.daemon();
    let slow = Connections::held_up(daemon.pid(), Duration::from_millis(800));
    let job = host.begin(&["backup", "web1"]);
    until("vmkeepd to connect to the export", || slow.has_begun(".nbd").then_some(()));
    mount.fill(0);
    host.settled(&job);
    let why = failed(host, &job);
    assert!(["POINT_IN_TIME_LOST", "SCRATCH_RAN_LOW"].contains(&why.as_str()), "{}", host.story(&job));
    drop(slow);
    mount.clear();
    bed.guest.wait_state("running").unwrap_or_else(|e| panic!("{e}\n{}", host.story(&job)));
    bed.guest.wait_more(5).unwrap();
    assert_untouched(&bed.guest, &bed.own);
}

#[test]
fn what_somebody_else_backs_up_or_is_secret_is_refused_and_nothing_is_touched() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    bed.refused(
        &["backup", "web1", "--vault", "nowhere"],
        32,
        &["CANNOT_FIND_CONFIGURATION_ENTRY", "nowhere"],
    );
    bed.refused(&["backup", "web1", "--disks", "vdz"], 92, &["NO_SUCH_DISK", "vdz"]);
    let order = host.hypervisor.dir().join("state/theirs.xml");
    let socket = host.hypervisor.dir().join("state/theirs.nbd");
    let scratch = host.hypervisor.images().join("theirs");
    let xml = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks><disk name='vda' backup='yes' type='file'>\
         <driver type='qcow2'/><scratch file='{}'/></disk><disk name='vdb' backup='no'/></disks></domainbackup>",
        socket.display(),
        scratch.display()
    );
    std::fs::write(&order, xml).unwrap();
    give(host, &order);
    bed.guest.virsh("backup-begin", &["--backupxml", order.to_str().unwrap()]).unwrap();
    refused(host, &["backup", "web1"], 88, &["DOMAIN_BUSY_ELSEWHERE", "backup"]);
    assert!(!bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None"), "theirs goes on");
    bed.guest.virsh("domjobabort", &[]).unwrap();
    bed.assert_back_home();
}

#[test]
fn a_secret_goes_only_into_an_encrypted_vault_unless_that_is_allowed() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let secret = [
        "--uri",
        "urn:test:secret",
        "--key",
        "s",
        "--set",
        "<login passwd='hunter2'/>",
        "--live",
        "--config",
    ];
    bed.guest.virsh("metadata", &secret).unwrap();
    let job = host.begin(&["backup", "web1"]);
    host.settled(&job);
    assert_eq!(failed(host, &job), "PLAINTEXT_REFUSED", "{}", host.story(&job));
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    host.ok(&["backup", "web1", "--allow-plaintext"]);
    let place = folder(host, &host.hypervisor.dir().join("state/sealed"));
    let address = format!("file://{}", place.display());
    let [key, words] =
        ["key", "words"].map(|name| host.hypervisor.dir().join("state").join(name).display().to_string());
    host.ok(&["vault", "init", &address, "--key-file", &key, "--recovery-file", &words]);
    host.ok(&["vault", "copy", "main", &address, "--other-key-file", &key]);
    let listed = host.json(&["vault", "list", &address, "--key-file", &key]);
    assert!(listed.to_string().contains("web1"), "{listed:#}");
}

#[test]
fn a_backup_job_that_qemu_refuses_leaves_nothing_and_is_not_begun_twice() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let socket = host.hypervisor.dir().join("state/theirs.nbd");
    // QEMU has one NBD server, and this one is somebody's.
    let server = serde_json::json!({ "execute": "nbd-server-start", "arguments": {
        "addr": { "type": "unix", "data": { "path": socket } } } });
    bed.guest.virsh("qemu-monitor-command", &[&server.to_string()]).unwrap();
    let job = host.begin(&["backup", "web1"]);
    host.settled(&job);
    assert_eq!(failed(host, &job), "CANNOT_BEGIN_PULL", "{}", host.story(&job));
    let begun = host.history(&job).iter().filter(|row| about(row, "step_started", "begin")).count();
    assert_eq!(begun, 1);
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    bed.assert_back_home();
    let stop = serde_json::json!({ "execute": "nbd-server-stop" });
    bed.guest.virsh("qemu-monitor-command", &[&stop.to_string()]).unwrap();
    host.ok(&["backup", "web1"]);
}

#[test]
fn a_backup_job_of_a_qemu_that_does_not_answer_is_ended_when_it_does() {
    let bed = bed(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = host.begin(&["backup", "web1", "--bandwidth", "4M"]);
    host.reached(&job, "step_started", "read");
    let qemu = host.hypervisor.qemu("web1").unwrap();
    signal(qemu.id.pid, Signal::STOP);
    host.ok(&["job", "cancel", &job]);
    until("the end to be tried in vain", || {
        let history = host.history(&job);
        let failed = history.iter().find(|row| about(row, "step_failed", "end"))?;
        assert_eq!(failed["event"]["body"]["data"]["fault"]["code"], 224, "CANNOT_END_PULL: {failed:#}");
        Some(())
    });
    signal(qemu.id.pid, Signal::CONT);
    assert_eq!(host.settled(&job)["status"], "cancelled", "{}", host.story(&job));
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    bed.guest.wait_more(3).unwrap();
    bed.assert_back_home();
}

/// Why a job went back: the name of its code.
fn failed(host: &Host, job: &str) -> String {
    let row = host.settled(job);
    assert_eq!(row["status"], "rolled_back", "{}", host.story(job));
    row["fault"]["name"].as_str().unwrap().to_owned()
}

/// What holds whenever a backup is over, however it went.
pub(crate) fn judge(bed: &Bed, case: &str, row: &Value) {
    let (host, status) = (&bed.host, row["status"].as_str().unwrap());
    assert!(["succeeded", "rolled_back"].contains(&status), "{case}: {row:#}");
    bed.assert_back_home();
    assert!(bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None"), "{case}: a job is left");
    let listed = host.json(&["vault", "list", "main"]).to_string();
    for checkpoint in checkpoints(bed) {
        let made_with = checkpoint.rsplit('-').next().unwrap();
        assert!(listed.contains(made_with), "{case}: checkpoint {checkpoint} of no backup");
    }
    host.ok(&["vault", "check", "main"]);
    if status == "succeeded" {
        let to = folder(host, &host.hypervisor.dir().join("state/exports")).join(case.replace(' ', "-"));
        let id = row["id"].as_str().unwrap();
        host.ok(&["vault", "export", "main", id, "--to", to.to_str().unwrap()]);
        assert_ticks(&find(&to, "vda"), &find(&to, "vdb"));
        std::fs::remove_dir_all(to).unwrap();
    }
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_backup_leaves_it_whole_or_gone_and_the_guest_alone() {
    let bed = bed(&small("web1"));
    at_every_boundary("before", "backup", &bed.host, &["backup", "web1"], |case, row| judge(&bed, case, row));
}

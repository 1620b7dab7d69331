//! Machines with UEFI variables and an emulated TPM: what they keep outside their disks is backed up, restored to a new
//! domain, and exchanged with the machine whose place a backup takes.

use std::path::{Path, PathBuf};

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};
use serde_json::Value;

use crate::killed::at_every_boundary;
use crate::support::bed::define;
use crate::support::{Host, files_below, until};

/// Where libvirt keeps firmware variables (`nvram`) and the state of TPMs (`swtpm`).
pub(crate) fn own_folder(host: &Host, what: &str) -> PathBuf {
    let below = match (host.hypervisor.uri(), what) {
        ("qemu:///system", "nvram") => "system/lib/qemu",
        ("qemu:///system", _) => "system/lib",
        _ => "config/libvirt/qemu",
    };
    host.hypervisor.dir().join(below).join(what)
}

/// A machine with UEFI and a TPM, started so that both have a state; its own files of them.
pub(crate) fn sealed(host: &Host) -> (Guest, PathBuf, PathBuf) {
    let plain = || DiskSpec::new(16 * MIB).plain();
    let tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";
    let spec = GuestSpec::new("sealed").disk(plain()).disk(plain().raw()).extra_devices(tpm);
    let guest = Guest::define(&host.hypervisor, &spec).unwrap();
    let xml = guest.virsh("dumpxml", &["--inactive"]).unwrap();
    let firmware = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>\
                    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/></os>";
    define(host, &xml.replace("</os>", firmware));
    host.hypervisor.virsh(["start", "--domain", "sealed"]).unwrap();
    let variables = own_folder(host, "nvram").join("sealed_VARS.fd");
    let state = own_folder(host, "swtpm").join(guest.uuid()).join("tpm2/tpm2-00.permall");
    (guest, variables, state)
}

#[test]
fn firmware_variables_and_a_tpms_state_are_kept_and_a_copy_gets_its_own() {
    let host = Host::new();
    let (guest, variables, state) = sealed(&host);
    let template = std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").unwrap();
    until("the firmware to write its variables", || {
        (std::fs::read(&variables).unwrap() != template).then_some(())
    });
    let _daemon = host.daemon();
    guest.virsh("autostart", &[]).unwrap();
    host.ok(&["snapshot", "sealed"]);
    guest.destroy().unwrap();
    host.ok(&["snapshot", "sealed"]);
    let folder = host.hypervisor.dir().join("state/vmkeep/restored");
    let backups = host.backups();
    assert_eq!(backups.iter().map(|b| b["memory"] == true).collect::<Vec<_>>(), [false, true]);
    for backup in &backups {
        host.ok(&["verify", backup["id"].as_str().unwrap()]);
    }
    // Of the one that is off both are of the instant.
    let off = backups[0]["id"].as_str().unwrap();
    let manifest = host.json(&["show", off])["manifest"].clone();
    assert_eq!(manifest["min_reader"], 2);
    for what in ["nvram", "tpm"] {
        assert_eq!(manifest[what]["at_instant"], true, "{manifest:#}");
    }
    assert_eq!(manifest["autostart"], true, "{manifest:#}");
    host.ok(&["restore", off, "--as", "copy"]);
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    assert!(!copy.virsh("dominfo", &[]).unwrap().contains("Autostart:      enable"));
    let own = folder.join("copy/copy_VARS.fd");
    assert_eq!(std::fs::read(&own).unwrap(), std::fs::read(&variables).unwrap());
    let of_copy = state.parent().unwrap().parent().unwrap().with_file_name(copy.uuid());
    let of_copy = of_copy.join("tpm2/tpm2-00.permall");
    assert_eq!(std::fs::read(&of_copy).unwrap(), std::fs::read(&state).unwrap());
    host.hypervisor.virsh(["start", "--domain", "copy"]).unwrap();
    let live = copy.virsh("dumpxml", &[]).unwrap();
    assert!(live.contains(own.to_str().unwrap()), "{live}");
    // With memory, beside the original.
    guest.virsh("start", &[]).unwrap();
    let warm = backups[1]["id"].as_str().unwrap();
    host.ok(&["restore", warm, "--as", "warm", "--start", "--autostart"]);
    let warm = Guest::attach(&host.hypervisor, "warm").unwrap();
    assert!(warm.virsh("dominfo", &[]).unwrap().contains("Autostart:      enable"));
    assert_eq!(warm.state().unwrap().state, "running");
    assert!(warm.virsh("dumpxml", &[]).unwrap().contains("warm_VARS.fd"));
}

/// What a machine keeps outside its disks, with where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outside {
    variables: (PathBuf, Vec<u8>),
    tpm: Vec<u8>,
}

/// A machine that is off, a backup of it, and how it has moved on since.
struct Moved {
    host: Host,
    guest: Guest,
    state: PathBuf,
    backup: String,
    then: Outside,
    now: Outside,
    /// The persistent definition, and all files beside the images.
    definition: Vec<String>,
    images: Vec<PathBuf>,
}

fn definition(guest: &Guest) -> Vec<String> {
    let text = guest.virsh("dumpxml", &["--inactive"]).unwrap();
    // libvirt leaves an empty element behind where the marker was.
    text.lines().filter(|line| line.trim() != "<metadata/>").map(str::to_owned).collect()
}

fn variables_of(guest: &Guest) -> PathBuf {
    let lines = definition(guest);
    let line = lines.iter().find(|line| line.contains("<nvram")).unwrap();
    let (_, rest) = line.split_once('>').unwrap();
    match rest.split('<').next().unwrap() {
        // Left to libvirt.
        "" => guest.hypervisor().dir().join("config/libvirt/qemu/nvram/sealed_VARS.fd"),
        path => path.into(),
    }
}

impl Moved {
    fn new() -> Self {
        let host = Host::new();
        let (guest, variables, state) = sealed(&host);
        until("the TPM to have a state", || state.exists().then_some(()));
        guest.destroy().unwrap();
        let daemon = host.daemon();
        host.ok(&["snapshot", "sealed"]);
        daemon.end();
        let backup = {
            let _daemon = host.daemon();
            host.backups()[0]["id"].as_str().unwrap().to_owned()
        };
        // The last bytes of the file are spare: the firmware does not look at them.
        let mut bytes = std::fs::read(&variables).unwrap();
        let then =
            Outside { variables: (variables.clone(), bytes.clone()), tpm: std::fs::read(&state).unwrap() };
        let end = bytes.len() - 4;
        bytes[end..].copy_from_slice(b"then");
        std::fs::write(&variables, &bytes).unwrap();
        std::fs::write(&state, b"of a later day").unwrap();
        let now = Outside { variables: (variables, bytes), tpm: b"of a later day".to_vec() };
        let (definition, images) = (definition(&guest), files_below(&host.hypervisor.images()));
        Self { host, guest, state, backup, then, now, definition, images }
    }

    fn seen(&self) -> Outside {
        let path = variables_of(&self.guest);
        let bytes = std::fs::read(&path).unwrap();
        Outside { variables: (path, bytes), tpm: std::fs::read(&self.state).unwrap() }
    }

    /// The machine of the backup, with a file of variables of its own, and the old one's as it was.
    fn assert_restored(&self, case: &str) {
        let seen = self.seen();
        assert_eq!(seen.variables.1, self.then.variables.1, "{case}: variables");
        assert_eq!(seen.tpm, self.then.tpm, "{case}: TPM");
        assert_ne!(seen.variables.0, self.now.variables.0, "{case}");
        assert_eq!(
            read(&self.now.variables.0),
            self.now.variables.1,
            "{case}: the old variables are as they were"
        );
    }

    fn assert_as_it_was(&self, case: &str) {
        assert_eq!(self.seen(), self.now, "{case}");
        assert_eq!(definition(&self.guest), self.definition, "{case}");
    }

    fn assert_nothing_kept(&self, case: &str) {
        assert_eq!(self.host.json(&["status"])["kept"], Value::Array(Vec::new()), "{case}");
        assert_eq!(files_below(&self.host.hypervisor.images()), self.images, "{case}");
        assert_eq!(files_below(&self.host.restored().join("kept")), Vec::<PathBuf>::new(), "{case}");
    }

    fn done(&self, args: &[&str]) -> String {
        let job = self.host.begin(args);
        let row = self.host.settled(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}\n{}", self.host.log());
        self.host.ok(&["replay", &job]);
        job
    }
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn variables_and_a_tpms_state_change_place_with_the_disks_and_come_back() {
    let moved = Moved::new();
    let _daemon = moved.host.daemon();
    let job = moved.done(&["restore", &moved.backup, "--in-place"]);
    moved.assert_restored("restored");
    let new = variables_of(&moved.guest);
    let undo = moved.done(&["restore", "--undo", &job]);
    moved.assert_as_it_was("undone");
    assert_eq!(read(&new), moved.then.variables.1, "what was there meanwhile is kept in turn");
    let back = moved.done(&["restore", "--undo", &undo]);
    moved.assert_restored("undone twice");
    moved.done(&["restore", "--undo", &back]);
    moved.assert_as_it_was("undone three times");
    for kept in moved.host.json(&["status"])["kept"].as_array().unwrap() {
        moved.done(&["restore", "--discard", kept["job"].as_str().unwrap()]);
    }
    assert!(!new.exists(), "discarded with the machine that they are of");
    moved.assert_nothing_kept("discarded");
    moved.assert_as_it_was("discarded");
}

#[test]
fn single_disks_leave_variables_and_a_tpms_state_as_they_are() {
    let moved = Moved::new();
    let _daemon = moved.host.daemon();
    let job = moved.done(&["restore", &moved.backup, "--in-place", "--disks", "vda", "--cold"]);
    assert_eq!(moved.seen(), moved.now);
    moved.done(&["restore", "--undo", &job]);
    moved.assert_as_it_was("undone");
}

fn exchange_killed(side: &str) {
    let moved = Moved::new();
    let args = ["restore", moved.backup.as_str(), "--in-place"];
    at_every_boundary(side, "restore-in-place", &moved.host, &args, |case, row| {
        if row["status"] == "succeeded" {
            moved.assert_restored(case);
            let undo = moved.done(&["restore", "--undo", row["id"].as_str().unwrap()]);
            moved.done(&["restore", "--discard", &undo]);
        }
        moved.assert_as_it_was(case);
        moved.assert_nothing_kept(case);
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_an_exchange_leaves_each_machine_its_own_state() {
    exchange_killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_an_exchange_leaves_each_machine_its_own_state() {
    exchange_killed("after");
}

#[test]
fn a_running_machine_with_a_tpm_is_exchanged_with_its_memory_and_comes_back_running() {
    let host = Host::new();
    let (guest, variables, _) = sealed(&host);
    let _daemon = host.daemon();
    host.ok(&["snapshot", "sealed"]);
    let backup = host.backups().remove(0);
    assert_eq!(backup["memory"], true);
    let done = |args: &[&str]| {
        let job = host.begin(args);
        let row = host.settled(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}\n{}", host.log());
        job
    };
    let plug = ["--destroy", "--shutdown-time", "1s"];
    let job = done(&[&["restore", backup["id"].as_str().unwrap(), "--in-place"][..], &plug].concat());
    assert_eq!(guest.state().unwrap().state, "running");
    let live = guest.virsh("dumpxml", &[]).unwrap();
    let own = variables_of(&guest);
    assert!(own != variables && live.contains(own.to_str().unwrap()), "{live}");
    done(&[&["restore", "--undo", &job][..], &plug].concat());
    assert_eq!(guest.state().unwrap().state, "running");
    assert_eq!(variables_of(&guest), variables);
}

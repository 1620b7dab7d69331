//! Domains that are not fit for a live backup, or cease to be in the middle: on an overlay that nobody accounts for, with
//! snapshots of libvirt's, without a state that could be captured, edited or ended while they are backed up.

use std::fs;
use std::path::PathBuf;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};

use crate::support::bed::*;
use crate::support::{Host, assert_untouched, disks, files_below};

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
    judge_backup(host, &backup);
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
    host.until_ready();
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
    // A TPM whose state is not libvirt's.
    let tpm = "<tpm model='tpm-crb'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>";
    let spec = GuestSpec::new("sealed").disk(plain()).extra_devices(tpm);
    let sealed = Guest::define(&host.hypervisor, &spec).unwrap();
    refuses(&sealed, 94, &["FIRMWARE_STATE_UNSUPPORTED", "sealed", "TPM"]);
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
    for words in ["its TPM is of the kind passthrough", "none of its disks can take part"] {
        assert!(text.contains(words), "{text}");
    }
}

/// What it is on is known to its creator alone: it is refused, and the way that the refusal names leads to a whole backup of it.
#[test]
fn a_transient_domain_is_refused_and_is_backed_up_by_the_way_that_the_refusal_names() {
    let bed = Bed::boot(&small("web1"));
    let (host, guest) = (&bed.host, &bed.guest);
    let _daemon = host.daemon();
    guest.virsh("undefine", &[]).unwrap();
    let persistent = || {
        let info = guest.virsh("dominfo", &[]).unwrap();
        info.lines().any(|line| line.starts_with("Persistent:") && line.ends_with("yes"))
    };
    assert!(!persistent());
    let words = ["DOMAIN_TRANSIENT", "web1", "virsh dumpxml", "virsh define", "virsh undefine"];
    for args in
        [&["snapshot", "web1"][..], &["snapshot", "web1", "--disk-only"], &["snapshot", "web1", "--save"]]
    {
        bed.refused(args, 87, &words);
    }
    assert!(host.ok(&["domains"]).contains("it is transient"));

    let text = guest.virsh("dumpxml", &["--security-info"]).unwrap();
    define(host, &text);
    assert!(persistent());
    host.ok(&["snapshot", "web1"]);
    assert_untouched(guest, &bed.own);
    judge_backup(host, &host.backups().remove(0));
    guest.virsh("undefine", &[]).unwrap();
    assert!(!persistent());
    guest.wait_more(5).unwrap();
    bed.judge_disks();
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
        judge_backup(host, &backup);
    }
}

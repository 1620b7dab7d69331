//! Somebody works on the domain while its guest is on overlays: saves its memory, takes a disk away, plugs one in. What
//! was saved stays usable, what was written stays there, and the backup goes on as soon as it can.

use std::fs;
use std::path::PathBuf;

use replay_tests::testbed::{DiskSpec, Format, GuestSpec, MIB, pattern_on};
use serde_json::Value;

use crate::support::bed::*;
use crate::support::{Host, about, disks, files_below, until};

/// Begins a backup and waits until it is copied and published, the guest on its overlays. It stays there until it is told
/// to merge.
fn on_overlays(bed: &Bed, more: &[&str]) -> String {
    let args = ["snapshot", "web1", "--wait-before", "merge", "--wait-limit", "30m"];
    let job = bed.host.begin(&[&args[..], more].concat());
    bed.host.reached(&job, "signal_awaited", "wait/merge");
    let qemu = bed.host.hypervisor.disk_files_in_qemu(bed.guest.uuid()).unwrap();
    assert!(bed.own.iter().all(|(disk, path)| qemu[disk].file != *path), "{qemu:?}");
    job
}

fn merge(host: &Host, job: &str) {
    host.ok(&["job", "signal", job, "merge"]);
}

fn overlays(bed: &Bed) -> Vec<PathBuf> {
    let of_job = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("vmkeep-");
    files_below(&bed.host.hypervisor.images()).into_iter().filter(of_job).collect()
}

/// The commit has looked, and says why it waits.
fn waits_for(host: &Host, job: &str, words: &str) {
    let fault = until("the job to say what it waits for", || {
        let history = host.history(job);
        let failed = history.iter().find(|row| about(row, "step_failed", "commit/vda"))?;
        Some(failed["event"]["body"]["data"]["fault"].clone())
    });
    assert!(fault["cause"].as_str().unwrap().contains(words), "{fault:#}");
    assert!(fault["remedy"].as_str().unwrap().contains("virsh"), "{fault:#}");
}

/// The guest went on from where it was saved: the same boot, and no tick is missing or came twice.
fn went_on(bed: &Bed, boot: Option<u64>, last: u64) {
    bed.guest.wait_tick(last + 5).unwrap();
    assert_eq!(bed.guest.boot_id(), boot, "it goes on from its memory");
    let ticks = bed.guest.console().ticks();
    let gap = ticks.windows(2).find(|pair| pair[1].number != pair[0].number + 1);
    assert!(gap.is_none(), "{gap:?}");
}

fn ends_well(bed: &Bed, case: &str, job: &str) {
    let row = bed.host.at_rest(job);
    assert_eq!(row["status"], "succeeded", "{case}: {row:#}\n{}", bed.host.ok(&["job", "explain", job]));
    bed.judge(case, &row);
}

#[test]
fn a_managed_save_in_the_middle_is_waited_for_until_it_is_loaded_or_given_up() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    let boot = bed.guest.boot_id();

    let job = on_overlays(&bed, &[]);
    bed.guest.virsh("managedsave", &[]).unwrap();
    let last = bed.guest.last_tick();
    merge(&bed.host, &job);
    waits_for(&bed.host, &job, "managedsave");
    assert_eq!(overlays(&bed).len(), 2, "the saved memory belongs to them");
    bed.guest.virsh("start", &[]).unwrap();
    went_on(&bed, boot, last);
    ends_well(&bed, "saved and started", &job);

    let job = on_overlays(&bed, &["--disk-only"]);
    bed.guest.virsh("managedsave", &[]).unwrap();
    let last = bed.guest.last_tick();
    merge(&bed.host, &job);
    waits_for(&bed.host, &job, "managedsave");
    bed.guest.virsh("managedsave-remove", &[]).unwrap();
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    assert_eq!(disks(&bed.guest), bed.own, "it is off, and starts from its own images");
    assert_eq!(overlays(&bed), Vec::<PathBuf>::new());
    bed.guest.start().unwrap();
    bed.guest.wait_tick(last + 1).unwrap();
    bed.judge("saved and given up", &row);
    bed.judge_disks();
}

#[test]
fn memory_saved_into_a_file_in_the_middle_comes_back_and_the_job_goes_on() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    let boot = bed.guest.boot_id();
    let file = bed.host.hypervisor.dir().join("state/web1.memory");
    let file = file.to_str().unwrap();

    for restarted in [false, true] {
        let job = on_overlays(&bed, &["--disk-only"]);
        bed.guest.virsh("save", &[file]).unwrap();
        let last = bed.guest.last_tick();
        merge(&bed.host, &job);
        waits_for(&bed.host, &job, "virsh save");
        if restarted {
            // It does not know any more why the domain is off.
            bed.host.hypervisor.kill_libvirtd().unwrap();
            bed.host.hypervisor.start_libvirtd().unwrap();
            let failures = || {
                let history = bed.host.history(&job);
                history.iter().filter(|row| about(row, "step_failed", "commit/vda")).count()
            };
            let before = failures();
            until("the job to look again", || (failures() > before + 1).then_some(()));
        }
        assert_eq!(overlays(&bed).len(), 2, "the saved memory belongs to them");
        bed.host.hypervisor.virsh(["restore", file]).unwrap();
        went_on(&bed, boot, last);
        ends_well(&bed, "saved into a file and restored", &job);
    }

    // Or it is given up, by a start from the disks.
    let job = on_overlays(&bed, &["--disk-only"]);
    bed.guest.virsh("save", &[file]).unwrap();
    let last = bed.guest.last_tick();
    merge(&bed.host, &job);
    waits_for(&bed.host, &job, "virsh save");
    bed.guest.virsh("start", &[]).unwrap();
    bed.guest.wait_tick(last + 1).unwrap();
    assert_ne!(bed.guest.boot_id(), boot);
    ends_well(&bed, "saved into a file and started", &job);
    bed.judge_disks();
}

fn with_third_disk() -> GuestSpec {
    small("web1").disk(DiskSpec::new(16 * MIB).raw().plain().data(MIB))
}

fn plug(bed: &Bed, path: &str, format: &str, more: &[&str]) {
    let args = [&[path, "vdc", "--subdriver", format, "--targetbus", "virtio"][..], more].concat();
    bed.guest.virsh("attach-disk", &args).unwrap();
    // libvirt does not wait for the guest to find it.
    until("the guest to see the disk", || bed.guest.send("checksum vdc 0 1M").ok());
}

fn unplug(bed: &Bed, more: &[&str]) {
    bed.guest.virsh("detach-disk", &[&["vdc"][..], more].concat()).unwrap();
    until("the guest to let go of the disk", || {
        let there = bed.host.hypervisor.disk_files_in_qemu(bed.guest.uuid()).unwrap();
        (!there.contains_key("vdc")).then_some(())
    });
}

/// What it wrote last to a disk that was taken away is in that disk's own image, and nowhere else.
#[test]
fn a_disk_that_is_unplugged_in_the_middle_is_committed_and_can_be_plugged_in_again() {
    let bed = Bed::boot(&with_third_disk());
    let _daemon = bed.host.daemon();
    let own = &bed.own["vdc"];
    for (seed, config) in [(7, false), (9, true)] {
        let job = on_overlays(&bed, &["--disk-only"]);
        bed.guest.send(&format!("fill vdc 8M 2M {seed}")).unwrap();
        unplug(&bed, if config { &["--live", "--config"] } else { &["--live"] });
        assert!(
            pattern_on(own, Format::Raw, 8 * MIB, 2 * MIB, seed).unwrap().is_some(),
            "it is in the overlay"
        );
        merge(&bed.host, &job);
        let row = bed.host.at_rest(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}\n{}", bed.host.ok(&["job", "explain", &job]));
        assert_eq!(pattern_on(own, Format::Raw, 8 * MIB, 2 * MIB, seed).unwrap(), None);
        assert_eq!(overlays(&bed), Vec::<PathBuf>::new());
        assert_eq!(disks(&bed.guest).get("vdc"), (!config).then_some(own), "its definition is their owner's");
        plug(&bed, own.to_str().unwrap(), "raw", if config { &["--live", "--config"] } else { &["--live"] });
        bed.guest.send(&format!("check vdc 8M 2M {seed}")).unwrap();
        bed.judge("unplugged", &row);
    }
}

/// Its image without the overlay is not what the guest wrote last. Nothing is removed; the remedy that is named is one.
#[test]
fn a_disk_that_comes_back_without_its_overlay_needs_attention() {
    let bed = Bed::boot(&with_third_disk());
    let _daemon = bed.host.daemon();
    let own = &bed.own["vdc"];
    let job = on_overlays(&bed, &["--disk-only"]);
    bed.guest.send("fill vdc 8M 2M 7").unwrap();
    unplug(&bed, &["--live"]);
    plug(&bed, own.to_str().unwrap(), "raw", &["--live"]);
    merge(&bed.host, &job);
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "needs_attention", "{row:#}");
    let explained = bed.host.ok(&["job", "explain", &job]);
    let overlay = overlays(&bed).into_iter().find(|path| path.to_string_lossy().ends_with("-vdc.qcow2"));
    let overlay = overlay.expect("the only copy of what the guest wrote last");
    assert!(
        explained.contains(overlay.to_str().unwrap()) && explained.contains("attach-disk"),
        "{explained}"
    );

    unplug(&bed, &["--live"]);
    plug(&bed, overlay.to_str().unwrap(), "qcow2", &["--live"]);
    bed.guest.send("check vdc 8M 2M 7").unwrap();
    bed.host.ok(&["job", "settle", &job]);
    until("the job to end", || bed.host.job(&job)["ended"].is_string().then_some(()));
    bed.guest.send("check vdc 8M 2M 7").unwrap();
    assert_eq!(pattern_on(own, Format::Raw, 8 * MIB, 2 * MIB, 7).unwrap(), None);
    bed.judge("plugged in again", &bed.host.job(&job));
}

#[test]
fn a_disk_that_is_plugged_in_in_the_middle_stays() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    let file = bed.host.hypervisor.images().join("new.raw");
    fs::write(&file, vec![0; 16 * MIB as usize]).unwrap();
    give(&bed.host, &file);
    let job = on_overlays(&bed, &[]);
    plug(&bed, file.to_str().unwrap(), "raw", &["--live", "--config"]);
    bed.guest.send("fill vdc 8M 2M 7").unwrap();
    merge(&bed.host, &job);
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    assert_eq!(disks(&bed.guest)["vdc"], file);
    bed.guest.send("check vdc 8M 2M 7").unwrap();
    let manifest = manifest_of(&backup_of(&bed.host, &job));
    let named: Vec<&Value> =
        manifest["disks"].as_array().unwrap().iter().map(|disk| &disk["target"]).collect();
    assert_eq!(named, ["vda", "vdb"]);
}

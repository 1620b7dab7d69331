//! Checkpoints that somebody else has made of the domain, and that a backup must leave usable.

use std::path::Path;

use replay_tests::testbed::{DiskSpec, Guest, MIB};
use serde_json::Value;

use crate::support::bed::{Bed, backup_of, image, in_the_middle, large};
use crate::support::{disks, run, until};

/// What an incremental backup since the checkpoint holds, in ranges of bytes.
fn since(bed: &Bed, checkpoint: &str, disk: &str) -> Vec<(u64, u64)> {
    let folder = bed.host.hypervisor.dir().join("state");
    let (target, order) = (folder.join("incremental.qcow2"), folder.join("backup.xml"));
    let others: String = bed
        .own
        .keys()
        .filter(|other| *other != disk)
        .map(|other| format!("<disk name='{other}' backup='no'/>"))
        .collect();
    let xml = format!(
        "<domainbackup><incremental>{checkpoint}</incremental><disks><disk name='{disk}' backup='yes' \
         type='file'><driver type='qcow2'/><target file='{}'/></disk>{others}</disks></domainbackup>",
        target.display()
    );
    std::fs::write(&order, xml).unwrap();
    crate::support::bed::give(&bed.host, &order);
    bed.guest.virsh("backup-begin", &["--backupxml", order.to_str().unwrap()]).unwrap();
    until("the incremental backup to be over", || {
        bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None").then_some(())
    });
    let map = run("qemu-img", &["map", "-U", "--output", "json", target.to_str().unwrap()]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let own = map.iter().filter(|range| range["data"] == true && range["depth"] == 0);
    let number = |range: &Value, key: &str| range[key].as_u64().unwrap();
    own.map(|range| (number(range, "start"), number(range, "start") + number(range, "length"))).collect()
}

/// Written before the backup, and during it to the overlay: both are since the checkpoint, and little else is.
fn still_serves(how: &str) {
    let bed = Bed::boot(&large("web1").disk(DiskSpec::new(16 * MIB).data(4 * MIB).plain()));
    let _daemon = bed.host.daemon();
    let only = ["--name", "cp1", "--diskspec", "vda,checkpoint=no", "--diskspec", "vdb,checkpoint=no"];
    let only: Vec<_> = only.into_iter().chain(["--diskspec", "vdc,checkpoint=bitmap"]).collect();
    bed.guest.virsh("checkpoint-create-as", &only).unwrap();
    bed.guest.send("fill vdc 5M 1M 7").unwrap();
    let job = in_the_middle(&bed.host, &["snapshot", "web1", how, "--bandwidth", "8M"]);
    bed.guest.send("fill vdc 9M 1M 8").unwrap();
    let row = bed.host.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    let dirty = since(&bed, "cp1", "vdc");
    for (from, to) in [(5 * MIB, 6 * MIB), (9 * MIB, 10 * MIB)] {
        assert!(dirty.iter().any(|range| range.0 <= from && to <= range.1), "{from}..{to} in {dirty:?}");
    }
    let all: u64 = dirty.iter().map(|(from, to)| to - from).sum();
    assert!(all < 4 * MIB, "the rest is as it was: {dirty:?}");
    assert_eq!(bed.guest.virsh("checkpoint-list", &["--name"]).unwrap().trim(), "cp1");

    // The image in the backup has its bitmap, the restored one has forgotten it; neither has lost clusters.
    let backup = backup_of(&bed.host, &job);
    let check = |path: &Path| run("qemu-img", &["check", path.to_str().unwrap()]);
    check(&image(&backup, "vdc"));
    assert!(run("qemu-img", &["info", image(&backup, "vdc").to_str().unwrap()]).contains("cp1"));
    bed.host.ok(&["restore", backup["id"].as_str().unwrap(), "--as", "copy", "--start"]);
    let copy = Guest::attach(&bed.host.hypervisor, "copy").unwrap();
    copy.wait_more(3).unwrap();
    copy.shutdown().unwrap();
    let restored = &disks(&copy)["vdc"];
    check(restored);
    assert!(!run("qemu-img", &["info", restored.to_str().unwrap()]).contains("cp1"));
}

#[test]
fn a_checkpoint_made_before_a_backup_still_serves_an_incremental_one_after_it() {
    still_serves("--live");
}

#[test]
fn a_checkpoint_made_before_a_guest_was_saved_and_loaded_still_serves_an_incremental_backup() {
    still_serves("--save");
}

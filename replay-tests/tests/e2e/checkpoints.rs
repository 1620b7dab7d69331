//! Checkpoints that somebody else has made of the domain, and that a backup must leave usable.

use std::path::Path;

use replay_tests::testbed::{DiskSpec, Guest, MIB};
use serde_json::Value;

use crate::support::bed::{Bed, backup_of, configure, folder, image, in_the_middle, large, small};
use crate::support::{Host, disks, run, until};

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

/// Two vaults, and room for one checkpoint.
#[test]
fn a_domain_keeps_no_more_checkpoints_than_it_may_and_the_vault_that_gives_way_is_named_and_read_in_full() {
    let host = Host::new();
    let vaults = ["main", "other"].map(|name| {
        let place = folder(&host, &host.hypervisor.dir().join("state").join(format!("vault-{name}")));
        format!("[vaults.{name}]\nurl = \"file://{}\"\n", place.display())
    });
    configure(&host, &format!("[backup]\ncheckpoints = 1\n{}", vaults.concat()));
    for name in ["main", "other"] {
        host.ok(&["vault", "init", name, "--plain"]);
    }
    let bed = Bed::boot_on(host, None, &small("web1"));
    let (host, guest) = (&bed.host, &bed.guest);
    let _daemon = host.daemon();
    let only = ["--diskspec", "vda,checkpoint=bitmap", "--diskspec", "vdb,checkpoint=no"];
    guest.virsh("checkpoint-create-as", &[&["--name", "nightly"], &only[..]].concat()).unwrap();
    let listed = || {
        let all = guest.virsh("checkpoint-list", &["--name"]).unwrap();
        let mut all: Vec<String> = all.split_whitespace().map(str::to_owned).collect();
        all.retain(|name| name != "nightly");
        all
    };
    let backup = |vault: &str| {
        let job = host.begin(&["backup", "web1", "--vault", vault]);
        let row = host.settled(&job);
        assert_eq!(row["status"], "succeeded", "{}", host.story(&job));
        (host.story(&job), crate::vault::disk_of(host, &row, "vda"))
    };
    let (story, _) = backup("main");
    assert!(!story.contains("no room for more checkpoints"), "{story}");
    let of_main = listed();
    assert_eq!(of_main.len(), 1);
    let doctor = host.vmkeep(&["--json", "doctor"]);
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.contains("one for the vault main, whose next backup reads all disks in full"), "{doctor}");

    let (story, _) = backup("other");
    assert!(
        story.contains("1 of the vault main went; the next backup into it reads all disks in full"),
        "{story}"
    );
    let of_other = listed();
    assert!(of_other.len() == 1 && of_other != of_main, "{of_other:?}");
    // The next one begins with it; then it gives way too, though a differential backup would have needed it.
    let (story, disk) = backup("other");
    assert!(story.contains("1 of the vault other went; the next differential backup into it"), "{story}");
    assert_ne!(listed(), of_other);
    assert_eq!(disk["whole_because"], Value::Null, "{disk:#}");
    let (_, disk) = backup("main");
    assert!(
        disk["whole_because"].as_str().is_some_and(|why| why.contains("libvirt still lists")),
        "{disk:#}"
    );
    assert_eq!(listed().len(), 1);
    let all = guest.virsh("checkpoint-list", &["--name"]).unwrap();
    assert!(all.contains("nightly"), "somebody else's is neither counted nor touched");
}

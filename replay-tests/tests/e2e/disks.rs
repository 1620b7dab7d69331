//! Which disks are in a backup, and how much of each: those that take part by rule, and their chains whole.

use std::fs;
use std::path::PathBuf;

use replay_tests::testbed::{DiskSpec, Format, Guest, GuestSpec, MIB, image_info, images_equal, pattern_on};
use serde_json::Value;

use crate::support::bed::*;
use crate::support::{Host, assert_ticks, run};

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
    judge_backup(host, &backup);
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
        assert_ticks(&tops[0], &tops[1]);
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

/// Every image of a backup, and every disk restored from it, is the disk at that moment, byte for byte: also what the guest
/// has overwritten with zeroes or discarded.
#[test]
fn each_image_and_each_restored_disk_equals_the_disk_byte_for_byte_zeroes_included() {
    let bed = Bed::boot(&small("web1").disk(DiskSpec::new(16 * MIB).data(4 * MIB).plain()));
    let host = &bed.host;
    let _daemon = host.daemon();
    for command in ["stop-ticks", "zero vdc 2M 1M", "discard vdc 3M 1M", "fill vdc 8M 2M 7"] {
        bed.guest.send(command).unwrap();
    }
    host.ok(&["snapshot", "web1"]);
    let backup = host.backups().remove(0);
    host.ok(&["restore", backup["id"].as_str().unwrap(), "--as", "copy", "--cold"]);
    let restored = host.hypervisor.disk_files_in_inactive_xml("copy").unwrap();
    assert_eq!(restored.len(), 3);
    for (disk, file) in &bed.own {
        for image in [&image(&backup, disk), &restored[disk]] {
            images_equal(image, file).unwrap().unwrap_or_else(|why| panic!("{disk}, {image:?}: {why}"));
        }
    }
    bed.guest.send("start-ticks 20").unwrap();
    bed.assert_back_home();
}

/// The running guest does not have it, so it is not part of any instant: it is named, and the guest goes on in the copy
/// without it.
#[test]
fn a_disk_that_is_only_defined_is_named_as_left_out_and_memory_is_restored_without_it() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let file = host.hypervisor.images().join("next.raw");
    fs::write(&file, vec![7; 65536]).unwrap();
    give(host, &file);
    let attach = [file.to_str().unwrap(), "vdc", "--config"];
    bed.guest.virsh("attach-disk", &attach).unwrap();
    let definition = definitions(&bed.guest).1;
    let _daemon = host.daemon();
    host.fails(&["snapshot", "web1", "--disks", "vdc"], 115, &["next start"]);
    host.ok(&["snapshot", "web1"]);
    assert_same("the persistent definition", &definitions(&bed.guest).1, &definition);
    let backup = host.backups().remove(0);
    let point = judge_backup(host, &backup);
    let shown = host.ok(&["show", backup["id"].as_str().unwrap()]);
    assert!(shown.contains("disk vdc is not in it: the running guest does not have it"), "{shown}");

    let args = ["restore", backup["id"].as_str().unwrap(), "--as", "copy", "--start"];
    let said = host.ok(&args);
    assert!(said.contains("Disk vdc was left out"), "{said}");
    let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
    copy.wait_tick(point + 3).unwrap();
    assert_eq!(copy.boot_id(), bed.guest.boot_id(), "it goes on from its memory");
    let files = host.hypervisor.disk_files_in_inactive_xml("copy").unwrap();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["vda", "vdb"]);

    // In place as well, where the disk stays defined.
    let args =
        ["restore", backup["id"].as_str().unwrap(), "--in-place", "--destroy", "--shutdown-time", "0s"];
    let job = host.begin(&args);
    assert_eq!(ended(host, &job), ("succeeded".to_owned(), 0), "{}", host.ok(&["job", "explain", &job]));
    bed.guest.wait_more(3).unwrap();
    let files = host.hypervisor.disk_files_in_inactive_xml("web1").unwrap();
    assert_eq!(files["vdc"], file);
}

//! `vmkeep vault` as a process, on vaults in real folders.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod import;
mod keys;
mod offline;
mod one;
mod refusals;
mod retain;
mod support;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use support::{C, DEFINITION, World, backup, damage, noise};
use vmkeep_host::codes;

/// A disk with something at its beginning and its end, and nothing in between.
fn disk() -> Vec<u8> {
    let mut disk = noise(1, 16 * C);
    disk.resize(48 * C, 0);
    disk.extend(noise(2, 3 * C));
    disk
}

/// Whether the files say what the backup was made of.
fn is_written(folder: &Path, disk: &[u8]) {
    assert!(std::fs::read(folder.join("vda.raw")).unwrap() == disk, "the disk is not what it was");
    assert_eq!(std::fs::read(folder.join("nvram")).unwrap(), noise(99, 1000));
    assert_eq!(std::fs::read_to_string(folder.join("domain.xml")).unwrap(), DEFINITION);
    for entry in std::fs::read_dir(folder).unwrap() {
        let meta = entry.unwrap().metadata().unwrap();
        assert_eq!(meta.mode() & 0o077, 0, "others may read what a guest holds");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_listed_checked_and_written_as_files_byte_for_byte() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let disk = disk();
    let vault = host.open("home").await;
    let id = backup(&vault, &disk, None).await.to_string();
    let end = &id[24..];

    let list = host.json(&["list", "home", "web1"]);
    assert_eq!(list["backups"][0]["id"], id.as_str());
    assert_eq!(list["backups"][0]["marks"], serde_json::json!(["checked"]));
    let said = host.run(&["list", "home"]);
    assert!(said.must(0).out.contains(end) && said.out.contains("web1"), "{}", said.out);
    let said = host.run(&["show", "home", end]);
    assert!(said.must(0).out.contains("vda") && said.out.contains("nvram"), "{}", said.out);
    let shown = host.json(&["show", "home", &id[..14]]);
    assert_eq!(shown["manifest"]["disks"][0]["target"], "vda");
    assert!(shown["manifest"].get("definition").is_none(), "it may hold passwords");
    let stats = host.json(&["stats", "home"]);
    assert_eq!(stats["domains"][0]["backups"][0]["used"], 20 * C as u64);
    for depth in ["--quick", "--read"] {
        let check = host.json(&["check", "home", depth]);
        assert_eq!((&check["clean"], &check["whole"][0]), (&true.into(), &id.as_str().into()), "{check}");
    }
    let shown = host.json(&["show", "home", end]);
    assert_eq!(shown["backup"]["marks"], serde_json::json!(["checked", "verified"]));
    let place = host.json(&["check", "home", "--backend"]);
    assert_eq!((&place["kept"], &place["deletes"]), (&true.into(), &true.into()), "{place}");
    assert_eq!(host.json(&["leases", "home"]), serde_json::json!([]), "every command has ended its own");

    let to = world.path("files/deep");
    host.run(&["export", "home", end, "--to", to.to_str().unwrap()]).must(0);
    is_written(&to, &disk);
    let blocks = to.join("vda.raw").metadata().unwrap().blocks();
    assert!(blocks * 512 < 30 * C as u64, "{blocks} blocks: what is zero takes room");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 3, "something was left beside the files");
    // What is there is left alone, and so is what would have come beside it.
    std::fs::remove_file(to.join("nvram")).unwrap();
    let again = host.run(&["export", "home", end, "--to", to.to_str().unwrap()]);
    again.told(codes::BACKUP_EXISTS, "vda.raw");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 2, "something was written beside what was there");

    let to = world.path("images");
    let args = ["export", "home", end, "--format", "qcow2", "--disks", "vda", "--to", to.to_str().unwrap()];
    let files = host.json(&args);
    assert_eq!(files[0]["root"], shown["manifest"]["disks"][0]["image"]["root"]);
    let back = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([to.join("vda.qcow2"), to.join("vda.raw")])
        .status();
    assert!(back.unwrap().success());
    assert!(std::fs::read(to.join("vda.raw")).unwrap() == disk, "the converted disk is not what it was");
    assert_eq!(to.join("vda.qcow2").metadata().unwrap().mode() & 0o777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_is_named_and_healed_from_its_copy_under_another_key() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    host.init(&world, "other");
    let disk = disk();
    let id = backup(&host.open("home").await, &disk, None).await.to_string();

    let copied = host.json(&["copy", "home", "other"]);
    assert_eq!((&copied[0]["backup"], &copied[0]["fate"]), (&id.as_str().into(), &"copied".into()));
    let copied = host.run(&["copy", "home", "other", "--backups", &id]);
    assert!(
        copied.must(0).out.contains("already") && copied.err.contains(&id),
        "{}{}",
        copied.out,
        copied.err
    );

    damage(&world.objects("home/data")[0]);
    // The quick check reads no chunks, so it cannot know yet.
    host.run(&["check", "home"]).must(0);
    let check = host.run(&["check", "home", "--read"]);
    check.must(codes::VAULT_DAMAGED.0);
    assert!(check.out.contains(&format!("HURT: {id}")) && check.out.contains("vda: bytes"), "{}", check.out);
    let check = host.run(&["check", "home"]);
    assert!(check.must(codes::VAULT_DAMAGED.0).out.contains(&id), "it is forgotten: {}", check.out);
    assert!(host.run(&["list", "home"]).out.contains("HURT"));
    let to = world.path("files");
    let lost = host.run(&["export", "home", &id, "--disks", "vda", "--to", to.to_str().unwrap()]);
    lost.told(codes::VAULT_DAMAGED, "home");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0, "a disk that is not whole was left there");

    // Nobody has the bytes; then somebody has.
    host.run(&["repair", "home"]).must(codes::VAULT_DAMAGED.0);
    let healed = host.json(&["repair", "home", "--from", "other"]);
    assert!(healed["given"].as_u64().unwrap() > 0, "{healed}");
    assert_eq!(healed["now"]["whole"], serde_json::json!([id]));
    host.run(&["check", "home"]).must(0);
    // The damaged pack goes with a collection; then nothing that is read is bad.
    assert_eq!(host.json(&["gc", "home"])["ended"], "done");
    host.run(&["check", "home", "--read"]).must(0);
    host.run(&["export", "home", &id, "--to", to.to_str().unwrap()]).must(0);
    is_written(&to, &disk);
    let copy = world.path("copy");
    host.run(&["export", "other", &id, "--to", copy.to_str().unwrap()]).must(0);
    is_written(&copy, &disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pruned_goes_with_the_next_collection_and_nothing_else_does() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let old = disk();
    let mut new = old.clone();
    new[..C].copy_from_slice(&noise(3, C));
    let vault = host.open("home").await;
    let first = backup(&vault, &old, None).await;
    let second = backup(&vault, &new, Some((first, &old))).await.to_string();
    let first = first.to_string();

    host.run(&["protect", "home", &first]).must(0);
    host.run(&["prune", "home", &second, &first]).told(codes::INVALID_STATE, &first);
    let marks = &host.json(&["show", "home", &second])["backup"]["marks"];
    assert_eq!(marks, &serde_json::json!(["checked"]), "one of two was pruned, although not both could be");
    host.run(&["unprotect", "home", &first, "--dry-run"]).must(0);
    host.run(&["prune", "home", &first]).must(codes::INVALID_STATE.0);
    host.run(&["unprotect", "home", &first]).must(0);
    assert_eq!(host.json(&["prune", "home", &first, "--dry-run"])[0]["fate"], "would");
    assert_eq!(host.json(&["gc", "home"])["doomed"], serde_json::json!([]), "a dry run ordered something");
    assert_eq!(host.json(&["prune", "home", &first])[0]["fate"], "ordered");
    assert!(host.run(&["list", "home"]).out.contains("to be pruned"));
    host.run(&["protect", "home", &first]).told(codes::INVALID_STATE, &first);

    // This host has to know of a prune for a day before it obeys.
    let spared = host.json(&["gc", "home", "--prune-delay", "1d"]);
    assert_eq!((&spared["spared"], &spared["doomed"]), (&serde_json::json!([first]), &serde_json::json!([])));
    let known = std::fs::read_to_string(host.state.join("vaults/home.prunes.json")).unwrap();
    assert!(known.len() > 40, "it will not know the next time: {known}");
    // The protection that came too late keeps what is not yet doomed, until somebody ends it.
    host.run(&["unprotect", "home", &first]).must(0);
    let done = host.json(&["gc", "home"]);
    assert_eq!((&done["ended"], &done["doomed"]), (&"done".into(), &serde_json::json!([first])));
    let list = host.json(&["list", "home"]);
    assert_eq!(list["backups"].as_array().unwrap().len(), 1);
    let to = world.path("files");
    host.run(&["export", "home", &second, "--to", to.to_str().unwrap()]).must(0);
    is_written(&to, &new);

    host.run(&["prune", "home", &second]).told(codes::INVALID_STATE, "web1");
    host.run(&["prune", "home", &second, "--last"]).must(0);
    assert_eq!(host.json(&["gc", "home"])["ended"], "done");
    assert_eq!(host.json(&["list", "home"]), serde_json::json!({ "backups": [], "missing": [] }));
    assert_eq!(world.objects("home/data").len() + world.objects("home/tree").len(), 0, "packs were left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_index_is_made_anew_and_a_lost_manifest_comes_back_from_a_copy_of_it() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let disk = disk();
    let id = backup(&host.open("home").await, &disk, None).await.to_string();
    let manifest = world.objects("home/backups").remove(0);
    let kept = world.path("kept").join(manifest.parent().unwrap().file_name().unwrap());
    std::fs::create_dir_all(&kept).unwrap();
    let kept = kept.join(manifest.file_name().unwrap());
    std::fs::rename(&manifest, &kept).unwrap();
    let check = host.run(&["check", "home"]);
    assert!(check.must(codes::VAULT_DAMAGED.0).out.contains(&format!("the manifest of {id} is gone")));
    assert_eq!(host.json(&["list", "home"])["missing"], serde_json::json!([id]));
    let elsewhere = world.file("manifest", "x", 0o600);
    host.run(&["repair", "home", "--manifest", &elsewhere]).told(codes::USAGE, "manifest");
    host.run(&["repair", "home", "--manifest", kept.to_str().unwrap()]).must(0);
    host.run(&["check", "home"]).must(0);

    for run in world.objects("home/index") {
        damage(&run);
    }
    // What this host has a copy of it does not ask for again.
    std::fs::remove_dir_all(host.state.join("vaults/home.cache")).unwrap();
    let check = host.run(&["check", "home"]);
    assert!(check.must(codes::VAULT_DAMAGED.0).out.contains("the index's run"), "{}", check.out);
    assert!(check.out.contains("1 backup is whole"), "no backup is hurt by that: {}", check.out);
    let indexed = host.json(&["repair", "home", "--index"]);
    assert_eq!(indexed["ended"], "put", "{indexed}");
    host.run(&["check", "home", "--read"]).must(0);
    let to = world.path("files");
    host.run(&["export", "home", &id, "--to", to.to_str().unwrap()]).must(0);
    is_written(&to, &disk);
}

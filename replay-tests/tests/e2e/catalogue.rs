//! The catalogue: a memory of what the folders say, and never more than that.

use std::fs;
use std::path::PathBuf;

use crate::support::bed::*;
use crate::support::shelf::{make, make_of};
use crate::support::{Host, run};

#[test]
fn the_catalogue_follows_the_folders_and_forgets_nothing_in_silence() {
    let host = Host::new();
    let root = folder(&host, &host.hypervisor.dir().join("shelf"));
    configure(&host, &root_is(&root));
    let daemon = host.daemon();
    assert!(host.backups().is_empty());
    let made: Vec<_> = (1..=3).map(|minute| make(&host, &root, minute)).collect();
    assert_eq!(host.backups().len(), 3, "a folder that was copied in is seen by the next look");

    // Gone by hand: shown, with its place, by list and by status, also after a restart; and not to be restored.
    let away = host.hypervisor.dir().join("away");
    fs::rename(&made[0].folder, &away).unwrap();
    let gone = |host: &Host| {
        let list = host.json(&["list"]);
        let missing = list["missing"].as_array().unwrap().clone();
        missing.iter().map(|one| one["backup"]["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(gone(&host), [made[0].id.as_str()]);
    daemon.end();
    let daemon = host.daemon();
    assert_eq!((gone(&host), host.backups().len()), (vec![made[0].id.clone()], 2));
    let status = host.ok(&["status"]);
    assert!(status.contains("1 backups are missing"), "{status}");
    refused(&host, &["restore", &made[0].id, "--as", "x"], 109, &["NO_SUCH_BACKUP", "its folder is gone"]);
    // Back, and in another place: it is there.
    let moved = folder(&host, &root.join("other")).join("20260101T000100Z");
    fs::rename(&away, &moved).unwrap();
    assert!(gone(&host).is_empty());
    assert_eq!(host.backups().len(), 3);
    fs::remove_dir_all(&moved).unwrap();
    host.ok(&["catalogue", "forget", &made[0].id, "--reason", "the disk is dead"]);
    assert!(gone(&host).is_empty());
    refused(&host, &["catalogue", "forget", &made[1].id], 81, &["it is not missing"]);

    // With an empty journal nothing is lost but the memory of what is gone.
    let listed = host.backups();
    daemon.end();
    // Nothing is left of the old host but the folders.
    for lost in ["store", "audit"] {
        fs::remove_dir_all(host.hypervisor.dir().join("state/vmkeep").join(lost)).unwrap();
    }
    fs::remove_file(made[1].folder.join("vdb.raw")).unwrap();
    fs::write(made[2].folder.join("manifest.json"), "{").unwrap();
    let usb = folder(&host, &host.hypervisor.dir().join("usb"));
    let far = make_of(&host, &usb, 9, "11111111-1111-4111-8111-111111111111", "elsewhere");
    let _daemon = host.daemon();
    let report = host.json(&["catalogue", "rebuild", "--reason", "a new host"]);
    // The first look has found it already.
    assert_eq!((&report["found"], report["added"].as_array().unwrap().len()), (&1.into(), 0), "{report:#}");
    assert!(report["damaged"][0].as_str().unwrap().contains("vdb.raw is missing"), "{report:#}");
    assert!(report["unreadable"][0].as_str().unwrap().contains(made[2].folder.to_str().unwrap()));
    let again: Vec<_> = listed.into_iter().filter(|one| one["id"] == made[1].id.as_str()).collect();
    assert_eq!(host.backups(), again, "the very same row");
    // Below no root: listed once it was named, and refused where only roots are allowed.
    let report = host.json(&["catalogue", "rebuild", "--from", usb.to_str().unwrap()]);
    assert_eq!(report["added"][0].as_str().map(PathBuf::from), Some(far.folder.clone()), "{report:#}");
    assert_eq!(host.backups().len(), 2);
    refused(&host, &["delete", &far.id], 105, &["TARGET_OUTSIDE_ROOTS"]);
    fs::remove_dir_all(&far.folder).unwrap();
    assert_eq!(gone(&host), [far.id.as_str()]);
    host.ok(&["audit", "verify"]);
}

#[test]
fn what_cannot_be_seen_is_wrong_or_is_there_twice_is_told() {
    let host = Host::new();
    let root = folder(&host, &host.hypervisor.dir().join("shelf"));
    configure(&host, &root_is(&root));
    let (_, second) = (make(&host, &root, 1), make(&host, &root, 2));
    let _daemon = host.daemon();
    let list = || host.ok(&["list"]);
    assert_eq!(list().matches(" never ").count(), 2, "{}", list());
    host.ok(&["verify", &second.id]);
    assert_eq!(list().matches(" never ").count(), 1, "{}", list());

    // A bit of the newest falls over.
    let image = second.folder.join("vda.raw");
    let mut bytes = fs::read(&image).unwrap();
    bytes[7] ^= 1;
    fs::write(&image, bytes).unwrap();
    refused(&host, &["verify", &second.id], 38, &["vda.raw"]);
    let shown = list();
    assert!(shown.contains(" FAILED ") && shown.contains("verification failed at"), "{shown}");
    assert!(host.ok(&["status"]).contains("verification failed at"));
    assert!(host.ok(&["show", &second.id]).contains("verification failed at"));
    let rows = host.backups();
    let row = rows.iter().find(|row| row["id"] == second.id.as_str()).unwrap();
    assert!(row["verified"]["problem"].as_str().unwrap().contains("vda.raw"), "{row:#}");

    // Somebody copies a backup beside itself.
    let copy = root.join("shelf/copy");
    run("cp", &["-a", second.folder.to_str().unwrap(), copy.to_str().unwrap()]);
    let shown = list();
    assert!(shown.contains("copied: ") && shown.contains("one backup in 2 folders"), "{shown}");
    assert_eq!(host.backups().len(), 3);
    refused(&host, &["delete", &second.id], 117, &["AMBIGUOUS_NAME", "shelf/copy"]);
    host.ok(&["delete", copy.to_str().unwrap()]);
    assert!(!list().contains("copied: "));
    assert!(host.json(&["list"])["missing"].as_array().unwrap().is_empty());

    // A folder of somebody else's in which there may be backups.
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can make a folder that vmkeepd's user cannot enter");
        return;
    }
    let closed = root.join("closed");
    fs::create_dir(&closed).unwrap();
    fs::rename(&second.folder, closed.join("inside")).unwrap();
    run("chmod", &["700", closed.to_str().unwrap()]);
    let named = format!("{} cannot be looked into", closed.display());
    for command in ["list", "status"] {
        let shown = host.ok(&[command]);
        assert!(shown.contains(&named), "{command}: {shown}");
    }
    host.fails(&["doctor"], 1, &[&named]);
    assert_eq!(host.json(&["list"])["missing"].as_array().unwrap().len(), 1);
    run("chown", &[&owner(&host), closed.to_str().unwrap()]);
    assert!(!list().contains(&named));
    assert_eq!((host.backups().len(), host.json(&["list"])["missing"].as_array().unwrap().len()), (2, 0));
}

#[test]
fn a_thousand_backups_are_listed_without_reading_one_again() {
    let host = Host::new();
    let root = folder(&host, &host.hypervisor.dir().join("shelf"));
    configure(&host, &root_is(&root));
    let first = make(&host, &root, 0);
    let manifest = fs::read_to_string(first.folder.join("manifest.json")).unwrap();
    for n in 1..1000 {
        let id = format!("019c1a2b-3c4d-7e5f-8a9b-{n:012x}");
        let folder = root.join("shelf").join(format!("20260101T000000Z-{n:012x}"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("manifest.json"), manifest.replace(&first.id, &id)).unwrap();
    }
    run("chown", &["-R", &owner(&host), root.to_str().unwrap()]);
    let daemon = host.daemon();
    assert_eq!(host.backups().len(), 1000);
    daemon.end();
    // The next vmkeepd knows them. The kernel counts what is opened or read of them.
    let _daemon = host.daemon();
    use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
    let watch = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    for folder in fs::read_dir(root.join("shelf")).unwrap() {
        add_watch(&watch, folder.unwrap().path(), WatchFlags::OPEN | WatchFlags::ACCESS).unwrap();
    }
    let mut buffer = vec![std::mem::MaybeUninit::uninit(); 1 << 20];
    let mut touched = |args: &[&str]| {
        host.ok(args);
        let mut events = Reader::new(&watch, &mut buffer);
        let mut count = 0;
        while events.next().is_ok() {
            count += 1;
        }
        count
    };
    assert_eq!(touched(&["list"]), 0);
    assert_eq!(touched(&["status"]), 0);
    assert!(touched(&["catalogue", "rebuild"]) >= 1000, "the count is true");
}

fn owner(host: &Host) -> String {
    let user = host.hypervisor.user();
    format!("{}:{}", user.uid, user.gid)
}

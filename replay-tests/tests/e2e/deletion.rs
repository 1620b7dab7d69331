//! Backups deleted, protected and thinned out: what is refused, what a file system that fails leaves, and vmkeepd killed
//! at every event boundary. A half-deleted backup never looks whole, and the last ones stay.

use std::fs;
use std::path::{Path, PathBuf};

use replay_tests::testbed::Guest;
use serde_json::Value;

use crate::support::bed::*;
use crate::support::mount::Mount;
use crate::support::shelf::{DOMAIN, Made, assert_no_half, make};
use crate::support::{Host, assert_untouched, disks, files_below, until};

fn shelf(count: usize) -> (Host, PathBuf, Vec<Made>) {
    let host = Host::new();
    let root = folder(&host, &host.hypervisor.dir().join("shelf"));
    configure(&host, &root_is(&root));
    let made = (1..=count).map(|minute| make(&host, &root, minute)).collect();
    (host, root, made)
}

fn ids(host: &Host) -> Vec<String> {
    host.backups().iter().map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn backups_are_deleted_and_what_must_stay_is_refused() {
    let (host, root, made) = shelf(4);
    let _daemon = host.daemon();
    assert_eq!(ids(&host).len(), 4);

    // A dry run names the files' folder and touches nothing.
    let before = files_below(&root);
    let plan = host.ok(&["delete", &made[0].id, "--dry-run"]);
    assert!(plan.contains("withdraw") && plan.contains(made[0].folder.to_str().unwrap()), "{plan}");
    assert_eq!(files_below(&root), before);

    assert!(host.ok(&["protect", &made[0].id, "--dry-run"]).contains("would protect"));
    assert!(!made[0].folder.join("protection.json").exists(), "a dry run changes nothing");
    host.ok(&["protect", &made[0].id, "--reason", "for the auditors", "--until", "2999-12-31"]);
    let shown = host.json(&["show", &made[0].id]);
    assert_eq!(shown["backup"]["protection"]["why"], "for the auditors");
    assert!(made[0].folder.join("protection.json").is_file());
    refused(&host, &["delete", &made[0].id], 81, &["INVALID_STATE", "for the auditors", "unprotect"]);
    // One that must stay keeps the other as well.
    refused(&host, &["delete", &made[1].id, &made[0].id], 81, &["INVALID_STATE"]);
    assert_eq!(ids(&host).len(), 4);
    host.ok(&["verify", &made[0].id]);
    assert!(host.ok(&["unprotect", &made[0].id, "--dry-run"]).contains("would unprotect"));
    assert!(made[0].folder.join("protection.json").is_file(), "a dry run changes nothing");
    host.ok(&["unprotect", &made[0].id, "--reason", "they have been"]);
    assert!(!made[0].folder.join("protection.json").exists());

    let ended = host.json(&["delete", &made[0].id, &made[1].id, "--reason", "tidying"]);
    assert_eq!(ended.as_array().unwrap().len(), 1, "one job per domain: {ended:#}");
    assert_eq!(ended[0]["job"]["reason"], "tidying");
    assert!(!made[0].folder.exists() && !made[1].folder.exists());
    assert!(host.json(&["list"])["missing"].as_array().unwrap().is_empty(), "a deletion explains itself");

    // What does not belong to it stays, and the exit status says so.
    let note = made[2].folder.join("note.txt");
    fs::write(&note, "mine").unwrap();
    host.fails(&["delete", &made[2].id], 46, &["note.txt", "NOT_ALL_FILES_DELETED"]);
    assert_eq!(files_below(&made[2].folder), [note]);

    refused(&host, &["delete", &made[3].id], 81, &["INVALID_STATE", "--last-copy"]);
    host.fails(&["delete", &made[3].id, "--last-copy"], 64, &["--reason"]);
    host.ok(&["delete", &made[3].id, "--last-copy", "--reason", "the machine is scrap"]);
    assert!(ids(&host).is_empty());
    let history = host.ok(&["catalogue", "history"]);
    for word in ["protected", "for the auditors", "unprotected", "they have been", "deleted"] {
        assert!(history.contains(word), "{word}: {history}");
    }
    host.ok(&["audit", "verify"]);
}

#[test]
fn only_backups_below_the_roots_are_deleted() {
    let (host, root, made) = shelf(2);
    let outside = folder(&host, &host.hypervisor.dir().join("outside"));
    let other = make(&host, &outside, 3);
    std::os::unix::fs::symlink(&other.folder, root.join("link")).unwrap();
    let _daemon = host.daemon();
    let before = (files_below(&root), files_below(&outside));
    for (path, code) in [(&other.folder, 105), (&root.join("link"), 106), (&root.join("shelf"), 109)] {
        refused(&host, &["delete", path.to_str().unwrap()], code, &[]);
    }
    // A link in the place of an image leads to somebody else's file.
    let image = made[0].folder.join("vdb.raw");
    fs::remove_file(&image).unwrap();
    std::os::unix::fs::symlink(other.folder.join("vdb.raw"), &image).unwrap();
    refused(&host, &["delete", &made[0].id], 106, &["UNSAFE_PATH", "vdb.raw"]);
    assert_eq!((files_below(&root), files_below(&outside)), before);
}

#[test]
fn a_backup_that_a_restore_needs_is_not_deleted() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    host.ok(&["snapshot", "web1", "--disk-only"]);
    let id = ids(host).remove(1);
    // It waits for the next vmkeepd in the middle of copying: needed all the same.
    let job = host.begin(&["restore", &id, "--as", "copy", "--bandwidth", "4M"]);
    until("the restore to have begun", || {
        let steps = host.json(&["job", "show", &job])["steps"].clone();
        steps.as_array()?.iter().any(|step| step["progress"]["done"].as_u64() > Some(0)).then_some(())
    });
    refused(host, &["delete", &id], 67, &["SUBJECT_BUSY", "restore"]);
    daemon.kill();
    let _daemon = host.daemon();
    refused(host, &["delete", &id], 67, &["SUBJECT_BUSY", "restore"]);
    host.ok(&["job", "cancel", &job]);
    host.settled(&job);
    host.ok(&["delete", &id]);
    bed.assert_back_home();
}

#[test]
fn a_file_system_that_refuses_leaves_a_backup_whole_or_says_what_is_left() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "shelf", 16) else { return };
    configure(&host, &root_is(&mount.0));
    let made: Vec<_> = (1..=3).map(|minute| make(&host, &mount.0, minute)).collect();
    let _daemon = host.daemon();
    assert_eq!(ids(&host).len(), 3);
    mount.read_only(true);
    refused(&host, &["delete", &made[0].id], 13, &["CANNOT_REMOVE_FILE", "Read-only file system"]);
    assert_no_half("read-only", &mount.0);
    refused(&host, &["protect", &made[0].id], 6, &["Read-only file system"]);
    refused(&host, &["prune", "shelf", "--keep", "1"], 13, &["Read-only file system"]);
    assert_eq!(ids(&host).len(), 3);
    mount.read_only(false);
    // Full to the last byte: nothing that a deletion does needs room.
    mount.fill(0);
    refused(&host, &["protect", &made[1].id], 47, &["NOT_ENOUGH_DISK_SPACE"]);
    host.ok(&["delete", &made[0].id]);
    host.ok(&["prune", "shelf", "--keep", "1"]);
    mount.clear();
    assert_eq!(ids(&host), [made[2].id.as_str()]);
    assert_no_half("after", &mount.0);
}

/// Runs a command that deletes with vmkeepd killed once at every boundary on one side of the journal. `prepare` makes
/// what is deleted and returns the command; `judge` sees how it ended.
fn at_every_boundary(
    host: &Host,
    root: &Path,
    side: &str,
    workflow: &str,
    mut prepare: impl FnMut() -> Vec<String>,
    judge: impl Fn(&str),
) {
    let newest = |known: &[String]| {
        let jobs = host.json(&["jobs", "--workflow", workflow]);
        let jobs = jobs.as_array().unwrap().iter();
        jobs.map(|job| job["id"].as_str().unwrap().to_owned()).find(|job| !known.contains(job))
    };
    let mut known = Vec::new();
    let mut clean = None;
    let mut reached = 0;
    for seq in 0.. {
        if clean.is_some_and(|clean| seq > clean) {
            break;
        }
        let case = if seq == 0 { "undisturbed".to_owned() } else { format!("killed {side} event {seq}") };
        let args = prepare();
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        args.push("--no-wait");
        let mut doomed = host.daemon_that_dies(Some(&format!("append/{side}/{workflow}/{seq}")));
        host.until_ready();
        let _ = host.vmkeep(&args);
        if doomed.dies_or(|| {
            let jobs = host.vmkeep(&["--json", "jobs", "--workflow", workflow]);
            let jobs: Value = serde_json::from_slice(&jobs.stdout).unwrap_or_default();
            let ended =
                |job: &Value| job["ended"].is_string() && !known.iter().any(|known| job["id"] == *known);
            jobs.as_array().is_some_and(|jobs| jobs.iter().any(ended))
        }) {
            reached += 1;
        }
        drop(doomed);
        assert_no_half(&case, root);
        let daemon = host.daemon();
        match newest(&known) {
            None => {
                assert_eq!(
                    (side, seq),
                    ("before", 1),
                    "{case}: only a request that was never durable may be gone"
                );
                host.ok(&args[..args.len() - 1]);
                known.extend(newest(&known));
            }
            Some(job) => {
                let row = host.settled(&job);
                assert_eq!(row["status"], "succeeded", "{case}: {row:#}");
                host.ok(&["replay", &job]);
                clean = clean.or(Some(host.history(&job).len()));
                known.push(job);
            }
        }
        assert_no_half(&case, root);
        judge(&case);
        assert!(host.json(&["list"])["missing"].as_array().unwrap().is_empty(), "{case}");
        daemon.end();
    }
    let clean = clean.unwrap();
    assert!(reached + 1 >= clean, "only {reached} of {clean} places were reached");
    println!("{workflow}: vmkeepd killed {side} {reached} of {clean} events");
}

fn delete_killed(side: &str) {
    let (host, root, stays) = shelf(1);
    let mut minute = 1;
    let prepare = || {
        minute += 2;
        let two = [make(&host, &root, minute), make(&host, &root, minute + 1)];
        vec!["delete".to_owned(), two[0].id.clone(), two[1].id.clone()]
    };
    at_every_boundary(&host, &root, side, "delete", prepare, |case| {
        assert_eq!(ids(&host), [stays[0].id.as_str()], "{case}");
        assert_eq!(files_below(&root).len(), 4, "{case}: {:?}", files_below(&root));
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_deletion_never_leaves_half_a_backup() {
    delete_killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_deletion_never_leaves_half_a_backup() {
    delete_killed("after");
}

fn prune_killed(side: &str) {
    let (host, root, _) = shelf(1);
    let mut minute = 1;
    let prepare = || {
        for _ in 0..2 {
            minute += 1;
            make(&host, &root, minute);
        }
        ["prune", DOMAIN, "--keep", "2"].map(str::to_owned).to_vec()
    };
    at_every_boundary(&host, &root, side, "prune", prepare, |case| {
        let left = host.backups();
        assert_eq!(left.len(), 2, "{case}");
        let folders: Vec<_> = fs::read_dir(root.join("shelf")).unwrap().map(|e| e.unwrap().path()).collect();
        let newest = folders.iter().max().unwrap();
        assert_eq!(left[0]["folder"].as_str(), newest.to_str(), "{case}: the newest stays");
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_retention_keeps_the_last() {
    prune_killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_retention_keeps_the_last() {
    prune_killed("after");
}

#[test]
fn a_backup_thins_the_older_ones_out_also_when_vmkeepd_dies_in_between() {
    let host = Host::new();
    let guest = Guest::boot(&host.hypervisor, &small("web1")).unwrap();
    let own = disks(&guest);
    let keep = ["snapshot", "web1", "--disk-only", "--keep", "2"];
    // The newest first, as the catalogue has them: names of folders tell seconds, and two backups may share one.
    let (events, mut left) = {
        let _daemon = host.daemon();
        for _ in 0..2 {
            host.ok(&keep);
        }
        let first = folders(&host).remove(1);
        host.ok(&keep);
        let left = folders(&host);
        assert!(left.len() == 2 && !left.contains(&first), "{left:?}");
        let jobs = host.json(&["jobs", "--workflow", "snapshot"]);
        (host.history(jobs[0]["id"].as_str().unwrap()).len(), left)
    };
    // Dead before the backup has succeeded, after that, and before and after the retention was asked for.
    for place in [
        format!("append/before/snapshot/{events}"),
        format!("append/after/snapshot/{events}"),
        "append/before/prune/1".to_owned(),
        "append/after/prune/1".to_owned(),
    ] {
        let (kept, oldest) = (left[0].clone(), left[1].clone());
        let mut doomed = host.daemon_that_dies(Some(&place));
        host.until_ready();
        let mut all = keep.to_vec();
        all.push("--no-wait");
        host.ok(&all);
        assert!(doomed.dies_or(|| false), "{place}");
        drop(doomed);
        let daemon = host.daemon();
        until("the retention to have ended", || {
            let open = host.jobs().iter().any(|job| !job["ended"].is_string());
            (!open && !oldest.exists()).then_some(())
        });
        left = folders(&host);
        assert!(left.len() == 2 && left[1] == kept, "{place}: {left:?}");
        host.ok(&["verify", &ids(&host)[0]]);
        assert_untouched(&guest, &own);
        daemon.end();
    }
    let _daemon = host.daemon();
    // Asked for once each: three undisturbed backups, the first two of which had nothing to remove, and four killed.
    assert_eq!(host.json(&["jobs", "--workflow", "prune"]).as_array().unwrap().len(), 7);
}

/// The folders of the backups, the newest first.
fn folders(host: &Host) -> Vec<PathBuf> {
    host.backups().iter().map(|backup| PathBuf::from(backup["folder"].as_str().unwrap())).collect()
}

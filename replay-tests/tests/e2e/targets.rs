//! Where a backup may go: below the configured roots, by a straight way, where vmkeepd can write. And a target that goes
//! away in the middle.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::bed::*;
use crate::support::{Host, files_below};

#[test]
fn a_target_outside_the_roots_or_reached_by_a_detour_is_refused() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let root = default_root(host);
    let elsewhere = folder(host, &host.hypervisor.dir().join("elsewhere"));
    let to = |path: &Path| path.to_str().unwrap().to_owned();
    for outside in [to(&elsewhere), "/".to_owned(), "/tmp".to_owned(), format!("{}x", to(&root))] {
        for mode in ["--live", "--disk-only", "--dry-run"] {
            let words = &["TARGET_OUTSIDE_ROOTS", "use the target", outside.as_str()];
            bed.refused(&["snapshot", "web1", mode, "--to", &outside], 105, words);
        }
    }
    // As the directory names places; and as it names those of other hosts.
    host.ok(&["snapshot", "web1", "--dry-run", "--to", &format!("file://{}", to(&root))]);
    for place in ["ssh://backup/srv", "file://backup/srv"] {
        bed.refused(&["snapshot", "web1", "--to", place], 35, &["UNSUPPORTED_FILE_TRANSFER_PROTOCOL", place]);
    }
    // Dots: they climb out, or would if they were followed.
    for climbing in [format!("{}/../../elsewhere", to(&root)), format!("{}/a/../b", to(&root))] {
        bed.refused(&["snapshot", "web1", "--to", &climbing], 106, &["UNSAFE_PATH", "use the target"]);
    }
    // A link below the root leads out of it.
    std::os::unix::fs::symlink(&elsewhere, root.join("link")).unwrap();
    for linked in ["link", "link/deeper"] {
        let linked = to(&root.join(linked));
        refused(host, &["snapshot", "web1", "--to", &linked], 106, &["UNSAFE_PATH", &linked]);
        refused(host, &["show", &linked], 106, &["UNSAFE_PATH"]);
    }
    fs::remove_file(root.join("link")).unwrap();
    // A file is no folder.
    fs::write(root.join("file"), "").unwrap();
    let file = to(&root.join("file"));
    let output = host.vmkeep(&["snapshot", "web1", "--to", &file]);
    assert!([6, 106].contains(&output.status.code().unwrap()), "{output:?}");
    fs::remove_file(root.join("file")).unwrap();
    bed.assert_nothing_changed();
    assert_eq!(files_below(&elsewhere), Vec::<PathBuf>::new());
}

#[test]
fn a_target_that_cannot_be_written_is_refused_and_changes_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::new();
    let closed = folder(&host, &host.hypervisor.dir().join("closed"));
    configure(&host, &root_is(&closed));
    let bed = Bed::boot_on(host, None, &small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    for mode in ["--live", "--disk-only"] {
        let words = &["CANNOT_WRITE_TO_BACKUP_LOCATION", closed.to_str().unwrap()];
        refused(host, &["snapshot", "web1", mode], 6, words);
        bed.assert_nothing_changed();
    }
    // Gone since vmkeepd started: whatever was mounted there is not.
    fs::rename(&closed, closed.with_extension("away")).unwrap();
    refused(
        host,
        &["snapshot", "web1"],
        26,
        &["BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST", closed.to_str().unwrap()],
    );
    bed.assert_nothing_changed();
    daemon.end();
    // Not there from the start: everything else works, and it says so.
    let _daemon = host.daemon();
    refused(host, &["snapshot", "web1"], 26, &["BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST"]);
    bed.assert_nothing_changed();
}

#[test]
fn a_target_that_is_removed_in_the_middle_is_survived() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "8M"]);
    fs::remove_dir_all(default_root(host).join("web1")).unwrap();
    let (status, code) = ended(host, &job);
    assert_eq!(status, "rolled_back", "{}", host.ok(&["job", "explain", &job]));
    assert_ne!(code, 0);
    bed.assert_back_home();
    assert!(host.backups().is_empty());
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    judge_backup(host, &host.backups()[0]);
}

use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;
use crate::manifest::folder::{of_backup, of_domain};
use crate::manifest::samples::{backup, folder};

fn place(root: &Path, under: &str) -> Folder {
    let job = vmkeep_workflow::JobId::new();
    let path = root.join(under).join(of_backup("2026-01-31T23:59:59Z".parse().unwrap(), job).as_str());
    std::fs::create_dir_all(&path).unwrap();
    folder(&path)
}

fn kinds(root: &Path) -> (Vec<PathBuf>, Vec<PathBuf>, Vec<PathBuf>) {
    let (mut good, mut bad, mut open) = (Vec::new(), Vec::new(), Vec::new());
    for entry in scan(&TargetRoot::open(root).unwrap()).unwrap() {
        match entry {
            Entry::Backup { path, .. } => good.push(path),
            Entry::Unreadable { path, .. } | Entry::Barred { path, .. } => bad.push(path),
            Entry::Unpublished { path, .. } | Entry::Withdrawn { path, .. } => open.push(path),
        }
    }
    (good, bad, open)
}

#[test]
fn backups_are_found_by_their_manifests_at_every_depth_that_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let nasty = of_domain("../x $(y)\n");
    let at = [place(dir.path(), nasty.as_str()), place(dir.path(), "site/web"), place(dir.path(), "a/b/c")];
    let mut paths: Vec<_> = at.iter().map(|f| f.path().to_owned()).collect();
    at.iter().for_each(|f| drop(backup(f)));
    // Where the name says nothing, the manifest does.
    let renamed = dir.path().join("moved by hand");
    std::fs::rename(&paths[0], &renamed).unwrap();
    paths[0] = renamed;
    paths.sort();
    let (mut good, bad, open) = kinds(dir.path());
    good.sort();
    assert_eq!((good, bad, open), (paths, vec![], vec![]));
}

#[test]
fn a_folder_without_a_manifest_is_never_a_backup() {
    let dir = tempfile::tempdir().unwrap();
    let half = place(dir.path(), "web");
    crate::manifest::samples::unpublished(&half);
    std::fs::write(half.path().join("manifest.json.new"), "{").unwrap();
    std::fs::create_dir_all(dir.path().join("other/stuff")).unwrap();
    assert_eq!(kinds(dir.path()), (vec![], vec![], vec![half.path().to_owned()]));
}

#[test]
fn a_manifest_that_cannot_be_read_is_reported_and_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (bad, good) = (place(dir.path(), "web"), place(dir.path(), "web"));
    backup(&good);
    for text in ["{", r#"{"format":"vmkeep-backup","min_reader":99}"#, r#"{"format":"x","min_reader":1}"#] {
        std::fs::write(bad.path().join(MANIFEST), text).unwrap();
        assert_eq!(
            kinds(dir.path()),
            (vec![good.path().to_owned()], vec![bad.path().to_owned()], vec![]),
            "{text}"
        );
    }
    // Elsewhere a `manifest.json` is somebody else's business.
    std::fs::create_dir(dir.path().join("app")).unwrap();
    std::fs::write(dir.path().join("app/manifest.json"), r#"{"name":"x"}"#).unwrap();
    assert_eq!(kinds(dir.path()).1.len(), 1);
}

#[test]
fn links_are_not_followed() {
    let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    backup(&place(outside.path(), "web"));
    symlink(outside.path().join("web"), dir.path().join("web")).unwrap();
    symlink(dir.path(), dir.path().join("round and round")).unwrap();
    assert_eq!(kinds(dir.path()), (vec![], vec![], vec![]));
}

/// What is opened, looked into or read below these folders while something is done: the kernel's own account.
fn touched(folders: &[PathBuf], work: impl FnOnce()) -> usize {
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    for folder in folders {
        inotify::add_watch(&watch, folder, WatchFlags::OPEN | WatchFlags::ACCESS).unwrap();
    }
    work();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let mut seen = 0;
    while events.next().is_ok() {
        seen += 1;
    }
    seen
}

#[test]
fn of_a_thousand_known_backups_not_one_is_opened() {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let first = place(dir.path(), "web-0");
    backup(&first);
    let manifest = std::fs::read(first.path().join(MANIFEST)).unwrap();
    let mut paths = vec![first.path().to_owned()];
    for n in 1..1000 {
        let folder = place(dir.path(), &format!("web-{}", n % 10));
        std::fs::write(folder.path().join(MANIFEST), &manifest).unwrap();
        paths.push(folder.path().to_owned());
    }
    let root = TargetRoot::open(dir.path()).unwrap();
    let mut known = std::collections::HashMap::new();
    for met in walk(root.folder(), &|_, _| false).unwrap() {
        let Met::Read(_, path, stamp) = met else { panic!("{met:?}") };
        known.insert(path, stamp);
    }
    assert_eq!(known.len(), 1000);
    let is_known = |path: &Path, stamp: &Stamp| known.get(path) == Some(stamp);
    let again = || {
        let met = walk(root.folder(), &is_known).unwrap();
        assert_eq!(met.iter().filter(|met| matches!(met, Met::Known(..))).count(), 1000);
    };
    assert_eq!(touched(&paths, again), 0);
    assert!(touched(&paths, || drop(scan(&root).unwrap())) >= 1000, "the account is true");
}

#[test]
fn a_known_backup_that_changed_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = place(dir.path(), "web");
    backup(&at);
    let root = TargetRoot::open(dir.path()).unwrap();
    let look = |known: Option<Stamp>| {
        let mut met = walk(root.folder(), &|_, stamp| Some(*stamp) == known).unwrap();
        assert_eq!(met.len(), 1);
        met.remove(0)
    };
    let stamp = |met: Met| match met {
        Met::Read(_, _, stamp) => stamp,
        other => panic!("{other:?}"),
    };
    let first = stamp(look(None));
    assert!(matches!(look(Some(first)), Met::Known(..)));
    // Protected: another stamp. Replaced by its own copy: another file.
    crate::manifest::protection::write(
        &at,
        &crate::manifest::Protection::new("ann".to_owned(), jiff::Timestamp::now(), None, None),
    )
    .unwrap();
    let second = stamp(look(Some(first)));
    assert_ne!(first, second);
    let bytes = std::fs::read(at.path().join(MANIFEST)).unwrap();
    std::fs::write(at.path().join("copy"), bytes).unwrap();
    std::fs::rename(at.path().join("copy"), at.path().join(MANIFEST)).unwrap();
    assert_ne!(stamp(look(Some(second))), second);
}

#[test]
fn what_is_left_of_a_deletion_is_no_backup() {
    let dir = tempfile::tempdir().unwrap();
    let at = place(dir.path(), "web");
    let manifest = backup(&at);
    crate::manifest::file::withdraw(&at).unwrap();
    crate::manifest::file::withdraw(&at).unwrap();
    let found = scan(&TargetRoot::open(dir.path()).unwrap()).unwrap();
    match found.as_slice() {
        [Entry::Withdrawn { path, stored: Some(stored) }] => {
            assert_eq!((path.as_path(), stored.manifest.backup), (at.path(), manifest.backup));
        }
        other => panic!("{other:?}"),
    }
    crate::manifest::file::reinstate(&at).unwrap();
    assert!(matches!(
        scan(&TargetRoot::open(dir.path()).unwrap()).unwrap().as_slice(),
        [Entry::Backup { .. }]
    ));
}

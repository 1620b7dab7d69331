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
            Entry::Unreadable { path, .. } => bad.push(path),
            Entry::Unpublished { path, .. } => open.push(path),
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

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::backend::conformance::{Place, Stranger, beat, conformance, pack};
use crate::testing::noise;

async fn opened(path: &Path) -> Local {
    Local::open(path, &Options::default()).await.unwrap()
}

async fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    Place {
        first: Arc::new(opened(&root).await),
        second: Arc::new(opened(&root).await),
        refuses: true,
        stranger: stranger(root),
        _kept: Box::new(folder),
    }
}

/// Puts files, or a folder that nobody may read, into a vault.
pub(crate) fn stranger(root: PathBuf) -> Stranger {
    Box::new(move |name| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        if name == "lost+found" {
            std::fs::create_dir(&path).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o0)).unwrap();
        } else {
            std::fs::write(&path, "not of the vault").unwrap();
        }
        Box::new(move || path.symlink_metadata().is_ok())
    })
}

conformance!(place());

#[tokio::test]
async fn nobody_else_can_read_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("vault");
    let local = Local::open(&root, &Options { create: true, ..Options::default() }).await.unwrap();
    local.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let mut path = root.join(pack(0));
    assert_eq!(mode(&path), 0o600);
    while path.pop() && path != folder.path() {
        assert_eq!(mode(&path), 0o700, "{}", path.display());
    }
    assert_eq!(mode(&root.join("tmp")), 0o700);
}

#[tokio::test]
async fn the_folder_of_a_vault_that_is_not_mounted_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("mnt/vault");
    let error = Local::open(&root, &Options::default()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    Local::open(&root, &Options { create: true, ..Options::default() }).await.unwrap_err();
    assert!(!folder.path().join("mnt").exists());
}

#[tokio::test]
async fn a_folder_that_was_removed_is_not_an_empty_vault() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("vault");
    std::fs::create_dir(&root).unwrap();
    let local = opened(&root).await;
    std::fs::remove_dir(&root).unwrap();
    assert_eq!(local.get(&pack(0), None).await.unwrap_err().kind, BackendErrorKind::Broken);
    assert_eq!(local.list("data/").await.unwrap_err().kind, BackendErrorKind::Broken);
    assert_eq!(local.list("").await.unwrap_err().kind, BackendErrorKind::Broken);
    local.put(&pack(0), Bytes::new()).await.unwrap_err();
}

#[tokio::test]
async fn symbolic_links_are_refused_wherever_they_stand() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let local = opened(folder.path()).await;
    local.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    // A folder of the vault that leads out of it.
    symlink(elsewhere.path(), folder.path().join("leases")).unwrap();
    std::fs::write(elsewhere.path().join("0"), "not of the vault").unwrap();
    let broken = |error: BackendError| assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
    broken(local.put(&beat(1, 0), Bytes::from_static(b"x")).await.unwrap_err());
    broken(local.get("leases/0", None).await.unwrap_err());
    broken(local.delete("leases/0").await.unwrap_err());
    broken(local.list("leases/").await.unwrap_err());
    broken(local.list("").await.unwrap_err());
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    // An object that is a link.
    let name = pack(1);
    let path = folder.path().join(&name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    symlink(elsewhere.path().join("0"), &path).unwrap();
    broken(local.get(&name, None).await.unwrap_err());
    broken(local.put(&name, Bytes::from_static(b"x")).await.unwrap_err());
    broken(local.list("data/").await.unwrap_err());
}

#[tokio::test]
async fn what_stands_in_the_place_of_an_object_is_not_absence() {
    let folder = tempfile::tempdir().unwrap();
    let local = opened(folder.path()).await;
    // A file where a folder belongs, and a folder where a file does.
    std::fs::write(folder.path().join("data"), "").unwrap();
    std::fs::create_dir_all(folder.path().join(beat(1, 0))).unwrap();
    let broken = |error: BackendError| assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
    broken(local.get(&pack(0), None).await.unwrap_err());
    broken(local.list("data/").await.unwrap_err());
    broken(local.get(&beat(1, 0), None).await.unwrap_err());
}

#[tokio::test]
async fn a_put_that_died_is_nothing_and_names_its_lease() {
    let folder = tempfile::tempdir().unwrap();
    let local = opened(folder.path()).await;
    local.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    // What a process leaves that is killed before the rename.
    let left = temporary("", &pack(1)).unwrap();
    std::fs::write(folder.path().join(&left), "half").unwrap();
    assert_eq!(local.get(&pack(1), None).await.unwrap(), None);
    assert_eq!(local.list("").await.unwrap().len(), 1);
    let found = local.list("tmp/").await.unwrap();
    assert_eq!(found.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), [left.as_str()]);
    assert!(left.contains(&"01".repeat(16)), "the lease of the pack: {left}");
    local.delete(&left).await.unwrap();
    assert_eq!(local.list("tmp/").await.unwrap(), []);
}

/// A file system of a test's own, in memory.
pub(crate) struct Small(pub(crate) tempfile::TempDir);

impl Small {
    /// Only root can mount: elsewhere the test says that it proves nothing, and ends.
    pub(crate) fn new(size: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root can mount a small file system");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size},mode=700");
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &options, "vmkeep-test"]).arg(folder.path()).status();
        assert!(mounted.unwrap().success());
        Some(Self(folder))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_full_and_keeps_what_was_there() {
    let Some(small) = Small::new("2m") else { return };
    let local = opened(small.0.path()).await;
    local.put(&pack(0), Bytes::from_static(b"kept")).await.unwrap();
    let big = Bytes::from(noise(1, 3 << 20));
    let error = local.put(&pack(1), big).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Full, "{error}");
    assert_eq!(local.get(&pack(1), None).await.unwrap(), None);
    assert_eq!(local.list("tmp/").await.unwrap(), [], "what did not fit takes no room");
    local.put(&pack(2), Bytes::from(noise(2, 1 << 20))).await.unwrap();
    assert_eq!(local.list("").await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_folder_that_may_not_be_written_is_denied() {
    let Some(small) = Small::new("2m") else { return };
    let local = opened(small.0.path()).await;
    local.put(&pack(0), Bytes::from_static(b"kept")).await.unwrap();
    let remounted = Command::new("mount").args(["-o", "remount,ro"]).arg(small.0.path()).status().unwrap();
    assert!(remounted.success());
    let error = local.put(&pack(1), Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Denied, "{error}");
    assert_eq!(local.delete(&pack(0)).await.unwrap_err().kind, BackendErrorKind::Denied);
    assert_eq!(local.get(&pack(0), None).await.unwrap().as_deref(), Some(&b"kept"[..]));
}

#[tokio::test]
async fn a_vault_that_is_unmounted_in_use_is_not_an_empty_one() {
    let Some(small) = Small::new("2m") else { return };
    let local = opened(small.0.path()).await;
    local.put(&pack(0), Bytes::from_static(b"kept")).await.unwrap();
    assert!(Command::new("umount").arg("-l").arg(small.0.path()).status().unwrap().success());
    assert!(!small.0.path().join("data").exists());
    assert_eq!(local.get(&pack(0), None).await.unwrap().as_deref(), Some(&b"kept"[..]));
    local.put(&pack(1), Bytes::from_static(b"x")).await.unwrap();
    assert!(!small.0.path().join("data").exists(), "nothing is put into the folder below the mount");
}

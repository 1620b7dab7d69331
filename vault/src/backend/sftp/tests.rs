//! Against OpenSSH's own server: a private `sshd` on a loopback port, or `sftp-server` without a line between.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::*;
use crate::backend::conformance::{Place, beat, conformance, pack};
use crate::backend::local::tests::{Small, stranger};
use crate::backend::testing::Cutting;
use crate::testing::noise;

const SERVER: &str = "/usr/lib/openssh/sftp-server";

/// A private `sshd`, as this user, with keys of its own. Killed when dropped.
struct Sshd {
    folder: tempfile::TempDir,
    at: SocketAddr,
    process: std::process::Child,
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn keygen(file: &Path) {
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(file).status();
    assert!(made.unwrap().success());
}

impl Sshd {
    fn start(subsystem: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for key in ["host", "user", "other"] {
            keygen(&at(key));
        }
        std::fs::copy(at("user.pub"), at("authorized_keys")).unwrap();
        std::fs::create_dir(at("vault")).unwrap();
        if rustix::process::geteuid().is_root() {
            // Where its service would have it made.
            std::fs::create_dir_all("/run/sshd").unwrap();
        }
        loop {
            let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let config = format!(
                "ListenAddress {address}\nHostKey {dir}/host\nAuthorizedKeysFile {dir}/authorized_keys\n\
                 StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
                 PidFile none\nPermitRootLogin yes\nMaxStartups 100\nSubsystem sftp {subsystem}\n",
                dir = folder.path().display()
            );
            std::fs::write(at("config"), config).unwrap();
            let mut process = Command::new("/usr/sbin/sshd")
                .args(["-D", "-e", "-f"])
                .arg(at("config"))
                .stderr(Stdio::piped())
                .spawn()
                .expect("openssh-server is not installed: see scripts/install-deps");
            let mut says = std::io::BufReader::new(process.stderr.take().unwrap());
            let (mut said, mut line) = (String::new(), String::new());
            while std::io::BufRead::read_line(&mut says, &mut line).unwrap() > 0 {
                if line.contains("Server listening on") {
                    // Its pipe is read to the end, or it would wait.
                    std::thread::spawn(move || std::io::copy(&mut says, &mut std::io::sink()));
                    let key = std::fs::read_to_string(at("host.pub")).unwrap();
                    let known = format!("[127.0.0.1]:* {key}");
                    std::fs::write(at("known_hosts"), known).unwrap();
                    return Self { folder, at: address, process };
                }
                said += &std::mem::take(&mut line);
            }
            let _ = process.wait();
            // Somebody else may have taken the port.
            assert!(said.contains("Address already in use"), "{said}");
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn options(&self) -> Options {
        // Nothing of the user's own configuration.
        std::fs::write(self.file("ssh_config"), "").unwrap();
        Options {
            identity: Some(self.file("user")),
            known_hosts: Some(self.file("known_hosts")),
            ssh_config: Some(self.file("ssh_config")),
            ..Options::default()
        }
    }

    fn address(&self, at: SocketAddr) -> Address {
        format!("sftp://127.0.0.1:{}{}", at.port(), self.file("vault").display()).parse().unwrap()
    }

    async fn open(&self) -> Sftp {
        Sftp::open(&self.address(self.at), &self.options()).await.unwrap()
    }
}

/// `sftp-server` itself, on a folder.
async fn direct(arguments: &[&str], root: &Path, options: &Options) -> Result<Sftp, BackendError> {
    let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
    let program = Program { program: SERVER.to_owned(), arguments };
    Sftp::connect("sftp-server".to_owned(), program, root.display().to_string(), options).await
}

async fn place() -> Place {
    let sshd = Sshd::start(SERVER);
    Place {
        first: Arc::new(sshd.open().await),
        second: Arc::new(sshd.open().await),
        refuses: true,
        stranger: stranger(sshd.file("vault")),
        _kept: Box::new(sshd),
    }
}

conformance!(place());

#[tokio::test]
async fn nobody_else_can_read_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("vault");
    let options = Options { create: true, ..Options::default() };
    // A server whose umask takes nothing.
    let sftp = direct(&["-u", "000"], &root, &options).await.unwrap();
    sftp.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let mut path = root.join(pack(0));
    assert_eq!(mode(&path), 0o600);
    while path.pop() && path != folder.path() {
        assert_eq!(mode(&path), 0o700, "{}", path.display());
    }
}

#[tokio::test]
async fn a_server_that_cannot_sync_is_taken_only_by_who_knows_it() {
    let folder = tempfile::tempdir().unwrap();
    let error = direct(&["-P", "fsync"], folder.path(), &Options::default()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
    assert!(error.to_string().contains("--allow-volatile"), "{error}");
    let options = Options { allow_volatile: true, ..Options::default() };
    let sftp = direct(&["-P", "fsync"], folder.path(), &options).await.unwrap();
    sftp.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(sftp.get(&pack(0), None).await.unwrap().as_deref(), Some(&b"x"[..]));
}

#[tokio::test]
async fn an_object_is_synced_before_it_has_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let root = folder.path().join("vault");
    std::fs::create_dir(&root).unwrap();
    let script = format!("exec {SERVER} -e -l DEBUG3 2>{}", log.display());
    let program = Program { program: "sh".into(), arguments: vec!["-c".into(), script] };
    let sftp = Sftp::connect("logged".into(), program, root.display().to_string(), &Options::default())
        .await
        .unwrap();
    sftp.put(&pack(0), noise(1, 100_000).into()).await.unwrap();
    let log = std::fs::read_to_string(&log).unwrap();
    let at = |what: &str| log.rfind(what).unwrap_or_else(|| panic!("{what}: {log}"));
    assert!(at("write") < at("fsync"), "{log}");
    assert!(at("fsync") < at("rename old"), "{log}");
}

#[tokio::test]
async fn a_server_without_some_extensions_is_served_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let denied = "limits,statvfs,posix-rename,hardlink,copy-data,lsetstat,expand-path";
    let sftp = direct(&["-P", denied], folder.path(), &Options::default()).await.unwrap();
    let bytes = Bytes::from(noise(1, 300_001));
    sftp.put(&pack(0), bytes.clone()).await.unwrap();
    assert_eq!(sftp.get(&pack(0), None).await.unwrap(), Some(bytes.clone()));
    sftp.put(&pack(0), bytes).await.unwrap();
    sftp.put(&pack(0), Bytes::from_static(b"other")).await.unwrap_err();
}

#[tokio::test]
async fn a_full_disk_is_full() {
    let Some(small) = Small::new("2m") else { return };
    let sftp = direct(&[], small.0.path(), &Options::default()).await.unwrap();
    sftp.put(&pack(0), Bytes::from_static(b"kept")).await.unwrap();
    let error = sftp.put(&pack(1), noise(1, 3 << 20).into()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Full, "{error}");
    assert_eq!(sftp.get(&pack(1), None).await.unwrap(), None);
    assert_eq!(sftp.list("tmp/").await.unwrap(), [], "what did not fit takes no room");
    sftp.put(&pack(2), noise(2, 1 << 20).into()).await.unwrap();
}

#[tokio::test]
async fn a_folder_that_may_not_be_written_is_denied() {
    let folder = tempfile::tempdir().unwrap();
    // Such a server does not say that it could sync.
    let options = Options { allow_volatile: true, ..Options::default() };
    let sftp = direct(&["-R"], folder.path(), &options).await.unwrap();
    let error = sftp.put(&pack(0), Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Denied, "{error}");
}

#[tokio::test]
async fn a_key_that_is_not_known_there_is_denied() {
    let sshd = Sshd::start(SERVER);
    let options = Options { identity: Some(sshd.file("other")), ..sshd.options() };
    let error = Sftp::open(&sshd.address(sshd.at), &options).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Denied, "{error}");
}

#[tokio::test]
async fn a_server_that_is_another_is_broken() {
    let sshd = Sshd::start(SERVER);
    let key = std::fs::read_to_string(sshd.file("other.pub")).unwrap();
    std::fs::write(sshd.file("known_hosts"), format!("[127.0.0.1]:* {key}")).unwrap();
    let error = Sftp::open(&sshd.address(sshd.at), &sshd.options()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
}

#[tokio::test]
async fn a_server_that_is_gone_is_transient_and_found_again() {
    let mut sshd = Sshd::start(SERVER);
    // A line that breaks after the first puts; the next one is whole.
    let cutting = Cutting::start(sshd.at, 1 << 20, u64::MAX).await;
    let sftp = Sftp::open(&sshd.address(cutting.at), &sshd.options()).await.unwrap();
    sftp.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    let error = sftp.put(&pack(1), noise(1, 4 << 20).into()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    assert_eq!(sftp.get(&pack(0), None).await.unwrap().as_deref(), Some(&b"x"[..]));

    sshd.process.kill().unwrap();
    sshd.process.wait().unwrap();
    drop(cutting);
    assert_eq!(sftp.get(&pack(0), None).await.unwrap_err().kind, BackendErrorKind::Transient);
    let error = Sftp::open(&sshd.address(sshd.at), &sshd.options()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn a_line_that_is_cut_in_the_middle_of_a_put_leaves_no_torn_object() {
    let sshd = Sshd::start(SERVER);
    let cutting = Cutting::start(sshd.at, 1 << 20, u64::MAX).await;
    let sftp = Sftp::open(&sshd.address(cutting.at), &sshd.options()).await.unwrap();
    let bytes = Bytes::from(noise(1, 8 << 20));
    let error = sftp.put(&pack(0), bytes.clone()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    let sftp = sshd.open().await;
    assert_eq!(sftp.get(&pack(0), None).await.unwrap(), None);
    assert_eq!(sftp.list("").await.unwrap(), []);
    // What is left does not keep it from being put.
    sftp.put(&pack(0), bytes.clone()).await.unwrap();
    assert_eq!(sftp.get(&pack(0), None).await.unwrap(), Some(bytes));
}

#[tokio::test]
async fn what_stands_in_the_place_of_an_object_is_not_absence() {
    let folder = tempfile::tempdir().unwrap();
    let sftp = direct(&[], folder.path(), &Options::default()).await.unwrap();
    // Of each of these OpenSSH says "no such file".
    std::fs::write(folder.path().join("data"), "").unwrap();
    std::os::unix::fs::symlink("nowhere", folder.path().join("leases")).unwrap();
    let broken = |error: BackendError| assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
    broken(sftp.get(&pack(0), None).await.unwrap_err());
    broken(sftp.list("data/").await.unwrap_err());
    broken(sftp.get(&beat(1, 0), None).await.unwrap_err());
    broken(sftp.list("leases/").await.unwrap_err());
    broken(sftp.delete(&beat(1, 0)).await.unwrap_err());
}

#[tokio::test]
async fn a_vault_that_is_unmounted_in_use_is_not_an_empty_one() {
    let folder = tempfile::tempdir().unwrap();
    let (root, away) = (folder.path().join("vault"), folder.path().join("away"));
    std::fs::create_dir(&root).unwrap();
    let sftp = direct(&[], &root, &Options::default()).await.unwrap();
    let header = ObjectName::Header(crate::ids::VaultId::new([1; 16])).to_string();
    sftp.put(&header, Bytes::from_static(b"{}")).await.unwrap();
    sftp.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    // What stays of a mount is an empty folder.
    std::fs::rename(&root, &away).unwrap();
    std::fs::create_dir(&root).unwrap();
    let broken = |error: BackendError| assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
    broken(sftp.get(&pack(0), None).await.unwrap_err());
    broken(sftp.list("data/").await.unwrap_err());
    broken(sftp.delete(&pack(0)).await.unwrap_err());
    broken(sftp.put(&pack(1), Bytes::from_static(b"x")).await.unwrap_err());
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0, "nothing is put below the mount");
    std::fs::remove_dir(&root).unwrap();
    std::fs::rename(&away, &root).unwrap();
    assert_eq!(sftp.get(&pack(0), None).await.unwrap().as_deref(), Some(&b"x"[..]));
}

#[tokio::test]
async fn the_folder_of_a_vault_that_is_not_mounted_is_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("mnt/vault");
    let error = direct(&[], &root, &Options::default()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    direct(&[], &root, &Options { create: true, ..Options::default() }).await.unwrap_err();
    assert!(!folder.path().join("mnt").exists());
}

#[tokio::test]
async fn a_server_of_another_kind_is_broken() {
    let program = Program { program: "cat".into(), arguments: Vec::new() };
    let error = Sftp::connect("cat".into(), program, "/".into(), &Options::default()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
}

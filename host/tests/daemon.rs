//! The daemon as a process: how it starts, what it refuses, how it ends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use vmkeep_host::api::types::{Accepted, DaemonPhase, DomainRow, SnapshotRequest, Status};
use vmkeep_host::client::Client;
use vmkeep_host::codes;
use vmkeep_workflow::{Code, Fault};

/// libvirt's own pretence of a hypervisor, inside the daemon's process.
const TOY: &str = "test:///default";
/// A libvirt that does not run.
const NOBODY: &str = "qemu+unix:///session?socket=/nonexistent/libvirt-sock";

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::Builder::new().prefix("vk").tempdir().unwrap() }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/s")
    }

    fn command(&self, connect: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmkeepd"));
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", self.dir.path());
        command.arg("--state-dir").arg(self.dir.path().join("state"));
        command.arg("--socket").arg(self.socket()).args(["--connect", connect]);
        command.stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
        command
    }

    async fn start(&self, connect: &str) -> Running {
        let child = self.command(connect).stderr(Stdio::null()).spawn().unwrap();
        let client = Client::new(self.socket());
        let mut running = Running { child, client };
        running.until(|_| true).await;
        running
    }
}

struct Running {
    child: Child,
    client: Client,
}

impl Running {
    /// Asks for the status until it is as wanted. A daemon that ends instead fails the test.
    async fn until(&mut self, wanted: impl Fn(&Status) -> bool) -> Status {
        let limit = Duration::from_secs(60);
        let found = tokio::time::timeout(limit, async {
            loop {
                if let Ok(status) = self.client.get::<Status>("/v1/status").await
                    && wanted(&status)
                {
                    return status;
                }
                assert!(self.child.try_wait().unwrap().is_none(), "the daemon ended");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        found.await.expect("the status never became what it must")
    }

    async fn end(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().await.unwrap().code()
    }
}

/// Runs a daemon that is to refuse to start, and returns its exit status and its words.
async fn refused(mut command: Command) -> (u16, String) {
    let output =
        tokio::time::timeout(Duration::from_secs(60), command.output()).await.expect("it ends").unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    (u16::try_from(output.status.code().unwrap()).unwrap(), text)
}

#[tokio::test]
async fn a_daemon_comes_up_serves_and_ends_without_leaving_its_socket() {
    let place = Place::new();
    let mut running = place.start(TOY).await;
    let status = running.until(|status| status.daemon.phase == DaemonPhase::Ready).await;
    assert!(status.libvirt.reachable);
    let domains: Vec<DomainRow> = running.client.get("/v1/domains").await.unwrap();
    assert_eq!(domains[0].name, "test");
    assert_eq!(running.end().await, Some(0));
    assert!(!place.socket().exists());
    // The same state folder again: the store was let go.
    let mut running = place.start(TOY).await;
    let again = running.until(|status| status.daemon.phase == DaemonPhase::Ready).await;
    assert_eq!(again.daemon.store, status.daemon.store);
}

#[tokio::test]
async fn a_second_daemon_on_the_same_state_is_refused_and_names_the_first() {
    let place = Place::new();
    let mut running = place.start(TOY).await;
    let pid = running.child.id().unwrap();
    let mut second = place.command(TOY);
    second.arg("--log-level=error");
    let (code, text) = refused(second).await;
    assert_eq!(code, codes::STORE_IN_USE.0, "{text}");
    assert!(text.contains(&pid.to_string()), "{text}");
    running.until(|status| status.daemon.pid == pid).await;
}

#[tokio::test]
async fn a_daemon_waits_for_libvirt_says_so_and_refuses_jobs_with_a_code() {
    let place = Place::new();
    let mut running = place.start(NOBODY).await;
    let status = running.until(|status| status.libvirt.fault.is_some()).await;
    assert_eq!(status.daemon.phase, DaemonPhase::WaitingForLibvirt);
    assert!(!status.libvirt.reachable);
    let request = SnapshotRequest { domain: "x".into(), ..SnapshotRequest::default() };
    let error: Fault = running.client.post::<_, Accepted>("/v1/snapshot", &request, None).await.unwrap_err();
    assert_eq!(error.code, codes::HYPERVISOR_UNREACHABLE);
    assert!(error.remedy.contains("libvirt"), "{error}");
    assert_eq!(running.end().await, Some(0), "it ends while it waits");
}

#[tokio::test]
async fn what_makes_no_sense_ends_the_daemon_with_its_code_before_anything_is_made() {
    let place = Place::new();
    let file = place.dir.path().join("c.toml");
    for (text, code, word) in [
        ("[limits]\njobz = 1\n", codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "line 2"),
        ("connect = \"qemu+ssh://h/system\"\n", codes::REMOTE_HYPERVISOR, "another host"),
    ] {
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmkeepd"));
        command.arg("--config").arg(&file).arg("--state-dir").arg(place.dir.path().join("state"));
        let (found, text) = refused(command).await;
        assert_eq!(Code(found), code, "{text}");
        assert!(text.contains(word) && text.contains("remedy"), "{text}");
    }
    let mut command = place.command(TOY);
    command.arg("--nonsense");
    assert_eq!(refused(command).await.0, codes::USAGE.0);
    let mut command = place.command(TOY);
    command.arg("--log-level=a=b=c");
    assert_eq!(Code(refused(command).await.0), codes::UNSUPPORTED_CONFIGURATION_PARAMETER);
    let mut command = place.command("qemu+ssh://h/system");
    command.arg("--check");
    assert_eq!(Code(refused(command).await.0), codes::REMOTE_HYPERVISOR);
    assert!(!place.dir.path().join("state").exists());
}

#[tokio::test]
async fn a_damaged_store_is_refused_and_left_as_it_is() {
    let place = Place::new();
    place.start(TOY).await.end().await;
    let store = place.dir.path().join("state/store");
    let database = largest(&store);
    let mut bytes = std::fs::read(&database).unwrap();
    bytes[..64].fill(0x55);
    std::fs::write(&database, &bytes).unwrap();
    let (code, text) = refused(place.command(TOY)).await;
    assert_eq!(Code(code), codes::STORE_DAMAGED, "{text}");
    assert_eq!(std::fs::read(&database).unwrap(), bytes, "it was not touched");
}

#[tokio::test]
async fn a_store_that_cannot_be_reached_is_not_called_damaged() {
    let place = Place::new();
    place.start(TOY).await.end().await;
    let store = place.dir.path().join("state/store");
    let database = largest(&store);
    let aside = place.dir.path().join("aside");
    std::fs::rename(&database, &aside).unwrap();
    std::fs::create_dir(&database).unwrap();
    let (code, text) = refused(place.command(TOY)).await;
    assert_eq!(Code(code), codes::STORE_UNAVAILABLE, "{text}");
    assert!(text.contains("STORE_UNAVAILABLE") && !text.contains("damaged:"), "{text}");
    std::fs::remove_dir(&database).unwrap();
    std::fs::rename(&aside, &database).unwrap();
    place.start(TOY).await.end().await;
}

#[tokio::test]
async fn a_journal_in_sled_is_used_refused_to_the_other_engine_and_watched_for_losses() {
    let place = Place::new();
    let file = place.dir.path().join("c.toml");
    std::fs::write(&file, "[store]\nengine = \"sled\"\n").unwrap();
    let sled = || {
        let mut command = place.command(TOY);
        command.arg("--config").arg(&file);
        command
    };
    let mut id = None;
    for _ in 0..2 {
        let child = sled().stderr(Stdio::null()).spawn().unwrap();
        let mut running = Running { child, client: Client::new(place.socket()) };
        let status = running.until(|status| status.daemon.phase == DaemonPhase::Ready).await;
        assert_eq!(*id.get_or_insert(status.daemon.store.clone()), status.daemon.store);
        assert_eq!(running.end().await, Some(0));
    }
    let (code, text) = refused(place.command(TOY)).await;
    assert_eq!(Code(code), codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "{text}");
    assert!(text.contains("vmkeep store migrate --to sqlite"), "{text}");
    std::fs::write(place.dir.path().join("state/store/journal.sled/head"), "").unwrap();
    let (code, text) = refused(sled()).await;
    assert_eq!(Code(code), codes::STORE_DAMAGED, "{text}");
}

/// The store's database: the file that begins as SQLite's do.
fn largest(folder: &Path) -> PathBuf {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.is_file())
        .find(|path| std::fs::read(path).unwrap().starts_with(b"SQLite format 3"))
        .expect("there is a database")
}

#[tokio::test]
async fn the_service_manager_is_told_when_it_is_ready_and_when_it_stops() {
    let place = Place::new();
    let path = place.dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    let mut command = place.command(TOY);
    let child = command.env("NOTIFY_SOCKET", &path).stderr(Stdio::null()).spawn().unwrap();
    let told = move || {
        let mut buffer = [0; 64];
        let n = manager.recv(&mut buffer).unwrap();
        (String::from_utf8(buffer[..n].to_vec()).unwrap(), manager)
    };
    let (first, manager) = tokio::task::spawn_blocking(told).await.unwrap();
    assert_eq!(first, "READY=1");
    let running = Running { child, client: Client::new(place.socket()) };
    let ended = tokio::spawn(running.end());
    let mut buffer = [0; 64];
    let n = tokio::task::spawn_blocking(move || manager.recv(&mut buffer).map(|n| buffer[..n].to_vec()));
    assert_eq!(n.await.unwrap().unwrap(), b"STOPPING=1");
    assert_eq!(ended.await.unwrap(), Some(0));
}

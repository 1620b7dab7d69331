//! Heads that a daemon signs, and what they find, with the programs themselves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, Command};
use vmkeep_host::api::types::{Accepted, Status};
use vmkeep_host::client::Client;
use vmkeep_host::{codes, heads};
use vmkeep_store::heads::{Line, log_path};
use vmkeep_store::{Store, StoreConfig};
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::Append;

/// A host: a state folder, a configuration, and programs that use both.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::Builder::new().prefix("vk").tempdir().unwrap() };
        let text = format!(
            "state_dir = {:?}\nsocket = {:?}\nconnect = \"test:///default\"\n",
            place.state(),
            place.path("run/s")
        );
        std::fs::write(place.path("c.toml"), text).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn state(&self) -> PathBuf {
        self.path("state")
    }

    fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", self.dir.path());
        command.arg("--config").arg(self.path("c.toml")).stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    async fn vmkeep(&self, args: &[&str]) -> Output {
        self.program(env!("CARGO_BIN_EXE_vmkeep")).args(args).output().await.unwrap()
    }

    /// What a command prints that must not fail.
    async fn said(&self, args: &[&str]) -> String {
        let output = self.vmkeep(args).await;
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that must fail with that code.
    async fn refused(&self, code: vmkeep_workflow::Code, args: &[&str]) -> String {
        let output = self.vmkeep(args).await;
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(i32::from(code.0)), "{args:?}: {text}");
        assert!(text.contains("remedy"), "{text}");
        text
    }

    /// Appends to a stream of the store's while no daemon has it open.
    async fn append(&self, from: u64, count: u64) {
        let store = vmkeep_store::open(&StoreConfig::new(self.state().join("store"))).unwrap();
        for n in from..from + count {
            let records = vec![format!("{{\"n\":{n}}}").into_bytes()];
            let stream = StreamId::from("notes");
            let append = Append { stream, expected: Seq(n), records, summary: None, key: None };
            store.append(append).await.unwrap();
        }
    }

    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(log_path(&heads::folder(&self.state()))).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Starts a daemon, and waits until it has signed so many heads in all.
    async fn daemon(&self, lines: usize) -> Child {
        let log = std::fs::File::options().append(true).create(true).open(self.path("log")).unwrap();
        let mut child = self.program(env!("CARGO_BIN_EXE_vmkeepd")).stderr(log).spawn().unwrap();
        let signed = async {
            let client = Client::new(self.path("run/s"));
            while client.get::<Status>("/v1/status").await.is_err() || self.lines().len() < lines {
                assert!(child.try_wait().unwrap().is_none(), "the daemon ended");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), signed).await.expect("a head is signed");
        child
    }
}

async fn end(mut child: Child) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().await.unwrap().code(), Some(0));
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_store_is_found_with_the_heads_and_the_public_key_alone() {
    let place = Place::new();
    place.append(0, 3).await;
    let child = place.daemon(1).await;
    let kept = place.path("kept.jsonl");
    let (kept, keep) = (kept.to_str().unwrap(), async || {
        std::fs::write(place.path("kept.jsonl"), place.said(&["audit", "heads"]).await).unwrap();
    });
    let key = place.said(&["audit", "key"]).await.trim().to_owned();
    keep().await;
    // Beside a running daemon, and without one; the key as such, and in a file.
    let held = ["audit", "verify", "--heads", kept, "--public-key", &key];
    let text = place.said(&held).await;
    assert!(text.contains("1 signed heads agree") && text.contains("0 commits came after"), "{text}");
    let text = place.said(&["audit", "verify"]).await;
    assert!(text.contains("They lie beside the journal"), "{text}");
    let export = place.path("export.jsonl");
    place.said(&["audit", "export", "-o", export.to_str().unwrap()]).await;
    end(child).await;
    std::fs::write(place.path("key"), format!("{key}\n")).unwrap();
    let file = place.path("key");
    place.said(&["audit", "verify", "--heads", kept, "--public-key", file.to_str().unwrap()]).await;

    let older = place.path("older");
    copy(&place.state().join("store"), &older);
    place.append(3, 2).await;
    let mut child = place.daemon(2).await;
    keep().await;
    // However it ends: what it signed is there.
    child.kill().await.unwrap();
    end(place.daemon(2).await).await;
    assert!(place.said(&held).await.contains("2 signed heads agree"));
    // The export is older than the heads: it lacks what they tell of.
    let args = ["audit", "verify", export.to_str().unwrap(), "--heads", kept, "--public-key", &key];
    let text = place.refused(codes::STORE_DAMAGED, &args).await;
    assert!(text.contains("ends at commit 3"), "{text}");
    std::fs::write(place.path("first.jsonl"), place.lines()[0].clone() + "\n").unwrap();
    let first = place.path("first.jsonl");
    let args = [&args[..4], &[first.to_str().unwrap()], &args[5..]].concat();
    assert!(place.said(&args).await.contains("1 signed heads agree"));

    std::fs::remove_dir_all(place.state().join("store")).unwrap();
    copy(&older, &place.state().join("store"));
    let text = place.refused(codes::STORE_DAMAGED, &held).await;
    assert!(text.contains("the journal ends at commit 3") && text.contains("an older copy"), "{text}");
    let text = place.refused(codes::STORE_DAMAGED, &["audit", "verify"]).await;
    assert!(text.contains("under another name"), "{text}");
    // The daemon starts all the same, and says so; backups matter more.
    end(place.daemon(2).await).await;
    let log = std::fs::read_to_string(place.path("log")).unwrap();
    assert!(log.contains("the journal does not have what it had when its head was last signed"), "{log}");
    // Having gone another way it is as long again, and still not the same.
    let store = vmkeep_store::open(&StoreConfig::new(place.state().join("store"))).unwrap();
    for n in 0..3 {
        let stream = StreamId::from("another");
        let append =
            Append { stream, expected: Seq(n), records: vec![b"{}".to_vec()], summary: None, key: None };
        store.append(append).await.unwrap();
    }
    drop(store);
    let text = place.refused(codes::STORE_DAMAGED, &held).await;
    assert!(text.contains("commit 5 is not the one"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_go_to_the_log_and_are_believed_under_their_own_keys_only() {
    let place = Place::new();
    let text = place.refused(codes::USAGE, &["audit", "key"]).await;
    assert!(text.contains("there is no key yet"), "{text}");
    place.append(0, 2).await;
    let child = place.daemon(1).await;
    let old = place.said(&["audit", "key"]).await.trim().to_owned();
    let change = place.said(&["audit", "rotate-key"]).await;
    let new = place.said(&["audit", "key"]).await.trim().to_owned();
    assert!(old != new && change.contains(&old) && change.contains(&new), "{change}");
    end(child).await;
    place.append(2, 1).await;
    end(place.daemon(3).await).await;
    assert_eq!(place.lines().len(), 3);
    let audit = heads::folder(&place.state());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&audit), mode(&audit.join("key")), mode(&log_path(&audit))), (0o700, 0o600, 0o600));

    // The lines are taken out of the log as they are.
    let log = std::fs::read_to_string(place.path("log")).unwrap();
    let found: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split_once("{\"vmkeep\":").map(|(before, _)| &line[before.len()..]))
        .collect();
    assert_eq!(found, place.lines(), "{log}");
    std::fs::write(place.path("kept"), found.join("\n") + "\n").unwrap();
    let kept = place.path("kept");
    let kept = kept.to_str().unwrap();
    for key in [&old, &new] {
        place.said(&["audit", "verify", "--heads", kept, "--public-key", key]).await;
    }
    let stranger = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let args = ["audit", "verify", "--heads", kept, "--public-key", stranger];
    let text = place.refused(codes::STORE_DAMAGED, &args).await;
    assert!(text.contains("no trusted key vouches"), "{text}");
    let changed = found.join("\n").replacen("\"commit\":2", "\"commit\":1", 1);
    std::fs::write(kept, changed + "\n").unwrap();
    let args = ["audit", "verify", "--heads", kept, "--public-key", &old];
    let text = place.refused(codes::STORE_DAMAGED, &args).await;
    assert!(text.contains("line 1") && text.contains("signature"), "{text}");
    std::fs::write(kept, "").unwrap();
    place.refused(codes::USAGE, &args).await;
    assert_eq!(place.vmkeep(&args[..4]).await.status.code(), Some(64), "heads without a key prove nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_signed_when_a_job_ends_and_covers_it() {
    let daemon = support::Daemon::start().await;
    let sealer = Arc::new(heads::Sealer::new(daemon.store.clone(), daemon.dir.path()));
    let sealing = tokio::spawn(sealer.clone().regularly());
    let path = log_path(&heads::folder(daemon.dir.path()));
    daemon.gates.add_permits(2);
    let accepted = daemon.client.post("/v1/snapshot", &support::Daemon::request(), None).await.unwrap();
    let Accepted::Job(row) = accepted else { panic!("it only showed a plan") };
    daemon.engine.wait(row.id).await.unwrap();
    let last = daemon.store.head().await.unwrap().unwrap();
    let covered = async {
        loop {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            if let Some(Ok(Line::Head(signed))) = text.lines().last().map(Line::parse)
                && signed.head.commit >= last.number
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // Long before the next regular one.
    tokio::time::timeout(heads::EVERY / 2, covered).await.expect("the end of a job is signed");
    sealing.abort();
}

//! Hosts that share vaults, each with a state folder and a configuration of its own; backups made through the vault's own API;
//! and `vmkeep` as a process that has no terminal, or one that the test types at.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;
use tempfile::TempDir;
use vmkeep_host::config::{Config, Overrides, Surroundings};
use vmkeep_host::vaults;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_vault::manifest::{Disk, Stream};
use vmkeep_vault::vault::Vault;
use vmkeep_vault::write::{Extent, Options, Outcome, Parts, Readiness, Session};

/// Bytes of a chunk.
pub(crate) const C: usize = 64 << 10;
pub(crate) const DOMAIN: DomainId = DomainId::new([0xd0; 16]);
pub(crate) const DEFINITION: &str = "<domain type='kvm'>\n  <name>web1</name>\n</domain>\n";

/// Vaults below one folder, and the hosts that use them.
pub(crate) struct World(TempDir);

impl World {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A host that knows the vaults `home` and `other`, each opened by a key file of the world's.
    pub(crate) fn host(&self, name: &str) -> Host {
        let state = self.path(name);
        let config = self.path(&format!("{name}.toml"));
        let vault = |vault: &str| {
            let (folder, key) = (self.path(vault), self.path(&format!("{vault}.key")));
            format!("[vaults.{vault}]\nurl = \"file://{}\"\nkey_file = {key:?}\n", folder.display())
        };
        let text = format!("state_dir = {state:?}\n{}{}", vault("home"), vault("other"));
        std::fs::write(&config, text).unwrap();
        Host { state, config }
    }

    /// Writes a file with these rights.
    pub(crate) fn file(&self, name: &str, text: &str, mode: u32) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// All files below a folder of a vault, the largest first.
    pub(crate) fn objects(&self, below: &str) -> Vec<PathBuf> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        walk(&self.path(below), &mut found);
        found.sort_by_key(|path| std::cmp::Reverse(path.metadata().unwrap().len()));
        found
    }
}

/// A host.
pub(crate) struct Host {
    pub(crate) state: PathBuf,
    config: PathBuf,
}

impl Host {
    fn command(&self, terminal: &[&str], args: &[&str]) -> Command {
        self.vmkeep(terminal, &[&["vault"], args].concat())
    }

    /// Any command.
    pub(crate) fn vmkeep(&self, terminal: &[&str], args: &[&str]) -> Command {
        // Without a terminal of its own it would ask at that of whoever runs the tests.
        let mut command = Command::new("setsid");
        command.args(terminal).args(["--wait", env!("CARGO_BIN_EXE_vmkeep")]).args(args);
        command.arg("--config").arg(&self.config);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", "/nonexistent");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Said {
        Said::of(self.command(&[], args).stdin(Stdio::null()).output().unwrap())
    }

    /// Runs what must succeed, and gives its JSON.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let said = self.run(&[args, &["--json"]].concat());
        said.must(0);
        serde_json::from_str(&said.out).unwrap()
    }

    /// Runs it at a terminal.
    pub(crate) fn at_a_terminal(&self, args: &[&str]) -> Typist {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let not_ours = rustix::fs::OFlags::NOCTTY.bits().cast_signed();
        let mut slave = std::fs::File::options();
        slave.read(true).write(true).custom_flags(not_ours);
        let slave = slave.open(name.to_str().unwrap()).unwrap();
        let mut command = self.command(&["--ctty"], args);
        command.stdin(slave).stdout(Stdio::piped()).stderr(Stdio::piped());
        Typist { terminal: master.into(), child: command.spawn().unwrap(), seen: String::new(), read: 0 }
    }

    /// The vault as the daemon opens it.
    pub(crate) async fn open(&self, vault: &str) -> Vault {
        let overrides = Overrides { config: Some(self.config.clone()), ..Overrides::default() };
        let around = Surroundings { env: [("HOME".to_owned(), "/nonexistent".into())].into(), uid: 1000 };
        let config = Config::load(&overrides, &around).unwrap();
        let settings = vaults::find(&config, vault).unwrap();
        Box::pin(vaults::open(&settings, &config.state_dir, None)).await.unwrap()
    }

    /// Makes the vault `home` or `other`, and its key file.
    pub(crate) fn init(&self, world: &World, vault: &str) {
        let words = world.path(&format!("{vault}.words"));
        self.run(&["init", vault, "--recovery-file", words.to_str().unwrap()]).must(0);
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: u16,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            status: u16::try_from(output.status.code().expect("it ended by itself")).unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub(crate) fn must(&self, status: u16) -> &Self {
        assert_eq!(self.status, status, "{}{}", self.out, self.err);
        self
    }

    /// An error that names its object, and says the way on.
    #[track_caller]
    pub(crate) fn told(&self, code: vmkeep_workflow::Code, object: &str) -> &Self {
        self.must(code.0);
        assert!(self.err.contains(object) && self.err.contains("remedy"), "{object:?}: {}", self.err);
        self
    }
}

/// Somebody at a terminal.
pub(crate) struct Typist {
    terminal: std::fs::File,
    child: Child,
    seen: String,
    read: usize,
}

impl Typist {
    /// Reads until a question is there, and gives all that came since the last one.
    pub(crate) fn question(&mut self, question: &str) -> String {
        let mut piece = [0; 4096];
        loop {
            if let Some(at) = self.seen[self.read..].find(question) {
                let end = self.read + at + question.len();
                let text = self.seen[self.read..end].to_owned();
                self.read = end;
                return text;
            }
            let count = self.terminal.read(&mut piece).unwrap_or(0);
            assert!(count > 0, "it never asked {question:?}: {}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&piece[..count]));
        }
    }

    pub(crate) fn type_in(&mut self, line: &str) {
        self.terminal.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Waits for its end; with all that was on the terminal.
    pub(crate) fn end(mut self) -> (Said, String) {
        // Whoever asks for more than was to be typed is told that there is nothing more.
        let _ = self.terminal.write_all(b"\x04");
        // Once nobody has the terminal open any more, reading fails.
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = self.terminal.read(&mut piece) {
            self.seen.push_str(&String::from_utf8_lossy(&piece[..count]));
        }
        (Said::of(self.child.wait_with_output().unwrap()), self.seen)
    }
}

/// The 24 words, out of what was shown.
pub(crate) fn words(shown: &str) -> String {
    let (_, table) = shown.split_once("is not:").unwrap();
    let words: Vec<&str> = table
        .split_whitespace()
        .take(48)
        .enumerate()
        .filter_map(|(at, word)| (at % 2 == 1).then_some(word))
        .collect();
    assert_eq!(words.len(), 24, "{shown}");
    words.join(" ")
}

/// Bytes that do not shrink, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Makes a checked backup of one disk, `vda`, with firmware variables. With a parent, that disk's chunks which are equal to
/// the old ones are not read.
pub(crate) async fn backup(vault: &Vault, disk: &[u8], parent: Option<(BackupId, &[u8])>) -> BackupId {
    Box::pin(written(vault, disk, parent, jiff::Timestamp::now())).await
}

/// Makes one of an instant.
pub(crate) async fn backup_of(vault: &Vault, disk: &[u8], at: &str) -> String {
    Box::pin(written(vault, disk, None, at.parse().unwrap())).await.to_string()
}

async fn written(
    vault: &Vault,
    disk: &[u8],
    parent: Option<(BackupId, &[u8])>,
    at: jiff::Timestamp,
) -> BackupId {
    let mut session = Box::pin(Session::begin(vault, DOMAIN, Options::default())).await.unwrap();
    let tree = match parent {
        None => None,
        Some((parent, _)) => {
            let parent = Box::pin(session.parent(parent)).await.unwrap().unwrap();
            Some(parent.manifest.disks[0].image.tree())
        }
    };
    let parts = disk.chunks(C).enumerate().map(|(at, chunk)| match parent {
        Some((_, old)) if old[at * C..][..chunk.len()] == *chunk => Extent::Unchanged(chunk.len() as u64),
        _ if chunk.iter().all(|byte| *byte == 0) => Extent::Zero(chunk.len() as u64),
        _ => Extent::Data(chunk.to_vec().into()),
    });
    let source = &mut Parts::new(parts.collect());
    let written = session.write_image(source, disk.len() as u64, BlobType::Data, tree);
    let written = Box::pin(written).await.unwrap();
    let variables = noise(99, 1000);
    let source = &mut Parts::new(vec![Extent::Data(variables.into())]);
    let stream = Box::pin(session.write_image(source, 1000, BlobType::Stream, None)).await.unwrap();
    let id = BackupId::now();
    let mut manifest = session.manifest(id, at);
    manifest.domain_name = "web1".into();
    manifest.definition = DEFINITION.into();
    manifest.parent = parent.map(|(parent, _)| parent);
    manifest.disks.push(Disk {
        dirty: written.read,
        stored: written.stored,
        ..Disk::new("vda", written.image, "raw")
    });
    manifest.streams.push(Stream { name: "nvram".into(), image: stream.image });
    let Readiness::Ready(prepared) = Box::pin(session.prepare(&manifest)).await.unwrap() else {
        panic!("not ready")
    };
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
    session.end().await.unwrap();
    id
}

/// Flips a byte in the middle of an object.
pub(crate) fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x20;
    std::fs::write(path, bytes).unwrap();
}

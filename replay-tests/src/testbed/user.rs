//! The unprivileged user that the test hypervisor runs as.
//!
//! For root `qemu:///session` is the daemon of the whole host, and QEMU under root reaches `/dev/kvm`, which on
//! some machines exists and does not work. So root runs the hypervisor as a system user made for it; everybody
//! else runs it as themselves.

use super::error::{Error, Result};
use std::{
    fs,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::PathBuf,
    process::Command,
};

/// The name of the user that root starts the hypervisor as, unless `VMKEEP_TEST_USER` names another.
const DEFAULT_USER: &str = "vmkeep-test";

/// An unprivileged user, with its numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestUser {
    /// Login name.
    pub name: String,
    /// User id, never 0.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Home folder as the passwd entry names it.
    pub home: PathBuf,
}

impl TestUser {
    /// The caller itself, or, when it is root, the user made for tests.
    pub fn current() -> Result<Self> {
        let uid = rustix::process::geteuid();
        let key = if uid.is_root() {
            std::env::var("VMKEEP_TEST_USER").unwrap_or_else(|_| DEFAULT_USER.to_owned())
        } else {
            uid.as_raw().to_string()
        };
        Self::lookup(&key)
    }

    /// Finds a user by name or number. Refuses root.
    pub fn lookup(key: &str) -> Result<Self> {
        let output = Command::new("getent")
            .args(["passwd", key])
            .output()
            .map_err(|source| Error::Spawn { program: "getent".into(), source })?;
        let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let no_user = || Error::NoUser { user: key.to_owned() };
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else { return Err(no_user()) };
        let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse()) else { return Err(no_user()) };
        if uid == 0 {
            return Err(Error::Unclear { what: "an unprivileged user".into(), answer: key.to_owned() });
        }
        Ok(Self { name: name.to_owned(), uid, gid, home: home.into() })
    }

    /// Makes `command` run as this user, without supplementary groups when that means giving up root.
    pub(crate) fn run_as(&self, command: &mut Command) {
        if rustix::process::geteuid().is_root() {
            command.uid(self.uid).gid(self.gid); // std also empties the list of supplementary groups
        }
    }

    /// Whether this user, without supplementary groups, may open `/dev/kvm`.
    pub(crate) fn reaches_kvm(&self) -> bool {
        let path = "/dev/kvm";
        if !rustix::process::geteuid().is_root() {
            return fs::OpenOptions::new().read(true).write(true).open(path).is_ok();
        }
        let Ok(meta) = fs::metadata(path) else { return false };
        let class = match () {
            () if meta.uid() == self.uid => 6,
            () if meta.gid() == self.gid => 3,
            () => 0,
        };
        (meta.mode() >> class) & 6 == 6
    }
}

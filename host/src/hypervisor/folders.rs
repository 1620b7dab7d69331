//! Where libvirt keeps its persistent definitions and what no definition names, and making definitions durable.
//!
//! libvirt writes a definition aside, fsyncs it and renames it, but never fsyncs the folder: after a power cut the old
//! definition may be back. Which folder it is depends on the daemon: the system's is fixed, a session's depends on the
//! environment that *it* was started with, which the kernel tells.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use vmkeep_libvirt::uri::Scope;
use vmkeep_libvirt::{LocalUri, Status};
use vmkeep_steps::hypervisor::{HvError, HvResult, OwnFolders, Trouble};

use super::Libvirt;

impl Libvirt {
    pub(super) async fn sync_folders(&self) -> HvResult<()> {
        let uri = self.client.uri().clone();
        if uri.is_test() {
            return Ok(());
        }
        let daemon = match self.client.status() {
            Status::Connected { instance, .. } => instance.map(|daemon| daemon.process.pid),
            Status::Disconnected { .. } => None,
        };
        let done = tokio::task::spawn_blocking(move || {
            let folder = definitions(&uri, daemon)?;
            let sync = |folder: &Path| {
                std::fs::File::open(folder).and_then(|dir| dir.sync_all()).map_err(|e| {
                    HvError::new(Trouble::Io, format!("{} could not be made durable: {e}", folder.display()))
                })
            };
            // Links to the definitions of what starts with the host; made with the first of them.
            let autostart = folder.join("autostart");
            if autostart.is_dir() {
                sync(&autostart)?;
            }
            sync(&folder)
        });
        done.await.unwrap_or_else(|e| Err(HvError::new(Trouble::Io, e.to_string())))
    }

    pub(super) async fn folders_of_libvirt(&self) -> HvResult<OwnFolders> {
        let uri = self.client.uri().clone();
        let daemon = match self.client.status() {
            Status::Connected { instance, .. } => instance.map(|daemon| daemon.process.pid),
            Status::Disconnected { .. } => None,
        };
        let found = tokio::task::spawn_blocking(move || own_folders(&uri, daemon));
        found.await.unwrap_or_else(|e| Err(HvError::new(Trouble::Io, e.to_string())))
    }
}

/// The system's are fixed; a session's lie beside its definitions.
fn own_folders(uri: &LocalUri, daemon: Option<u32>) -> HvResult<OwnFolders> {
    let system = match uri.scope() {
        Scope::System => true,
        Scope::Session => rustix::process::geteuid().is_root(),
        Scope::Embed | Scope::Other(_) => {
            let text = "where this driver keeps firmware variables and TPM state is not known";
            return Err(HvError::new(Trouble::Unsupported, text));
        }
    };
    if system {
        let of = |name: &str| Path::new("/var/lib/libvirt").join(name);
        return Ok(OwnFolders { nvram: of("qemu/nvram"), tpm: of("swtpm"), save: of("qemu/save") });
    }
    let base = definitions(uri, daemon)?;
    Ok(OwnFolders { nvram: base.join("nvram"), tpm: base.join("swtpm"), save: base.join("save") })
}

/// The folder of the persistent definitions.
pub(super) fn definitions(uri: &LocalUri, daemon: Option<u32>) -> HvResult<PathBuf> {
    let system = || PathBuf::from("/etc/libvirt/qemu");
    match uri.scope() {
        Scope::System => Ok(system()),
        // For root the session is the system's.
        Scope::Session if rustix::process::geteuid().is_root() => Ok(system()),
        Scope::Session => {
            let of = |key: &str| daemon.and_then(|pid| variable_of(pid, key)).or_else(|| own(key));
            of("XDG_CONFIG_HOME")
                .or_else(|| Some(of("HOME")?.join(".config")))
                .map(|base| base.join("libvirt/qemu"))
                .ok_or_else(|| {
                    HvError::new(Trouble::Missing, "where libvirt keeps its definitions is not known")
                })
        }
        Scope::Embed => {
            let root =
                uri.as_str().split_once("root=").map(|(_, rest)| rest.split('&').next().unwrap_or(rest));
            root.map(|root| Path::new(root).join("etc/qemu"))
                .ok_or_else(|| HvError::new(Trouble::Missing, "the embedded driver has no root folder"))
        }
        Scope::Other(_) => Err(HvError::new(Trouble::Unsupported, "this driver keeps no definitions")),
    }
}

fn own(key: &str) -> Option<PathBuf> {
    std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// A variable of the environment that another process was started with.
fn variable_of(pid: u32, key: &str) -> Option<PathBuf> {
    let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value = environ
        .split(|b| *b == 0)
        .find_map(|entry| entry.strip_prefix(key.as_bytes())?.strip_prefix(b"="))?;
    (!value.is_empty()).then(|| PathBuf::from(std::ffi::OsString::from_vec(value.to_vec())))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_sessions_folder_is_the_one_of_the_daemons_own_environment() {
        let mut daemon = std::process::Command::new("cat")
            .env_clear()
            .env("XDG_CONFIG_HOME", "/a/config")
            .env("HOME", "/a/home")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // A process has no environment to show until it runs; what it answers, it answers as one that does.
        daemon.stdin.as_mut().unwrap().write_all(b"!").unwrap();
        daemon.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        assert_eq!(variable_of(daemon.id(), "XDG_CONFIG_HOME"), Some("/a/config".into()));
        assert_eq!(variable_of(daemon.id(), "XDG_CONFIG"), None);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    #[test]
    fn the_embedded_drivers_folder_is_below_its_root() {
        let uri = LocalUri::parse("qemu:///embed?root=/some/where").unwrap();
        assert_eq!(definitions(&uri, None).unwrap(), Path::new("/some/where/etc/qemu"));
    }
}

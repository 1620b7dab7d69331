//! A block device of the host for a test: a loop device over a file, which the hypervisor's user may use.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Host;
use super::bed::give;

/// Detached when dropped; to be dropped after the host, whose guests hold it.
pub struct LoopDevice(pub PathBuf);

impl LoopDevice {
    /// Only root can make one, and not everywhere: elsewhere the test says that it proves nothing, and ends.
    pub fn new(host: &Host, name: &str, size: u64) -> Option<Self> {
        let file = host.hypervisor.dir().join(name);
        fs::File::create(&file).unwrap().set_len(size).unwrap();
        let made = losetup(host, &["--find".as_ref(), "--show".as_ref(), file.as_os_str()]);
        let made = match made {
            Ok(made) if made.status.success() => made,
            other => {
                println!("SKIPPED: no loop device can be made here: {other:?}");
                return None;
            }
        };
        let device = Self(String::from_utf8(made.stdout).unwrap().trim().into());
        give(host, &device.0);
        Some(device)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

fn losetup(host: &Host, args: &[&std::ffi::OsStr]) -> std::io::Result<std::process::Output> {
    Command::new("losetup").env("PATH", &host.hypervisor.env()["PATH"]).args(args).output()
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let root = rustix::process::geteuid();
        let _ = std::os::unix::fs::chown(&self.0, Some(root.as_raw()), None);
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

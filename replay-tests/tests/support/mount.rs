//! A small file system of its own, which can be filled to the last byte.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::{Host, run};

/// A file system of its own, in memory. Unmounted when dropped, so it must be dropped before its host.
pub struct Mount(pub PathBuf);

impl Mount {
    /// Only root can mount: elsewhere the test says that it proves nothing, and ends.
    pub fn new(host: &Host, name: &str, mib: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root can mount a small file system");
            return None;
        }
        let at = host.hypervisor.dir().join(name);
        fs::create_dir(&at).unwrap();
        let user = host.hypervisor.user();
        let options = format!("size={mib}m,mode=755,uid={},gid={}", user.uid, user.gid);
        run("mount", &["-t", "tmpfs", "-o", &options, "vmkeep-test", at.to_str().unwrap()]);
        Some(Self(at))
    }

    /// Takes all room but `spare` bytes, as root may.
    pub fn fill(&self, spare: u64) {
        let room = rustix::fs::statvfs(&self.0).unwrap();
        let free = room.f_bavail * room.f_frsize;
        let filler = fs::File::create(self.0.join("filler")).unwrap();
        for at in (0..free.saturating_sub(spare)).step_by(65536) {
            // The last of it somebody else may have been quicker to take.
            let _ = rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), at, 65536);
        }
    }

    pub fn clear(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a process of the test bed that holds a file there ends soon after.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

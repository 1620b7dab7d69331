//! File systems of a test's own: a small one, which can be filled to the last byte, and one that refuses.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::bed::{folder, give};
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

    /// The same on a disk that outlives the host: a file with ext4 in it.
    pub fn on_disk(host: &Host, name: &str, mib: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root can mount a small file system");
            return None;
        }
        let (at, file) =
            (host.hypervisor.dir().join(name), host.hypervisor.dir().join(format!("{name}.ext4")));
        fs::create_dir(&at).unwrap();
        fs::File::create(&file).unwrap().set_len(mib << 20).unwrap();
        let path = host.hypervisor.env().remove("PATH").unwrap();
        for (program, args) in [
            ("mkfs.ext4", vec!["-q".as_ref(), "-F".as_ref(), file.as_os_str()]),
            ("mount", vec!["-o".as_ref(), "loop".as_ref(), file.as_os_str(), at.as_os_str()]),
        ] {
            let done = Command::new(program).env("PATH", &path).args(args).output().unwrap();
            if !done.status.success() {
                println!("SKIPPED: {program}: {}", String::from_utf8_lossy(&done.stderr));
                return None;
            }
        }
        // What every new ext4 has at its top.
        fs::remove_dir(at.join("lost+found")).unwrap();
        give(host, &at);
        Some(Self(at))
    }

    /// Lets nobody write any more, or again.
    pub fn read_only(&self, on: bool) {
        let mode = if on { "remount,ro" } else { "remount,rw" };
        run("mount", &["-o", mode, self.0.to_str().unwrap()]);
    }

    /// Takes all room but `spare` bytes, as root may.
    pub fn fill(&self, spare: u64) {
        let room = rustix::fs::statvfs(&self.0).unwrap();
        let free = room.f_bavail * room.f_frsize;
        let filler = fs::File::create(self.0.join("filler")).unwrap();
        let (all, mut at) = (free.saturating_sub(spare), 0);
        for step in [65536, room.f_frsize] {
            // The last of it somebody else may have been quicker to take.
            while at + step <= all
                && rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), at, step).is_ok()
            {
                at += step;
            }
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

/// Folders for backups on one file system of its own, which can be filled, and go away and come back as it was.
pub struct Target {
    /// Where each is seen, and its name on the file system.
    folders: Vec<(PathBuf, String)>,
    room: Mount,
}

impl Target {
    /// Only root can mount: elsewhere there is none.
    pub fn new(host: &Host, mib: u64, folders: &[PathBuf]) -> Option<Self> {
        let room = Mount::new(host, "target", mib)?;
        let made = folders.iter().enumerate().map(|(number, at)| {
            folder(host, at.parent().unwrap());
            // Where it is not mounted there is a folder that nobody but root may write to.
            fs::create_dir(at).unwrap();
            let name = number.to_string();
            folder(host, &room.0.join(&name));
            (at.clone(), name)
        });
        let target = Self { folders: made.collect(), room };
        target.come_back();
        Some(target)
    }

    pub fn lose(&self) {
        for (at, _) in &self.folders {
            run("umount", &["-l", at.to_str().unwrap()]);
        }
    }

    pub fn come_back(&self) {
        for (at, name) in &self.folders {
            run("mount", &["--bind", self.room.0.join(name).to_str().unwrap(), at.to_str().unwrap()]);
        }
    }

    /// Takes all room but `spare` bytes.
    pub fn fill(&self, spare: u64) {
        self.room.fill(spare);
    }

    pub fn clear(&self) {
        self.room.clear();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        for (at, _) in &self.folders {
            let _ = Command::new("umount").arg("-l").arg(at).status();
        }
    }
}

/// A folder of the hypervisor's user, seen through a file system that refuses to change modes. Unmounted when dropped.
pub struct Refusing(pub PathBuf);

impl Refusing {
    /// Only root can let others use a file system of its own: elsewhere the test says that it proves nothing, and ends.
    pub fn new(host: &Host, name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root can mount a file system that refuses");
            return None;
        }
        let dir = host.hypervisor.dir();
        let behind = folder(host, &dir.join(format!("{name}.behind")));
        let at = folder(host, &dir.join(name));
        run("bindfs", &["--chmod-deny", behind.to_str().unwrap(), at.to_str().unwrap()]);
        Some(Self(at))
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

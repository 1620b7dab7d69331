//! The QEMU process behind a domain, and the files it holds.
//!
//! Invariant: a process is named only when it is surely the domain's: libvirt's own pid file says so
//! and its command line bears the domain's UUID, or it is the only process of this host whose command
//! line does. Doubt is an error, never a guess.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::Domain;
use crate::error::{Error, ErrorCode, Result};
use crate::instance::ProcessId;

/// A file that a process has open.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OpenFile {
    /// Its path when it was opened, as the kernel tells it now.
    pub path: PathBuf,
    /// Its device number.
    pub dev: u64,
    /// Its inode number.
    pub ino: u64,
    /// Whether it has been unlinked.
    pub deleted: bool,
}

/// The files and block devices that a process has open, without duplicates.
///
/// # Errors
/// `PermissionDenied` for another user's process; `NotFound` when it is gone, or another process now
/// has its number.
pub fn open_files(process: &ProcessId) -> io::Result<Vec<OpenFile>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", process.pid))? {
        let link = entry?.path();
        // Descriptors come and go while they are listed.
        let (Ok(target), Ok(meta)) = (fs::read_link(&link), fs::metadata(&link)) else { continue };
        let kind = meta.mode() & libc::S_IFMT;
        if !(kind == libc::S_IFREG || kind == libc::S_IFBLK) || !target.is_absolute() {
            continue;
        }
        let deleted = meta.nlink() == 0;
        let text = target.as_os_str().as_bytes();
        let path = match text.strip_suffix(b" (deleted)") {
            Some(name) if deleted => PathBuf::from(std::ffi::OsStr::from_bytes(name)),
            _ => target,
        };
        found.insert(OpenFile { path, dev: meta.dev(), ino: meta.ino(), deleted });
    }
    if !process.is_alive() {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    }
    Ok(found.into_iter().collect())
}

impl Domain {
    /// The QEMU process of a running domain; `None` when it does not run.
    ///
    /// # Errors
    /// libvirt's; [`ErrorCode::Unreadable`] when no visible process, or more than one, bears its
    /// UUID.
    pub fn qemu_process(&self) -> Result<Option<ProcessId>> {
        if self.id().is_none() && !self.is_active()? {
            return Ok(None);
        }
        if let Some(process) = self.process_by_pid_file() {
            return Ok(Some(process));
        }
        let claimants = processes_with_uuid(self.uuid()).map_err(|e| self.proc_error(&e))?;
        match claimants.as_slice() {
            // It may have ended in between; else it is hidden from this process.
            [] if !self.is_active()? => Ok(None),
            [] => {
                let message = "it runs, but no process that can be seen bears its UUID";
                Err(Error::own("/proc", self.label(), ErrorCode::Unreadable, message))
            }
            [one] => Ok(Some(one.clone())),
            many => {
                let message = format!("{} processes bear its UUID", many.len());
                Err(Error::own("/proc", self.label(), ErrorCode::Unreadable, message))
            }
        }
    }

    /// The QEMU process of a domain that libvirt says is off: libvirt's own pid file names it, and it bears the domain's
    /// UUID. For an instant that is so of every domain that is just being ended; if it lasts, libvirt has forgotten the
    /// domain. `None` for a domain that runs.
    ///
    /// # Errors
    /// libvirt's.
    pub fn forgotten_process(&self) -> Result<Option<ProcessId>> {
        Ok(if self.is_active()? { None } else { self.process_by_pid_file() })
    }

    /// The files that the domain's QEMU process has open; `None` when it does not run.
    ///
    /// # Errors
    /// [`ErrorCode::AccessDenied`] when this process may not look; those of [`Self::qemu_process`].
    pub fn qemu_open_files(&self) -> Result<Option<Vec<OpenFile>>> {
        let Some(process) = self.qemu_process()? else { return Ok(None) };
        match open_files(&process) {
            Ok(files) => Ok(Some(files)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.proc_error(&e)),
        }
    }

    fn proc_error(&self, e: &io::Error) -> Error {
        let code = match e.kind() {
            io::ErrorKind::PermissionDenied => ErrorCode::AccessDenied,
            _ => ErrorCode::SystemError,
        };
        Error { errno: e.raw_os_error(), ..Error::own("/proc", self.label(), code, e.to_string()) }
    }

    fn process_by_pid_file(&self) -> Option<ProcessId> {
        let folder = self.conn().run_folder.as_ref()?;
        // The user's own daemon keeps them one level deeper than the system's.
        ["qemu/run", "qemu"].iter().find_map(|sub| {
            let file = folder.join(sub).join(format!("{}.pid", self.name()));
            let pid: u32 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
            bears_uuid(pid, self.uuid()).ok()?.then(|| ProcessId::of(pid).ok()).flatten()
        })
    }
}

/// Whether a process was started with `-uuid UUID`.
fn bears_uuid(pid: u32, uuid: Uuid) -> io::Result<bool> {
    let text = fs::read(format!("/proc/{pid}/cmdline"))?;
    let mut arguments = text.split(|b| *b == 0);
    let uuid = uuid.to_string();
    while let Some(argument) = arguments.next() {
        if argument == b"-uuid" {
            return Ok(arguments.next().is_some_and(|value| value.eq_ignore_ascii_case(uuid.as_bytes())));
        }
    }
    Ok(false)
}

fn processes_with_uuid(uuid: Uuid) -> io::Result<Vec<ProcessId>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        // Processes end while they are listed.
        if bears_uuid(pid, uuid).unwrap_or(false)
            && let Ok(process) = ProcessId::of(pid)
        {
            found.push(process);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_held_open_are_seen_also_when_unlinked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a (deleted)");
        let file = fs::File::create(&path).unwrap();
        let me = ProcessId::of(std::process::id()).unwrap();
        let seen = |files: Vec<OpenFile>| {
            let ino = file.metadata().unwrap().ino();
            files.into_iter().find(|f| f.ino == ino).map(|f| (f.path, f.deleted))
        };
        assert_eq!(seen(open_files(&me).unwrap()), Some((path.clone(), false)));
        fs::remove_file(&path).unwrap();
        assert_eq!(seen(open_files(&me).unwrap()), Some((path, true)));
        let other = ProcessId { start: me.start + 1, ..me };
        assert_eq!(open_files(&other).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_process_is_known_by_the_uuid_it_was_started_with() {
        let uuid = Uuid::new_v4();
        let mut fake = std::process::Command::new("sh")
            .args(["-c", "echo; read x", "sh", "-name", "guest=x", "-uuid", &uuid.to_string()])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its command line is there only after it has begun to run.
        let mut line = [0];
        std::io::Read::read_exact(fake.stdout.as_mut().unwrap(), &mut line).unwrap();
        assert_eq!(processes_with_uuid(uuid).unwrap(), [ProcessId::of(fake.id()).unwrap()]);
        assert!(!bears_uuid(fake.id(), Uuid::new_v4()).unwrap());
        drop(fake.stdin.take());
        fake.wait().unwrap();
        assert_eq!(processes_with_uuid(uuid).unwrap(), []);
    }
}

//! Which process executes our calls: the identity of a libvirtd, and of processes in general.
//!
//! Invariant: two [`ProcessId`]s are equal only if they mean the same process of the same boot. A
//! number alone is reused; number, start time and boot id together are not.
//!
//! Why it matters: libvirtd executes calls of clients that are gone. Whether a call that never returned
//! can still take effect is decided by whether the daemon that took it still lives, so a journal must
//! be able to name that daemon. The kernel tells who listens on the daemon's socket (`SO_PEERCRED`);
//! under socket activation that is the init process, which made the socket, and then the daemon's pid
//! file says who it is. The answer is taken before and after the connection is made: only if both
//! agree does it belong to the connection.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::uri::LocalUri;

/// A process, once and for all: its number, when it started, and in which boot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process number.
    pub pid: u32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start: u64,
    /// The kernel's random id of this boot.
    pub boot: String,
}

/// The daemon that executes the calls of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DaemonInstance {
    /// The process; this very process for drivers that run inside it.
    pub process: ProcessId,
    /// Its name: `libvirtd`, `virtqemud`, or that of this program.
    pub name: String,
}

impl ProcessId {
    /// The identity of a process that lives now.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let (_, start) = read_stat(pid)?;
        Ok(Self { pid, start, boot: boot_id()? })
    }

    /// Whether this very process still exists (a zombie does not count).
    pub fn is_alive(&self) -> bool {
        let same_boot = boot_id().is_ok_and(|b| b == self.boot);
        same_boot && read_stat(self.pid).is_ok_and(|(state, start)| start == self.start && state != b'Z')
    }
}

/// State letter and start time of a process.
fn read_stat(pid: u32) -> io::Result<(u8, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|e| match e.raw_os_error() {
        // The process ended between open and read.
        Some(libc::ESRCH) => io::Error::from(io::ErrorKind::NotFound),
        _ => e,
    })?;
    parse_stat(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/PID/stat"))
}

fn parse_stat(text: &str) -> Option<(u8, u64)> {
    // The name in parentheses may itself contain anything, parentheses and spaces included.
    let after_name = &text[text.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// The kernel's random id of this boot.
///
/// # Errors
/// Those of reading `/proc`.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn process_name(pid: u32) -> io::Result<String> {
    Ok(std::fs::read_to_string(format!("/proc/{pid}/comm"))?.trim_end_matches('\n').to_owned())
}

fn is_daemon_name(name: &str) -> bool {
    matches!(name, "libvirtd" | "virtqemud")
}

/// Who answers on a URI now; `None` when that cannot be told.
pub(crate) fn probe(uri: &LocalUri) -> Option<DaemonInstance> {
    if uri.is_in_process() {
        let pid = std::process::id();
        return Some(DaemonInstance { process: ProcessId::of(pid).ok()?, name: process_name(pid).ok()? });
    }
    let socket = uri.candidate_sockets().into_iter().find(|s| s.exists())?;
    let listener = peer_of(&socket).ok();
    listener
        .filter(|pid| process_name(*pid).is_ok_and(|n| is_daemon_name(&n)))
        .or_else(|| pid_from_file(&socket))
        .and_then(|pid| {
            Some(DaemonInstance { process: ProcessId::of(pid).ok()?, name: process_name(pid).ok()? })
        })
}

fn peer_of(socket: &Path) -> io::Result<u32> {
    let stream = UnixStream::connect(socket)?;
    let cred = rustix::net::sockopt::socket_peercred(&stream)?;
    u32::try_from(cred.pid.as_raw_nonzero().get()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// The pid file beside a daemon's socket. It is believed only if the process bears the daemon's name.
fn pid_from_file(socket: &Path) -> Option<u32> {
    let daemon = match socket.file_name()?.to_str()? {
        "virtqemud-sock" => "virtqemud",
        _ => "libvirtd",
    };
    let folder = socket.parent()?;
    // The system daemons write theirs one folder up.
    [Some(folder), folder.parent()].into_iter().flatten().find_map(|f| {
        let pid = std::fs::read_to_string(f.join(format!("{daemon}.pid"))).ok()?.trim().parse().ok()?;
        process_name(pid).is_ok_and(|n| is_daemon_name(&n)).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let tail: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let text = format!("77 (a) b) S {}", tail.join(" "));
        assert_eq!(parse_stat(&text), Some((b'S', 22)));
        assert_eq!(parse_stat("nonsense"), None);
    }

    #[test]
    fn a_process_is_itself_until_it_ends_and_its_number_alone_is_not_enough() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.is_alive());
        assert_eq!(id, ProcessId::of(child.id()).unwrap());
        assert!(!ProcessId { start: id.start + 1, ..id.clone() }.is_alive());
        assert!(!ProcessId { boot: "another".into(), ..id.clone() }.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!id.is_alive());
        assert_eq!(ProcessId::of(id.pid).map_err(|e| e.kind()), Err(io::ErrorKind::NotFound));
    }

    #[test]
    fn a_driver_inside_this_process_is_executed_by_this_process() {
        let instance = probe(&LocalUri::parse("test:///default").unwrap()).unwrap();
        assert_eq!(instance.process.pid, std::process::id());
    }
}

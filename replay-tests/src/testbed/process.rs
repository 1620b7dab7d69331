//! Processes: found through `/proc`, told apart by their start time, ended through a pidfd.
//!
//! A process belongs to a test bed when its environment names the bed's private runtime folder or its command
//! line names a path in the bed's folder, *and* its program is one that a test bed brings about. The second
//! condition spares the shell, pager or editor of somebody who looks into the folder.

use super::error::{Error, Result};
use super::system::HOLDER;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A process for certain: ids are used again, id and start time together are not (within one boot).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot, as in `/proc/PID/stat`.
    pub start: u64,
}

impl ProcessId {
    /// The process that has this id now, unless it is gone or a zombie. One whose first thread alone has ended is not gone:
    /// the others still hold its files, and their locks.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, so count from its end: state is field 3, threads field 20, start time
        // field 22.
        let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
        let threads: u32 = fields.get(17)?.parse().ok()?;
        if matches!(fields.first(), None | Some(&"Z" | &"X")) && threads <= 1 {
            return None;
        }
        Some(Self { pid, start: fields.get(19)?.parse().ok()? })
    }

    /// This very process.
    pub fn me() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal, unless the process has gone. Never reaches another process that got the same id.
    pub fn signal(self, signal: Signal) {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return };
        // The descriptor is bound to one process before its start time is compared: no gap is left between.
        let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        if self.is_alive() {
            // A failure means that it has gone meanwhile, or is not ours; who waits for its end will see that.
            let _ = pidfd_send_signal(fd, signal);
        }
    }

    /// `kill -9`, and waits until it has gone.
    pub fn kill(self) -> Result<()> {
        self.signal(Signal::KILL);
        self.wait_gone(Duration::from_secs(20))
    }

    /// Waits until it no longer runs (a zombie no longer runs).
    pub fn wait_gone(self, within: Duration) -> Result<()> {
        let what = || format!("the end of process {}", self.pid);
        until(within, what, || if self.is_alive() { Err("it runs".to_owned()) } else { Ok(()) })
    }
}

/// What a process of a test bed is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// `vmkeepd`, `vmkeep`, `virsh`: ended first, because they may start the others again.
    Client,
    /// `libvirtd`.
    Libvirtd,
    /// `virtlogd`, `virtlockd` and the like.
    Virtlogd,
    /// `qemu-system-…`.
    Qemu,
    /// Keeps the name space of a system daemon.
    Holder,
    /// `qemu-img`, `qemu-nbd`, `qemu-io`, `qemu-storage-daemon`.
    Helper,
    /// Anything else that names the folder; never ended.
    Other,
}

/// A process that has to do with a test bed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Which one.
    pub id: ProcessId,
    /// What it is.
    pub role: Role,
    /// Its arguments, the program first.
    pub args: Vec<String>,
}

impl Process {
    /// Value of `-name guest=…`, if this is a QEMU.
    pub fn qemu_domain(&self) -> Option<String> {
        let at = self.args.iter().position(|a| a == "-name")?;
        let value = self.args.get(at + 1)?.strip_prefix("guest=")?;
        // QEMU doubles a comma inside a value; the first single one ends the name.
        let mut name = String::new();
        let mut rest = value.chars().peekable();
        while let Some(c) = rest.next() {
            if c == ',' && rest.next_if_eq(&',').is_none() {
                break;
            }
            name.push(c);
        }
        Some(name)
    }

    /// The files that it has open, deleted ones included (their path then ends in " (deleted)").
    pub fn open_files(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.id.pid)) else { return Vec::new() };
        entries.flatten().filter_map(|e| fs::read_link(e.path()).ok()).filter(|p| p.is_absolute()).collect()
    }
}

fn role_of(program: &str) -> Role {
    let name = program.rsplit('/').next().unwrap_or(program);
    match name {
        "vmkeepd" | "vmkeep" | "virsh" => Role::Client,
        "libvirtd" | "virtqemud" => Role::Libvirtd,
        "virtlogd" | "virtlockd" | "virtstoraged" | "virtsecretd" | "virtnetworkd" => Role::Virtlogd,
        HOLDER => Role::Holder,
        "qemu-img" | "qemu-nbd" | "qemu-io" | "qemu-storage-daemon" | "qemu-pr-helper" => Role::Helper,
        _ if name.starts_with("qemu-system-") => Role::Qemu,
        _ => Role::Other,
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

/// All processes that have to do with the test bed in `dir`, this one and its ancestors excepted.
pub(crate) fn processes_of(dir: &Path) -> Vec<Process> {
    let mut inside = dir.as_os_str().as_bytes().to_vec();
    inside.push(b'/');
    let mut runtime = b"XDG_RUNTIME_DIR=".to_vec();
    runtime.extend_from_slice(&inside);
    let kin = ancestors();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<Process> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| !kin.contains(pid))
        .filter_map(|pid| {
            let id = ProcessId::of(pid)?;
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            // The environment of others cannot be read; it is then not a process of ours.
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let ours =
                find(&line, &inside) || environment.split(|b| *b == 0).any(|v| v.starts_with(&runtime));
            if !ours || !id.is_alive() {
                return None;
            }
            let mut args: Vec<String> =
                line.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
            args.pop();
            let role = role_of(args.first().map_or("", String::as_str));
            Some(Process { id, role, args })
        })
        .collect();
    found.sort_by_key(|p| (p.role, p.id));
    found
}

fn ancestors() -> Vec<u32> {
    let mut kin = vec![std::process::id()];
    while let Some(&pid) = kin.last() {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { break };
        let parent =
            stat.rfind(')').and_then(|at| stat.get(at + 1..)?.split_whitespace().nth(1)?.parse().ok());
        match parent {
            Some(parent) if parent > 0 && !kin.contains(&parent) => kin.push(parent),
            _ => break,
        }
    }
    kin
}

/// Ends every process of the test bed in `dir` (not those of role `Other`) and returns when none is left.
pub(crate) fn end_all(dir: &Path) -> Result<()> {
    let what = || format!("the processes of {} to end", dir.display());
    // A dying process loses its command line before its files: those that were signalled are waited for by id.
    let mut signalled = BTreeSet::new();
    until(Duration::from_secs(30), what, || {
        // Looked at again after each round: a dying libvirtd may have started one more.
        let found = processes_of(dir).into_iter().filter(|p| p.role != Role::Other).map(|p| p.id);
        signalled.extend(found);
        signalled.retain(|id: &ProcessId| id.is_alive());
        for process in &signalled {
            process.signal(Signal::KILL);
        }
        if signalled.is_empty() { Ok(()) } else { Err(format!("{signalled:?}")) }
    })
}

/// Tries `attempt` until it gives a value; its error is what was seen instead.
pub(crate) fn until<T>(
    within: Duration,
    what: impl Fn() -> String,
    mut attempt: impl FnMut() -> Result<T, String>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(seen) if began.elapsed() > within => {
                return Err(Error::Timeout { what: what(), after: within, seen });
            }
            Err(_) => std::thread::sleep(Duration::from_millis(3)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_process_id_is_never_signalled() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        let impostor = ProcessId { start: id.start - 1, ..id };
        assert!(!impostor.is_alive());
        impostor.signal(Signal::KILL);
        assert!(id.is_alive(), "the signal for an earlier process of this id hit a later one");
        id.signal(Signal::KILL);
        child.wait().unwrap();
        assert!(!id.is_alive());
    }

    #[test]
    fn the_name_of_a_domain_is_read_from_qemus_arguments_with_commas_and_quotes() {
        let args = |name: &str| {
            let args = ["qemu-system-x86_64", "-name", name].map(str::to_owned).to_vec();
            Process { id: ProcessId { pid: 1, start: 1 }, role: Role::Qemu, args }.qemu_domain()
        };
        assert_eq!(args("guest=a \"b\",,c,debug-threads=on").as_deref(), Some("a \"b\",c"));
        assert_eq!(args("guest=x,,").as_deref(), Some("x,"));
    }
}

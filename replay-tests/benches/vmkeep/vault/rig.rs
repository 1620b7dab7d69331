//! A host with vaults and guests, and what is measured of both.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB, data_offset};
use serde_json::Value;

use crate::support::bed::{configure, folder};
use crate::support::{Daemon, Host, files_below};

pub const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// Chunks of a vault, and clusters of an image.
pub const CHUNK: u64 = 64 << 10;

/// Bytes of data.
pub fn data() -> u64 {
    let asked = std::env::var("VMKEEP_BENCH_MIB").ok();
    asked.map_or(2048, |mib| mib.parse().expect("VMKEEP_BENCH_MIB: MiB")) * MIB
}

/// A guest with so much random data in a disk of this size. It ticks slowly: what it writes on its own is counted, too.
pub fn spec(name: &str, size: u64, data: u64) -> GuestSpec {
    GuestSpec::new(name).rate(1).disk(DiskSpec::new(size).data(data))
}

pub struct Rig {
    pub host: Host,
    pub daemon: Daemon,
}

/// What a command of vmkeep took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// Seconds.
    pub time: f64,
    /// Seconds of vmkeepd's threads, on any processor.
    pub cpu: f64,
}

impl Rig {
    /// With vaults of these names; those that begin with `sealed` are encrypted.
    pub fn new(vaults: &[String]) -> Self {
        let host = Host::new();
        let state = folder(&host, &host.hypervisor.dir().join("state"));
        let mut toml = String::new();
        for name in vaults {
            let place = folder(&host, &state.join("vaults").join(name));
            toml.push_str(&format!("[vaults.{name}]\nurl = \"file://{}\"\n", place.display()));
            if name.starts_with("sealed") {
                toml.push_str(&format!("key_file = \"{}\"\n", state.join(format!("{name}.key")).display()));
            }
        }
        configure(&host, &toml);
        for name in vaults {
            let words = state.join(format!("{name}.words"));
            match name.starts_with("sealed") {
                true => host.ok(&["vault", "init", name, "--recovery-file", &words.to_string_lossy()]),
                false => host.ok(&["vault", "init", name, "--plain"]),
            };
        }
        let daemon = host.daemon();
        Self { host, daemon }
    }

    pub fn boot(&self, spec: &GuestSpec) -> Guest {
        Guest::boot(&self.host.hypervisor, spec).expect("a guest")
    }

    /// A folder of the hypervisor's user, for peers.
    pub fn folder(&self, name: &str) -> PathBuf {
        folder(&self.host, &self.host.hypervisor.dir().join("state").join(name))
    }

    /// Runs a command of vmkeep that makes a job, from a machine that has nothing left to write.
    pub fn timed(&self, args: &[&str]) -> Took {
        rustix::fs::sync();
        let (begin, cpu) = (Instant::now(), spent(self.daemon.pid()));
        self.host.ok(args);
        Took { time: begin.elapsed().as_secs_f64(), cpu: spent(self.daemon.pid()) - cpu }
    }

    /// A backup of a guest into a vault.
    pub fn back_up(&self, guest: &Guest, vault: &str, more: &[&str]) -> Took {
        let took = self.timed(&[&["backup", guest.name(), "--vault", vault], more].concat());
        let job = self.job();
        let shown = self.host.json(&["job", "show", &job]);
        assert_eq!(shown["job"]["status"], "succeeded", "{shown:#}");
        report(&self.host, &job);
        took
    }

    /// The newest job.
    pub fn job(&self) -> String {
        self.host.jobs()[0]["id"].as_str().expect("a job").to_owned()
    }

    /// Bytes that QEMU's bitmap called dirty, of the newest backup's only disk.
    pub fn dirty(&self) -> f64 {
        let history = self.host.history(&self.job());
        let read = history.iter().find(|row| crate::support::about(row, "step_succeeded", "read"));
        let disk = &read.expect("a reading")["event"]["body"]["data"]["output"]["disks"][0]["disk"];
        assert!(disk["unchanged_since"].is_string(), "it was read whole: {disk:#}");
        disk["dirty"].as_f64().expect("dirty bytes")
    }

    fn place(&self, vault: &str) -> PathBuf {
        self.host.hypervisor.dir().join("state/vaults").join(vault)
    }

    /// Bytes of all files of a vault.
    pub fn size(&self, vault: &str) -> f64 {
        size(&self.place(vault), |_| true)
    }

    /// Throws a vault away, and the checkpoints that belong to it.
    pub fn discard(&self, vault: &str, guest: &Guest) {
        fs::remove_dir_all(self.place(vault)).expect("removed");
        for checkpoint in guest.virsh("checkpoint-list", &["--name"]).expect("a list").split_whitespace() {
            guest.virsh("checkpoint-delete", &["--checkpointname", checkpoint]).expect("deleted");
        }
    }

    /// The most memory that vmkeepd has had, in MiB.
    pub fn peak_mib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).expect("a status");
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
        let kib: f64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
        kib / 1024.0
    }
}

/// Bytes of the files below a folder whose names count.
pub fn size(folder: &Path, counts: impl Fn(&str) -> bool) -> f64 {
    let counts = |path: &PathBuf| path.file_name().is_some_and(|name| counts(&name.to_string_lossy()));
    let length = |path: PathBuf| fs::metadata(path).map_or(0, |file| file.len());
    files_below(folder).into_iter().filter(counts).map(length).sum::<u64>() as f64
}

/// Seconds that a process has run, with those of its threads that have ended.
fn spent(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let (_, after) = stat.rsplit_once(')').expect("a name");
    let ticks = after.split_whitespace().skip(11).take(2).map(|field| field.parse::<f64>().expect("ticks"));
    // Hundredths, whatever the kernel's own clock does.
    ticks.sum::<f64>() / 100.0
}

/// Where the time went, for whoever reads along.
fn report(host: &Host, job: &str) {
    let history = host.history(job);
    let at = |row: &Value| row["event"]["at"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
    let Some(begin) = history.first().and_then(at) else { return };
    let mut line = String::new();
    for row in &history {
        let body = &row["event"]["body"];
        if body["type"] == "step_succeeded"
            && let (Some(name), Some(at)) = (body["data"]["step"].as_str(), at(row))
        {
            line.push_str(&format!(" {name} {:.2}", at.duration_since(begin).as_secs_f64()));
        }
    }
    eprintln!("bench: seconds after the request:{line}");
}

/// Overwrites so many chunks, at places that come from the seed, among those that hold data; both of two guests are told the
/// same. They are durable on return.
pub fn overwrite(guest: &Guest, size: u64, data: u64, chunks: u64, seed: u64) {
    let (first, all) = (data_offset(size) / CHUNK, data / CHUNK);
    let script = format!(
        "x={seed}; i=0; while [ $i -lt {chunks} ]; do x=$(( (x * 1103515245 + 12345) & 2147483647 )); \
         dd if=/dev/urandom of=/dev/vda bs=64k count=1 conv=notrunc seek=$(( {first} + (x >> 8) % {all} )) 2>/dev/null \
         || exit 1; i=$((i + 1)); done; sync"
    );
    guest.send(&format!("sh {script}")).expect("written");
}

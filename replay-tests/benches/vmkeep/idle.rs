//! What vmkeepd takes when it has nothing to do: a guest runs, libvirt is connected, and a backup has been made before.

use std::fs;
use std::time::{Duration, Instant};

use replay_tests::testbed::{Guest, GuestSpec};

use crate::support::Host;
use crate::table::{Row, Samples};

const WINDOWS: usize = 5;
const WINDOW: Duration = Duration::from_secs(5);

/// Nanoseconds that all threads of a process have run. (Those that ended meanwhile are missed: an idle process has no
/// business starting any; but the kernel's own sum counts in hundredths of a second, too coarse for a window.)
fn ran(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("threads").flatten();
    let of = |thread: fs::DirEntry| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    threads.filter_map(of).sum()
}

fn resident_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    let kib: f64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    kib / 1024.0
}

pub fn run() -> Vec<Row> {
    let host = Host::new();
    Guest::boot(&host.hypervisor, &GuestSpec::two_disks("web1")).expect("a guest");
    let daemon = host.daemon();
    host.ok(&["snapshot", "web1"]);
    let (mut resident, mut busy) = (Vec::new(), Vec::new());
    for window in 0..=WINDOWS {
        let (begin, before) = (Instant::now(), ran(daemon.pid()));
        std::thread::sleep(WINDOW);
        let share = (ran(daemon.pid()) - before) / 1e9 / begin.elapsed().as_secs_f64() * 100.0;
        // The first window lets the daemon come to rest.
        if window > 0 {
            busy.push(share);
            resident.push(resident_mib(daemon.pid()));
        }
    }
    vec![
        Row::limit("idle: vmkeepd resident", "MiB", &Samples(resident), 40.0),
        Row::limit("idle: vmkeepd, share of a core", "%", &Samples(busy), 0.5),
    ]
}

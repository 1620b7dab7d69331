//! Reading a disk over NBD: our reader against `nbdcopy` and `qemu-img`, from the same server in the same run.
//!
//! `cargo bench -p vmkeep-vault --bench read`. A raw image of 1 GiB of noise, which lies in the page cache after the warm-up, shown
//! by one `qemu-nbd`. Each side reads all of it and throws it away; rounds alternate, so that what the machine does meanwhile
//! meets all. The ratio is the median of the rounds' ratios: ours through the peer's, below 1 is faster. Each side's time is that
//! of a process of its own (ours is this program, started anew), so that all of them start, connect and read.

// A benchmark that cannot set up its world has nothing to measure; it ends at once.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use vmkeep_vault::nbd::Address;
use vmkeep_vault::source::{DiskReader, NbdOptions, NbdSource};
use vmkeep_vault::write::Source;

const SIZE: usize = 1 << 30;
const ROUNDS: usize = 7;
/// Set in the process that reads.
const READ: &str = "VMKEEP_BENCH_READ";

fn main() {
    if let Some(socket) = std::env::var_os(READ) {
        return read(Path::new(&socket));
    }
    let folder = tempfile::tempdir().unwrap();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("s"));
    let mut noise = vec![0; SIZE];
    fastrand::Rng::with_seed(1).fill(&mut noise);
    std::fs::write(&disk, noise).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let activate = r#"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@""#;
    let mut server = Command::new("sh")
        .args(["-c", activate, "sh", "qemu-nbd", "-t", "-r", "-e", "16", "-f", "raw"])
        .arg(&disk)
        .stdin(std::os::fd::OwnedFd::from(listener))
        .spawn()
        .unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let ours = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(READ, &socket);
        time(&mut command)
    };
    let nbdcopy = || time(Command::new("nbdcopy").args([&uri, "null:"]));
    // Into a device of zeroes there is nothing but a copy in memory.
    let null = "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"null-co\",\"size\":1073741824}}";
    let convert =
        || time(Command::new("qemu-img").args(["convert", "-n", "-f", "raw", "-m", "16", "-W", &uri, null]));
    let peers: [(&str, &dyn Fn() -> f64); 2] = [("nbdcopy", &nbdcopy), ("qemu-img convert", &convert)];
    ours();
    for (_, peer) in peers {
        peer();
    }
    let rounds: Vec<(f64, [f64; 2])> = (0..ROUNDS).map(|_| (ours(), peers.map(|(_, peer)| peer()))).collect();
    server.kill().unwrap();
    server.wait().unwrap();
    let speed = |times: Vec<f64>| SIZE as f64 / f64::from(1 << 20) / median(times);
    println!("ours: {:.0} MiB/s", speed(rounds.iter().map(|(ours, _)| *ours).collect()));
    for (at, (name, _)) in peers.iter().enumerate() {
        let ratio = median(rounds.iter().map(|(ours, theirs)| ours / theirs[at]).collect());
        let theirs = speed(rounds.iter().map(|(_, theirs)| theirs[at]).collect());
        println!("{name}: {theirs:.0} MiB/s; time of ours through its: {ratio:.2}");
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn time(command: &mut Command) -> f64 {
    let begin = Instant::now();
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
    begin.elapsed().as_secs_f64()
}

fn read(socket: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = NbdOptions::default();
        let source = NbdSource::open(&Address::unix(socket, ""), &options).await.unwrap();
        let mut reader = DiskReader::new(Arc::new(source), None);
        while reader.next().await.unwrap().is_some() {}
        assert_eq!(reader.told().total(), SIZE as u64);
    });
}

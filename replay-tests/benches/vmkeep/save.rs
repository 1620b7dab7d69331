//! `snapshot --save`, against `virsh save` and `virsh restore` by hand on the same medium: how long the guest is down.
//! And the retain that follows, against `cp` of the same files with an fsync of each.
//!
//! The guest's downtime is taken from vmkeep's own report, and by hand from the clock around the two commands: both
//! from right before the save to right after the guest runs again. By hand nothing is fsynced, checked, or noted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};

use crate::support::Host;
use crate::support::bed::folder;
use crate::table::{Row, Samples, Target};

const ROUNDS: usize = 9;
const NAME: &str = "web1";

/// Milliseconds for which the guest is down when its state goes there by hand.
fn by_hand(host: &Host, place: &Path) -> f64 {
    let file = place.join("by-hand");
    let script = "set -eu\nbegin=${EPOCHREALTIME/./}\nvirsh -q save web1 \"$1\" >/dev/null\n\
                  virsh -q restore \"$1\" >/dev/null\necho $((${EPOCHREALTIME/./} - begin))\nrm \"$1\"\n";
    let output =
        host.hypervisor.command("bash").args(["-c", script, "by-hand"]).arg(&file).output().expect("bash");
    assert!(output.status.success(), "by hand: {}", String::from_utf8_lossy(&output.stderr));
    let micros: f64 = String::from_utf8_lossy(&output.stdout).trim().parse().expect("microseconds");
    micros / 1e3
}

/// By vmkeep: the guest's downtime in milliseconds, and bytes per second of the retain.
fn by_vmkeep(host: &Host, ram_disk: bool) -> (f64, f64, PathBuf) {
    let how = if ram_disk { "require" } else { "never" };
    host.ok(&["snapshot", NAME, "--save", "--ram-disk", how]);
    let job = host.jobs()[0]["id"].as_str().expect("a job").to_owned();
    let shown = host.json(&["job", "show", &job]);
    let steps = shown["steps"].as_array().expect("steps");
    let output =
        |name: &str| steps.iter().find(|step| step["name"] == name).expect("the step")["output"].clone();
    let downtime = output("resume")["downtime_ms"].as_f64().expect("a downtime");
    let retain = shown["phases"].as_array().expect("phases").iter().find(|phase| phase["name"] == "retain");
    let took = retain.and_then(|phase| phase["duration_ms"].as_f64()).expect("a duration");
    let backup = host.backups().remove(0);
    let size = backup["size"].as_f64().expect("a size");
    (downtime, size / took * 1e3, backup["folder"].as_str().expect("a folder").into())
}

/// Bytes per second of `cp` and `sync` of the same files.
fn copied_by_hand(host: &Host, backup: &Path) -> f64 {
    let target = folder(host, &host.hypervisor.dir().join("state/cp"));
    rustix::fs::sync();
    let files: Vec<PathBuf> = fs::read_dir(backup).expect("the backup").flatten().map(|e| e.path()).collect();
    let bytes: u64 = files.iter().map(|file| fs::metadata(file).expect("a file").len()).sum();
    let begin = Instant::now();
    let script = "set -eu\nto=$1\nshift\ncp --sparse=auto \"$@\" \"$to\"\nsync \"$to\"/* \"$to\"\n";
    let done = host.hypervisor.command("bash").args(["-c", script, "cp"]).arg(&target).args(&files).status();
    assert!(done.expect("bash").success());
    let took = begin.elapsed().as_secs_f64();
    fs::remove_dir_all(&target).expect("removed");
    #[allow(clippy::cast_precision_loss)]
    let rate = bytes as f64 / took;
    rate
}

pub fn run() -> Vec<Row> {
    let host = Host::new();
    let spec = GuestSpec::new(NAME)
        .memory_mib(512)
        .disk(DiskSpec::new(1024 * MIB).data(768 * MIB))
        .disk(DiskSpec::new(256 * MIB).raw().data(192 * MIB));
    let guest = Guest::boot(&host.hypervisor, &spec).expect("a guest");
    let ram = crate::support::ram::RamDisk::new(&host, "");
    let disk = folder(&host, &host.hypervisor.dir().join("state/by-hand"));
    let _daemon = host.daemon();
    let [mut on_ram, mut on_ram_by_hand, mut on_disk, mut on_disk_by_hand] = [const { Vec::new() }; 4];
    let (mut rate, mut rate_by_hand) = (Vec::new(), Vec::new());
    // Each begins with a guest that has come to itself, and nothing left to be written back of the one before.
    let settle = || {
        rustix::fs::sync();
        guest.wait_more(5).expect("the guest ticks");
    };
    let hand = |place: &Path| {
        settle();
        by_hand(&host, place)
    };
    for round in 0..=ROUNDS {
        let first = (round % 2 == 1).then(|| (hand(ram.path()), hand(&disk)));
        settle();
        let (ours_ram, speed, backup) = by_vmkeep(&host, true);
        let speed_by_hand = copied_by_hand(&host, &backup);
        remove(&backup);
        settle();
        let (ours_disk, _, backup) = by_vmkeep(&host, false);
        remove(&backup);
        let (hand_ram, hand_disk) = first.unwrap_or_else(|| (hand(ram.path()), hand(&disk)));
        eprintln!(
            "bench: save round {round}: RAM disk {ours_ram:.0} ms, by hand {hand_ram:.0} ms; disk {ours_disk:.0} ms, \
             by hand {hand_disk:.0} ms; retain {:.0} MB/s, cp {:.0} MB/s",
            speed / 1e6,
            speed_by_hand / 1e6
        );
        // The first round warms up.
        if round > 0 {
            on_ram.push(ours_ram);
            on_ram_by_hand.push(hand_ram);
            on_disk.push(ours_disk);
            on_disk_by_hand.push(hand_disk);
            rate.push(speed);
            rate_by_hand.push(speed_by_hand);
        }
    }
    let peer = "virsh save, restore";
    let most = Target::AtMost(1.1);
    vec![
        Row::against(
            "save: downtime, RAM disk",
            "ms",
            &Samples(on_ram),
            peer,
            &Samples(on_ram_by_hand),
            most,
        ),
        Row::against("save: downtime, disk", "ms", &Samples(on_disk), peer, &Samples(on_disk_by_hand), most),
        Row::against(
            "save: retain, hashed",
            "B/s",
            &Samples(rate),
            "cp, sync",
            &Samples(rate_by_hand),
            Target::AtLeast(0.9),
        ),
    ]
}

fn remove(backup: &Path) {
    fs::remove_dir_all(backup).expect("removed");
}

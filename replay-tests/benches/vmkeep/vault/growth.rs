//! What an incremental backup grows with: with what was overwritten, and not with the disk.
//!
//! Two disks with the same data, one eight times as large as the other and otherwise empty; eight times as much overwritten in
//! the smaller one.

use super::ROUNDS;
use super::rig::{CHUNK, Rig, data, overwrite, spec};
use crate::table::{Row, Samples, Target};

const MORE: u64 = 8;

pub fn run() -> Vec<Row> {
    let rig = Rig::new(&["main".to_owned()]);
    let (disk, data) = (4 * data(), data());
    let small = rig.boot(&spec("small", disk, data));
    let large = rig.boot(&spec("large", MORE * disk, data));
    for guest in [&small, &large] {
        rig.back_up(guest, "main", &["--full"]);
    }
    let few = data / CHUNK / 100;
    let mut seed = 0;
    let mut measure = |guest, disk, chunks| {
        seed += 1;
        overwrite(guest, disk, data, chunks, seed);
        let before = rig.size("main");
        let took = rig.back_up(guest, "main", &[]);
        (took.time, (rig.size("main") - before) / 1e6)
    };
    let [mut times, mut times_dirty, mut times_disk] = [const { Vec::new() }; 3];
    let [mut sizes, mut sizes_dirty, mut sizes_disk] = [const { Vec::new() }; 3];
    for round in 0..=ROUNDS {
        let least = measure(&small, disk, few);
        let of_disk = measure(&large, MORE * disk, few);
        let of_dirty = measure(&small, disk, MORE * few);
        eprintln!(
            "bench: vault-growth round {round}: {least:.3?}; eight times the disk {of_disk:.3?}, the dirty {of_dirty:.3?}"
        );
        // The first round warms up.
        if round > 0 {
            times.push(least.0);
            times_disk.push(of_disk.0);
            times_dirty.push(of_dirty.0);
            sizes.push(least.1);
            sizes_disk.push(of_disk.1);
            sizes_dirty.push(of_dirty.1);
        }
    }
    let [times, times_dirty, times_disk] = [times, times_dirty, times_disk].map(Samples);
    let [sizes, sizes_dirty, sizes_disk] = [sizes, sizes_dirty, sizes_disk].map(Samples);
    let peer = "1 % in 8 GiB";
    let row = |name: &str, unit: &str, ours: &Samples, theirs: &Samples, target| {
        Row::against(name, unit, ours, peer, theirs, target)
    };
    vec![
        row("vault: incremental, 1 % in 64 GiB", "s", &times_disk, &times, Target::AtMost(1.25)),
        row("vault: incremental, 1 % in 64 GiB, written", "MB", &sizes_disk, &sizes, Target::AtMost(1.25)),
        row("vault: incremental, 8 % in 8 GiB", "s", &times_dirty, &times, Target::AtMost(8.0)),
        row("vault: incremental, 8 % in 8 GiB, written", "MB", &sizes_dirty, &sizes, Target::AtMost(9.0)),
    ]
}

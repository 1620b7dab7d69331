//! Full backups of random data: nothing to compress, nothing to share. How fast, with how much memory and CPU; and how much a
//! second one writes.

use super::ROUNDS;
use super::peers::{VirtNbdBackup, nbdcopy};
use super::rig::{GIB, Rig, data, spec};
use crate::table::{Row, Samples, Target};

pub fn run() -> Vec<Row> {
    let names = |kind: &str| (0..=ROUNDS).map(|round| format!("{kind}{round}")).collect::<Vec<_>>();
    let (plain, sealed) = (names("plain"), names("sealed"));
    let rig = Rig::new(&[plain.clone(), sealed.clone()].concat());
    let [ours, theirs] = ["ours", "theirs"].map(|name| rig.boot(&spec(name, 4 * data(), data())));
    let [mut time, mut time_sealed, mut time_copy, mut time_virt] = [const { Vec::new() }; 4];
    let [mut cpu, mut cpu_sealed, mut cpu_copy, mut cpu_virt] = [const { Vec::new() }; 4];
    let mut memory = Vec::new();
    let gib = data() as f64 / GIB;
    let by_others = || {
        let copied = nbdcopy(&rig, &theirs);
        let (backup, took) = VirtNbdBackup::full(&rig, &theirs, "virt", &[]);
        backup.discard();
        (copied, took)
    };
    for round in 0..=ROUNDS {
        // Whoever comes second finds the machine as the first has left it: they take turns at that too.
        let first = (round % 2 == 1).then(by_others);
        let own = rig.back_up(&ours, &plain[round], &["--full"]);
        rig.discard(&plain[round], &ours);
        let own_sealed = rig.back_up(&ours, &sealed[round], &["--full"]);
        rig.discard(&sealed[round], &ours);
        let (copied, virt) = first.unwrap_or_else(by_others);
        eprintln!(
            "bench: vault-full round {round}: {:.2} s, encrypted {:.2} s; nbdcopy {:.2} s, virtnbdbackup {:.2} s",
            own.time, own_sealed.time, copied.time, virt.time
        );
        // The first round warms up.
        if round > 0 {
            time.push(own.time);
            time_sealed.push(own_sealed.time);
            time_copy.push(copied.time);
            time_virt.push(virt.time);
            cpu.push(own.cpu / gib);
            cpu_sealed.push(own_sealed.cpu / gib);
            cpu_copy.push(copied.cpu / gib);
            cpu_virt.push(virt.cpu / gib);
            memory.push(rig.peak_mib());
        }
    }
    let [time, time_sealed, time_copy, time_virt] = [time, time_sealed, time_copy, time_virt].map(Samples);
    let [cpu, cpu_sealed, cpu_copy, cpu_virt] = [cpu, cpu_sealed, cpu_copy, cpu_virt].map(Samples);
    let (copy, virt) = ("nbdcopy --flush", "virtnbdbackup, sync");
    vec![
        Row::against("vault: full, random", "s", &time, copy, &time_copy, Target::AtMost(1.15)),
        Row::against("vault: full, random", "s", &time, virt, &time_virt, Target::AtMost(0.5)),
        Row::beside("vault: full, random, encrypted", "s", &time_sealed, copy, &time_copy),
        Row::beside("vault: full, random, CPU", "s/GiB", &cpu, copy, &cpu_copy),
        Row::beside("vault: full, random, CPU", "s/GiB", &cpu, virt, &cpu_virt),
        Row::beside("vault: full, random, encrypted, CPU", "s/GiB", &cpu_sealed, virt, &cpu_virt),
        Row::limit("vault: vmkeepd, most resident", "MiB", &Samples(memory), 200.0),
    ]
}

/// Full backups of what the vault has already.
pub fn second() -> Vec<Row> {
    let rig = Rig::new(&["main".to_owned()]);
    let guest = rig.boot(&spec("ours", 4 * data(), data()));
    let [mut time, mut time_first, mut written] = [const { Vec::new() }; 3];
    let first = rig.back_up(&guest, "main", &["--full"]);
    for round in 0..ROUNDS {
        let before = rig.size("main");
        let again = rig.back_up(&guest, "main", &["--full"]);
        let grown = rig.size("main") - before;
        eprintln!("bench: vault-second round {round}: {:.2} s, {:.3} MiB", again.time, grown / GIB * 1024.0);
        time.push(again.time);
        time_first.push(first.time);
        written.push(grown / data() as f64 * 100.0);
    }
    vec![
        Row::limit("vault: second full of the same, written", "% of it", &Samples(written), 2.0),
        Row::beside("vault: second full of the same", "s", &Samples(time), "the first", &Samples(time_first)),
    ]
}

//! Incremental backups after one chunk in a hundred was overwritten, at random.

use super::ROUNDS;
use super::peers::VirtNbdBackup;
use super::rig::{CHUNK, Rig, data, overwrite, spec};
use crate::table::{Row, Samples, Target};

pub fn run() -> Vec<Row> {
    let rig = Rig::new(&["main".to_owned()]);
    let disk = 4 * data();
    let [ours, theirs] = ["ours", "theirs"].map(|name| rig.boot(&spec(name, disk, data())));
    rig.back_up(&ours, "main", &["--full"]);
    let (backup, _) = VirtNbdBackup::full(&rig, &theirs, "virt", &[]);
    let [mut time, mut time_virt, mut cpu, mut cpu_virt] = [const { Vec::new() }; 4];
    let (mut stored, mut dirty) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        for guest in [&ours, &theirs] {
            overwrite(guest, disk, data(), data() / CHUNK / 100, round as u64 + 1);
        }
        let first = (round % 2 == 1).then(|| backup.incremental(&rig, &theirs));
        let before = rig.size("main");
        let own = rig.back_up(&ours, "main", &[]);
        let (grown, changed) = (rig.size("main") - before, rig.dirty());
        let virt = first.unwrap_or_else(|| backup.incremental(&rig, &theirs));
        eprintln!(
            "bench: vault-incremental round {round}: {:.3} s, {:.2} MB of {:.2} MB; virtnbdbackup {:.3} s",
            own.time,
            grown / 1e6,
            changed / 1e6,
            virt.time
        );
        // The first round warms up.
        if round > 0 {
            time.push(own.time);
            time_virt.push(virt.time);
            cpu.push(own.cpu);
            cpu_virt.push(virt.cpu);
            stored.push(grown / 1e6);
            dirty.push(changed / 1e6);
        }
    }
    let virt = "virtnbdbackup, sync";
    let [time, time_virt, cpu, cpu_virt] = [time, time_virt, cpu, cpu_virt].map(Samples);
    let (stored, dirty) = (Samples(stored), Samples(dirty));
    vec![
        Row::against("vault: incremental, 1 %", "s", &time, virt, &time_virt, Target::AtMost(0.333)),
        Row::against(
            "vault: incremental, 1 %, written",
            "MB",
            &stored,
            "dirty bytes",
            &dirty,
            Target::AtMost(2.0),
        ),
        Row::beside("vault: incremental, 1 %, CPU", "s", &cpu, virt, &cpu_virt),
    ]
}

//! Restores of random data, to a new domain with a raw image.

use super::ROUNDS;
use super::peers::convert;
use super::rig::{GIB, Rig, data, spec};
use crate::support::run as must;
use crate::table::{Row, Samples, Target};

pub fn run() -> Vec<Row> {
    let rig = Rig::new(&["main".to_owned()]);
    let guest = rig.boot(&spec("ours", 4 * data(), data()));
    rig.back_up(&guest, "main", &["--full"]);
    let backup = rig.job();
    let image = rig.folder("backup").join("disk.qcow2");
    let own = guest.disk("vda").expect("a disk");
    let paths = [own.to_string_lossy(), image.to_string_lossy()];
    must("qemu-img", &["convert", "-U", "-f", "qcow2", "-O", "qcow2", &paths[0], &paths[1]]);
    let [mut time, mut time_convert, mut cpu, mut cpu_convert] = [const { Vec::new() }; 4];
    let gib = data() as f64 / GIB;
    for round in 0..=ROUNDS {
        let first = (round % 2 == 1).then(|| convert(&rig, &image));
        // The definition names the test bed's kernel: from a vault without encryption that is used only when told so.
        let ours = rig.timed(&["restore", &backup, "--vault", "main", "--as", "copy", "--trust-definition"]);
        rig.host.hypervisor.virsh(["undefine", "--domain", "copy"]).expect("undefined");
        std::fs::remove_dir_all(rig.host.restored().join("copy")).expect("removed");
        let theirs = first.unwrap_or_else(|| convert(&rig, &image));
        eprintln!("bench: vault-restore round {round}: {:.2} s; qemu-img {:.2} s", ours.time, theirs.time);
        // The first round warms up.
        if round > 0 {
            time.push(ours.time);
            time_convert.push(theirs.time);
            cpu.push(ours.cpu / gib);
            cpu_convert.push(theirs.cpu / gib);
        }
    }
    let peer = "qemu-img convert, sync";
    let [time, time_convert, cpu, cpu_convert] = [time, time_convert, cpu, cpu_convert].map(Samples);
    vec![
        Row::against("vault: restore, random", "s", &time, peer, &time_convert, Target::AtMost(1.15)),
        Row::beside("vault: restore, random, CPU", "s/GiB", &cpu, peer, &cpu_convert),
    ]
}

//! Full backups of a mixed corpus, compressed: the host's own `/usr` as one tar archive in the order of names, cut at the size
//! of the data: programs, libraries, texts, tables, and what is compressed already.

use std::process::Command;

use replay_tests::testbed::{Guest, data_offset};

use super::ROUNDS;
use super::peers::VirtNbdBackup;
use super::rig::{GIB, Rig, data, spec};
use crate::table::{Row, Samples, Target};

/// Arguments: the image, its size, the place and the bytes of the data in MiB.
const FILL: &str = r#"
set -eu
image=$1 size=$2 at=$3 most=$4
truncate -s "$size" "$image.raw"
tar -C / --sort=name -cf - usr 2>/dev/null | head -c "${most}M" |
    dd of="$image.raw" bs=1M seek="$at" iflag=fullblock conv=notrunc status=none
qemu-img convert -f raw -O qcow2 "$image.raw" "$image.new"
rm "$image.raw"
cat "$image.new" >"$image"
rm "$image.new"
"#;

/// A guest with the corpus on its disk.
fn boot(rig: &Rig, name: &str) -> Guest {
    let disk = 4 * data();
    let guest = Guest::define(&rig.host.hypervisor, &spec(name, disk, 0)).expect("a guest");
    let mib = |bytes: u64| (bytes >> 20).to_string();
    let mut shell = Command::new("bash");
    shell.args(["-c", FILL, "fill"]).arg(guest.disk("vda").expect("a disk"));
    shell.args([disk.to_string(), mib(data_offset(disk)), mib(data())]);
    assert!(shell.status().expect("bash").success(), "the corpus");
    guest.start().expect("started");
    guest
}

pub fn run() -> Vec<Row> {
    let vaults: Vec<String> = (0..=ROUNDS).map(|round| format!("plain{round}")).collect();
    let rig = Rig::new(&vaults);
    let [ours, theirs] = ["ours", "theirs"].map(|name| boot(&rig, name));
    let [mut time, mut time_virt, mut stored, mut stored_virt] = [const { Vec::new() }; 4];
    let (mut cpu, mut cpu_virt) = (Vec::new(), Vec::new());
    let gib = data() as f64 / GIB;
    let by_virt = || {
        let (backup, took) = VirtNbdBackup::full(&rig, &theirs, "virt", &["-z"]);
        let bytes = backup.size();
        backup.discard();
        (took, bytes)
    };
    for (round, vault) in vaults.iter().enumerate() {
        let first = (round % 2 == 1).then(by_virt);
        let own = rig.back_up(&ours, vault, &["--full"]);
        let bytes = rig.size(vault);
        rig.discard(vault, &ours);
        let (virt, virt_bytes) = first.unwrap_or_else(by_virt);
        eprintln!(
            "bench: vault-corpus round {round}: {:.2} s, {:.0} MB; virtnbdbackup -z {:.2} s, {:.0} MB",
            own.time,
            bytes / 1e6,
            virt.time,
            virt_bytes / 1e6
        );
        // The first round warms up.
        if round > 0 {
            time.push(own.time);
            time_virt.push(virt.time);
            cpu.push(own.cpu / gib);
            cpu_virt.push(virt.cpu / gib);
            stored.push(bytes / 1e6);
            stored_virt.push(virt_bytes / 1e6);
        }
    }
    let virt = "virtnbdbackup -z, sync";
    let [time, time_virt, stored, stored_virt] = [time, time_virt, stored, stored_virt].map(Samples);
    vec![
        Row::against("vault: full, /usr as tar", "s", &time, virt, &time_virt, Target::AtMost(0.5)),
        Row::against(
            "vault: full, /usr as tar, size",
            "MB",
            &stored,
            virt,
            &stored_virt,
            Target::AtMost(1.0),
        ),
        Row::beside("vault: full, /usr as tar, CPU", "s/GiB", &Samples(cpu), virt, &Samples(cpu_virt)),
    ]
}

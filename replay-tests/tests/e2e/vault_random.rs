//! Backups of random kinds into two vaults, of a guest that writes, writes zeroes, discards, and whose disks grow and become
//! more, while everybody is killed, backups go in random order and collections run: whatever a vault says that it holds comes
//! back byte for byte as it was at its instant.
//!
//! `VMKEEP_SEED` and `VMKEEP_ROUNDS` choose another run, and a longer one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use fastrand::Rng;
use replay_tests::testbed::{DiskSpec, MIB, data_offset, images_equal};

use crate::support::bed::{Bed, configure, folder, give, small};
use crate::support::{Daemon, Host, about, assert_untouched, disks, run, until};
use crate::vault::{checkpoints, disk_of, find, recorded};

const VAULTS: [&str; 2] = ["main", "second"];
/// What the guest writes begins and ends at multiples of it.
const BLOCK: u64 = 4096;
/// So many backups stay in a vault.
const KEPT: usize = 3;
/// So many checkpoints a domain has at most: two for each vault.
const CHECKPOINTS: usize = 4;

/// A backup, and the disks as they were at its instant.
struct Kept {
    vault: &'static str,
    id: String,
    then: BTreeMap<String, PathBuf>,
}

struct Story {
    rng: Rng,
    bed: Bed,
    daemon: Option<Daemon>,
    kept: Vec<Kept>,
    /// Disks that were not read whole.
    incremental: usize,
    /// Sizes of the disks in bytes.
    sizes: BTreeMap<&'static str, u64>,
}

impl Story {
    fn begin(seed: u64) -> Self {
        let host = Host::new();
        let place = |name: &str| folder(&host, &host.hypervisor.dir().join("state").join(name));
        let tables =
            VAULTS.map(|name| format!("[vaults.{name}]\nurl = \"file://{}\"\n", place(name).display()));
        configure(&host, &tables.concat());
        VAULTS.into_iter().for_each(|name| drop(host.ok(&["vault", "init", name, "--plain"])));
        let spec = small("web1").disk(DiskSpec::new(32 * MIB).plain().data(8 * MIB));
        let bed = Bed::boot_on(host, None, &spec);
        let sizes = BTreeMap::from([("vda", 64 * MIB), ("vdb", 32 * MIB), ("vdc", 32 * MIB)]);
        let daemon = Some(bed.host.daemon());
        Self { rng: Rng::with_seed(seed), bed, daemon, kept: Vec::new(), incremental: 0, sizes }
    }

    /// The guest changes what it holds.
    fn write(&mut self) {
        for _ in 0..self.rng.usize(1..=5) {
            let disks: Vec<_> = self.sizes.iter().map(|(disk, size)| (*disk, *size)).collect();
            let (disk, size) = *self.rng.choice(&disks).unwrap();
            let length = self.rng.u64(1..=2 * MIB / BLOCK) * BLOCK;
            let from = if disk < "vdc" { data_offset(size) } else { 0 };
            let offset = self.rng.u64(from.div_ceil(BLOCK)..=(size - length) / BLOCK) * BLOCK;
            let command = match self.rng.u8(..4) {
                0 => format!("zero {disk} {offset} {length}"),
                1 => format!("discard {disk} {offset} {length}"),
                _ => format!("fill {disk} {offset} {length} {}", self.rng.u8(1..)),
            };
            self.bed.guest.send(&command).unwrap();
        }
    }

    /// A disk grows, or there is one more.
    fn alter(&mut self) {
        let guest = &self.bed.guest;
        if self.rng.u8(..3) > 0 {
            let size = self.sizes["vdc"] + self.rng.u64(1..=8) * MIB;
            guest.virsh("blockresize", &["vdc", &format!("{size}B")]).unwrap();
            self.sizes.insert("vdc", size);
        } else if !self.sizes.contains_key("vdd") {
            let path = self.bed.host.hypervisor.images().join("more.raw");
            run("qemu-img", &["create", "-q", "-f", "raw", path.to_str().unwrap(), "16M"]);
            give(&self.bed.host, &path);
            let plugged = [path.to_str().unwrap(), "vdd", "--subdriver", "raw", "--targetbus", "virtio"];
            guest.virsh("attach-disk", &[&plugged[..], &["--live", "--config"]].concat()).unwrap();
            until("the guest to see the disk", || guest.send("checksum vdd 0 1M").ok());
            self.sizes.insert("vdd", 16 * MIB);
            self.bed.own = disks(guest);
        }
    }

    /// Somebody is killed.
    fn strike(&mut self) -> &'static str {
        std::thread::sleep(Duration::from_millis(self.rng.u64(..1500)));
        let hypervisor = &self.bed.host.hypervisor;
        match self.rng.u8(..3) {
            0 => {
                self.daemon = None;
                "vmkeepd"
            }
            1 => {
                hypervisor.kill_libvirtd().unwrap();
                "libvirtd"
            }
            _ => {
                hypervisor.kill_qemu("web1").unwrap();
                "QEMU"
            }
        }
    }

    fn everybody_up(&mut self) {
        let (host, guest) = (&self.bed.host, &self.bed.guest);
        host.hypervisor.start_libvirtd().unwrap();
        self.daemon.get_or_insert_with(|| host.daemon());
        host.until_ready();
        if guest.state().unwrap().state == "shut off" {
            let boots = guest.boots();
            guest.start().unwrap();
            guest.wait_up(boots).unwrap();
        }
    }

    fn back_up(&mut self, number: usize) {
        let vault = *self.rng.choice(&VAULTS).unwrap();
        let kind =
            *self.rng.choice(&["--auto", "--auto", "--full", "--incremental", "--differential"]).unwrap();
        let mut order = vec!["backup", "web1", "--vault", vault, "--bandwidth", "24M"];
        order.extend(Some(kind).filter(|kind| *kind != "--auto"));
        let struck = self.rng.bool();
        let (host, guest) = (&self.bed.host, &self.bed.guest);
        guest.virsh("suspend", &[]).unwrap();
        let then = recorded(&self.bed, &format!("then-{number}"));
        let job = host.begin(&order);
        until("the backup to begin, or to be refused", || {
            let begun = host.history(&job).iter().any(|row| about(row, "step_succeeded", "begin"));
            (begun || host.job(&job)["ended"].is_string()).then_some(())
        });
        guest.virsh("resume", &[]).unwrap();
        // What is written from now on is in the next one.
        let _ = guest.send("load vdc 16M 8M 4");
        let blow = if struck { self.strike() } else { "nobody" };
        self.everybody_up();
        let (host, guest) = (&self.bed.host, &self.bed.guest);
        let row = host.settled(&job);
        let _ = guest.send("load stop");
        let status = row["status"].as_str().unwrap();
        println!("{number}: {kind} into {vault}, {blow} was killed: {status} {}", row["fault"]["name"]);
        match status {
            "succeeded" => {
                let since = |target: &&String| !disk_of(host, &row, target)["unchanged_since"].is_null();
                self.incremental += then.keys().filter(since).count();
                // What a backup that was not made has left is seen to by the next one.
                let left = checkpoints(&self.bed);
                assert!(left.len() <= CHECKPOINTS, "{left:?}: {}", host.story(&job));
                self.kept.push(Kept { vault, id: row["id"].as_str().unwrap().to_owned(), then });
            }
            // There is nothing yet that it could begin with.
            "refused" => assert_eq!(kind, "--incremental", "{}", host.story(&job)),
            _ => assert_eq!(blow, "QEMU", "{}", host.story(&job)),
        }
    }

    fn comes_back(&self, which: usize) {
        let Kept { vault, id, then } = &self.kept[which];
        let host = &self.bed.host;
        let to = folder(host, &host.hypervisor.dir().join("state/exports")).join(id);
        host.ok(&["vault", "export", vault, id, "--to", to.to_str().unwrap()]);
        for (target, raw) in then {
            assert_eq!(images_equal(&find(&to, target), raw).unwrap(), Ok(()), "{target} of {id} in {vault}");
        }
        std::fs::remove_dir_all(to).unwrap();
    }

    /// Any of a vault that has enough of them goes, and its bytes with it.
    fn thin_out(&mut self) {
        for vault in VAULTS {
            let of: Vec<_> = (0..self.kept.len()).filter(|n| self.kept[*n].vault == vault).collect();
            if of.len() > KEPT {
                let gone = self.kept.remove(*self.rng.choice(&of).unwrap());
                let host = &self.bed.host;
                host.ok(&["vault", "prune", vault, &gone.id]);
                for lease in host.json(&["vault", "leases", vault]).as_array().unwrap() {
                    host.ok(&["vault", "revoke", vault, lease["id"].as_str().unwrap()]);
                }
                host.ok(&["vault", "gc", vault]);
            }
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn whatever_happens_to_a_guest_and_its_backups_each_comes_back_as_it_was_at_its_instant() {
    let (seed, rounds) = (number("VMKEEP_SEED", 2), number("VMKEEP_ROUNDS", 8));
    println!("VMKEEP_SEED={seed}");
    let mut story = Story::begin(seed);
    for round in 0..rounds {
        story.write();
        if story.rng.u8(..3) == 0 {
            story.alter();
        }
        story.back_up(usize::try_from(round).unwrap());
        if !story.kept.is_empty() {
            let which = story.rng.usize(..story.kept.len());
            story.comes_back(which);
        }
        story.thin_out();
    }
    println!("{} disks were read incrementally", story.incremental);
    assert!(story.incremental > 0, "every disk was read whole: the run is too short");
    (0..story.kept.len()).for_each(|which| story.comes_back(which));
    let host = &story.bed.host;
    for vault in VAULTS {
        host.ok(&["vault", "check", vault, "--read"]);
        let listed = host.json(&["vault", "list", vault])["backups"].as_array().unwrap().len();
        assert_eq!(listed, story.kept.iter().filter(|kept| kept.vault == vault).count(), "{vault}");
    }
    assert_untouched(&story.bed.guest, &story.bed.own);
}

//! Overlays: one that was said to be made is there after a cut, whole and empty on its base; and no base is harmed by them.
//!
//! A guest is told of an overlay only after that, and what it has flushed to one is nowhere else.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use fastrand::Rng;
use replay_tests::powercut::disk::Disk;
use replay_tests::powercut::trace;
use vmkeep_steps::hypervisor::{Layer, LocalStorage, OverlaySpec, Storage};

use crate::stores::{copy, number, workshop};
use crate::workload::{Act, program, runtime, say};

const DISKS: [(&str, &str); 2] = [("vda", "qcow2"), ("vdb", "raw")];
const SIZE: u64 = 1 << 20;

fn base(root: &Path, (disk, format): (&str, &str)) -> Layer {
    Layer { path: root.join(format!("images/{disk}.{format}")), format: format.to_owned() }
}

fn overlay(root: &Path, disk: &str) -> PathBuf {
    root.join(format!("images/vmkeep-0123456789ab-{disk}.qcow2"))
}

/// What is recorded.
pub(crate) fn make(root: &Path) {
    runtime().block_on(async {
        for disk in DISKS {
            let spec =
                OverlaySpec { path: overlay(root, disk.0), base: base(root, disk), virtual_size: SIZE };
            LocalStorage::default().create_overlay(&spec).await.unwrap();
            say(&format!("made {}", disk.0));
        }
    });
}

struct Recording {
    _place: tempfile::TempDir,
    root: PathBuf,
    disk: Disk,
    bases: Vec<Vec<u8>>,
}

impl Recording {
    fn make() -> Self {
        let place = workshop();
        let (root, before) = (place.path().join("root"), place.path().join("before"));
        fs::create_dir_all(root.join("images")).unwrap();
        for disk in DISKS {
            let (path, size) = (base(&root, disk).path, SIZE.to_string());
            let made =
                Command::new("qemu-img").args(["create", "-q", "-f", disk.1]).arg(&path).arg(size).status();
            assert!(made.unwrap().success());
            let write = ["-f", disk.1, "-c", "write -q -P 7 64k 64k"];
            assert!(Command::new("qemu-io").args(write).arg(&path).status().unwrap().success());
        }
        copy(&root, &before);
        let (program, arguments, environment) = program("none", Act::Overlay, &root);
        let environment = environment.iter().map(|(name, value)| (*name, OsStr::new(value)));
        let disk = Disk::of(&trace::record(&program, &arguments, environment), &root, Some(&before)).unwrap();
        let bases = DISKS.iter().map(|disk| fs::read(base(&root, *disk).path).unwrap()).collect();
        Self { _place: place, root, disk, bases }
    }

    /// Cuts the power at an instant that the seed chooses. How many overlays there must be, and are.
    fn cut(&self, seed: u64) -> Result<usize, String> {
        let mut rng = Rng::with_seed(seed);
        let at = self.disk.instant(&mut rng);
        let image = self.disk.cut(at, &mut rng);
        fs::remove_dir_all(&self.root).unwrap();
        fs::create_dir(&self.root).unwrap();
        image.write(&self.root).unwrap();
        let why = |what: String| format!("VMKEEP_SEED={seed}, at {at}: {what}");
        let mut made = 0;
        for (disk, bytes) in DISKS.into_iter().zip(&self.bases) {
            let base = base(&self.root, disk);
            if fs::read(&base.path).ok().as_ref() != Some(bytes) {
                return Err(why(format!("{} has changed", base.path.display())));
            }
            if !image.said().any(|line| line == format!("made {}", disk.0)) {
                continue;
            }
            made += 1;
            let path = overlay(&self.root, disk.0);
            let layer = Layer { path: path.clone(), format: "qcow2".to_owned() };
            let found = runtime().block_on(LocalStorage::default().inspect(&layer));
            let found = found.map_err(|e| why(format!("{}: {e}", path.display())))?;
            let found = found.ok_or_else(|| why(format!("{} is gone", path.display())))?;
            if !found.empty || found.virtual_size != SIZE || found.backing.as_ref() != Some(&base) {
                return Err(why(format!("it is another: {found:?}")));
            }
            let checked = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&path).output();
            let checked = checked.unwrap();
            if !checked.status.success() {
                return Err(why(String::from_utf8_lossy(&checked.stderr).into_owned()));
            }
        }
        Ok(made)
    }
}

#[test]
fn a_power_cut_costs_no_overlay_that_a_guest_may_have_been_told_of_and_harms_no_base() {
    let recording = Recording::make();
    let (seed, images) = (number("VMKEEP_SEED", fastrand::u64(..)), number("VMKEEP_IMAGES", 300));
    let made: usize =
        (0..images).map(|n| recording.cut(seed.wrapping_add(n)).unwrap_or_else(|why| panic!("{why}"))).sum();
    println!(
        "{images} images of {} instants of the making of overlays: {made} were promised, and are whole (VMKEEP_SEED={seed})",
        recording.disk.instants()
    );
    assert!(made > 0, "no cut came after an overlay was made");
}

#[test]
fn a_sync_of_an_overlay_that_is_left_out_is_found_out() {
    for name in ["vmkeep-0123456789ab-vda.qcow2", "vmkeep-0123456789ab-vdb.qcow2", "images"] {
        let mut recording = Recording::make();
        recording.disk.without_syncs_of(name);
        let found = (0..3000).position(|seed| recording.cut(seed).is_err());
        println!("overlays without the syncs of {name}: the first cut that costs something is {found:?}");
        assert!(found.is_some(), "nobody misses the syncs of {name}");
    }
}

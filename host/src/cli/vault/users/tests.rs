use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// A made-up `/sys`.
struct Sys(tempfile::TempDir);

impl Sys {
    fn new() -> Self {
        let sys = Self(tempfile::tempdir().unwrap());
        for folder in ["dev/block", "block", "devices"] {
            fs::create_dir_all(sys.0.path().join(folder)).unwrap();
        }
        sys
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// A device of this minor number; `name` is `DISK` or `DISK/PARTITION`.
    fn device(&self, name: &str, minor: u32) -> PathBuf {
        let folder = self.at("devices").join(name);
        for below in ["holders", "slaves"] {
            fs::create_dir_all(folder.join(below)).unwrap();
        }
        fs::write(folder.join("dev"), format!("8:{minor}\n")).unwrap();
        symlink(&folder, self.at(&format!("dev/block/8:{minor}"))).unwrap();
        match name.contains('/') {
            true => fs::write(folder.join("partition"), "1\n").unwrap(),
            false => symlink(&folder, self.at("block").join(name)).unwrap(),
        }
        folder
    }

    /// The first stands on the second.
    fn stands(&self, upper: &Path, lower: &Path) {
        symlink(lower, upper.join("slaves").join(lower.file_name().unwrap())).unwrap();
        symlink(upper, lower.join("holders").join(upper.file_name().unwrap())).unwrap();
    }

    fn shows(&self, device: &Path, file: &Path, read_only: bool) {
        fs::create_dir(device.join("loop")).unwrap();
        fs::write(device.join("loop/backing_file"), format!("{}\n", file.display())).unwrap();
        fs::write(device.join("ro"), if read_only { "1\n" } else { "0\n" }).unwrap();
    }

    fn overlap(&self, minor: u32) -> Overlap {
        Overlap::of(self.0.path(), Path::new("/nonexistent"), number(minor))
    }
}

fn number(minor: u32) -> Number {
    Number::Device(rustix::fs::makedev(8, minor))
}

fn numbers(minors: &[u32]) -> BTreeSet<Number> {
    minors.iter().map(|minor| number(*minor)).collect()
}

#[test]
fn a_device_overlaps_with_what_it_lies_on_and_what_stands_on_it_and_not_with_its_neighbours() {
    let sys = Sys::new();
    sys.device("sda", 0);
    let first = sys.device("sda/sda1", 1);
    sys.device("sda/sda2", 2);
    let (web1, web2, snapshot) = (sys.device("dm-0", 10), sys.device("dm-1", 11), sys.device("dm-2", 12));
    sys.stands(&web1, &first);
    sys.stands(&web2, &first);
    sys.stands(&snapshot, &web1);
    for (minor, overlaps) in [
        (0, &[0, 1, 2, 10, 11, 12][..]),
        (1, &[0, 1, 10, 11, 12]),
        (2, &[0, 2]),
        (10, &[0, 1, 10, 12]),
        (11, &[0, 1, 11]),
        (12, &[0, 1, 10, 12]),
    ] {
        assert_eq!(sys.overlap(minor).numbers, numbers(overlaps), "of {minor}");
    }
}

#[test]
fn loops_are_found_over_a_file_over_one_another_and_over_what_lies_below() {
    let sys = Sys::new();
    let file = sys.at("image");
    fs::write(&file, "").unwrap();
    let shown = Number::of(&file.metadata().unwrap());
    let (first, second, other) = (sys.device("loop0", 0), sys.device("loop1", 1), sys.device("loop2", 2));
    sys.device("loop0/loop0p1", 5);
    let (volume, elsewhere) = (sys.device("dm-0", 10), sys.at("elsewhere"));
    sys.shows(&first, &file, false);
    sys.shows(&second, &file, true);
    fs::write(&elsewhere, "").unwrap();
    sys.shows(&other, &elsewhere, false);
    sys.stands(&volume, &second);
    let mut all = numbers(&[0, 1, 5, 10]);
    all.insert(shown);

    let found = Overlap::of(sys.0.path(), &file, shown);
    assert_eq!(found.numbers, all);
    let mut loops: Vec<(PathBuf, bool)> = found.loops.into_iter().map(|one| (one.path, one.writes)).collect();
    loops.sort();
    assert_eq!(loops, [(sys.at("block/loop0"), true), (sys.at("block/loop1"), false)]);
    // One of them does not stand in its own way, and the other one does.
    let found = sys.overlap(0);
    assert_eq!(found.numbers, all);
    assert_eq!(found.loops, [Shows { path: sys.at("block/loop1"), writes: false }]);
    // From a partition of the one to the other, by way of the file; its neighbours are not meant.
    assert_eq!(sys.overlap(5).loops, [Shows { path: sys.at("block/loop1"), writes: false }]);
    assert_eq!(sys.overlap(10).loops, [Shows { path: sys.at("block/loop0"), writes: true }]);
    assert!(sys.overlap(2).loops.is_empty());
}

//! Block devices of the host as images: raw disks that lie on a volume, a partition, a loop device.
//!
//! Three things that a file has a device has not, and each was a reason to treat it apart:
//! - **Its length.** `st_size` is 0; the end is where a seek ends.
//! - **A time of change.** The node's own times are those of its name in `/dev`: writes do not move them, and udev touches
//!   them for reasons of its own. What the kernel does keep is how much was ever written to a device, and that is what
//!   stands in for the time in an [`Identity`](super::copy::Identity): as long as it is the same, nobody has written.
//!   Sectors are counted, not requests, since a flush counts as a request; and what is still in the page cache is written
//!   out before it is looked at, or it would be counted later. The count begins anew with the device: after the end of the
//!   host nothing can be said of what was before, so the boot goes with it. Where the kernel keeps no count
//!   (`queue/iostats` off) writes by others go unnoticed.
//! - **One name.** `/dev/mapper/vg-lv`, `/dev/vg/lv` and `/dev/dm-3` are the same device, and which of them somebody uses says
//!   nothing. Devices are compared by number.

use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{FileType, SeekFrom, Stat};

/// Places among the numbers of `/sys/dev/block/*/stat`: sectors written, sectors discarded.
const COUNTED: [usize; 2] = [6, 13];

/// Whether this is what the kernel says of a block device.
pub(crate) fn is(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
}

/// Whether a path leads to a block device, links followed. What cannot be looked at is none.
#[must_use]
pub fn at(path: &Path) -> bool {
    number(path).is_some()
}

fn number(path: &Path) -> Option<u64> {
    let data = std::fs::metadata(path).ok()?;
    data.file_type().is_block_device().then(|| data.rdev())
}

/// Whether two paths mean the same image: the same path, or the same device under two names. Two names of one *file* are not
/// taken for the same: whoever writes a file's other name has a reason.
#[must_use]
pub fn same(one: &Path, other: &Path) -> bool {
    one == other || number(one).is_some_and(|number_of_one| number(other) == Some(number_of_one))
}

/// What a device is, whatever it is called: names like `/dev/sdb` and numbers are handed out anew at each start of the
/// host. Where the kernel knows nothing that lasts, it is the number in this boot. Reads a few files of `/sys`.
#[must_use]
pub fn lasting(path: &Path) -> Option<String> {
    let number = number(path)?;
    let number = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let place = std::fs::canonicalize(format!("/sys/dev/block/{number}")).ok();
    place.and_then(|place| known(&place)).or_else(|| Some(format!("{number} in boot {}", boot_id().ok()?)))
}

fn boot_id() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn known(place: &Path) -> Option<String> {
    let said = |name: &str| {
        let text = std::fs::read_to_string(place.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    if let Some(start) = said("partition").and_then(|_| said("start")) {
        return Some(format!("{}, from sector {start}", known(place.parent()?)?));
    }
    ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "loop/backing_file"]
        .into_iter()
        .find_map(|name| Some(format!("{name} {}", said(name)?)))
}

/// The length of an open device in bytes. Moves its position.
pub(crate) fn size(device: &File) -> Result<u64> {
    Ok(rustix::fs::seek(device, SeekFrom::End(0))?)
}

/// How many sectors were ever written to or discarded on an open device, page cache included; 0 where nobody counts.
pub(crate) fn written(device: &File, stat: &Stat) -> Result<i64> {
    rustix::fs::fdatasync(device)?;
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    match std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")) {
        Ok(text) => Ok(counted(&text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(Error::new(e.kind(), format!("how much was written to device {major}:{minor}: {e}"))),
    }
}

/// Tells counts of one boot from those of another: the first 32 bits of its id.
pub(crate) fn boot() -> Result<u32> {
    let id = boot_id()?;
    let first = id.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok());
    first.ok_or_else(|| Error::other(format!("{id:?} is no id of a boot")))
}

fn counted(text: &str) -> i64 {
    let numbers: Vec<i64> = text.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
    COUNTED.iter().filter_map(|at| numbers.get(*at)).fold(0, |sum, number| sum.saturating_add(*number))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;
    use crate::image::copy::Identity;

    /// A loop device over a file of so many bytes; detached when dropped.
    pub(crate) struct Loop {
        pub(crate) path: PathBuf,
        _file: tempfile::NamedTempFile,
    }

    impl Loop {
        /// Nothing, and a word about it, where loop devices cannot be made.
        pub(crate) fn new(size: u64) -> Option<Self> {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(size).unwrap();
            let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output();
            match made {
                Ok(made) if made.status.success() => {
                    let path = String::from_utf8(made.stdout).unwrap().trim().into();
                    Some(Self { path, _file: file })
                }
                other => {
                    println!("SKIPPED: no loop device can be made here: {other:?}");
                    None
                }
            }
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
        }
    }

    #[test]
    fn a_device_is_the_same_under_every_name_and_a_file_is_not() {
        let Some(device) = Loop::new(1 << 20) else { return };
        let folder = tempfile::tempdir().unwrap();
        let (link, file) = (folder.path().join("lv"), folder.path().join("file"));
        std::os::unix::fs::symlink(&device.path, &link).unwrap();
        std::fs::write(&file, b"x").unwrap();
        std::fs::hard_link(&file, folder.path().join("again")).unwrap();
        assert!(at(&link) && !at(&file) && !at(Path::new("/dev/null")) && !at(Path::new("/nothing")));
        assert!(same(&link, &device.path));
        assert!(same(Path::new("/nothing"), Path::new("/nothing")));
        assert!(!same(&file, &device.path) && !same(&file, &folder.path().join("again")));
        let other = Loop::new(1 << 20).unwrap();
        assert!(!same(&other.path, &device.path));
    }

    #[test]
    fn a_device_is_known_by_what_lasts_and_not_by_its_name() {
        let (Some(device), Some(other)) = (Loop::new(1 << 20), Loop::new(1 << 20)) else { return };
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("volume");
        std::os::unix::fs::symlink(&device.path, &link).unwrap();
        let is = lasting(&link).unwrap();
        assert_eq!(lasting(&device.path).as_ref(), Some(&is));
        assert_ne!(lasting(&other.path).as_ref(), Some(&is));
        assert!(is.contains(device._file.path().to_str().unwrap()), "{is}");
        assert_eq!(lasting(folder.path()), None);
    }

    #[test]
    fn a_device_has_its_length_and_tells_whether_it_was_written_to_and_not_whether_it_was_touched() {
        let Some(device) = Loop::new(3 << 20) else { return };
        let was = Identity::at(&device.path).unwrap();
        assert_eq!(was.size, 3 << 20);
        assert!(was.is_device());
        assert_eq!(was.mtime_nsec, boot().unwrap());
        let open = File::options().read(true).write(true).open(&device.path).unwrap();
        // Reads, flushes, and what udev does to the node.
        open.read_exact_at(&mut [0; 4096], 1 << 20).unwrap();
        open.sync_all().unwrap();
        open.set_modified(std::time::SystemTime::now()).unwrap();
        assert_eq!(Identity::of(&open).unwrap(), was);
        // Not yet on the medium: only in the page cache.
        open.write_all_at(&[7; 512], 4096).unwrap();
        let is = Identity::at(&device.path).unwrap();
        assert!(is != was && is.same_file(&was));
    }

    #[test]
    fn sectors_written_and_discarded_count_and_requests_do_not() {
        let line = "3010 1 2387635 11193 18459 8327 6281044 78378 0 23384 103842 5 0 17 0 9591 14270";
        assert_eq!(counted(line), 6_281_044 + 17);
        assert_eq!(counted("1 2 3 4 5 6 7 8 9 10 11"), 7, "an old kernel");
        assert_eq!(counted(""), 0);
    }
}

//! Who uses a file or a block device, also under another name and by way of another device.
//!
//! The same bytes have many numbers: a partition lies within its disk, a volume stands on devices (`slaves/`) and others stand
//! on it (`holders/`), and a loop device shows a file or another device. Of the kernel's own holders, those of a mount, a
//! volume or an array, an exclusive open tells; a loop device and a process that merely has something open, as QEMU has,
//! claim nothing, and are looked for here: in `/sys` for the devices that overlap, and in `/proc` for who has any of them
//! open. **What overlaps** is what lies below the thing itself, down to disks and to files that loops show, and what stands on
//! it; not what stands beside it on the same ground: another partition, another volume. Of loops alone, those over anything
//! below count as well, for the kernel keeps nobody from writing through one to what stands on the same device.
//!
//! Of processes of others only root sees what they have open.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::text::safe;

/// What is the same under every name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Number {
    /// A device's own.
    Device(u64),
    /// The file system's device, and the file's number in it.
    File(u64, u64),
}

impl Number {
    pub(super) fn of(meta: &Metadata) -> Self {
        match meta.file_type().is_block_device() {
            true => Self::Device(meta.rdev()),
            false => Self::File(meta.dev(), meta.ino()),
        }
    }
}

/// Who is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    /// Whoever has it open at all.
    Anybody,
    /// Whoever may write to it: what somebody else only reads stays what it is.
    Writers,
}

/// They look into devices, or keep watch over the paths to them, and use none of what is there.
const PASSING_BY: [&str; 4] = ["(udev-worker)", "systemd-udevd", "udevd", "multipathd"];

/// Who uses it, in words, if anybody that can be seen does. Blocks.
pub(super) fn user(path: &Path, meta: &Metadata, seek: Seek) -> Option<String> {
    let overlap = Overlap::of(Path::new("/sys"), path, Number::of(meta));
    let shown = overlap.loops.iter().find(|one| seek == Seek::Anybody || one.writes);
    if let Some(device) = shown {
        return Some(format!("the device {} shows it, or what it lies on", device.path.display()));
    }
    process(&overlap.numbers, seek)
}

/// Whether a mount, a volume, an array or a swap space holds a device. Blocks.
pub(super) fn claimed(device: &Path) -> bool {
    // On devices it means: as long as nobody else claims it.
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
    matches!(rustix::fs::open(device, flags, Mode::empty()), Err(Errno::BUSY))
}

/// Whether the kernel lets nobody write to a device.
pub(super) fn is_read_only(meta: &Metadata) -> bool {
    let folder = folder_of(Path::new("/sys"), Number::of(meta));
    folder.is_some_and(|folder| read(&folder.join("ro")).as_deref() == Some("1"))
}

/// A process that has one of these open.
fn process(numbers: &BTreeSet<Number>, seek: Seek) -> Option<String> {
    let me = std::process::id();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()).filter(|pid| *pid != me)
        else {
            continue;
        };
        let path = process.path();
        // It may end meanwhile, and those of others are not to be seen.
        for open in std::fs::read_dir(path.join("fd")).into_iter().flatten().flatten() {
            let is_it = |meta: Metadata| numbers.contains(&Number::of(&meta));
            if !std::fs::metadata(open.path()).is_ok_and(is_it) {
                continue;
            }
            if seek == Seek::Writers && reads_only(&path.join("fdinfo").join(open.file_name())) {
                continue;
            }
            let program = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            let program = program.trim();
            if PASSING_BY.contains(&program) {
                break;
            }
            return Some(format!("process {pid} ({}) has it open", safe(program)));
        }
    }
    None
}

/// Whether something was opened for reading alone; what cannot be told may be written to.
fn reads_only(info: &Path) -> bool {
    let text = std::fs::read_to_string(info).unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & OFlags::ACCMODE.bits() == 0)
}

/// A loop device that shows a thing, or what that lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shows {
    path: PathBuf,
    writes: bool,
}

/// All that overlaps with a thing.
#[derive(Debug, Default, PartialEq, Eq)]
struct Overlap {
    numbers: BTreeSet<Number>,
    loops: Vec<Shows>,
}

/// A loop device as the kernel lists it.
struct Loop {
    folder: PathBuf,
    number: Number,
    /// What it shows, as a path and, if that can be looked at, as a number.
    backing: (PathBuf, Option<Number>),
}

impl Overlap {
    fn of(sys: &Path, path: &Path, number: Number) -> Self {
        let loops = loops(sys);
        let mut found = Self::default();
        let mut down = vec![number];
        while let Some(next) = down.pop() {
            if found.numbers.insert(next) {
                down.extend(under(sys, &loops, next));
            }
        }
        // Up again: from the thing itself whatever stands on it, from what it lies on what loops show of that.
        let real = std::fs::canonicalize(path).ok();
        let mut up = over(sys, number);
        loop {
            for one in &loops {
                let shows = match &one.backing {
                    (_, Some(shown)) => found.numbers.contains(shown),
                    (path, None) => Some(path) == real.as_ref(),
                };
                if shows && found.numbers.insert(one.number) {
                    let writes = read(&one.folder.join("ro")).as_deref() != Some("1");
                    found.loops.push(Shows { path: one.folder.clone(), writes });
                    up.extend(over(sys, one.number));
                }
            }
            let Some(next) = up.pop() else { return found };
            if found.numbers.insert(next) {
                up.extend(over(sys, next));
            }
        }
    }
}

/// What a file of one line says.
fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim_end_matches('\n').to_owned())
}

/// The device that a folder of `/sys` is of.
fn device(folder: &Path) -> Option<Number> {
    let text = read(&folder.join("dev"))?;
    let (major, minor) = text.split_once(':')?;
    Some(Number::Device(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?)))
}

/// A device's folder, without links.
fn folder_of(sys: &Path, number: Number) -> Option<PathBuf> {
    let Number::Device(device) = number else { return None };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()
}

fn children(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// What a thing lies on.
fn under(sys: &Path, loops: &[Loop], number: Number) -> Vec<Number> {
    let Some(folder) = folder_of(sys, number) else { return Vec::new() };
    let mut under: Vec<Number> =
        children(&folder.join("slaves")).filter_map(|slave| device(&slave)).collect();
    if folder.join("partition").exists() {
        under.extend(folder.parent().and_then(device));
    }
    under.extend(loops.iter().filter(|one| one.number == number).filter_map(|one| one.backing.1));
    under
}

/// What stands on a device: volumes, and its partitions.
fn over(sys: &Path, number: Number) -> Vec<Number> {
    let Some(folder) = folder_of(sys, number) else { return Vec::new() };
    let holders = children(&folder.join("holders")).filter_map(|holder| device(&holder));
    let partitions = children(&folder).filter(|child| child.join("partition").exists());
    holders.chain(partitions.filter_map(|partition| device(&partition))).collect()
}

fn loops(sys: &Path) -> Vec<Loop> {
    let look = |folder: PathBuf| {
        let backing = PathBuf::from(read(&folder.join("loop/backing_file"))?);
        let number = std::fs::metadata(&backing).ok().map(|meta| Number::of(&meta));
        Some(Loop { number: device(&folder)?, backing: (backing, number), folder })
    };
    children(&sys.join("block")).filter_map(look).collect()
}

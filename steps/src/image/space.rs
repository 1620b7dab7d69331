//! Room on file systems: how much there is, how much a copy will take, when to give up.
//!
//! Free space is always what an unprivileged writer may use (`f_bavail`), also for root: filling the reserve of the
//! file system that holds a guest's overlay is not something a backup may do.

use rustix::fs::{SeekFrom, StatVfs};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use std::path::Path;

/// Room on one file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Size of the file system.
    pub total: u64,
    /// What may still be written without touching the reserve.
    pub free: u64,
}

impl Space {
    fn from_statvfs(s: &StatVfs) -> Self {
        let unit = if s.f_frsize == 0 { s.f_bsize } else { s.f_frsize };
        Self { total: s.f_blocks.saturating_mul(unit), free: s.f_bavail.saturating_mul(unit) }
    }

    /// Room on the file system that holds the open file or folder.
    pub fn of(fd: impl AsFd) -> std::io::Result<Self> {
        Ok(Self::from_statvfs(&rustix::fs::fstatvfs(fd)?))
    }

    /// Room on the file system that holds `path`.
    pub fn at(path: &Path) -> std::io::Result<Self> {
        Ok(Self::from_statvfs(&rustix::fs::statvfs(path)?))
    }
}

/// When a file system counts as nearly full. The higher of the two marks holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LowWater {
    /// At least so many bytes stay free.
    pub bytes: u64,
    /// At least so many percent of the file system stay free (0–100).
    pub percent: u8,
}

impl Default for LowWater {
    /// 1 GiB or 2 %, whichever is more.
    fn default() -> Self {
        Self { bytes: 1 << 30, percent: 2 }
    }
}

impl LowWater {
    /// The mark in bytes for a file system of this size. Never more than half of it, so that a policy made for large
    /// disks does not forbid everything on a small one.
    pub fn mark(&self, total: u64) -> u64 {
        let share = (u128::from(total) * u128::from(self.percent.min(100)) / 100) as u64;
        self.bytes.max(share).min(total / 2)
    }

    /// Whether less is free than the mark.
    pub fn reached(&self, space: Space) -> bool {
        space.free < self.mark(space.total)
    }

    /// Whether `needed` bytes can be written and the mark still stands.
    pub fn allows(&self, space: Space, needed: u64) -> bool {
        space.free.checked_sub(needed).is_some_and(|left| left >= self.mark(space.total))
    }
}

/// Bytes that a sparse copy of the file will write: its data extents, holes left out.
///
/// Not `st_blocks`: on file systems that compress, that is less than the copy takes elsewhere. A block device counts whole:
/// it does not tell its holes.
pub fn data_bytes(file: impl AsFd) -> std::io::Result<u64> {
    let stat = rustix::fs::fstat(&file)?;
    if super::device::is(&stat) {
        return Ok(rustix::fs::seek(&file, SeekFrom::End(0))?);
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let (mut at, mut sum) = (0, 0);
    while at < size {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(size),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(&file, SeekFrom::Hole(start))?.min(size);
        sum += end.saturating_sub(start);
        // A file that shrinks meanwhile must not make this loop forever.
        at = end.max(at + 1);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_higher_mark_holds_but_never_half_a_disk() {
        let policy = LowWater { bytes: GIB, percent: 2 };
        assert_eq!(policy.mark(10 * GIB), GIB);
        assert_eq!(policy.mark(100 * GIB), 2 * GIB);
        assert_eq!(policy.mark(GIB), GIB / 2);
        assert!(policy.reached(Space { total: 100 * GIB, free: 2 * GIB - 1 }));
        assert!(!policy.reached(Space { total: 100 * GIB, free: 2 * GIB }));
        assert!(policy.allows(Space { total: 100 * GIB, free: 5 * GIB }, 3 * GIB));
        assert!(!policy.allows(Space { total: 100 * GIB, free: 5 * GIB }, 3 * GIB + 1));
        assert!(!policy.allows(Space { total: 100 * GIB, free: GIB }, u64::MAX));
    }

    #[test]
    fn data_bytes_leaves_holes_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        assert_eq!(data_bytes(&file).unwrap(), 0);
        file.write_all_at(&[1; 4096], 32 << 20).unwrap();
        let bytes = data_bytes(&file).unwrap();
        assert!((4096..=1 << 20).contains(&bytes), "{bytes}");
    }

    #[test]
    fn space_of_a_real_file_system_is_plausible() {
        let space = Space::at(Path::new("/tmp")).unwrap();
        assert!(space.total > 0 && space.free <= space.total);
    }
}

//! The two ends of a copy, behind traits so that tests can make them fail where disks do.

use super::CopyError;
use crate::blocking::{self, look, touch};
use crate::image::{device, open};
use rustix::fs::{Advice, FileType, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Which file it is, and whether its content is still the same, as far as the file system can tell.
///
/// The time of change is that of the content (mtime). Owner, mode and labels may change meanwhile: libvirt does that.
/// Of a block device, which has none of these, see [`crate::image::device`]: its own number stands for that of its file
/// system, 0 for its inode, and what was written to it since the host began, in sectors, for the time; the nanoseconds tell
/// which time it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Modification time: seconds …
    pub mtime: i64,
    /// … and nanoseconds.
    pub mtime_nsec: u32,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dev, ino, size, mtime, mtime_nsec } = self;
        if self.is_device() {
            let (major, minor) = (rustix::fs::major(*dev), rustix::fs::minor(*dev));
            return write!(
                f,
                "block device {major}:{minor}, {size} bytes, {mtime} sectors written since boot {mtime_nsec:08x}"
            );
        }
        write!(f, "inode {ino} on device {dev}, {size} bytes, modified {mtime}.{mtime_nsec:09}")
    }
}

impl Identity {
    /// From what the kernel says of a file.
    pub fn from_stat(stat: &Stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: stat.st_mtime,
            mtime_nsec: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        }
    }

    /// Of an open file or block device.
    pub fn of(file: &File) -> Result<Self> {
        let stat = rustix::fs::fstat(file)?;
        if !device::is(&stat) {
            return Ok(Self::from_stat(&stat));
        }
        let mtime = device::written(file, &stat)?;
        Ok(Self { dev: stat.st_rdev, ino: 0, size: device::size(file)?, mtime, mtime_nsec: device::boot()? })
    }

    /// Of the file or block device that a path leads to, symbolic links followed.
    pub fn at(path: &Path) -> Result<Self> {
        look("look at")?;
        let stat = rustix::fs::stat(path)?;
        if !device::is(&stat) {
            return Ok(Self::from_stat(&stat));
        }
        Self::of(&open::to_read(path, OFlags::empty())?)
    }

    /// Whether it is a block device. No file has the inode 0.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.ino == 0
    }

    /// Whether it is the same file, whatever is in it now.
    pub fn same_file(&self, other: &Self) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

/// A stretch of a file up to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    Data { end: u64 },
    Hole { end: u64 },
}

pub(crate) trait Source: Sync {
    fn size(&self) -> u64;
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize>;
    /// What lies at `offset`, which is before the end.
    fn extent(&self, offset: u64) -> Result<Extent>;
    /// Whether it knows its holes. If not, what reads as zeroes is taken for one.
    fn knows_holes(&self) -> bool {
        true
    }
    /// The real file, for the kernel to copy from.
    fn file(&self) -> Option<&File>;
    fn identity(&self) -> Identity;
}

pub(crate) trait Target: Sync {
    /// Where nothing is written at all.
    fn discards(&self) -> bool {
        false
    }
    fn clone_from(&self, source: &File) -> Result<()>;
    fn copy_from(&self, source: &File, offset: u64, len: usize) -> Result<usize>;
    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize>;
    fn set_len(&self, len: u64) -> Result<()>;
    fn sync_data(&self) -> Result<()>;
    fn sync_all(&self) -> Result<()>;
    /// The copy needs no place in the page cache any more.
    fn forget(&self, offset: u64, len: u64);
    /// Device and inode.
    fn place(&self) -> Result<(u64, u64)>;
}

/// An open source: a regular file, or a block device where that was allowed.
#[derive(Debug)]
pub struct SourceFile {
    file: File,
    path: PathBuf,
    identity: Identity,
}

impl SourceFile {
    /// Opens a file for reading. Symbolic links are followed: where a guest's image lies is its owner's choice.
    pub fn open(path: &Path) -> std::result::Result<Self, CopyError> {
        Self::from_file(Self::opened(path)?, path.to_owned())
    }

    /// The same of a raw image, which may also be a block device.
    pub fn open_raw(path: &Path) -> std::result::Result<Self, CopyError> {
        Self::admit(Self::opened(path)?, path.to_owned(), true)
    }

    fn opened(path: &Path) -> std::result::Result<File, CopyError> {
        let fail = |source| CopyError::Source { act: "open", path: path.to_owned(), source };
        look("open").map_err(Error::from).and_then(|()| open::to_read(path, OFlags::empty())).map_err(fail)
    }

    /// Takes a file that was opened elsewhere; `path` is for messages.
    pub fn from_file(file: File, path: PathBuf) -> std::result::Result<Self, CopyError> {
        Self::admit(file, path, false)
    }

    fn admit(file: File, path: PathBuf, devices: bool) -> std::result::Result<Self, CopyError> {
        let looked = rustix::fs::fstat(&file).map_err(Error::from).and_then(|stat| {
            let file_type = FileType::from_raw_mode(stat.st_mode);
            let fits = file_type == FileType::RegularFile || (devices && device::is(&stat));
            fits.then(|| Identity::of(&file)).transpose()
        });
        match looked {
            Ok(Some(identity)) => Ok(Self { file, path, identity }),
            Ok(None) => Err(CopyError::NotAFile { path }),
            Err(source) => Err(CopyError::Source { act: "look at", path, source }),
        }
    }

    /// The file as it was when it was opened.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gets the file ready for one long read.
    pub(crate) fn prepare(&self) -> std::result::Result<(), CopyError> {
        match rustix::fs::fdatasync(&self.file) {
            // A file system mounted read-only may refuse, and has nothing dirty.
            Ok(()) | Err(Errno::ROFS | Errno::INVAL | Errno::BADF) => {}
            Err(e) => {
                return Err(CopyError::Source { act: "sync", path: self.path.clone(), source: e.into() });
            }
        }
        if self.identity.is_device() {
            // What is cached of it may be older than what was written past the cache.
            let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        }
        // Hints; a file system may ignore them.
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::Sequential);
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::NoReuse);
        Ok(())
    }

    /// Fails if the file is not what it was when it was opened.
    pub fn unchanged(&self) -> std::result::Result<(), CopyError> {
        let is = Identity::of(&self.file).map_err(|source| CopyError::Source {
            act: "look at",
            path: self.path.clone(),
            source,
        })?;
        if is == self.identity { Ok(()) } else { Err(CopyError::SourceChanged { was: self.identity, is }) }
    }
}

impl Source for SourceFile {
    fn size(&self) -> u64 {
        self.identity.size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize> {
        look("read")?;
        self.file.read_at(buffer, offset)
    }

    fn extent(&self, offset: u64) -> Result<Extent> {
        let size = self.identity.size;
        look("read")?;
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(at) => at,
            // Nothing but a hole up to the end; or the file is shorter now, which reading its last byte brings out.
            Err(Errno::NXIO) => return Ok(Extent::Hole { end: size }),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Extent::Data { end: size }),
            Err(e) => return Err(e.into()),
        };
        if data > offset {
            return Ok(Extent::Hole { end: data.min(size) });
        }
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(offset))?;
        Ok(Extent::Data { end: end.clamp(offset + 1, size.max(offset + 1)) })
    }

    fn knows_holes(&self) -> bool {
        !self.identity.is_device()
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn identity(&self) -> Identity {
        self.identity
    }
}

/// The file that a copy is written to.
pub(crate) struct TargetFile(File);

impl TargetFile {
    pub(crate) fn new(file: File) -> Self {
        Self(file)
    }

    pub(crate) fn identity(&self) -> Result<Identity> {
        Identity::of(&self.0)
    }
}

impl Target for TargetFile {
    fn clone_from(&self, source: &File) -> Result<()> {
        Ok(rustix::fs::ioctl_ficlone(&self.0, source)?)
    }

    fn copy_from(&self, source: &File, offset: u64, len: usize) -> Result<usize> {
        let (mut from, mut to) = (offset, offset);
        Ok(rustix::fs::copy_file_range(source, Some(&mut from), &self.0, Some(&mut to), len)?)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<usize> {
        touch("write")?;
        self.0.write_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        touch("set the length")?;
        self.0.set_len(len)
    }

    fn sync_data(&self) -> Result<()> {
        blocking::sync_data(&self.0)
    }

    fn sync_all(&self) -> Result<()> {
        blocking::sync(&self.0)
    }

    fn forget(&self, offset: u64, len: u64) {
        if let Some(len) = std::num::NonZeroU64::new(len) {
            let _ = rustix::fs::fadvise(&self.0, offset, Some(len), Advice::DontNeed);
        }
    }

    fn place(&self) -> Result<(u64, u64)> {
        let identity = Identity::of(&self.0)?;
        Ok((identity.dev, identity.ino))
    }
}

/// No target: the source is only hashed.
pub(crate) struct Nowhere;

impl Target for Nowhere {
    fn discards(&self) -> bool {
        true
    }
    fn clone_from(&self, _: &File) -> Result<()> {
        Err(Error::from(Errno::OPNOTSUPP))
    }
    fn copy_from(&self, _: &File, _: u64, len: usize) -> Result<usize> {
        Ok(len)
    }
    fn write_at(&self, bytes: &[u8], _: u64) -> Result<usize> {
        Ok(bytes.len())
    }
    fn set_len(&self, _: u64) -> Result<()> {
        Ok(())
    }
    fn sync_data(&self) -> Result<()> {
        Ok(())
    }
    fn sync_all(&self) -> Result<()> {
        Ok(())
    }
    fn forget(&self, _: u64, _: u64) {}
    fn place(&self) -> Result<(u64, u64)> {
        Ok((0, 0))
    }
}

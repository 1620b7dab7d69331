//! What sled leaves to us: room before it writes, and fsyncs after it wrote.
//!
//! **Room.** sled that finds no room fails for good, and may have written a part. So before a group is handed to it the
//! room that its log will take is allocated beyond the end of `db`, without changing its length; and beyond that a segment
//! more, because sled fills its last segment up when it starts. Where the file system cannot allocate ahead, and should a
//! group take more than was foreseen, the failure is dealt with when it comes ([`super::writer`]).
//!
//! **Fsyncs.** What sled calls a flush is `sync_file_range`: the drive's cache is not told. So `db` is fsynced after it;
//! and any file that appeared since, with the folder that names it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use vmkeep_workflow::journal::StoreError;

use super::layout;
use crate::files::{self, failed};

/// The length of one of sled's segments.
const SEGMENT: u64 = 512 << 10;
/// So much is allocated at once while there is plenty.
const AHEAD: u64 = 4 << 20;

/// sled's files of a store that is open for writing.
pub(super) struct Disk {
    inner: PathBuf,
    /// Opened once: a failed write-back is told to each open file once, and must not be missed.
    data: File,
    known: Vec<PathBuf>,
    /// Up to where `db` is known to have room.
    allocated: u64,
    length: u64,
    can_allocate: bool,
}

impl Disk {
    /// Fsyncs all files of a store that sled has just opened.
    pub(super) fn open(folder: &Path) -> Result<Self, StoreError> {
        let inner = layout::inner(folder);
        let path = inner.join("db");
        let data =
            File::options().read(true).write(true).open(&path).map_err(|e| failed("open", &path, &e))?;
        let mut disk = Self { inner, data, known: Vec::new(), allocated: 0, length: 0, can_allocate: true };
        disk.sync_all().map_err(|e| failed("fsync", &disk.inner, &e))?;
        Ok(disk)
    }

    /// Fsyncs everything, and learns which files there are.
    pub(super) fn sync_all(&mut self) -> io::Result<()> {
        layout::sync_all(&self.inner)?;
        self.known = layout::all_files(&self.inner)?;
        Ok(())
    }

    /// Makes what sled has written durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if !vmkeep_workflow::mutation::on("sled-unsynced") {
            self.data.sync_data()?;
        }
        let now = layout::all_files(&self.inner)?;
        if now.iter().any(|path| !self.known.contains(path)) {
            return self.sync_all();
        }
        self.known = now;
        Ok(())
    }

    /// Whether all that was written back so far arrived.
    pub(super) fn is_sound(&self) -> io::Result<()> {
        self.data.sync_data()
    }

    /// Makes sure of the room for so many bytes more.
    pub(super) fn room_for(&mut self, weight: u64) -> io::Result<()> {
        if !self.can_allocate {
            return Ok(());
        }
        let length = self.data.metadata()?.len();
        // sled cuts off what it no longer needs, and with it what was allocated beyond.
        if length < self.length {
            self.allocated = 0;
        }
        self.length = length;
        let needed = weight + SEGMENT;
        if self.allocated >= length + needed {
            return Ok(());
        }
        match self.allocate(length, needed + AHEAD) {
            Err(e) if files::is_lack_of_room(&e) => self.allocate(length, needed),
            outcome => outcome,
        }
    }

    fn allocate(&mut self, length: u64, size: u64) -> io::Result<()> {
        match fallocate(&self.data, FallocateFlags::KEEP_SIZE, length, size) {
            Ok(()) => self.allocated = length + size,
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                tracing::debug!("the file system cannot allocate room ahead");
                self.can_allocate = false;
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }
}

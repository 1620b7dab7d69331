//! The reserve: room that is taken while there is plenty, to be given up when the disk is full.
//!
//! A full disk must not stop running jobs from recording how they bring their guests to a safe place. So a file is
//! allocated beside the store. When an append finds no room, the file is removed, the folder is fsynced (file systems
//! with a journal hand freed blocks out again only after that), and the append is tried once more. From then on the
//! reserve is *spent*, and the engine starts no new job. Whoever looks at it when there is room for the reserve and as much
//! again on top restores it: the head room keeps a nearly full disk from flapping.
//!
//! The file itself is the state, so it survives a restart: it is renamed to its name only when it is whole.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, fallocate};
use vmkeep_workflow::journal::Reserve;

use crate::files;

/// The reserve's size where none is given. Bringing a job to a safe place takes some tens of KiB.
pub(crate) const DEFAULT_SIZE: u64 = 16 << 20;

/// The reserve of a store.
pub(crate) struct ReserveFile {
    folder: PathBuf,
    name: &'static str,
    size: u64,
    state: Mutex<Reserve>,
}

impl ReserveFile {
    /// Looks at the reserve of the store in `folder`, and makes it if there is room. `size` 0 means none: it is always
    /// intact and never helps.
    pub(crate) fn open(folder: &Path, size: u64) -> Self {
        Self::named(folder, "reserve", size)
    }

    /// The same under another name, for another purpose.
    pub(crate) fn named(folder: &Path, name: &'static str, size: u64) -> Self {
        let reserve = Self { folder: folder.to_path_buf(), name, size, state: Mutex::new(Reserve::Spent) };
        reserve.look();
        reserve
    }

    fn path(&self) -> PathBuf {
        self.folder.join(self.name)
    }

    fn state(&self) -> MutexGuard<'_, Reserve> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the reserve is whole; makes it so if it is not and there is room.
    pub(crate) fn look(&self) -> Reserve {
        let mut state = self.state();
        if *state == Reserve::Spent {
            match self.restore() {
                Ok(true) => *state = Reserve::Intact,
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "the store's reserve cannot be restored yet"),
            }
        }
        *state
    }

    /// Gives the reserve up. False when there is none to give up.
    pub(crate) fn release(&self) -> bool {
        let mut state = self.state();
        if self.size == 0 || *state == Reserve::Spent {
            return false;
        }
        *state = Reserve::Spent;
        match self.give_up() {
            Ok(()) => tracing::warn!(bytes = self.size, "the disk is full: the store's reserve was given up"),
            Err(error) => tracing::error!(%error, "the store's reserve could not be given up"),
        }
        true
    }

    /// Empties the file before it is removed: should anybody have it open (a copying tool), its room is free all the same.
    fn give_up(&self) -> io::Result<()> {
        let file = File::options().write(true).open(self.path())?;
        file.set_len(0)?;
        file.sync_all()?;
        files::remove(&self.path())?;
        files::sync_folder(&self.folder)
    }

    fn restore(&self) -> io::Result<bool> {
        if self.size == 0 {
            return Ok(true);
        }
        let path = self.path();
        if std::fs::metadata(&path).is_ok_and(|file| file.len() >= self.size) {
            return Ok(true);
        }
        files::remove(&path)?;
        if files::room(&self.folder)? < self.size.saturating_mul(2) {
            return Ok(false);
        }
        let young = self.folder.join(format!("{}.new", self.name));
        files::remove(&young)?;
        if let Err(e) = self.fill(&young) {
            files::remove(&young)?;
            return if files::is_lack_of_room(&e) { Ok(false) } else { Err(e) };
        }
        std::fs::rename(&young, &path)?;
        files::sync_folder(&self.folder)?;
        Ok(true)
    }

    fn fill(&self, path: &Path) -> io::Result<()> {
        use std::io::Write;
        let mut file = files::make_file(path)?;
        match fallocate(&file, FallocateFlags::empty(), 0, self.size) {
            Ok(()) => {}
            // Some file systems cannot allocate ahead; there it is written out. Not with zeros, which they may not store.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let mut noise = blake3::Hasher::new().finalize_xof();
                let mut block = vec![0; 1 << 20];
                let mut left = self.size;
                while left > 0 {
                    noise.fill(&mut block);
                    let part = block.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    file.write_all(&block[..part])?;
                    left -= part as u64;
                }
            }
            Err(e) => return Err(e.into()),
        }
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_takes_its_room_at_once_and_gives_it_up_once() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let reserve = ReserveFile::open(folder.path(), 1 << 20);
        assert_eq!(reserve.look(), Reserve::Intact);
        let file = std::fs::metadata(folder.path().join("reserve")).unwrap();
        assert_eq!(file.len(), 1 << 20);
        assert!(file.blocks() * 512 >= 1 << 20, "it must not be a hole");
        assert!(reserve.release());
        assert!(!folder.path().join("reserve").exists());
        assert!(!reserve.release());
    }

    #[test]
    fn a_spent_reserve_is_restored_when_there_is_room_again() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = ReserveFile::open(folder.path(), 1 << 20);
        reserve.release();
        assert_eq!(reserve.look(), Reserve::Intact);
        assert!(folder.path().join("reserve").exists());
    }

    #[test]
    fn a_reserve_that_does_not_fit_is_spent_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = ReserveFile::open(folder.path(), u64::MAX / 4);
        assert_eq!(reserve.look(), Reserve::Spent);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_torn_reserve_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("reserve"), "torn").unwrap();
        std::fs::write(folder.path().join("reserve.new"), "torn").unwrap();
        assert_eq!(ReserveFile::open(folder.path(), 1 << 20).look(), Reserve::Intact);
        assert_eq!(std::fs::metadata(folder.path().join("reserve")).unwrap().len(), 1 << 20);
    }
}

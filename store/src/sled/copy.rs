//! Reading a store that is not ours to write: through a private copy.
//!
//! sled cannot open its files without writing to them: it cuts off and overwrites what it takes for a torn end, and writes a
//! new page table. So whoever only reads (a tool beside the daemon, the daemon itself on a disk that cannot be written to)
//! reads a copy, made anew when the store's generation has changed since. And a store that is to be written is first
//! opened as a copy and compared with its head: if anything is lost, the files are still as they were found.
//!
//! The copy is made without the store's lock, so that no reader can hold up a daemon; see [`super::head`] for why it is
//! sound. Files of the store that appear or go away during the copy make it start anew.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use sled::Db;
use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use super::head::{self, Head};
use super::layout::{self, Identity};
use crate::files::{self, failed};
use crate::lock::Lock;

/// What the names of copies begin with.
const PREFIX: &str = "vmkeep-copy-";

/// A copy that was changed so recently is left alone.
const YOUNG: Duration = Duration::from_secs(60);

/// So many copies are tried of a store that is being written.
const TRIES: u32 = 40;

/// A private copy of a store's files, open. Removed when dropped.
pub(super) struct Copy {
    db: Option<Db>,
    place: PathBuf,
    /// Held as long as the copy is in use: one that nobody holds was left by a process that was killed.
    _lock: Lock,
    /// What the store was known to hold when the copy was made.
    pub(super) head: Head,
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Some(db) = self.db.take() {
            let _ = super::writer::close(Ok(db));
        }
        let _ = std::fs::remove_dir_all(&self.place);
    }
}

impl Copy {
    /// Copies the store in a folder, and opens the copy.
    pub(super) fn of(folder: &Path, store: Uuid) -> Result<Self, StoreError> {
        let inner = layout::inner(folder);
        let mut last = StoreError::Io("it is written too fast to be read from outside".to_owned());
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(u64::from(attempt)));
            }
            let before = head::read(&inner, store)?;
            let place = place_for(&inner)?;
            files::make_folder(&place)?;
            let _lock = Lock::take(&place)?;
            // From here on the copy is removed whatever happens.
            let mut copy = Self { db: None, place, _lock, head: before };
            let copied = copy_files(&inner, &copy.place, store, &before);
            let quiet = head::read(&inner, store)?.generation <= before.generation + 1;
            match copied {
                Ok(()) if quiet => {}
                Ok(()) => continue,
                Err(e) if e.kind() == io::ErrorKind::NotFound && !quiet => continue,
                Err(e) => return Err(failed("copy", &inner, &e)),
            }
            match layout::open_db(&copy.place) {
                Ok(db) => {
                    copy.db = Some(db);
                    return Ok(copy);
                }
                // Once more if something was changed meanwhile: what was copied need not be sound then.
                Err(error) if head::read(&inner, store)?.generation == before.generation => {
                    return Err(error);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(super) fn db(&self) -> Result<&Db, StoreError> {
        self.db.as_ref().ok_or_else(|| StoreError::Io("the copy of the store is gone".to_owned()))
    }
}

/// A new folder on a file system that has the room: the one for temporary files, or else memory.
fn place_for(inner: &Path) -> Result<PathBuf, StoreError> {
    let mut needed = 4 << 20;
    for path in layout::all_files(inner).map_err(|e| failed("read the folder", inner, &e))? {
        needed += std::fs::metadata(path).map_or(0, |meta| meta.len());
    }
    let name = format!("{PREFIX}{}", Uuid::new_v4().simple());
    for place in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        sweep(&place);
        if files::room(&place).is_ok_and(|room| room > needed) {
            return Ok(place.join(name));
        }
    }
    Err(StoreError::Io(format!(
        "there is no room for a copy of {} ({needed} bytes) to be read, neither in {} nor in memory",
        inner.display(),
        std::env::temp_dir().display()
    )))
}

/// Removes copies of processes that were killed.
fn sweep(place: &Path) {
    let (Ok(names), Ok(now)) =
        (layout::names(place), std::time::SystemTime::now().duration_since(UNIX_EPOCH))
    else {
        return;
    };
    for name in names.iter().filter(|name| name.starts_with(PREFIX)) {
        let copy = place.join(name);
        // One that was made just now may not have its lock yet.
        let made = std::fs::metadata(&copy).and_then(|meta| meta.modified());
        let age = made
            .ok()
            .and_then(|made| made.duration_since(UNIX_EPOCH).ok())
            .map(|made| now.saturating_sub(made));
        if age.is_some_and(|age| age > YOUNG) && Lock::take(&copy).is_ok() {
            let _ = std::fs::remove_dir_all(&copy);
        }
    }
}

fn copy_files(inner: &Path, place: &Path, store: Uuid, head: &Head) -> io::Result<()> {
    std::fs::create_dir(place.join("blobs"))?;
    for path in layout::all_files(inner)? {
        let name = path.strip_prefix(inner).map_err(io::Error::other)?;
        let text = name.to_string_lossy();
        if text != "head" && text != "identity" && !text.ends_with(".generating") {
            std::fs::copy(&path, place.join(name))?;
        }
    }
    head::create(place, store, head)
}

/// A store that is read through copies, the latest of which is kept.
pub(super) struct Copies {
    folder: PathBuf,
    identity: Identity,
    latest: Mutex<Option<Copy>>,
}

impl Copies {
    pub(super) fn open(folder: &Path) -> Result<(Self, Identity), StoreError> {
        if !layout::inner(folder).exists() {
            return Err(StoreError::Io(format!("there is no store in {}", folder.display())));
        }
        let identity = layout::identify(folder)?;
        let copies = Self { folder: folder.to_path_buf(), identity, latest: Mutex::default() };
        copies.read(|_, _| Ok(()))?;
        Ok((copies, identity))
    }

    fn latest(&self) -> MutexGuard<'_, Option<Copy>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the store holds now. Blocks.
    pub(super) fn read<T>(
        &self,
        query: impl FnOnce(&Db, &Head) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut latest = self.latest();
        let now = head::read(&layout::inner(&self.folder), self.identity.id)?.generation;
        if latest.as_ref().is_none_or(|copy| copy.head.generation != now) {
            // The old one first: there may not be room for two.
            *latest = None;
            *latest = Some(Copy::of(&self.folder, self.identity.id)?);
        }
        match latest.as_ref() {
            Some(copy) => query(copy.db()?, &copy.head),
            None => Err(StoreError::Io("the copy of the store is gone".to_owned())),
        }
    }
}

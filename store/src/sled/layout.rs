//! What a store's folder holds, and how a young store comes to be.
//!
//! | file | what it is |
//! |---|---|
//! | `journal.sled/conf`, `db`, `snap.*`, `blobs/` | sled's own |
//! | `journal.sled/identity` | format, id and time of creation, as text: read before sled is let near |
//! | `journal.sled/head` | where the journal ends ([`super::head`]) |
//! | `lock` | held while a process has the store open for writing |
//! | `reserve` | room for a full disk |
//! | `spare` | room for sled to start on a full disk |
//!
//! The inner folder is made complete under another name, fsynced with all that is in it, renamed, and the outer folder
//! fsynced. So there is a `journal.sled` only if it is whole, whenever the power went; sled's own `conf`, which it writes
//! once and never fsyncs, is whole then as well.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use sled::{Config, Db};
use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use super::errors::unread;
use super::head::{self, Head};
use crate::files::{self, failed};

/// The format that this release writes, and the newest that it reads.
pub(super) const FORMAT: u32 = 1;

/// What sled keeps in memory; its own default is a GiB.
const CACHE: u64 = 32 << 20;

const KIND: &str = "vmkeep journal in sled";

/// Who a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Its id.
    pub(super) id: Uuid,
    /// When it was made.
    pub(super) created: Timestamp,
}

/// The inner folder of the store in a folder.
pub(super) fn inner(folder: &Path) -> PathBuf {
    folder.join("journal.sled")
}

fn identity(inner: &Path) -> PathBuf {
    inner.join("identity")
}

/// Makes the store's inner folder. The caller holds the lock and has seen that there is none.
pub(super) fn create(folder: &Path, id: Uuid, created: Timestamp) -> Result<(), StoreError> {
    let young = folder.join("journal.new");
    remove_folder(&young)?;
    files::make_folder(&young)?;
    let db = open_db(&young)?;
    db.flush().map_err(|e| unread("make the database", &e))?;
    super::writer::close(Ok(db))?;
    let made = (|| {
        use std::io::Write;
        head::create(&young, id, &Head::first(id))?;
        let mut file = files::make_file(&identity(&young))?;
        writeln!(file, "{KIND}\nformat {FORMAT}\nid {id}\ncreated {created}")?;
        writeln!(file, "by {}", env!("CARGO_PKG_VERSION"))?;
        drop(file);
        sync_all(&young)?;
        std::fs::rename(&young, inner(folder))?;
        files::sync_folder(folder)
    })();
    made.map_err(|e| failed("make", &inner(folder), &e))
}

fn remove_folder(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, &e)),
        _ => Ok(()),
    }
}

/// Reads who a store is; refuses what this release cannot read.
pub(super) fn identify(folder: &Path) -> Result<Identity, StoreError> {
    let path = identity(&inner(folder));
    let text = match std::fs::read(&path) {
        Ok(text) => String::from_utf8_lossy(&text).into_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(StoreError::Damaged(format!("{} is missing", path.display())));
        }
        Err(e) => return Err(failed("read", &path, &e)),
    };
    let mut lines = text.lines();
    let mut next = |name: &str| {
        let line = lines.next().and_then(|line| line.strip_prefix(name)).map(str::trim);
        line.ok_or_else(|| StoreError::Damaged(format!("{} cannot be understood", path.display())))
    };
    next(KIND)?;
    let garbled = |what: &str| StoreError::Damaged(format!("the store's {what} cannot be understood"));
    let found: u32 = next("format ")?.parse().map_err(|_| garbled("format"))?;
    if found > FORMAT {
        return Err(StoreError::TooNew { path: folder.display().to_string(), found, known: FORMAT });
    }
    if found != FORMAT {
        return Err(StoreError::Damaged(format!("there was never a format {found}")));
    }
    Ok(Identity {
        id: next("id ")?.parse().map_err(|_| garbled("id"))?,
        created: next("created ")?.parse().map_err(|_| garbled("time of creation"))?,
    })
}

/// Opens sled in a folder. sled trusts what it reads and panics over what it did not expect; that is damage to us.
pub(super) fn open_db(inner: &Path) -> Result<Db, StoreError> {
    drop_torn_snapshots(inner)?;
    let config = Config::new().path(inner).cache_capacity(CACHE).flush_every_ms(None);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| config.open()))
        .unwrap_or_else(|_| Err(sled::Error::ReportableBug("it panicked".to_owned())))
        .map_err(|e| unread(&format!("open {}", inner.display()), &e))
}

/// Removes snapshots of the page table that sled had not finished. sled would take one for the newest, and writes over
/// it without shortening it; until a new one is complete and has its name the old one is there.
fn drop_torn_snapshots(inner: &Path) -> Result<(), StoreError> {
    for name in names(inner).map_err(|e| failed("read the folder", inner, &e))? {
        if name.starts_with("snap.") && name.ends_with(".generating") {
            let torn = inner.join(name);
            files::remove(&torn).map_err(|e| failed("remove", &torn, &e))?;
        }
    }
    Ok(())
}

/// The names in a folder; none if it is not there.
pub(super) fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// All files of a store's inner folder, with the folders that they are in: `blobs/` and itself.
pub(super) fn all_files(inner: &Path) -> io::Result<Vec<PathBuf>> {
    let blobs = inner.join("blobs");
    let mut found = Vec::new();
    for name in names(inner)? {
        let path = inner.join(&name);
        if path != blobs {
            found.push(path);
        }
    }
    found.extend(names(&blobs)?.iter().map(|name| blobs.join(name)));
    Ok(found)
}

/// Fsyncs everything: each file, `blobs/`, the inner folder and the one above it.
pub(super) fn sync_all(inner: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for path in all_files(inner)? {
        let file = match File::open(&path) {
            Ok(file) => file,
            // sled removes what it no longer needs whenever it likes.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        file.set_permissions(PermissionsExt::from_mode(files::FILE_MODE))?;
        file.sync_all()?;
    }
    files::sync_folder(&inner.join("blobs"))?;
    files::sync_folder(inner)?;
    inner.parent().map_or(Ok(()), files::sync_folder)
}

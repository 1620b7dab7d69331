//! Connections to the database, and what each way of opening it leaves on disk.
//!
//! The identity of a store is read before anything may be written, through the way that touches least:
//!
//! | way | needs | touches |
//! |---|---|---|
//! | [`Way::Untouched`] | the index file of the log | nothing, not even the index |
//! | [`Way::Shared`] | a folder that can be written to | the index (and an empty log) |
//! | [`Way::Immutable`] | that nobody writes | nothing |
//!
//! `Untouched` reads beside a living daemon as well as after its death. The version in the file's header may lag behind one
//! that is only in the log, so it is never taken from the raw header: each way reads the log too, `Immutable` being used
//! only where there is none. (Opening the file oneself would also be dangerous: closing any descriptor of it gives up all
//! record locks that SQLite holds on it in this process.)

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use super::errors::{Kind, kind, unread};
use super::layout::{self, Identity};
use crate::files::{self, failed};

/// How long a connection waits for a lock; only a stranger (`sqlite3` in somebody's shell) can hold one that long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Idle reading connections that are kept.
const KEPT: usize = 4;

/// A way to open the database for reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// With the index of the log mapped read-only.
    Untouched,
    /// As any reader does.
    Shared,
    /// As a file that nobody changes, without its log.
    Immutable,
}

/// Opens a connection that writes: durable commits if `durable`, else commits that the next durable one carries along.
pub(super) fn writer(folder: &Path, durable: bool) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(layout::database(folder), flags)?;
    if connection.is_readonly(rusqlite::MAIN_DB)? {
        // SQLite makes do with reading when the file cannot be written to.
        let failure = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_PERM);
        return Err(rusqlite::Error::SqliteFailure(failure, Some("it cannot be written to".to_owned())));
    }
    connection.busy_timeout(PATIENCE)?;
    connection.set_prepared_statement_cache_capacity(32);
    // Dirty pages stay in memory until the commit, so the log is written once and only whole. Checkpoints are run by
    // the writer itself: those that SQLite runs inside a commit swallow their errors, failed fsyncs included. The limit
    // is for the log's size after an unusual growth.
    connection.execute_batch(
        "PRAGMA wal_autocheckpoint = 0;
         PRAGMA temp_store = MEMORY;
         PRAGMA cache_size = -4096;
         PRAGMA cache_spill = OFF;
         PRAGMA mmap_size = 0;
         PRAGMA trusted_schema = OFF;
         PRAGMA cell_size_check = ON;
         PRAGMA journal_size_limit = 67108864;",
    )?;
    connection.pragma_update(None, "synchronous", if durable { "FULL" } else { "NORMAL" })?;
    Ok(connection)
}

/// That there is no room for the index of the log.
pub(super) fn no_room() -> rusqlite::Error {
    let failure = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
    rusqlite::Error::SqliteFailure(failure, Some("there is no room for the index of its log".to_owned()))
}

fn reader(database: &Path, way: Way) -> rusqlite::Result<Connection> {
    let mut uri = String::from("file:");
    for &byte in database.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri.push_str(match way {
        Way::Untouched => "?mode=ro&readonly_shm=1",
        Way::Shared => "?mode=ro",
        Way::Immutable => "?mode=ro&immutable=1",
    });
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri, flags)?;
    connection.busy_timeout(PATIENCE)?;
    connection.execute_batch(
        "PRAGMA temp_store = MEMORY;
         PRAGMA cache_size = -1024;
         PRAGMA mmap_size = 0;
         PRAGMA trusted_schema = OFF;
         PRAGMA cell_size_check = ON;
         PRAGMA query_only = ON;",
    )?;
    // Only a query opens the files.
    connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
    Ok(connection)
}

/// Reads who a store is before it is opened for writing. The caller holds the lock.
pub(super) fn inspect(folder: &Path) -> Result<Identity, StoreError> {
    let ways: &[Way] =
        if layout::has_log(folder) { &[Way::Untouched, Way::Shared] } else { &[Way::Immutable] };
    let (connection, _) = first_that_works(folder, ways)?;
    layout::identify(&connection, folder)
}

fn first_that_works(folder: &Path, ways: &[Way]) -> Result<(Connection, Way), StoreError> {
    let database = layout::database(folder);
    let mut last = StoreError::Io(format!("there is no store in {}", folder.display()));
    for &way in ways {
        let opened = match way {
            Way::Shared if layout::lacks_room_for_index(folder) => Err(no_room()),
            way => reader(&database, way),
        };
        match opened {
            Ok(connection) => return Ok((connection, way)),
            Err(error) => {
                last = unread(&format!("open {}", database.display()), &error);
                if kind(&error) == Kind::Damage {
                    break;
                }
            }
        }
    }
    Err(last)
}

/// The reading connections of a store, made as they are needed.
pub(super) struct Readers {
    database: PathBuf,
    way: Way,
    idle: Mutex<Vec<Connection>>,
    _copy: Option<TempCopy>,
}

impl Readers {
    /// Readers beside a writer of this process.
    pub(super) fn beside_writer(folder: &Path) -> Self {
        Self { database: layout::database(folder), way: Way::Shared, idle: Mutex::default(), _copy: None }
    }

    /// Readers of a store that this process does not write, whoever else may.
    pub(super) fn alone(folder: &Path) -> Result<(Self, Identity), StoreError> {
        let database = layout::database(folder);
        if !database.is_file() {
            return Err(StoreError::Io(format!("there is no store in {}", folder.display())));
        }
        let mut ways = vec![Way::Untouched, Way::Shared];
        if !layout::has_log(folder) {
            ways.push(Way::Immutable);
        }
        let (folder, copy, (connection, way)) = match first_that_works(folder, &ways) {
            Ok(opened) => (folder.to_path_buf(), None, opened),
            Err(error @ StoreError::Damaged(_)) => return Err(error),
            // A log without its index in a folder that cannot be written to: a copy on read-only media.
            Err(error) => {
                tracing::debug!(%error, "the store is read from a temporary copy");
                let copy = TempCopy::of(folder)?;
                let opened = first_that_works(&copy.0, &[Way::Shared])?;
                (copy.0.clone(), Some(copy), opened)
            }
        };
        let identity = layout::identify(&connection, &folder)?;
        let idle = Mutex::new(vec![connection]);
        Ok((Self { database: layout::database(&folder), way, idle, _copy: copy }, identity))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads. Blocks.
    pub(super) fn read<T>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let kept = self.idle().pop();
        let connection = match kept {
            Some(connection) => connection,
            None => reader(&self.database, self.way)
                .map_err(|e| unread(&format!("open {}", self.database.display()), &e))?,
        };
        // After a failure the connection is not kept: the next one starts with nothing in its cache.
        let found = query(&connection)?;
        let mut idle = self.idle();
        if idle.len() < KEPT {
            idle.push(connection);
        }
        Ok(found)
    }

    /// Closes the idle connections.
    pub(super) fn close(&self) {
        self.idle().clear();
    }
}

/// A temporary copy of a store's database and log; removed when dropped.
struct TempCopy(PathBuf);

impl TempCopy {
    fn of(folder: &Path) -> Result<Self, StoreError> {
        let copy = std::env::temp_dir().join(format!("vmkeep-{}", Uuid::new_v4().simple()));
        files::make_folder(&copy)?;
        let copy = Self(copy);
        for (from, to) in [
            (layout::database(folder), layout::database(&copy.0)),
            (layout::log(folder), layout::log(&copy.0)),
        ] {
            match std::fs::copy(&from, &to) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(failed("copy", &from, &e)),
            }
        }
        Ok(copy)
    }
}

impl Drop for TempCopy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

//! What a store's folder holds, and how a young store comes to be.
//!
//! | file | what it is |
//! |---|---|
//! | `journal.db` | the database |
//! | `journal.db-wal`, `journal.db-shm` | its log and the log's index, while it is open and after a crash |
//! | `lock` | held while a process has the store open for writing |
//! | `reserve` | room for a full disk |
//! | `spare` | room for opening the store on one |
//!
//! A database is made complete under another name, fsynced, renamed, and the folder fsynced. So there is a `journal.db` only
//! if it is whole, whenever the power went; what an interrupted creation left is removed by the next one. An empty
//! `journal.db`, or a log without a database, was never ours: both are refused, for a fresh database beside an old log
//! would be filled from that log.

use std::io::Write;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension};
use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use super::errors::unread;
use crate::files::{self, failed};

/// The format that this release writes, and the newest that it reads.
pub(super) const FORMAT: u32 = 1;

/// The size of a page of the database: several events fit, and an append writes whole pages.
const PAGE: u32 = 2048;

/// The size of the log that is written ahead: what a busy store fills between checkpoints, and a large group on top.
const LOG_BYTES: usize = (super::pen::BUSY_FRAMES as usize + 256) * (PAGE as usize + 24);

/// The frames of the log that one part of its index is for, and the bytes of such a part.
const PART_FRAMES: u64 = 4096;
const PART_BYTES: u64 = 32 << 10;

/// The room that is kept for opening the store: for the index of the longest log, and as much again for all else.
pub(super) const SPARE: u64 = 512 << 10;

/// SQLite's `application_id`, "vmkj": a database of another program is refused.
const APPLICATION: i32 = 0x766d_6b6a;

/// `records` is written in the order of the commits, so an append touches its last page whatever stream it is for; the
/// index is narrow, as are the indexes of `jobs`, which change only with a job's status. That keeps a durable append at
/// four or five pages. `keys` names streams by text because it outlives them.
const SCHEMA: &str = "
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE streams (key INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE commits (number INTEGER PRIMARY KEY, digest BLOB NOT NULL, link BLOB NOT NULL) STRICT;
CREATE TABLE records (
    position INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    commit_number INTEGER NOT NULL,
    hash BLOB NOT NULL,
    bytes TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX records_by_place ON records (stream, seq);
CREATE TABLE jobs (
    stream INTEGER PRIMARY KEY,
    job BLOB NOT NULL,
    subject TEXT NOT NULL,
    workflow TEXT NOT NULL,
    status TEXT NOT NULL,
    requested INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    summary TEXT NOT NULL
) STRICT;
CREATE INDEX jobs_by_request ON jobs (requested, job);
CREATE INDEX jobs_by_subject ON jobs (subject, requested, job);
CREATE INDEX jobs_by_status ON jobs (status, requested, job);
CREATE TABLE keys (key TEXT PRIMARY KEY, stream TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE rows (
    job BLOB NOT NULL,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (job, name)
) STRICT, WITHOUT ROWID;
";

/// Who a store is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    /// Its id.
    pub(super) id: Uuid,
    /// When it was made.
    pub(super) created: Timestamp,
}

/// The database of the store in a folder.
pub(super) fn database(folder: &Path) -> PathBuf {
    folder.join("journal.db")
}

/// The log of the database of the store in a folder.
pub(super) fn log(folder: &Path) -> PathBuf {
    folder.join("journal.db-wal")
}

/// Whether the log of a database holds anything.
pub(super) fn has_log(folder: &Path) -> bool {
    std::fs::metadata(log(folder)).is_ok_and(|file| file.len() > 0)
}

/// Whether the files of the store can be opened for writing; if not, why.
pub(super) fn can_write(folder: &Path) -> Result<(), StoreError> {
    let index = folder.join("journal.db-shm");
    for path in [database(folder), log(folder), index] {
        match std::fs::File::options().read(true).write(true).open(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(files::failed("open for writing", &path, &e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether there is too little room for the log's index. SQLite maps it into memory, and where the blocks of a file system are
/// smaller than a page of memory, writing to a page that finds no room ends the process (SIGBUS). Nobody but SQLite may open
/// the index itself: whoever closes it gives up the locks that SQLite has on it.
pub(super) fn lacks_room_for_index(folder: &Path) -> bool {
    let frames = std::fs::metadata(log(folder)).map_or(0, |log| log.len()) / u64::from(PAGE);
    let needed = (frames / PART_FRAMES + 2) * PART_BYTES;
    // What it has it is made of again.
    let has = std::fs::metadata(folder.join("journal.db-shm")).map_or(0, |index| index.blocks() * 512);
    needed > has && files::lacks_room_for(folder, needed - has)
}

/// Writes the log out ahead with zeros, when there is none: SQLite takes a log without its header for an empty one.
///
/// From then on a commit overwrites blocks that the file has, so its fsync need not wait for the file system's own
/// journal (a fifth of the time of an append), and needs no room on a full disk. SQLite removes the log when the store is
/// closed. Without the room for it, all works as well.
pub(super) fn write_log_ahead(folder: &Path) {
    let path = log(folder);
    if std::fs::metadata(&path).is_ok_and(|file| file.len() > 0) {
        return;
    }
    let written = files::remove(&path).and_then(|()| {
        let mut file = files::make_file(&path)?;
        // Page by page: a long write would be cached in large folios, whose every block the kernel then looks at whenever
        // a frame is written into one of them (an eighth of the time of an append).
        let zeros = [0; PAGE as usize];
        for _ in 0..LOG_BYTES.div_ceil(zeros.len()) {
            file.write_all(&zeros)?;
        }
        file.sync_all()?;
        files::sync_folder(folder)
    });
    if let Err(error) = written {
        tracing::warn!(%error, "no room to write the store's log ahead");
        if let Err(error) = files::remove(&path) {
            tracing::warn!(%error, "could not remove the store's torn log");
        }
    }
}

/// Makes the store's database. The caller holds the lock and has seen that there is none.
pub(super) fn create(folder: &Path, id: Uuid, created: Timestamp) -> Result<(), StoreError> {
    if has_log(folder) {
        return Err(StoreError::Damaged(format!(
            "{} is there without the database that it belongs to",
            log(folder).display()
        )));
    }
    let young = folder.join("journal.new");
    for left in ["journal.new", "journal.new-journal", "journal.new-wal", "journal.new-shm"] {
        let left = folder.join(left);
        files::remove(&left).map_err(|e| failed("remove", &left, &e))?;
    }
    let file = files::make_file(&young).map_err(|e| failed("make", &young, &e))?;
    fill(&young, id, created).map_err(|e| unread("make the database", &e))?;
    let database = database(folder);
    file.sync_all()
        .and_then(|()| std::fs::rename(&young, &database))
        .and_then(|()| files::sync_folder(folder))
        .map_err(|e| failed("make", &database, &e))
}

fn fill(path: &Path, id: Uuid, created: Timestamp) -> rusqlite::Result<()> {
    let mut connection = Connection::open(path)?;
    // Nobody relies on the young file before it is fsynced as a whole.
    connection.execute_batch("PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF;")?;
    connection.pragma_update(None, "page_size", PAGE)?;
    connection.pragma_update(None, "application_id", APPLICATION)?;
    connection.pragma_update(None, "user_version", FORMAT)?;
    let transaction = connection.transaction()?;
    transaction.execute_batch(SCHEMA)?;
    let facts = [
        ("id", id.to_string()),
        ("created", created.to_string()),
        ("by", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    for (name, value) in facts {
        transaction.execute("INSERT INTO meta (name, value) VALUES (?1, ?2)", (name, value))?;
    }
    transaction.commit()?;
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    connection.close().map_err(|(_, error)| error)
}

/// Who the store behind a connection is; refuses what this release cannot read.
pub(super) fn identify(connection: &Connection, folder: &Path) -> Result<Identity, StoreError> {
    let ask = |error: rusqlite::Error| unread("read the store's identity", &error);
    let number = |name: &str| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i32>(0));
    if number("application_id").map_err(ask)? != APPLICATION {
        return Err(StoreError::Damaged(format!("{} is no journal of vmkeep", database(folder).display())));
    }
    // SQLite's version is signed, ours is not.
    let found = number("user_version").map_err(ask)?.cast_unsigned();
    if found > FORMAT {
        return Err(StoreError::TooNew { path: folder.display().to_string(), found, known: FORMAT });
    }
    if found != FORMAT {
        return Err(StoreError::Damaged(format!("there was never a format {found}")));
    }
    let fact = |name: &str| -> Result<String, StoreError> {
        connection
            .query_row("SELECT value FROM meta WHERE name = ?1", [name], |row| row.get(0))
            .optional()
            .map_err(ask)?
            .ok_or_else(|| StoreError::Damaged(format!("the store does not say its {name}")))
    };
    let garbled = |what: &str| StoreError::Damaged(format!("the store's {what} cannot be understood"));
    Ok(Identity {
        id: fact("id")?.parse().map_err(|_| garbled("id"))?,
        created: fact("created")?.parse().map_err(|_| garbled("time of creation"))?,
    })
}

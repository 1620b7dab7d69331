//! What somebody can do to the files of a store while nobody has it open.

use std::path::Path;

use rusqlite::{Connection, params};
use rustix::fs::{FlockOperation, flock};
use vmkeep_store::{EngineName, Hash};
use vmkeep_workflow::ids::{Seq, StreamId};

/// A store's files, open for somebody who is not its engine.
pub(crate) enum Tamper {
    Sqlite(Connection),
    Sled(sled::Db),
}

/// Waits until nobody has the file: sled lets go of it a moment after its last handle is gone.
fn let_go(file: &Path) {
    let file = std::fs::File::open(file).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
}

/// The records of a place of a stream, in SQL.
const WANTED: &str = "WHERE stream = (SELECT key FROM streams WHERE name = ?1) AND seq = ?2";

impl Tamper {
    pub(crate) fn open(engine: EngineName, folder: &Path) -> Self {
        match engine {
            EngineName::Sled => {
                let folder = folder.join("journal.sled");
                let_go(&folder.join("db"));
                Self::Sled(sled::open(folder).unwrap())
            }
            _ => Self::Sqlite(Connection::open(folder.join("journal.db")).unwrap()),
        }
    }

    fn sql(&self, sql: &str, values: impl rusqlite::Params) {
        let Self::Sqlite(database) = self else { panic!("not in SQL") };
        assert_eq!(database.execute(sql, values).unwrap(), 1);
    }

    /// Changes the value of a record in sled: flag, place, commit, hash, length of the name, name, bytes.
    fn value(&self, stream: &StreamId, seq: Seq, change: impl FnOnce(&mut Vec<u8>, usize)) {
        let Self::Sled(db) = self else { panic!("not in sled") };
        let key = [&b"r"[..], &db.get(place(stream, seq)).unwrap().unwrap()].concat();
        let mut value = db.get(&key).unwrap().unwrap().to_vec();
        change(&mut value, 1 + 8 + 8 + 32 + 4 + stream.as_str().len());
        db.insert(key, value).unwrap();
    }

    /// Gives a record other bytes.
    pub(crate) fn rewrite(&mut self, stream: &StreamId, seq: Seq, bytes: &[u8]) {
        match self {
            Self::Sqlite(_) => self.sql(
                &format!("UPDATE records SET bytes = ?3 {WANTED}"),
                params![stream.as_str(), seq.0.cast_signed(), std::str::from_utf8(bytes).unwrap()],
            ),
            Self::Sled(_) => self.value(stream, seq, |value, at| {
                value.truncate(at);
                value.extend_from_slice(bytes);
            }),
        }
    }

    /// Gives a record another hash.
    pub(crate) fn rehash(&mut self, stream: &StreamId, seq: Seq, hash: Hash) {
        match self {
            Self::Sqlite(_) => self.sql(
                &format!("UPDATE records SET hash = ?3 {WANTED}"),
                params![stream.as_str(), seq.0.cast_signed(), hash],
            ),
            Self::Sled(_) => self.value(stream, seq, |value, _| value[17..49].copy_from_slice(&hash)),
        }
    }

    /// Removes a record, and what leads to it.
    pub(crate) fn remove(&mut self, stream: &StreamId, seq: Seq) {
        match self {
            Self::Sqlite(_) => {
                self.sql(
                    &format!("DELETE FROM records {WANTED}"),
                    params![stream.as_str(), seq.0.cast_signed()],
                );
            }
            Self::Sled(db) => {
                let position = db.remove(place(stream, seq)).unwrap().unwrap();
                db.remove([&b"r"[..], &position].concat()).unwrap().unwrap();
            }
        }
    }

    /// Has two records of a stream change places, each with its own hash.
    pub(crate) fn exchange(&mut self, stream: &StreamId, one: Seq, other: Seq) {
        match self {
            Self::Sqlite(_) => {
                for (from, to) in [(one.0, u64::from(u32::MAX)), (other.0, one.0), (u32::MAX.into(), other.0)]
                {
                    self.sql(
                        &format!("UPDATE records SET seq = ?3 {WANTED}"),
                        params![stream.as_str(), from.cast_signed(), to.cast_signed()],
                    );
                }
            }
            Self::Sled(db) => {
                let [a, b] = [one, other]
                    .map(|seq| [&b"r"[..], &db.get(place(stream, seq)).unwrap().unwrap()].concat());
                let [first, second] = [&a, &b].map(|key| db.get(key).unwrap().unwrap().to_vec());
                // Place and commit stay where they are; hash and bytes go.
                let mixed = |head: &[u8], rest: &[u8]| [&head[..17], &rest[17..]].concat();
                db.insert(a, mixed(&first, &second)).unwrap();
                db.insert(b, mixed(&second, &first)).unwrap();
            }
        }
    }
}

impl Drop for Tamper {
    fn drop(&mut self) {
        if let Self::Sled(db) = self {
            db.flush().unwrap();
        }
    }
}

fn place(stream: &StreamId, seq: Seq) -> Vec<u8> {
    let name = stream.as_str().as_bytes();
    let length = u32::try_from(name.len()).unwrap().to_be_bytes();
    [&b"p"[..], &length, name, &seq.0.to_be_bytes()].concat()
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let there = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &there);
        } else {
            std::fs::copy(entry.path(), there).unwrap();
        }
    }
}

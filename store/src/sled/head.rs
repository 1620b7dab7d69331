//! The head: what the store is known to hold, kept outside of sled.
//!
//! sled takes a log that ends early for one that was never longer: a damaged tail, or a segment whose header does not
//! read, is cut away in silence, and written over. So the last acknowledged commit is noted in a file of our own, after
//! sled's files were fsynced and before anybody is told. A store that has less than its head says is damaged.
//!
//! The file has two slots, written in turn: a torn one leaves the other. Each names a *generation*. It is odd while
//! anything is being changed and even at rest; even ones go to the first slot, odd ones to the second. Whoever copies the
//! store's files without a lock compares the generation before and after: if it went up by one at most, what was copied is
//! what a power cut could have left during one change, which sled is made to recover from, and which this head bounds.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use crate::chain::{self, Hash};
use crate::files::{FILE_MODE, failed};

const MAGIC: &[u8; 8] = b"vmkhead1";
const SLOT: u64 = 4096;
const LENGTH: usize = 8 + 16 + 8 + 8 + 32 + 32;

/// What a store is known to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Odd while something is being changed.
    pub(super) generation: u64,
    /// The last acknowledged commit; 0 before the first.
    pub(super) commit: u64,
    /// Its link.
    pub(super) link: Hash,
}

impl Head {
    /// The head of an empty store.
    pub(super) fn first(store: Uuid) -> Self {
        Self { generation: 0, commit: 0, link: chain::genesis(store) }
    }

    fn encode(&self, store: Uuid) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        let facts = [
            &MAGIC[..],
            store.as_bytes(),
            &self.generation.to_be_bytes(),
            &self.commit.to_be_bytes(),
            &self.link,
        ]
        .concat();
        bytes[..LENGTH - 32].copy_from_slice(&facts);
        bytes[LENGTH - 32..].copy_from_slice(blake3::hash(&facts).as_bytes());
        bytes
    }

    fn decode(bytes: &[u8; LENGTH], store: Uuid) -> Option<Self> {
        let (facts, sum) = bytes.split_at(LENGTH - 32);
        let sound = blake3::hash(facts).as_bytes() == sum && facts.starts_with(MAGIC);
        if !sound || facts[8..24] != store.as_bytes()[..] {
            return None;
        }
        let number = |at: usize| Some(u64::from_be_bytes(facts.get(at..at + 8)?.try_into().ok()?));
        Some(Self { generation: number(24)?, commit: number(32)?, link: facts.get(40..72)?.try_into().ok()? })
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("head")
}

/// Reads the head of the store in a folder.
pub(super) fn read(folder: &Path, store: Uuid) -> Result<Head, StoreError> {
    let path = path(folder);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(StoreError::Damaged(format!("{} is missing", path.display())));
        }
        Err(e) => return Err(failed("open", &path, &e)),
    };
    let mut found: Option<Head> = None;
    for slot in 0..2 {
        let mut bytes = [0; LENGTH];
        match file.read_exact_at(&mut bytes, slot * SLOT) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(e) => return Err(failed("read", &path, &e)),
        }
        if let Some(head) = Head::decode(&bytes, store)
            && found.is_none_or(|found| found.generation < head.generation)
        {
            found = Some(head);
        }
    }
    found
        .ok_or_else(|| StoreError::Damaged(format!("{} does not say where the journal ends", path.display())))
}

/// Writes a head into a folder as if it were the only one.
pub(super) fn create(folder: &Path, store: Uuid, head: &Head) -> io::Result<()> {
    let path = path(folder);
    let file = File::options().write(true).create(true).truncate(true).mode(FILE_MODE).open(path)?;
    // Both slots are there from the beginning, so that later writes need no room.
    file.write_all_at(&vec![0; 2 * usize::try_from(SLOT).unwrap_or(0)], 0)?;
    file.write_all_at(&head.encode(store), (head.generation % 2) * SLOT)?;
    file.sync_all()
}

/// The head of a store that is open for writing.
pub(super) struct HeadFile {
    file: File,
    store: Uuid,
    head: Head,
}

impl HeadFile {
    pub(super) fn open(folder: &Path, store: Uuid) -> Result<Self, StoreError> {
        let head = read(folder, store)?;
        let path = path(folder);
        let file = File::options().write(true).open(&path).map_err(|e| failed("open", &path, &e))?;
        Ok(Self { file, store, head })
    }

    pub(super) fn head(&self) -> Head {
        self.head
    }

    fn write(&mut self, head: Head) -> io::Result<()> {
        self.file.write_all_at(&head.encode(self.store), (head.generation % 2) * SLOT)?;
        self.head = head;
        Ok(())
    }

    /// Says that something is about to be changed.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        // Odd already when the process before this one was ended in the middle.
        let generation = self.head.generation + 1 + self.head.generation % 2;
        self.write(Head { generation, ..self.head })
    }

    /// Says that it was changed, up to that commit. Not durable.
    pub(super) fn end(&mut self, commit: u64, link: Hash) -> io::Result<()> {
        self.write(Head { generation: self.head.generation + 1, commit, link })
    }

    /// Makes it durable. After a failure nothing may be written any more.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_slot_leaves_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let store = Uuid::new_v4();
        create(folder.path(), store, &Head::first(store)).unwrap();
        let mut file = HeadFile::open(folder.path(), store).unwrap();
        for commit in 1..6 {
            file.begin().unwrap();
            assert_eq!(read(folder.path(), store).unwrap().generation % 2, 1);
            file.end(commit, [7; 32]).unwrap();
            assert_eq!(read(folder.path(), store).unwrap(), file.head());
        }
        let bytes = std::fs::read(path(folder.path())).unwrap();
        let mut torn = bytes.clone();
        torn[40] ^= 1;
        std::fs::write(path(folder.path()), &torn).unwrap();
        assert_eq!(read(folder.path(), store).unwrap().commit, 4);
        torn[4096 + 40] ^= 1;
        std::fs::write(path(folder.path()), &torn).unwrap();
        assert!(matches!(read(folder.path(), store), Err(StoreError::Damaged(_))));
        std::fs::write(path(folder.path()), &bytes).unwrap();
        assert!(
            matches!(read(folder.path(), Uuid::new_v4()), Err(StoreError::Damaged(_))),
            "of another store"
        );
    }
}

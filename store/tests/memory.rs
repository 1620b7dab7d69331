//! The memory engine passes the suite.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use vmkeep_store::conformance::Candidate;
use vmkeep_store::{MemoryStore, Options, Store};
use vmkeep_workflow::EventStore;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::StoreError;

/// Stores by the folders that they would have.
#[derive(Default)]
struct Memory(Mutex<HashMap<PathBuf, Arc<MemoryStore>>>);

impl Candidate for Memory {
    fn open(&self, folder: &Path, options: Options) -> Result<Arc<dyn Store>, StoreError> {
        let mut stores = self.0.lock().unwrap();
        let fresh = MemoryStore::new();
        let made = || {
            let created = options.created.unwrap_or(fresh.created());
            Arc::new(MemoryStore::copy_of(options.id.unwrap_or(fresh.id()), created))
        };
        Ok(Arc::clone(stores.entry(folder.to_path_buf()).or_insert_with(made)) as Arc<dyn Store>)
    }

    fn open_read_only(&self, folder: &Path) -> Result<Arc<dyn Store>, StoreError> {
        self.open(folder, Options::default())
    }

    fn tamper(&self, folder: &Path, stream: &StreamId, seq: Seq) {
        self.0.lock().unwrap()[folder].tamper(stream, seq);
    }

    fn set_format(&self, _: &Path, _: u32) {}
}

vmkeep_store::conformance!(super::Memory::default());

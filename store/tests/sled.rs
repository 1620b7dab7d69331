//! The sled engine passes the suite.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::sync::Arc;

use vmkeep_store::conformance::Candidate;
use vmkeep_store::{Options, SledStore, Store};
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::StoreError;

struct Sled;

impl Candidate for Sled {
    fn open(&self, folder: &Path, options: Options) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(SledStore::open(folder, options)?))
    }

    fn open_read_only(&self, folder: &Path) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(SledStore::open_read_only(folder)?))
    }

    fn tamper(&self, folder: &Path, stream: &StreamId, seq: Seq) {
        let db = sled::open(folder.join("journal.sled")).unwrap();
        let name = stream.as_str().as_bytes();
        let length = u32::try_from(name.len()).unwrap().to_be_bytes();
        let place = [&b"p"[..], &length, name, &seq.0.to_be_bytes()].concat();
        let position = db.get(place).unwrap().unwrap();
        let key = [&b"r"[..], &position].concat();
        let mut value = db.get(&key).unwrap().unwrap().to_vec();
        // The bytes come last.
        let at = 1 + 8 + 8 + 32 + 4 + name.len();
        value[at] ^= 1;
        db.insert(key, value).unwrap();
        db.flush().unwrap();
    }

    fn set_format(&self, folder: &Path, format: u32) {
        let path = folder.join("journal.sled/identity");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<String> = text
            .lines()
            .map(
                |line| if line.starts_with("format ") { format!("format {format}") } else { line.to_owned() },
            )
            .collect();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    }
}

vmkeep_store::conformance!(super::Sled);
vmkeep_store::conformance_durable!(super::Sled);

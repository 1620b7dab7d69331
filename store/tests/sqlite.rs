//! The sqlite engine passes the suite.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::sync::Arc;

use rusqlite::Connection;
use vmkeep_store::conformance::Candidate;
use vmkeep_store::{Options, SqliteStore, Store};
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::StoreError;

struct Sqlite;

impl Candidate for Sqlite {
    fn open(&self, folder: &Path, options: Options) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(SqliteStore::open(folder, options)?))
    }

    fn open_read_only(&self, folder: &Path) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(SqliteStore::open_read_only(folder)?))
    }

    fn tamper(&self, folder: &Path, stream: &StreamId, seq: Seq) {
        let database = Connection::open(folder.join("journal.db")).unwrap();
        let place = (stream.as_str(), seq.0.cast_signed());
        let wanted = "WHERE stream = (SELECT key FROM streams WHERE name = ?1) AND seq = ?2";
        let text: String = database
            .query_row(&format!("SELECT bytes FROM records {wanted}"), place, |row| row.get(0))
            .unwrap();
        let mut bytes = text.into_bytes();
        bytes[0] ^= 1;
        let text = String::from_utf8(bytes).unwrap();
        let sql = format!("UPDATE records SET bytes = ?3 {wanted}");
        assert_eq!(database.execute(&sql, (place.0, place.1, text)).unwrap(), 1);
    }

    fn set_format(&self, folder: &Path, format: u32) {
        let database = Connection::open(folder.join("journal.db")).unwrap();
        database.pragma_update(None, "user_version", format).unwrap();
    }
}

vmkeep_store::conformance!(super::Sqlite);
vmkeep_store::conformance_durable!(super::Sqlite);

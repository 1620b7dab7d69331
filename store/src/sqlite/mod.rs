//! The engine for production: one SQLite database per store, in WAL mode with `synchronous = FULL`.
//!
//! - One writes at a time ([`pen`]): a lone append by itself, and whoever meets others through a thread that commits in
//!   groups ([`writer`]); each group costs one fsync.
//! - The folder is on a local file system: the log's index is memory that processes share.
//! - Reading goes through a few connections of its own on blocking threads, and never waits for the writer.
//! - SQLite is compiled in. The library of the system is never used: that of Debian 12 can lose a log's reset.
//! - What its failures mean stands in [`errors`], how a store comes to be in [`layout`], how it is opened in [`connect`].
//!
//! Rejected: `locking_mode = EXCLUSIVE`, which needs no shared memory, but then nobody else can read: neither our own
//! reading connections nor a tool beside the daemon.

mod connect;
mod errors;
mod layout;
mod ledger;
mod pen;
mod queries;
mod writer;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};

use async_trait::async_trait;
use jiff::Timestamp;
use rusqlite::{Connection, ErrorCode};
use serde_json::Value;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::broadcast;
use uuid::Uuid;
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{
    Append, AppendError, Appended, EventStore, JobFilter, Record, Reserve, StoreError,
};
use vmkeep_workflow::summary::JobSummary;

use self::connect::Readers;
use self::errors::{Kind, kind, unread};
use self::layout::Identity;
use self::ledger::Prepared;
use self::pen::Pen;
use self::writer::Writer;
use crate::chain::{Commit, Placed};
use crate::config::{EngineName, Options};
use crate::lock::Lock;
use crate::queue::{self, RowChange};
use crate::reserve::ReserveFile;
use crate::{Adoption, Burial, SUBSCRIBER_LAG, Store, files};

/// Whether a folder holds a store of this engine, or what is left of one.
pub(crate) fn is_there(folder: &Path) -> bool {
    layout::database(folder).exists() || layout::has_log(folder)
}

/// A store in a SQLite database.
pub struct SqliteStore {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    readers: Readers,
    subscribers: broadcast::Sender<Record>,
    /// Absent in a store that is only read.
    pen: Option<Arc<Mutex<Pen>>>,
    /// As absent.
    writing: Option<Writing>,
    /// How many wait for the writing thread.
    line: AtomicUsize,
}

type Writing = queue::Writing<Prepared>;

/// A place in the line before the writing thread, as long as somebody waits in it.
struct InLine<'a>(&'a AtomicUsize);

impl<'a> InLine<'a> {
    fn of(line: &'a AtomicUsize) -> Self {
        line.fetch_add(1, Ordering::Relaxed);
        Self(line)
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Inner {
    /// Closes in this order: readers, writer (which is then the last connection and tidies the log away), lock.
    fn drop(&mut self) {
        self.readers.close();
        // The thread then has the last one, and closes the connections.
        self.pen = None;
        if let Some(writing) = self.writing.take() {
            writing.close();
        }
    }
}

impl SqliteStore {
    /// Opens the store in a folder, and makes both when they are not there. Blocks.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when it is open elsewhere, be it in this process; [`StoreError::TooNew`] when a newer release
    /// wrote it; [`StoreError::Damaged`] and [`StoreError::Io`] with the reason.
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Self, StoreError> {
        // An absolute path is never taken for a URI.
        let folder = &files::absolute(path.as_ref())?;
        files::make_folder(folder)?;
        let lock = Lock::take(folder)?;
        let database = layout::database(folder);
        if !database.try_exists().map_err(|e| files::failed("look for", &database, &e))? {
            let created = options.created.unwrap_or_else(Timestamp::now);
            layout::create(folder, options.id.unwrap_or_else(Uuid::new_v4), created)?;
        }
        if layout::lacks_room_for_index(folder) {
            ReserveFile::named(folder, "spare", layout::SPARE).release();
        }
        let identity = connect::inspect(folder)?;
        let reserve = Arc::new(ReserveFile::open(folder, options.reserve));
        let spare = ReserveFile::named(folder, "spare", layout::SPARE);
        layout::write_log_ahead(folder);
        let kept = [&spare, &*reserve];
        let opened = match writers(folder, &kept) {
            // SQLite reads where it may not write. What kept it from writing says the system; it may be over by now.
            Err(e) if e.sqlite_error_code() == Some(ErrorCode::ReadOnly) => {
                layout::can_write(folder)?;
                writers(folder, &kept)
            }
            opened => opened,
        };
        let connections = opened.map_err(|error| match error {
            // A reader that maps the log's index read-only does so for its whole process.
            e if e.sqlite_error_code() == Some(ErrorCode::ReadOnly) => StoreError::InUse {
                path: folder.display().to_string(),
                holder: "this process, for reading only".to_owned(),
            },
            e => unread(&format!("open {} for writing", database.display()), &e),
        })?;
        let (commands, queue) = mpsc::channel();
        let subscribers = broadcast::Sender::new(SUBSCRIBER_LAG);
        let pen =
            Pen::new(connections, identity.id, Arc::clone(&reserve), subscribers.clone(), folder.clone())
                .map_err(|e| unread("read where the journal ends", &e))?;
        let pen = Arc::new(Mutex::new(pen));
        let writer = Writer::new(queue, Arc::clone(&pen));
        let writing = Some(Writing::start(commands, reserve, lock, move || writer.run())?);
        let (readers, line) = (Readers::beside_writer(folder), AtomicUsize::new(0));
        Ok(Self { inner: Arc::new(Inner { identity, readers, subscribers, pen: Some(pen), writing, line }) })
    }

    /// Opens the store in a folder for reading: also while a daemon writes it, after it died, and on a full disk. Takes no
    /// lock and changes nothing. Every change is refused. Blocks.
    ///
    /// # Errors
    /// [`StoreError::TooNew`], [`StoreError::Damaged`], or [`StoreError::Io`] when there is none or it cannot be read.
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let (readers, identity) = Readers::alone(&files::absolute(path.as_ref())?)?;
        let subscribers = broadcast::Sender::new(1);
        Ok(Self {
            inner: Arc::new(Inner {
                identity,
                readers,
                subscribers,
                pen: None,
                writing: None,
                line: AtomicUsize::new(0),
            }),
        })
    }

    /// The pen, if nobody else writes or waits, and this thread may be held up. Who came past those in line would hold up a
    /// whole group for one append.
    fn free_pen(&self) -> Option<MutexGuard<'_, Pen>> {
        let runtime = Handle::try_current().ok()?;
        let pen = self.inner.pen.as_ref()?;
        let may = runtime.runtime_flavor() == RuntimeFlavor::MultiThread
            && self.inner.line.load(Ordering::Relaxed) == 0;
        if may { pen.try_lock().ok() } else { None }
    }

    async fn ask<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || inner.readers.read(query))
            .await
            .map_err(|e| StoreError::Io(format!("reading was cut off: {e}")))?
    }
}

/// The two connections that write. Opening may need some room (the index of the log is built anew after a crash), and on a
/// full disk what was kept back for it is given up.
fn writers(folder: &Path, kept: &[&ReserveFile]) -> rusqlite::Result<(Connection, Connection)> {
    // Beforehand: without the room there may be no error to be told.
    let mut next = kept.iter();
    while layout::lacks_room_for_index(folder) {
        let Some(reserve) = next.next() else { return Err(connect::no_room()) };
        reserve.release();
    }
    let open = || {
        let durable = connect::writer(folder, true)?;
        // Opens the log and its index, and tells whether they can be written to.
        durable.execute_batch("BEGIN IMMEDIATE; ROLLBACK")?;
        Ok((durable, connect::writer(folder, false)?))
    };
    let mut outcome = open();
    for reserve in kept {
        let full = |error| matches!(kind(error), Kind::Full | Kind::Index | Kind::Write);
        if outcome.as_ref().is_err_and(full) && reserve.release() {
            outcome = open();
        }
    }
    outcome
}

#[async_trait]
impl EventStore for SqliteStore {
    fn id(&self) -> Uuid {
        self.inner.identity.id
    }

    /// As the trait says. The append is written or queued on the first poll; one whose future is dropped after that takes
    /// place all the same.
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let (writing, prepared) = (Writing::of(&self.inner.writing)?, Prepared::new(append)?);
        if let Some(mut pen) = self.free_pen() {
            let answer = tokio::task::block_in_place(|| pen.append(prepared));
            if pen.is_due() || (pen.is_untidy() && !pen.watched) {
                writing.tidy();
            }
            return answer;
        }
        let _place = InLine::of(&self.inner.line);
        writing.append(prepared).await
    }

    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        let stream = stream.clone();
        self.ask(move |db| queries::read(db, &stream, from, limit)).await
    }

    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError> {
        let stream = stream.clone();
        self.ask(move |db| queries::last(db, &stream)).await
    }

    async fn streams(&self) -> Result<Vec<StreamId>, StoreError> {
        self.ask(queries::streams).await
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        let filter = filter.clone();
        self.ask(move |db| queries::jobs(db, &filter)).await
    }

    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError> {
        self.ask(move |db| queries::job(db, &StreamId::job(job))).await
    }

    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError> {
        let key = key.to_owned();
        self.ask(move |db| queries::key(db, &key)).await
    }

    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        let (row, value) = (row.to_owned(), value.clone());
        Writing::change_rows(&self.inner.writing, RowChange::Put { job: job.uuid(), row, value }).await
    }

    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        self.ask(move |db| queries::rows(db, job.uuid())).await
    }

    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
        Writing::change_rows(&self.inner.writing, RowChange::Clear { job: job.uuid() }).await
    }

    fn subscribe(&self) -> broadcast::Receiver<Record> {
        self.inner.subscribers.subscribe()
    }

    async fn reserve(&self) -> Result<Reserve, StoreError> {
        Writing::reserve(&self.inner.writing).await
    }
}

#[async_trait]
impl Store for SqliteStore {
    fn engine(&self) -> EngineName {
        EngineName::Sqlite
    }

    fn created(&self) -> Timestamp {
        self.inner.identity.created
    }

    async fn history(&self, after: u64, limit: usize) -> Result<Vec<Placed>, StoreError> {
        self.ask(move |db| queries::history(db, after, limit)).await
    }

    async fn commits(&self, after: u64, limit: usize) -> Result<Vec<Commit>, StoreError> {
        self.ask(move |db| queries::commits(db, after, limit)).await
    }

    async fn head(&self) -> Result<Option<Commit>, StoreError> {
        self.ask(queries::head).await
    }

    async fn bury(&self, burial: Burial) -> Result<Appended, AppendError> {
        let (writing, prepared) = (Writing::of(&self.inner.writing)?, Prepared::burial(burial)?);
        writing.append(prepared).await
    }

    async fn adopt(&self, adoption: Adoption) -> Result<(), AppendError> {
        Writing::of(&self.inner.writing)?.adopt(adoption).await
    }

    async fn keys(&self) -> Result<Vec<(String, StreamId)>, StoreError> {
        self.ask(queries::keys).await
    }

    async fn inspect(&self) -> Result<Vec<String>, StoreError> {
        self.ask(queries::inspect).await
    }
}

//! The engine for production: one SQLite database per store, in WAL mode with `synchronous = FULL`.
//!
//! - One thread writes and commits in groups ([`writer`]); each group costs one fsync.
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
mod queries;
mod writer;

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use async_trait::async_trait;
use jiff::Timestamp;
use rusqlite::{Connection, ErrorCode};
use serde_json::Value;
use tokio::sync::{broadcast, oneshot};
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
use self::writer::{Command, Pending, RowChange, Writer};
use crate::chain::{Commit, Placed};
use crate::config::{EngineName, Options};
use crate::lock::Lock;
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
    writing: Option<Writing>,
}

struct Writing {
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<()>,
    reserve: Arc<ReserveFile>,
    lock: Lock,
}

impl Writing {
    /// Has the writer do something, and waits for its answer.
    async fn order<T>(
        &self,
        command: Command,
        answer: oneshot::Receiver<Result<T, AppendError>>,
    ) -> Result<T, AppendError> {
        if self.commands.send(command).is_err() {
            return Err(AppendError::Fatal("the store's writer has ended".to_owned()));
        }
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(AppendError::Unknown("the store's writer ended in the middle".to_owned())),
        }
    }
}

impl Drop for Inner {
    /// Closes in this order: readers, writer (which is then the last connection and tidies the log away), lock.
    fn drop(&mut self) {
        self.readers.close();
        if let Some(Writing { commands, thread, reserve: _, lock }) = self.writing.take() {
            drop(commands);
            if thread.join().is_err() {
                tracing::error!("the store's writer panicked");
            }
            drop(lock);
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
        let identity = connect::inspect(folder)?;
        let reserve = Arc::new(ReserveFile::open(folder, options.reserve));
        layout::write_log_ahead(folder);
        let connections = writers(folder, &reserve).map_err(|error| match error {
            // A reader that maps the log's index read-only does so for its whole process.
            e if e.sqlite_error_code() == Some(ErrorCode::ReadOnly) => StoreError::InUse {
                path: folder.display().to_string(),
                holder: "this process, for reading only".to_owned(),
            },
            e => unread(&format!("open {} for writing", database.display()), &e),
        })?;
        let (commands, queue) = mpsc::channel();
        let subscribers = broadcast::Sender::new(SUBSCRIBER_LAG);
        let writer = Writer::new(
            queue,
            connections,
            identity.id,
            Arc::clone(&reserve),
            subscribers.clone(),
            folder.clone(),
        )
        .map_err(|e| unread("read where the journal ends", &e))?;
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|e| StoreError::Io(format!("could not start the store's writer: {e}")))?;
        let writing = Some(Writing { commands, thread, reserve, lock });
        let readers = Readers::beside_writer(folder);
        Ok(Self { inner: Arc::new(Inner { identity, readers, subscribers, writing }) })
    }

    /// Opens the store in a folder for reading: also while a daemon writes it, after it died, and on a full disk. Takes no
    /// lock and changes nothing. Every change is refused. Blocks.
    ///
    /// # Errors
    /// [`StoreError::TooNew`], [`StoreError::Damaged`], or [`StoreError::Io`] when there is none or it cannot be read.
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let (readers, identity) = Readers::alone(&files::absolute(path.as_ref())?)?;
        let subscribers = broadcast::Sender::new(1);
        Ok(Self { inner: Arc::new(Inner { identity, readers, subscribers, writing: None }) })
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

    fn writing(&self) -> Result<&Writing, AppendError> {
        let refused = || AppendError::Rejected("the store is open for reading only".to_owned());
        self.inner.writing.as_ref().ok_or_else(refused)
    }

    async fn change_rows(&self, change: RowChange) -> Result<(), StoreError> {
        let Some(writing) = &self.inner.writing else {
            return Err(StoreError::Io("the store is open for reading only".to_owned()));
        };
        let gone = || StoreError::Io("the store's writer has ended".to_owned());
        let (reply, answer) = oneshot::channel();
        writing.commands.send(Command::Row { change, reply }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// The two connections that write. Opening may need some room (the index of the log is built anew after a crash), and on a
/// full disk that is what the reserve is for.
fn writers(folder: &Path, reserve: &ReserveFile) -> rusqlite::Result<(Connection, Connection)> {
    let open = || {
        let durable = connect::writer(folder, true)?;
        // Opens the log and its index, and tells whether they can be written to.
        durable.execute_batch("BEGIN IMMEDIATE; ROLLBACK")?;
        Ok((durable, connect::writer(folder, false)?))
    };
    match open() {
        Err(error) if matches!(kind(&error), Kind::Full | Kind::Index | Kind::Write) && reserve.release() => {
            open()
        }
        outcome => outcome,
    }
}

#[async_trait]
impl EventStore for SqliteStore {
    fn id(&self) -> Uuid {
        self.inner.identity.id
    }

    /// As the trait says. The append is queued on the first poll, in that order; one whose future is dropped after that
    /// takes place all the same.
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let (writing, prepared) = (self.writing()?, Prepared::new(append)?);
        let (reply, answer) = oneshot::channel();
        writing.order(Command::Append(Box::new(Pending { prepared, reply })), answer).await
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
        let (row, value) = (row.to_owned(), value.to_string());
        self.change_rows(RowChange::Put { job: job.uuid(), row, value }).await
    }

    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        self.ask(move |db| queries::rows(db, job.uuid())).await
    }

    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
        self.change_rows(RowChange::Clear { job: job.uuid() }).await
    }

    fn subscribe(&self) -> broadcast::Receiver<Record> {
        self.inner.subscribers.subscribe()
    }

    async fn reserve(&self) -> Result<Reserve, StoreError> {
        let Some(writing) = &self.inner.writing else {
            return Err(StoreError::Io("the store is open for reading only".to_owned()));
        };
        let reserve = Arc::clone(&writing.reserve);
        tokio::task::spawn_blocking(move || reserve.look())
            .await
            .map_err(|e| StoreError::Io(format!("looking at the reserve was cut off: {e}")))
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

    async fn bury(&self, burial: Burial) -> Result<Appended, AppendError> {
        let (writing, prepared) = (self.writing()?, Prepared::burial(burial)?);
        let (reply, answer) = oneshot::channel();
        writing.order(Command::Append(Box::new(Pending { prepared, reply })), answer).await
    }

    async fn adopt(&self, adoption: Adoption) -> Result<(), AppendError> {
        let (reply, answer) = oneshot::channel();
        self.writing()?.order(Command::Adopt { adoption: Box::new(adoption), reply }, answer).await
    }

    async fn keys(&self) -> Result<Vec<(String, StreamId)>, StoreError> {
        self.ask(queries::keys).await
    }

    async fn inspect(&self) -> Result<Vec<String>, StoreError> {
        self.ask(queries::inspect).await
    }
}

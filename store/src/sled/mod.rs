//! The second engine: sled 0.34.7, made durable.
//!
//! - sled's own promises are not enough: its flush does not reach the drive's medium, its young files are never fsynced, and
//!   it takes a damaged end for an earlier one. What is done about each stands in [`disk`], [`layout`] and [`head`].
//! - Opening for writing reads the whole journal once, in a private copy ([`copy`]): whatever sled may have lost, in the
//!   middle or at the end, is found before sled has written over anything. That takes about a second per 100 MiB.
//! - One thread writes ([`writer`]); reading waits while a group is being made durable.
//! - How things look in the tree stands in [`codec`].
//!
//! Which engine to take: SQLite appends faster, starts faster, and needs less room and memory. sled is here for those who
//! want a journal without C code under it.

mod codec;
mod copy;
mod disk;
mod errors;
mod head;
mod layout;
mod ledger;
mod queries;
mod writer;

use std::path::Path;
use std::sync::{Arc, mpsc};

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::Value;
use sled::Db;
use tokio::sync::broadcast;
use uuid::Uuid;
use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{
    Append, AppendError, Appended, EventStore, JobFilter, Record, Reserve, StoreError,
};
use vmkeep_workflow::summary::JobSummary;

use self::copy::Copies;
use self::disk::Disk;
use self::head::{Head, HeadFile};
use self::layout::Identity;
use self::ledger::{End, Ledger, Prepared};
use self::writer::{Live, Watch, Writer};
use crate::chain::{Commit, Placed};
use crate::config::{EngineName, Options};
use crate::lock::Lock;
use crate::queue::{self, RowChange};
use crate::reserve::ReserveFile;
use crate::verify::{Problem, verify};
use crate::{Adoption, Burial, SUBSCRIBER_LAG, Store, files};

/// Room for sled's page table while it starts, at least.
const SPARE: u64 = 1 << 20;

/// Whether a folder holds a store of this engine.
pub(crate) fn is_there(folder: &Path) -> bool {
    layout::inner(folder).exists()
}

/// A store in sled.
pub struct SledStore {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    source: Source,
    subscribers: broadcast::Sender<Record>,
    /// Absent in a store that is only read.
    writing: Option<Writing>,
}

/// Where is read from.
enum Source {
    Live(Arc<Live>),
    Copies(Copies),
}

type Writing = queue::Writing<Prepared>;

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(writing) = self.writing.take() {
            writing.close();
        }
    }
}

impl SledStore {
    /// Opens the store in a folder, and makes both when they are not there. Blocks, and reads the whole journal.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when it is open elsewhere, be it in this process; [`StoreError::TooNew`] when a newer release
    /// wrote it; [`StoreError::Damaged`] when anything of it is lost, and then it was not touched; [`StoreError::Io`] with
    /// the reason.
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Self, StoreError> {
        let folder = files::absolute(path.as_ref())?;
        files::make_folder(&folder)?;
        let lock = Lock::take(&folder)?;
        if !is_there(&folder) {
            let (id, created) = (options.id.unwrap_or_else(Uuid::new_v4), options.created);
            layout::create(&folder, id, created.unwrap_or_else(Timestamp::now))?;
        }
        let identity = layout::identify(&folder)?;
        let mut head = HeadFile::open(&layout::inner(&folder), identity.id)?;
        check(&folder)?;

        let reserve = Arc::new(ReserveFile::open(&folder, options.reserve));
        let spare = ReserveFile::named(&folder, "spare", spare(&layout::inner(&folder)));
        head.begin().map_err(|e| files::failed("write the head of", &folder, &e))?;
        let db = writer::open_with_room(&folder, &[&spare, &reserve])?;
        let (mut disk, end) = match settle(&folder, &db, &mut head, identity.id) {
            Ok(settled) => settled,
            Err(error) => {
                match error {
                    // An fsync may have failed: sled is not even closed, that would write and fsync once more.
                    StoreError::Io(_) => std::mem::forget(db),
                    _ => drop(writer::close(Ok(db))),
                }
                return Err(error);
            }
        };
        spare.look();
        // Without it the first group will find out.
        let _ = disk.room_for(0);

        let live = Arc::new(Live::new(db, head.head()));
        let (commands, queue) = mpsc::channel();
        let subscribers = broadcast::Sender::new(SUBSCRIBER_LAG);
        let writer = Writer {
            commands: queue,
            live: Arc::clone(&live),
            head,
            disk,
            ledger: Ledger::new(end),
            reserve: Arc::clone(&reserve),
            subscribers: subscribers.clone(),
            folder,
            store: identity.id,
            watch: Watch::start()?,
        };
        let writing = Some(Writing::start(commands, reserve, lock, move || writer.run())?);
        let source = Source::Live(live);
        Ok(Self { inner: Arc::new(Inner { identity, source, subscribers, writing }) })
    }

    /// Opens the store in a folder for reading: also while a daemon writes it, after it died, and on a full disk. Takes no
    /// lock and changes nothing: it reads private copies in the folder for temporary files, or in memory. Every change is
    /// refused. Blocks.
    ///
    /// # Errors
    /// [`StoreError::TooNew`], [`StoreError::Damaged`], or [`StoreError::Io`] when there is none or it cannot be read.
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let (copies, identity) = Copies::open(&files::absolute(path.as_ref())?)?;
        let (subscribers, source) = (broadcast::Sender::new(1), Source::Copies(copies));
        Ok(Self { inner: Arc::new(Inner { identity, source, subscribers, writing: None }) })
    }

    async fn ask<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Db, &Head) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = Arc::clone(&self.inner);
        let asked = tokio::task::spawn_blocking(move || match &inner.source {
            Source::Live(live) => live.read(query),
            Source::Copies(copies) => copies.read(query),
        });
        asked.await.unwrap_or_else(|e| match e.is_panic() {
            true => Err(StoreError::Damaged("sled panicked over what it read".to_owned())),
            false => Err(StoreError::Io(format!("reading was cut off: {e}"))),
        })
    }
}

/// How much room sled may need to start: its new page table, before the old one is removed.
fn spare(inner: &Path) -> u64 {
    let names = layout::names(inner).unwrap_or_default();
    let table = names.iter().filter(|name| name.starts_with("snap."));
    let size = table.map(|name| std::fs::metadata(inner.join(name)).map_or(0, |meta| meta.len())).max();
    SPARE.max(size.unwrap_or(0).saturating_mul(2).next_power_of_two())
}

/// Makes what sled has opened durable, and the end of the journal.
fn settle(folder: &Path, db: &Db, head: &mut HeadFile, store: Uuid) -> Result<(Disk, End), StoreError> {
    let disk = Disk::open(folder)?;
    if let Some(what) = queries::short_of(db, &head.head())? {
        return Err(StoreError::Damaged(what));
    }
    // What was durable but never acknowledged is acknowledged by being shown.
    let end = End::read(db, store)?;
    head.end(end.commit, end.link)
        .and_then(|()| head.sync())
        .map_err(|e| files::failed("write the head of", folder, &e))?;
    Ok((disk, end))
}

/// Reads a whole store through a copy, and refuses it if anything of it is lost.
///
/// A record whose bytes do not fit its hash is not lost: whoever reads it is told, and the rest is of use. Nor is an event
/// that this release does not know.
fn check(folder: &Path) -> Result<(), StoreError> {
    let store = SledStore::open_read_only(folder)?;
    // A thread of its own, for this may be called from within a runtime.
    let checked = std::thread::scope(|scope| {
        let check = || {
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            runtime.map_err(|e| StoreError::Io(e.to_string()))?.block_on(verify(&store))
        };
        scope.spawn(check).join()
    });
    let report =
        checked.unwrap_or_else(|_| Err(StoreError::Damaged("sled panicked over what it read".to_owned())))?;
    let lost = |problem: &Problem| match problem {
        Problem::Chain | Problem::NotUnderstood { .. } | Problem::SummaryStray => false,
        // Other fields may differ after a release that summarises otherwise.
        Problem::SummaryDiffers { fields } => fields.iter().any(|field| field == "seq"),
        _ => true,
    };
    let lost: Vec<String> =
        report.findings.iter().filter(|f| lost(&f.problem)).map(ToString::to_string).collect();
    if lost.is_empty() {
        return Ok(());
    }
    let more = lost.len().saturating_sub(3);
    let shown = lost[..lost.len() - more].join("; ");
    let and_more = if more > 0 { format!("; and {more} more") } else { String::new() };
    Err(StoreError::Damaged(format!("{shown}{and_more}. Nothing was touched")))
}

#[async_trait]
impl EventStore for SledStore {
    fn id(&self) -> Uuid {
        self.inner.identity.id
    }

    /// As the trait says. The append is queued on the first poll, in that order; one whose future is dropped after that
    /// takes place all the same.
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let (writing, prepared) = (Writing::of(&self.inner.writing)?, Prepared::new(append)?);
        writing.append(prepared).await
    }

    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        let stream = stream.clone();
        self.ask(move |db, _| queries::read(db, &stream, from, limit)).await
    }

    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError> {
        let stream = stream.clone();
        self.ask(move |db, _| queries::last(db, &stream)).await
    }

    async fn streams(&self) -> Result<Vec<StreamId>, StoreError> {
        self.ask(|db, _| queries::streams(db)).await
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        let filter = filter.clone();
        self.ask(move |db, _| queries::jobs(db, &filter)).await
    }

    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError> {
        self.ask(move |db, _| queries::job(db, job.uuid())).await
    }

    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError> {
        let key = key.to_owned();
        self.ask(move |db, _| queries::key(db, &key)).await
    }

    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        let (row, value) = (row.to_owned(), value.clone());
        Writing::change_rows(&self.inner.writing, RowChange::Put { job: job.uuid(), row, value }).await
    }

    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        self.ask(move |db, _| queries::rows(db, job.uuid())).await
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
impl Store for SledStore {
    fn engine(&self) -> EngineName {
        EngineName::Sled
    }

    fn created(&self) -> Timestamp {
        self.inner.identity.created
    }

    async fn history(&self, after: u64, limit: usize) -> Result<Vec<Placed>, StoreError> {
        self.ask(move |db, _| queries::history(db, after, limit)).await
    }

    async fn commits(&self, after: u64, limit: usize) -> Result<Vec<Commit>, StoreError> {
        self.ask(move |db, _| queries::commits(db, after, limit)).await
    }

    async fn head(&self) -> Result<Option<Commit>, StoreError> {
        self.ask(|db, _| queries::last_commit(db)).await
    }

    async fn bury(&self, burial: Burial) -> Result<Appended, AppendError> {
        let (writing, prepared) = (Writing::of(&self.inner.writing)?, Prepared::burial(burial)?);
        writing.append(prepared).await
    }

    async fn adopt(&self, adoption: Adoption) -> Result<(), AppendError> {
        Writing::of(&self.inner.writing)?.adopt(adoption).await
    }

    async fn keys(&self) -> Result<Vec<(String, StreamId)>, StoreError> {
        self.ask(|db, _| queries::keys(db)).await
    }

    async fn inspect(&self) -> Result<Vec<String>, StoreError> {
        self.ask(queries::inspect).await
    }
}

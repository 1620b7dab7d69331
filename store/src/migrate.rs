//! Moving a journal from one engine to another, while nobody writes it.
//!
//! 1. The store is locked, and read as whoever only reads does: nothing of it is changed until the end.
//! 2. It is verified. A damaged journal is not moved: what the engine that made it can still tell of it would be lost.
//! 3. A new store with the same id is filled beside it, in a folder that says that it is unfinished, commit by commit as they
//!    were sealed ([`crate::adoption`]).
//! 4. The new store is closed, fsynced, opened again, verified, and compared with the old one: each record's place, commit,
//!    hash and bytes, each commit, key, summary and row. So both have the same head.
//! 5. The two folders are *exchanged*, which is one act: whenever the power goes, the store's folder holds the one or the
//!    other. The old store then gets a name that says what it is. It is never removed.
//!
//! Interrupted before the exchange, nothing has happened and what is unfinished is removed by the next attempt; after it, the
//! next attempt gives the old store its name.
//!
//! Rejected: two renames. Between them there is no store, and a daemon that is started then begins an empty one.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::Serialize;
use uuid::Uuid;
use vmkeep_workflow::ids::StreamId;
use vmkeep_workflow::journal::{AppendError, JobFilter, StoreError};

use crate::chain::{Commit, Placed};
use crate::config::{self, EngineName, Options, StoreConfig};
use crate::files::{self, failed};
use crate::lock::Lock;
use crate::sled::SledStore;
use crate::sqlite::SqliteStore;
use crate::verify::{Report, verify};
use crate::{Adoption, Store};

/// So many records are moved at a time.
const PAGE: usize = 256;

/// The file that says that a store is being filled.
const UNFINISHED: &str = "unfinished";

/// What was moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Migrated {
    /// The store.
    pub store: Uuid,
    /// The engine that kept it.
    pub from: EngineName,
    /// The engine that keeps it now.
    pub to: EngineName,
    /// How many records it has.
    pub records: u64,
    /// How many streams.
    pub streams: u64,
    /// How many commits.
    pub commits: u64,
    /// The link of the last commit, the same before and after, in hexadecimal digits.
    pub link: String,
    /// Where the old store is kept; nothing after a rehearsal.
    pub kept: Option<PathBuf>,
}

/// Why a journal was not moved. The store is what it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// There is no store, or it cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// That engine keeps it already.
    #[error("{path} is kept in {engine} already")]
    Already {
        /// The store's folder.
        path: String,
        /// The engine.
        engine: EngineName,
    },
    /// That engine keeps nothing.
    #[error("the engine {0} keeps nothing")]
    KeepsNothing(EngineName),
    /// The store, or the new one, is not whole.
    #[error("{what} is not whole: {findings}")]
    NotWhole {
        /// Which of them.
        what: String,
        /// What is wrong with it.
        findings: String,
    },
    /// The new store did not take a part of it, for want of room perhaps.
    #[error("the new store in {path} cannot be filled: {error}")]
    Fill {
        /// The new store's folder.
        path: String,
        /// Why.
        error: AppendError,
    },
    /// The new store is not the same as the old one.
    #[error("the new store differs from the old one: {0}")]
    Differs(String),
    /// The file system cannot exchange two folders in one act.
    #[error("the file system of {0} cannot exchange two folders in one act")]
    NoExchange(String),
}

/// Moves the store in a folder to another engine. With `rehearse` everything is done but the exchange. Blocks while it
/// reads and writes.
///
/// # Errors
/// See [`MigrateError`].
pub async fn migrate(config: &StoreConfig, to: EngineName, rehearse: bool) -> Result<Migrated, MigrateError> {
    if to == EngineName::Memory {
        return Err(MigrateError::KeepsNothing(to));
    }
    let folder = files::absolute(&config.path)?;
    let Some(from) = config::engine_of(&folder)? else {
        return Err(StoreError::Io(format!("there is no store in {}", folder.display())).into());
    };
    let _lock = Lock::take(&folder)?;
    let aside = Aside::of(&folder)?;
    aside.clear()?;
    if from == to {
        return Err(MigrateError::Already { path: folder.display().to_string(), engine: to });
    }
    let old = config::open_read_only(&StoreConfig { engine: from, ..config.clone() })?;
    let report = whole(&*old, "the store").await?;
    aside.begin()?;
    let moved = fill(&*old, &aside.folder, to, config.reserve).await;
    let moved = match moved {
        Ok(()) => compare(&*old, &aside.folder, to).await,
        Err(error) => Err(error),
    };
    let mut migrated = Migrated {
        store: old.id(),
        from,
        to,
        records: report.records,
        streams: report.streams,
        commits: report.commits,
        link: report.link,
        kept: None,
    };
    drop(old);
    if rehearse || moved.is_err() {
        aside.clear()?;
        return moved.map(|()| migrated);
    }
    aside.finish()?;
    aside.exchange(&folder)?;
    migrated.kept = Some(aside.name(from)?);
    Ok(migrated)
}

/// The folder beside the store.
struct Aside {
    folder: PathBuf,
    parent: PathBuf,
    name: String,
}

impl Aside {
    fn of(store: &Path) -> Result<Self, StoreError> {
        let (Some(parent), Some(name)) = (store.parent(), store.file_name()) else {
            return Err(StoreError::Io(format!("{} has no folder above it", store.display())));
        };
        let name = name.to_string_lossy().into_owned();
        Ok(Self { folder: parent.join(format!("{name}.migrating")), parent: parent.to_path_buf(), name })
    }

    /// Removes what an interrupted attempt left unfinished. Anything else that is there is a store, the old one perhaps,
    /// and gets a name under which it stays.
    fn clear(&self) -> Result<(), StoreError> {
        if !self.folder.exists() {
            return Ok(());
        }
        if self.folder.join(UNFINISHED).exists() {
            // The mark goes last: what is removed in part is still unfinished.
            for entry in std::fs::read_dir(&self.folder).map_err(|e| failed("read", &self.folder, &e))? {
                let path = entry.map_err(|e| failed("read", &self.folder, &e))?.path();
                let removed = match path.file_name() {
                    Some(name) if name == UNFINISHED => Ok(()),
                    _ if path.is_dir() => std::fs::remove_dir_all(&path),
                    _ => std::fs::remove_file(&path),
                };
                removed.map_err(|e| failed("remove", &path, &e))?;
            }
            return std::fs::remove_dir_all(&self.folder).map_err(|e| failed("remove", &self.folder, &e));
        }
        match config::engine_of(&self.folder)? {
            Some(engine) => self.name(engine).map(drop),
            None => std::fs::remove_dir_all(&self.folder).map_err(|e| failed("remove", &self.folder, &e)),
        }
    }

    fn begin(&self) -> Result<(), StoreError> {
        files::make_folder(&self.folder)?;
        let mark = self.folder.join(UNFINISHED);
        files::make_file(&mark)
            .and_then(|file| file.sync_all())
            .and_then(|()| files::sync_folder(&self.folder))
            .map_err(|e| failed("make", &mark, &e))
    }

    /// Makes everything durable, then says that it is finished.
    fn finish(&self) -> Result<(), StoreError> {
        let mark = self.folder.join(UNFINISHED);
        sync_below(&self.folder)
            .and_then(|()| files::remove(&mark))
            .and_then(|()| files::sync_folder(&self.folder))
            .map_err(|e| failed("fsync", &self.folder, &e))
    }

    fn exchange(&self, store: &Path) -> Result<(), MigrateError> {
        match renameat_with(CWD, &self.folder, CWD, store, RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
                return Err(MigrateError::NoExchange(self.parent.display().to_string()));
            }
            Err(e) => return Err(failed("exchange", store, &e.into()).into()),
        }
        files::sync_folder(&self.parent).map_err(|e| failed("fsync", &self.parent, &e))?;
        Ok(())
    }

    /// Gives the old store a name that says what it is.
    fn name(&self, engine: EngineName) -> Result<PathBuf, StoreError> {
        let at = Timestamp::now().strftime("%Y%m%dT%H%M%S%3fZ");
        let kept = self.parent.join(format!("{}.{engine}-{at}", self.name));
        std::fs::rename(&self.folder, &kept)
            .and_then(|()| files::sync_folder(&self.parent))
            .map_err(|e| failed("rename", &self.folder, &e))?;
        Ok(kept)
    }
}

fn sync_below(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_below(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    files::sync_folder(folder)
}

async fn whole(store: &dyn Store, what: &str) -> Result<Report, MigrateError> {
    let report = verify(store).await?;
    if report.is_whole() {
        return Ok(report);
    }
    let shown: Vec<String> = report.findings.iter().take(5).map(ToString::to_string).collect();
    Err(MigrateError::NotWhole { what: what.to_owned(), findings: shown.join("; ") })
}

fn open(engine: EngineName, folder: &Path, options: Options) -> Result<Arc<dyn Store>, StoreError> {
    Ok(match engine {
        EngineName::Sled => Arc::new(SledStore::open(folder, options)?),
        _ => Arc::new(SqliteStore::open(folder, options)?),
    })
}

/// Fills a new store with what an old one holds.
async fn fill(old: &dyn Store, folder: &Path, to: EngineName, reserve: u64) -> Result<(), MigrateError> {
    let options = Options { reserve, id: Some(old.id()), created: Some(old.created()) };
    let new = open(to, folder, options)?;
    let refused = |error| MigrateError::Fill { path: folder.display().to_string(), error };
    let mut commits = Commits { store: old, after: 0, ahead: Vec::new().into_iter() };
    let (mut position, mut open) = (0, Adoption::default());
    loop {
        let page = old.history(position, PAGE).await?;
        let at_end = page.is_empty();
        for placed in page {
            position = placed.position;
            // A commit is moved as a whole, when the first record of the next one is seen.
            if open.records.last().is_some_and(|last| last.commit < placed.commit)
                && open.records.len() >= PAGE
            {
                hand_over(&*new, &mut commits, &mut open).await?.map_err(refused)?;
            }
            open.records.push(placed);
        }
        if at_end {
            open.jobs = old.jobs(&JobFilter::default()).await?;
            open.keys = old.keys().await?;
            let jobs: Vec<_> = open.jobs.iter().map(|summary| summary.job).collect();
            hand_over(&*new, &mut commits, &mut open).await?.map_err(refused)?;
            for job in jobs {
                for (name, value) in old.rows(job).await? {
                    new.put_row(job, &name, &value).await?;
                }
            }
            return Ok(());
        }
    }
}

async fn hand_over(
    new: &dyn Store,
    commits: &mut Commits<'_>,
    open: &mut Adoption,
) -> Result<Result<(), AppendError>, StoreError> {
    let mut adoption = std::mem::take(open);
    if let Some(last) = adoption.records.last() {
        adoption.commits = commits.up_to(last.commit).await?;
    }
    Ok(new.adopt(adoption).await)
}

/// The commits of a store, in order.
struct Commits<'a> {
    store: &'a dyn Store,
    after: u64,
    ahead: std::vec::IntoIter<Commit>,
}

impl Commits<'_> {
    async fn up_to(&mut self, number: u64) -> Result<Vec<Commit>, StoreError> {
        let mut found = Vec::new();
        while self.after < number {
            let commit = match self.ahead.next() {
                Some(commit) => commit,
                None => {
                    self.ahead = self.store.commits(self.after, PAGE).await?.into_iter();
                    self.ahead.next().ok_or_else(|| {
                        StoreError::Damaged(format!("commit {}: it is missing", self.after + 1))
                    })?
                }
            };
            self.after = commit.number;
            found.push(commit);
        }
        Ok(found)
    }
}

/// Opens the new store as anybody will, verifies it, and compares it with the old one.
async fn compare(old: &dyn Store, folder: &Path, to: EngineName) -> Result<(), MigrateError> {
    let new = config::open_read_only(&StoreConfig { engine: to, ..StoreConfig::new(folder) })?;
    whole(&*new, "the new store").await?;
    let differs = |what: &str| Err(MigrateError::Differs(what.to_owned()));
    if (old.id(), old.created()) != (new.id(), new.created()) {
        return differs("its identity");
    }
    // Pages may end at different places: the records are compared one by one.
    let (mut ours, mut theirs) = (Records::of(old), Records::of(&*new));
    loop {
        let (one, other) = (ours.next().await?, theirs.next().await?);
        if one != other {
            let place = one.or(other).map_or(0, |placed| placed.position);
            return differs(&format!("the record at position {place}"));
        }
        if one.is_none() {
            break;
        }
    }
    let mut after = 0;
    loop {
        let (one, other) = (old.commits(after, PAGE).await?, new.commits(after, PAGE).await?);
        if one != other {
            return differs(&format!("the commits after {after}"));
        }
        let Some(last) = one.last() else { break };
        after = last.number;
    }
    let (mut one, mut other): (Vec<(String, StreamId)>, _) = (old.keys().await?, new.keys().await?);
    one.sort();
    other.sort();
    if one != other {
        return differs("the keys");
    }
    let jobs = old.jobs(&JobFilter::default()).await?;
    if jobs != new.jobs(&JobFilter::default()).await? {
        return differs("the summaries of the jobs");
    }
    for summary in jobs {
        if old.rows(summary.job).await? != new.rows(summary.job).await? {
            return differs(&format!("the rows of {}", summary.job));
        }
    }
    Ok(())
}

/// The records of a store, in order.
struct Records<'a> {
    store: &'a dyn Store,
    position: u64,
    ahead: std::vec::IntoIter<Placed>,
}

impl<'a> Records<'a> {
    fn of(store: &'a dyn Store) -> Self {
        Self { store, position: 0, ahead: Vec::new().into_iter() }
    }

    async fn next(&mut self) -> Result<Option<Placed>, StoreError> {
        if self.ahead.len() == 0 {
            self.ahead = self.store.history(self.position, PAGE).await?.into_iter();
        }
        let next = self.ahead.next();
        if let Some(placed) = &next {
            self.position = placed.position;
        }
        Ok(next)
    }
}

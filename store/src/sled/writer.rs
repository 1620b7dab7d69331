//! The one thread that writes.
//!
//! Appends queue up while the previous group is being made durable; whatever waits then becomes the next group: one batch
//! of sled's, one fsync of its file, one of the head. Subscribers and callers hear of it after that, subscribers first.
//!
//! **Nobody sees what is not durable.** sled shows a batch to everybody as soon as it is applied. So readers are kept out
//! from before that until after the fsyncs.
//!
//! **When sled fails** it fails for good: every later call gives the same error, and what it shows need not be on disk. If
//! an fsync of ours finds then that a write-back failed, nothing is known any more and the process must end. Otherwise
//! sled is closed and opened anew, which reads what is on disk: the group is there as a whole, or not at all, and that is
//! the answer.
//!
//! **A watch.** A thread of sled's own that fails to write does not always wake up the one that waits for it. Any other
//! flush does, so one is asked for when a group takes long.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sled::{Batch, Db};
use tokio::sync::broadcast;
use uuid::Uuid;
use vmkeep_workflow::journal::{AppendError, Record, StoreError};

use super::disk::Disk;
use super::errors::is_full;
use super::head::{Head, HeadFile};
use super::ledger::{self, Draft, End, Ledger, Prepared, Ready};
use super::{layout, queries};
use crate::queue::{self, Outcome, RowReply};
use crate::reserve::ReserveFile;
use crate::{Adoption, files};

/// A group that takes longer is looked after.
const LONG: Duration = Duration::from_secs(2);
/// How long sled may take to let go of its files once it is closed.
const LET_GO: Duration = Duration::from_secs(30);

type Command = queue::Command<Prepared>;
type Pending = queue::Pending<Prepared>;

/// What readers and the writer share: sled, as long as it can be trusted, and where the journal ends.
pub(super) struct Live(RwLock<State>);

struct State {
    db: Result<Db, String>,
    head: Head,
}

impl Live {
    pub(super) fn new(db: Db, head: Head) -> Self {
        Self(RwLock::new(State { db: Ok(db), head }))
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads. Blocks, also while a group is being made durable.
    pub(super) fn read<T>(
        &self,
        query: impl FnOnce(&Db, &Head) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let state = self.state();
        match &state.db {
            Ok(db) => query(db, &state.head),
            Err(why) => Err(StoreError::Io(format!("the store failed before: {why}"))),
        }
    }
}

/// The writer; lives on its own thread.
pub(super) struct Writer {
    pub(super) commands: Receiver<Command>,
    pub(super) live: Arc<Live>,
    pub(super) head: HeadFile,
    pub(super) disk: Disk,
    pub(super) ledger: Ledger,
    pub(super) reserve: Arc<ReserveFile>,
    pub(super) subscribers: broadcast::Sender<Record>,
    pub(super) folder: PathBuf,
    pub(super) store: Uuid,
    pub(super) watch: Watch,
}

/// Why a group was not written.
enum Failure {
    /// Nothing was written.
    Nothing { full: bool, why: String },
    /// Nothing is known any more.
    Fatal(String),
}

impl Failure {
    fn answer(self) -> AppendError {
        match self {
            Self::Nothing { full: true, why } => AppendError::Full(why),
            Self::Nothing { full: false, why } => AppendError::Rejected(why),
            Self::Fatal(why) => AppendError::Fatal(why),
        }
    }
}

impl Writer {
    /// Works until the last sender is gone, then closes sled.
    pub(super) fn run(mut self) {
        let mut left = None;
        while let Some(command) = left.take().or_else(|| self.commands.recv().ok()) {
            if let Command::Adopt { adoption, reply } = command {
                let _ = reply.send(self.adopt(&adoption));
                continue;
            }
            let (group, rows);
            (group, rows, left) = queue::gather(&self.commands, command);
            if !group.is_empty() {
                self.settle(group);
            }
            if !rows.is_empty() {
                self.change_rows(rows);
            }
        }
        self.close();
    }

    /// Takes in commits of another store.
    fn adopt(&mut self, adoption: &Adoption) -> Result<(), AppendError> {
        if let Some(why) = self.failed() {
            return Err(AppendError::Fatal(why));
        }
        let ready = ledger::adopt(&self.ledger, adoption)?;
        self.write(ready).map_err(Failure::answer)
    }

    /// Writes a group and answers it.
    fn settle(&mut self, group: Vec<Pending>) {
        let drafted = self.live.read(|db, _| {
            let mut draft = Draft::new(db, &self.ledger);
            let outcomes: Vec<Outcome> =
                group.iter().map(|pending| draft.append(&pending.prepared)).collect::<Result<_, _>>()?;
            Ok((outcomes, draft.seal()))
        });
        let (outcomes, ready) = match drafted {
            Ok(drafted) => drafted,
            Err(error) => {
                let error = match self.failed() {
                    Some(why) => AppendError::Fatal(why),
                    None => AppendError::Rejected(error.to_string()),
                };
                return queue::refuse(group, &error);
            }
        };
        let Some(ready) = ready else { return queue::deliver(&self.subscribers, group, outcomes) };
        match self.write(ready) {
            Ok(()) => queue::deliver(&self.subscribers, group, outcomes),
            // Each may still fit by itself.
            Err(Failure::Nothing { full: true, .. }) if group.len() > 1 => {
                for pending in group {
                    self.settle(vec![pending]);
                }
            }
            Err(failure) => {
                let error = failure.answer();
                tracing::error!(%error, "the store could not append");
                queue::refuse(group, &error);
            }
        }
    }

    fn failed(&self) -> Option<String> {
        self.live.state().db.as_ref().err().cloned()
    }

    /// Makes sure of the room, giving up the reserve if need be.
    fn room(&mut self, weight: u64) -> Result<(), Failure> {
        let mut outcome = self.disk.room_for(weight);
        if outcome.as_ref().is_err_and(files::is_lack_of_room) && self.reserve.release() {
            outcome = self.disk.room_for(weight);
        }
        outcome.map_err(|e| Failure::Nothing { full: files::is_lack_of_room(&e), why: e.to_string() })
    }

    fn write(&mut self, ready: Ready) -> Result<(), Failure> {
        let Ready { changes, end, fresh } = ready;
        self.room(changes.weight())?;
        let live = Arc::clone(&self.live);
        let mut state = live.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = self.head.begin() {
            return Err(Failure::Nothing { full: files::is_lack_of_room(&e), why: e.to_string() });
        }
        match self.watch.over(&state, changes.into_batch(), true) {
            Ok(()) => {
                self.disk.sync().map_err(|e| fatal(&mut state, "an fsync failed", &e))?;
                self.note(&mut state, end)?;
            }
            Err(error) => self.reopen(&mut state, &error, end)?,
        }
        self.ledger.accept(end, fresh);
        Ok(())
    }

    /// Notes durably where the journal ends.
    fn note(&mut self, state: &mut State, end: End) -> Result<(), Failure> {
        let noted = self.head.end(end.commit, end.link).and_then(|()| self.head.sync());
        noted.map_err(|e| fatal(state, "the head could not be written", &e))?;
        state.head = self.head.head();
        Ok(())
    }

    /// Opens sled anew after it failed, and sees what there is. `Ok` if it is the wanted end.
    fn reopen(&mut self, state: &mut State, error: &sled::Error, wanted: End) -> Result<(), Failure> {
        tracing::error!(%error, "sled failed and is opened anew");
        self.disk.is_sound().map_err(|e| fatal(state, "an fsync failed", &e))?;
        close(std::mem::replace(&mut state.db, Err("it is being opened anew".to_owned())))
            .map_err(|e| Failure::Fatal(format!("{error}; then: {e}")))?;
        released(&self.folder);
        let opened = open_with_room(&self.folder, &[&self.reserve]).and_then(|db| {
            let disk = Disk::open(&self.folder)?;
            let end = End::read(&db, self.store)?;
            Ok((db, disk, end))
        });
        let (db, disk, end) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                state.db = Err(e.to_string());
                return Err(Failure::Fatal(format!("{error}; then: {e}")));
            }
        };
        (state.db, self.disk) = (Ok(db), disk);
        let before = self.ledger.end;
        self.ledger = Ledger::new(end);
        if end == wanted {
            return self.note(state, end);
        }
        if end != before {
            return Err(fatal(state, "it holds neither what it held nor what was written", error));
        }
        self.note(state, end)?;
        let full = is_full(error) || files::lacks_room(&self.folder);
        Err(Failure::Nothing { full, why: error.to_string() })
    }

    /// Changes rows. They need not survive a power cut, and must not spend the reserve.
    fn change_rows(&mut self, wanted: Vec<RowReply>) {
        let outcome = self.write_rows(&wanted);
        for (_, reply) in wanted {
            let _ = reply.send(outcome.clone());
        }
    }

    fn write_rows(&mut self, wanted: &[RowReply]) -> Result<(), StoreError> {
        let unwritten = |why: String| StoreError::Io(format!("could not write progress: {why}"));
        let changes = self.live.read(|db, _| ledger::rows(db, wanted.iter().map(|(change, _)| change)))?;
        self.disk.room_for(changes.weight()).map_err(|e| unwritten(e.to_string()))?;
        let live = Arc::clone(&self.live);
        let mut state = live.0.write().unwrap_or_else(PoisonError::into_inner);
        self.head.begin().map_err(|e| unwritten(e.to_string()))?;
        let end = self.ledger.end;
        match self.watch.over(&state, changes.into_batch(), false) {
            Ok(()) => self.head.end(end.commit, end.link).map_err(|e| unwritten(e.to_string())),
            Err(error) => match self.reopen(&mut state, &error, end) {
                // The journal is as it was; the rows are gone.
                Ok(()) => Err(unwritten(error.to_string())),
                Err(failure) => Err(unwritten(failure.answer().to_string())),
            },
        }
    }

    fn close(&mut self) {
        let mut state = self.live.0.write().unwrap_or_else(PoisonError::into_inner);
        if state.db.is_err() {
            return;
        }
        let end = self.ledger.end;
        let begun = self.head.begin();
        if close(std::mem::replace(&mut state.db, Err("it is closed".to_owned()))).is_err() {
            // The head says so: it names a change that is not over.
            return;
        }
        if let Err(error) = begun.and_then(|()| self.head.end(end.commit, end.link)) {
            tracing::warn!(%error, "the store's head could not be written");
        }
    }
}

/// Ends all use of sled. It is not even closed: that would write and fsync once more.
fn fatal(state: &mut State, what: &str, error: &dyn std::fmt::Display) -> Failure {
    let why = format!("{what}: {error}");
    tracing::error!(why, "the store failed; the process must end");
    if let Ok(db) = std::mem::replace(&mut state.db, Err(why.clone())) {
        std::mem::forget(db);
    }
    Failure::Fatal(why)
}

/// Closes sled. What it then fails to do it panics over.
pub(super) fn close(db: Result<Db, String>) -> Result<(), StoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(db))).map_err(|_| {
        tracing::error!("sled could not be closed in order");
        StoreError::Io("sled could not be closed in order: writing what it held failed".to_owned())
    })
}

/// Waits until sled has let go of its files. A thread of its own that was writing when it failed may hold them, and their
/// lock, a little longer than sled itself. If it does not end, opening fails and says so.
fn released(folder: &std::path::Path) {
    let Ok(file) = std::fs::File::open(layout::inner(folder).join("db")) else { return };
    let began = Instant::now();
    while flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
        if began.elapsed() > LET_GO {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Opens sled for writing. That takes some room: on a full disk what was kept back for it is given up.
pub(super) fn open_with_room(folder: &std::path::Path, kept: &[&ReserveFile]) -> Result<Db, StoreError> {
    let inner = layout::inner(folder);
    let mut outcome = layout::open_db(&inner);
    for reserve in kept {
        if matches!(outcome, Err(StoreError::Io(_))) && files::lacks_room(folder) && reserve.release() {
            outcome = layout::open_db(&inner);
        }
    }
    let db = outcome?;
    // Nobody has read it yet: what cannot be read at all shows here.
    queries::last_commit(&db)?;
    Ok(db)
}

/// The thread that looks after a group that takes long.
pub(super) struct Watch(Arc<(Mutex<Watched>, Condvar)>);

#[derive(Default)]
struct Watched {
    /// What is being written to.
    db: Option<Db>,
    /// How many groups there were.
    group: u64,
    ended: bool,
}

impl Watch {
    pub(super) fn start() -> Result<Self, StoreError> {
        let shared = Arc::new((Mutex::new(Watched::default()), Condvar::new()));
        let watch = Self(Arc::clone(&shared));
        std::thread::Builder::new()
            .name("store-watch".to_owned())
            .spawn(move || look_after(&shared))
            .map_err(|e| StoreError::Io(format!("could not start the store's watch: {e}")))?;
        Ok(watch)
    }

    fn change(&self, change: impl FnOnce(&mut Watched)) {
        change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
    }

    /// Applies a batch, and flushes it if that is wanted. The watch has let go of sled when this returns.
    fn over(&self, state: &State, batch: Batch, flush: bool) -> Result<(), sled::Error> {
        let Ok(db) = &state.db else {
            return Err(sled::Error::Unsupported("the store failed before".to_owned()));
        };
        self.change(|watched| (watched.db, watched.group) = (Some(db.clone()), watched.group + 1));
        let outcome = db.apply_batch(batch).and_then(|()| if flush { db.flush().map(drop) } else { Ok(()) });
        self.change(|watched| watched.db = None);
        outcome
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.change(|watched| watched.ended = true);
    }
}

fn look_after((watched, changed): &(Mutex<Watched>, Condvar)) {
    let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
    while !watched.ended {
        if watched.db.is_none() {
            watched = changed.wait(watched).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let group = watched.group;
        let (now, timeout) = changed.wait_timeout(watched, LONG).unwrap_or_else(PoisonError::into_inner);
        watched = now;
        if let Some(db) = &watched.db
            && timeout.timed_out()
            && watched.group == group
        {
            tracing::warn!("sled takes long to write");
            // Its outcome is the other's to see.
            let _ = db.flush();
        }
    }
}

//! The one thread that writes.
//!
//! Appends queue up while the previous group is being fsynced; whatever waits then becomes the next group, in one
//! transaction with one fsync. A lone writer never waits for company. Subscribers and callers hear of a group after
//! `COMMIT` returned, subscribers first.
//!
//! Whoever appends one event after the other asks again right after the answer. The thread stays awake for that moment:
//! to be put to sleep and woken again would take longer than to wait.
//!
//! Rows are written apart, by a connection whose commits are not fsynced: they may be lost, the next durable commit
//! carries them along, and they must not spend the reserve.
//!
//! **Checkpoints** (moving the log's pages into the database, two fsyncs) run between groups: when the queue is idle and
//! the log has grown a little, or at last when it has grown long. SQLite's own, inside a commit, would hide their failures.
//!
//! **After a failed fsync** nothing is written, checkpointed or fsynced any more; every append is answered with
//! [`AppendError::Fatal`], and closing leaves the log as it is for the next process.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::wal::CheckpointMode;
use rusqlite::{Connection, DEFAULT_NAME};
use tokio::sync::{broadcast, oneshot};
use uuid::Uuid;
use vmkeep_workflow::journal::{Append, AppendError, Appended, Record, StoreError};

use super::errors::{Failed, Kind, kind, unread};
use super::ledger::{Ledger, Outcome, Prepared};
use crate::reserve::ReserveFile;
use crate::{Adoption, files};

/// The most appends of a group.
const GROUP: usize = 512;
/// A group is closed when its records reach so many bytes.
const GROUP_BYTES: usize = 8 << 20;
/// For so long after an answer the thread does not sleep.
const AWAKE: Duration = Duration::from_micros(50);
/// A log of so many frames is checkpointed when nothing else is to be done …
const IDLE_FRAMES: u32 = 256;
/// … for so long …
const IDLE: Duration = Duration::from_millis(200);
/// … and a log of so many in any case. A durable append takes about five.
pub(super) const BUSY_FRAMES: u32 = 4096;
/// When a checkpoint achieved nothing (no room in the database, a reader of old pages), so many frames go by before the next.
const PAUSE_FRAMES: u32 = 1024;

/// What the writer is asked to do.
pub(super) enum Command {
    Append(Box<Pending>),
    Row { change: RowChange, reply: oneshot::Sender<Result<(), StoreError>> },
    Adopt { adoption: Box<Adoption>, reply: oneshot::Sender<Result<(), AppendError>> },
}

/// An append that waits for its turn.
pub(super) struct Pending {
    pub(super) prepared: Prepared,
    pub(super) reply: oneshot::Sender<Result<Appended, AppendError>>,
}

/// A change of a job's rows.
pub(super) enum RowChange {
    Put { job: Uuid, row: String, value: String },
    Clear { job: Uuid },
}

type RowReply = (RowChange, oneshot::Sender<Result<(), StoreError>>);

/// The writer; lives on its own thread.
pub(super) struct Writer {
    commands: Receiver<Command>,
    ledger: Ledger,
    rows: Connection,
    reserve: Arc<ReserveFile>,
    subscribers: broadcast::Sender<Record>,
    folder: PathBuf,
    /// The frames in the log since it was last begun anew.
    frames: Arc<AtomicU32>,
    /// How many of them were there at the last checkpoint.
    checkpointed: u32,
    /// At how many of them the next checkpoint is due, idle or not.
    due: u32,
    /// Why nothing is written any more.
    fatal: Option<String>,
}

impl Writer {
    pub(super) fn new(
        commands: Receiver<Command>,
        mut connections: (Connection, Connection),
        store: Uuid,
        reserve: Arc<ReserveFile>,
        subscribers: broadcast::Sender<Record>,
        folder: PathBuf,
    ) -> rusqlite::Result<Self> {
        let frames = Arc::new(AtomicU32::new(0));
        for connection in [&mut connections.0, &mut connections.1] {
            let frames = Arc::clone(&frames);
            connection.wal_hook(Some(move |_: &mut rusqlite::hooks::Wal, pages: std::ffi::c_int| {
                frames.store(u32::try_from(pages).unwrap_or(0), Ordering::Relaxed);
                Ok(())
            }))?;
        }
        let (ledger, rows) = (Ledger::open(connections.0, store)?, connections.1);
        Ok(Self {
            commands,
            ledger,
            rows,
            reserve,
            subscribers,
            folder,
            frames,
            checkpointed: 0,
            due: BUSY_FRAMES,
            fatal: None,
        })
    }

    /// Works until the last sender is gone, then closes the connections.
    pub(super) fn run(mut self) {
        let mut left = None;
        while let Some(command) = left.take().or_else(|| self.next()) {
            if let Command::Adopt { adoption, reply } = command {
                let _ = reply.send(self.adopt(&adoption));
                continue;
            }
            let (group, rows);
            (group, rows, left) = self.gather(command);
            if !group.is_empty() {
                self.settle(group);
            }
            if !rows.is_empty() {
                self.change_rows(rows);
            }
            let frames = self.frames.load(Ordering::Relaxed);
            if frames < self.checkpointed {
                // The log has begun anew.
                (self.checkpointed, self.due) = (0, BUSY_FRAMES);
            }
            if frames >= self.due {
                self.checkpoint();
            }
        }
    }

    /// Waits for something to do; uses the time when there is nothing.
    fn next(&mut self) -> Option<Command> {
        let awake = Instant::now();
        while awake.elapsed() < AWAKE {
            match self.commands.try_recv() {
                Ok(command) => return Some(command),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => std::hint::spin_loop(),
            }
        }
        loop {
            let frames = self.frames.load(Ordering::Relaxed);
            if frames < IDLE_FRAMES || frames == self.checkpointed {
                return self.commands.recv().ok();
            }
            match self.commands.recv_timeout(IDLE) {
                Ok(command) => return Some(command),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => drop(self.checkpoint()),
            }
        }
    }

    /// Takes what else waits.
    fn gather(&self, first: Command) -> (Vec<Pending>, Vec<RowReply>, Option<Command>) {
        let (mut group, mut rows, mut bytes) = (Vec::new(), Vec::new(), 0);
        let mut next = Some(first);
        while let Some(command) = next {
            match command {
                Command::Append(pending) => {
                    bytes += pending.prepared.weight();
                    group.push(*pending);
                }
                Command::Row { change, reply } => rows.push((change, reply)),
                adopt @ Command::Adopt { .. } => return (group, rows, Some(adopt)),
            }
            if group.len() + rows.len() >= GROUP || bytes >= GROUP_BYTES {
                break;
            }
            next = self.commands.try_recv().ok();
        }
        (group, rows, None)
    }

    /// Takes in commits of another store.
    fn adopt(&mut self, adoption: &Adoption) -> Result<(), AppendError> {
        if let Some(why) = &self.fatal {
            return Err(AppendError::Fatal(why.clone()));
        }
        let failed = match self.ledger.adopt(adoption) {
            Ok(outcome) => {
                if self.frames.load(Ordering::Relaxed) >= self.due {
                    self.checkpoint();
                }
                return outcome;
            }
            Err(failed) => failed,
        };
        if failed.is_fatal() {
            self.latch(&failed.error);
        }
        Err(failed.answer(|| files::lacks_room(&self.folder)))
    }

    /// Writes a group and answers it.
    fn settle(&mut self, group: Vec<Pending>) {
        if let Some(why) = &self.fatal {
            answer(group, &AppendError::Fatal(why.clone()));
            return;
        }
        match self.attempt(&group) {
            Ok(outcomes) => self.deliver(group, outcomes),
            Err(failed) if group.len() > 1 && failed.may_differ_alone() => {
                for pending in group {
                    self.settle(vec![pending]);
                }
            }
            Err(failed) => {
                let error = failed.answer(|| files::lacks_room(&self.folder));
                tracing::error!(%error, "the store could not append");
                if failed.is_fatal() {
                    self.latch(&failed.error);
                }
                answer(group, &error);
            }
        }
    }

    /// Writes a group; for want of room it gives up the reserve, then begins the log anew, and tries again.
    fn attempt(&mut self, group: &[Pending]) -> Result<Vec<Outcome>, Failed> {
        let prepared: Vec<&Prepared> = group.iter().map(|pending| &pending.prepared).collect();
        let mut failed = match self.ledger.attempt(&prepared) {
            Ok(outcomes) => return Ok(outcomes),
            Err(failed) => failed,
        };
        let folder = &self.folder;
        if failed.wants_room(|| files::lacks_room(folder)) && self.reserve.release() {
            match self.ledger.attempt(&prepared) {
                Ok(outcomes) => return Ok(outcomes),
                Err(again) => failed = again,
            }
        }
        // A log that is wholly in the database is written anew from its beginning, which takes no room.
        if failed.wants_room(|| files::lacks_room(&self.folder)) && self.checkpoint() {
            return self.ledger.attempt(&prepared);
        }
        Err(failed)
    }

    fn deliver(&self, group: Vec<Pending>, outcomes: Vec<Outcome>) {
        let listened_to = self.subscribers.receiver_count() > 0;
        let mut answers = Vec::with_capacity(group.len());
        for (pending, outcome) in group.into_iter().zip(outcomes) {
            let Pending { prepared, reply } = pending;
            match outcome {
                Ok(written) => {
                    answers.push((reply, Ok(Appended { last: written.last })));
                    if listened_to {
                        self.publish(prepared.append, &written.hashes);
                    }
                }
                Err(error) => answers.push((reply, Err(error))),
            }
        }
        for (reply, answer) in answers {
            // Whoever no longer waits is no reason to stop.
            let _ = reply.send(answer);
        }
    }

    fn publish(&self, append: Append, hashes: &[[u8; 32]]) {
        let Append { stream, expected, records, .. } = append;
        let mut seq = expected;
        for (bytes, &hash) in records.into_iter().zip(hashes) {
            seq = seq.next();
            // An error means that the last receiver has just gone.
            let _ = self.subscribers.send(Record { stream: stream.clone(), seq, bytes, hash });
        }
    }

    fn change_rows(&mut self, changes: Vec<RowReply>) {
        let outcome = match &self.fatal {
            Some(why) => Err(StoreError::Io(format!("the store failed before: {why}"))),
            None => write_rows(&mut self.rows, &changes).map_err(|error| {
                if kind(&error) == Kind::Sync {
                    self.latch(&error);
                }
                unread("write progress", &error)
            }),
        };
        for (_, reply) in changes {
            let _ = reply.send(outcome.clone());
        }
    }

    /// Moves the log into the database. Whether all of it was moved, so that the log can begin anew.
    fn checkpoint(&mut self) -> bool {
        if self.fatal.is_some() {
            return false;
        }
        self.checkpointed = self.frames.load(Ordering::Relaxed);
        self.due = self.checkpointed.saturating_add(PAUSE_FRAMES).max(BUSY_FRAMES);
        match self.ledger.connection().wal_checkpoint_v2(DEFAULT_NAME, CheckpointMode::PASSIVE) {
            Ok((in_log, moved)) => in_log == moved,
            Err(error) => {
                tracing::warn!(%error, "the store's log could not be moved into its database");
                if matches!(kind(&error), Kind::Sync | Kind::Damage) {
                    self.latch(&error);
                }
                false
            }
        }
    }

    /// Ends all writing. The connections must not checkpoint when they are closed.
    fn latch(&mut self, error: &rusqlite::Error) {
        tracing::error!(%error, "the store failed; the process must end");
        self.fatal = Some(error.to_string());
        for connection in [self.ledger.connection(), &self.rows] {
            if let Err(error) = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true) {
                tracing::error!(%error, "the store may still write when it is closed");
            }
        }
    }
}

fn answer(group: Vec<Pending>, error: &AppendError) {
    for pending in group {
        let _ = pending.reply.send(Err(error.clone()));
    }
}

fn write_rows(connection: &mut Connection, changes: &[RowReply]) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    for (change, _) in changes {
        match change {
            RowChange::Put { job, row, value } => transaction
                .prepare_cached(
                    "INSERT INTO rows (job, name, value) VALUES (?1, ?2, ?3)
                     ON CONFLICT (job, name) DO UPDATE SET value = excluded.value",
                )?
                .execute((job.as_bytes(), row, value))?,
            RowChange::Clear { job } => {
                transaction.prepare_cached("DELETE FROM rows WHERE job = ?1")?.execute([job.as_bytes()])?
            }
        };
    }
    transaction.commit()
}

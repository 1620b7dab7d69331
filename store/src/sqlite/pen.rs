//! The pen: what it takes to write into the database, and whoever holds it writes.
//!
//! **Who holds it.** An append that finds nobody writing takes the pen itself, on its own thread; all others queue up for
//! the writing thread ([`super::writer`]), which makes groups of them. To hand one append over to another thread and be
//! woken by it would cost a third of the time that it takes.
//!
//! Rows are written apart, by a connection whose commits are not fsynced: they may be lost, the next durable commit
//! carries them along, and they must not spend the reserve.
//!
//! **After a failed fsync** nothing is written, checkpointed or fsynced any more; every append is answered with
//! [`AppendError::Fatal`], and closing leaves the log as it is for the next process.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rusqlite::config::DbConfig;
use rusqlite::wal::CheckpointMode;
use rusqlite::{Connection, DEFAULT_NAME};
use tokio::sync::{broadcast, oneshot};
use uuid::Uuid;
use vmkeep_workflow::journal::{AppendError, Appended, Record, StoreError};

use super::errors::{Failed, Kind, kind, unread};
use super::ledger::{Ledger, Prepared};
use crate::queue::{self, Outcome, RowChange, RowReply};
use crate::reserve::ReserveFile;
use crate::{Adoption, files};

/// A log of so many frames is checkpointed when nothing else is to be done …
const IDLE_FRAMES: u32 = 256;
/// … and a log of so many in any case. A durable append takes about five.
pub(super) const BUSY_FRAMES: u32 = 4096;
/// When a checkpoint achieved nothing (no room in the database, a reader of old pages), so many frames go by before the next.
const PAUSE_FRAMES: u32 = 1024;

type Pending = queue::Pending<Prepared>;

/// The connections that write, and what is known of them.
pub(super) struct Pen {
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
    /// Whether the writing thread looks at the log from time to time.
    pub(super) watched: bool,
    /// Why nothing is written any more.
    fatal: Option<String>,
}

impl Pen {
    pub(super) fn new(
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
            ledger,
            rows,
            reserve,
            subscribers,
            folder,
            frames,
            checkpointed: 0,
            due: BUSY_FRAMES,
            watched: false,
            fatal: None,
        })
    }

    /// Writes one append.
    pub(super) fn append(&mut self, prepared: Prepared) -> Result<Appended, AppendError> {
        let (reply, mut answer) = oneshot::channel();
        self.settle(vec![Pending { prepared, reply }]);
        answer.try_recv().unwrap_or_else(|_| Err(AppendError::Unknown("an append got no answer".to_owned())))
    }

    /// The frames in the log.
    pub(super) fn frames(&self) -> u32 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Whether the log is to be checkpointed as soon as nothing else is to be done.
    pub(super) fn is_untidy(&self) -> bool {
        let frames = self.frames();
        frames >= IDLE_FRAMES && frames != self.checkpointed
    }

    /// Whether the log is to be checkpointed now.
    pub(super) fn is_due(&mut self) -> bool {
        let frames = self.frames();
        if frames < self.checkpointed {
            // The log has begun anew.
            (self.checkpointed, self.due) = (0, BUSY_FRAMES);
        }
        frames >= self.due
    }

    /// Takes in commits of another store.
    pub(super) fn adopt(&mut self, adoption: &Adoption) -> Result<(), AppendError> {
        if let Some(why) = &self.fatal {
            return Err(AppendError::Fatal(why.clone()));
        }
        let failed = match self.ledger.adopt(adoption) {
            Ok(outcome) => {
                if self.is_due() {
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
    pub(super) fn settle(&mut self, group: Vec<Pending>) {
        if let Some(why) = &self.fatal {
            queue::refuse(group, &AppendError::Fatal(why.clone()));
            return;
        }
        match self.attempt(&group) {
            Ok(outcomes) => queue::deliver(&self.subscribers, group, outcomes),
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
                queue::refuse(group, &error);
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

    pub(super) fn change_rows(&mut self, changes: Vec<RowReply>) {
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
    pub(super) fn checkpoint(&mut self) -> bool {
        if self.fatal.is_some() {
            return false;
        }
        self.checkpointed = self.frames();
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

    fn latch(&mut self, error: &rusqlite::Error) {
        self.give_up(&error.to_string());
    }

    /// Ends all writing. The connections must not checkpoint when they are closed.
    pub(super) fn give_up(&mut self, why: &str) {
        if self.fatal.is_some() {
            return;
        }
        tracing::error!(why, "the store failed; the process must end");
        self.fatal = Some(why.to_owned());
        for connection in [self.ledger.connection(), &self.rows] {
            if let Err(error) = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true) {
                tracing::error!(%error, "the store may still write when it is closed");
            }
        }
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
                .execute((job.as_bytes(), row, value.to_string()))?,
            RowChange::Clear { job } => {
                transaction.prepare_cached("DELETE FROM rows WHERE job = ?1")?.execute([job.as_bytes()])?
            }
        };
    }
    transaction.commit()
}

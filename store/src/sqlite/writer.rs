//! The thread that writes for all who have to wait.
//!
//! Appends queue up while the previous group is being fsynced; whatever waits then becomes the next group, in one
//! transaction with one fsync. Subscribers and callers hear of a group after `COMMIT` returned, subscribers first. Who
//! finds nobody writing does not come here at all ([`super::pen`]): a lone writer waits for nobody.
//!
//! **Checkpoints** (moving the log's pages into the database, two fsyncs) run here between groups: when nobody writes and
//! the log has grown a little, or at last when it has grown long. SQLite's own, inside a commit, would hide their failures.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::ledger::Prepared;
use super::pen::Pen;
use crate::queue;

/// For so long nobody writes before the log is checkpointed.
const IDLE: Duration = Duration::from_millis(200);

type Command = queue::Command<Prepared>;

/// The writer; lives on its own thread.
pub(super) struct Writer {
    commands: Receiver<Command>,
    pen: Arc<Mutex<Pen>>,
}

impl Writer {
    pub(super) fn new(commands: Receiver<Command>, pen: Arc<Mutex<Pen>>) -> Self {
        Self { commands, pen }
    }

    /// Works until the last sender is gone, then lets go of the pen.
    pub(super) fn run(self) {
        let mut left = None;
        while let Some(command) = left.take().or_else(|| self.next()) {
            let mut pen = self.pen();
            if let Command::Adopt { adoption, reply } = command {
                let _ = reply.send(pen.adopt(&adoption));
                continue;
            }
            let (group, rows);
            (group, rows, left) = queue::gather(&self.commands, command);
            if !group.is_empty() {
                pen.settle(group);
            }
            if !rows.is_empty() {
                pen.change_rows(rows);
            }
            if pen.is_due() {
                pen.checkpoint();
            }
        }
    }

    fn pen(&self) -> MutexGuard<'_, Pen> {
        self.pen.lock().unwrap_or_else(|poisoned| {
            let mut pen = poisoned.into_inner();
            pen.give_up("writing was cut off by a panic");
            pen
        })
    }

    /// Waits for something to do; uses the time when nobody writes.
    fn next(&self) -> Option<Command> {
        loop {
            let (untidy, frames) = {
                let mut pen = self.pen();
                pen.watched = pen.is_untidy();
                (pen.watched, pen.frames())
            };
            if !untidy {
                return self.commands.recv().ok();
            }
            match self.commands.recv_timeout(IDLE) {
                Ok(command) => return Some(command),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    let mut pen = self.pen();
                    if pen.frames() == frames {
                        pen.checkpoint();
                    }
                }
            }
        }
    }
}

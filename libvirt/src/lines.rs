//! The connections over which a client's calls go: one for each call under way.
//!
//! Calls that share a connection can hold each other up, and on a bad day a single QEMU that does not answer silences
//! every other domain that way:
//! - libvirtd serves a handful of calls of one connection at a time (five unless its administrator says otherwise) and
//!   reads no further until one of them has returned, not even the answers to its own keepalive messages, so that after
//!   half a minute it takes the connection for dead;
//! - in libvirt's client, a thread that waits for its answer reads and writes for all others. In versions before 10.0 it
//!   can miss that another has something to send: seen, with a call that hung, were calls that waited up to half a
//!   minute for nothing.
//!
//! So each call has a connection to itself. Those that are idle are kept, a few of them; the rest is closed. All lead to
//! the same daemon, or are not used. The first one, which brings the events, carries no calls.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::conn::{ConnectOptions, Connection};
use crate::error::{Error, ErrorCode, Result};

/// Idle connections that are kept.
const KEPT: usize = 3;

/// The connections of one generation: the first, which has the events, and those that calls go over.
pub(crate) struct Lines {
    first: Connection,
    options: ConnectOptions,
    idle: Mutex<Vec<Connection>>,
}

/// A connection, for one call.
pub(crate) struct Line {
    lines: Arc<Lines>,
    /// There until it is dropped.
    conn: Option<Connection>,
}

impl Lines {
    pub(crate) fn new(first: Connection, options: ConnectOptions) -> Arc<Self> {
        Arc::new(Self { first, options, idle: Mutex::default() })
    }

    pub(crate) fn first(&self) -> &Connection {
        &self.first
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        // Never left half changed.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection for a call. Blocks if one has to be opened.
    pub(crate) fn line(self: &Arc<Self>) -> Result<Line> {
        // A driver inside this process has no such limits, and may be opened once only.
        if self.first.uri().is_in_process() {
            return Ok(Line { lines: Arc::clone(self), conn: None });
        }
        loop {
            // Not in the condition of the loop: the lock would be held while a connection is closed.
            let kept = self.idle().pop();
            match kept {
                Some(conn) if conn.is_alive().unwrap_or(false) => {
                    return Ok(Line { lines: Arc::clone(self), conn: Some(conn) });
                }
                Some(_) => {}
                None => break,
            }
        }
        match Connection::open_with(self.first.uri(), &self.options) {
            Ok(conn) => self.same_daemon(conn).map(|conn| Line { lines: Arc::clone(self), conn: Some(conn) }),
            // It may have too many clients.
            Err(error) if self.first.is_alive().unwrap_or(false) => {
                tracing::warn!(%error, "no further connection to libvirt; calls share the first");
                Ok(Line { lines: Arc::clone(self), conn: None })
            }
            Err(error) => Err(error),
        }
    }

    fn same_daemon(&self, conn: Connection) -> Result<Connection> {
        match (self.first.instance(), conn.instance()) {
            (Some(first), Some(this)) if first != this => {
                let object = format!("connection {}", conn.uri());
                let text = "libvirtd is another one now";
                Err(Error::own("virConnectOpen", object, ErrorCode::Disconnected, text))
            }
            _ => Ok(conn),
        }
    }
}

impl Line {
    pub(crate) fn conn(&self) -> &Connection {
        self.conn.as_ref().unwrap_or(&self.lines.first)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let Some(conn) = self.conn.take().filter(|conn| conn.is_alive().unwrap_or(false)) else { return };
        let mut idle = self.lines.idle();
        let surplus = if idle.len() < KEPT {
            idle.push(conn);
            None
        } else {
            Some(conn)
        };
        drop(idle);
        // Closing may wait for libvirt, so not under the lock.
        drop(surplus);
    }
}

//! A place that several hosts may write to at once: what is asked of it (`FORMAT.md`, §1), and nothing else.
//!
//! No conditional put, rename, append, order or clock. A name is written once, and never again with other bytes.

pub mod memory;

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

/// Objects by name.
#[async_trait]
pub trait Backend: Send + Sync + fmt::Debug {
    /// Stores an object. When it has returned, the object is durable, and every later `get` and `list` by anybody sees it.
    /// Putting the same bytes again is harmless.
    ///
    /// # Errors
    /// It may then still take effect at any later time.
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError>;

    /// The bytes of an object, or those of a range of it; a range beyond its end is cut there. `None` is *certain*: there
    /// is no such object.
    ///
    /// # Errors
    /// Whatever else kept the bytes from being read.
    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError>;

    /// Every object whose name begins so, that was put before the call began, and not deleted before it ended; of what
    /// changed in between, anything. In any order.
    ///
    /// # Errors
    /// When not all of them could be told.
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError>;

    /// Deletes an object; one that is not there is deleted already. When it has returned, no later `get` or `list` sees it.
    ///
    /// # Errors
    /// It may then still take effect at any later time.
    async fn delete(&self, name: &str) -> Result<(), BackendError>;

    /// Where it is, for messages: never with a password.
    fn place(&self) -> &str;
}

/// An object in a list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Its whole name.
    pub name: String,
    /// Bytes.
    pub size: u64,
}

/// Why a backend did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {name}: {cause}")]
pub struct BackendError {
    /// The backend.
    pub place: String,
    /// The object, or the prefix of a list.
    pub name: String,
    /// What kind it is.
    pub kind: BackendErrorKind,
    /// In the backend's words.
    pub cause: String,
}

/// What can be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendErrorKind {
    /// It may pass: the place is not reached, or is busy.
    Transient,
    /// It has no room left.
    Full,
    /// The credentials do not suffice.
    Denied,
    /// The place does not keep the promises, or is not what it was said to be.
    Broken,
}

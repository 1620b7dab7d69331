//! A place that several hosts may write to at once: what is asked of it (`FORMAT.md`, §1), and nothing else.
//!
//! No conditional put, rename, append, order or clock. A name is written once, and never again with other bytes.

//!
//! [`address::open`] opens the one that an address names: [`local`] folders, [`s3`] and [`sftp`]. All of them pass one suite
//! (`conformance.rs`), and what one of them can do beyond §1 (refuse other bytes under a name that is taken) is tested, but
//! relied upon by nobody.

pub mod address;
#[cfg(test)]
mod conformance;
pub mod local;
pub mod memory;
pub mod s3;
pub mod sftp;
#[cfg(test)]
mod testing;
pub mod trial;

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

pub use address::{Address, Options};

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

    /// Whether its address still leads there. One that holds on to what it has found must be opened anew when something else is
    /// there by now: a folder that was moved away, or a file system that was unmounted.
    async fn stands(&self) -> bool {
        true
    }
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
#[error("{place}: {}{cause}", before_the_cause(.name))]
pub struct BackendError {
    /// The backend.
    pub place: String,
    /// The object, or the prefix of a list; empty for the place as a whole.
    pub name: String,
    /// What kind it is.
    pub kind: BackendErrorKind,
    /// In the backend's words.
    pub cause: String,
}

/// What stands between the place and the cause; nothing if it is about the place as a whole.
fn before_the_cause(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!("{name}: ") }
}

impl BackendError {
    /// One about an object.
    pub(crate) fn new(place: &str, name: &str, kind: BackendErrorKind, cause: impl fmt::Display) -> Self {
        Self { place: place.to_owned(), name: name.to_owned(), kind, cause: cause.to_string() }
    }
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

/// The folder where an object lies before it has its name. What is there is listed only by whoever asks for `tmp/`: the
/// collector, which removes what dead puts have left (§7).
pub(crate) const TEMPORARY: &str = "tmp";

/// Whether a walk for a prefix goes into a folder, or takes a file: it may lead to the prefix, or be below it.
pub(crate) fn is_wanted(path: &str, is_folder: bool, prefix: &str) -> bool {
    if !is_plain(path) || (path == TEMPORARY && !prefix.starts_with(TEMPORARY)) {
        return false;
    }
    path.starts_with(prefix) || (is_folder && prefix.starts_with(&format!("{path}/")))
}

/// Whether a name can be one of §2: parts of small letters, digits, `.`, `_` and `-`, none of which begins with a dot. Others are
/// never put, and never listed: what else lies in a folder (`lost+found`, `.snapshot`) is no concern of the vault's, and no
/// name climbs out of it.
pub(crate) fn is_plain(name: &str) -> bool {
    let fits =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.bytes().all(fits);
    name.len() <= 512 && name.split('/').all(part)
}

/// Refuses a name that can't be one of §2.
pub(crate) fn checked<'a>(place: &str, name: &'a str) -> Result<&'a str, BackendError> {
    if is_plain(name) {
        return Ok(name);
    }
    Err(BackendError::new(place, name, BackendErrorKind::Broken, "this cannot be the name of an object"))
}

/// Where an object lies before it has its name: it tells which one it was to be (and so under which lease), and no two puts
/// have the same.
pub(crate) fn temporary(place: &str, name: &str) -> Result<String, BackendError> {
    let mut random = [0; 8];
    crate::ids::random(&mut random)
        .map_err(|error| BackendError::new(place, name, BackendErrorKind::Broken, error))?;
    Ok(format!("{TEMPORARY}/{}.{}", name.replace('/', "_"), crate::ids::hex(&random)))
}

/// The folder of a name, which is empty for those directly below the root, and its last part.
pub(crate) fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

/// Whether a folder goes with the last object in it. There is one for each lease and each backup, so they would pile up;
/// those of packs are 256 and stay.
pub(crate) fn is_passing(folder: &str) -> bool {
    ["leases/", "marks/", "backups/"].iter().any(|top| folder.starts_with(top))
}

//! Writing out what a vault holds: the sink that images go to, the lease under which they are read, and another format.

use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use vmkeep_vault::backend::BackendErrorKind;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::lease::{Holder, Lease};
use vmkeep_vault::read::Sink;
use vmkeep_vault::vault::Vault;

use crate::blocking::{self, touch};
use crate::image::qcow2::Format;
use crate::image::qemu_img::{QemuImg, QemuImgError};

/// A conversion takes as long as it takes; one that stands still is ended by whoever waits for it.
const CONVERSION: Duration = Duration::from_secs(30 * 24 * 3600);
const CHECK: Duration = Duration::from_secs(24 * 3600);

/// A new file, of which what is not written stays a hole.
#[derive(Clone, Debug)]
pub struct Holes(Arc<File>);

impl Holes {
    /// Over a file that nothing was written to yet; it gets its size.
    ///
    /// # Errors
    /// If the file system does not know files of that size.
    pub fn new(file: Arc<File>, size: u64) -> Result<Self> {
        touch("write")?;
        file.set_len(size)?;
        Ok(Self(file))
    }
}

#[async_trait]
impl Sink for Holes {
    async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<()> {
        let file = Arc::clone(&self.0);
        let write = move || {
            touch("write")?;
            file.write_all_at(&bytes, offset)
        };
        blocking::io(write).await
    }

    async fn zero(&mut self, _: u64, _: u64) -> Result<()> {
        // Nothing was written there before: the file is new, and every place comes once.
        Ok(())
    }
}

/// A stream that is small enough to be held.
#[derive(Debug, Default)]
pub struct Held(pub Vec<u8>);

impl Held {
    /// For a stream of this size.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self(vec![0; size])
    }
}

#[async_trait]
impl Sink for Held {
    async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<()> {
        let at = usize::try_from(offset).map_err(Error::other)?;
        let end = at.checked_add(bytes.len());
        let place = end.and_then(|end| self.0.get_mut(at..end));
        place.ok_or_else(|| Error::other("it is longer than it was said to be"))?.copy_from_slice(&bytes);
        Ok(())
    }

    async fn zero(&mut self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

/// A lease, where one can be put: what is read then stays, though it is pruned meanwhile (`FORMAT.md`, §6). Media that can
/// only be read, and credentials that may not put, do without.
///
/// # Errors
/// What else the backend could not do.
pub async fn reading_lease(vault: &Vault, holder: &Holder) -> std::result::Result<Option<Lease>, VaultError> {
    if vault.writable().is_err() {
        return Ok(None);
    }
    match Lease::begin(vault, holder).await {
        Ok(lease) => Ok(Some(lease)),
        Err(VaultError::Backend(error))
            if matches!(error.kind, BackendErrorKind::Denied | BackendErrorKind::Full) =>
        {
            tracing::warn!(%error, "reading without a lease");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Why a file was not converted.
#[derive(Debug, thiserror::Error)]
pub enum NotConverted {
    /// The tool.
    #[error(transparent)]
    Tool(#[from] QemuImgError),
    /// The tool says that what it wrote is damaged.
    #[error("what was written is damaged")]
    Damaged,
}

/// Converts a raw file into a qcow2 file, which exists and is empty: `qemu-img` would make it readable for others. Durable on
/// return. Blocks; `stop` is asked several times a second.
///
/// # Errors
/// If the tool could not, or was stopped, or what it wrote is damaged.
pub fn to_qcow2(raw: &Path, qcow2: &Path, stop: &dyn Fn() -> bool) -> std::result::Result<(), NotConverted> {
    let tool = QemuImg::default();
    tool.convert((raw, Format::Raw), (qcow2, Format::Qcow2), CONVERSION, stop)?;
    match tool.check(qcow2, Format::Qcow2, CHECK)?.sound() {
        true => Ok(()),
        false => Err(NotConverted::Damaged),
    }
}

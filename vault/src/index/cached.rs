//! An object that is read in parts, with a copy on disk of the parts that were read.
//!
//! The copy is a sparse file of the object's length. Nothing says which parts of it are there: every part is a box that
//! proves its own bytes, so a hole, a torn write or damage is a box that does not open, and is fetched again. The folder may
//! be deleted at any time.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::error::VaultError;
use crate::keys::KeyError;
use crate::names::ObjectName;
use crate::vault::Vault;

/// An object that is read in parts.
#[derive(Debug)]
pub struct Cached {
    vault: Vault,
    name: ObjectName,
    file: Option<Arc<File>>,
}

impl Cached {
    /// With a copy in this folder, if there is one and it can be written to; otherwise without.
    #[must_use]
    pub fn new(vault: &Vault, name: ObjectName, folder: Option<&Path>) -> Self {
        let file = folder.and_then(|folder| match copy(folder, &name) {
            Ok(file) => Some(Arc::new(file)),
            Err(error) => {
                tracing::warn!(%error, %name, "no copy on disk of a part of the vault's index");
                None
            }
        });
        Self { vault: vault.clone(), name, file }
    }

    /// Bytes of the object, which must be there.
    ///
    /// # Errors
    /// If the object is missing or shorter, or what the backend could not do.
    pub async fn fetch(&self, range: Range<u64>) -> Result<bytes::Bytes, VaultError> {
        let length = range.end - range.start;
        let bytes = self.vault.backend().get(&self.name.to_string(), Some(range.clone())).await?;
        let bytes = bytes.ok_or_else(|| VaultError::Missing { object: self.name.to_string() })?;
        if bytes.len() as u64 != length {
            return Err(VaultError::damaged(&self.name, "it is shorter than it was listed"));
        }
        Ok(bytes)
    }

    /// What is in a box of the object.
    ///
    /// # Errors
    /// If it does not open, or what the backend could not do.
    pub async fn open_box(&self, block: u64, range: Range<u64>) -> Result<Vec<u8>, VaultError> {
        let mut opened = self.open_boxes(block, vec![range]).await?;
        opened.pop().ok_or_else(|| VaultError::Contract("a box that was opened is not there".into()))
    }

    /// What is in boxes that follow each other, fetched at once.
    ///
    /// # Errors
    /// If one does not open, or what the backend could not do.
    pub async fn open_boxes(&self, first: u64, ranges: Vec<Range<u64>>) -> Result<Vec<Vec<u8>>, VaultError> {
        let (Some(begin), Some(end)) = (ranges.first(), ranges.last()) else { return Ok(Vec::new()) };
        let whole = begin.start..end.end;
        let (keys, name, start) = (self.vault.keys().clone(), self.name.clone(), whole.start);
        let open = move |bytes: &[u8]| -> Result<Vec<Vec<u8>>, KeyError> {
            let mut opened = Vec::with_capacity(ranges.len());
            for (n, range) in ranges.iter().enumerate() {
                let block = first.wrapping_add(n as u64);
                let bytes = bytes.get((range.start - start) as usize..(range.end - start) as usize);
                opened.push(keys.open_box(&name, block, bytes.ok_or(KeyError::NotGenuine)?)?);
            }
            Ok(opened)
        };
        if let Some(file) = self.file.clone() {
            let (open, whole) = (open.clone(), whole.clone());
            let read = move || {
                let mut bytes = vec![0; (whole.end - whole.start) as usize];
                file.read_exact_at(&mut bytes, whole.start).ok()?;
                open(&bytes).ok()
            };
            if let Some(opened) = crate::tasks::blocking(read).await? {
                return Ok(opened);
            }
        }
        let bytes = self.fetch(whole).await?;
        let opened = open(&bytes).map_err(|error| VaultError::damaged(&self.name, error))?;
        self.keep(start, bytes).await?;
        Ok(opened)
    }

    /// Keeps bytes that were fetched. What cannot be kept is fetched again.
    ///
    /// # Errors
    /// Only if a task of this program ended.
    pub async fn keep(&self, at: u64, bytes: bytes::Bytes) -> Result<(), VaultError> {
        if let Some(file) = self.file.clone() {
            let write = move || drop(file.write_all_at(&bytes, at));
            crate::tasks::blocking(write).await?;
        }
        Ok(())
    }
}

/// The name of an object's copy: one of a file.
pub(crate) fn file_name(name: &ObjectName) -> String {
    name.to_string().replace('/', "-")
}

fn copy(folder: &Path, name: &ObjectName) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(folder.join(file_name(name)))
}

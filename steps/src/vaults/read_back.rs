//! Reading back what was written, and computing its root: what proves a restore to whoever can see the file or the device only.
//!
//! What reached a sink was proven chunk by chunk on its way. That does not say what lies there now: a conversion may have made
//! something else of it, and a device held other bytes before. So it is read again from the beginning to the end, past the
//! page cache where the kernel lets go of it.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use rustix::fs::{Advice, SeekFrom};
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::BlobId;
use vmkeep_vault::keys::IdKeys;
use vmkeep_vault::source::{
    DiskReader, DiskSource as _, Format as Shown, ImageOptions, ImageSource, QemuNbdOptions,
};
use vmkeep_vault::write::{Extent, Source, proof_of};

use crate::blocking;
use crate::image::qcow2::Format;

/// Bytes that are read at once.
const PIECE: u64 = 512 << 10;
/// Connections to the program that shows an image, and requests in flight on each.
const CONNECTIONS: usize = 2;
const IN_FLIGHT: usize = 8;

/// A raw file or block device, from its beginning to its end. Holes are told as zeroes.
#[derive(Debug)]
pub struct RawSource {
    file: Arc<File>,
    start: u64,
    at: u64,
    size: u64,
}

impl RawSource {
    /// Of the first bytes of a file.
    #[must_use]
    pub fn new(file: Arc<File>, size: u64) -> Self {
        Self::within(file, 0, size)
    }

    /// Of so many bytes from a place in a file.
    #[must_use]
    pub fn within(file: Arc<File>, start: u64, size: u64) -> Self {
        Self { file, start, at: 0, size }
    }
}

#[async_trait]
impl Source for RawSource {
    async fn next(&mut self) -> Result<Option<(u64, Extent)>> {
        let (file, at) = (Arc::clone(&self.file), self.at);
        if at >= self.size {
            return Ok(None);
        }
        let (from, end) = (self.start + at, self.start + self.size);
        let extent = blocking::io(move || read_next(&file, from, end)).await?;
        self.at += extent.len();
        Ok(Some((at, extent)))
    }
}

fn read_next(file: &File, at: u64, end: u64) -> Result<Extent> {
    // Where nobody knows of holes, all is data.
    let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => data.min(end),
        Err(rustix::io::Errno::NXIO) => end,
        Err(_) => at,
    };
    if data > at {
        let length = file.metadata()?.len();
        // A hole that lies beyond the end is none: the file is too short. (A device has no length.)
        if file.metadata()?.is_file() && length < data {
            return Err(Error::new(ErrorKind::UnexpectedEof, "it is shorter than it should be"));
        }
        return Ok(Extent::Zero(data - at));
    }
    let mut bytes = vec![0; usize::try_from(PIECE.min(end - at)).map_err(Error::other)?];
    file.read_exact_at(&mut bytes, at)?;
    Ok(Extent::Data(bytes.into()))
}

/// The root of the first bytes of a raw file or block device, of a disk or a stream; what is not yet durable is made so
/// before.
///
/// # Errors
/// If it cannot be synced or read, or is shorter.
pub async fn root_of_raw(
    ids: &IdKeys,
    kind: BlobType,
    file: &Arc<File>,
    size: u64,
) -> std::result::Result<BlobId, VaultError> {
    root_within(ids, kind, file, 0, size).await
}

/// The same of so many bytes from a place in a file.
///
/// # Errors
/// As [`root_of_raw`].
pub async fn root_within(
    ids: &IdKeys,
    kind: BlobType,
    file: &Arc<File>,
    start: u64,
    size: u64,
) -> std::result::Result<BlobId, VaultError> {
    let synced = Arc::clone(file);
    blocking::io(move || {
        synced.sync_all()?;
        // What is clean is let go of. Where that is not done, it is read from memory.
        rustix::fs::fadvise(&*synced, 0, None, Advice::DontNeed).or(Ok(()))
    })
    .await?;
    let mut source = RawSource::within(Arc::clone(file), start, size);
    Ok(proof_of(ids, kind, size, &mut source).await?.root)
}

/// A file as QEMU reads it, from the beginning to the end.
///
/// # Errors
/// If it cannot be shown.
pub async fn open_image(path: &Path, format: &str) -> std::result::Result<ImageSource, VaultError> {
    let show = QemuNbdOptions {
        image: Shown::Named { format: format.to_owned(), file: path.to_owned() },
        bitmap: None,
        connections: CONNECTIONS,
        owner: None,
        folder: std::env::temp_dir(),
    };
    let opened = ImageSource::open(&ImageOptions { show, in_flight: IN_FLIGHT, patience: None }).await;
    opened.map_err(|error| VaultError::Io(error.into()))
}

/// The root of a disk as QEMU reads it from a file.
///
/// # Errors
/// If it cannot be shown or read, or has another size.
pub async fn root_of_image(
    ids: &IdKeys,
    path: &Path,
    format: Format,
    size: u64,
) -> std::result::Result<BlobId, VaultError> {
    let disk = Arc::new(open_image(path, format.as_str()).await?);
    let found = disk.size();
    let root = if found == size {
        let mut reader = DiskReader::new(disk.clone(), None);
        proof_of(ids, BlobType::Data, size, &mut reader).await.map(|image| image.root)
    } else {
        Err(VaultError::Io(Error::other(format!("it shows {found} bytes instead of {size}"))))
    };
    // The program lets go of the file before anybody renames it.
    if let Some(disk) = Arc::into_inner(disk) {
        disk.close().await;
    }
    root
}

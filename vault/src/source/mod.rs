//! Where the bytes of a disk come from at a backup: one interface, whatever shows the disk.
//!
//! A [`DiskSource`] is a disk *at one point in time*: its size, what is known of its parts, and its bytes. There are two:
//!
//! - [`NbdSource`], an export of somebody else's: the pull job of a running domain, which its caller begins and ends.
//! - [`ImageSource`], an image that nobody writes to, the frozen base of a domain that is off: read by a `qemu-nbd` of our
//!   own, which begins and ends with it.
//!
//! [`DiskReader`] makes of either the stream of extents that [`Session::write_image`](crate::write::Session::write_image)
//! takes in: in the order of the disk, read ahead.
//!
//! # What is known of a part, and what is made of it
//!
//! Everything is told in chunks of 64 KiB, the unit of the vault, at multiples of 64 KiB; the last one ends with the disk. A
//! chunk is *dirty* if any byte of it is, *zero* only if every byte of it reads as zero, *allocated* if any byte of it is.
//! **Where nothing is known, a chunk is dirty and not zero**: a bitmap that was not granted makes the disk be read whole, never
//! be taken for unchanged. A hole that does not say that it reads as zero is read. Dirty and zero is written as zero, and
//! dirty always as the whole chunk.

mod disk_reader;
mod image;
mod nbd_source;
mod qemu_nbd;
mod regions;

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

pub use disk_reader::{DiskReader, Told};
pub use image::{ImageOptions, ImageSource};
pub use nbd_source::{NbdOptions, NbdSource};
pub use qemu_nbd::{Format, Owner, QemuNbd, QemuNbdOptions};
pub use regions::Region;

use crate::nbd::NbdError;

/// A disk at one point in time.
#[async_trait]
pub trait DiskSource: Send + Sync + fmt::Debug {
    /// Bytes.
    fn size(&self) -> u64;

    /// Whether it knows what has changed; otherwise everything is dirty.
    fn knows_changes(&self) -> bool;

    /// What is known of a part that begins at a multiple of 64 KiB, and ends at one or with the disk: from its beginning to
    /// its end; neighbours differ.
    ///
    /// # Errors
    /// What cannot be known. Nothing may be concluded from it.
    async fn regions(&self, part: Range<u64>) -> Result<Vec<Region>, SourceError>;

    /// The bytes of a part, of at most [`MOST_AT_ONCE`](crate::nbd::MOST_AT_ONCE).
    ///
    /// # Errors
    /// If any of them cannot be read.
    async fn read(&self, part: Range<u64>) -> Result<Bytes, SourceError>;

    /// Bytes that have come so far, of whatever sort: for a watch over its progress.
    fn received(&self) -> u64;
}

/// Why a disk could not be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The export.
    #[error(transparent)]
    Nbd(#[from] NbdError),
    /// A helper program was not started, or what it needs not made.
    #[error("{what}: {cause}")]
    Start {
        /// What was to be made or started.
        what: String,
        /// In the system's words.
        cause: String,
    },
    /// A helper program ended before its time.
    #[error("{program} on {image} ended ({status}){}", complained(.complaint))]
    Ended {
        /// Which.
        program: String,
        /// What it was to show.
        image: String,
        /// How it ended.
        status: String,
        /// What it complained about.
        complaint: String,
    },
}

fn complained(complaint: &str) -> String {
    if complaint.is_empty() { String::new() } else { format!(": {complaint}") }
}

impl SourceError {
    /// A stable name of the kind of failure.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Nbd(error) => error.code(),
            Self::Start { .. } => "SOURCE_NOT_STARTED",
            Self::Ended { .. } => "SOURCE_ENDED",
        }
    }

    /// What somebody can do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Nbd(error) => error.remedy(),
            Self::Start { .. } => {
                "see whether `qemu-nbd` and `setpriv` are installed, and whether the folder can be written to"
            }
            Self::Ended { .. } => {
                "see what it complains about: an image that is in use, is not there, or lacks the bitmap"
            }
        }
    }
}

impl From<SourceError> for std::io::Error {
    fn from(error: SourceError) -> Self {
        Self::other(error)
    }
}

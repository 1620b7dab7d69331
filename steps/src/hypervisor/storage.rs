//! The images beside the guest's own.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use vmkeep_vault::source::SourceError;

use super::definition::Layer;
use super::error::{HvError, HvResult, Trouble};
use super::show::{self, Shown};

/// Which file, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

impl FileId {
    /// Of a file that the kernel tells of.
    #[must_use]
    pub fn of(data: &std::fs::Metadata) -> Self {
        Self { dev: data.dev(), ino: data.ino() }
    }
}

/// An image file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Where.
    pub path: PathBuf,
    /// Which file.
    pub id: FileId,
    /// Its length in bytes.
    pub size: u64,
    /// Bytes that it takes on its file system.
    pub allocated: u64,
    /// Its format.
    pub format: String,
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// Bytes that it allocates at once.
    pub cluster: u64,
    /// The image below it, as its header names it, made absolute.
    pub backing: Option<Layer>,
    /// Whether it holds no data of its own, so that it reads as its backing image does. Always false for raw.
    pub empty: bool,
}

/// A bitmap that records which parts of a disk the guest changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bitmap {
    /// Its name; libvirt gives it that of the checkpoint.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
}

/// An overlay to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlaySpec {
    /// Where.
    pub path: PathBuf,
    /// On what; owner, group and mode are taken from it.
    pub base: Layer,
    /// The disk's size in bytes.
    pub virtual_size: u64,
}

/// Room on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Bytes in all.
    pub total: u64,
    /// Bytes that may still be written.
    pub free: u64,
    /// Which file system.
    pub dev: u64,
}

/// The images beside the guest's own. Paths are absolute. An image that is looked at, made or removed is never reached
/// through a link in the last component; a link there is [`Trouble::Refused`](super::Trouble::Refused).
#[async_trait]
pub trait Storage: Send + Sync + 'static {
    /// Looks at an image, also while QEMU holds it. Nothing if there is no such file. The format is the given one, never
    /// guessed: guests can make a raw disk look like anything.
    async fn inspect(&self, layer: &Layer) -> HvResult<Option<Image>>;

    /// Creates an empty overlay; durable with its name when it returns. [`Trouble::Exists`](super::Trouble::Exists)
    /// if there is a file of that name.
    async fn create_overlay(&self, spec: &OverlaySpec) -> HvResult<Image>;

    /// Removes exactly that file, durably. `Ok(false)` if it is gone, or if another file bears its name.
    async fn remove(&self, path: &Path, id: FileId) -> HvResult<bool>;

    /// Commits an overlay that no process holds into its base, durably. May be cut off and repeated: until it has
    /// returned `Ok` the two are consistent as a chain. [`Trouble::Locked`](super::Trouble::Locked) if somebody, say a
    /// starting domain, holds either; [`Trouble::Cancelled`](super::Trouble::Cancelled) if `give_way` was raised: no
    /// process of ours holds the images any more when it returns.
    async fn commit_offline(
        &self,
        overlay: &Layer,
        base: &Layer,
        give_way: &CancellationToken,
    ) -> HvResult<()>;

    /// Gives a base the owner that its overlay has: the base of a guest that ended on its overlay still belongs to QEMU's
    /// user, since libvirt remembers the owner of the top image only, and the overlay was made for the same owner. What
    /// was committed counts more: this does not fail.
    /// Nothing is done to what is not that base, or is no file.
    async fn give_back(&self, _base: &Path, _id: FileId, _overlay: &Path) {}

    /// Adds empty persistent bitmaps to an overlay that nobody has open, durably. A guest that is started anew on the
    /// overlay goes on recording in them what its checkpoints need.
    async fn add_bitmaps(&self, overlay: &Path, bitmaps: &[Bitmap]) -> HvResult<()> {
        if bitmaps.is_empty() {
            return Ok(());
        }
        Err(HvError::new(Trouble::Unsupported, format!("{} cannot hold bitmaps here", overlay.display())))
    }

    /// Opens an image that nobody writes to as long as it is open.
    async fn open_image(&self, image: &Layer) -> Result<Shown, SourceError> {
        show::image(image).await
    }

    /// The room on the file system of a folder or file.
    async fn space(&self, path: &Path) -> HvResult<Space>;

    /// Writes to the drive what a file that others are writing has gathered so far. Best effort: it only shortens the
    /// flush at the end.
    async fn flush(&self, path: &Path);
}

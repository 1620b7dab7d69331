//! Where the bytes of a lost chunk may still be: whoever may have them is asked for what an image has at a position, and what
//! comes is believed only if it hashes to the wanted id. So a donor may offer what it likes: the same backup in another vault,
//! a neighbour of it, a disk that has gone on since.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::Mutex;

use crate::backend::BackendErrorKind;
use crate::backups::Backups;
use crate::blob::BlobType;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::{BackupId, BlobId, DomainId};
use crate::index::Index;
use crate::lease::{Holder, Lease};
use crate::leaves::leaves;
use crate::manifest::{Image, Manifest};
use crate::node::SLOTS;
use crate::source::DiskSource;
use crate::tree::chunks;
use crate::vault::Vault;

const CHUNK_BYTES: u64 = CHUNK as u64;
/// Backups of another vault, beside the same one, in which an image is looked for.
const NEIGHBOURS: usize = 4;

/// The image that lacks something.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its domain.
    pub domain: DomainId,
    /// The backup.
    pub backup: BackupId,
    /// The backup's point in time.
    pub taken: Timestamp,
    /// The disk's target, or the stream's name.
    pub image: String,
    /// What its chunks are.
    pub kind: BlobType,
    /// Bytes.
    pub size: u64,
}

/// Somebody who may have the bytes.
#[async_trait]
pub trait Donor: Send + Sync {
    /// What it is, for messages.
    fn name(&self) -> String;

    /// Images that may have at the same position what this one has, the likeliest first.
    ///
    /// # Errors
    /// What kept it from looking.
    async fn images(&self, wanted: &Wanted) -> Result<Vec<Arc<dyn Plain>>, VaultError>;
}

/// An image of plain bytes.
#[async_trait]
pub trait Plain: Send + Sync {
    /// The bytes of a chunk: 64 KiB, or fewer where the image ends. Nothing if it does not have them.
    ///
    /// # Errors
    /// What kept them from being read.
    async fn chunk(&self, at: u64) -> Result<Option<Bytes>, VaultError>;
}

/// Bytes in memory: for small things.
#[async_trait]
impl Plain for Bytes {
    async fn chunk(&self, at: u64) -> Result<Option<Bytes>, VaultError> {
        let part = part(at, self.len() as u64);
        Ok(part.map(|(begin, end)| self.slice(begin as usize..end as usize)))
    }
}

/// A disk that still has what a backup of it has, where nobody has written since.
#[derive(Clone, Debug)]
pub struct DiskImage(pub Arc<dyn DiskSource>);

#[async_trait]
impl Plain for DiskImage {
    async fn chunk(&self, at: u64) -> Result<Option<Bytes>, VaultError> {
        let Some((begin, end)) = part(at, self.0.size()) else { return Ok(None) };
        Ok(Some(self.0.read(begin..end).await.map_err(std::io::Error::from)?))
    }
}

fn part(at: u64, size: u64) -> Option<(u64, u64)> {
    let begin = at.checked_mul(CHUNK_BYTES).filter(|begin| *begin < size)?;
    Some((begin, size.min(begin + CHUNK_BYTES)))
}

/// One image of a domain, which somebody names as such.
#[derive(Clone)]
pub struct Given {
    /// The domain.
    pub domain: DomainId,
    /// The disk's target, or the stream's name, as backups call it.
    pub image: String,
    /// Its bytes.
    pub plain: Arc<dyn Plain>,
}

#[async_trait]
impl Donor for Given {
    fn name(&self) -> String {
        format!("{} of the domain {}", self.image, self.domain)
    }

    async fn images(&self, wanted: &Wanted) -> Result<Vec<Arc<dyn Plain>>, VaultError> {
        let fits = wanted.domain == self.domain && wanted.image == self.image;
        Ok(fits.then(|| self.plain.clone()).into_iter().collect())
    }
}

/// Another vault: with the same backup, if it is a copy of this one, or with others of the same domain. Its keys, and so its
/// ids, are others; only bytes at positions are compared.
pub struct OtherVault {
    vault: Vault,
    backups: Backups,
    index: Arc<Index>,
    folder: Option<std::path::PathBuf>,
    lease: Option<Lease>,
}

impl OtherVault {
    /// Lists it, under a lease if its credentials suffice for one: collections wait for that.
    ///
    /// # Errors
    /// What its backend could not do.
    pub async fn open(vault: &Vault, holder: &Holder, folder: Option<&Path>) -> Result<Self, VaultError> {
        let lease = match vault.writable() {
            Err(_) => None,
            Ok(()) => match Lease::begin(vault, holder).await {
                Ok(lease) => Some(lease),
                Err(VaultError::Backend(error)) if error.kind == BackendErrorKind::Denied => None,
                Err(error) => return Err(error),
            },
        };
        let listed = async {
            crate::features::check_reader(vault).await?;
            let index = Arc::new(Index::load(vault, folder).await?);
            Ok((index, Backups::load(vault, None).await?))
        };
        match Box::pin(listed).await {
            Ok((index, backups)) => {
                Ok(Self { vault: vault.clone(), backups, index, folder: folder.map(Path::to_owned), lease })
            }
            Err(error) => {
                if let Some(lease) = lease {
                    lease.end().await?;
                }
                Err(error)
            }
        }
    }

    /// Ends its lease.
    ///
    /// # Errors
    /// What its backend could not do.
    pub async fn close(self) -> Result<(), VaultError> {
        match self.lease {
            Some(lease) => lease.end().await,
            None => Ok(()),
        }
    }

    fn candidates(&self, wanted: &Wanted) -> Vec<Image> {
        let image = |manifest: &Manifest| {
            let images = manifest.images();
            images
                .iter()
                .find(|(name, kind, _)| *name == wanted.image && *kind == wanted.kind)
                .map(|one| *one.2)
        };
        let mut near: Vec<(bool, jiff::SignedDuration, Image)> = self
            .backups
            .iter()
            .filter(|(_, backup)| backup.domain == wanted.domain)
            .filter_map(|(id, backup)| {
                let manifest = backup.manifest.as_ref().ok()?;
                let apart = manifest.taken.duration_since(wanted.taken).abs();
                Some((id != wanted.backup, apart, image(manifest)?))
            })
            .collect();
        near.sort_by_key(|(other, apart, _)| (*other, *apart));
        let mut images: Vec<Image> = near.into_iter().map(|(_, _, image)| image).collect();
        // Neighbours without a change between them are the same.
        let mut seen = std::collections::HashSet::new();
        images.retain(|image| seen.insert(image.root));
        images.truncate(1 + NEIGHBOURS);
        images
    }
}

#[async_trait]
impl Donor for OtherVault {
    fn name(&self) -> String {
        format!("the vault {} at {}", self.vault.id(), self.vault.backend().place())
    }

    async fn images(&self, wanted: &Wanted) -> Result<Vec<Arc<dyn Plain>>, VaultError> {
        let ids = self.vault.ids(wanted.domain);
        let (index, report) = (self.index.clone(), self.lease.is_some());
        let fetcher = Arc::new(Fetcher::new(&self.vault, ids, index, self.folder.clone(), report));
        let plain = |image: Image| -> Arc<dyn Plain> {
            let known = Mutex::new((u64::MAX, HashMap::new()));
            Arc::new(Stored { fetcher: fetcher.clone(), kind: wanted.kind, image, known })
        };
        Ok(self.candidates(wanted).into_iter().map(plain).collect())
    }
}

/// An image in a vault.
struct Stored {
    fetcher: Arc<Fetcher>,
    kind: BlobType,
    image: Image,
    /// What the lowest node says that was read last: the chunks below it, those that could not be named with nothing.
    known: Mutex<(u64, HashMap<u64, Option<BlobId>>)>,
}

#[async_trait]
impl Plain for Stored {
    async fn chunk(&self, at: u64) -> Result<Option<Bytes>, VaultError> {
        let total = chunks(self.image.size);
        if at >= total {
            return Ok(None);
        }
        let window = at / SLOTS as u64;
        let mut known = self.known.lock().await;
        if known.0 != window {
            let first = window * SLOTS as u64;
            let range = first..(first + SLOTS as u64).min(total);
            let leaves = leaves(&self.fetcher, self.image.tree(), range).await?;
            let mut chunks: HashMap<u64, Option<BlobId>> =
                leaves.chunks.into_iter().map(|(at, id)| (at, Some(id))).collect();
            chunks.extend(leaves.lost.into_iter().flatten().map(|at| (at, None)));
            *known = (window, chunks);
        }
        let id = known.1.get(&at).copied();
        drop(known);
        match id {
            None => Ok(Some(Bytes::from(vec![0; CHUNK as usize]))),
            Some(None) => Ok(None),
            Some(Some(id)) => match self.fetcher.chunk(self.kind, id).await {
                Ok(plain) => Ok(Some(plain.into())),
                Err(VaultError::Lost { .. }) => Ok(None),
                Err(error) => Err(error),
            },
        }
    }
}

//! An image of the vault that is copied from, as what a backup is written from: in its own order, read ahead.
//!
//! Chunks are read in the order of packs within a batch of 32 MiB. Two batches are in memory: the one that is being read, and
//! the one that waits to be written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::blob::BlobType;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::BlobId;
use crate::keys::IdKeys;
use crate::leaves::{Beside, leaves_beside};
use crate::manifest::Image;
use crate::read::{self, ReadReport, Sink, bytes_of};
use crate::tree::{Tree, chunks};
use crate::vault::Vault;
use crate::write::{Extent, Source};

/// Chunks whose ids are in memory at once: 16 GiB of the image.
const WINDOW: u64 = 1 << 18;
/// Chunks that are read at once.
const BATCH: usize = 512;

/// An image that is to be read.
pub(super) struct Original {
    pub(super) vault: Vault,
    pub(super) ids: IdKeys,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) kind: BlobType,
    pub(super) image: Image,
    /// Another image, and the ranges of chunks that are read although it has them: what else it has is unchanged.
    pub(super) beside: Option<(Tree, Vec<Range<u64>>)>,
}

type Part = Result<Option<(u64, Extent)>, VaultError>;

/// An image that is being read.
pub(super) struct Reading {
    parts: mpsc::Receiver<Part>,
    ended: bool,
    /// Ends with this.
    _task: JoinSet<()>,
    /// Why it could not be read to its end.
    pub(super) failed: Option<VaultError>,
}

impl Original {
    pub(super) fn read(self) -> Reading {
        let (to, parts) = mpsc::channel(BATCH);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let last = Box::pin(self.tell(&to)).await.map(|()| None);
            // Without anybody who listens there is nobody to be told.
            drop(to.send(last).await);
        });
        Reading { parts, ended: false, _task: task, failed: None }
    }

    async fn tell(&self, to: &mpsc::Sender<Part>) -> Result<(), VaultError> {
        let total = chunks(self.image.size);
        for start in (0..total).step_by(WINDOW as usize) {
            let window = start..(start + WINDOW).min(total);
            let beside = self.beside.as_ref().map(|(tree, but)| Beside { tree: *tree, but });
            let found =
                Box::pin(leaves_beside(&self.fetcher, self.image.tree(), beside, window.clone())).await?;
            self.nothing_is(found.lost.into_iter().map(|lost| bytes_of(self.image.size, lost)).collect())?;
            let mut same = found.same.into_iter().peekable();
            let mut at = window.start;
            for batch in found.chunks.chunks(BATCH) {
                let mut read = Box::pin(self.chunks(batch)).await?;
                for (chunk, _) in batch {
                    while let Some(range) = same.next_if(|range| range.start < *chunk) {
                        self.part(to, at..range.start, Extent::Zero).await;
                        at = range.end;
                        self.part(to, range, Extent::Unchanged).await;
                    }
                    self.part(to, at..*chunk, Extent::Zero).await;
                    at = chunk + 1;
                    let offset = chunk * u64::from(CHUNK);
                    let Some(bytes) = read.remove(&offset) else {
                        return Err(VaultError::Contract(format!("chunk {chunk} was neither read nor lost")));
                    };
                    drop(to.send(Ok(Some((offset, Extent::Data(bytes))))).await);
                }
            }
            for range in same {
                self.part(to, at..range.start, Extent::Zero).await;
                at = range.end;
                self.part(to, range, Extent::Unchanged).await;
            }
            self.part(to, at..window.end, Extent::Zero).await;
        }
        Ok(())
    }

    /// Tells of chunks without reading them.
    async fn part(&self, to: &mpsc::Sender<Part>, chunks: Range<u64>, what: fn(u64) -> Extent) {
        let bytes = bytes_of(self.image.size, chunks);
        if !bytes.is_empty() {
            drop(to.send(Ok(Some((bytes.start, what(bytes.end - bytes.start))))).await);
        }
    }

    async fn chunks(&self, batch: &[(u64, BlobId)]) -> Result<BTreeMap<u64, Bytes>, VaultError> {
        let (mut gathered, mut report) = (Gathered::default(), ReadReport::default());
        let Self { vault, ids, fetcher, kind, image, .. } = self;
        let size = image.size;
        read::read_chunks(vault, ids, fetcher, *kind, size, batch.to_vec(), &mut gathered, &mut report)
            .await?;
        self.nothing_is(report.lost)?;
        Ok(gathered.0)
    }

    /// Ranges of bytes that are lost are an error.
    fn nothing_is(&self, mut lost: Vec<Range<u64>>) -> Result<(), VaultError> {
        lost.sort_by_key(|range| range.start);
        let Some(first) = lost.first() else { return Ok(()) };
        let first = format!("bytes {}..{} of an image of {}", first.start, first.end, self.image.size);
        let lost = lost.iter().map(|range| (range.end - range.start).div_ceil(u64::from(CHUNK))).sum();
        Err(VaultError::Lost { lost, first })
    }
}

#[async_trait]
impl Source for Reading {
    async fn next(&mut self) -> std::io::Result<Option<(u64, Extent)>> {
        if self.ended {
            return Ok(None);
        }
        let error = match self.parts.recv().await {
            Some(Ok(part)) => {
                self.ended = part.is_none();
                return Ok(part);
            }
            Some(Err(error)) => error,
            None => VaultError::Contract("the reading of an image ended before the image".into()),
        };
        let told = std::io::Error::other(error.to_string());
        self.failed = Some(error);
        Err(told)
    }
}

/// Chunks by their offset.
#[derive(Default)]
struct Gathered(BTreeMap<u64, Bytes>);

#[async_trait]
impl Sink for Gathered {
    async fn write(&mut self, offset: u64, bytes: Bytes) -> std::io::Result<()> {
        self.0.insert(offset, bytes);
        Ok(())
    }

    async fn zero(&mut self, offset: u64, length: u64) -> std::io::Result<()> {
        self.0.insert(offset, vec![0; length as usize].into());
        Ok(())
    }
}

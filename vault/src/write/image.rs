//! Writing one image: read, hash, compare with the parent, ask the index, code, put.
//!
//! Hashing and coding run on blocking threads, several batches at once, and come back in order; in between, one task decides.
//! Batches bound what is in memory.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::Session;
use super::extents::{Cutter, Item, Source};
use super::store::Store;
use crate::blob::{self, BlobType, Encoded};
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::BlobId;
use crate::index::Index;
use crate::keys::{IdKeys, KeyError, Keys};
use crate::manifest::Image;
use crate::tree::{self, Finished, Tree, TreeWriter, chunks};

/// Chunks of a batch: 2 MiB.
pub(super) const BATCH: usize = 32;
/// A chunk of zeroes.
static ZEROES: [u8; CHUNK as usize] = [0; CHUNK as usize];
/// Batches that are hashed at once, and that are coded at once.
pub(super) const AT_ONCE: usize = 4;

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its tree and root.
    pub image: Image,
    /// Bytes that the source gave as data.
    pub read: u64,
    /// Bytes of chunks that were new.
    pub new: u64,
    /// Bytes that were put for them, compressed, with headers and nodes, without tables and index.
    pub stored: u64,
    /// Nodes that were put, of them as patches.
    pub nodes: (u64, u64),
}

pub(super) type Hashed = Vec<(Item, BlobId)>;
type Coding = JoinHandle<Result<Vec<Encoded>, KeyError>>;

impl Session {
    /// Writes an image from a source. `kind` is what its chunks are: of a disk, or of a stream. With a parent, extents may
    /// be unchanged: up to its size, or, where sizes differ, up to the last whole chunk of both.
    ///
    /// # Errors
    /// [`VaultError::Lost`] if a node of the parent's cannot be read: the image must be written without, in another session.
    /// What the source or the backend could not do. No backup can be made of this session any more then: what it has taken
    /// on and not put would be missing.
    pub async fn write_image(
        &mut self,
        source: &mut dyn Source,
        size: u64,
        kind: BlobType,
        parent: Option<Tree>,
    ) -> Result<Written, VaultError> {
        if !matches!(kind, BlobType::Data | BlobType::Stream) {
            return Err(VaultError::Contract("an image consists of chunks".into()));
        }
        if parent.is_none() && self.index.is_worth_warming(chunks(size)) {
            Box::pin(self.index.warm()).await?;
        }
        let torn = std::mem::replace(&mut self.torn, true);
        let ids = self.ids.clone();
        let Self { index, store, fetcher, bad, vault, .. } = self;
        let (index, fetcher, bad): (&Index, &Fetcher, _) = (index, fetcher, &*bad);
        let unchanged_to = parent.map_or(0, |parent| tree::unchanged_to(parent, size));
        let mut work = Work {
            index,
            store,
            fetcher,
            keys: vault.keys().clone(),
            coding: VecDeque::new(),
            written: Written {
                image: Image::new(&ids, kind, Tree { size, top: BlobId::ZERO }),
                read: 0,
                new: 0,
                stored: 0,
                nodes: (0, 0),
            },
        };
        let mut tree = TreeWriter::new(ids.clone(), fetcher, size, parent);
        let mut cutter = Cutter::new(source, size);
        let mut hashing: VecDeque<JoinHandle<Hashed>> = VecDeque::new();
        let mut ended = false;
        loop {
            while !ended && hashing.len() < AT_ONCE {
                let items = cutter.batch(BATCH).await?;
                ended = items.is_empty();
                let ids = ids.clone();
                hashing.push_back(crate::tasks::blocking(move || hash(&ids, kind, items)));
            }
            let Some(next) = hashing.pop_front() else { break };
            let mut new = Vec::new();
            for (item, id) in next.await? {
                match item {
                    Item::Unchanged(chunk, count) => {
                        if chunk + count > unchanged_to {
                            let what = format!("chunk {} is not in the parent", chunk + count - 1);
                            return Err(VaultError::Contract(what));
                        }
                    }
                    Item::Zero(chunk, count) => tree.zero(chunk, count).await?,
                    Item::Chunk(chunk, bytes) => {
                        work.written.read += bytes.len() as u64;
                        // With the leaf as it is, nothing is to be asked; but for a chunk with a damaged place, which the
                        // index must vouch for.
                        if parent.is_some() && tree.leaf(chunk).await? == id && !bad.contains(&id) {
                            continue;
                        }
                        tree.set(chunk, id).await?;
                        let there = id.is_zero()
                            || work.store.has(id)
                            || work.index.usable(kind, id).await?.is_some();
                        if !there && work.store.claim(id) {
                            work.written.new += bytes.len() as u64;
                            new.push((id, bytes));
                        }
                    }
                }
            }
            let keys = work.keys.clone();
            let code =
                move || new.iter().map(|(id, bytes)| blob::encode(&keys, kind, false, *id, bytes)).collect();
            Box::pin(work.push(crate::tasks::blocking(code))).await?;
            let finished = tree.take_finished();
            Box::pin(work.nodes(finished)).await?;
        }
        let made = tree.finish().await?;
        let finished = tree.take_finished();
        Box::pin(work.nodes(finished)).await?;
        work.drain().await?;
        work.written.image = Image::new(&ids, kind, made);
        let written = work.written;
        self.torn = torn;
        Ok(written)
    }
}

pub(super) fn hash(ids: &IdKeys, kind: BlobType, items: Vec<Item>) -> Hashed {
    let one = |item: Item| {
        let id = match &item {
            Item::Chunk(_, bytes) if bytes[..] != ZEROES => ids.id(kind, bytes),
            _ => BlobId::ZERO,
        };
        (item, id)
    };
    items.into_iter().map(one).collect()
}

struct Work<'a> {
    index: &'a Index,
    store: &'a mut Store,
    fetcher: &'a Fetcher,
    keys: Arc<Keys>,
    coding: VecDeque<Coding>,
    written: Written,
}

impl Work<'_> {
    /// Takes in what is being coded; waits for the first of many.
    async fn push(&mut self, coding: Coding) -> Result<(), VaultError> {
        self.coding.push_back(coding);
        while self.coding.len() > AT_ONCE {
            self.add_first().await?;
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), VaultError> {
        while !self.coding.is_empty() {
            self.add_first().await?;
        }
        Ok(())
    }

    async fn add_first(&mut self) -> Result<(), VaultError> {
        let Some(first) = self.coding.pop_front() else { return Ok(()) };
        for blob in first.await?? {
            self.written.stored += (blob::HEADER + blob.stored.len()) as u64;
            self.store.add(&blob).await?;
        }
        Ok(())
    }

    /// Puts nodes that are finished: full, or as a patch of the parent's.
    async fn nodes(&mut self, finished: Vec<Finished>) -> Result<(), VaultError> {
        let mut new = Vec::new();
        for Finished { id, node, before } in finished {
            if self.store.has(id) || self.node_is_usable(node.level, id).await? {
                continue;
            }
            let kind = BlobType::Node(node.level);
            let mut patch = None;
            if let Some(before) = &before {
                let (base, full) = before.full();
                let used = node.slots.iter().filter(|slot| !slot.is_zero()).count();
                // Zero slots cost next to nothing in a full node.
                let made = node.patch_of(base, full).filter(|patch| patch.pairs.len() + 1 < used);
                let usable = self.index.usable(kind, base).await?;
                patch = made.filter(|_| usable.is_some_and(|place| !place.coding.is_patch()));
            }
            if self.store.claim(id) {
                self.written.nodes.0 += 1;
                self.written.nodes.1 += u64::from(patch.is_some());
                let plain = patch.as_ref().map_or_else(|| node.encode(), |patch| patch.encode());
                new.push((kind, patch.is_some(), id, plain));
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let keys = self.keys.clone();
        let code = move || {
            new.iter()
                .map(|(kind, patch, id, plain)| blob::encode(&keys, *kind, *patch, *id, plain))
                .collect()
        };
        self.push(crate::tasks::blocking(code)).await
    }

    /// Whether a node may be reused: a patch only with its base.
    async fn node_is_usable(&self, level: u8, id: BlobId) -> Result<bool, VaultError> {
        let kind = BlobType::Node(level);
        for found in self.index.find(kind, id).await? {
            if !found.usable {
                break;
            }
            if !found.place.coding.is_patch() {
                return Ok(true);
            }
            if let Some(base) = self.fetcher.base_of(id, found.place).await? {
                let place = self.index.usable(kind, base).await?;
                if place.is_some_and(|place| !place.coding.is_patch()) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

//! Walking the trees of backups to see whether everything that they need has a good place.
//!
//! What a good place is differs: a check wants one whose pack is there and that nobody found bad; settling wants one that
//! collections will keep. Subtrees that were found whole are not walked again, so the walk over many backups goes with what
//! differs between them.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::backups::Hurt;
use crate::blob::BlobType;
use crate::envelope::fixed;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::{BlobId, LeaseId, PackId};
use crate::index::Found;
use crate::index::run::Place;
use crate::index::tidings::BadPlace;
use crate::manifest::Manifest;
use crate::names::ObjectName;
use crate::node::SLOTS;
use crate::tree::{chunks, span, top_level};
use crate::vault::Vault;

/// The most subtrees that are remembered as whole: 16 bytes each, and what the set adds.
pub(crate) const REMEMBERED: usize = 1 << 20;

/// Half an id: no two of a vault have it in common.
pub(crate) fn half(id: BlobId) -> [u8; 16] {
    fixed(&id.bytes()[..16])
}

/// What a good place is.
pub(crate) enum Judge {
    /// One in a pack that was listed, and that is not in `damage/`. Of a pack that was read and whose seal does not fit, only
    /// what was found good.
    Readable(HashSet<PackId>, HashMap<PackId, HashSet<(u32, BlobId)>>),
    /// One that is not in `damage/`, in a pack that was listed and will not be deleted. Whether a run that counts names it is no
    /// matter: a collector gives it one.
    Lasting(HashSet<PackId>),
    /// One that a writer may reuse, or that lies in a pack of this lease that is there and not condemned.
    Kept(LeaseId),
}

/// A walk over trees.
pub(crate) struct Walk<'a> {
    vault: &'a Vault,
    fetcher: &'a Fetcher,
    judge: Judge,
    whole: HashSet<[u8; 16]>,
    there: Mutex<HashMap<PackId, bool>>,
    bad: Mutex<HashSet<BadPlace>>,
}

/// What one image lacks.
#[derive(Default)]
struct Lacks {
    chunks: Vec<Range<u64>>,
    open_ended: bool,
}

impl Lacks {
    fn add(&mut self, range: Range<u64>) {
        match self.chunks.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.chunks.push(range),
        }
    }
}

impl<'a> Walk<'a> {
    pub(crate) fn new(vault: &'a Vault, fetcher: &'a Fetcher, judge: Judge) -> Self {
        Self { vault, fetcher, judge, whole: HashSet::new(), there: Mutex::default(), bad: Mutex::default() }
    }

    /// Places that were found bad or missing since the last call.
    pub(crate) fn take_bad(&self) -> Vec<BadPlace> {
        std::mem::take(&mut *self.bad.lock().unwrap_or_else(PoisonError::into_inner)).into_iter().collect()
    }

    /// What a backup lacks; nothing if it is whole.
    ///
    /// # Errors
    /// What the backend could not do.
    pub(crate) async fn backup(&mut self, manifest: &Manifest) -> Result<Vec<Hurt>, VaultError> {
        let mut hurt = Vec::new();
        for (name, leaves, image) in manifest.images() {
            let mut lacks = Lacks::default();
            let level = top_level(image.size);
            self.subtree(leaves, level, 0, image.top, chunks(image.size), &mut lacks).await?;
            if lacks.chunks.is_empty() {
                continue;
            }
            let edge = |chunk: u64| chunk.saturating_mul(u64::from(CHUNK)).min(image.size);
            hurt.push(Hurt {
                image: name.to_owned(),
                ranges: lacks.chunks.iter().map(|range| (edge(range.start), edge(range.end))).collect(),
                open_ended: lacks.open_ended,
            });
        }
        Ok(hurt)
    }

    /// Whether everything in a subtree is there.
    async fn subtree(
        &mut self,
        leaves: BlobType,
        level: u8,
        first: u64,
        id: BlobId,
        total: u64,
        lacks: &mut Lacks,
    ) -> Result<bool, VaultError> {
        if id.is_zero() || self.whole.contains(&half(id)) {
            return Ok(true);
        }
        let covers = first..first.saturating_add(span(level).saturating_mul(SLOTS as u64)).min(total);
        let kind = BlobType::Node(level);
        let mut whole = self.is_good(kind, id).await?;
        let node = match self.fetcher.stored_node(level, id).await {
            Ok(stored) => stored.node,
            Err(VaultError::Lost { .. }) => {
                lacks.add(covers);
                lacks.open_ended = true;
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        if !whole {
            // It can be read, and what is below can be named; but it must be put again.
            lacks.add(covers.clone());
        }
        for (at, slot) in node.slots.iter().enumerate() {
            if slot.is_zero() {
                continue;
            }
            let place = first + at as u64 * span(level);
            if level > 0 {
                whole &= Box::pin(self.subtree(leaves, level - 1, place, *slot, total, lacks)).await?;
            } else if !self.is_good(leaves, *slot).await? {
                whole = false;
                if lacks.chunks.last().is_none_or(|last| last.end <= place) {
                    lacks.add(place..place + 1);
                }
            }
        }
        if whole {
            if self.whole.len() >= REMEMBERED {
                self.whole.clear();
            }
            self.whole.insert(half(id));
        }
        Ok(whole)
    }

    /// Whether a blob has a good place; one that is a patch, with its base.
    pub(crate) async fn is_good(&self, kind: BlobType, id: BlobId) -> Result<bool, VaultError> {
        let index = self.fetcher.index();
        for found in index.find(kind, id).await? {
            if !self.is_good_place(id, &found).await? {
                continue;
            }
            if !found.place.coding.is_patch() {
                return Ok(true);
            }
            let Some(base) = self.fetcher.base_of(id, found.place).await? else { continue };
            for found in index.find(kind, base).await? {
                if !found.place.coding.is_patch() && self.is_good_place(base, &found).await? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    async fn is_good_place(&self, id: BlobId, found: &Found) -> Result<bool, VaultError> {
        let index = self.fetcher.index();
        let place = &found.place;
        if index.is_damaged(id, place) {
            return Ok(false);
        }
        match &self.judge {
            Judge::Readable(packs, broken) => {
                let sound = broken.get(&place.pack).is_none_or(|good| good.contains(&(place.offset, id)));
                self.is_there_and(packs, sound, id, place).await
            }
            Judge::Lasting(_) if index.is_condemned(place.pack) => Ok(false),
            Judge::Lasting(packs) => self.is_there_and(packs, true, id, place).await,
            Judge::Kept(_) if found.usable => Ok(true),
            Judge::Kept(lease) if place.pack.lease() != *lease || index.is_condemned(place.pack) => Ok(false),
            Judge::Kept(_) => self.is_there(&place.object(), place.pack).await,
        }
    }

    /// Whether a place's pack is there, and it is sound as well; one of which that is not so is remembered.
    async fn is_there_and(
        &self,
        packs: &HashSet<PackId>,
        sound: bool,
        id: BlobId,
        place: &Place,
    ) -> Result<bool, VaultError> {
        // One that the list lacks is asked for by name before it is called missing.
        let there = packs.contains(&place.pack) || self.is_there(&place.object(), place.pack).await?;
        if !there || !sound {
            let bad = BadPlace { pack: place.pack, offset: place.offset, id };
            self.bad.lock().unwrap_or_else(PoisonError::into_inner).insert(bad);
        }
        Ok(there && sound)
    }

    async fn is_there(&self, object: &ObjectName, pack: PackId) -> Result<bool, VaultError> {
        if let Some(there) = self.there.lock().unwrap_or_else(PoisonError::into_inner).get(&pack) {
            return Ok(*there);
        }
        let there = self.vault.backend().get(&object.to_string(), Some(0..1)).await?.is_some();
        self.there.lock().unwrap_or_else(PoisonError::into_inner).insert(pack, there);
        Ok(there)
    }
}

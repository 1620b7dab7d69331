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
use crate::check::Readings;
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

/// The packs that were listed, with their sizes in bytes.
pub(crate) type Packs = HashMap<PackId, u64>;

/// What a good place is.
pub(crate) enum Judge {
    /// One in a pack that was listed and is long enough, and that is not in `damage/`. Of a pack that was read and whose seal does
    /// not fit, only what was found good.
    Readable(Packs, HashMap<PackId, HashSet<(u32, BlobId)>>),
    /// One that is not in `damage/`, in a pack that was listed, is long enough and will not be deleted. Whether a run that counts
    /// names it is no matter: a collector gives it one.
    Lasting(Packs),
    /// One that a writer may reuse, or that lies in a pack of this lease that is there and not condemned.
    Kept(LeaseId),
}

/// A walk over trees.
pub(crate) struct Walk<'a> {
    vault: &'a Vault,
    fetcher: &'a Fetcher,
    judge: Judge,
    readings: Option<&'a Readings>,
    /// Subtrees in which nothing is bad, with the oldest of the runs that read the packs of them.
    whole: HashMap<[u8; 16], u64>,
    packs: Mutex<HashSet<PackId>>,
    /// The sizes of packs that the list lacks; nothing of those that are not there.
    there: Mutex<HashMap<PackId, Option<u64>>>,
    bad: Mutex<HashSet<BadPlace>>,
}

/// What a walk through a backup found.
#[derive(Debug)]
pub(crate) struct Walked {
    /// What it lacks.
    pub(crate) hurt: Vec<Hurt>,
    /// Every blob of it has a good place in a pack that this run or a later one has read; 0 if one has not, or nothing was
    /// read. Of nothing, it is whatever one likes.
    pub(crate) oldest: u64,
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
        Self {
            vault,
            fetcher,
            judge,
            readings: None,
            whole: HashMap::new(),
            packs: Mutex::default(),
            there: Mutex::default(),
            bad: Mutex::default(),
        }
    }

    /// The same, that also tells when what it found was read.
    pub(crate) fn with_readings(self, readings: Option<&'a Readings>) -> Self {
        Self { readings, ..self }
    }

    /// The packs of all good places that it came by.
    pub(crate) fn packs(self) -> HashSet<PackId> {
        self.packs.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places that were found bad or missing since the last call.
    pub(crate) fn take_bad(&self) -> Vec<BadPlace> {
        std::mem::take(&mut *self.bad.lock().unwrap_or_else(PoisonError::into_inner)).into_iter().collect()
    }

    /// What a backup lacks, and since when the rest of it has been read.
    ///
    /// # Errors
    /// What the backend could not do.
    pub(crate) async fn backup(&mut self, manifest: &Manifest) -> Result<Walked, VaultError> {
        let (mut hurt, mut oldest) = (Vec::new(), u64::MAX);
        for (name, leaves, image) in manifest.images() {
            let mut lacks = Lacks::default();
            let level = top_level(image.size);
            let read = self.subtree(leaves, level, 0, image.top, chunks(image.size), &mut lacks).await?;
            oldest = oldest.min(read.unwrap_or(0));
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
        Ok(Walked { hurt, oldest })
    }

    /// The oldest run that read anything in a subtree; nothing, if not everything in it is there.
    async fn subtree(
        &mut self,
        leaves: BlobType,
        level: u8,
        first: u64,
        id: BlobId,
        total: u64,
        lacks: &mut Lacks,
    ) -> Result<Option<u64>, VaultError> {
        if id.is_zero() {
            return Ok(Some(u64::MAX));
        }
        if let Some(read) = self.whole.get(&half(id)) {
            return Ok(Some(*read));
        }
        let covers = first..first.saturating_add(span(level).saturating_mul(SLOTS as u64)).min(total);
        let kind = BlobType::Node(level);
        let mut oldest = self.last_read(kind, id).await?;
        let node = match self.fetcher.stored_node(level, id).await {
            Ok(stored) => stored.node,
            Err(VaultError::Lost { .. }) => {
                lacks.add(covers);
                lacks.open_ended = true;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if oldest.is_none() {
            // It can be read, and what is below can be named; but it must be put again.
            lacks.add(covers.clone());
        }
        for (at, slot) in node.slots.iter().enumerate() {
            if slot.is_zero() {
                continue;
            }
            let place = first + at as u64 * span(level);
            let read = if level > 0 {
                Box::pin(self.subtree(leaves, level - 1, place, *slot, total, lacks)).await?
            } else {
                let read = self.last_read(leaves, *slot).await?;
                if read.is_none() && lacks.chunks.last().is_none_or(|last| last.end <= place) {
                    lacks.add(place..place + 1);
                }
                read
            };
            oldest = oldest.zip(read).map(|(oldest, read)| oldest.min(read));
        }
        if let Some(oldest) = oldest {
            if self.whole.len() >= REMEMBERED {
                self.whole.clear();
            }
            self.whole.insert(half(id), oldest);
        }
        Ok(oldest)
    }

    /// Whether a blob has a good place; one that is a patch, with its base.
    pub(crate) async fn is_good(&self, kind: BlobType, id: BlobId) -> Result<bool, VaultError> {
        Ok(self.last_read(kind, id).await?.is_some())
    }

    /// The last run that read a good place of a blob, 0 if none did; nothing, if it has no good place. Of a patch that counts
    /// which came first: its own reading, or that of its base.
    async fn last_read(&self, kind: BlobType, id: BlobId) -> Result<Option<u64>, VaultError> {
        let index = self.fetcher.index();
        let mut last = None;
        for found in index.find(kind, id).await? {
            if !self.is_good_place(id, &found).await? {
                continue;
            }
            let mut read = self.note(found.place.pack);
            if found.place.coding.is_patch() {
                let Some(base) = self.fetcher.base_of(id, found.place).await? else { continue };
                let mut of_base = None;
                for found in index.find(kind, base).await? {
                    if !found.place.coding.is_patch() && self.is_good_place(base, &found).await? {
                        of_base = of_base.max(Some(self.note(found.place.pack)));
                    }
                }
                let Some(of_base) = of_base else { continue };
                read = read.min(of_base);
            }
            last = last.max(Some(read));
            if self.readings.is_none() {
                break;
            }
        }
        Ok(last)
    }

    /// A good place in this pack: the last run that read it.
    fn note(&self, pack: PackId) -> u64 {
        self.packs.lock().unwrap_or_else(PoisonError::into_inner).insert(pack);
        self.readings.map_or(0, |readings| readings.last(pack))
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
            Judge::Kept(_) => Ok(self.size(&place.object(), place.pack).await?.is_some()),
        }
    }

    /// Whether a place's pack is there up to the place's end, and it is sound as well; one of which that is not so is remembered.
    async fn is_there_and(
        &self,
        packs: &Packs,
        sound: bool,
        id: BlobId,
        place: &Place,
    ) -> Result<bool, VaultError> {
        // One that the list lacks is asked for by name before it is called missing.
        let size = match packs.get(&place.pack) {
            Some(size) => Some(*size),
            None => self.size(&place.object(), place.pack).await?,
        };
        let there = size.is_some_and(|size| place.range().end <= size);
        if !there || !sound {
            let bad = BadPlace { pack: place.pack, offset: place.offset, id };
            self.bad.lock().unwrap_or_else(PoisonError::into_inner).insert(bad);
        }
        Ok(there && sound)
    }

    async fn size(&self, object: &ObjectName, pack: PackId) -> Result<Option<u64>, VaultError> {
        if let Some(size) = self.there.lock().unwrap_or_else(PoisonError::into_inner).get(&pack) {
            return Ok(*size);
        }
        let listed = self.vault.list(&object.to_string()).await?;
        let mut size = listed.into_iter().find_map(|(name, size)| (name == *object).then_some(size));
        if size.is_none() {
            // A list may lack what was put only just now, and what was missing must be missing.
            let bytes = self.vault.backend().get(&object.to_string(), None).await?;
            size = bytes.map(|bytes| bytes.len() as u64);
        }
        self.there.lock().unwrap_or_else(PoisonError::into_inner).insert(pack, size);
        Ok(size)
    }
}

//! A run of the index: where blobs are, sorted by id (`FORMAT.md`, §3).
//!
//! ```text
//! blocks of nodes | blocks of chunks | blocks of packs | foot | place of the foot u64, its length u64
//! ```
//!
//! Blocks and foot are boxes; their numbers are associated data, the foot's is the highest. All blocks of a sort but the
//! last are full, so the foot's counts tell where each is. The foot holds the first eight bytes of each block's first id:
//! a look-up reads one block, or two.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::cached::Cached;
use super::filter::Filter;
use crate::blob::{self, BlobType, Coding};
use crate::envelope::{self, Envelope, HEAD, TAIL, fixed};
use crate::error::VaultError;
use crate::ids::{BlobId, PackId, RunId};
use crate::keys::Keys;
use crate::names::{Area, ObjectName};
use crate::pack;
use crate::vault::Vault;

/// The most blobs of a run. What is merged into more is cut into several, of which the last names those that are replaced.
pub const MOST_ENTRIES: usize = 1 << 20;
const ENTRY: usize = 46;
/// Entries of a block.
pub const PER_BLOCK: u64 = 89;
/// Blocks that are fetched at once when all are: 4 MiB.
const FETCHED: u64 = 1000;
const PACK: usize = 25;
const PACKS_PER_BLOCK: u64 = 163;
const FOOT_BLOCK: u64 = u64::MAX;
const END: usize = 16 + TAIL;

/// Where a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// What the pack holds.
    pub area: Area,
    /// The pack.
    pub pack: PackId,
    /// Where the blob's header begins, from the beginning of the object.
    pub offset: u32,
    /// Stored bytes, without the header.
    pub stored: u32,
    /// Its type.
    pub kind: BlobType,
    /// How it is coded.
    pub coding: Coding,
}

impl Place {
    /// Where it is, as a pack's table tells it.
    #[must_use]
    pub fn new(area: Area, pack: PackId, entry: &pack::Entry) -> Self {
        Self {
            area,
            pack,
            offset: entry.offset,
            stored: entry.stored,
            kind: entry.kind,
            coding: entry.coding,
        }
    }

    /// The object that it is in.
    #[must_use]
    pub fn object(&self) -> ObjectName {
        ObjectName::Pack(self.area, self.pack)
    }

    /// The bytes of the object with header and all that is stored.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        let start = u64::from(self.offset);
        start..start + blob::HEADER as u64 + u64::from(self.stored)
    }
}

#[derive(Clone, Copy)]
struct Entry {
    id: BlobId,
    pack: u32,
    offset: u32,
    stored: u32,
    kind: BlobType,
    coding: Coding,
}

impl Entry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.id.bytes());
        for number in [self.pack, self.offset, self.stored] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&[self.kind.code(), self.coding.code()]);
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| u32::from_le_bytes(fixed(&bytes[at..at + 4]));
        Some(Self {
            id: BlobId::new(fixed(&bytes[..32])),
            pack: number(32),
            offset: number(36),
            stored: number(40),
            kind: BlobType::parse(bytes[44])?,
            coding: Coding::parse(bytes[45])?,
        })
    }
}

/// What will be a run.
#[derive(Default)]
pub struct RunDraft {
    entries: Vec<Entry>,
    packs: Vec<(Area, PackId)>,
    /// The runs that it takes the place of.
    pub replaces: Vec<RunId>,
    /// Runs that are void wherever and whenever they turn up.
    pub lost: Vec<RunId>,
}

impl RunDraft {
    /// One that names no blob yet.
    #[must_use]
    pub fn new(replaces: Vec<RunId>, lost: Vec<RunId>) -> Self {
        Self { entries: Vec::new(), packs: Vec::new(), replaces, lost }
    }

    /// Takes in the blobs of a pack that is durable.
    pub fn add_pack(&mut self, area: Area, pack: PackId, blobs: &[pack::Entry]) {
        // A run has at most a million entries, so packs as well.
        let number = self.packs.len() as u32;
        self.packs.push((area, pack));
        self.entries.extend(blobs.iter().map(|entry| Entry {
            id: entry.id,
            pack: number,
            offset: entry.offset,
            stored: entry.stored,
            kind: entry.kind,
            coding: entry.coding,
        }));
    }

    /// Takes in what another run says.
    pub fn add_places(&mut self, places: &[(BlobId, Place)], numbers: &mut HashMap<PackId, u32>) {
        for (id, place) in places {
            let number = *numbers.entry(place.pack).or_insert_with(|| {
                self.packs.push((place.area, place.pack));
                self.packs.len() as u32 - 1
            });
            let Place { offset, stored, kind, coding, .. } = *place;
            self.entries.push(Entry { id: *id, pack: number, offset, stored, kind, coding });
        }
    }

    /// Blobs in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has nothing to say.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.replaces.is_empty() && self.lost.is_empty()
    }

    /// Ids in it.
    pub fn ids(&self) -> impl Iterator<Item = &BlobId> {
        self.entries.iter().map(|entry| &entry.id)
    }

    /// The object. For blocking threads.
    ///
    /// # Errors
    /// If it is too large, or the kernel has no random bytes.
    pub fn encode(&mut self, keys: &Keys, run: RunId) -> Result<Bytes, VaultError> {
        if self.entries.len() > MOST_ENTRIES {
            return Err(VaultError::Contract("a run of too many blobs".into()));
        }
        let name = ObjectName::Run(run);
        self.entries.sort_unstable_by_key(|entry| (!entry.kind.is_node(), entry.id));
        let nodes = self.entries.partition_point(|entry| entry.kind.is_node());
        let (nodes, data) = self.entries.split_at(nodes);
        let mut envelope =
            Envelope::begin(&name, keys.is_encrypted(), self.entries.len() * (ENTRY + 1) + (64 << 10));
        let mut block = 0;
        let mut prefixes = Vec::new();
        for section in [nodes, data] {
            for entries in section.chunks(PER_BLOCK as usize) {
                let mut plain = Vec::with_capacity(entries.len() * ENTRY);
                entries.iter().for_each(|entry| entry.encode(&mut plain));
                envelope.append(&keys.seal_box(&name, block, &plain)?);
                prefixes.extend_from_slice(&entries[0].id.bytes()[..8]);
                block += 1;
            }
        }
        for packs in self.packs.chunks(PACKS_PER_BLOCK as usize) {
            let mut plain = Vec::with_capacity(packs.len() * PACK);
            for (area, pack) in packs {
                plain.push(u8::from(*area == Area::Tree));
                plain.extend_from_slice(pack.bytes());
            }
            envelope.append(&keys.seal_box(&name, block, &plain)?);
            block += 1;
        }
        let head = Head {
            nodes: nodes.len() as u64,
            data: data.len() as u64,
            packs: self.packs.len() as u64,
            replaces: self.replaces.clone(),
            lost: self.lost.clone(),
        };
        let json = serde_json::to_vec(&head).map_err(|error| VaultError::Contract(error.to_string()))?;
        let plain = [&(json.len() as u32).to_le_bytes()[..], &json, &prefixes].concat();
        let sealed = keys.seal_box(&name, FOOT_BLOCK, &plain)?;
        let at = envelope.append(&sealed) as u64;
        envelope.append(&at.to_le_bytes());
        envelope.append(&(sealed.len() as u64).to_le_bytes());
        Ok(envelope.finish())
    }
}

/// What the foot of a run says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Entries that are nodes.
    pub nodes: u64,
    /// Entries that are chunks.
    pub data: u64,
    /// Packs.
    pub packs: u64,
    /// The runs that it takes the place of.
    pub replaces: Vec<RunId>,
    /// Runs that are void.
    pub lost: Vec<RunId>,
}

impl Head {
    /// The bytes of a block of entries, from the beginning of the object.
    fn block(&self, number: u64, overhead: u64) -> Range<u64> {
        let full = PER_BLOCK * ENTRY as u64 + overhead;
        let node_blocks = self.nodes.div_ceil(PER_BLOCK);
        let section = |entries: u64, number: u64| {
            let here = (entries - number * PER_BLOCK).min(PER_BLOCK);
            number * full..number * full + here * ENTRY as u64 + overhead
        };
        let (base, range) = if number < node_blocks {
            (HEAD as u64, section(self.nodes, number))
        } else {
            let nodes_end = HEAD as u64 + self.nodes * ENTRY as u64 + node_blocks * overhead;
            (nodes_end, section(self.data, number - node_blocks))
        };
        base + range.start..base + range.end
    }

    fn blocks(&self) -> u64 {
        self.nodes.div_ceil(PER_BLOCK) + self.data.div_ceil(PER_BLOCK)
    }

    /// Where the blocks of packs begin.
    fn packs_at(&self, overhead: u64) -> u64 {
        HEAD as u64 + (self.nodes + self.data) * ENTRY as u64 + self.blocks() * overhead
    }

    fn foot_at(&self, overhead: u64) -> u64 {
        self.packs_at(overhead) + self.packs * PACK as u64 + self.packs.div_ceil(PACKS_PER_BLOCK) * overhead
    }
}

/// A run that is read by look-ups.
#[derive(Debug)]
pub struct Run {
    id: RunId,
    size: u64,
    head: Head,
    prefixes: Vec<u64>,
    overhead: u64,
    object: Cached,
    filter: OnceLock<Filter>,
}

impl Run {
    /// Reads the foot of a run that was listed with this size.
    ///
    /// # Errors
    /// If it is damaged or missing, or what the backend could not do.
    pub async fn open(
        vault: &Vault,
        folder: Option<&Path>,
        id: RunId,
        size: u64,
    ) -> Result<Self, VaultError> {
        let name = ObjectName::Run(id);
        let object = Cached::new(vault, name.clone(), folder);
        let wrong = |cause: &str| VaultError::damaged(&name, cause);
        let smallest = (HEAD + END) as u64;
        if size < smallest {
            return Err(wrong("it is cut off"));
        }
        let end = object.fetch(size - END as u64..size).await?;
        envelope::check_tail(size, &end[16..]).map_err(|error| crate::codec::wrong(&name, error))?;
        let number = |at: usize| u64::from_le_bytes(fixed(&end[at..at + 8]));
        let (at, length) = (number(0), number(8));
        if at.checked_add(length).and_then(|end| end.checked_add(END as u64)) != Some(size)
            || at < HEAD as u64
        {
            return Err(wrong("its foot is not where it should be"));
        }
        let foot = object.open_box(FOOT_BLOCK, at..at + length).await?;
        let parse = || {
            let (length, rest) = foot.split_first_chunk::<4>()?;
            let (json, prefixes) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            let head: Head = serde_json::from_slice(json).ok()?;
            let prefixes: Vec<u64> = prefixes
                .chunks(8)
                .map(|eight| Some(u64::from_be_bytes(*eight.first_chunk()?)))
                .collect::<Option<_>>()?;
            let sane = [head.nodes, head.data, head.packs].iter().all(|count| *count <= MOST_ENTRIES as u64);
            (sane && prefixes.len() as u64 == head.blocks()).then_some((head, prefixes))
        };
        let (head, prefixes) = parse().ok_or_else(|| wrong("its foot cannot be"))?;
        let overhead = vault.keys().overhead() as u64;
        if head.foot_at(overhead) != at {
            return Err(wrong("its foot does not fit its length"));
        }
        Ok(Self { id, size, head, prefixes, overhead, object, filter: OnceLock::new() })
    }

    /// Keeps the whole object as the copy on disk.
    ///
    /// # Errors
    /// Only if a task of this program ended.
    pub async fn keep(&self, object: Bytes) -> Result<(), VaultError> {
        self.object.keep(0, object).await
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> RunId {
        self.id
    }

    /// Bytes of the object.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What its foot says.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Blobs in it.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.head.nodes + self.head.data
    }

    /// Whether it may have a blob, as far as memory knows.
    #[must_use]
    pub fn may_have(&self, id: &BlobId) -> bool {
        self.filter.get().is_none_or(|filter| filter.may_have(id))
    }

    /// Gives it a filter of its ids.
    pub fn set_filter(&self, filter: Filter) {
        let _ = self.filter.set(filter);
    }

    /// Whether it has one.
    #[must_use]
    pub fn has_filter(&self) -> bool {
        self.filter.get().is_some()
    }

    /// The places that it tells for a blob.
    ///
    /// # Errors
    /// If a block is damaged, or what the backend could not do.
    pub async fn look_up(&self, id: BlobId, node: bool) -> Result<Vec<Place>, VaultError> {
        if !self.may_have(&id) {
            return Ok(Vec::new());
        }
        let node_blocks = self.head.nodes.div_ceil(PER_BLOCK) as usize;
        let (first, section) = match node {
            true => (0, &self.prefixes[..node_blocks]),
            false => (node_blocks, &self.prefixes[node_blocks..]),
        };
        let prefix = id.prefix();
        // From the last block that begins before it, over all that begin with the same eight bytes.
        let from = section.partition_point(|begin| *begin < prefix).saturating_sub(1);
        let to = section.partition_point(|begin| *begin <= prefix);
        let (mut found, mut places) = (Vec::new(), Vec::new());
        for block in from..to {
            let number = (first + block) as u64;
            let plain = self.object.open_box(number, self.head.block(number, self.overhead)).await?;
            for bytes in plain.chunks_exact(ENTRY).filter(|bytes| bytes.starts_with(id.bytes())) {
                found.push(Entry::decode(bytes).ok_or_else(|| self.wrong("an entry that cannot be"))?);
            }
        }
        for entry in found {
            places.push(self.place(&entry).await?);
        }
        Ok(places)
    }

    /// Blocks of entries; those of nodes come first.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.head.blocks()
    }

    /// All entries of a block, with their places; `packs` are those that the run names.
    ///
    /// # Errors
    /// As [`Self::look_up`].
    pub async fn places(
        &self,
        block: u64,
        packs: &[(Area, PackId)],
    ) -> Result<Vec<(BlobId, Place)>, VaultError> {
        let entries = self.block(block).await?;
        entries
            .iter()
            .map(|entry| Ok((entry.id, self.place_in(entry, packs.get(entry.pack as usize))?)))
            .collect()
    }

    /// All packs that it names.
    ///
    /// # Errors
    /// As [`Self::look_up`].
    pub async fn packs(&self) -> Result<Vec<(Area, PackId)>, VaultError> {
        let mut packs = Vec::with_capacity(self.head.packs as usize);
        for block in 0..self.head.packs.div_ceil(PACKS_PER_BLOCK) {
            packs.extend(self.pack_block(block).await?.chunks_exact(PACK).map(decode_pack));
        }
        Ok(packs)
    }

    /// Fetches all of it into the copy on disk, and gives it a filter.
    ///
    /// # Errors
    /// As [`Self::look_up`].
    pub async fn warm(&self, bits_per_id: u64) -> Result<(), VaultError> {
        if self.has_filter() {
            return Ok(());
        }
        let mut filter = Filter::new(self.entries(), bits_per_id);
        for first in (0..self.blocks()).step_by(FETCHED as usize) {
            let ranges =
                (first..self.blocks().min(first + FETCHED)).map(|n| self.head.block(n, self.overhead));
            for plain in self.object.open_boxes(first, ranges.collect()).await? {
                self.entries_of(&plain)?.iter().for_each(|entry| filter.insert(&entry.id));
            }
        }
        self.set_filter(filter);
        Ok(())
    }

    async fn block(&self, number: u64) -> Result<Vec<Entry>, VaultError> {
        self.entries_of(&self.object.open_box(number, self.head.block(number, self.overhead)).await?)
    }

    fn entries_of(&self, plain: &[u8]) -> Result<Vec<Entry>, VaultError> {
        let entries: Option<Vec<Entry>> = plain.chunks_exact(ENTRY).map(Entry::decode).collect();
        entries.ok_or_else(|| self.wrong("an entry that cannot be"))
    }

    async fn place(&self, entry: &Entry) -> Result<Place, VaultError> {
        let number = u64::from(entry.pack);
        let block = self.pack_block(number / PACKS_PER_BLOCK).await?;
        let pack = block.chunks_exact(PACK).nth((number % PACKS_PER_BLOCK) as usize).map(decode_pack);
        self.place_in(entry, pack.as_ref())
    }

    fn place_in(&self, entry: &Entry, pack: Option<&(Area, PackId)>) -> Result<Place, VaultError> {
        let (area, pack) = *pack.ok_or_else(|| self.wrong("an entry names no pack"))?;
        let Entry { offset, stored, kind, coding, .. } = *entry;
        Ok(Place { area, pack, offset, stored, kind, coding })
    }

    fn wrong(&self, cause: &str) -> VaultError {
        VaultError::damaged(ObjectName::Run(self.id), cause)
    }

    /// The bytes of a block of packs.
    async fn pack_block(&self, number: u64) -> Result<Vec<u8>, VaultError> {
        let Some(here) = self.head.packs.checked_sub(number * PACKS_PER_BLOCK).filter(|left| *left > 0)
        else {
            return Ok(Vec::new());
        };
        let at = self.head.packs_at(self.overhead) + number * (PACKS_PER_BLOCK * PACK as u64 + self.overhead);
        let length = here.min(PACKS_PER_BLOCK) * PACK as u64 + self.overhead;
        self.object.open_box(self.head.blocks() + number, at..at + length).await
    }
}

fn decode_pack(bytes: &[u8]) -> (Area, PackId) {
    (if bytes[0] == 0 { Area::Data } else { Area::Tree }, PackId::new(fixed(&bytes[1..])))
}

#[cfg(test)]
mod tests;

//! What a vault holds: for people, who ask where the room goes and what a prune would give back.
//!
//! Nothing is put, not even a lease; what is deleted meanwhile is told as unreadable. **What backups share is an estimate**: in a
//! large vault only each so-many-th blob is looked at, chosen by its id, which is as good as chance; and a blob that stands at
//! several places of an image counts at each. What only one backup needs is what pruning that one alone gives back, once
//! collections find the packs that it is in little enough worth.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use crate::backups::Backups;
use crate::blob::{self, BlobType};
use crate::check;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::{BackupId, BlobId, DomainId};
use crate::index::Index;
use crate::lease;
use crate::manifest::{BackupKind, Manifest};
use crate::names::{Area, MarkKind, ObjectName};
use crate::tree::top_level;
use crate::vault::Vault;
use crate::walk::half;

/// About so many blobs are remembered, 40 bytes each.
const REMEMBERED: u64 = 1 << 21;
/// And so many subtrees, 60 bytes each.
const SUBTREES: usize = 1 << 20;
/// Stands for an owner where there are several.
const SHARED: u32 = u32::MAX;

/// What a vault holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// The backups of each domain.
    pub domains: BTreeMap<DomainId, DomainStats>,
    /// Manifests that cannot be read.
    pub unreadable: usize,
    /// Backups that were checked once, whose manifest is gone although nobody pruned them.
    pub missing: usize,
    /// Packs of chunks.
    pub data: Objects,
    /// Packs of nodes.
    pub tree: Objects,
    /// Runs of the index.
    pub index: Objects,
    /// Of those, runs that count: neither replaced nor void.
    pub usable_runs: usize,
    /// Of those, runs that cannot be read.
    pub unreadable_runs: usize,
    /// Blobs that runs name, those twice that two do.
    pub entries: u64,
    /// Bytes in packs that backups need, each once, about.
    pub needed: u64,
    /// Bytes in packs that no backup needs, about: tables of packs among them.
    pub garbage: u64,
    /// One of so many blobs was looked at for these estimates.
    pub sampled: u64,
    /// Leases.
    pub leases: Leases,
    /// What collections have condemned and not yet deleted.
    pub condemned: Condemned,
    /// What was reported as bad.
    pub damage: Damage,
}

/// Objects of a sort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// How many.
    pub count: u64,
    /// Bytes of them all.
    pub bytes: u64,
}

/// Who uses the vault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    /// Neither ended nor revoked: collections wait for these.
    pub standing: usize,
    /// Ended, and not revoked.
    pub ended: usize,
    /// Revoked.
    pub revoked: usize,
}

/// What is to be deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Condemned {
    /// Condemnations: more than one after collections were cut off.
    pub collections: usize,
    /// Backups.
    pub backups: usize,
    /// Packs.
    pub packs: usize,
    /// Runs.
    pub runs: usize,
}

/// What is known to be bad.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Places.
    pub places: usize,
    /// Packs that they are in.
    pub packs: usize,
}

/// The backups of a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainStats {
    /// Its name, as its newest backup says.
    pub name: String,
    /// Its backups, by their points in time.
    pub backups: Vec<BackupStats>,
}

impl DomainStats {
    /// Bytes of all images of all its backups.
    #[must_use]
    pub fn logical(&self) -> u64 {
        self.backups.iter().map(|one| one.logical).sum()
    }

    /// Bytes that were put for its disks when its backups were made.
    #[must_use]
    pub fn put(&self) -> u64 {
        self.backups.iter().map(|one| one.put).sum()
    }
}

/// One backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupStats {
    /// Which.
    pub id: BackupId,
    /// Its point in time.
    pub taken: Timestamp,
    /// What was asked for.
    pub kind: BackupKind,
    /// Bytes of its images.
    pub logical: u64,
    /// Of those, bytes of chunks that are not zero.
    pub used: u64,
    /// Bytes that were put for its disks when it was made, compressed and with their nodes.
    pub put: u64,
    /// Bytes in packs of all that it needs, about.
    pub needs: u64,
    /// Of those, bytes that no other backup needs, about.
    pub unique: u64,
    /// Whether nodes of it could not be read: then more is needed than is told here.
    pub incomplete: bool,
    /// Its marks, each kind once.
    pub marks: Vec<MarkKind>,
}

impl BackupStats {
    /// Bytes of what it needs that others need too, about.
    #[must_use]
    pub fn shared(&self) -> u64 {
        self.needs.saturating_sub(self.unique)
    }
}

/// Counts what is there.
///
/// # Errors
/// If the vault asks for a newer program, a condemnation cannot be read, or what the backend could not do.
pub async fn stats(vault: &Vault, folder: Option<&Path>) -> Result<Stats, VaultError> {
    crate::features::check_reader(vault).await?;
    let mut stats = Stats::default();
    for (name, size) in check::packs(vault).await? {
        let ObjectName::Pack(area, _) = name else { continue };
        let of = if area == Area::Data { &mut stats.data } else { &mut stats.tree };
        of.count += 1;
        of.bytes += size;
    }
    for (_, size) in vault.list("index/").await? {
        stats.index.count += 1;
        stats.index.bytes += size;
    }
    for standing in lease::all(vault).await?.values() {
        let of = match (standing.revoked, standing.ended) {
            (true, _) => &mut stats.leases.revoked,
            (false, true) => &mut stats.leases.ended,
            (false, false) => &mut stats.leases.standing,
        };
        *of += 1;
    }
    let index = Arc::new(Index::load(vault, folder).await?);
    (_, stats.usable_runs) = index.run_counts();
    stats.unreadable_runs = index.unreadable().len();
    stats.entries = index.entries();
    stats.sampled = stats.entries.div_ceil(REMEMBERED).max(1);
    stats.damage = Damage { places: index.bad_places(), packs: index.damaged_packs().len() };
    for (_, one) in index.condemnations() {
        stats.condemned.collections += 1;
        stats.condemned.backups += one.backups.len();
        stats.condemned.packs += one.packs.len();
        stats.condemned.runs += one.runs.len();
    }
    let all = Backups::load(vault, None).await?;
    stats.missing = all.missing().len();
    Box::pin(backups(vault, folder, &index, &all, &mut stats)).await?;
    let packs = stats.data.bytes + stats.tree.bytes;
    stats.garbage = packs.saturating_sub(stats.needed);
    Ok(stats)
}

async fn backups(
    vault: &Vault,
    folder: Option<&Path>,
    index: &Arc<Index>,
    all: &Backups,
    stats: &mut Stats,
) -> Result<(), VaultError> {
    let mut manifests: Vec<&Manifest> = Vec::new();
    for (_, backup) in all.iter() {
        match &backup.manifest {
            Ok(manifest) => manifests.push(manifest),
            Err(_) => stats.unreadable += 1,
        }
    }
    manifests.sort_by_key(|manifest| (manifest.domain, manifest.taken, manifest.backup));
    let mut tally = Tally { sampled: stats.sampled, blobs: HashMap::new(), subtrees: HashMap::new() };
    let mut fetcher: Option<(DomainId, Fetcher)> = None;
    let mut told = Vec::new();
    for (owner, manifest) in (0..).zip(&manifests) {
        // Domains that share nothing have keys of their own.
        if fetcher.as_ref().is_none_or(|(domain, _)| vault.header().separate && *domain != manifest.domain) {
            let ids = vault.ids(manifest.domain);
            let made = Fetcher::new(vault, ids, index.clone(), folder.map(Path::to_owned), false);
            fetcher = Some((manifest.domain, made));
        }
        let Some((_, fetcher)) = &fetcher else { continue };
        let mut sums = Sums::default();
        for (_, kind, image) in manifest.images() {
            sums += tally.subtree(fetcher, owner, kind, top_level(image.size), image.top).await?;
        }
        let mut marks: Vec<MarkKind> = all.marks(manifest.backup).map(|(kind, _)| kind).collect();
        marks.dedup();
        told.push(BackupStats {
            id: manifest.backup,
            taken: manifest.taken,
            kind: manifest.kind,
            logical: manifest.images().iter().map(|(_, _, image)| image.size).sum(),
            used: sums.chunks * u64::from(CHUNK),
            put: manifest.disks.iter().map(|disk| disk.stored).sum(),
            needs: sums.stored,
            unique: 0,
            incomplete: sums.incomplete,
            marks,
        });
    }
    for (owner, stored) in tally.blobs.into_values() {
        let bytes = u64::from(stored) * stats.sampled;
        stats.needed += bytes;
        if let Some(one) = told.get_mut(owner as usize) {
            one.unique += bytes;
        }
    }
    for (manifest, one) in manifests.iter().zip(told) {
        let domain = stats.domains.entry(manifest.domain).or_default();
        domain.name.clone_from(&manifest.domain_name);
        domain.backups.push(one);
    }
    Ok(())
}

/// What was found below a node.
#[derive(Clone, Copy, Default)]
struct Sums {
    chunks: u64,
    stored: u64,
    incomplete: bool,
}

impl std::ops::AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        self.chunks += other.chunks;
        self.stored += other.stored;
        self.incomplete |= other.incomplete;
    }
}

/// Who needs what.
struct Tally {
    sampled: u64,
    /// The one backup that needs a blob, in the order of manifests, or [`SHARED`]; and the blob's stored bytes.
    blobs: HashMap<u64, (u32, u32)>,
    /// Subtrees that were walked, and for whom. When a second comes, it is walked once more, and never again.
    subtrees: HashMap<[u8; 16], (u32, Sums)>,
}

impl Tally {
    async fn subtree(
        &mut self,
        fetcher: &Fetcher,
        owner: u32,
        leaves: BlobType,
        level: u8,
        id: BlobId,
    ) -> Result<Sums, VaultError> {
        if id.is_zero() {
            return Ok(Sums::default());
        }
        let before = self.subtrees.get(&half(id)).copied();
        if let Some((known, sums)) = before
            && (known == owner || known == SHARED)
        {
            return Ok(sums);
        }
        let stored = match fetcher.stored_node(level, id).await {
            Ok(stored) => stored,
            Err(VaultError::Lost { .. }) => return Ok(Sums { incomplete: true, ..Sums::default() }),
            Err(error) => return Err(error),
        };
        let kind = BlobType::Node(level);
        let mut sums = Sums::default();
        sums.stored += self.blob(fetcher, owner, kind, id).await?;
        if let Some((base, _)) = stored.base {
            sums.stored += self.blob(fetcher, owner, kind, base).await?;
        }
        for slot in stored.node.slots.iter().filter(|slot| !slot.is_zero()) {
            if level > 0 {
                sums += Box::pin(self.subtree(fetcher, owner, leaves, level - 1, *slot)).await?;
            } else {
                sums.chunks += 1;
                sums.stored += self.blob(fetcher, owner, leaves, *slot).await?;
            }
        }
        if before.is_some() || self.subtrees.len() < SUBTREES {
            let now = if before.is_some() { SHARED } else { owner };
            self.subtrees.insert(half(id), (now, sums));
        }
        Ok(sums)
    }

    /// Notes that somebody needs a blob. Gives its stored bytes, times what one that is looked at stands for.
    async fn blob(
        &mut self,
        fetcher: &Fetcher,
        owner: u32,
        kind: BlobType,
        id: BlobId,
    ) -> Result<u64, VaultError> {
        let key = id.prefix();
        if !key.is_multiple_of(self.sampled) {
            return Ok(0);
        }
        if let Some((known, stored)) = self.blobs.get_mut(&key) {
            if *known != owner {
                *known = SHARED;
            }
            return Ok(u64::from(*stored) * self.sampled);
        }
        let places = fetcher.index().find(kind, id).await?;
        let Some(place) = places.first().map(|found| found.place) else { return Ok(0) };
        let stored = blob::HEADER as u32 + place.stored;
        self.blobs.insert(key, (owner, stored));
        Ok(u64::from(stored) * self.sampled)
    }
}

#[cfg(test)]
mod tests;

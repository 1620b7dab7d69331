//! What the backups that stay need (`FORMAT.md`, §7, Collection 3): level by level, each node read once.
//!
//! Of what is needed only the first eight bytes of ids are kept, sorted. Two ids that have those in common keep a blob too
//! many, never one too few.

use std::collections::BTreeSet;

use futures_util::StreamExt;

use super::{Fetchers, Halt, doom};
use crate::backups::Backups;
use crate::blob::BlobType;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::ids::{BackupId, BlobId};
use crate::manifest::Manifest;
use crate::names::MarkKind;
use crate::tree::top_level;

/// Nodes that are read at once.
const AT_ONCE: usize = 16;

/// The blobs that are needed.
#[derive(Debug, Default)]
pub(super) struct Needed {
    prefixes: Vec<u64>,
    sorted: usize,
    homes: Vec<u64>,
}

impl Needed {
    fn add(&mut self, id: BlobId) {
        self.prefixes.push(id.prefix());
        // Backups have most in common: what came twice goes soon.
        if self.prefixes.len() > (2 * self.sorted).max(1 << 16) {
            self.sort();
        }
    }

    fn sort(&mut self) {
        self.prefixes.sort_unstable();
        self.prefixes.dedup();
        self.sorted = self.prefixes.len();
    }

    /// Whether a blob is needed.
    pub(super) fn has(&self, id: &BlobId) -> bool {
        self.prefixes.binary_search(&id.prefix()).is_ok()
    }

    /// Whether a blob is needed and was not asked for before: a second place of it is worth nothing.
    pub(super) fn claim(&mut self, id: &BlobId) -> bool {
        let Ok(at) = self.prefixes.binary_search(&id.prefix()) else { return false };
        self.homes.resize(self.prefixes.len().div_ceil(64), 0);
        let (word, bit) = (&mut self.homes[at / 64], 1 << (at % 64));
        let first = *word & bit == 0;
        *word |= bit;
        first
    }
}

/// Marks all that backups need which are not doomed. Of one that is checked every node must be readable: what is below one
/// that is not cannot be named, and would be deleted.
pub(super) async fn mark(
    fetchers: &Fetchers,
    backups: &Backups,
    doomed: &BTreeSet<BackupId>,
) -> Result<Needed, Halt> {
    let stays: BTreeSet<BackupId> =
        backups.iter().map(|(id, _)| id).filter(|id| !doomed.contains(id)).collect();
    let mut needed = Needed::default();
    walk(fetchers, backups, &stays, &mut |_, id| needed.add(id)).await?;
    needed.sort();
    Ok(needed)
}

/// Shows all that some backups need, with the bases of patches; some of it more than once.
pub(super) async fn walk(
    fetchers: &Fetchers,
    backups: &Backups,
    which: &BTreeSet<BackupId>,
    see: &mut (dyn FnMut(BlobType, BlobId) + Send),
) -> Result<(), Halt> {
    for is_checked in [true, false] {
        let ours = |id: &BackupId| which.contains(id) && backups.has(*id, MarkKind::Checked) == is_checked;
        let manifests: Vec<&Manifest> = backups
            .iter()
            .filter(|(id, _)| ours(id))
            .filter_map(|(_, backup)| backup.manifest.as_ref().ok())
            .collect();
        let domains: BTreeSet<_> =
            manifests.iter().map(|manifest| fetchers.separate.then_some(manifest.domain)).collect();
        for domain in domains {
            let Some(fetcher) = fetchers.by_domain.get(&domain) else { continue };
            for leaves in [BlobType::Data, BlobType::Stream] {
                let tops = manifests
                    .iter()
                    .filter(|manifest| domain.is_none_or(|domain| manifest.domain == domain))
                    .flat_map(|manifest| manifest.images())
                    .filter(|(_, kind, image)| *kind == leaves && !image.top.is_zero())
                    .map(|(_, _, image)| (top_level(image.size), image.top))
                    .collect();
                Box::pin(levels(fetcher, leaves, tops, is_checked, see)).await?;
            }
        }
    }
    Ok(())
}

async fn levels(
    fetcher: &Fetcher,
    leaves: BlobType,
    mut tops: BTreeSet<(u8, BlobId)>,
    is_checked: bool,
    see: &mut (dyn FnMut(BlobType, BlobId) + Send),
) -> Result<(), Halt> {
    let Some(highest) = tops.last().map(|(level, _)| *level) else { return Ok(()) };
    let mut here: BTreeSet<BlobId> = BTreeSet::new();
    for level in (0..=highest).rev() {
        let below = tops.split_off(&(level, BlobId::ZERO));
        here.extend(below.into_iter().map(|(_, id)| id));
        let kind = BlobType::Node(level);
        let mut reading = futures_util::stream::iter(here.iter().copied())
            .map(|id| async move { (id, read(fetcher, level, id).await) })
            .buffer_unordered(AT_ONCE);
        let mut next = BTreeSet::new();
        while let Some((id, read)) = reading.next().await {
            see(kind, id);
            let (children, bases) = match read {
                Ok(read) => read,
                Err(error @ VaultError::Lost { .. }) if is_checked => {
                    return Err(doom::blocked(None, &error));
                }
                // What is not checked may lack what it likes.
                Err(VaultError::Lost { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            bases.into_iter().for_each(|base| see(kind, base));
            match level {
                0 => children.into_iter().for_each(|id| see(leaves, id)),
                _ => next.extend(children),
            }
        }
        drop(reading);
        here = next;
    }
    Ok(())
}

/// What is below a node, and the bases of the patches that it is stored as.
async fn read(fetcher: &Fetcher, level: u8, id: BlobId) -> Result<(Vec<BlobId>, Vec<BlobId>), VaultError> {
    let stored = fetcher.stored_node(level, id).await?;
    let mut bases: Vec<BlobId> = stored.base.as_ref().map(|(base, _)| *base).into_iter().collect();
    let places = fetcher.index().find(BlobType::Node(level), id).await?;
    let patches: Vec<_> = places.iter().filter(|found| found.place.coding.is_patch()).collect();
    if patches.len() > bases.len() {
        for found in patches {
            bases.extend(fetcher.base_of(id, found.place).await?);
        }
    }
    let children = stored.node.slots.iter().copied().filter(|slot| !slot.is_zero()).collect();
    Ok((children, bases))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(prefix: u64, rest: u8) -> BlobId {
        let mut bytes = [rest; 32];
        bytes[..8].copy_from_slice(&prefix.to_be_bytes());
        BlobId::new(bytes)
    }

    #[test]
    fn what_was_added_is_needed_and_claimed_once() {
        let mut needed = Needed::default();
        (0..200_000).for_each(|n| needed.add(id(n % 70_000 * 3, 1)));
        needed.sort();
        assert_eq!(needed.prefixes.len(), 70_000);
        for n in 0..210_000 {
            assert_eq!(needed.has(&id(n, 1)), n % 3 == 0);
            assert_eq!(needed.claim(&id(n, 1)), n % 3 == 0);
            assert!(!needed.claim(&id(n, 1)));
        }
        assert!(needed.has(&id(3, 2)), "two that begin alike keep each other");
    }
}

//! Moving what is needed out of packs that are given up (`FORMAT.md`, §7, Collection 4 and 7).
//!
//! A blob is proven to be what its id says before its bytes are moved, as they are. One that is no good in any place is told
//! as damage, and its pack stays: an error in reading is no proof that the bytes are lost.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::mark::{self, Needed};
use super::{Fetchers, Halt, Work, doom};
use crate::backups::Backups;
use crate::blob::{BlobType, Encoded};
use crate::error::VaultError;
use crate::ids::{BackupId, BlobId};
use crate::index::Index;
use crate::index::run::Place;
use crate::index::tidings::{BadPlace, report_damage};

impl Work<'_> {
    /// Moves what is known to be needed.
    pub(super) async fn move_needed(&mut self, fetchers: &Fetchers, needed: &Needed) -> Result<(), Halt> {
        let index = self.survey.index.clone();
        let mut wanted: Vec<(BlobId, Place)> = Vec::new();
        let mut see = |id: BlobId, place: Place| {
            if self.choice.give_up.contains_key(&place.pack) && needed.has(&id) {
                wanted.push((id, place));
            }
        };
        for run in self.survey.named_by.keys() {
            index.scan(*run, &mut see).await?;
        }
        index.noted_places().into_iter().for_each(|(id, place)| see(id, place));
        // In the order of packs; of a node that is stored both ways, the full one counts.
        wanted.sort_unstable_by_key(|(id, place)| (place.coding.is_patch(), place.pack, place.offset, *id));
        wanted.dedup();
        let mut moved: BTreeMap<BlobId, bool> = BTreeMap::new();
        for (id, place) in wanted {
            self.move_one(fetchers, &index, id, place, &mut moved).await?;
        }
        Box::pin(self.store.flush()).await?;
        Ok(())
    }

    /// Moves what was committed meanwhile needs, and what has no other place than one that was condemned.
    pub(super) async fn move_for_new(
        &mut self,
        folder: Option<&Path>,
        before: &Backups,
        doomed: &BTreeSet<BackupId>,
    ) -> Result<(), Halt> {
        let after = Backups::load(self.vault, None).await?;
        let new = doom::new_ones(before, &after, doomed)?;
        if new.is_empty() {
            return Ok(());
        }
        let index = Arc::new(Index::load(self.vault, folder).await?);
        index.note_places(self.survey.index.noted_places());
        let fetchers = Fetchers::new(self.vault, &after, &index, folder);
        let mut needed: BTreeSet<(BlobType, BlobId)> = BTreeSet::new();
        mark::walk(&fetchers, &after, &new, &mut |kind, id| {
            needed.insert((kind, id));
        })
        .await?;
        let mut moved: BTreeMap<BlobId, bool> = BTreeMap::new();
        for (kind, id) in needed {
            let mut places = index.find(kind, id).await?;
            places.retain(|found| self.choice.give_up.contains_key(&found.place.pack));
            for found in places {
                self.move_one(&fetchers, &index, id, found.place, &mut moved).await?;
            }
        }
        Box::pin(self.store.flush()).await?;
        Ok(())
    }

    async fn move_one(
        &mut self,
        fetchers: &Fetchers,
        index: &Index,
        id: BlobId,
        place: Place,
        moved: &mut BTreeMap<BlobId, bool>,
    ) -> Result<(), VaultError> {
        let is_full = !place.coding.is_patch();
        if moved.get(&id).is_some_and(|full| *full || !is_full) {
            return Ok(());
        }
        let mut others = index.find(place.kind, id).await?;
        if others.iter().any(|one| one.usable && (!is_full || !one.place.coding.is_patch())) {
            return Ok(());
        }
        others.retain(|one| one.place != place && one.place.coding.is_patch() != is_full);
        let mut bad = Vec::new();
        for from in std::iter::once(place).chain(others.into_iter().map(|one| one.place)) {
            if let Some(blob) = proven(fetchers, id, from).await? {
                self.report.moved.0 += 1;
                self.report.moved.1 += blob.stored.len() as u64;
                self.store.add(&blob).await?;
                moved.insert(id, is_full);
                return Ok(());
            }
            if !index.is_damaged(id, &from) {
                bad.push(BadPlace { pack: from.pack, offset: from.offset, id });
            }
            self.report.kept.insert(from.pack);
        }
        report_damage(self.vault, bad).await
    }
}

/// The bytes of a place, if they are what the id says for any domain: where domains share nothing, a pack does not tell whose
/// they are.
async fn proven(fetchers: &Fetchers, id: BlobId, place: Place) -> Result<Option<Encoded>, VaultError> {
    for fetcher in fetchers.by_domain.values() {
        if let Some(blob) = fetcher.proven(id, place).await? {
            return Ok(Some(blob));
        }
    }
    Ok(None)
}

//! What there is: packs, leases, the index and what no run of it names (`FORMAT.md`, §7, Collection 1 and 2).
//!
//! Packs are listed before leases: a pack that is in the list was put under a lease that had begun by then, so the list of
//! leases shows it, unless it has left. The other way round, a writer that began between the two lists would look like one
//! that is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::error::VaultError;
use crate::ids::{LeaseId, PackId, RunId};
use crate::index::Index;
use crate::index::run::Place;
use crate::lease::{self, Standing};
use crate::mutation;
use crate::names::{Area, ObjectName};
use crate::pack;
use crate::vault::Vault;
use crate::write::resume::table;

/// What a collection has seen.
pub(crate) struct Survey {
    /// The index, with the tables of packs that no usable run names.
    pub(crate) index: Arc<Index>,
    /// The first list of leases.
    pub(super) leases: BTreeMap<LeaseId, Standing>,
    /// Packs that are there, with their size.
    pub(super) packs: BTreeMap<PackId, (Area, u64)>,
    /// Packs that were in the list. Those that only a run told of are in `packs` alone.
    pub(super) listed: BTreeSet<PackId>,
    /// Packs that are there, whose lease is over, and that no usable run names.
    pub(super) unnamed: BTreeSet<PackId>,
    /// Packs that usable runs name, whose lease is over, and that are certainly not there.
    pub(crate) missing: BTreeMap<PackId, Area>,
    /// Usable runs of leases that are over, with the packs that they name.
    pub(super) named_by: BTreeMap<RunId, BTreeSet<(Area, PackId)>>,
    /// Runs of which a part cannot be read: their packs count as unnamed.
    pub(crate) broken: BTreeSet<RunId>,
}

impl Survey {
    pub(crate) async fn take(vault: &Vault, folder: Option<&Path>) -> Result<Self, VaultError> {
        let early = match mutation::on("packs_before_leases") {
            true => Some(lease::all(vault).await?),
            false => None,
        };
        let mut packs = BTreeMap::new();
        for area in [Area::Data, Area::Tree] {
            for (name, size) in vault.list(&format!("{}/", area.folder())).await? {
                if let ObjectName::Pack(area, pack) = name {
                    packs.insert(pack, (area, size));
                }
            }
        }
        let leases = match early {
            Some(early) => early,
            None => lease::all(vault).await?,
        };
        let index = Arc::new(Index::load(vault, folder).await?);
        let listed = packs.keys().copied().collect();
        let mut survey = Self {
            index,
            leases,
            packs,
            listed,
            unnamed: BTreeSet::new(),
            missing: BTreeMap::new(),
            named_by: BTreeMap::new(),
            broken: BTreeSet::new(),
        };
        survey.read_runs(vault).await?;
        survey.read_tables(vault).await?;
        Ok(survey)
    }

    /// Whether a lease was over in the first list of leases, or has left it: its packs and runs may be looked at.
    pub(crate) fn is_over(&self, lease: LeaseId) -> bool {
        self.leases.get(&lease).is_none_or(|standing| standing.is_over())
    }

    async fn read_runs(&mut self, vault: &Vault) -> Result<(), VaultError> {
        for state in self.index.states() {
            if !state.usable || !self.is_over(state.id.lease()) {
                continue;
            }
            let named = self.index.packs_of_run(state.id).await;
            let whole = match self.index.scan(state.id, &mut |_, _| {}).await {
                Ok(()) => named,
                Err(error) => Err(error),
            };
            match whole {
                Ok(named) => drop(self.named_by.insert(state.id, named)),
                Err(error @ (VaultError::Damaged { .. } | VaultError::Missing { .. })) => {
                    tracing::warn!(%error, "a run of the vault's index cannot be read in full; the tables of packs take its place");
                    self.index.void(state.id);
                    self.broken.insert(state.id);
                }
                Err(error) => return Err(error),
            }
        }
        let named: BTreeSet<(Area, PackId)> = self.named_by.values().flatten().copied().collect();
        for (area, pack) in named {
            if self.packs.contains_key(&pack) || !self.is_over(pack.lease()) {
                continue;
            }
            // Put between the two lists, perhaps: asked for by name before it is called missing.
            match size_of(vault, area, pack).await? {
                Some(size) => {
                    self.packs.insert(pack, (area, size));
                }
                None => {
                    self.missing.insert(pack, area);
                }
            }
        }
        Ok(())
    }

    async fn read_tables(&mut self, vault: &Vault) -> Result<(), VaultError> {
        let named: BTreeSet<PackId> = self.named_by.values().flatten().map(|(_, pack)| *pack).collect();
        let all: Vec<(PackId, (Area, u64))> = self.packs.iter().map(|(pack, of)| (*pack, *of)).collect();
        for (pack, (area, size)) in all {
            if named.contains(&pack) || !self.is_over(pack.lease()) {
                continue;
            }
            match entries(vault, area, pack, size).await? {
                Some(entries) => {
                    self.unnamed.insert(pack);
                    let places = entries.iter().map(|entry| (entry.id, Place::new(area, pack, entry)));
                    self.index.note_places(places);
                }
                // Deleted since it was listed: by a collector that was left behind.
                None => {
                    self.packs.remove(&pack);
                }
            }
        }
        Ok(())
    }
}

/// The size of a pack; nothing if it certainly is not there.
pub(super) async fn size_of(vault: &Vault, area: Area, pack: PackId) -> Result<Option<u64>, VaultError> {
    let name = ObjectName::Pack(area, pack);
    let listed = vault.list(&name.to_string()).await?;
    Ok(listed.into_iter().find(|(found, _)| *found == name).map(|(_, size)| size))
}

/// The blobs of a pack: by its table, or by their headers where that is destroyed or was never put.
pub(crate) async fn entries(
    vault: &Vault,
    area: Area,
    pack: PackId,
    size: u64,
) -> Result<Option<Vec<pack::Entry>>, VaultError> {
    match table(vault, area, pack, size).await {
        Ok(entries) => return Ok(Some(entries)),
        Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => {}
        Err(error) => return Err(error),
    }
    let Some(object) = vault.get(&ObjectName::Pack(area, pack)).await? else { return Ok(None) };
    let keys = vault.keys().clone();
    let scan = move || pack::entries(&keys, area, pack, &object);
    Ok(Some(crate::tasks::blocking(scan).await?))
}

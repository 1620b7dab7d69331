//! The index: where blobs are, and which of those places may be relied upon (`FORMAT.md`, §5.1 and §6).
//!
//! It is never in memory: look-ups read blocks of runs, through a disposable copy on disk, behind filters of at most 64 MiB
//! together. What is in memory goes with runs and condemned packs, not with chunks.
//!
//! **Usable** is a place that a run tells, which is neither replaced nor lost and whose lease is not revoked, in no condemned
//! pack and not in `damage/`. A writer treats everything else as absent. To *find* bytes every run that can be read is a
//! hint, usable places first.

pub mod cached;
pub mod filter;
pub mod run;
pub mod tidings;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use futures_util::StreamExt;

use crate::blob::BlobType;
use crate::error::VaultError;
use crate::ids::{BlobId, LeaseId, PackId, RunId};
use crate::mutation;
use crate::names::{Area, LeasePart, ObjectName};
use crate::vault::Vault;
use filter::Filter;
use run::{Place, Run};
use tidings::{Condemnation, Damage};

/// Objects that are fetched at once.
const AT_ONCE: usize = 64;

/// A place, and whether it may be relied upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub place: Place,
    /// Whether a writer may reuse it.
    pub usable: bool,
}

#[derive(Debug)]
struct Listed {
    run: Run,
    void: bool,
    usable: AtomicBool,
}

impl Listed {
    fn new(run: Run, usable: bool, void: bool) -> Arc<Self> {
        Arc::new(Self { run, void, usable: AtomicBool::new(usable) })
    }

    fn is_usable(&self) -> bool {
        self.usable.load(Ordering::Relaxed)
    }
}

/// The index, as it was listed.
#[derive(Debug)]
pub struct Index {
    vault: Vault,
    folder: Option<PathBuf>,
    runs: RwLock<Arc<Vec<Arc<Listed>>>>,
    unreadable: Vec<(RunId, VaultError)>,
    /// Runs that those which can be read name as replaced or lost.
    set_aside: HashSet<RunId>,
    condemnations: Vec<(LeaseId, Condemnation)>,
    condemned: RwLock<HashSet<PackId>>,
    damage: RwLock<Damage>,
    /// What no run tells that can be read, from the tables of packs: of a collector, which names them in its next run.
    extra: RwLock<HashMap<BlobId, Vec<Place>>>,
}

/// A run, and what its places are worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunState {
    /// The run.
    pub id: RunId,
    /// Whether a writer may reuse what it names.
    pub usable: bool,
    /// Whether it is void: lost, or of a lease that was revoked. One that is neither, and not usable, was replaced.
    pub void: bool,
    /// Blobs in it.
    pub entries: u64,
    /// Runs that it names as lost.
    pub lost: Vec<RunId>,
}

impl Index {
    /// Lists, in this order, `index/`, `leases/` for `revoked`, `condemned/` and `damage/`, and reads what runs say of
    /// themselves. The folder holds copies of the runs' blocks; those of runs that are not listed are removed from it.
    ///
    /// # Errors
    /// If a condemnation cannot be read, or what the backend could not do. A damaged run is no error: what it says is absent.
    pub async fn load(vault: &Vault, folder: Option<&Path>) -> Result<Self, VaultError> {
        let listed = vault.list("index/").await?;
        let revoked: HashSet<LeaseId> = vault
            .list("leases/")
            .await?
            .into_iter()
            .filter_map(|(name, _)| match name {
                ObjectName::Lease(lease, LeasePart::Revoked) => Some(lease),
                _ => None,
            })
            .collect();
        let condemnations = tidings::condemnations(vault).await?;
        let damage = Damage::load(vault).await?;

        let folder = match folder {
            Some(folder) => prepare(folder.to_owned(), &listed).await?,
            None => None,
        };
        let (mut runs, mut unreadable) = (Vec::new(), Vec::new());
        let mut ids = Vec::with_capacity(listed.len());
        for (name, size) in &listed {
            if let ObjectName::Run(run) = name {
                ids.push((*run, *size));
            }
        }
        let opened = ids.into_iter().map(|(run, size)| {
            let (vault, folder) = (vault, folder.as_deref());
            async move { (run, Run::open(vault, folder, run, size).await) }
        });
        let mut opened = futures_util::stream::iter(opened).buffer_unordered(AT_ONCE);
        while let Some((id, run)) = opened.next().await {
            match run {
                Ok(run) => runs.push(run),
                // A collector took it away after the list: a run that takes its place was there before.
                Err(VaultError::Missing { .. }) => {}
                Err(error @ (VaultError::Damaged { .. } | VaultError::Newer { .. })) => {
                    tracing::warn!(%error, "a run of the vault's index cannot be read; its blobs count as absent");
                    unreadable.push((id, error));
                }
                Err(error) => return Err(error),
            }
        }
        drop(opened);
        let replaced: HashSet<RunId> =
            runs.iter().flat_map(|run| run.head().replaces.iter()).copied().collect();
        let lost: HashSet<RunId> = runs.iter().flat_map(|run| run.head().lost.iter()).copied().collect();
        let runs = runs
            .into_iter()
            .map(|run| {
                let void = lost.contains(&run.id()) || revoked.contains(&run.id().lease());
                let usable = !void && !replaced.contains(&run.id());
                Listed::new(run, usable, void)
            })
            .collect::<Vec<_>>();
        let condemned =
            condemnations.iter().flat_map(|(_, one)| one.packs.iter().map(|(_, pack)| *pack)).collect();
        Ok(Self {
            vault: vault.clone(),
            folder,
            runs: RwLock::new(Arc::new(runs)),
            unreadable,
            set_aside: replaced.union(&lost).copied().collect(),
            condemnations,
            condemned: RwLock::new(condemned),
            damage: RwLock::new(damage),
            extra: RwLock::default(),
        })
    }

    fn runs(&self) -> Arc<Vec<Arc<Listed>>> {
        self.runs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The places of a blob, usable ones first, full ones before patches.
    ///
    /// # Errors
    /// What the backend could not do. A damaged block of a run is none: what it says is absent.
    pub async fn find(&self, kind: BlobType, id: BlobId) -> Result<Vec<Found>, VaultError> {
        let mut found = Vec::new();
        let runs = self.runs();
        for listed in runs.iter() {
            if !listed.run.may_have(&id) || (mutation::on("void_runs_as_hints") && listed.void) {
                continue;
            }
            let places = match Box::pin(listed.run.look_up(id, kind.is_node())).await {
                Ok(places) => places,
                Err(error @ (VaultError::Damaged { .. } | VaultError::Missing { .. })) => {
                    tracing::warn!(%error, "a part of the vault's index cannot be read; its blobs count as absent");
                    continue;
                }
                Err(error) => return Err(error),
            };
            for place in places.into_iter().filter(|place| place.kind == kind) {
                let usable = listed.is_usable() && self.is_usable(id, &place);
                match found.iter_mut().find(|one: &&mut Found| one.place == place) {
                    Some(one) => one.usable |= usable,
                    None => found.push(Found { place, usable }),
                }
            }
        }
        let extra = self.extra.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        for place in extra.into_iter().flatten().filter(|place| place.kind == kind) {
            let usable = self.is_usable(id, &place);
            match found.iter_mut().find(|one: &&mut Found| one.place == place) {
                Some(one) => one.usable |= usable,
                None => found.push(Found { place, usable }),
            }
        }
        found.sort_by_key(|one| (!one.usable, one.place.coding.is_patch()));
        Ok(found)
    }

    /// The first place of a blob that a writer may reuse. Whether the base of a patch is usable is asked for apart.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub async fn usable(&self, kind: BlobType, id: BlobId) -> Result<Option<Place>, VaultError> {
        Ok(self.find(kind, id).await?.first().filter(|one| one.usable).map(|one| one.place))
    }

    fn is_usable(&self, id: BlobId, place: &Place) -> bool {
        !self.is_condemned(place.pack) && !self.is_damaged(id, place)
    }

    /// Whether a place was found bad.
    #[must_use]
    pub fn is_damaged(&self, id: BlobId, place: &Place) -> bool {
        self.damage.read().unwrap_or_else(PoisonError::into_inner).has(place.pack, place.offset, id)
    }

    /// Whether a pack will be deleted.
    #[must_use]
    pub fn is_condemned(&self, pack: PackId) -> bool {
        self.condemned.read().unwrap_or_else(PoisonError::into_inner).contains(&pack)
    }

    /// Treats packs as condemned from now on.
    pub fn condemn(&self, packs: impl IntoIterator<Item = PackId>) {
        self.condemned.write().unwrap_or_else(PoisonError::into_inner).extend(packs);
    }

    /// Takes in what the table of a pack tells, as if a run named it.
    pub fn note_places(&self, places: impl IntoIterator<Item = (BlobId, Place)>) {
        let mut extra = self.extra.write().unwrap_or_else(PoisonError::into_inner);
        for (id, place) in places {
            extra.entry(id).or_default().push(place);
        }
    }

    /// The places of [`Self::note_places`].
    #[must_use]
    pub fn noted_places(&self) -> Vec<(BlobId, Place)> {
        let extra = self.extra.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<(BlobId, Place)> =
            extra.iter().flat_map(|(id, places)| places.iter().map(|place| (*id, *place))).collect();
        all.sort_unstable_by_key(|(id, place)| (place.pack, place.offset, *id));
        all
    }

    /// The runs that can be read, sorted by name.
    #[must_use]
    pub fn states(&self) -> Vec<RunState> {
        let state = |listed: &Arc<Listed>| RunState {
            id: listed.run.id(),
            usable: listed.is_usable(),
            void: listed.void,
            entries: listed.run.entries(),
            lost: listed.run.head().lost.clone(),
        };
        let mut states: Vec<RunState> = self.runs().iter().map(state).collect();
        states.sort_unstable_by_key(|state| state.id);
        states
    }

    /// The packs that a run names.
    ///
    /// # Errors
    /// If it is not there or damaged, or what the backend could not do.
    pub async fn packs_of_run(&self, run: RunId) -> Result<BTreeSet<(Area, PackId)>, VaultError> {
        Ok(self.listed(run)?.run.packs().await?.into_iter().collect())
    }

    /// Shows all that a run says, block by block: memory goes with a block.
    ///
    /// # Errors
    /// If it is not there or damaged, or what the backend could not do.
    pub async fn scan(
        &self,
        run: RunId,
        see: &mut (dyn FnMut(BlobId, Place) + Send),
    ) -> Result<(), VaultError> {
        let listed = self.listed(run)?;
        let packs = listed.run.packs().await?;
        for block in 0..listed.run.blocks() {
            listed.run.places(block, &packs).await?.into_iter().for_each(|(id, place)| see(id, place));
        }
        Ok(())
    }

    fn listed(&self, run: RunId) -> Result<Arc<Listed>, VaultError> {
        let found = self.runs().iter().find(|listed| listed.run.id() == run).cloned();
        found.ok_or_else(|| VaultError::Missing { object: ObjectName::Run(run).to_string() })
    }

    /// Notes a bad place that this process has found and reported.
    pub fn note_damage(&self, id: BlobId, place: &Place) {
        let bad = tidings::BadPlace { pack: place.pack, offset: place.offset, id };
        self.damage.write().unwrap_or_else(PoisonError::into_inner).note(bad);
    }

    /// The packs of which some place is bad.
    #[must_use]
    pub fn damaged_packs(&self) -> HashSet<PackId> {
        self.damage.read().unwrap_or_else(PoisonError::into_inner).packs()
    }

    /// The blobs of which some place is bad.
    #[must_use]
    pub fn damaged_ids(&self) -> HashSet<BlobId> {
        self.damage.read().unwrap_or_else(PoisonError::into_inner).places().map(|bad| bad.id).collect()
    }

    /// How many places were found bad.
    #[must_use]
    pub fn bad_places(&self) -> usize {
        self.damage.read().unwrap_or_else(PoisonError::into_inner).places().count()
    }

    /// Looks for damage that was reported since.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn refresh_damage(&self) -> Result<(), VaultError> {
        let now = Damage::load(&self.vault).await?;
        let mut damage = self.damage.write().unwrap_or_else(PoisonError::into_inner);
        now.places().for_each(|bad| damage.note(*bad));
        Ok(())
    }

    /// Takes in a run that this process has put; those that it takes the place of are hints from now on.
    ///
    /// # Errors
    /// If it cannot be read again.
    pub async fn adopt(&self, run: RunId, object: bytes::Bytes, ids: Filter) -> Result<(), VaultError> {
        let run = Run::open(&self.vault, self.folder.as_deref(), run, object.len() as u64).await?;
        run.keep(object).await?;
        run.set_filter(ids);
        let replaced = run.head().replaces.clone();
        let mut runs = self.runs.write().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut runs).push(Listed::new(run, true, false));
        drop(runs);
        replaced.into_iter().for_each(|run| self.void(run));
        Ok(())
    }

    /// All that a run says.
    ///
    /// # Errors
    /// If it is not there or damaged, or what the backend could not do.
    pub async fn places_of(&self, run: RunId) -> Result<Vec<(BlobId, Place)>, VaultError> {
        let listed = self.listed(run)?;
        let packs = listed.run.packs().await?;
        let mut places = Vec::with_capacity(listed.run.entries() as usize);
        for block in 0..listed.run.blocks() {
            places.extend(listed.run.places(block, &packs).await?);
        }
        Ok(places)
    }

    /// Makes what a run says a mere hint: it was in flight when its writer died.
    pub fn void(&self, run: RunId) {
        for listed in self.runs().iter().filter(|listed| listed.run.id() == run) {
            listed.usable.store(false, Ordering::Relaxed);
        }
    }

    /// The packs of a lease that usable runs name.
    ///
    /// # Errors
    /// If one of these runs is damaged, or what the backend could not do.
    pub async fn packs_of(&self, lease: LeaseId) -> Result<HashSet<PackId>, VaultError> {
        let mut packs = HashSet::new();
        for listed in self.runs().iter().filter(|listed| listed.is_usable()) {
            let named = listed.run.packs().await?;
            packs.extend(named.into_iter().map(|(_, pack)| pack).filter(|pack| pack.lease() == lease));
        }
        Ok(packs)
    }

    /// Whether so many look-ups would read about as many blocks as there are.
    #[must_use]
    pub fn is_worth_warming(&self, look_ups: u64) -> bool {
        look_ups.saturating_mul(2 * run::PER_BLOCK) >= self.entries()
    }

    /// Fetches the whole index into the copy on disk, and makes filters of all ids. Before a full backup; an incremental one
    /// that asks for little does without.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn warm(&self) -> Result<(), VaultError> {
        let bits = filter::bits_per_id(self.entries());
        for listed in self.runs().iter() {
            match listed.run.warm(bits).await {
                Ok(()) | Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Blobs that all runs name, those twice that two do.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.runs().iter().map(|listed| listed.run.entries()).sum()
    }

    /// The vault that it is of.
    #[must_use]
    pub fn vault(&self) -> &Vault {
        &self.vault
    }

    /// Runs that can be read, and those of them whose places count.
    #[must_use]
    pub fn run_counts(&self) -> (usize, usize) {
        let runs = self.runs();
        (runs.len(), runs.iter().filter(|listed| listed.is_usable()).count())
    }

    /// Runs that are there and cannot be read.
    #[must_use]
    pub fn unreadable(&self) -> &[(RunId, VaultError)] {
        &self.unreadable
    }

    /// Whether another run says that this one is replaced or lost: nobody misses it, readable or not.
    #[must_use]
    pub fn is_set_aside(&self, run: RunId) -> bool {
        self.set_aside.contains(&run)
    }

    /// What will be deleted, by collection.
    #[must_use]
    pub fn condemnations(&self) -> &[(LeaseId, Condemnation)] {
        &self.condemnations
    }
}

/// Makes the folder of copies, and removes those of runs that are not there any more. Without it everything still works.
async fn prepare(folder: PathBuf, listed: &[(ObjectName, u64)]) -> Result<Option<PathBuf>, VaultError> {
    let keep: HashSet<String> = listed.iter().map(|(name, _)| cached::file_name(name)).collect();
    let work = move || -> std::io::Result<PathBuf> {
        std::fs::create_dir_all(&folder)?;
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("index-") && !keep.contains(&name) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(folder)
    };
    Ok(match crate::tasks::blocking(work).await? {
        Ok(folder) => Some(folder),
        Err(error) => {
            tracing::warn!(%error, "no folder for copies of the vault's index: every look-up asks the vault");
            None
        }
    })
}

#[cfg(test)]
mod tests;

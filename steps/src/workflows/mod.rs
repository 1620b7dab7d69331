//! The workflows: recipes that build plans from what is observed.

pub mod snapshot;

use std::sync::Arc;

use vmkeep_workflow::Registry;

use crate::backup::left::LeftLeases;
use crate::backup::{Backup, BackupSettings};
use crate::deletion::{Deletion, Users};
use crate::inplace::{InPlaceSettings, RestoreInPlace};
use crate::reconcile::sweep::Jobs;
use crate::reconcile::workflow::Repair;
use crate::restore::from_vault::VaultRestore;
use crate::restore::{Restore, RestoreSettings};
use crate::snapshot::{Places, World};
use crate::vaults::Vaults;

/// What the workflows of this crate need to know.
pub struct Parts {
    /// The hypervisor and the images.
    pub world: World,
    /// Where backups may lie, and restored images.
    pub places: Places,
    /// How backups are made.
    pub snapshot: snapshot::Settings,
    /// How backups into vaults are made.
    pub backup: BackupSettings,
    /// The vaults.
    pub vaults: Arc<dyn Vaults>,
    /// How they are restored.
    pub restore: RestoreSettings,
    /// How they are restored in place.
    pub in_place: InPlaceSettings,
    /// Who knows which job needs a backup.
    pub users: Arc<dyn Users>,
    /// Who knows what has become of each job.
    pub jobs: Arc<dyn Jobs>,
}

/// Makes every workflow of this crate known, and all their steps: the one list of them.
#[must_use]
pub fn register(registry: Registry, parts: Parts) -> Registry {
    let Parts { world, places, snapshot, backup, vaults, restore, in_place, users, jobs } = parts;
    let store = snapshot.store.clone();
    let left = LeftLeases::new(jobs.clone());
    let registry = Repair::new(world.clone(), places.clone(), jobs, store).register(registry);
    let registry = Deletion::new(places.clone(), users).register(registry);
    let registry = snapshot::Snapshot::new(world.clone(), places.clone(), snapshot).register(registry);
    let registry = Backup::new(world.clone(), vaults.clone(), left, backup).register(registry);
    let registry = Restore::new(world.clone(), places.clone(), restore).register(registry);
    let registry = VaultRestore::new(world.clone(), places.clone(), vaults, restore).register(registry);
    RestoreInPlace::new(world, places, in_place).register(registry)
}

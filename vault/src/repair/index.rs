//! Repairing the index: what the tables of packs say becomes a run (`FORMAT.md`, §6).
//!
//! A run that names packs of others is put by nobody but collectors: one of those may be about to delete a pack that no run
//! names, and does not expect that one comes to name it. So this takes a collector's lease, and does nothing while another
//! collector is at work; and if its lease is revoked before the run arrives, the run is void.
//!
//! Runs that cannot be read, in whole or in part, are named as *lost* in the new one: should one of them be readable some day,
//! when collections have long deleted packs that it names, it must not count.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use crate::collect::others;
use crate::collect::survey::Survey;
use crate::error::VaultError;
use crate::features;
use crate::ids::{BlobId, LeaseId, PackId, RunId};
use crate::index::run::{MOST_ENTRIES, Place, RunDraft};
use crate::lease::{self, Holder, Lease};
use crate::vault::Vault;
use crate::write::NoLog;
use crate::write::store::Store;

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Indexed {
    /// Every pack has a run that can be read.
    #[default]
    Nothing,
    /// A run was put, or several.
    Put,
    /// These collect: to be tried again when they have ended.
    Others(BTreeSet<LeaseId>),
    /// Its lease was revoked: what was put is void, and it is to be done again.
    Revoked,
}

/// What became of the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexRepair {
    /// How it ended.
    pub ended: Indexed,
    /// Packs that have a run now and had none.
    pub packs: usize,
    /// Blobs in them.
    pub blobs: usize,
    /// Runs that could not be read, in whole or in part. They count for nothing from now on.
    pub set_aside: Vec<RunId>,
    /// Packs that runs name and that are not there. What was in them is damage; a check says whom it hurts.
    pub missing: Vec<PackId>,
}

/// Puts a run of all packs that no run names which can be read, but for those of writers that are at work, and those that will
/// be deleted. All that these hold is in memory meanwhile, about 100 bytes for each blob.
///
/// # Errors
/// If the vault may only be read, a condemnation cannot be read, or what the backend could not do.
pub async fn index(vault: &Vault, holder: &Holder, folder: Option<&Path>) -> Result<IndexRepair, VaultError> {
    vault.writable()?;
    let holder = &Holder { collects: true, ..holder.clone() };
    let lease = Lease::begin(vault, holder).await?;
    let (mut report, mut leaves_a_run) = (IndexRepair::default(), false);
    let done = Box::pin(under(vault, &lease, folder, &mut report, &mut leaves_a_run)).await;
    if leaves_a_run {
        // It may still arrive, and nobody has named it as lost: so it is void.
        lease::revoke(vault, lease.id(), holder).await?;
    } else {
        lease.end().await?;
    }
    done.map(|ended| IndexRepair { ended, ..report })
}

async fn under(
    vault: &Vault,
    lease: &Lease,
    folder: Option<&Path>,
    report: &mut IndexRepair,
    leaves_a_run: &mut bool,
) -> Result<Indexed, VaultError> {
    let others = others(vault, lease.id()).await?;
    if !others.is_empty() {
        return Ok(Indexed::Others(others));
    }
    features::check_writer(vault).await?;
    let survey = Box::pin(Survey::take(vault, folder)).await?;
    let index = survey.index.clone();
    // One of a later version is no damage, and one of a writer that is at work is that writer's.
    let damaged = index.unreadable().iter().filter(|(_, error)| matches!(error, VaultError::Damaged { .. }));
    let unreadable = damaged.map(|(run, _)| *run).filter(|run| !index.is_set_aside(*run));
    report.set_aside =
        unreadable.chain(survey.broken.iter().copied()).filter(|run| survey.is_over(run.lease())).collect();
    report.missing = survey.missing.keys().copied().collect();
    let mut places = index.noted_places();
    places.retain(|(_, place)| !index.is_condemned(place.pack));
    if places.is_empty() && report.set_aside.is_empty() {
        return Ok(Indexed::Nothing);
    }
    report.blobs = places.len();
    report.packs = places.iter().map(|(_, place)| place.pack).collect::<BTreeSet<_>>().len();
    let mut store = Store::new(vault, index, lease.id(), Arc::new(NoLog), Vec::new());
    let put = Box::pin(put(&mut store, &places, &report.set_aside)).await;
    *leaves_a_run = store.leaves_a_run();
    put?;
    Ok(if lease.is_revoked().await? { Indexed::Revoked } else { Indexed::Put })
}

/// As many runs as it takes. Only the last sets others aside: until it is there, those say what they can.
async fn put(store: &mut Store, places: &[(BlobId, Place)], set_aside: &[RunId]) -> Result<(), VaultError> {
    let mut rest = places;
    loop {
        let (piece, more) = rest.split_at(rest.len().min(MOST_ENTRIES));
        rest = more;
        let mut draft = RunDraft::default();
        draft.add_places(piece, &mut HashMap::new());
        if rest.is_empty() {
            draft.lost = set_aside.to_vec();
            return store.put_other(draft).await.map(drop);
        }
        store.put_other(draft).await?;
    }
}

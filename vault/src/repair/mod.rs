//! Repairing a vault (`FORMAT.md`, §6): what is bad is put again, and nothing is mended in place.
//!
//! - [`heal`]: blobs that have no good place any more. Their bytes are looked for in every place that anybody ever named, also
//!   in those that were reported as bad; then with [`Donor`]s: another vault, or a disk that still has them. Whatever a donor says
//!   is hashed with this vault's keys, and counts only if that gives the id that is wanted.
//! - [`index`](fn@index): runs that cannot be read. What the tables of packs say, or the headers of blobs where a table is
//!   destroyed, becomes a new run.
//! - [`manifest`](fn@manifest): a manifest of which somebody, as the journal of the host that made the backup, has the bytes.
//! - [`header`](fn@header): the header, from a host that knows it or out of a manifest. Only this one replaces something: there
//!   is one name for it.
//!
//! Healing is what a writer does, under a writer's lease; a crash anywhere leaves blobs that are there already when it is begun
//! again. It heals what is known to be bad: what has never been read since it decayed is found by a whole check first.

mod donor;
mod header;
mod heal;
mod index;
mod manifest;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

pub use donor::{DiskImage, Donor, Given, OtherVault, Plain, Wanted};
pub use header::{HeaderCopy, HeaderRepair, header};
pub use index::{IndexRepair, Indexed, index};
pub use manifest::{ManifestRepair, manifest};

use crate::backups::Backups;
use crate::check::{self, CheckReport};
use crate::error::VaultError;
use crate::features;
use crate::fetch::Fetcher;
use crate::ids::BackupId;
use crate::index::Index;
use crate::index::tidings::report_damage;
use crate::lease::{self, Holder, Lease};
use crate::names::MarkKind;
use crate::vault::Vault;
use crate::walk::{Judge, Packs, Walk};
use crate::write::NoLog;
use crate::write::store::Store;
use heal::Healer;

/// What healing did, and what it could not do.
#[derive(Debug, Default)]
pub struct Healing {
    /// Blobs that were found in another place of this vault, and put again.
    pub moved: u64,
    /// Blobs that donors had, and that were put.
    pub given: u64,
    /// Bytes of packs that were put.
    pub stored: u64,
    /// Donors that failed, and how each did first. They were asked for the rest all the same.
    pub failures: Vec<(String, String)>,
    /// Whether the lease was revoked meanwhile: what was put is void, and it is to be done again. Nothing is said of the rest.
    pub revoked: bool,
    /// How things stand now, as a quick check tells it: with each backup that is still hurt, by disk, and bytes from and to.
    pub now: CheckReport,
}

/// Heals all backups that nobody wants pruned, as far as bytes are to be had, and brings the marks up to date.
///
/// # Errors
/// If the vault may only be read, a condemnation cannot be read, or what the backend could not do. What was put by then is
/// found when it is begun again.
pub async fn heal(
    vault: &Vault,
    holder: &Holder,
    folder: Option<&Path>,
    donors: &[&dyn Donor],
) -> Result<Healing, VaultError> {
    vault.writable()?;
    let lease = Lease::begin(vault, holder).await?;
    let (mut report, mut leaves_a_run) = (Healing::default(), false);
    let work = Work { vault, holder, folder, donors, lease: &lease };
    let healed = Box::pin(work.under(&mut report, &mut leaves_a_run)).await;
    if leaves_a_run {
        // It may still arrive, and nobody has named it as lost: so it is void.
        lease::revoke(vault, lease.id(), holder).await?;
    } else {
        lease.end().await?;
    }
    healed.map(|()| report)
}

struct Work<'a> {
    vault: &'a Vault,
    holder: &'a Holder,
    folder: Option<&'a Path>,
    donors: &'a [&'a dyn Donor],
    lease: &'a Lease,
}

impl Work<'_> {
    async fn under(&self, report: &mut Healing, leaves_a_run: &mut bool) -> Result<(), VaultError> {
        features::check_writer(self.vault).await?;
        let there = self.packs().await?;
        let index = Arc::new(Index::load(self.vault, self.folder).await?);
        if !index.unreadable().is_empty() {
            // What is there need not be put again because the index does not tell of it.
            check::note_unnamed(self.vault, &index).await?;
        }
        let all = Backups::load(self.vault, None).await?;
        let mut store = Store::new(self.vault, index.clone(), self.lease.id(), Arc::new(NoLog), Vec::new());
        let put = Box::pin(self.put(&there, &index, &all, &mut store, report)).await;
        store.rest().await;
        *leaves_a_run = store.leaves_a_run();
        report.stored = store.stored().bytes;
        put?;
        if *leaves_a_run || self.lease.is_revoked().await? {
            report.revoked = true;
            return Ok(());
        }
        // All anew: others were at work too.
        let there = self.packs().await?;
        let (vault, holder, folder) = (self.vault, self.holder, self.folder);
        let judging = check::Judging { vault, holder, folder, only: None, marks: true };
        Box::pin(judging.all(&check::Seen { there, ..check::Seen::default() }, None, &mut report.now)).await
    }

    async fn packs(&self) -> Result<Packs, VaultError> {
        Ok(check::sizes(&check::packs(self.vault).await?))
    }

    async fn put(
        &self,
        there: &Packs,
        index: &Arc<Index>,
        all: &Backups,
        store: &mut Store,
        report: &mut Healing,
    ) -> Result<(), VaultError> {
        let doomed: HashSet<BackupId> = index
            .condemnations()
            .iter()
            .flat_map(|(_, one)| one.backups.iter().map(|(_, backup, _)| *backup))
            .collect();
        let wanted = all.iter().filter(|(id, _)| !doomed.contains(id) && !all.has(*id, MarkKind::Prune));
        // Domains that share nothing have keys of their own.
        let mut by_domain: HashMap<_, Vec<_>> = HashMap::new();
        for (_, backup) in wanted {
            if let Ok(manifest) = &backup.manifest {
                let keyed = self.vault.header().separate.then_some(backup.domain);
                by_domain.entry(keyed).or_default().push(manifest);
            }
        }
        for (keyed, manifests) in by_domain {
            let ids = self.vault.keys().ids(keyed);
            let folder = self.folder.map(Path::to_owned);
            let fetcher = Fetcher::new(self.vault, ids.clone(), index.clone(), folder, true);
            let walk = Walk::new(self.vault, &fetcher, Judge::Lasting(there.clone()));
            let mut healer = Healer::new(self.vault, ids, &fetcher, &walk, self.donors, store, report);
            for manifest in manifests {
                Box::pin(healer.backup(manifest)).await?;
                report_damage(self.vault, walk.take_bad()).await?;
            }
        }
        Box::pin(store.flush()).await?;
        Box::pin(store.merge()).await
    }
}

#[cfg(test)]
mod tests;

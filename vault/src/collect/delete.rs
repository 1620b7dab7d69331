//! Deleting what was condemned, once nobody who began before the condemnation is at work any more (`FORMAT.md`, §7, Collection
//! 10).
//!
//! Before each batch the collector looks that nobody has revoked it: one that was left behind deletes nothing, for others may
//! have begun to need what it condemned. The order matters to whoever comes after a power cut: a backup is unchecked before it
//! is gone, the index names no pack that is gone while the condemnation does not hide it, and the condemnation goes last.

use std::collections::BTreeSet;

use futures_util::StreamExt;

use super::{Ended, Halt, Work};
use crate::error::VaultError;
use crate::ids::{BackupId, DomainId, LeaseId, PackId, RunId};
use crate::index::tidings::{Condemnation, reports};
use crate::lease;
use crate::marks::Marks;
use crate::mutation;
use crate::names::{Area, LeasePart, MarkKind, ObjectName};

/// Objects that are deleted between two looks at the own lease.
const BATCH: usize = 64;
const AT_ONCE: usize = 16;

impl Work<'_> {
    pub(super) async fn delete(&mut self, condemnation: &Condemnation) -> Result<(), Halt> {
        let marks = Marks::list(self.vault).await?;
        let checked = |(_, backup, _): &(DomainId, BackupId, LeaseId)| {
            let backup = *backup;
            let name = |mark| ObjectName::Mark(backup, MarkKind::Checked, mark);
            marks.of_kind(backup, MarkKind::Checked).map(name).collect::<Vec<_>>()
        };
        let checks: BTreeSet<ObjectName> = condemnation.backups.iter().flat_map(checked).collect();
        self.delete_all(checks.into_iter().collect()).await?;
        let manifest = |(domain, backup, lease): &(DomainId, BackupId, LeaseId)| {
            ObjectName::Manifest(*domain, *backup, *lease)
        };
        self.delete_all(condemnation.backups.iter().map(manifest).collect()).await?;

        let kept = &self.report.kept;
        let packs: BTreeSet<PackId> =
            self.choice.give_up.keys().filter(|pack| !kept.contains(pack)).copied().collect();
        let there = |pack: &PackId| packs.contains(pack) && self.survey.packs.contains_key(pack);
        let gone: Vec<ObjectName> = self
            .choice
            .give_up
            .iter()
            .filter(|(pack, _)| there(pack))
            .map(|(pack, area)| ObjectName::Pack(*area, *pack))
            .collect();
        self.delete_all(gone).await?;
        self.delete_runs(&condemnation.runs).await?;

        self.delete_marks().await?;
        self.delete_reports(&packs).await?;
        self.delete_leases().await?;
        let older = condemnation.takes_over.iter().map(|lease| ObjectName::Condemned(*lease)).collect();
        self.delete_all(older).await?;
        if self.report.kept.is_empty() {
            self.delete_all(vec![ObjectName::Condemned(self.lease.id())]).await?;
        }
        Ok(())
    }

    /// Deletes runs, but for those that tell where something is in a pack that stays.
    pub(super) async fn delete_runs(&mut self, runs: &[RunId]) -> Result<(), Halt> {
        let kept = &self.report.kept;
        let mut gone = Vec::new();
        for run in runs {
            let names_kept = match self.survey.index.packs_of_run(*run).await {
                Ok(packs) => packs.iter().any(|(_, pack)| kept.contains(pack)),
                Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => false,
                Err(error) => return Err(error.into()),
            };
            if !names_kept {
                gone.push(ObjectName::Run(*run));
            }
        }
        self.delete_all(gone).await
    }

    /// All marks of backups that are gone, but their prunes, which stand for ever.
    async fn delete_marks(&mut self) -> Result<(), Halt> {
        let marks = Marks::list(self.vault).await?;
        let there: BTreeSet<BackupId> = self
            .vault
            .list("backups/")
            .await?
            .into_iter()
            .filter_map(|(name, _)| match name {
                ObjectName::Manifest(_, backup, _) => Some(backup),
                _ => None,
            })
            .collect();
        let (mut gone, mut last) = (Vec::new(), Vec::new());
        for backup in marks.backups().filter(|backup| !there.contains(backup)) {
            if marks.prunes(self.vault, *backup).await?.is_empty() {
                continue;
            }
            for (kind, mark) in marks.of(*backup) {
                let name = ObjectName::Mark(*backup, kind, mark);
                if kind == MarkKind::Prune { last.push(name) } else { gone.push(name) }
            }
        }
        self.delete_all(gone).await?;
        if mutation::on("prune_stands_for_ever") {
            self.delete_all(last).await?;
        }
        Ok(())
    }

    /// Reports of damage of packs that are all gone.
    async fn delete_reports(&mut self, deleted: &BTreeSet<PackId>) -> Result<(), Halt> {
        let mut gone = Vec::new();
        for (name, packs) in reports(self.vault).await? {
            let mut all_gone = true;
            for pack in packs.iter().filter(|pack| !deleted.contains(pack)) {
                for area in [Area::Data, Area::Tree] {
                    all_gone &= super::survey::size_of(self.vault, area, *pack).await?.is_none();
                }
            }
            if all_gone {
                gone.push(name);
            }
        }
        self.delete_all(gone).await
    }

    /// Leases that had ended when this collection began: `ended` last, `revoked` never.
    async fn delete_leases(&mut self) -> Result<(), Halt> {
        let (mut parts, mut ends) = (Vec::new(), Vec::new());
        for (id, _) in self.survey.leases.iter().filter(|(_, standing)| standing.ended) {
            for part in lease::parts(self.vault, *id).await? {
                let name = ObjectName::Lease(*id, part);
                match part {
                    LeasePart::Revoked => {}
                    LeasePart::Ended => ends.push(name),
                    LeasePart::Begun | LeasePart::Beat(_) => parts.push(name),
                }
            }
        }
        self.delete_all(parts).await?;
        self.delete_all(ends).await
    }

    async fn delete_all(&mut self, names: Vec<ObjectName>) -> Result<(), Halt> {
        for batch in names.chunks(BATCH) {
            if self.lease.is_revoked().await? {
                return Err(Halt::Ended(Ended::Revoked));
            }
            let vault = self.vault;
            let mut deleting = futures_util::stream::iter(batch.to_vec())
                .map(|name| async move { vault.backend().delete(&name.to_string()).await })
                .buffer_unordered(AT_ONCE);
            let mut deleted = 0;
            while let Some(one) = deleting.next().await {
                one.map_err(VaultError::from)?;
                deleted += 1;
            }
            drop(deleting);
            self.report.deleted += deleted;
        }
        Ok(())
    }
}

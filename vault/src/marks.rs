//! Pruning and protecting: marks that decide what a collection may delete (`FORMAT.md`, §7, "Prune and protect").
//!
//! Nobody locks anything, so the order of puts and lists decides. Who prunes lists protections first; a protection that was
//! put after that list is found by the collector, which looks for one after it has seen the prune. Who protects puts first and
//! lists then: a prune that is there may have been seen by a collector already, so the protection has failed.
//!
//! **A prune stands for ever**, also after everything of its backup is gone. A manifest, and a `checked`, whose puts were
//! never answered may arrive years later; with the prune gone as well they would bring back a backup without its data.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::backups::{Mark, put_mark, read_mark};
use crate::error::VaultError;
use crate::ids::{BackupId, MarkId};
use crate::lease::{Holder, Lease};
use crate::names::{MarkKind, ObjectName};
use crate::vault::Vault;

/// The marks of a vault, as they were listed once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks(BTreeMap<BackupId, BTreeSet<(MarkKind, MarkId)>>);

impl Marks {
    /// Lists all.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn list(vault: &Vault) -> Result<Self, VaultError> {
        let mut marks: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (name, _) in vault.list("marks/").await? {
            if let ObjectName::Mark(backup, kind, mark) = name {
                marks.entry(backup).or_default().insert((kind, mark));
            }
        }
        Ok(Self(marks))
    }

    /// Backups that have any.
    pub fn backups(&self) -> impl Iterator<Item = &BackupId> {
        self.0.keys()
    }

    /// The marks of a backup.
    pub fn of(&self, backup: BackupId) -> impl Iterator<Item = (MarkKind, MarkId)> {
        self.0.get(&backup).into_iter().flatten().copied()
    }

    /// Those of a kind.
    pub fn of_kind(&self, backup: BackupId, kind: MarkKind) -> impl Iterator<Item = MarkId> {
        self.of(backup).filter(move |(found, _)| *found == kind).map(|(_, mark)| mark)
    }

    /// The prunes of a backup that whoever may has put. One that is damaged, or not signed as it must be, orders nothing.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn prunes(&self, vault: &Vault, backup: BackupId) -> Result<Vec<MarkId>, VaultError> {
        let mut good = Vec::new();
        for mark in self.of_kind(backup, MarkKind::Prune) {
            if genuine(vault, backup, MarkKind::Prune, mark).await?.is_some() {
                good.push(mark);
            }
        }
        Ok(good)
    }

    /// The protections of a backup that nobody has ended. One that is damaged protects all the same.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn protections(&self, vault: &Vault, backup: BackupId) -> Result<BTreeSet<MarkId>, VaultError> {
        let mut standing: BTreeSet<MarkId> = self.of_kind(backup, MarkKind::Protect).collect();
        if standing.is_empty() {
            return Ok(standing);
        }
        for mark in self.of_kind(backup, MarkKind::Unprotect) {
            if let Some(Mark { ends: Some(ends), .. }) =
                genuine(vault, backup, MarkKind::Unprotect, mark).await?
            {
                standing.remove(&ends);
            }
        }
        Ok(standing)
    }
}

async fn genuine(
    vault: &Vault,
    backup: BackupId,
    kind: MarkKind,
    mark: MarkId,
) -> Result<Option<Mark>, VaultError> {
    match read_mark(vault, backup, kind, mark).await {
        Ok(mark) => Ok(mark),
        Err(error @ (VaultError::Damaged { .. } | VaultError::Newer { .. })) => {
            tracing::warn!(%error, "a mark that cannot be read, or is not signed as it must be, counts for nothing");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What became of an order to prune, or of the wish for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pruned {
    /// The mark is there, and stands for ever.
    Marked(MarkId),
    /// It was there already.
    Already(MarkId),
    /// These protections stand.
    Protected(BTreeSet<MarkId>),
}

/// Orders that a backup goes: the next collection deletes it. It need not be there, or be readable. Nobody withdraws this.
///
/// # Errors
/// If this key may not, or what the backend could not do: the order may then stand.
pub async fn prune(vault: &Vault, backup: BackupId, by: &str) -> Result<Pruned, VaultError> {
    order(vault, backup, by, MarkKind::Prune).await
}

/// Asks somebody who may to prune a backup.
///
/// # Errors
/// What the backend could not do.
pub async fn ask(vault: &Vault, backup: BackupId, by: &str) -> Result<Pruned, VaultError> {
    order(vault, backup, by, MarkKind::Ask).await
}

async fn order(vault: &Vault, backup: BackupId, by: &str, kind: MarkKind) -> Result<Pruned, VaultError> {
    vault.writable()?;
    let marks = Marks::list(vault).await?;
    for mark in marks.of_kind(backup, kind) {
        if genuine(vault, backup, kind, mark).await?.is_some() {
            return Ok(Pruned::Already(mark));
        }
    }
    let standing = marks.protections(vault, backup).await?;
    if !standing.is_empty() {
        return Ok(Pruned::Protected(standing));
    }
    Ok(Pruned::Marked(put_mark(vault, backup, kind, &Mark::new(Timestamp::now(), by)).await?))
}

/// What became of a protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// No collection deletes the backup before this mark is ended.
    Stands(MarkId),
    /// It came too late: the backup is to be pruned, and may be gone. Where it is not, the mark keeps it.
    TooLate(MarkId),
    /// There is no such backup.
    Absent(MarkId),
}

/// Protects a backup: under a lease puts the mark, then looks whether it came in time.
///
/// # Errors
/// What the backend could not do. Whether the backup is protected is then not known.
pub async fn protect(vault: &Vault, backup: BackupId, by: &Holder) -> Result<Protection, VaultError> {
    vault.writable()?;
    let lease = Lease::begin(vault, by).await?;
    let protected = Box::pin(protect_under(vault, backup, by)).await;
    lease.end().await?;
    protected
}

async fn protect_under(vault: &Vault, backup: BackupId, by: &Holder) -> Result<Protection, VaultError> {
    let mark = put_mark(vault, backup, MarkKind::Protect, &Mark::new(Timestamp::now(), &by.host)).await?;
    // By name, whether it can be read or not: too late is said rather once too often.
    if Marks::list(vault).await?.of_kind(backup, MarkKind::Prune).next().is_some() {
        return Ok(Protection::TooLate(mark));
    }
    let there = vault.list("backups/").await?;
    let is_there =
        there.iter().any(|(name, _)| matches!(name, ObjectName::Manifest(_, found, _) if *found == backup));
    Ok(if is_there { Protection::Stands(mark) } else { Protection::Absent(mark) })
}

/// What the end of a protection brings about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// There is a prune that this protection survived, and nothing else protects the backup: it goes.
    LetsGo,
    /// Others still protect it.
    Others(BTreeSet<MarkId>),
    /// Nobody wants it gone.
    Harmless,
}

/// What ending a protection would bring about; to be told before it is done.
///
/// # Errors
/// What the backend could not do.
pub async fn ending(vault: &Vault, backup: BackupId, protection: MarkId) -> Result<Ending, VaultError> {
    let marks = Marks::list(vault).await?;
    let mut others = marks.protections(vault, backup).await?;
    others.remove(&protection);
    if !others.is_empty() {
        return Ok(Ending::Others(others));
    }
    Ok(if marks.prunes(vault, backup).await?.is_empty() { Ending::Harmless } else { Ending::LetsGo })
}

/// Ends a protection.
///
/// # Errors
/// If this key may not, or what the backend could not do.
pub async fn unprotect(
    vault: &Vault,
    backup: BackupId,
    protection: MarkId,
    by: &str,
) -> Result<(), VaultError> {
    vault.writable()?;
    let mut mark = Mark::new(Timestamp::now(), by);
    mark.ends = Some(protection);
    put_mark(vault, backup, MarkKind::Unprotect, &mark).await.map(drop)
}

#[cfg(test)]
mod tests;

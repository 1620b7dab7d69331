//! Checking a vault: which backups are whole, and which lack what (`FORMAT.md`, §6).
//!
//! The quick check walks all trees: nodes are read, and of chunks it is only asked whether a good place is named in a pack
//! that is there and as long as that. A verification reads packs first, each once whoever needs it, opens every blob and computes its id; what is
//! bad goes into `damage/`, and the walk then knows of it. It reads all packs, those of one backup, or a share of them: then
//! [`Readings`] tell when the shares of several runs are all of a backup.
//!
//! Marks are put for what was found. `hurt` names the positions; with it whatever was said of the backup's having been verified
//! is taken back, and does not count though it cannot be: also once it is healed, for then it holds bytes that nobody has read.
//! `verified` says that all of it was read and found good, and between which times.

mod reading;
mod readings;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

pub(crate) use reading::Broken;
pub use readings::{NotAShare, Readings, Share};

use crate::backend::BackendErrorKind;
use crate::backups::{self, Backups, Hurt, Mark};
use crate::collect::survey::entries;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::ids::{BackupId, MarkId, PackId, RunId};
use crate::index::Index;
use crate::index::run::Place;
use crate::index::tidings::report_damage;
use crate::lease::{Holder, Lease};
use crate::names::{Area, MarkKind, ObjectName};
use crate::vault::Vault;
use crate::walk::{Judge, Packs, Walk};

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// Backups that need nothing that is not there.
    pub whole: Vec<BackupId>,
    /// Of those, the ones of which all was read and found good, by this run or by it and earlier ones. They are marked.
    pub verified: Vec<BackupId>,
    /// Those that do, and what.
    pub hurt: Vec<(BackupId, Vec<Hurt>)>,
    /// Manifests that cannot be read.
    pub unreadable: Vec<(BackupId, String)>,
    /// Backups that were checked once, whose manifest is gone although nobody pruned them.
    pub missing: Vec<BackupId>,
    /// Runs of the index that cannot be read, in whole or in part. None that another has set aside.
    pub runs: Vec<(RunId, String)>,
    /// Packs whose seal does not fit, of those that were read.
    pub packs: Vec<PackId>,
    /// Packs that were read.
    pub packs_read: u64,
    /// Packs that are there.
    pub packs_there: u64,
    /// Bad places that were found and reported.
    pub damage: usize,
    /// Bytes of packs that were read.
    pub read: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.hurt.is_empty()
            && self.unreadable.is_empty()
            && self.missing.is_empty()
            && self.runs.is_empty()
            && self.packs.is_empty()
            && self.damage == 0
    }
}

/// What is to be checked, and how thoroughly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct What {
    /// Only this backup, and of the packs only those that it needs.
    pub only: Option<BackupId>,
    /// The packs that are read; none by the quick check. One backup is always read whole.
    pub read: Option<Share>,
}

/// Checks all backups. With `whole`, every byte of every pack is read.
///
/// # Errors
/// What the backend could not do: what could not be read is no damage.
pub async fn check(
    vault: &Vault,
    holder: &Holder,
    folder: Option<&Path>,
    whole: bool,
) -> Result<CheckReport, VaultError> {
    let what = What { only: None, read: whole.then_some(Share::ALL) };
    verify(vault, holder, folder, what, &mut Readings::default()).await
}

/// Checks backups, and marks those that are verified by it. What was read is noted, also when this fails in the end.
///
/// # Errors
/// What the backend could not do: what could not be read is no damage.
pub async fn verify(
    vault: &Vault,
    holder: &Holder,
    folder: Option<&Path>,
    what: What,
    readings: &mut Readings,
) -> Result<CheckReport, VaultError> {
    vault.writable()?;
    let lease = Lease::begin(vault, holder).await?;
    let report = Box::pin(under(vault, holder, folder, what, readings)).await;
    lease.end().await?;
    report
}

async fn under(
    vault: &Vault,
    holder: &Holder,
    folder: Option<&Path>,
    what: What,
    readings: &mut Readings,
) -> Result<CheckReport, VaultError> {
    crate::features::check_writer(vault).await?;
    let mut report = CheckReport::default();
    // Before the packs: whatever these backups need is there, and what comes later is none of them.
    let backups = listed(vault).await?;
    let packs = packs(vault).await?;
    let mut seen = Seen { there: sizes(&packs), ..Seen::default() };
    report.packs_there = packs.len() as u64;
    if let Some(share) = what.read {
        readings.begin(&backups, &seen.there, Timestamp::now());
        let needed = match what.only {
            Some(backup) => Some(Box::pin(needed(vault, folder, backup, &seen.there)).await?),
            None => None,
        };
        let chosen =
            |pack| needed.as_ref().map_or_else(|| share.contains(pack), |needed| needed.contains(&pack));
        let packs = packs.into_iter().map(|(name, _)| name);
        let packs = packs.filter(|name| pack_of(name).is_some_and(chosen)).collect();
        let there = &mut seen.there;
        seen.broken = Box::pin(reading::read_all(vault, packs, there, readings, &mut report)).await?;
    }
    let reading = what.read.map(|_| readings);
    let judging = Judging { vault, holder, folder, only: what.only, marks: true };
    Box::pin(judging.all(&seen, reading, &mut report)).await?;
    Ok(report)
}

/// The backups whose manifests are there.
async fn listed(vault: &Vault) -> Result<BTreeSet<BackupId>, VaultError> {
    let names = vault.list("backups/").await?;
    let id = |(name, _)| if let ObjectName::Manifest(_, backup, _) = name { Some(backup) } else { None };
    Ok(names.into_iter().filter_map(id).collect())
}

/// The packs in which what a backup needs has its good places.
async fn needed(
    vault: &Vault,
    folder: Option<&Path>,
    backup: BackupId,
    there: &Packs,
) -> Result<HashSet<PackId>, VaultError> {
    let index = Arc::new(Index::load(vault, folder).await?);
    let all = Backups::load(vault, None).await?;
    let Some(Ok(manifest)) = all.get(backup).map(|found| &found.manifest) else { return Ok(HashSet::new()) };
    let fetcher = Fetcher::new(vault, vault.ids(manifest.domain), index, folder.map(Path::to_owned), true);
    let mut walk = Walk::new(vault, &fetcher, Judge::Readable(there.clone(), Broken::new()));
    walk.backup(manifest).await?;
    Ok(walk.packs())
}

/// Finds out which backups are hurt, and changes nothing.
///
/// # Errors
/// What the backend could not do.
pub async fn look(vault: &Vault, holder: &Holder, folder: Option<&Path>) -> Result<CheckReport, VaultError> {
    vault.writable()?;
    let lease = Lease::begin(vault, holder).await?;
    let looked = Box::pin(looked(vault, holder, folder)).await;
    lease.end().await?;
    looked
}

async fn looked(vault: &Vault, holder: &Holder, folder: Option<&Path>) -> Result<CheckReport, VaultError> {
    crate::features::check_writer(vault).await?;
    let there = sizes(&packs(vault).await?);
    let mut report = CheckReport::default();
    let judging = Judging { vault, holder, folder, only: None, marks: false };
    Box::pin(judging.all(&Seen { there, ..Seen::default() }, None, &mut report)).await?;
    Ok(report)
}

/// Packs by their ids.
pub(crate) fn sizes(packs: &[(ObjectName, u64)]) -> Packs {
    packs.iter().filter_map(|(name, size)| Some((pack_of(name)?, *size))).collect()
}

/// The packs that are there.
pub(crate) async fn packs(vault: &Vault) -> Result<Vec<(ObjectName, u64)>, VaultError> {
    let mut packs = Vec::new();
    for area in [Area::Data, Area::Tree] {
        packs.extend(vault.list(&format!("{}/", area.folder())).await?);
    }
    Ok(packs)
}

/// Takes in what the packs hold of which no run tells all: by their tables, or the headers of their blobs.
pub(crate) async fn note_unnamed(vault: &Vault, index: &Index) -> Result<(), VaultError> {
    let mut named = HashSet::new();
    for state in index.states() {
        let of = match index.scan(state.id, &mut |_, _| {}).await {
            Ok(()) => index.packs_of_run(state.id).await,
            Err(error) => Err(error),
        };
        match of {
            Ok(packs) => named.extend(packs.into_iter().map(|(_, pack)| pack)),
            Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    for (name, size) in packs(vault).await? {
        let ObjectName::Pack(area, pack) = name else { continue };
        if named.contains(&pack) {
            continue;
        }
        if let Some(entries) = entries(vault, area, pack, size).await? {
            index.note_places(entries.iter().map(|entry| (entry.id, Place::new(area, pack, entry))));
        }
    }
    Ok(())
}

/// The packs that are there, and of those whose seal does not fit what is good in them.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) there: Packs,
    pub(crate) broken: Broken,
}

/// Walks the trees of backups.
pub(crate) struct Judging<'a> {
    pub(crate) vault: &'a Vault,
    pub(crate) holder: &'a Holder,
    pub(crate) folder: Option<&'a Path>,
    /// Only this one.
    pub(crate) only: Option<BackupId>,
    /// Whether marks are put and taken back.
    pub(crate) marks: bool,
}

impl Judging<'_> {
    /// Judges all. Reports damage, and puts and takes back marks.
    pub(crate) async fn all(
        &self,
        seen: &Seen,
        mut readings: Option<&mut Readings>,
        report: &mut CheckReport,
    ) -> Result<(), VaultError> {
        let vault = self.vault;
        let index = Arc::new(Index::load(vault, self.folder).await?);
        let unreadable = index.unreadable().iter().filter(|(run, _)| !index.is_set_aside(*run));
        report.runs = unreadable.map(|(run, error)| (*run, error.to_string())).collect();
        // The walk asks for as much; here what cannot be read is told by its name.
        for state in index.states().iter().filter(|state| state.usable) {
            match index.scan(state.id, &mut |_, _| {}).await {
                Ok(()) | Err(VaultError::Missing { .. }) => {}
                Err(error @ VaultError::Damaged { .. }) => report.runs.push((state.id, error.to_string())),
                Err(error) => return Err(error),
            }
        }
        if !report.runs.is_empty() {
            // A backup is not hurt because the index is.
            note_unnamed(vault, &index).await?;
        }
        let all = Backups::load(vault, None).await?;
        report.missing = if self.only.is_none() { all.missing() } else { Vec::new() };
        // Domains that share nothing have keys of their own, and so a walk of their own.
        let mut by_domain: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (id, backup) in all.iter().filter(|(id, _)| self.only.is_none_or(|only| only == *id)) {
            match &backup.manifest {
                Ok(manifest) => by_domain.entry(backup.domain).or_default().push((id, manifest)),
                Err(error) => report.unreadable.push((id, error.to_string())),
            }
        }
        for (domain, manifests) in by_domain {
            let folder = self.folder.map(Path::to_owned);
            let fetcher = Fetcher::new(vault, vault.ids(domain), index.clone(), folder, self.marks);
            let judge = Judge::Readable(seen.there.clone(), seen.broken.clone());
            let mut verified = Vec::new();
            {
                let mut walk = Walk::new(vault, &fetcher, judge).with_readings(readings.as_deref());
                for (id, manifest) in manifests {
                    let walked = walk.backup(manifest).await?;
                    let bad = walk.take_bad();
                    report.damage += bad.len();
                    if self.marks {
                        report_damage(vault, bad).await?;
                    }
                    if !walked.hurt.is_empty() {
                        self.is_hurt(&all, id, &walked.hurt).await?;
                        report.hurt.push((id, walked.hurt));
                        continue;
                    }
                    report.whole.push(id);
                    if self.marks {
                        self.is_whole(&all, id).await?;
                    }
                    let since = readings.as_ref().and_then(|readings| readings.covers(id, walked.oldest));
                    if let Some(since) = since {
                        self.is_verified(&all, id, since).await?;
                        verified.push(id);
                    }
                }
            }
            if let Some(readings) = &mut readings {
                verified.iter().for_each(|id| readings.restart(*id));
            }
            report.verified.append(&mut verified);
        }
        Ok(())
    }

    async fn is_hurt(&self, all: &Backups, id: BackupId, hurt: &[Hurt]) -> Result<(), VaultError> {
        if !self.marks {
            return Ok(());
        }
        if !is_told(self.vault, all, id, hurt).await? {
            let mut mark = Mark::new(Timestamp::now(), &self.holder.host);
            mark.hurt = hurt.to_vec();
            backups::put_mark(self.vault, id, MarkKind::Hurt, &mark).await?;
        }
        // After that: at no moment does it count as verified. Marks that may not be deleted do not count beside a `hurt`.
        let verified: Vec<MarkId> = all.all_marks().of_kind(id, MarkKind::Verified).collect();
        self.take_back(id, MarkKind::Verified, &verified).await.map(drop)
    }

    /// Takes back what was said of a backup that is whole again, where the credentials allow that.
    async fn is_whole(&self, all: &Backups, id: BackupId) -> Result<(), VaultError> {
        let hurt: Vec<MarkId> = all.all_marks().of_kind(id, MarkKind::Hurt).collect();
        if hurt.is_empty() {
            return Ok(());
        }
        // First what was verified before it was hurt, and what somebody said meanwhile: what healed it has not been read.
        let fresh = self.vault.list(&format!("marks/{id}/")).await?;
        let verified = fresh.into_iter().filter_map(|(name, _)| match name {
            ObjectName::Mark(_, MarkKind::Verified, mark) => Some(mark),
            _ => None,
        });
        let verified: Vec<MarkId> = verified.collect();
        if self.take_back(id, MarkKind::Verified, &verified).await? {
            self.take_back(id, MarkKind::Hurt, &hurt).await?;
        }
        Ok(())
    }

    async fn is_verified(&self, all: &Backups, id: BackupId, since: Timestamp) -> Result<(), VaultError> {
        let mut mark = Mark::new(Timestamp::now(), &self.holder.host);
        mark.since = Some(since);
        backups::put_mark(self.vault, id, MarkKind::Verified, &mark).await?;
        // One says it all. The new one stands before the old ones go.
        let old: Vec<MarkId> = all.all_marks().of_kind(id, MarkKind::Verified).collect();
        self.take_back(id, MarkKind::Verified, &old).await.map(drop)
    }

    /// Deletes marks. Not so, if the credentials do not allow it.
    async fn take_back(&self, id: BackupId, kind: MarkKind, marks: &[MarkId]) -> Result<bool, VaultError> {
        for mark in marks {
            let name = ObjectName::Mark(id, kind, *mark).to_string();
            match self.vault.backend().delete(&name).await {
                Ok(()) => {}
                Err(error) if error.kind == BackendErrorKind::Denied => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

pub(crate) fn pack_of(name: &ObjectName) -> Option<PackId> {
    if let ObjectName::Pack(_, pack) = name { Some(*pack) } else { None }
}

/// Whether a mark says the same already.
async fn is_told(vault: &Vault, all: &Backups, backup: BackupId, hurt: &[Hurt]) -> Result<bool, VaultError> {
    for mark in all.all_marks().of_kind(backup, MarkKind::Hurt) {
        match backups::read_mark(vault, backup, MarkKind::Hurt, mark).await {
            Ok(Some(mark)) if mark.hurt == hurt => return Ok(true),
            Ok(_) | Err(VaultError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests;

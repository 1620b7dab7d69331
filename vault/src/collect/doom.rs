//! Which backups go (`FORMAT.md`, §7, Collection 3, and "Append-only").
//!
//! A backup goes if a prune is obeyed and nothing protects it in a list of marks that was begun after the one that showed the
//! prune. One list is not enough: it is no snapshot, and may show a prune and miss the protection that was put before it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::survey::Survey;
use super::{Ended, Halt, Policy};
use crate::backups::Backups;
use crate::error::VaultError;
use crate::ids::{BackupId, DomainId, LeaseId, MarkId};
use crate::marks::Marks;
use crate::mutation;
use crate::names::MarkKind;
use crate::vault::Vault;

/// Since when a collector has known of which prune, by its own clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known(BTreeMap<MarkId, Timestamp>);

impl Known {
    /// Whether a prune has been known for this long; takes it in if it is new.
    fn is_old(&mut self, prune: MarkId, now: Timestamp, delay: Duration) -> bool {
        let since = *self.0.entry(prune).or_insert(now);
        Duration::try_from(now.duration_since(since)).is_ok_and(|known| known >= delay)
    }
}

/// What goes and what stays.
#[derive(Debug, Default)]
pub(super) struct Doom {
    /// Backups that go.
    pub(super) backups: BTreeSet<BackupId>,
    /// Backups that are to go, and stay for now.
    pub(super) spared: BTreeSet<BackupId>,
    /// Manifests of older condemnations.
    pub(super) older: Vec<(DomainId, BackupId, LeaseId)>,
}

/// Decides.
pub(super) async fn decide(
    vault: &Vault,
    survey: &Survey,
    backups: &Backups,
    policy: &Policy,
    known: &mut Known,
    now: Timestamp,
) -> Result<Doom, Halt> {
    let first = backups.all_marks();
    let second = match mutation::on("second_list_of_marks") {
        true => first.clone(),
        false => Marks::list(vault).await?,
    };
    let mut doom = Doom::default();
    for (_, condemnation) in survey.index.condemnations() {
        doom.older.extend(condemnation.backups.iter().copied());
    }
    doom.backups.extend(doom.older.iter().map(|(_, backup, _)| *backup));
    let last = policy.prune_delay.map_or_else(BTreeSet::new, |_| last_verified(backups));
    let mut blocked = Vec::new();
    for backup in first.backups() {
        let prunes = first.prunes(vault, *backup).await?;
        if prunes.is_empty() {
            if backups.get(*backup).is_none() && backups.has(*backup, MarkKind::Checked) {
                blocked.push((Some(*backup), "its manifest is missing, and nobody pruned it".to_owned()));
            }
            continue;
        }
        if doom.backups.contains(backup) || backups.get(*backup).is_none() {
            continue;
        }
        let old_enough = policy.prune_delay.is_none_or(|delay| {
            // Of each, for each may be the one that counts later.
            let old: Vec<bool> = prunes.iter().map(|prune| known.is_old(*prune, now, delay)).collect();
            old.contains(&true)
        });
        let is_protected = !second.protections(vault, *backup).await?.is_empty();
        if old_enough && !is_protected && !last.contains(backup) {
            doom.backups.insert(*backup);
        } else {
            doom.spared.insert(*backup);
        }
    }
    for id in last_whole(backups, &doom) {
        doom.backups.remove(&id);
        doom.spared.insert(id);
    }
    for (id, backup) in backups.iter().filter(|(id, _)| !doom.backups.contains(id)) {
        if let Err(error) = &backup.manifest {
            blocked.push((Some(id), error.to_string()));
        }
    }
    if blocked.is_empty() { Ok(doom) } else { Err(Halt::Ended(Ended::Blocked(blocked))) }
}

/// Of each domain of which only such backups would stay that are known to be hurt: the newest that is not. When somebody ordered
/// that it goes, what stays may have passed for whole.
fn last_whole(backups: &Backups, doom: &Doom) -> Vec<BackupId> {
    #[derive(Default)]
    struct Stay {
        whole: usize,
        hurt: usize,
        last: Option<(Timestamp, BackupId)>,
    }
    let condemned = |id: BackupId| doom.older.iter().any(|(_, older, _)| *older == id);
    let mut domains: BTreeMap<DomainId, Stay> = BTreeMap::new();
    for (id, backup) in backups.iter().filter(|(id, _)| backups.has(*id, MarkKind::Checked)) {
        let of = domains.entry(backup.domain).or_default();
        let is_hurt = backups.has(id, MarkKind::Hurt) || backup.manifest.is_err();
        match (doom.backups.contains(&id), &backup.manifest) {
            (false, _) if is_hurt => of.hurt += 1,
            (false, _) => of.whole += 1,
            (true, Ok(manifest)) if !is_hurt && !condemned(id) => {
                of.last = of.last.max(Some((manifest.taken, id)));
            }
            (true, _) => {}
        }
    }
    let bereft = domains.into_values().filter(|of| of.whole == 0 && of.hurt > 0);
    bereft.filter_map(|of| of.last.map(|(_, id)| id)).collect()
}

/// The newest verified backup of each domain.
fn last_verified(backups: &Backups) -> BTreeSet<BackupId> {
    let mut last: BTreeMap<DomainId, (Timestamp, BackupId)> = BTreeMap::new();
    for (id, backup) in backups.iter().filter(|(id, _)| backups.is_verified(*id)) {
        let Ok(manifest) = &backup.manifest else { continue };
        let newest = last.entry(backup.domain).or_insert((manifest.taken, id));
        *newest = (*newest).max((manifest.taken, id));
    }
    last.into_values().map(|(_, id)| id).collect()
}

/// The manifests that were not there before, and are not doomed; or why what they need is not known.
pub(super) fn new_ones(
    before: &Backups,
    after: &Backups,
    doomed: &BTreeSet<BackupId>,
) -> Result<BTreeSet<BackupId>, Halt> {
    let known: BTreeSet<(BackupId, LeaseId)> =
        before.all_manifests().map(|(id, backup)| (id, backup.lease)).collect();
    let mut new = BTreeSet::new();
    let mut blocked = Vec::new();
    for (id, backup) in after.all_manifests() {
        if doomed.contains(&id) || known.contains(&(id, backup.lease)) {
            continue;
        }
        match after.get(id).map(|found| &found.manifest) {
            Some(Err(error)) => blocked.push((Some(id), error.to_string())),
            _ => {
                new.insert(id);
            }
        }
    }
    if blocked.is_empty() { Ok(new) } else { Err(Halt::Ended(Ended::Blocked(blocked))) }
}

/// A backup that cannot be collected around, as an end of the collection.
pub(super) fn blocked(backup: Option<BackupId>, error: &VaultError) -> Halt {
    Halt::Ended(Ended::Blocked(vec![(backup, error.to_string())]))
}

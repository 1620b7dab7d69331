//! How many checkpoints of ours a domain keeps over all vaults, and which give way.
//!
//! Each costs the guest's QEMU a bitmap in every image and a bit more for every write, and a vault that nobody backs up into any
//! more would keep its checkpoints for ever. So there is a bound. Which give way follows from their names alone, so that
//! everybody comes to the same, whenever he looks:
//!
//! 1. those that are not the newest of their vault (they serve differential backups, and disks that were left out), oldest first;
//! 2. the newest of the other vaults, oldest first: the vault that has waited longest. Its next backup is a full one.
//!
//! The one that a job has just made never does. Others' do not count, and are never touched. Oldest goes by the time in the job's
//! id.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::forget::checkpoint_job;

/// What a vault has lost to the bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GaveWay {
    /// The first eight digits of the vault's id.
    pub vault: String,
    /// The name by which this host knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its checkpoints that were deleted for it.
    pub checkpoints: Vec<String>,
    /// None of its checkpoints is left: the next backup into it reads all disks in full.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_full: bool,
}

/// The digits of the vault's id in the name of a checkpoint of ours.
#[must_use]
pub fn vault_of(checkpoint: &str) -> Option<&str> {
    checkpoint_job(checkpoint)?;
    checkpoint.strip_prefix("vmkeep-")?.split_once('-').map(|(vault, _)| vault)
}

/// The checkpoints of each vault among those that are listed, oldest first, by the digits of its id.
#[must_use]
pub fn by_vault(listed: &[String]) -> BTreeMap<&str, Vec<&String>> {
    let mut vaults: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
    for name in listed {
        if let Some(vault) = vault_of(name) {
            vaults.entry(vault).or_default().push(name);
        }
    }
    for names in vaults.values_mut() {
        names.sort_by_key(|name| checkpoint_job(name));
    }
    vaults
}

/// Those that give way so that no more than `keep` stay, in this order. `made` never does.
#[must_use]
pub fn beyond(listed: &[String], made: Option<&str>, keep: usize) -> Vec<String> {
    let total: usize = by_vault(listed).values().map(Vec::len).sum();
    order(listed, made).into_iter().take(total.saturating_sub(keep.max(1))).collect()
}

/// In which order those of ours give way. `made` never does.
#[must_use]
pub fn order(listed: &[String], made: Option<&str>) -> Vec<String> {
    let vaults = by_vault(listed);
    let newest: BTreeSet<&String> = vaults.values().filter_map(|names| names.last().copied()).collect();
    let mut all: Vec<&String> = vaults.values().flatten().copied().collect();
    all.retain(|name| Some(name.as_str()) != made);
    all.sort_by_key(|name| (newest.contains(name), checkpoint_job(name)));
    all.into_iter().cloned().collect()
}

/// What it means for their vaults that these are gone, where `listed` are left.
#[must_use]
pub fn gave_way(gone: &[String], listed: &[String]) -> Vec<GaveWay> {
    let left = by_vault(listed);
    let vaults = by_vault(gone).into_iter().map(|(vault, names)| GaveWay {
        vault: vault.to_owned(),
        name: None,
        checkpoints: names.into_iter().cloned().collect(),
        in_full: !left.contains_key(vault),
    });
    vaults.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The checkpoint that a job of that time made for a vault.
    fn made(vault: u32, time: u64) -> String {
        format!("vmkeep-{vault:08x}-{:012x}70008000000000000000", time)
    }

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn nothing_gives_way_as_long_as_there_is_room() {
        let listed = vec![made(1, 5), made(1, 6), made(2, 7), "nightly".to_owned()];
        assert_eq!(beyond(&listed, Some(&listed[2]), 3), strings(&[]));
    }

    #[test]
    fn what_no_vault_needs_for_its_next_backup_goes_first_and_then_the_vault_that_has_waited_longest() {
        // Vault 2 has waited longer than vault 1, though the oldest checkpoint of all is vault 1's.
        let listed = vec![made(3, 30), made(1, 10), made(2, 15), made(1, 20), made(3, 12)];
        let order = [made(1, 10), made(3, 12), made(2, 15), made(1, 20)];
        for keep in 1..=5 {
            let gone = beyond(&listed, Some(&listed[0]), keep);
            assert_eq!(gone, order[..5 - keep], "{keep}");
        }
        // No bound is so small that the next backup into the vault of this one could not begin with it.
        assert_eq!(beyond(&listed, Some(&listed[0]), 0), order);
    }

    #[test]
    fn whose_next_backup_is_a_full_one_is_said() {
        let (gone, left) = ([made(1, 10), made(2, 15)], [made(1, 20), made(3, 30)]);
        let vaults = gave_way(&gone, &left);
        let said: Vec<_> = vaults.iter().map(|one| (one.vault.as_str(), one.in_full)).collect();
        assert_eq!(said, [("00000001", false), ("00000002", true)]);
    }

    proptest! {
        #[test]
        fn the_bound_holds_whatever_is_listed_in_whatever_order(
            ours in prop::collection::btree_set((0u32..5, 0u64..40), 1..20),
            foreign in prop::collection::btree_set("[a-z]{1,8}", 0..4),
            keep in 1usize..8,
            turn in 0usize..20,
        ) {
            let names: Vec<String> = ours.iter().map(|(vault, time)| made(*vault, *time)).collect();
            let own = names.iter().max_by_key(|name| checkpoint_job(name)).cloned();
            let mut listed = names.clone();
            listed.extend(foreign.iter().cloned());
            let gone = beyond(&listed, own.as_deref(), keep);
            let at = turn % listed.len();
            listed.rotate_left(at);
            prop_assert_eq!(&beyond(&listed, own.as_deref(), keep), &gone, "the order of the list says nothing");
            let left: Vec<String> = listed.iter().filter(|name| !gone.contains(name)).cloned().collect();
            prop_assert_eq!(names.len() - gone.len(), names.len().min(keep));
            prop_assert!(foreign.iter().all(|name| left.contains(name)));
            prop_assert!(own.is_none_or(|own| left.contains(&own)));
            // As many vaults as fit keep the one that their next backup begins with.
            let vaults = by_vault(&listed).len();
            prop_assert_eq!(by_vault(&left).len(), vaults.min(keep));
        }
    }
}

//! Which backups stay: a pure function of what was found.
//!
//! Per root, because a copy on another disk is another series: keeping three here must not remove one there. Counted are
//! only backups that are whole. Protected ones stay besides and are not counted, so that protecting a backup never
//! removes another. Copies of a backup beside each other are one: it counts once, and they stay or go together. What is damaged is neither counted nor removed: somebody may still get something out of it, and
//! a rule must not decide that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use jiff::Timestamp;

use crate::manifest::BackupId;

/// How a backup stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// All its files are there, with their sizes and headers.
    Whole,
    /// So are those of this one, and it must not be deleted; who said so, and why.
    Protected(String),
    /// Something is missing or wrong.
    Damaged(String),
}

/// A backup of the domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The backup.
    pub backup: BackupId,
    /// The root that it lies below.
    pub root: PathBuf,
    /// The instant that it holds.
    pub at: Timestamp,
    /// How it stands.
    pub standing: Standing,
}

/// What becomes of the backups below a root, as places in the list that was judged: an id alone does not tell two copies
/// of a backup apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Series {
    /// These stay; the first is the newest, or the successor.
    pub kept: Vec<usize>,
    /// These go, the oldest first.
    pub gone: Vec<usize>,
}

/// Keeps the newest `keep` whole backups below each root. A successor stays in any case, and only its root is judged;
/// if it is not among the whole or protected ones, nothing goes.
#[must_use]
pub fn keep_last(all: &[Candidate], keep: u32, successor: Option<BackupId>) -> BTreeMap<PathBuf, Series> {
    let keep = usize::try_from(keep).unwrap_or(usize::MAX).max(1);
    let stands = |one: &&Candidate| !matches!(one.standing, Standing::Damaged(_));
    let of = successor.map(|id| all.iter().filter(stands).find(|one| one.backup == id));
    let mut roots: BTreeMap<PathBuf, Vec<usize>> = BTreeMap::new();
    for (at, one) in all.iter().enumerate().filter(|(_, one)| stands(one)) {
        let judged = match of {
            None => true,
            Some(Some(successor)) => successor.root == one.root,
            Some(None) => false,
        };
        if judged {
            roots.entry(one.root.clone()).or_default().push(at);
        }
    }
    let series = |mut found: Vec<usize>| {
        // Of two that hold the same instant the order of their ids decides, so that the same question has one answer.
        found.sort_by_key(|at| {
            let one = &all[*at];
            std::cmp::Reverse((Some(one.backup) == successor, one.at, one.backup))
        });
        let newest = found.first().copied();
        let id = |at: &usize| all[*at].backup;
        let protected: BTreeSet<BackupId> =
            found.iter().filter(|at| all[**at].standing != Standing::Whole).map(id).collect();
        let (besides, counted): (Vec<usize>, Vec<usize>) =
            found.into_iter().partition(|at| protected.contains(&id(at)));
        let mut seen = BTreeSet::new();
        let ids: BTreeSet<BackupId> =
            counted.iter().map(id).filter(|id| seen.insert(*id)).take(keep).collect();
        let (mut kept, gone): (Vec<usize>, Vec<usize>) =
            counted.into_iter().partition(|at| ids.contains(&id(at)));
        kept.extend(besides);
        // The newest leads: it is the one that is read again.
        kept.sort_by_key(|at| Some(*at) != newest);
        Series { kept, gone: gone.into_iter().rev().collect() }
    };
    roots.into_iter().map(|(root, found)| (root, series(found))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn candidate(id: u128, root: &str, at: i64, standing: Standing) -> Candidate {
        let at = Timestamp::from_second(at).unwrap();
        Candidate { backup: BackupId(Uuid::from_u128(id)), root: root.into(), at, standing }
    }

    fn ids(all: &[Candidate], places: &[usize]) -> Vec<u128> {
        places.iter().map(|at| all[*at].backup.0.as_u128()).collect()
    }

    #[test]
    fn the_newest_stay_and_the_oldest_go_first() {
        let all: Vec<_> = [3, 1, 4, 2].map(|n| candidate(n, "/a", n as i64, Standing::Whole)).into();
        let series = &keep_last(&all, 2, None)[std::path::Path::new("/a")];
        assert_eq!((ids(&all, &series.kept), ids(&all, &series.gone)), (vec![4, 3], vec![1, 2]));
    }

    #[test]
    fn what_is_damaged_is_neither_counted_nor_removed() {
        let damaged = || Standing::Damaged("vda is missing".to_owned());
        let all = [
            candidate(1, "/a", 1, Standing::Whole),
            candidate(2, "/a", 2, damaged()),
            candidate(3, "/a", 3, Standing::Whole),
            candidate(4, "/a", 4, damaged()),
        ];
        let series = &keep_last(&all, 1, None)[std::path::Path::new("/a")];
        assert_eq!((ids(&all, &series.kept), ids(&all, &series.gone)), (vec![3], vec![1]));
        assert!(keep_last(&all[1..2], 1, None).is_empty());
    }

    #[test]
    fn protected_ones_stay_besides() {
        let all = [
            candidate(1, "/a", 1, Standing::Protected("ann".to_owned())),
            candidate(2, "/a", 2, Standing::Whole),
            candidate(3, "/a", 3, Standing::Whole),
            candidate(4, "/a", 4, Standing::Protected("ann".to_owned())),
        ];
        let series = &keep_last(&all, 1, None)[std::path::Path::new("/a")];
        assert_eq!((ids(&all, &series.kept), ids(&all, &series.gone)), (vec![4, 3, 1], vec![2]));
    }

    #[test]
    fn a_copy_below_another_root_is_another_series() {
        let all = [
            candidate(1, "/a", 1, Standing::Whole),
            candidate(2, "/a", 2, Standing::Whole),
            candidate(3, "/b", 3, Standing::Whole),
        ];
        let found = keep_last(&all, 1, None);
        assert_eq!(ids(&all, &found[std::path::Path::new("/a")].gone), vec![1]);
        assert!(found[std::path::Path::new("/b")].gone.is_empty());
        let found = keep_last(&all, 1, Some(BackupId(Uuid::from_u128(3))));
        assert!(found.values().all(|series| series.gone.is_empty()), "only its own root is judged");
    }

    #[test]
    fn a_successor_stays_whatever_the_clock_said_and_without_it_nothing_goes() {
        let all = [
            candidate(1, "/a", 90, Standing::Whole),
            candidate(2, "/a", 80, Standing::Whole),
            candidate(3, "/a", 5, Standing::Whole),
        ];
        let series = &keep_last(&all, 1, Some(BackupId(Uuid::from_u128(3))))[std::path::Path::new("/a")];
        assert_eq!((ids(&all, &series.kept), ids(&all, &series.gone)), (vec![3], vec![2, 1]));
        assert!(keep_last(&all, 1, Some(BackupId(Uuid::from_u128(9)))).is_empty());
        let lost = candidate(9, "/a", 99, Standing::Damaged("it is gone".to_owned()));
        let all = [all.as_slice(), &[lost]].concat();
        assert!(keep_last(&all, 1, Some(BackupId(Uuid::from_u128(9)))).is_empty());
    }

    #[test]
    fn copies_beside_each_other_count_once_and_stay_or_go_together() {
        let all = [
            candidate(1, "/a", 1, Standing::Whole),
            candidate(2, "/a", 2, Standing::Whole),
            candidate(1, "/a", 1, Standing::Whole),
            candidate(3, "/a", 3, Standing::Whole),
            candidate(3, "/a", 3, Standing::Whole),
        ];
        let series = &keep_last(&all, 2, None)[std::path::Path::new("/a")];
        assert_eq!((ids(&all, &series.kept), ids(&all, &series.gone)), (vec![3, 3, 2], vec![1, 1]));
        let mut all = all;
        all[2].standing = Standing::Protected("ann".to_owned());
        let series = &keep_last(&all, 2, None)[std::path::Path::new("/a")];
        assert_eq!((ids(&all, &series.kept), ids(&all, &series.gone)), (vec![3, 3, 2, 1, 1], vec![]));
    }

    #[test]
    fn a_copy_of_a_backup_elsewhere_is_told_apart_from_it() {
        let all = [
            candidate(1, "/a", 1, Standing::Whole),
            candidate(2, "/a", 2, Standing::Whole),
            candidate(1, "/b", 1, Standing::Whole),
        ];
        let found = keep_last(&all, 1, None);
        assert_eq!(found[std::path::Path::new("/a")], Series { kept: vec![1], gone: vec![0] });
        assert_eq!(found[std::path::Path::new("/b")], Series { kept: vec![2], gone: vec![] });
    }

    proptest! {
        #[test]
        fn below_each_root_that_loses_one_the_newest_whole_ones_stay(
            all in prop::collection::vec((0..3_u8, 0..20_i64, 0..3_u8), 0..30),
            keep in 0..6_u32,
        ) {
            let all: Vec<_> = all.iter().enumerate().map(|(id, (root, at, standing))| {
                let standing = match standing {
                    0 => Standing::Whole,
                    1 => Standing::Protected(String::new()),
                    _ => Standing::Damaged(String::new()),
                };
                candidate(id as u128, &format!("/{root}"), *at, standing)
            }).collect();
            for (root, series) in keep_last(&all, keep, None) {
                let of = |at: &usize| &all[*at];
                for gone in &series.gone {
                    prop_assert_eq!(&of(gone).standing, &Standing::Whole);
                    prop_assert_eq!(&of(gone).root, &root);
                    prop_assert!(!series.kept.contains(gone));
                    let newer = series.kept.iter().filter(|kept| {
                        of(kept).standing == Standing::Whole && of(kept).at >= of(gone).at
                    });
                    prop_assert!(newer.count() >= keep.max(1) as usize);
                }
            }
        }
    }
}

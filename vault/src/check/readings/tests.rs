use super::*;
use crate::backups::{Backups, Mark, put_mark};
use crate::check::{CheckReport, What, check, verify};
use crate::lease::Holder;
use crate::names::{MarkKind, ObjectName};
use crate::testing::{Bench, C, noise};

async fn read(bench: &Bench, share: &str, readings: &mut Readings) -> CheckReport {
    let what = What { only: None, read: Some(share.parse().unwrap()) };
    Box::pin(verify(&bench.vault, &Holder::default(), None, what, readings)).await.unwrap()
}

async fn packs(bench: &Bench) -> BTreeSet<PackId> {
    let mut names = bench.names("data/").await;
    names.extend(bench.names("tree/").await);
    let pack = |name: &String| match name.parse().unwrap() {
        ObjectName::Pack(_, pack) => pack,
        other => panic!("{other}"),
    };
    names.iter().map(pack).collect()
}

async fn marks(bench: &Bench, backup: BackupId) -> Vec<MarkKind> {
    let all = Backups::load(&bench.vault, None).await.unwrap();
    all.marks(backup).map(|(kind, _)| kind).collect()
}

#[test]
fn every_pack_is_in_one_share_and_words_that_are_none_are_refused() {
    let share = |text: &str| text.parse::<Share>();
    for seed in 0..200_u8 {
        let pack = PackId::new(std::array::from_fn(|at| {
            seed.wrapping_mul(17).wrapping_add((at as u8).wrapping_mul(31))
        }));
        let of = (1..=7).filter(|part| share(&format!("{part}/7")).unwrap().contains(pack));
        assert_eq!(of.count(), 1);
        assert!(Share::ALL.contains(pack));
    }
    assert_eq!(share("3/7").unwrap().to_string(), "3/7");
    for wrong in ["", "3", "0/7", "8/7", "1/0", "1/1097", "-1/7", "1/7/2", "a/b"] {
        assert_eq!(share(wrong), Err(NotAShare), "{wrong}");
    }
}

#[tokio::test]
async fn a_backup_is_verified_once_all_of_its_packs_were_read_since_it_was_put_and_no_sooner() {
    let bench = Bench::new(true).await;
    let share = |part: usize| format!("{part}/3");
    let in_share = |pack: &PackId, part: usize| share(part).parse::<Share>().unwrap().contains(*pack);
    let (mut before, mut needs) = (BTreeSet::new(), BTreeMap::<BackupId, (u64, BTreeSet<PackId>)>::new());
    // As many as it takes until one of them needs something of the first share, and something of another.
    let is_split = |of: &BTreeSet<PackId>| {
        let first = of.iter().filter(|pack| in_share(pack, 1)).count();
        first > 0 && first < of.len()
    };
    while needs.len() < 4 || !needs.values().any(|(_, of)| is_split(of)) {
        let seed = needs.len() as u64;
        let (id, _) = bench.full(&noise(seed, 3 * C)).await;
        let now = packs(&bench).await;
        needs.insert(id, (seed, now.difference(&before).copied().collect()));
        before = now;
    }
    let mut readings = Readings::default();
    let (mut waiting, mut late) = (needs.clone(), None);
    for part in 1..=3 {
        let report = read(&bench, &share(part), &mut readings).await;
        assert_eq!(report.whole.len(), needs.len(), "{report:?}");
        let read = |of: &BTreeSet<PackId>| of.iter().all(|pack| (1..=part).any(|part| in_share(pack, part)));
        let expected: Vec<BackupId> =
            waiting.iter().filter(|(_, (_, of))| read(of)).map(|(id, _)| *id).collect();
        assert_eq!(report.verified, expected, "after {part} of 3");
        expected.iter().for_each(|id| drop(waiting.remove(id)));
        if part == 1 {
            // It comes when a share of what it needs has been read, and puts nothing of its own.
            let (seed, of) = waiting.values().find(|(_, of)| is_split(of)).unwrap().clone();
            let (id, written) = bench.full(&noise(seed, 3 * C)).await;
            assert_eq!((written.new, packs(&bench).await), (0, before.clone()));
            needs.insert(id, (seed, of));
            late = Some(id);
        }
    }
    assert!(waiting.is_empty());
    let late = late.unwrap();
    assert_eq!(
        marks(&bench, late).await,
        [MarkKind::Checked],
        "its first share was read before it was there"
    );
    // A memory that is kept and read back.
    let kept = serde_json::to_string(&readings).unwrap();
    let mut readings: Readings = serde_json::from_str(&kept).unwrap();
    let report = read(&bench, &share(1), &mut readings).await;
    assert!(report.verified.contains(&late), "{report:?}");
    assert_eq!(marks(&bench, late).await, [MarkKind::Checked, MarkKind::Verified]);
    // Without it everything is read again.
    let report = read(&bench, &share(2), &mut Readings::default()).await;
    assert!(!report.verified.contains(&late));
}

#[tokio::test]
async fn a_backup_that_is_hurt_is_verified_no_more_also_when_it_is_healed_until_it_is_read_again() {
    let bench = Bench::new(true).await;
    let image = noise(1, 70 * C);
    let (one, _) = bench.full(&image).await;
    let run = async |whole| check(&bench.vault, &Holder::default(), None, whole).await.unwrap();
    for _ in 0..2 {
        assert_eq!(run(true).await.verified, [one]);
        assert_eq!(marks(&bench, one).await, [MarkKind::Checked, MarkKind::Verified], "one mark says it");
    }
    let verified = async || Backups::load(&bench.vault, None).await.unwrap().is_verified(one);
    assert!(verified().await);
    let pack = bench.names("data/").await.remove(0);
    bench.flip(&pack, 10 * C).await;
    let report = run(true).await;
    assert_eq!((report.verified, report.hurt.len()), (vec![], 1));
    assert_eq!(marks(&bench, one).await, [MarkKind::Checked, MarkKind::Hurt]);
    // Somebody else, who read it before, says so now; or a host that may delete nothing left its mark.
    let mark = Mark::new(Timestamp::now(), "elsewhere");
    put_mark(&bench.vault, one, MarkKind::Verified, &mark).await.unwrap();
    assert!(!verified().await, "it counts although it is hurt");
    bench.full(&image).await;
    run(false).await;
    assert_eq!(marks(&bench, one).await, [MarkKind::Checked], "what healed it has not been read");
    assert_eq!(run(true).await.verified.len(), 2);
    assert!(verified().await);
}

#[tokio::test]
async fn one_backup_is_read_without_the_packs_of_the_others() {
    let bench = Bench::new(false).await;
    let (one, _) = bench.full(&noise(1, 70 * C)).await;
    let of_one = bench.size("data/").await + bench.size("tree/").await;
    let (other, _) = bench.full(&noise(2, 90 * C)).await;
    let what = What { only: Some(one), read: Some(Share::ALL) };
    let report =
        verify(&bench.vault, &Holder::default(), None, what, &mut Readings::default()).await.unwrap();
    assert_eq!((report.read, report.verified), (of_one, vec![one]));
    assert_eq!(marks(&bench, other).await, [MarkKind::Checked]);
}

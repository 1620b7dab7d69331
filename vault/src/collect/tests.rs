use super::*;
use crate::backend::Backend;
use crate::blob::BlobType;
use crate::check::check;
use crate::marks::{self, Protection};
use crate::settle::{Settled, settle};
use crate::testing::{Bench, C, noise, prepare};
use crate::write::{Extent, Outcome, Parts};

fn collector() -> Collector {
    let policy = Policy { wait: Some(Duration::ZERO), ..Policy::default() };
    Collector::new(Holder::default(), None, policy, Watch::default())
}

async fn run(bench: &Bench) -> Report {
    Box::pin(collect(&bench.vault, &mut collector(), Timestamp::UNIX_EPOCH)).await.unwrap()
}

async fn prune(bench: &Bench, backup: BackupId) {
    assert!(matches!(marks::prune(&bench.vault, backup, "x").await.unwrap(), marks::Pruned::Marked(_)));
}

async fn is_clean(bench: &Bench) -> bool {
    check(&bench.vault, &Holder::default(), None, true).await.unwrap().is_clean()
}

#[tokio::test]
async fn what_only_a_pruned_backup_needs_is_deleted_and_all_else_stays() {
    for encrypted in [false, true] {
        let bench = Bench::new(encrypted).await;
        let (common, own, other) = (noise(1, 80 * C), noise(2, 80 * C), noise(3, 80 * C));
        let both = [common.clone(), own.clone()].concat();
        let (first, _) = bench.full(&both).await;
        let (second, _) = bench.full(&[common.clone(), other.clone()].concat()).await;
        let before = bench.size("data/").await;
        assert_eq!(run(&bench).await.ended, Ended::Nothing);
        prune(&bench, first).await;
        let report = run(&bench).await;
        assert_eq!((report.ended.clone(), report.doomed.len()), (Ended::Done, 1), "{report:?}");
        assert!(report.kept.is_empty() && report.moved.0 >= 80, "{report:?}");
        let after = bench.size("data/").await;
        assert!(after <= before - 79 * C as u64, "{before} {after}");
        assert!(bench.restore(second).await == [common.clone(), other].concat());
        assert!(bench.names("condemned/").await.is_empty());
        assert!(bench.names("backups/").await.len() == 1 && is_clean(&bench).await);
        // What is left of it is the order that it goes, for ever.
        let left = bench.names(&format!("marks/{first}/")).await;
        assert!(left.len() == 1 && left[0].contains("/prune."), "{left:?}");
        // All that is there can be reused, and nothing that is not.
        let (again, written) = bench.full(&both).await;
        assert_eq!(written.new, 80 * C as u64);
        assert!(bench.restore(again).await == both);
    }
}

#[tokio::test]
async fn a_long_chain_of_incrementals_is_pruned_in_any_order_and_patches_keep_their_bases() {
    let bench = Bench::new(false).await;
    let mut image = noise(1, 70 * C);
    let mut kept = vec![(bench.full(&image).await.0, image.clone())];
    for round in 0..5 {
        let at = (round * 9) * C;
        image[at..at + C].copy_from_slice(&noise(100 + round as u64, C));
        let parts = vec![
            Extent::Unchanged(at as u64),
            Extent::Data(image[at..at + C].to_vec().into()),
            Extent::Unchanged((image.len() - at - C) as u64),
        ];
        let parent = kept.last().map(|(id, _)| *id);
        let (id, written) = Box::pin(bench.backup(image.len(), parts, parent)).await;
        assert!(written.nodes.1 > 0, "as patches: {written:?}");
        kept.push((id, image.clone()));
    }
    let mut rng = fastrand::Rng::with_seed(7);
    while kept.len() > 1 {
        let (gone, _) = kept.swap_remove(rng.usize(0..kept.len()));
        prune(&bench, gone).await;
        let report = run(&bench).await;
        assert_eq!(report.ended, Ended::Done);
        for (id, content) in &kept {
            assert!(bench.restore(*id).await == *content, "{} are left", kept.len());
        }
    }
    assert!(is_clean(&bench).await);
}

#[tokio::test]
async fn a_protected_backup_stays_though_a_prune_is_there_and_goes_when_the_protection_ends() {
    let bench = Bench::new(true).await;
    let image = noise(1, 3 * C);
    let (one, _) = bench.full(&image).await;
    prune(&bench, one).await;
    let late = marks::protect(&bench.vault, one, &Holder::default()).await.unwrap();
    let Protection::TooLate(mark) = late else { panic!("{late:?}") };
    let report = run(&bench).await;
    assert!(report.doomed.is_empty() && report.spared.contains(&one));
    assert!(bench.restore(one).await == image);
    marks::unprotect(&bench.vault, one, mark, "x").await.unwrap();
    assert!(run(&bench).await.doomed.contains(&one));
    assert!(bench.names("data/").await.is_empty() && bench.names("backups/").await.is_empty());
}

#[tokio::test]
async fn a_writer_that_stands_still_over_a_whole_collection_notices_and_is_settled() {
    let bench = Bench::new(false).await;
    let image = noise(1, 5 * C);
    let (old, _) = bench.full(&image).await;
    // It reuses everything, and stops before it commits.
    let mut session = bench.session().await;
    let source = &mut Parts::new(vec![Extent::Data(image.clone().into())]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    assert_eq!(written.new, 0);
    let (id, prepared) = prepare(&mut session, &written).await;
    prune(&bench, old).await;
    // While its lease stands, nothing goes.
    assert!(matches!(run(&bench).await.ended, Ended::Waiting(leases) if leases.contains(&session.lease())));
    assert!(!bench.names("data/").await.is_empty());
    lease::revoke(&bench.vault, session.lease(), &Holder::default()).await.unwrap();
    assert_eq!(run(&bench).await.ended, Ended::Done);
    assert!(bench.names("data/").await.is_empty());
    // It goes on as if nothing had been.
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Revoked);
    session.end().await.unwrap();
    let settled = settle(&bench.vault, id, &Holder::default(), None).await.unwrap();
    assert!(matches!(settled, Settled::Lacks(_)), "{settled:?}");
    prune(&bench, id).await;
    assert_eq!(run(&bench).await.ended, Ended::Done);
    let (again, written) = bench.full(&image).await;
    assert_eq!(written.new, image.len() as u64);
    assert!(bench.restore(again).await == image && is_clean(&bench).await);
}

#[tokio::test]
async fn a_writer_that_is_waited_for_keeps_what_it_reuses_of_a_pruned_parent() {
    let bench = Bench::new(true).await;
    let image = noise(1, 70 * C);
    let (old, _) = bench.full(&image).await;
    let mut session = bench.session().await;
    let parent = session.parent(old).await.unwrap().unwrap();
    prune(&bench, old).await;
    let Ended::Waiting(_) = run(&bench).await.ended else { panic!() };
    let parts = vec![Extent::Data(noise(2, C).into()), Extent::Unchanged(69 * C as u64)];
    let tree = Some(parent.manifest.disks[0].image.tree());
    let written =
        session.write_image(&mut Parts::new(parts), image.len() as u64, BlobType::Data, tree).await.unwrap();
    let (id, prepared) = prepare(&mut session, &written).await;
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
    session.end().await.unwrap();
    assert_eq!(run(&bench).await.ended, Ended::Done);
    assert!(bench.restore(id).await == [noise(2, C), image[C..].to_vec()].concat());
    assert!(bench.names("backups/").await.len() == 1 && is_clean(&bench).await);
}

#[tokio::test]
async fn two_that_collect_are_never_both_at_work_and_one_that_was_revoked_deletes_nothing() {
    let bench = Bench::new(true).await;
    let (old, _) = bench.full(&noise(1, 3 * C)).await;
    prune(&bench, old).await;
    let holder = Holder { collects: true, ..Holder::default() };
    let other = Lease::begin(&bench.vault, &holder).await.unwrap();
    assert_eq!(run(&bench).await.ended, Ended::Others([other.id()].into()));
    lease::revoke(&bench.vault, other.id(), &Holder::default()).await.unwrap();
    assert_eq!(run(&bench).await.ended, Ended::Done);
    assert!(bench.names("data/").await.is_empty());
}

#[tokio::test]
async fn what_cannot_be_read_is_neither_moved_nor_deleted() {
    let bench = Bench::new(true).await;
    let (own, common) = (noise(1, 60 * C), noise(2, 20 * C));
    let (old, _) = bench.full(&[common.clone(), own.clone()].concat()).await;
    let (kept, _) = bench.full(&common).await;
    let packs = bench.names("data/").await;
    bench.flip(&packs[0], 5 * C).await;
    prune(&bench, old).await;
    let report = run(&bench).await;
    assert_eq!((report.ended.clone(), report.kept.len()), (Ended::Done, 1), "{report:?}");
    assert_eq!(
        (bench.names("data/").await.contains(&packs[0]), bench.names("condemned/").await.len()),
        (true, 1)
    );
    // Whole again: the bit had flipped on the way.
    bench.flip(&packs[0], 5 * C).await;
    assert!(bench.restore(kept).await == common);
    let report = run(&bench).await;
    assert_eq!((report.ended.clone(), report.kept.len(), report.moved.0), (Ended::Done, 0, 1), "{report:?}");
    assert!(bench.restore(kept).await == common && is_clean(&bench).await);
    assert!(bench.names("condemned/").await.is_empty() && bench.names("damage/").await.is_empty());
}

#[tokio::test]
async fn nothing_is_deleted_while_what_a_backup_needs_is_not_known() {
    let bench = Bench::new(true).await;
    let (old, _) = bench.full(&noise(1, 3 * C)).await;
    let (hurt, _) = bench.full(&noise(2, 3 * C)).await;
    prune(&bench, old).await;
    let manifest = bench.names("backups/").await.into_iter().find(|name| name.contains(&hurt.to_string()));
    let manifest = manifest.unwrap();
    let packs = bench.names("data/").await;
    bench.flip(&manifest, 40).await;
    assert!(matches!(run(&bench).await.ended, Ended::Blocked(why) if why[0].0 == Some(hurt)));
    bench.flip(&manifest, 40).await;
    let bytes = bench.backend.get(&manifest, None).await.unwrap().unwrap();
    bench.backend.delete(&manifest).await.unwrap();
    assert!(matches!(run(&bench).await.ended, Ended::Blocked(why) if why[0].0 == Some(hurt)));
    bench.backend.put(&manifest, bytes).await.unwrap();
    let trees = bench.names("tree/").await;
    for tree in &trees {
        bench.flip(tree, 90).await;
    }
    assert!(matches!(run(&bench).await.ended, Ended::Blocked(_)));
    assert_eq!((bench.names("data/").await, bench.names("tree/").await), (packs, trees));
    prune(&bench, hurt).await;
    assert_eq!(run(&bench).await.ended, Ended::Done);
    assert!(bench.names("data/").await.is_empty() && bench.names("backups/").await.is_empty());
}

#[tokio::test]
async fn a_dry_run_tells_what_a_collection_then_frees_and_changes_nothing() {
    let bench = Bench::new(true).await;
    let common = noise(1, 40 * C);
    let (first, _) = bench.full(&[common.clone(), noise(2, 60 * C)].concat()).await;
    bench.full(&[common, noise(3, 60 * C)].concat()).await;
    let mut dry = collector();
    dry.policy.dry_run = true;
    let mut plan = async || Box::pin(collect(&bench.vault, &mut dry, Timestamp::UNIX_EPOCH)).await.unwrap();
    assert_eq!(plan().await.ended, Ended::Nothing);
    prune(&bench, first).await;
    let packs = async || {
        let names = [bench.names("data/").await, bench.names("tree/").await].concat();
        (names, bench.size("data/").await + bench.size("tree/").await)
    };
    let before = packs().await;
    let planned = plan().await;
    let Ended::Planned(frees) = planned.ended else { panic!("{planned:?}") };
    assert_eq!((planned.doomed.len(), packs().await), (1, before.clone()));
    assert!(bench.names("condemned/").await.is_empty());
    let report = run(&bench).await;
    assert_eq!((report.ended, report.given_up), (Ended::Done, planned.given_up));
    let after = packs().await;
    // What was moved lies in packs of its own, which have a header and a table.
    let (gone, told) = (before.1 - after.1, frees.given_up - frees.moved);
    assert!(frees.moved > 40 * C as u64 && gone.abs_diff(told) < told / 50, "{frees:?}, {gone} gone");
}

#[tokio::test]
async fn an_append_only_vault_obeys_a_prune_late_and_never_gives_up_its_last_verified_backup() {
    let bench = Bench::new(true).await;
    let (old, _) = bench.full(&noise(1, 3 * C)).await;
    let (new, _) = bench.full(&noise(2, 3 * C)).await;
    assert!(is_clean(&bench).await, "and verified");
    prune(&bench, old).await;
    prune(&bench, new).await;
    let week = Duration::from_secs(7 * 24 * 3600);
    let policy = Policy { prune_delay: Some(week), expected: Some(0), ..Policy::default() };
    let mut collector = Collector::new(Holder::default(), None, policy, Watch::default());
    let day = |n: i64| Timestamp::from_second(n * 24 * 3600).unwrap();
    for (now, doomed) in [(10, 0), (16, 0), (17, 1), (40, 0)] {
        let report = Box::pin(collect(&bench.vault, &mut collector, day(now))).await.unwrap();
        assert_eq!((report.doomed.len(), report.alarming), (doomed, doomed > 0), "day {now}");
        assert!(report.spared.contains(&new));
    }
    assert_eq!(bench.names("backups/").await.len(), 1);
}

#[tokio::test]
async fn a_run_that_is_damaged_is_made_anew_from_the_tables_of_packs() {
    let bench = Bench::new(true).await;
    let image = noise(1, 70 * C);
    let (id, _) = bench.full(&image).await;
    let runs = bench.names("index/").await;
    bench.flip(&runs[0], 60).await;
    let (_, written) = bench.full(&noise(2, C)).await;
    assert_eq!(written.new, C as u64);
    assert_eq!(run(&bench).await.ended, Ended::Done);
    assert!(!bench.names("index/").await.contains(&runs[0]));
    assert!(bench.restore(id).await == image && is_clean(&bench).await);
    assert_eq!(bench.full(&image).await.1.new, 0);
}

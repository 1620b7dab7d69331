use super::*;
use crate::backend::Backend;
use crate::index::tidings::{BadPlace, report_damage};
use crate::lease::{Holder, Lease, revoke};
use crate::marks;
use crate::testing::{Bench, C, DOMAIN, noise};
use crate::write::Extent;

async fn of(bench: &Bench) -> Stats {
    Box::pin(stats(&bench.vault, None)).await.unwrap()
}

#[tokio::test]
async fn what_each_backup_needs_alone_and_with_others_is_told() {
    for encrypted in [false, true] {
        let bench = Bench::new(encrypted).await;
        assert_eq!(of(&bench).await, Stats { sampled: 1, ..Stats::default() });
        // 40 chunks in common, 30 and 20 of their own, and zeroes.
        let common = noise(1, 40 * C);
        let (one, _) = bench.full(&[common.clone(), noise(2, 30 * C), vec![0; 10 * C]].concat()).await;
        let before = bench.names("").await;
        let alone = of(&bench).await;
        let told = &alone.domains[&DOMAIN].backups[0];
        assert_eq!((told.unique, told.shared()), (told.needs, 0));
        let (two, _) = bench.full(&[common, noise(3, 20 * C)].concat()).await;
        let both = of(&bench).await;
        let domain = &both.domains[&DOMAIN];
        let [first, second] = &domain.backups[..] else { panic!("{domain:?}") };
        assert_eq!((first.id, second.id), (one, two));
        assert_eq!((first.logical, first.used), (80 * C as u64, 70 * C as u64));
        assert_eq!((second.logical, second.used), (60 * C as u64, 60 * C as u64));
        assert_eq!(domain.logical(), 140 * C as u64);
        assert_eq!(domain.put(), first.put + second.put);
        assert_eq!(first.needs, told.needs);
        assert_eq!(first.marks, [MarkKind::Checked]);
        // Noise does not shrink: chunks, their headers, and some nodes.
        let within = |bytes: u64, chunks: u64| {
            (chunks * C as u64..chunks * (C as u64 + 100) + 10_000).contains(&bytes)
        };
        assert!(within(first.unique, 30) && within(second.unique, 20), "{first:?} {second:?}");
        assert!(within(first.shared(), 40) && within(second.shared(), 40), "{first:?} {second:?}");
        assert_eq!(both.needed, first.unique + second.needs);
        let packs = bench.size("data/").await + bench.size("tree/").await;
        assert_eq!(both.data.bytes + both.tree.bytes, packs);
        assert!(both.needed + both.garbage == packs && both.garbage < 10_000, "tables: {both:?}");
        assert_eq!((both.index.count, both.usable_runs, both.unreadable_runs), (2, 2, 0));
        assert_eq!(both.leases, Leases { ended: 2, ..Leases::default() });
        assert!(before.iter().all(|name| !name.contains(&two.to_string())));
        // A backup that shares every node with another has nothing of its own.
        let parts = vec![Extent::Unchanged(60 * C as u64)];
        let (three, _) = Box::pin(bench.backup(60 * C, parts, Some(two))).await;
        let now = of(&bench).await;
        let twins: Vec<_> = now.domains[&DOMAIN].backups.iter().filter(|one| one.id != first.id).collect();
        assert!(twins.len() == 2 && twins.iter().any(|twin| twin.id == three));
        assert!(twins.iter().all(|twin| twin.unique == 0 && twin.needs == second.needs), "{twins:?}");
    }
}

#[tokio::test]
async fn what_is_of_no_use_condemned_damaged_or_waited_for_is_counted() {
    let bench = Bench::new(true).await;
    let (gone, _) = bench.full(&noise(1, 20 * C)).await;
    let (stays, _) = bench.full(&noise(2, 30 * C)).await;
    let manifest = bench.names("backups/").await.into_iter().find(|name| name.contains(&gone.to_string()));
    bench.flip(&manifest.unwrap(), 60).await;
    let index = Index::load(&bench.vault, None).await.unwrap();
    let (id, place) = index.places_of(index.states()[0].id).await.unwrap()[0];
    let bad = BadPlace { pack: place.pack, offset: place.offset, id };
    report_damage(&bench.vault, vec![bad]).await.unwrap();
    marks::protect(&bench.vault, stays, &Holder::default()).await.unwrap();
    let standing = Lease::begin(&bench.vault, &Holder::default()).await.unwrap();
    let revoked = Lease::begin(&bench.vault, &Holder::default()).await.unwrap();
    revoke(&bench.vault, revoked.id(), &Holder::default()).await.unwrap();
    let condemnation = crate::index::tidings::Condemnation {
        backups: vec![(DOMAIN, gone, standing.id())],
        packs: vec![(place.area.into(), place.pack)],
        ..Default::default()
    };
    let name = ObjectName::Condemned(revoked.id());
    let object = crate::codec::encode(bench.vault.keys(), &name, &condemnation).unwrap();
    bench.vault.put(&name, object).await.unwrap();

    let before = bench.names("").await;
    let stats = of(&bench).await;
    assert_eq!(bench.names("").await, before, "nothing is put");
    assert_eq!((stats.unreadable, stats.missing), (1, 0));
    assert!(stats.garbage >= 20 * C as u64 && stats.garbage < 21 * C as u64, "{stats:?}");
    assert_eq!(stats.leases, Leases { standing: 1, ended: 3, revoked: 1 });
    assert_eq!(stats.condemned, Condemned { collections: 1, backups: 1, packs: 1, runs: 0 });
    assert_eq!(stats.damage, Damage { places: 1, packs: 1 });
    assert_eq!(stats.domains[&DOMAIN].backups[0].marks, [MarkKind::Checked, MarkKind::Protect]);
    assert!(!stats.domains[&DOMAIN].backups[0].incomplete);
    // Without its nodes nobody knows what it needs.
    for pack in bench.names("tree/").await {
        bench.backend.delete(&pack).await.unwrap();
    }
    let stats = of(&bench).await;
    assert!(stats.domains[&DOMAIN].backups[0].incomplete && stats.damage.places == 1);
}

#[tokio::test]
async fn a_sample_tells_about_the_same() {
    let bench = Bench::new(false).await;
    bench.full(&noise(1, 600 * C)).await;
    let index = Arc::new(Index::load(&bench.vault, None).await.unwrap());
    let all = Backups::load(&bench.vault, None).await.unwrap();
    let mut exact = Stats { sampled: 1, ..Stats::default() };
    Box::pin(backups(&bench.vault, None, &index, &all, &mut exact)).await.unwrap();
    let mut sample = Stats { sampled: 4, ..Stats::default() };
    Box::pin(backups(&bench.vault, None, &index, &all, &mut sample)).await.unwrap();
    // Ids of noise are always the same in tests but for the vault's key: 150 of 600, give or take six standard deviations.
    assert!(sample.needed.abs_diff(exact.needed) < exact.needed * 45 / 100, "{sample:?} {exact:?}");
    let used = |stats: &Stats| stats.domains[&DOMAIN].backups[0].used;
    assert_eq!(used(&sample), used(&exact));
}

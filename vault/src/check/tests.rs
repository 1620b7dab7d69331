use super::*;
use crate::backend::Backend;
use crate::blob::BlobType;
use crate::ids::LeaseId;
use crate::lease::revoke;
use crate::settle::{Settled, settle};
use crate::testing::{Bench, C, noise, prepare};
use crate::write::{Extent, Outcome, Parts, Session};

async fn run(bench: &Bench, whole: bool) -> CheckReport {
    check(&bench.vault, &Holder::default(), None, whole).await.unwrap()
}

async fn marks(bench: &Bench, backup: BackupId) -> Vec<MarkKind> {
    let all = Backups::load(&bench.vault, None).await.unwrap();
    all.marks(backup).map(|(kind, _)| kind).collect()
}

#[tokio::test]
async fn a_sound_vault_is_clean_and_its_backups_are_verified() {
    for encrypted in [false, true] {
        let bench = Bench::new(encrypted).await;
        let (one, _) = bench.full(&noise(1, 70 * C)).await;
        let (two, _) = bench.full(&noise(1, 90 * C)).await;
        let quick = run(&bench, false).await;
        assert!(quick.is_clean() && quick.read == 0, "{quick:?}");
        assert_eq!(marks(&bench, one).await, [MarkKind::Checked]);
        let whole = run(&bench, true).await;
        assert!(whole.is_clean(), "{whole:?}");
        assert_eq!(whole.whole.len(), 2);
        assert_eq!(whole.read, bench.size("data/").await + bench.size("tree/").await);
        assert_eq!(marks(&bench, two).await, [MarkKind::Checked, MarkKind::Verified]);
    }
}

#[tokio::test]
async fn a_flipped_chunk_is_found_by_a_whole_check_named_by_its_position_and_healed_by_the_next_backup() {
    let bench = Bench::new(true).await;
    let image = noise(1, 70 * C);
    let (hurt, _) = bench.full(&image).await;
    let (other, _) = bench.full(&noise(2, 3 * C)).await;
    let packs = bench.names("data/").await;
    let of_the_first = {
        let mut sizes = Vec::new();
        for pack in &packs {
            sizes.push((bench.size(pack).await, pack.clone()));
        }
        sizes.into_iter().max().unwrap().1
    };
    bench.flip(&of_the_first, 10 * C).await;
    assert!(run(&bench, false).await.is_clean(), "a quick check reads no chunk");
    for _ in 0..2 {
        let report = run(&bench, true).await;
        assert_eq!((report.packs.len(), report.damage, report.whole.as_slice()), (1, 1, &[other][..]));
        let [(backup, lacks)] = &report.hurt[..] else { panic!("{report:?}") };
        assert_eq!(*backup, hurt);
        let [(begin, end)] = lacks[0].ranges[..] else { panic!("{lacks:?}") };
        assert_eq!((lacks[0].image.as_str(), end - begin, lacks[0].open_ended), ("vda", C as u64, false));
        // Told once, however often it is found.
        assert_eq!(marks(&bench, hurt).await, [MarkKind::Checked, MarkKind::Hurt]);
        let disk = bench.manifest(hurt).await.disks[0].image;
        let (bytes, read) = bench.try_read(&disk, true).await.unwrap();
        assert_eq!(read.lost, std::slice::from_ref(&(begin..end)));
        let (begin, end) = (begin as usize, end as usize);
        assert!(bytes[..begin] == image[..begin] && bytes[end..] == image[end..]);
        assert!(bytes[begin..end].iter().all(|byte| *byte == 0x55), "what is lost is not written");
    }
    let (_, written) = bench.full(&image).await;
    assert_eq!(written.new, C as u64);
    let report = run(&bench, false).await;
    assert_eq!(report.whole.len(), 3, "{report:?}");
    assert_eq!(marks(&bench, hurt).await, [MarkKind::Checked], "whole again");
    assert!(bench.restore(hurt).await == image);
}

#[tokio::test]
async fn a_pack_that_is_gone_hurts_who_needs_it_and_nobody_else() {
    let bench = Bench::new(false).await;
    let (image, common) = (noise(1, 70 * C), noise(2, 70 * C));
    let (first, _) = bench.full(&image).await;
    let packs = bench.names("data/").await;
    let (second, _) = bench.full(&common).await;
    bench.backend.delete(&packs[0]).await.unwrap();
    let report = run(&bench, false).await;
    assert_eq!(report.whole, [second]);
    assert_eq!(report.hurt[0].0, first);
    assert_eq!(report.hurt[0].1[0].ranges, [(0, image.len() as u64)]);
    assert!(bench.restore(second).await == common);
    let (_, written) = bench.full(&image).await;
    assert_eq!(written.new, image.len() as u64, "what is missing is written anew");
    assert_eq!(run(&bench, false).await.whole.len(), 3);
    assert!(bench.restore(first).await == image);
}

#[tokio::test]
async fn with_any_header_or_table_destroyed_what_is_left_of_a_pack_counts_and_the_rest_is_named() {
    let bench = Bench::new(true).await;
    let image = noise(1, 6 * C);
    let (first, _) = bench.full(&image).await;
    let pack = bench.names("data/").await.remove(0);
    let size = bench.size(&pack).await as usize;
    // The table alone: the blobs are found by their headers.
    bench.flip(&pack, size - 80).await;
    let report = run(&bench, true).await;
    assert_eq!((report.packs.len(), report.hurt.len(), report.whole.as_slice()), (1, 0, &[first][..]));
    // The first blob's header as well: now nothing but the index names it.
    bench.flip(&pack, 33).await;
    let report = run(&bench, true).await;
    assert_eq!(report.hurt[0].1[0].ranges.len(), 1, "{report:?}");
}

#[tokio::test]
async fn a_damaged_node_hurts_the_backups_that_need_it() {
    let bench = Bench::new(true).await;
    let (first, _) = bench.full(&noise(1, 70 * C)).await;
    let tree = bench.names("tree/").await.remove(0);
    let (second, _) = bench.full(&noise(2, 70 * C)).await;
    bench.flip(&tree, 100).await;
    let report = run(&bench, true).await;
    assert_eq!((report.whole.as_slice(), report.hurt[0].0), (&[second][..], first));
    assert!(report.hurt[0].1[0].open_ended);
}

#[tokio::test]
async fn damaged_and_missing_manifests_and_runs_are_named() {
    let bench = Bench::new(false).await;
    let (first, _) = bench.full(&noise(1, 3 * C)).await;
    let (second, _) = bench.full(&noise(2, 3 * C)).await;
    let (third, _) = bench.full(&noise(3, 3 * C)).await;
    let of = |backup: BackupId, names: &[String]| {
        names.iter().find(|name| name.contains(&backup.to_string())).unwrap().clone()
    };
    let names = bench.names("backups/").await;
    bench.flip(&of(first, &names), 50).await;
    bench.backend.delete(&of(second, &names)).await.unwrap();
    let report = run(&bench, false).await;
    assert_eq!(report.unreadable[0].0, first);
    assert_eq!((report.missing, report.whole), (vec![second], vec![third]));
    let run_name = bench.names("index/").await.remove(0);
    let size = bench.size(&run_name).await as usize;
    bench.flip(&run_name, size - 70).await;
    assert_eq!(run(&bench, false).await.runs.len(), 1);
}

/// A manifest whose lease was revoked before it was put.
async fn unchecked(bench: &Bench, image: &[u8]) -> (Session, BackupId) {
    let mut session = bench.session().await;
    let source = &mut Parts::new(vec![Extent::Data(image.to_vec().into())]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    let (id, prepared) = prepare(&mut session, &written).await;
    revoke(&bench.vault, session.lease(), &Holder::default()).await.unwrap();
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Revoked);
    (session, id)
}

#[tokio::test]
async fn an_unchecked_backup_is_settled_when_all_it_needs_is_there_although_its_runs_are_void() {
    let bench = Bench::new(true).await;
    let image = noise(1, 70 * C);
    let (_session, id) = unchecked(&bench, &image).await;
    let settled = settle(&bench.vault, id, &Holder::default(), None).await.unwrap();
    assert_eq!(settled, Settled::Checked);
    assert_eq!(marks(&bench, id).await, [MarkKind::Checked]);
    assert_eq!(settle(&bench.vault, id, &Holder::default(), None).await.unwrap(), Settled::Checked);
    assert!(bench.restore(id).await == image);
    let absent = settle(&bench.vault, BackupId::now(), &Holder::default(), None).await.unwrap();
    assert_eq!(absent, Settled::Absent);
}

#[tokio::test]
async fn an_unchecked_backup_that_lacks_something_stays_so_and_says_what() {
    let bench = Bench::new(false).await;
    let image = noise(1, 70 * C);
    let (_session, id) = unchecked(&bench, &image).await;
    let pack = bench.names("data/").await.remove(0);
    let object = bench.backend.get(&pack, None).await.unwrap().unwrap();
    bench.backend.delete(&pack).await.unwrap();
    let Settled::Lacks(lacks) = settle(&bench.vault, id, &Holder::default(), None).await.unwrap() else {
        panic!()
    };
    assert_eq!(lacks[0].ranges, [(0, image.len() as u64)]);
    assert!(marks(&bench, id).await.is_empty());
    bench.backend.put(&pack, object).await.unwrap();
    assert_eq!(settle(&bench.vault, id, &Holder::default(), None).await.unwrap(), Settled::Checked);
}

#[tokio::test]
async fn a_condemned_pack_of_the_writers_own_is_not_relied_upon() {
    let bench = Bench::new(true).await;
    let (_session, id) = unchecked(&bench, &noise(1, 3 * C)).await;
    let pack: ObjectName = bench.names("data/").await[0].parse().unwrap();
    let ObjectName::Pack(area, pack) = pack else { panic!() };
    let condemnation = crate::index::tidings::Condemnation {
        packs: vec![(area.into(), pack)],
        ..crate::index::tidings::Condemnation::default()
    };
    let name = ObjectName::Condemned(LeaseId::new([9; 16]));
    let object = crate::codec::encode(bench.vault.keys(), &name, &condemnation).unwrap();
    bench.backend.put(&name.to_string(), object).await.unwrap();
    assert!(matches!(settle(&bench.vault, id, &Holder::default(), None).await.unwrap(), Settled::Lacks(_)));
}

#[tokio::test]
async fn a_backup_whose_prune_stands_is_never_checked() {
    let bench = Bench::new(true).await;
    let (session, id) = unchecked(&bench, &noise(1, 3 * C)).await;
    backups::put_mark(&bench.vault, id, MarkKind::Prune, &Mark::new(Timestamp::UNIX_EPOCH, ""))
        .await
        .unwrap();
    assert_eq!(settle(&bench.vault, id, &Holder::default(), None).await.unwrap(), Settled::Pruned);
    drop(session);
}

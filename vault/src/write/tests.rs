use std::sync::Mutex;

use async_trait::async_trait;

use super::*;
use crate::backend::Backend;
use crate::index::tidings::{BadPlace, report_damage};
use crate::lease::revoke;
use crate::names::LeasePart;
use crate::testing::{Bench, C, DOMAIN, difference, manifest, noise, prepare};

fn data(bytes: &[u8]) -> Extent {
    Extent::Data(bytes.to_vec().into())
}

/// A backup runs as a task of a daemon.
#[expect(dead_code, reason = "it is enough that it compiles")]
fn every_step_may_move_between_threads(
    vault: &Vault,
    session: &'static mut Session,
    manifest: &'static Manifest,
) {
    fn is_send(_: impl Send) {}
    is_send(Session::begin(vault, DOMAIN, Options::default()));
    is_send(async move {
        let mut parts = Parts::new(vec![]);
        session.parent(manifest.backup).await?.ok();
        session.write_image(&mut parts, 0, BlobType::Data, None).await?;
        session.prepare(manifest).await
    });
    is_send(crate::settle::settle(vault, BackupId::now(), &Holder::default(), None));
    is_send(crate::check::check(vault, &Holder::default(), None, true));
}

#[tokio::test]
async fn what_is_written_is_read_back_byte_for_byte_in_both_sorts_of_vault() {
    for encrypted in [false, true] {
        let bench = Bench::new(encrypted).await;
        let mut image =
            [noise(1, 70 * C), vec![0; 130 * C], b"text ".repeat(40_000), noise(2, 12_345)].concat();
        image[5 * C..6 * C].fill(0);
        let (id, written) = bench.full(&image).await;
        assert!(bench.restore(id).await == image);
        assert_eq!(written.read, 64 * 1024 * (image.len() as u64).div_ceil(64 * 1024));
        assert!(written.stored < 73 * C as u64, "zeroes and text cost next to nothing: {}", written.stored);
        let empty = bench.full(&[]).await.0;
        assert!(bench.restore(empty).await.is_empty());
    }
}

#[tokio::test]
async fn a_second_full_of_the_same_content_stores_no_chunk_and_has_the_same_root() {
    let bench = Bench::new(true).await;
    let image = noise(1, 300 * C);
    let (_, first) = bench.full(&image).await;
    let before = bench.size("data/").await + bench.size("tree/").await;
    let (id, second) = bench.full(&image).await;
    assert_eq!((second.new, second.stored, second.nodes), (0, 0, (0, 0)));
    assert_eq!(first.image, second.image);
    assert_eq!(bench.size("data/").await + bench.size("tree/").await, before);
    assert!(bench.restore(id).await == image);
}

#[tokio::test]
async fn chunks_that_repeat_within_an_image_are_stored_once() {
    let bench = Bench::new(false).await;
    let image = noise(1, 2 * C).repeat(200);
    let (id, written) = bench.full(&image).await;
    assert_eq!(written.new, 2 * C as u64);
    assert!(bench.restore(id).await == image);
}

#[tokio::test]
async fn an_incremental_stores_what_changed_and_patches_of_nodes() {
    let bench = Bench::new(true).await;
    let mut image = noise(1, 320 * C);
    let (first, _) = bench.full(&image).await;
    let before = image.clone();
    let mut last = first;
    for round in 0..4_usize {
        let at = (100 + round * 7) * C;
        image[at..at + C].copy_from_slice(&noise(50 + round as u64, C));
        // The same bytes again, and zeroes where there was something.
        let zeroed = (300 + round) * C;
        image[zeroed..zeroed + C].fill(0);
        let unchanged = |bytes: usize| Extent::Unchanged(bytes as u64);
        let parts = vec![
            unchanged(at),
            data(&image[at..at + 2 * C]),
            unchanged(zeroed - at - 2 * C),
            Extent::Zero(C as u64),
            unchanged(image.len() - zeroed - C),
        ];
        let (next, written) = Box::pin(bench.backup(image.len(), parts, Some(last))).await;
        assert_eq!(written.new, C as u64);
        assert_eq!(written.nodes, (3, 3), "two lowest nodes and the top, all as patches");
        assert!(written.stored < C as u64 + 1200, "{}", written.stored);
        assert!(bench.restore(next).await == image);
        last = next;
    }
    assert!(bench.restore(first).await == before);
    let (_, again) = bench.full(&image).await;
    assert_eq!(
        again.image,
        bench.manifest(last).await.disks[0].image,
        "the same root, however it came about"
    );
    assert_eq!((again.new, again.nodes.0), (0, 0), "nodes that are there as patches are reused");
}

#[tokio::test]
async fn a_disk_that_grows_and_shrinks_keeps_what_it_has_in_common() {
    let bench = Bench::new(false).await;
    let big = noise(1, 200 * C + 77);
    let mut parent = bench.full(&big[..70 * C]).await.0;
    let mut held = 70 * C;
    for size in [200 * C + 77, 65 * C, 64 * C, 3 * C + 1, 90 * C] {
        let common = held.min(size) / C * C;
        let parts = vec![Extent::Unchanged(common as u64), data(&big[common..size])];
        let (next, _) = Box::pin(bench.backup(size, parts, Some(parent))).await;
        assert!(bench.restore(next).await == big[..size], "{size}");
        (parent, held) = (next, size);
    }
}

/// What a source says of an image beside its parent's: chunks that are equal are unchanged.
#[tokio::test]
async fn any_chain_of_writes_zeroes_and_resizes_on_any_parent_is_restored_exactly() {
    for seed in 0..4 {
        let bench = Bench::new(seed % 2 == 0).await;
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut kept: Vec<(BackupId, Vec<u8>)> = Vec::new();
        let mut image = noise(seed, rng.usize(1..90 * C));
        for round in 0..8 {
            for _ in 0..rng.usize(0..6) {
                let at = rng.usize(0..image.len());
                let end = (at + rng.usize(1..10 * C)).min(image.len());
                match rng.u8(0..3) {
                    0 => image[at..end].fill(0),
                    1 => rng.fill(&mut image[at..end]),
                    _ => image.copy_within(0..end - at, at),
                }
            }
            if rng.u8(0..3) == 0 {
                image.resize(rng.usize(1..90 * C), 0);
            }
            let parent = if round == 0 { None } else { rng.choice(&kept) };
            let parts = match parent {
                Some((_, old)) => difference(old, &image),
                None => vec![data(&image)],
            };
            let (id, written) = Box::pin(bench.backup(image.len(), parts, parent.map(|(id, _)| *id))).await;
            assert!(bench.restore(id).await == image, "seed {seed}, round {round}");
            let (_, again) = bench.full(&image).await;
            assert_eq!((again.image, again.new), (written.image, 0), "seed {seed}, round {round}");
            kept.push((id, image.clone()));
        }
        for (id, image) in &kept {
            assert!(bench.restore(*id).await == *image, "seed {seed}");
        }
    }
}

#[tokio::test]
async fn unchanged_beyond_the_parent_is_refused() {
    let bench = Bench::new(false).await;
    let mut session = bench.session().await;
    let part = || vec![Extent::Unchanged(10 * C as u64)];
    let mut write = async |size: usize, parent| {
        session.write_image(&mut Parts::new(part()), size as u64, BlobType::Data, parent).await
    };
    assert!(matches!(write(10 * C, None).await, Err(VaultError::Contract(_))));
    let small = Tree { size: 9 * C as u64 + 5, top: BlobId::ZERO };
    assert!(matches!(write(10 * C, Some(small)).await, Err(VaultError::Contract(_))));
    let same = Tree { size: 10 * C as u64, top: BlobId::ZERO };
    assert!(write(10 * C, Some(same)).await.is_ok());
}

#[tokio::test]
async fn a_backup_that_was_not_committed_is_not_there_and_its_packs_are_reused() {
    let bench = Bench::new(true).await;
    let image = noise(1, 300 * C);
    let mut session = bench.session().await;
    let source = &mut Parts::new(vec![data(&image)]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    prepare(&mut session, &written).await;
    drop(session);
    assert_eq!(Backups::load(&bench.vault, None).await.unwrap().iter().count(), 0);
    let (id, again) = bench.full(&image).await;
    assert_eq!(again.new, 0);
    assert!(bench.restore(id).await == image);
}

#[derive(Default)]
struct Journal(Mutex<Vec<RunId>>);

#[async_trait]
impl Log for Journal {
    async fn run_named(&self, run: RunId) -> std::io::Result<()> {
        self.0.lock().unwrap().push(run);
        Ok(())
    }

    async fn run_put(&self, run: RunId) -> std::io::Result<()> {
        self.0.lock().unwrap().retain(|named| *named != run);
        Ok(())
    }
}

#[tokio::test]
async fn a_session_whose_process_died_is_resumed_with_the_packs_that_no_run_names() {
    let bench = Bench::new(true).await;
    let image = noise(1, 600 * C);
    let journal = Arc::new(Journal::default());
    let options = Options { log: journal.clone(), ..Options::default() };
    let mut session = Session::begin(&bench.vault, DOMAIN, options.clone()).await.unwrap();
    let lease = session.lease();
    // Every put of a run goes wrong, though the first arrives late: packs are there, and no run.
    bench.backend.fail("index/", 9);
    let source = &mut Parts::new(vec![data(&image)]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    assert!(session.prepare(&manifest(&session, &written)).await.is_err());
    session.store.rest().await;
    drop(session);
    bench.backend.fail("index/", 0);
    let in_flight = journal.0.lock().unwrap().clone();
    assert_eq!(in_flight.len(), 3);
    let packs = bench.names("data/").await.len();
    assert!(packs >= 2);

    let options = Options { resume: Some(Resume { lease, in_flight: in_flight.clone() }), ..options };
    let mut session = Session::begin(&bench.vault, DOMAIN, options).await.unwrap();
    assert_eq!(session.lease(), lease);
    let source = &mut Parts::new(vec![data(&image)]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    assert_eq!(written.new, 0, "sealed packs are durable progress");
    let (id, prepared) = prepare(&mut session, &written).await;
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
    session.end().await.unwrap();
    assert_eq!(bench.names("data/").await.len(), packs);
    assert!(bench.restore(id).await == image);
    // The runs that came late are void for ever.
    for run in in_flight {
        assert!(bench.names(&format!("index/{run}")).await.len() == 1);
    }
    let index = Index::load(&bench.vault, None).await.unwrap();
    let named = index.packs_of(lease).await.unwrap();
    assert_eq!(named.len(), bench.names("data/").await.len() + bench.names("tree/").await.len());
}

#[tokio::test]
async fn the_last_run_of_a_session_takes_the_place_of_its_others() {
    let bench = Bench::new(true).await;
    let mut session = bench.session().await;
    let images = [noise(1, 70 * C), noise(2, 70 * C), noise(3, 70 * C)];
    let mut last = None;
    for image in &images {
        let source = &mut Parts::new(vec![data(image)]);
        let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
        session.store.flush().await.unwrap();
        last = Some(written);
    }
    prepare(&mut session, &last.unwrap()).await;
    drop(session);
    assert_eq!(bench.names("index/").await.len(), 4);
    let index = Index::load(&bench.vault, None).await.unwrap();
    let ids = bench.vault.ids(DOMAIN);
    for chunk in images.iter().flat_map(|image| image.chunks(C)) {
        let found = index.find(BlobType::Data, ids.id(BlobType::Data, chunk)).await.unwrap();
        assert_eq!(found.iter().map(|one| one.usable).collect::<Vec<_>>(), [true]);
    }
}

#[tokio::test]
async fn a_put_without_an_answer_is_repeated_and_costs_nothing() {
    let bench = Bench::new(true).await;
    for (seed, prefix) in [(1, "data/"), (2, "index/"), (3, "tree/")] {
        let image = noise(seed, 300 * C);
        bench.backend.fail(prefix, 2);
        let (id, _) = bench.full(&image).await;
        assert!(bench.restore(id).await == image);
        if prefix == "index/" {
            let index = Index::load(&bench.vault, None).await.unwrap();
            assert_eq!(index.run_counts(), (4, 2), "the two that came late are named as lost");
        }
    }
}

#[tokio::test]
async fn a_session_that_leaves_a_run_in_flight_does_not_end_its_lease_but_revokes_it() {
    for (prefix, part) in [("data/", LeasePart::Ended), ("index/", LeasePart::Revoked)] {
        let bench = Bench::new(false).await;
        let image = noise(1, 3 * C);
        let mut session = bench.session().await;
        let lease = session.lease();
        bench.backend.fail(prefix, 100);
        let source = &mut Parts::new(vec![data(&image)]);
        let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
        assert!(session.prepare(&manifest(&session, &written)).await.is_err());
        bench.backend.fail(prefix, 0);
        session.end().await.unwrap();
        let parts = crate::lease::parts(&bench.vault, lease).await.unwrap();
        assert!(parts.contains(&part) && parts.len() == 2, "{prefix} {parts:?}");
    }
}

#[tokio::test]
async fn a_writer_whose_lease_was_revoked_finds_out_before_and_after_the_manifest() {
    let bench = Bench::new(false).await;
    let image = noise(1, 3 * C);
    let source = || Parts::new(vec![data(&image)]);
    let mut session = bench.session().await;
    let written = session.write_image(&mut source(), image.len() as u64, BlobType::Data, None).await.unwrap();
    let (id, prepared) = prepare(&mut session, &written).await;
    revoke(&bench.vault, session.lease(), &Holder::default()).await.unwrap();
    assert!(matches!(session.prepare(&manifest(&session, &written)).await, Ok(Readiness::Revoked)));
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Revoked);
    let all = Backups::load(&bench.vault, None).await.unwrap();
    assert!(all.get(id).is_some() && !all.has(id, MarkKind::Checked));
    let next = bench.session().await;
    assert!(next.parent(id).await.unwrap().unwrap_err().contains("never checked"));
}

#[tokio::test]
async fn a_damaged_chunk_is_written_anew_by_the_next_backup_and_heals_the_older_ones() {
    let bench = Bench::new(true).await;
    let image = noise(1, 40 * C);
    let (first, _) = bench.full(&image).await;
    let packs = bench.names("data/").await;
    bench.flip(&packs[0], 5 * C).await;
    let disk = bench.manifest(first).await.disks[0].image;
    assert_eq!(bench.try_read(&disk, false).await.unwrap_err().code(), "VAULT_DATA_LOST");
    assert_eq!(bench.names("damage/").await.len(), 1, "told once");
    // An incremental that would have left it alone is told to read it.
    let mut session = bench.session().await;
    let parent = session.parent(first).await.unwrap().unwrap();
    let [range] = &parent.reread["vda"][..] else { panic!("{:?}", parent.reread) };
    assert_eq!(range.end - range.start, C as u64);
    let (begin, end) = (range.start as usize, range.end as usize);
    let parts = vec![
        Extent::Unchanged(begin as u64),
        data(&image[begin..end]),
        Extent::Unchanged((image.len() - end) as u64),
    ];
    let tree = Some(parent.manifest.disks[0].image.tree());
    let written =
        session.write_image(&mut Parts::new(parts), image.len() as u64, BlobType::Data, tree).await.unwrap();
    assert_eq!(written.new, C as u64);
    let (second, prepared) = prepare(&mut session, &written).await;
    session.commit(&prepared).await.unwrap();
    session.end().await.unwrap();
    assert!(bench.restore(second).await == image);
    assert!(bench.restore(first).await == image, "healed");
}

#[tokio::test]
async fn damage_that_is_found_while_a_backup_reuses_it_is_written_again_before_the_commit() {
    let bench = Bench::new(false).await;
    let image = noise(1, 40 * C);
    bench.full(&image).await;
    let mut session = bench.session().await;
    let source = &mut Parts::new(vec![data(&image)]);
    let mut written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    assert_eq!(written.new, 0);
    let id = session.ids().id(BlobType::Data, &image[7 * C..8 * C]);
    let place = session.index().usable(BlobType::Data, id).await.unwrap().unwrap();
    let bad = BadPlace { pack: place.pack, offset: place.offset, id };
    report_damage(&bench.vault, vec![bad]).await.unwrap();
    let Readiness::Damaged(hurt) = session.prepare(&manifest(&session, &written)).await.unwrap() else {
        panic!()
    };
    let (begin, end) = (7 * C as u64, 8 * C as u64);
    assert_eq!(hurt["vda"], std::slice::from_ref(&(begin..end)));
    let parts = vec![
        Extent::Unchanged(begin),
        data(&image[7 * C..8 * C]),
        Extent::Unchanged(image.len() as u64 - end),
    ];
    let tree = Some(written.image.tree());
    written =
        session.write_image(&mut Parts::new(parts), image.len() as u64, BlobType::Data, tree).await.unwrap();
    assert_eq!(written.new, C as u64);
    let (_, prepared) = prepare(&mut session, &written).await;
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
}

#[tokio::test]
async fn damage_that_is_found_between_a_session_and_the_one_that_goes_on_is_not_committed() {
    let bench = Bench::new(false).await;
    let image = noise(1, 40 * C);
    bench.full(&image).await;
    let mut session = bench.session().await;
    let source = &mut Parts::new(vec![data(&image)]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    session.make_durable().await.unwrap();
    let lease = session.lease();
    let id = session.ids().id(BlobType::Data, &image[7 * C..8 * C]);
    let place = session.index().usable(BlobType::Data, id).await.unwrap().unwrap();
    drop(session);
    let bad = BadPlace { pack: place.pack, offset: place.offset, id };
    report_damage(&bench.vault, vec![bad]).await.unwrap();

    let options = Options { resume: Some(Resume { lease, in_flight: Vec::new() }), ..Options::default() };
    let mut session = Session::begin(&bench.vault, DOMAIN, options).await.unwrap();
    // Not even when it is told so, and nothing was written again.
    for _ in 0..2 {
        let ready = session.prepare(&manifest(&session, &written)).await.unwrap();
        assert!(matches!(ready, Readiness::Damaged(_)), "{ready:?}");
    }
    let source = &mut Parts::new(vec![data(&image)]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await.unwrap();
    assert_eq!(written.new, C as u64);
    let (_, prepared) = prepare(&mut session, &written).await;
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
}

#[tokio::test]
async fn with_a_damaged_node_the_parent_is_refused_or_the_writing_ends_and_a_full_heals_all() {
    let bench = Bench::new(true).await;
    let image = noise(1, 200 * C);
    let (first, _) = bench.full(&image).await;
    let trees = bench.names("tree/").await;
    bench.flip(&trees[0], 60).await;
    let mut session = bench.session().await;
    let parent = session.parent(first).await.unwrap().unwrap();
    let tree = parent.manifest.disks[0].image.tree();
    let parts = vec![data(&noise(9, C)), Extent::Unchanged((image.len() - C) as u64)];
    let ended =
        session.write_image(&mut Parts::new(parts), image.len() as u64, BlobType::Data, Some(tree)).await;
    assert!(matches!(ended, Err(VaultError::Lost { .. })));
    drop(session);
    let session = bench.session().await;
    assert!(session.parent(first).await.unwrap().unwrap_err().contains("damage in its tree"));
    drop(session);
    let (second, written) = bench.full(&image).await;
    assert_eq!((written.new, written.nodes.0), (0, 1), "only the node is stored anew");
    assert!(bench.restore(second).await == image && bench.restore(first).await == image);
}

#[tokio::test]
async fn a_stream_is_written_like_a_disk_and_shares_no_id_with_one() {
    let bench = Bench::new(true).await;
    let image = noise(1, 3 * C + 9);
    let mut session = bench.session().await;
    let mut write = async |kind| {
        let source = &mut Parts::new(vec![data(&image)]);
        session.write_image(source, image.len() as u64, kind, None).await
    };
    let disk = write(BlobType::Data).await.unwrap();
    let stream = write(BlobType::Stream).await.unwrap();
    assert_eq!(stream.new, 4 * C as u64);
    assert_ne!(disk.image, stream.image);
    assert!(write(BlobType::Table).await.is_err());
}

#[tokio::test]
async fn no_backup_is_made_of_a_session_whose_image_was_not_written_to_its_end() {
    let bench = Bench::new(false).await;
    let image = noise(1, 320 * C);
    let mut session = bench.session().await;
    // The source ends too early: some of the chunks that were taken on are in no pack.
    let short = &mut Parts::new(vec![data(&image[..319 * C])]);
    let size = image.len() as u64;
    assert!(session.write_image(short, size, BlobType::Data, None).await.is_err());
    let source = &mut Parts::new(vec![data(&image[..C])]);
    let written = session.write_image(source, C as u64, BlobType::Data, None).await.unwrap();
    let prepared = session.prepare(&manifest(&session, &written)).await;
    assert!(matches!(prepared, Err(VaultError::Contract(_))));
    session.keep().await.unwrap();
    session.end().await.unwrap();
    let (id, written) = bench.full(&image).await;
    assert!((1..size).contains(&written.new), "what was put counts, and not all was: {}", written.new);
    assert!(bench.restore(id).await == image);
}

#[tokio::test]
async fn a_failing_source_or_place_fails_the_backup_and_leaves_none() {
    let bench = Bench::new(false).await;
    let image = noise(1, 600 * C);
    let mut session = bench.session().await;
    bench.backend.fail("data/", 1000);
    let source = &mut Parts::new(vec![data(&image)]);
    let written = session.write_image(source, image.len() as u64, BlobType::Data, None).await;
    let failed = match written {
        Ok(written) => session.prepare(&manifest(&session, &written)).await.map(|_| ()),
        Err(error) => Err(error),
    };
    assert_eq!(failed.unwrap_err().code(), "VAULT_UNREACHABLE");
    bench.backend.fail("data/", 0);
    assert!(bench.backend.list("backups/").await.unwrap().is_empty());
}

//! The index, and the tables of packs.

use super::*;
use crate::ids::LeaseId;

async fn repair(folder: &Folder) -> IndexRepair {
    Box::pin(super::super::index(&folder.vault, &Holder::default(), None)).await.unwrap()
}

#[tokio::test]
async fn a_bad_run_makes_backups_grow_and_hurts_none_until_the_tables_of_its_packs_are_read() {
    // Its foot, and a block of its entries.
    for at_the_end in [true, false] {
        let folder = Folder::new(true, false).await;
        let image = noise(1, 70 * C);
        let one = folder.full(&image).await;
        assert_eq!(repair(&folder).await, IndexRepair::default());
        let run = folder.names("index/").await.remove(0);
        let at = if at_the_end { folder.size(&run) - 70 } else { 100 };
        folder.flip(&run, at);
        let report = folder.check(false).await;
        assert_eq!((report.runs.len(), report.hurt.len(), report.whole.as_slice()), (1, 0, &[one][..]));
        let two = BackupId::now();
        let parts = vec![Extent::Data(image.clone().into())];
        let grown = Box::pin(backup_as(&folder.vault, two, image.len(), parts, None)).await;
        assert!(grown.stored > 0, "{grown:?}");

        let done = repair(&folder).await;
        assert_eq!((done.ended.clone(), done.set_aside.len(), done.packs), (Indexed::Put, 1, 2), "{done:?}");
        assert!(done.missing.is_empty() && done.blobs == 70 + 3);
        assert!(restored(&folder.vault, one).await == image);
        assert!(restored(&folder.vault, two).await == image);
        assert!(folder.check(true).await.is_clean());
        assert_eq!(repair(&folder).await, IndexRepair::default());
        // All of it is reused now.
        let three = BackupId::now();
        let parts = vec![Extent::Data(image.clone().into())];
        let again = Box::pin(backup_as(&folder.vault, three, image.len(), parts, None)).await;
        assert_eq!((again.new, again.stored), (0, 0));
    }
}

#[tokio::test]
async fn with_a_bad_run_and_a_lost_node_each_backup_is_judged_by_what_is_there() {
    let folder = Folder::new(false, false).await;
    let hurt = folder.full(&noise(6, 3 * C)).await;
    folder.remove(&folder.names("tree/").await.remove(0));
    let before = folder.names("index/").await;
    let sound = folder.full(&noise(7, 3 * C)).await;
    let run = folder.names("index/").await.into_iter().find(|run| !before.contains(run)).unwrap();
    folder.flip(&run, folder.size(&run) - 70);
    // The older one is looked at first, and everything is listed once more for its node.
    let report = folder.check(false).await;
    assert_eq!((report.hurt.len(), report.hurt[0].0, report.whole.as_slice()), (1, hurt, &[sound][..]));
}

#[tokio::test]
async fn with_tables_and_all_runs_destroyed_blobs_are_found_by_their_headers() {
    let folder = Folder::new(true, false).await;
    let images = [noise(2, 70 * C), noise(3, 7 * C)];
    let ids = [folder.full(&images[0]).await, folder.full(&images[1]).await];
    for prefix in ["data/", "tree/"] {
        for pack in folder.names(prefix).await {
            folder.flip(&pack, folder.size(&pack) - 70);
        }
    }
    // While a run tells where they are, nobody needs the tables.
    let report = folder.check(true).await;
    assert_eq!((report.packs.len(), report.whole.len(), report.damage), (4, 2, 0));
    assert_eq!(repair(&folder).await.ended, Indexed::Nothing);
    for run in folder.names("index/").await {
        folder.remove(&run);
    }
    let done = repair(&folder).await;
    assert_eq!((done.ended.clone(), done.packs), (Indexed::Put, 4), "{done:?}");
    for (id, image) in ids.iter().zip(&images) {
        assert!(restored(&folder.vault, *id).await == *image);
    }
    assert!(folder.check(true).await.hurt.is_empty());
}

#[tokio::test]
async fn a_run_that_was_set_aside_counts_for_nothing_though_it_can_be_read_again() {
    let folder = Folder::new(false, false).await;
    let image = noise(4, 5 * C);
    let one = folder.full(&image).await;
    let run = folder.names("index/").await.remove(0);
    let at = folder.size(&run) - 70;
    folder.flip(&run, at);
    assert_eq!(repair(&folder).await.ended, Indexed::Put);
    marks::prune(&folder.vault, one, "x").await.unwrap();
    assert_eq!(folder.collect().await, Ended::Done);
    assert!(folder.names("data/").await.is_empty());
    folder.flip(&run, at);
    let index = Index::load(&folder.vault, None).await.unwrap();
    assert!(index.unreadable().is_empty());
    assert!(index.states().iter().any(|state| run.ends_with(&state.id.to_string())));
    assert!(index.states().iter().all(|state| !state.usable || state.entries == 0), "{:?}", index.states());
    // A writer is not misled to packs that are long gone.
    let parts = vec![Extent::Data(image.clone().into())];
    let two = BackupId::now();
    let written = Box::pin(backup_as(&folder.vault, two, image.len(), parts, None)).await;
    assert_eq!(written.new, image.len() as u64);
    assert!(restored(&folder.vault, two).await == image);
}

#[tokio::test]
async fn the_index_is_left_alone_while_somebody_collects_and_what_writers_at_work_have_put_is_theirs() {
    let folder = Folder::new(false, false).await;
    folder.full(&noise(5, 3 * C)).await;
    let run = folder.names("index/").await.remove(0);
    folder.remove(&run);
    let collects = Holder { collects: true, ..Holder::default() };
    let collector = Lease::begin(&folder.vault, &collects).await.unwrap();
    let done = repair(&folder).await;
    assert_eq!(done.ended, Indexed::Others([collector.id()].into()));
    collector.end().await.unwrap();
    // A pack whose writer is still at work.
    let writer = Lease::begin(&folder.vault, &Holder::default()).await.unwrap();
    let of_a_writer = crate::ids::PackId::random(writer.id()).unwrap();
    let name = ObjectName::Pack(crate::names::Area::Data, of_a_writer).to_string();
    folder.backend.put(&name, Bytes::from_static(b"not yet of anybody's concern")).await.unwrap();
    // A pack that will be deleted.
    let doomed: ObjectName = folder.names("tree/").await.remove(0).parse().unwrap();
    let ObjectName::Pack(area, doomed) = doomed else { panic!("{doomed}") };
    let condemnation = crate::index::tidings::Condemnation {
        packs: vec![(area.into(), doomed)],
        ..crate::index::tidings::Condemnation::default()
    };
    let name = ObjectName::Condemned(LeaseId::new([9; 16]));
    let object = crate::codec::encode(folder.vault.keys(), &name, &condemnation).unwrap();
    folder.vault.put(&name, object).await.unwrap();
    let done = repair(&folder).await;
    assert_eq!((done.ended.clone(), done.packs, done.blobs), (Indexed::Put, 1, 3), "{done:?}");
    writer.end().await.unwrap();
}

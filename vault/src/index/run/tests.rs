use std::sync::Arc;

use zeroize::Zeroizing;

use super::*;
use crate::backend::Backend;
use crate::backend::memory::Memory;
use crate::ids::{LeaseId, VaultId};
use crate::keys::Root;
use crate::vault::{Confirmed, Draft};

fn id(seed: u64) -> BlobId {
    BlobId::new(*blake3::hash(&seed.to_le_bytes()).as_bytes())
}

fn entries(seeds: std::ops::Range<u64>, kind: BlobType) -> Vec<pack::Entry> {
    let coding = Coding::parse(1).unwrap();
    let entry = |seed: u64| pack::Entry {
        id: id(seed),
        kind,
        coding,
        offset: seed as u32 + 32,
        raw: 9,
        stored: seed as u32,
    };
    seeds.map(entry).collect()
}

async fn vaults() -> Vec<(Vault, Arc<Memory>)> {
    let (one, two) = (Arc::new(Memory::default()), Arc::new(Memory::default()));
    let draft = Draft::encrypted(false).unwrap();
    let words = draft.recovery_words().unwrap();
    let encrypted = draft.confirm(&words).unwrap().put(one.clone(), None).await.unwrap();
    let plain = Confirmed::plain(false).unwrap().put(two.clone(), None).await.unwrap();
    vec![(encrypted, one), (plain, two)]
}

/// 1000 chunks in 10 packs, 300 nodes in 200 others: several blocks of each sort.
fn draft() -> (RunDraft, Vec<(BlobId, Place)>) {
    let (mut draft, mut all) = (RunDraft::default(), Vec::new());
    let lease = LeaseId::new([1; 16]);
    for n in 0..210 {
        let pack = PackId::random(lease).unwrap();
        let (area, kind, range) = match n {
            0..10 => (Area::Data, BlobType::Data, n * 100..n * 100 + 100),
            _ => (Area::Tree, BlobType::Node(2), 5000 + n * 2..5000 + n * 2 + 2),
        };
        let blobs = entries(range, kind);
        draft.add_pack(area, pack, &blobs);
        all.extend(blobs.iter().map(|entry| (entry.id, Place::new(area, pack, entry))));
    }
    (draft, all)
}

#[tokio::test]
async fn each_blob_is_found_with_and_without_a_filter_and_copy_and_no_other_is() {
    for (vault, _) in vaults().await {
        let (mut draft, all) = draft();
        let folder = tempfile::tempdir().unwrap();
        let run = RunId::random(LeaseId::new([1; 16])).unwrap();
        draft.replaces = vec![RunId::new([7; 24])];
        draft.lost = vec![RunId::new([8; 24])];
        let object = draft.encode(vault.keys(), run).unwrap();
        let size = object.len() as u64;
        vault.put(&ObjectName::Run(run), object).await.unwrap();
        for folder in [None, Some(folder.path()), Some(folder.path())] {
            for warm in [false, true] {
                let run = Run::open(&vault, folder, run, size).await.unwrap();
                if warm {
                    run.warm(10).await.unwrap();
                }
                assert_eq!((run.head().replaces.len(), run.head().lost.len()), (1, 1));
                for (id, place) in all.iter().step_by(7) {
                    assert_eq!(run.look_up(*id, place.kind.is_node()).await.unwrap(), [*place]);
                }
                for (absent, node) in
                    [(id(1_000_000), false), (id(1_000_000), true), (id(5), true), (id(5020), false)]
                {
                    assert!(run.look_up(absent, node).await.unwrap().is_empty());
                }
                assert!(run.look_up(BlobId::ZERO, false).await.unwrap().is_empty());
                assert!(run.look_up(BlobId::new([255; 32]), false).await.unwrap().is_empty());
            }
        }
    }
}

#[tokio::test]
async fn a_copy_answers_without_the_vault_and_one_that_is_damaged_is_fetched_again() {
    for (vault, backend) in vaults().await {
        let (mut draft, all) = draft();
        let folder = tempfile::tempdir().unwrap();
        let id = RunId::random(LeaseId::new([1; 16])).unwrap();
        let object = draft.encode(vault.keys(), id).unwrap();
        vault.put(&ObjectName::Run(id), object.clone()).await.unwrap();
        let run = Run::open(&vault, Some(folder.path()), id, object.len() as u64).await.unwrap();
        run.warm(10).await.unwrap();
        for pack in 0..2 {
            run.pack_block(pack).await.unwrap();
        }
        backend.delete(&ObjectName::Run(id).to_string()).await.unwrap();
        for (id, place) in &all {
            assert_eq!(run.look_up(*id, place.kind.is_node()).await.unwrap(), [*place]);
        }
        let copy = folder.path().join(super::super::cached::file_name(&ObjectName::Run(id)));
        let length = std::fs::metadata(&copy).unwrap().len() as usize;
        std::fs::write(&copy, vec![0xaa; length]).unwrap();
        assert!(run.look_up(all[0].0, false).await.is_err());
        vault.put(&ObjectName::Run(id), object).await.unwrap();
        assert_eq!(run.look_up(all[0].0, false).await.unwrap(), [all[0].1]);
    }
}

#[tokio::test]
async fn a_flip_of_any_byte_and_a_cut_anywhere_never_give_another_place() {
    for (vault, backend) in vaults().await {
        let mut draft = RunDraft::default();
        let pack = PackId::random(LeaseId::new([1; 16])).unwrap();
        let blobs = entries(0..3, BlobType::Data);
        draft.add_pack(Area::Data, pack, &blobs);
        let id = RunId::random(LeaseId::new([1; 16])).unwrap();
        let object = draft.encode(vault.keys(), id).unwrap();
        let name = ObjectName::Run(id).to_string();
        for at in 0..object.len() {
            let mut flipped = object.to_vec();
            flipped[at] ^= 4;
            for bytes in [flipped, object[..at].to_vec()] {
                backend.put(&name, bytes.clone().into()).await.unwrap();
                let Ok(run) = Run::open(&vault, None, id, bytes.len() as u64).await else { continue };
                assert_eq!(bytes.len(), object.len(), "cut at {at}");
                for entry in &blobs {
                    // The head and the seal are not looked at by a look-up.
                    if let Ok(places) = run.look_up(entry.id, false).await {
                        assert_eq!(places, [Place::new(Area::Data, pack, entry)], "byte {at}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_run_of_too_many_blobs_is_refused() {
    let keys = Keys::new(VaultId::new([1; 16]), Root::Master(Zeroizing::new([1; 32])));
    let mut draft = RunDraft::default();
    let blobs = entries(0..1, BlobType::Data).repeat(MOST_ENTRIES + 1);
    draft.add_pack(Area::Data, PackId::new([1; 24]), &blobs);
    assert!(draft.encode(&keys, RunId::new([1; 24])).is_err());
}

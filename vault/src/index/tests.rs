use std::sync::Arc;

use super::run::RunDraft;
use super::*;
use crate::backend::Backend;
use crate::backend::memory::Memory;
use crate::codec;
use crate::lease::{Holder, revoke};
use crate::names::Area;
use crate::pack::Entry;
use crate::vault::Confirmed;

struct Bench {
    vault: Vault,
    backend: Arc<Memory>,
}

impl Bench {
    async fn new() -> Self {
        let backend = Arc::new(Memory::default());
        let vault = Confirmed::plain(false).unwrap().put(backend.clone(), None).await.unwrap();
        Self { vault, backend }
    }

    /// A run of one pack with one chunk.
    async fn run(&self, lease: LeaseId, pack: PackId, replaces: &[RunId], lost: &[RunId]) -> RunId {
        let run = RunId::random(lease).unwrap();
        let mut draft = RunDraft::new(replaces.to_vec(), lost.to_vec());
        draft.add_pack(Area::Data, pack, &[entry()]);
        let object = draft.encode(self.vault.keys(), run).unwrap();
        self.vault.put(&ObjectName::Run(run), object).await.unwrap();
        run
    }

    async fn index(&self) -> Index {
        Index::load(&self.vault, None).await.unwrap()
    }

    async fn packs(&self) -> Vec<(PackId, bool)> {
        let found = self.index().await.find(BlobType::Data, ID).await.unwrap();
        found.iter().map(|found| (found.place.pack, found.usable)).collect()
    }
}

const ID: BlobId = BlobId::new([5; 32]);

fn entry() -> Entry {
    let coding = crate::blob::Coding::parse(0).unwrap();
    Entry { id: ID, kind: BlobType::Data, coding, offset: 32, raw: 1, stored: 1 }
}

fn lease(byte: u8) -> LeaseId {
    LeaseId::new([byte; 16])
}

fn pack(byte: u8) -> PackId {
    PackId::new([byte; 24])
}

#[tokio::test]
async fn a_replaced_run_is_a_hint_and_what_takes_its_place_counts() {
    let bench = Bench::new().await;
    let old = bench.run(lease(1), pack(1), &[], &[]).await;
    assert_eq!(bench.packs().await, [(pack(1), true)]);
    bench.run(lease(2), pack(2), &[old], &[]).await;
    assert_eq!(bench.packs().await, [(pack(2), true), (pack(1), false)]);
}

#[tokio::test]
async fn a_lost_run_is_void_whenever_it_turns_up() {
    let bench = Bench::new().await;
    let late = bench.run(lease(1), pack(1), &[], &[]).await;
    let object = bench.vault.get(&ObjectName::Run(late)).await.unwrap().unwrap();
    bench.backend.delete(&ObjectName::Run(late).to_string()).await.unwrap();
    bench.run(lease(1), pack(2), &[], &[late]).await;
    assert_eq!(bench.packs().await, [(pack(2), true)]);
    bench.vault.put(&ObjectName::Run(late), object).await.unwrap();
    assert_eq!(bench.packs().await, [(pack(2), true), (pack(1), false)]);
}

#[tokio::test]
async fn a_run_of_a_revoked_lease_is_a_hint_and_its_packs_are_not_void_by_that() {
    let bench = Bench::new().await;
    let of_the_revoked = PackId::random(lease(1)).unwrap();
    bench.run(lease(1), of_the_revoked, &[], &[]).await;
    revoke(&bench.vault, lease(1), &Holder::default()).await.unwrap();
    assert_eq!(bench.packs().await, [(of_the_revoked, false)]);
    bench.run(lease(2), of_the_revoked, &[], &[]).await;
    assert_eq!(bench.packs().await.iter().filter(|(_, usable)| *usable).count(), 1);
}

#[tokio::test]
async fn what_is_condemned_or_damaged_is_absent_for_writers_and_a_hint_for_readers() {
    let bench = Bench::new().await;
    bench.run(lease(1), pack(1), &[], &[]).await;
    bench.run(lease(2), pack(2), &[], &[]).await;
    bench.run(lease(3), pack(3), &[], &[]).await;
    let name = ObjectName::Condemned(lease(9));
    let condemnation = Condemnation { packs: vec![(Area::Data.into(), pack(1))], ..Condemnation::default() };
    bench.vault.put(&name, codec::encode(bench.vault.keys(), &name, &condemnation).unwrap()).await.unwrap();
    let bad = tidings::BadPlace { pack: pack(2), offset: 32, id: ID };
    let sound_elsewhere = tidings::BadPlace { pack: pack(3), offset: 33, id: ID };
    tidings::report_damage(&bench.vault, vec![bad, sound_elsewhere]).await.unwrap();
    let mut packs = bench.packs().await;
    assert_eq!(packs[0], (pack(3), true));
    packs.sort();
    assert_eq!(packs, [(pack(1), false), (pack(2), false), (pack(3), true)]);
}

#[tokio::test]
async fn damage_that_is_reported_later_counts_once_it_was_looked_for() {
    let bench = Bench::new().await;
    bench.run(lease(1), pack(1), &[], &[]).await;
    let index = bench.index().await;
    assert!(index.usable(BlobType::Data, ID).await.unwrap().is_some());
    let bad = tidings::BadPlace { pack: pack(1), offset: 32, id: ID };
    tidings::report_damage(&bench.vault, vec![bad]).await.unwrap();
    assert!(index.usable(BlobType::Data, ID).await.unwrap().is_some(), "nobody has looked yet");
    index.refresh_damage().await.unwrap();
    assert_eq!(index.damaged_ids(), [ID].into());
    assert!(index.usable(BlobType::Data, ID).await.unwrap().is_none());
}

#[tokio::test]
async fn a_damaged_run_is_told_and_what_it_says_is_absent_but_a_damaged_condemnation_stops_all() {
    let bench = Bench::new().await;
    let run = bench.run(lease(1), pack(1), &[], &[]).await;
    let name = ObjectName::Run(run).to_string();
    let mut bytes = bench.backend.get(&name, None).await.unwrap().unwrap().to_vec();
    let at = bytes.len() - 70;
    bytes[at] ^= 1;
    bench.backend.put(&name, bytes.into()).await.unwrap();
    let index = bench.index().await;
    assert_eq!(index.unreadable().len(), 1);
    assert!(index.find(BlobType::Data, ID).await.unwrap().is_empty());
    let name = ObjectName::Condemned(lease(9)).to_string();
    bench.backend.put(&name, b"torn".as_slice().into()).await.unwrap();
    assert!(matches!(Index::load(&bench.vault, None).await, Err(VaultError::Damaged { .. })));
}

#[tokio::test]
async fn a_copy_of_a_run_that_is_not_listed_any_more_is_removed() {
    let bench = Bench::new().await;
    let folder = tempfile::tempdir().unwrap();
    let run = bench.run(lease(1), pack(1), &[], &[]).await;
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    Index::load(&bench.vault, Some(folder.path())).await.unwrap();
    assert_eq!(files(), 1);
    bench.backend.delete(&ObjectName::Run(run).to_string()).await.unwrap();
    Index::load(&bench.vault, Some(folder.path())).await.unwrap();
    assert_eq!(files(), 0);
}

//! One suite for every backend: each promise of `FORMAT.md`, §1, by two connections, of which one puts and the other looks.
//!
//! A backend's tests make a [`Place`] and say `conformance!(place)`; what only that backend can do wrong has its own tests
//! beside it.

use std::any::Any;
use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use futures_util::{StreamExt, TryStreamExt, stream};

use super::memory::Memory;
use super::{Backend, BackendErrorKind, Listed};
use crate::backups::Backups;
use crate::blob::BlobType;
use crate::ids::{BackupId, LeaseId, MarkId, PackId, VaultId};
use crate::names::{Area, LeasePart, MarkKind, ObjectName};
use crate::testing::{C, DOMAIN, noise, prepare};
use crate::vault::{Confirmed, Vault};
use crate::write::{Extent, Options, Outcome, Parts, Session};

/// Puts something under a name, and returns what looks whether it is there still.
pub(crate) type Stranger = Box<dyn Fn(&str) -> Box<dyn Fn() -> bool>>;

/// A place that two hosts use.
pub(crate) struct Place {
    pub(crate) first: Arc<dyn Backend>,
    pub(crate) second: Arc<dyn Backend>,
    /// Refuses other bytes under a name that is taken.
    pub(crate) refuses: bool,
    /// Puts there what is none of the vault's, past the backend.
    pub(crate) stranger: Stranger,
    /// What lives as long as the place.
    pub(crate) _kept: Box<dyn Any>,
}

/// All behaviours, each as a test of the module in which this stands.
macro_rules! conformance {
    ($place:expr) => {
        $crate::backend::conformance::each! { $place;
            what_was_put_is_read_by_everybody
            a_range_is_cut_at_the_end
            absent_is_said_of_what_is_not_there
            the_same_bytes_may_be_put_again
            other_bytes_do_not_replace_what_is_there
            what_was_deleted_is_seen_by_nobody
            a_list_has_all_pages
            a_list_is_by_prefix_and_not_by_folder
            strangers_are_neither_listed_nor_deleted
            a_name_that_leads_elsewhere_is_refused
            many_puts_at_once_are_all_there
            a_put_is_not_lost_to_a_deletion_beside_it
            a_whole_vault_lives_there
        }
    };
}
macro_rules! each {
    ($place:expr; $($behaviour:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $behaviour() {
                let place = $place.await;
                Box::pin($crate::backend::conformance::$behaviour(&place)).await;
            }
        )*
    };
}
pub(crate) use {conformance, each};

/// The name of the pack of this number.
pub(crate) fn pack(number: u16) -> String {
    let mut id = [7; 24];
    id[..16].fill(1);
    // All shelves are used.
    id[16] = (number % 251) as u8;
    id[17..19].copy_from_slice(&number.to_be_bytes());
    ObjectName::Pack(Area::Data, PackId::new(id)).to_string()
}

pub(crate) fn beat(lease: u8, number: u64) -> String {
    ObjectName::Lease(LeaseId::new([lease; 16]), LeasePart::Beat(number)).to_string()
}

fn names(listed: &[Listed]) -> BTreeSet<String> {
    let all: BTreeSet<String> = listed.iter().map(|one| one.name.clone()).collect();
    assert_eq!(all.len(), listed.len(), "an object is listed once");
    all
}

pub(crate) async fn what_was_put_is_read_by_everybody(place: &Place) {
    for (number, size) in (0..).zip([0, 1, 4095, 32 * 1024, 32 * 1024 + 1, 3 * 1024 * 1024 + 7]) {
        let (name, bytes) = (pack(number), Bytes::from(noise(u64::from(number), size)));
        place.first.put(&name, bytes.clone()).await.unwrap();
        assert_eq!(place.second.get(&name, None).await.unwrap(), Some(bytes.clone()), "{size}");
        let listed = place.second.list(&name).await.unwrap();
        assert_eq!(listed, [Listed { name, size: size as u64 }]);
    }
}

pub(crate) async fn a_range_is_cut_at_the_end(place: &Place) {
    let bytes = Bytes::from(noise(1, 100_000));
    place.first.put(&pack(0), bytes.clone()).await.unwrap();
    let empty = pack(1);
    place.first.put(&empty, Bytes::new()).await.unwrap();
    for (start, end) in [(0, 1), (99_999, 100_000), (10, 90_000), (99_990, 100_010), (0, 1 << 40)] {
        let read = place.second.get(&pack(0), Some(start..end)).await.unwrap().unwrap();
        let end = (end as usize).min(bytes.len());
        assert_eq!(read, bytes.slice(start as usize..end), "{start}..{end}");
    }
    for nothing in [0..0, 5..5, 100_000..100_001, 200_000..300_000] {
        let read = place.second.get(&pack(0), Some(nothing.clone())).await.unwrap();
        assert_eq!(read, Some(Bytes::new()), "{nothing:?}");
    }
    assert_eq!(place.second.get(&empty, Some(0..10)).await.unwrap(), Some(Bytes::new()));
}

pub(crate) async fn absent_is_said_of_what_is_not_there(place: &Place) {
    for filled in [false, true] {
        let absent = pack(9);
        assert_eq!(place.first.get(&absent, None).await.unwrap(), None);
        assert_eq!(place.first.get(&absent, Some(0..4)).await.unwrap(), None);
        assert_eq!(place.first.get(&absent, Some(4..4)).await.unwrap(), None);
        assert_eq!(place.first.list("index/").await.unwrap(), []);
        assert_eq!(place.first.list(&absent).await.unwrap(), []);
        place.first.delete(&absent).await.unwrap();
        if !filled {
            // Now there is a folder of that name, and another object in it.
            let (folder, _) = absent.rsplit_once('/').unwrap();
            place.first.put(&format!("{folder}/other"), Bytes::from_static(b"x")).await.unwrap();
        }
    }
}

pub(crate) async fn the_same_bytes_may_be_put_again(place: &Place) {
    let bytes = Bytes::from(noise(2, 50_000));
    for backend in [&place.first, &place.first, &place.second] {
        backend.put(&pack(0), bytes.clone()).await.unwrap();
    }
    let name = pack(1);
    let puts =
        (0..8).map(|n| (if n % 2 == 0 { &place.first } else { &place.second }).put(&name, bytes.clone()));
    try_join_all(puts).await.unwrap();
    for name in [pack(0), name] {
        assert_eq!(place.second.get(&name, None).await.unwrap(), Some(bytes.clone()));
    }
    assert_eq!(place.first.list("").await.unwrap().len(), 2);
}

pub(crate) async fn other_bytes_do_not_replace_what_is_there(place: &Place) {
    if !place.refuses {
        return;
    }
    let (kept, other) = (Bytes::from_static(b"kept"), Bytes::from_static(b"other"));
    place.first.put(&pack(0), kept.clone()).await.unwrap();
    for backend in [&place.first, &place.second] {
        let error = backend.put(&pack(0), other.clone()).await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
    }
    assert_eq!(place.first.get(&pack(0), None).await.unwrap(), Some(kept));
    assert_eq!(names(&place.first.list("").await.unwrap()), [pack(0)].into(), "nothing is left behind");
}

pub(crate) async fn what_was_deleted_is_seen_by_nobody(place: &Place) {
    // The last object of a folder that goes with it, and one of a folder that stays.
    for name in [beat(3, 0), pack(0)] {
        for round in 0..3 {
            let bytes = Bytes::from(vec![round; 10]);
            place.first.put(&name, bytes.clone()).await.unwrap();
            assert_eq!(place.second.get(&name, None).await.unwrap(), Some(bytes));
            place.second.delete(&name).await.unwrap();
            place.first.delete(&name).await.unwrap();
            for backend in [&place.first, &place.second] {
                assert_eq!(backend.get(&name, None).await.unwrap(), None);
                assert_eq!(backend.list(&name).await.unwrap(), []);
            }
        }
    }
}

pub(crate) async fn a_list_has_all_pages(place: &Place) {
    let beats: Vec<_> = (0..1100).map(|number| beat(4, number)).collect();
    let packs: Vec<_> = (0..300).map(pack).collect();
    let all: BTreeSet<_> = beats.iter().chain(&packs).cloned().collect();
    assert_eq!(all.len(), 1400);
    let puts = all.iter().map(|name| place.first.put(name, Bytes::from(name.clone())));
    stream::iter(puts).buffer_unordered(32).try_collect::<()>().await.unwrap();
    for (prefix, expected) in
        [("leases/", beats.into_iter().collect()), ("data/", packs.into_iter().collect()), ("", all)]
    {
        let listed = place.second.list(prefix).await.unwrap();
        assert!(listed.iter().all(|one| one.size == one.name.len() as u64));
        assert_eq!(names(&listed), expected, "{prefix:?}");
    }
}

pub(crate) async fn a_list_is_by_prefix_and_not_by_folder(place: &Place) {
    let backup = BackupId::now();
    let mark = |kind, byte| ObjectName::Mark(backup, kind, MarkId::new([byte; 16])).to_string();
    let header = ObjectName::Header(VaultId::new([5; 16])).to_string();
    let objects = [
        mark(MarkKind::Protect, 1),
        mark(MarkKind::Prune, 2),
        mark(MarkKind::Prune, 0x2f),
        header.clone(),
        pack(3),
    ];
    for name in &objects {
        place.first.put(name, Bytes::from_static(b"x")).await.unwrap();
    }
    let listed = async |prefix: String| names(&place.second.list(&prefix).await.unwrap());
    assert_eq!(listed("vault.".into()).await, [header].into());
    assert_eq!(listed(format!("marks/{backup}/p")).await, objects[..3].iter().cloned().collect());
    assert_eq!(listed(format!("marks/{backup}/prune.2")).await, [objects[2].clone()].into());
    assert_eq!(listed(format!("marks/{}", &backup.to_string()[..5])).await.len(), 3);
    assert_eq!(listed("mark".into()).await.len(), 3);
    assert_eq!(listed(pack(3)).await, [pack(3)].into());
    assert_eq!(listed("data/zz".into()).await, BTreeSet::new());
}

pub(crate) async fn strangers_are_neither_listed_nor_deleted(place: &Place) {
    place.first.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    let strangers =
        ["README.TXT", ".hidden", "lost+found", "data/Umlaut \u{e4}", "leases/a b", "data/.snapshot"];
    let still_there: Vec<_> = strangers.iter().map(|name| (place.stranger)(name)).collect();
    assert_eq!(names(&place.second.list("").await.unwrap()), [pack(0)].into());
    assert_eq!(names(&place.second.list("data/").await.unwrap()), [pack(0)].into());
    place.first.delete(&pack(0)).await.unwrap();
    for name in strangers {
        let error = place.first.delete(name).await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
    }
    assert!(still_there.iter().all(|there| there()));
}

pub(crate) async fn a_name_that_leads_elsewhere_is_refused(place: &Place) {
    for name in
        ["", "/", "../x", "data/../../x", "/etc/passwd", "data//x", "data/./x", "data/", "a\0b", "~", "-/.x"]
    {
        let broken = |error: super::BackendError| assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
        broken(place.first.put(name, Bytes::from_static(b"x")).await.unwrap_err());
        broken(place.first.get(name, None).await.unwrap_err());
        broken(place.first.delete(name).await.unwrap_err());
    }
    assert_eq!(place.second.list("").await.unwrap(), []);
}

pub(crate) async fn many_puts_at_once_are_all_there(place: &Place) {
    let objects: Vec<_> = (0..64)
        .map(|n| (pack(n % 8 * 251 + n), Bytes::from(noise(u64::from(n), 20_000 + usize::from(n)))))
        .collect();
    try_join_all(objects.iter().map(|(name, bytes)| place.first.put(name, bytes.clone()))).await.unwrap();
    for (read, (name, bytes)) in
        join_all(objects.iter().map(|(name, _)| place.second.get(name, None))).await.into_iter().zip(&objects)
    {
        assert_eq!(read.unwrap().as_ref(), Some(bytes), "{name}");
    }
}

/// A folder that is removed with its last object may be another put's.
pub(crate) async fn a_put_is_not_lost_to_a_deletion_beside_it(place: &Place) {
    let bytes = Bytes::from_static(b"here");
    for round in 0..24 {
        let (going, coming) = (beat(6, 2 * round), beat(6, 2 * round + 1));
        place.first.put(&going, bytes.clone()).await.unwrap();
        let (put, deleted) =
            tokio::join!(place.first.put(&coming, bytes.clone()), place.second.delete(&going));
        put.unwrap();
        deleted.unwrap();
        assert_eq!(names(&place.second.list("leases/").await.unwrap()), [coming.clone()].into());
        place.second.delete(&coming).await.unwrap();
    }
}

pub(crate) async fn a_whole_vault_lives_there(place: &Place) {
    let made = Confirmed::plain(false).unwrap().put(place.first.clone(), None).await.unwrap();
    let image = noise(3, 40 * C);
    let mut session = Box::pin(Session::begin(&made, DOMAIN, Options::default())).await.unwrap();
    let source = &mut Parts::new(vec![Extent::Data(image.clone().into())]);
    let written =
        Box::pin(session.write_image(source, image.len() as u64, BlobType::Data, None)).await.unwrap();
    let (backup, prepared) = prepare(&mut session, &written).await;
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
    session.end().await.unwrap();

    let attached = Vault::attach(place.second.clone(), None, None).await.unwrap();
    let backups = Backups::load(&attached, None).await.unwrap();
    assert!(backups.get(backup).unwrap().manifest.is_ok());
    // All of it is what a copy in memory would be read from.
    let copy = Memory::default();
    for listed in place.second.list("").await.unwrap() {
        let bytes = place.second.get(&listed.name, None).await.unwrap().unwrap();
        assert_eq!(bytes.len() as u64, listed.size);
        copy.put(&listed.name, bytes).await.unwrap();
    }
    let copied = Vault::attach(Arc::new(copy), None, None).await.unwrap();
    assert_eq!(crate::testing::restored(&copied, backup).await, image);
    assert_eq!(crate::testing::restored(&attached, backup).await, image);
}

mod memory {
    use super::*;

    async fn place() -> Place {
        let memory = Arc::new(Memory::default());
        let strange = memory.clone();
        Place {
            first: memory.clone(),
            second: memory,
            refuses: false,
            stranger: Box::new(move |name| {
                let (memory, name) = (strange.clone(), name.to_owned());
                memory.place_stranger(&name);
                Box::new(move || memory.has(&name))
            }),
            _kept: Box::new(()),
        }
    }

    conformance!(place());
}

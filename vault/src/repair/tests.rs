//! Each line of the table in `FORMAT.md`, §6, on the bytes of a vault in a folder.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use bytes::Bytes;
use jiff::Timestamp;

use super::*;
use crate::backend::local::Local;
use crate::backend::{Backend, Options};
use crate::check::check;
use crate::collect::{Collector, Ended, Policy, collect};
use crate::index::tidings::{BadPlace, report_damage};
use crate::marks;
use crate::names::ObjectName;
use crate::source::{DiskSource, Region, SourceError};
use crate::testing::{C, DOMAIN, backup_as, noise, restored};
use crate::vault::{Confirmed, Draft};
use crate::watch::Watch;
use crate::write::Extent;

mod header;
mod index;

/// A vault in a folder.
struct Folder {
    root: tempfile::TempDir,
    backend: Arc<dyn Backend>,
    vault: Vault,
    /// The recovery key, of one that is encrypted.
    words: String,
}

impl Folder {
    async fn new(encrypted: bool, separate: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        let backend: Arc<dyn Backend> =
            Arc::new(Local::open(root.path(), &Options::default()).await.unwrap());
        let mut words = String::new();
        let confirmed = if encrypted {
            let draft = Draft::encrypted(separate).unwrap();
            words.push_str(&draft.recovery_words().unwrap());
            draft.confirm(&words).unwrap()
        } else {
            Confirmed::plain(separate).unwrap()
        };
        let vault = confirmed.put(backend.clone(), None).await.unwrap();
        Self { root, backend, vault, words }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    async fn names(&self, prefix: &str) -> Vec<String> {
        let mut names: Vec<String> =
            self.backend.list(prefix).await.unwrap().into_iter().map(|one| one.name).collect();
        names.sort();
        names
    }

    /// What decay does: a byte of a file is another.
    fn flip(&self, name: &str, at: u64) {
        let file = std::fs::File::options().read(true).write(true).open(self.path(name)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
    }

    fn size(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().len()
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.path(name)).unwrap();
    }

    async fn full(&self, image: &[u8]) -> BackupId {
        let id = BackupId::now();
        self.full_as(id, image).await;
        id
    }

    async fn full_as(&self, id: BackupId, image: &[u8]) {
        let parts = vec![Extent::Data(image.to_vec().into())];
        Box::pin(backup_as(&self.vault, id, image.len(), parts, None)).await;
    }

    async fn check(&self, whole: bool) -> CheckReport {
        Box::pin(check(&self.vault, &Holder::default(), None, whole)).await.unwrap()
    }

    async fn heal(&self, donors: &[&dyn Donor]) -> Healing {
        Box::pin(heal(&self.vault, &Holder::default(), None, donors)).await.unwrap()
    }

    async fn has(&self, backup: BackupId, kind: MarkKind) -> bool {
        Backups::load(&self.vault, None).await.unwrap().has(backup, kind)
    }

    async fn collect(&self) -> Ended {
        let policy = Policy { wait: Some(std::time::Duration::ZERO), ..Policy::default() };
        let mut collector = Collector::new(Holder::default(), None, policy, Watch::default());
        Box::pin(collect(&self.vault, &mut collector, Timestamp::UNIX_EPOCH)).await.unwrap().ended
    }
}

fn disk(image: &[u8]) -> Given {
    Given { domain: DOMAIN, image: "vda".into(), plain: Arc::new(Bytes::from(image.to_vec())) }
}

/// Bytes of an image that a report calls hurt.
fn extents(report: &CheckReport, backup: BackupId) -> Vec<(u64, u64)> {
    let (_, hurt) = report.hurt.iter().find(|(id, _)| *id == backup).unwrap();
    assert!(hurt.iter().all(|one| one.image == "vda"));
    hurt.iter().flat_map(|one| one.ranges.clone()).collect()
}

#[tokio::test]
async fn a_bad_blob_is_healed_from_a_disk_that_still_has_it_and_the_mark_goes() {
    for (encrypted, separate) in [(false, false), (true, false), (true, true)] {
        let folder = Folder::new(encrypted, separate).await;
        let image = noise(1, 70 * C + 100);
        let one = folder.full(&image).await;
        let pack = folder.names("data/").await.remove(0);
        folder.flip(&pack, 10 * C as u64);
        let report = folder.check(true).await;
        // Where domains share nothing, a pack does not tell whose keys its ids are of; encryption finds it all the same.
        let [(begin, end)] = extents(&report, one)[..] else { panic!("{report:?}") };
        assert_eq!(end - begin, C as u64);
        assert!(folder.has(one, MarkKind::Hurt).await);
        // Nobody has it, or somebody has something else there.
        let mut other = image.clone();
        other[begin as usize] ^= 1;
        for donors in [vec![], vec![disk(&other)]] {
            let donors: Vec<&dyn Donor> = donors.iter().map(|one| one as &dyn Donor).collect();
            let healed = folder.heal(&donors).await;
            assert_eq!((healed.given, healed.moved, healed.stored), (0, 0, 0));
            assert_eq!(extents(&healed.now, one), [(begin, end)]);
        }
        // Everything else may have changed.
        other[begin as usize] ^= 1;
        other[..begin as usize].fill(7);
        other.truncate(end as usize);
        let healed = folder.heal(&[&disk(&other)]).await;
        assert_eq!((healed.given, healed.moved, healed.revoked), (1, 0, false));
        assert!(healed.now.is_clean() && healed.now.whole == [one], "{healed:?}");
        assert!(!folder.has(one, MarkKind::Hurt).await);
        assert!(restored(&folder.vault, one).await == image);
        // Nothing was mended in place, and what was put stays.
        assert_eq!(folder.check(true).await.packs.len(), 1);
        assert_eq!(folder.collect().await, Ended::Done);
        assert!(restored(&folder.vault, one).await == image && folder.check(true).await.is_clean());
    }
}

#[tokio::test]
async fn lost_packs_are_healed_from_another_vault_with_other_keys() {
    let (here, there) = (Folder::new(true, false).await, Folder::new(false, true).await);
    let mut image = noise(2, 130 * C);
    image[20 * C..90 * C].fill(0);
    let one = here.full(&image).await;
    there.full_as(one, &image).await;
    for prefix in ["data/", "tree/"] {
        for pack in here.names(prefix).await {
            here.remove(&pack);
        }
    }
    assert_eq!(extents(&here.check(false).await, one), [(0, image.len() as u64)]);
    let donor = OtherVault::open(&there.vault, &Holder::default(), None).await.unwrap();
    let healed = here.heal(&[&donor]).await;
    donor.close().await.unwrap();
    // Three nodes above the chunks that are not zero, one above those.
    assert_eq!(healed.given, 60 + 4, "{healed:?}");
    assert!(healed.failures.is_empty());
    assert!(restored(&here.vault, one).await == image);
    assert!(here.check(true).await.is_clean());
    let leases = crate::lease::all(&there.vault).await.unwrap();
    assert!(leases.values().all(|standing| standing.ended), "nobody waits for who has gone");
}

#[tokio::test]
async fn what_a_neighbour_in_another_vault_has_is_taken_and_the_rest_is_named() {
    let (here, there) = (Folder::new(false, false).await, Folder::new(true, false).await);
    let image = noise(3, 70 * C);
    let one = here.full(&image).await;
    let mut later = image.clone();
    later[5 * C..6 * C].copy_from_slice(&noise(4, C));
    there.full(&later).await;
    for pack in here.names("data/").await {
        here.remove(&pack);
    }
    here.check(false).await;
    let donor = OtherVault::open(&there.vault, &Holder::default(), None).await.unwrap();
    let healed = here.heal(&[&donor]).await;
    assert_eq!(healed.given, 69);
    assert_eq!(extents(&healed.now, one), [(5 * C as u64, 6 * C as u64)]);
    // Of two that have different parts each gives its own.
    let healed = here.heal(&[&donor, &disk(&image[..6 * C])]).await;
    assert_eq!((healed.given, healed.now.whole.as_slice()), (1, &[one][..]));
    donor.close().await.unwrap();
    assert!(restored(&here.vault, one).await == image && !here.has(one, MarkKind::Hurt).await);
}

/// A disk that a backup can be made of.
#[derive(Debug)]
struct Live(Vec<u8>);

#[async_trait::async_trait]
impl DiskSource for Live {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn knows_changes(&self) -> bool {
        false
    }

    async fn regions(&self, part: Range<u64>) -> Result<Vec<Region>, SourceError> {
        Ok(vec![Region { length: part.end - part.start, dirty: true, zero: false, allocated: true }])
    }

    async fn read(&self, part: Range<u64>) -> Result<Bytes, SourceError> {
        Ok(self.0[part.start as usize..part.end as usize].to_vec().into())
    }

    fn received(&self) -> u64 {
        0
    }
}

#[tokio::test]
async fn a_source_of_backups_heals_as_well_up_to_its_very_end() {
    let folder = Folder::new(true, false).await;
    let image = noise(14, 66 * C + 513);
    let one = folder.full(&image).await;
    for prefix in ["data/", "tree/"] {
        folder.remove(&folder.names(prefix).await.remove(0));
    }
    let live = Given { plain: Arc::new(DiskImage(Arc::new(Live(image.clone())))), ..disk(&[]) };
    let healed = folder.heal(&[&live]).await;
    assert_eq!((healed.given, healed.now.whole.as_slice()), (67 + 3, &[one][..]), "{healed:?}");
    assert!(restored(&folder.vault, one).await == image);
}

#[tokio::test]
async fn what_was_put_under_a_lease_that_was_revoked_is_told_as_healed_only_by_the_next() {
    /// Revokes all leases when it is asked.
    struct Revoking(Vault, Bytes);
    #[async_trait::async_trait]
    impl Plain for Revoking {
        async fn chunk(&self, at: u64) -> Result<Option<Bytes>, VaultError> {
            for (id, standing) in lease::all(&self.0).await? {
                if !standing.is_over() {
                    lease::revoke(&self.0, id, &Holder::default()).await?;
                }
            }
            self.1.chunk(at).await
        }
    }
    let folder = Folder::new(false, false).await;
    let image = noise(15, 3 * C);
    let one = folder.full(&image).await;
    folder.remove(&folder.names("data/").await.remove(0));
    folder.check(false).await;
    let revoking = Revoking(folder.vault.clone(), image.clone().into());
    let healed = folder.heal(&[&Given { plain: Arc::new(revoking), ..disk(&image) }]).await;
    assert!(healed.revoked && healed.now.whole.is_empty(), "{healed:?}");
    assert!(folder.has(one, MarkKind::Hurt).await, "nothing is said of what a collection may not keep");
    let healed = folder.heal(&[&disk(&image)]).await;
    assert!(!healed.revoked && healed.now.whole == [one]);
    assert!(!folder.has(one, MarkKind::Hurt).await);
    assert_eq!(folder.collect().await, Ended::Done);
    assert!(restored(&folder.vault, one).await == image && folder.check(true).await.is_clean());
}

#[tokio::test]
async fn a_bad_node_hurts_who_needs_it_and_is_made_again_from_all_that_it_covers() {
    let folder = Folder::new(true, false).await;
    let (image, sound) = (noise(5, 70 * C), noise(6, 3 * C));
    let one = folder.full(&image).await;
    let tree = folder.names("tree/").await.remove(0);
    let two = folder.full(&sound).await;
    folder.flip(&tree, 100);
    let report = folder.check(true).await;
    assert_eq!((report.whole.as_slice(), report.hurt.len()), (&[two][..], 1));
    assert!(report.hurt[0].1[0].open_ended && report.hurt[0].0 == one);
    // What is below a node can only be named when all of it is known.
    let mut changed = image.clone();
    changed[69 * C] ^= 1;
    changed[3 * C] ^= 1;
    let healed = folder.heal(&[&disk(&changed)]).await;
    assert!(healed.given == 0 && healed.now.hurt[0].0 == one, "{healed:?}");
    let healed = folder.heal(&[&disk(&image)]).await;
    assert_eq!((healed.given, healed.now.whole.len()), (1, 2), "{healed:?}");
    assert!(restored(&folder.vault, one).await == image && restored(&folder.vault, two).await == sound);
}

#[tokio::test]
async fn a_bad_base_of_a_patch_hurts_all_its_patches_and_each_is_put_full() {
    let folder = Folder::new(false, false).await;
    let mut image = noise(7, 64 * C);
    let base = folder.full(&image).await;
    let tree = folder.names("tree/").await.remove(0);
    image[9 * C] ^= 1;
    let next = BackupId::now();
    let parts = vec![
        Extent::Unchanged(9 * C as u64),
        Extent::Data(image[9 * C..10 * C].to_vec().into()),
        Extent::Unchanged(54 * C as u64),
    ];
    let written = Box::pin(backup_as(&folder.vault, next, image.len(), parts, Some(base))).await;
    assert_eq!(written.nodes, (1, 1), "as a patch");
    folder.remove(&tree);
    assert_eq!(folder.check(false).await.hurt.len(), 2);
    // The disk as it is now.
    let healed = folder.heal(&[&disk(&image)]).await;
    assert_eq!((healed.given, healed.now.whole.as_slice()), (1, &[next][..]), "{healed:?}");
    assert!(restored(&folder.vault, next).await == image);
    image[9 * C] ^= 1;
    let healed = folder.heal(&[&disk(&image)]).await;
    assert_eq!((healed.given, healed.now.hurt.len()), (1, 0));
    assert!(restored(&folder.vault, base).await == image);
}

#[tokio::test]
async fn a_report_that_is_wrong_costs_a_copy_and_nothing_else() {
    let folder = Folder::new(true, false).await;
    let image = noise(8, 5 * C);
    let one = folder.full(&image).await;
    let index = Index::load(&folder.vault, None).await.unwrap();
    let mut places = index.places_of(index.states()[0].id).await.unwrap();
    places.retain(|(_, place)| !place.kind.is_node());
    let (id, place) = places[0];
    let bad = BadPlace { pack: place.pack, offset: place.offset, id };
    report_damage(&folder.vault, vec![bad]).await.unwrap();
    assert_eq!(folder.check(false).await.hurt.len(), 1);
    let healed = folder.heal(&[]).await;
    assert_eq!((healed.moved, healed.given, healed.now.whole.as_slice()), (1, 0, &[one][..]));
    assert!(!folder.has(one, MarkKind::Hurt).await);
    assert_eq!(folder.heal(&[]).await.stored, 0, "once");
}

#[tokio::test]
async fn a_pack_that_is_gone_is_absent_for_writers_and_the_next_backup_heals_all() {
    let folder = Folder::new(true, false).await;
    let image = noise(9, 70 * C);
    let one = folder.full(&image).await;
    let two = folder.full(&image[..40 * C]).await;
    for pack in folder.names("data/").await {
        folder.remove(&pack);
    }
    assert_eq!(folder.check(false).await.hurt.len(), 2);
    let three = folder.full(&image[..50 * C]).await;
    let report = folder.check(false).await;
    assert_eq!(extents(&report, one), [(50 * C as u64, 70 * C as u64)]);
    assert_eq!(report.whole.len(), 2);
    assert!(!folder.has(two, MarkKind::Hurt).await);
    assert!(restored(&folder.vault, two).await == image[..40 * C]);
    assert!(restored(&folder.vault, three).await == image[..50 * C]);
}

#[tokio::test]
async fn what_is_to_be_pruned_is_not_healed_and_a_donor_that_fails_is_told() {
    struct Broken;
    #[async_trait::async_trait]
    impl Plain for Broken {
        async fn chunk(&self, _: u64) -> Result<Option<Bytes>, VaultError> {
            Err(std::io::Error::other("it is on fire").into())
        }
    }
    let folder = Folder::new(false, false).await;
    let image = noise(10, 3 * C);
    let one = folder.full(&image).await;
    for pack in folder.names("data/").await {
        folder.remove(&pack);
    }
    folder.check(false).await;
    let broken = Given { plain: Arc::new(Broken), ..disk(&image) };
    let healed = folder.heal(&[&broken]).await;
    assert!(healed.failures.len() == 1 && healed.failures[0].1.contains("on fire"), "{healed:?}");
    assert_eq!(extents(&healed.now, one), [(0, 3 * C as u64)]);
    marks::prune(&folder.vault, one, "x").await.unwrap();
    assert_eq!(folder.heal(&[&disk(&image)]).await.stored, 0);
}

#[tokio::test]
async fn a_bad_or_missing_manifest_is_told_stops_collections_and_is_put_again_from_its_bytes() {
    for damaged in [true, false] {
        let folder = Folder::new(true, false).await;
        let (image, sound) = (noise(11, 3 * C), noise(12, 3 * C));
        let one = folder.full(&image).await;
        let name = folder.names("backups/").await.remove(0);
        let two = folder.full(&sound).await;
        let kept = folder.backend.get(&name, None).await.unwrap().unwrap();
        if damaged {
            folder.flip(&name, 60)
        } else {
            folder.remove(&name)
        }
        let report = folder.check(true).await;
        assert_eq!(report.whole, [two]);
        let told = if damaged { report.unreadable[0].0 } else { report.missing[0] };
        assert_eq!(told, one);
        marks::prune(&folder.vault, two, "x").await.unwrap();
        assert!(matches!(folder.collect().await, Ended::Blocked(_)));
        assert!(restored(&folder.vault, two).await == sound);

        let name: ObjectName = name.parse().unwrap();
        let put = |bytes: Bytes| {
            let (vault, name) = (folder.vault.clone(), name.clone());
            async move { manifest(&vault, &Holder::default(), &name, &bytes).await }
        };
        let mut wrong = kept.to_vec();
        wrong[60] ^= 1;
        assert_eq!(put(wrong.into()).await.unwrap_err().code(), "VAULT_OBJECT_DAMAGED");
        assert_eq!(put(kept.clone()).await.unwrap(), ManifestRepair::Put { checked: true });
        assert_eq!(put(kept.clone()).await.unwrap(), ManifestRepair::Sound);
        assert!(restored(&folder.vault, one).await == image);
        assert_eq!(folder.collect().await, Ended::Done);
        assert!(restored(&folder.vault, one).await == image && folder.check(true).await.whole == [one]);
        marks::prune(&folder.vault, one, "x").await.unwrap();
        assert_eq!(put(kept).await.unwrap(), ManifestRepair::Pruned);
        assert_eq!(folder.collect().await, Ended::Done);
        assert!(folder.names("backups/").await.is_empty(), "both of them");
    }
}

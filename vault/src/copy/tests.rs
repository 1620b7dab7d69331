mod cut;
mod stage;

use std::collections::BTreeMap;

use super::*;
use crate::backend::Backend;
use crate::backups::{Mark, put_mark};
use crate::blob::BlobType;
use crate::check;
use crate::header::CHUNK;
use crate::leaves::leaves;
use crate::manifest::{Disk, Manifest, Stream};
use crate::marks::{protect, prune};
use crate::names::ObjectName;
use crate::testing::{Bench, C, DOMAIN, difference, noise, restored};
use crate::tree::span;
use crate::vault::{Confirmed, Draft};
use crate::write::{Extent, Options as Writing, Outcome, Parts, Readiness, Session};
use stage::{Deed, Hook, Way};

async fn vault(encrypted: bool, separate: bool) -> Bench {
    let backend = Arc::new(crate::testing::Flaky::default());
    let confirmed = if encrypted {
        let draft = Draft::encrypted(separate).unwrap();
        draft.confirm(&draft.recovery_words().unwrap()).unwrap()
    } else {
        Confirmed::plain(separate).unwrap()
    };
    Bench { vault: confirmed.put(backend.clone(), None).await.unwrap(), backend }
}

async fn copied(from: &Vault, to: &Vault, choice: &Choice) -> CopyReport {
    Box::pin(copy(from, to, choice, Options::default())).await.unwrap()
}

/// All chunks of all images of a backup, where they are not zero.
async fn content(vault: &Vault, backup: BackupId) -> BTreeMap<(String, u64), Vec<u8>> {
    let all = Backups::load(vault, None).await.unwrap();
    assert!(all.has(backup, MarkKind::Checked));
    let manifest = all.get(backup).unwrap().manifest.as_ref().unwrap();
    let index = Arc::new(Index::load(vault, None).await.unwrap());
    let fetcher = Fetcher::new(vault, vault.ids(manifest.domain), index, None, false);
    let mut content = BTreeMap::new();
    for (name, kind, image) in manifest.images() {
        for (at, id) in leaves(&fetcher, image.tree(), 0..u64::MAX).await.unwrap().chunks {
            content.insert((name.to_owned(), at), fetcher.chunk(kind, id).await.unwrap());
        }
    }
    content
}

/// A committed backup of disks and streams, and what its manifest says besides.
async fn commit(
    vault: &Vault,
    domain: DomainId,
    disks: &[(&str, &[u8])],
    streams: &[(&str, &[u8])],
    change: impl FnOnce(&mut Manifest),
) -> BackupId {
    let mut session = Box::pin(Session::begin(vault, domain, Writing::default())).await.unwrap();
    let mut made = session.manifest(BackupId::now(), Timestamp::UNIX_EPOCH);
    for (kind, images) in [(BlobType::Data, disks), (BlobType::Stream, streams)] {
        for (name, bytes) in images {
            let mut parts = Parts::new(vec![Extent::Data(bytes.to_vec().into())]);
            let written = session.write_image(&mut parts, bytes.len() as u64, kind, None).await.unwrap();
            let (name, image) = ((*name).to_owned(), written.image);
            if kind == BlobType::Data {
                let source_format = "raw";
                made.disks.push(Disk {
                    dirty: 77,
                    stored: written.stored,
                    ..Disk::new(name, image, source_format)
                });
            } else {
                made.streams.push(Stream { name, image });
            }
        }
    }
    change(&mut made);
    let Readiness::Ready(prepared) = session.prepare(&made).await.unwrap() else { panic!() };
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
    session.end().await.unwrap();
    made.backup
}

fn amount(report: &CopyReport, backup: BackupId) -> Amount {
    match report.fates.iter().find(|(id, _)| *id == backup) {
        Some((_, Fate::Copied(amount))) => *amount,
        other => panic!("{other:?}"),
    }
}

async fn is_clean(vault: &Vault) -> bool {
    let report = Box::pin(check::check(vault, &Holder::default(), None, true)).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    true
}

/// A copy runs as a task of a daemon.
#[expect(dead_code, reason = "it is enough that it compiles")]
fn a_copy_may_move_between_threads(from: &'static Vault, to: &'static Vault, choice: &'static Choice) {
    fn is_send(_: impl Send) {}
    is_send(copy(from, to, choice, Options::default()));
}

#[tokio::test]
async fn random_chains_are_copied_byte_for_byte_between_vaults_of_every_sort() {
    // Encrypted or not, domains kept separate or not.
    let sorts = [(true, false), (false, false), (true, true), (false, true)];
    for (seed, (from, to)) in (0_u64..).zip([(0, 2), (1, 0), (2, 1), (3, 3), (0, 0)]) {
        let from = vault(sorts[from].0, sorts[from].1).await;
        let to = vault(sorts[to].0, sorts[to].1).await;
        let options = Options { allow_plain: true, ..Options::default() };
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut kept: Vec<(BackupId, Vec<u8>)> = Vec::new();
        let mut image = noise(seed, rng.usize(1..80 * C));
        for round in 0..6 {
            for _ in 0..rng.usize(0..5) {
                let at = rng.usize(0..image.len());
                let end = (at + rng.usize(1..10 * C)).min(image.len());
                if rng.bool() { image[at..end].fill(0) } else { rng.fill(&mut image[at..end]) }
            }
            if rng.u8(0..3) == 0 {
                image.resize(rng.usize(1..80 * C), 0);
            }
            let parent = if round == 0 { None } else { rng.choice(&kept) };
            let parts = match parent {
                Some((_, old)) => difference(old, &image),
                None => vec![Extent::Data(image.clone().into())],
            };
            let (id, _) = Box::pin(from.backup(image.len(), parts, parent.map(|(id, _)| *id))).await;
            kept.push((id, image.clone()));
            // Some at once, some together.
            if rng.bool() {
                Box::pin(copy(&from.vault, &to.vault, &Choice::All, options.clone())).await.unwrap();
            }
        }
        let report = Box::pin(copy(&from.vault, &to.vault, &Choice::All, options)).await.unwrap();
        assert_eq!((report.fates.len(), report.refused().count()), (6, 0), "seed {seed}");
        for (id, image) in &kept {
            assert!(restored(&to.vault, *id).await == *image, "seed {seed}");
        }
        assert!(is_clean(&to.vault).await && is_clean(&from.vault).await);
    }
}

#[tokio::test]
async fn only_what_changed_since_the_parent_is_read_and_sent() {
    let (from, to) = (vault(true, false).await, vault(true, false).await);
    let mut image = noise(1, 200 * C);
    image[20 * C..30 * C].fill(0);
    let (first, _) = from.full(&image).await;
    let report = copied(&from.vault, &to.vault, &Choice::All).await;
    assert_eq!(amount(&report, first).read, 190 * C as u64);
    let old = image.clone();
    for chunk in [7, 111] {
        image[chunk * C..(chunk + 1) * C].copy_from_slice(&noise(chunk as u64, C));
    }
    image[150 * C..160 * C].fill(0);
    let (second, _) = Box::pin(from.backup(image.len(), difference(&old, &image), Some(first))).await;

    let way = Arc::new(Way::new(from.backend.clone()));
    let report = copied(&from.vault.by(way.clone()), &to.vault, &Choice::All).await;
    assert_eq!(report.fates[0], (first, Fate::Already));
    let amount = amount(&report, second);
    assert_eq!((amount.read, amount.new), (2 * C as u64, 2 * C as u64));
    assert!(amount.stored < 2 * C as u64 + 2000, "{amount:?}");
    // The bytes of two chunks with their headers, and no other.
    let read: u64 = way.gets("data/").into_iter().map(|length| length.unwrap()).sum();
    assert!((2 * C as u64..2 * C as u64 + 400).contains(&read), "{read}");
    assert!(restored(&to.vault, second).await == image);
}

#[tokio::test]
async fn trees_that_grow_and_shrink_over_their_levels_are_compared_at_every_height() {
    let (from, to) = (vault(false, false).await, vault(true, false).await);
    let chunk = |seed| Extent::Data(noise(seed, C).into());
    let mut last = None;
    // Chunks of the image: of one level, two, three, four, and back.
    for (round, size) in (0_u64..).zip([3, 100, 5000, 300_000, 300_001, 70, 5, 4097]) {
        // The same first chunk, one that changes, zeroes, and the same last one.
        let zeroes = Extent::Zero((size - 3) * C as u64);
        let parts = vec![chunk(1), chunk(100 + round), zeroes, chunk(2)];
        let size = size as usize * C;
        let (id, _) = Box::pin(from.backup(size, parts, None)).await;
        let report = copied(&from.vault, &to.vault, &Choice::Backups(vec![id])).await;
        let read = amount(&report, id).read / C as u64;
        assert_eq!(read, if last.is_none() { 3 } else { 2 }, "the first chunk is the same: round {round}");
        assert_eq!(content(&from.vault, id).await, content(&to.vault, id).await, "round {round}");
        last = Some(id);
    }
    assert!(300_000 > span(3) && is_clean(&to.vault).await);
}

#[tokio::test]
async fn what_is_there_is_not_sent_and_nothing_is_put() {
    let (from, to) = (vault(true, false).await, vault(false, false).await);
    let options = Options { allow_plain: true, ..Options::default() };
    let (id, _) = from.full(&noise(1, 9 * C)).await;
    Box::pin(copy(&from.vault, &to.vault, &Choice::All, options.clone())).await.unwrap();
    let before = to.backend.list("").await.unwrap();
    let report = Box::pin(copy(&from.vault, &to.vault, &Choice::All, options)).await.unwrap();
    assert_eq!(report.fates, [(id, Fate::Already)]);
    assert_eq!(to.backend.list("").await.unwrap(), before);
    for vault in [&from.vault, &to.vault] {
        let leases = crate::lease::all(vault).await.unwrap();
        assert!(leases.values().all(|lease| lease.ended), "none is left");
    }
}

#[tokio::test]
async fn a_manifest_says_there_what_it_said_here_with_disks_and_streams_of_two_domains() {
    let (from, to) = (vault(true, false).await, vault(true, true).await);
    let other = DomainId::new([7; 16]);
    let (disk, memory) = (noise(1, 5 * C + 17), noise(2, 3 * C + 1));
    let mut ids = Vec::new();
    for domain in [DOMAIN, other] {
        let disks = [("vda", &disk[..]), ("vdb", &memory[..])];
        let streams = [("memory", &memory[..]), ("tpm", &b"state"[..]), ("empty", &b""[..])];
        let parent = ids.last().copied();
        let change = |manifest: &mut Manifest| {
            manifest.parent = parent;
            manifest.checkpoint = Some("vmkeep-1".into());
            manifest.definition = "<domain passwd='x'/>".into();
            manifest.consistency = "frozen".into();
        };
        ids.push(Box::pin(commit(&from.vault, domain, &disks, &streams, change)).await);
    }
    let choice = Choice::Domain(DOMAIN);
    assert_eq!(copied(&from.vault, &to.vault, &choice).await.fates.len(), 1);
    assert_eq!(copied(&from.vault, &to.vault, &Choice::All).await.refused().count(), 0);
    for id in ids {
        assert_eq!(content(&from.vault, id).await, content(&to.vault, id).await);
        let (here, mut there) = (from.manifest(id).await, to.manifest(id).await);
        assert!(there.lease != here.lease && there.header.as_bytes() == to.vault.header_bytes());
        there.lease = here.lease;
        there.header.clone_from(&here.header);
        for (there, here) in there.disks.iter_mut().zip(&here.disks) {
            assert!(there.image != here.image && there.image.size == here.image.size);
            (there.image, there.stored) = (here.image, here.stored);
        }
        for (there, here) in there.streams.iter_mut().zip(&here.streams) {
            there.image = here.image;
        }
        assert_eq!(there, here, "parent, checkpoint, domain, and all else");
    }
}

#[tokio::test]
async fn a_backup_that_is_pruned_there_or_here_is_refused_by_name_and_others_go_on() {
    let (from, to) = (vault(true, false).await, vault(true, false).await);
    let mut ids = Vec::new();
    for seed in 0..5 {
        ids.push(from.full(&noise(seed, 2 * C)).await.0);
    }
    prune(&to.vault, ids[0], "test").await.unwrap();
    prune(&from.vault, ids[1], "test").await.unwrap();
    // Protected, and pruned all the same by another host that did not see it: it stays.
    protect(&from.vault, ids[2], &Holder::default()).await.unwrap();
    let mark = Mark::new(Timestamp::now(), "test");
    put_mark(&from.vault, ids[2], MarkKind::Prune, &mark).await.unwrap();
    let gone = BackupId::now();
    let mut choice = ids.clone();
    choice.push(gone);
    let report = copied(&from.vault, &to.vault, &Choice::Backups(choice)).await;
    let refused: BTreeMap<BackupId, Refusal> =
        report.refused().map(|(id, refusal)| (id, refusal.clone())).collect();
    let expected = [(ids[0], Refusal::PrunedThere), (ids[1], Refusal::Pruned), (gone, Refusal::Absent)];
    assert_eq!(refused, expected.into());
    assert_eq!(to.names("backups/").await.len(), 3);
    // One that is pruned while others are copied: its own session lists anew.
    let third = vault(true, false).await;
    let hook = Arc::new(Hook::new(&third.vault, Deed::Prune(ids[4])));
    let options = Options { progress: hook, ..Options::default() };
    let choice = Choice::Backups(vec![ids[3], ids[4]]);
    let report = Box::pin(copy(&from.vault, &third.vault, &choice, options)).await.unwrap();
    assert_eq!(report.refused().collect::<Vec<_>>(), [(ids[4], &Refusal::PrunedThere)]);
    assert_eq!(third.names("backups/").await.len(), 1);
}

#[tokio::test]
async fn damage_here_costs_the_backup_that_needs_it_and_no_other() {
    let (from, to) = (vault(true, false).await, vault(true, false).await);
    let image = noise(1, 40 * C);
    let (hurt, _) = from.full(&image).await;
    let packs = from.names("data/").await;
    // Without the chunk that will be damaged.
    let mut next = image.clone();
    next[3 * C..7 * C].copy_from_slice(&noise(2, 4 * C));
    let (child, _) = Box::pin(from.backup(next.len(), difference(&image, &next), Some(hurt))).await;
    let (other, _) = from.full(&noise(3, 5 * C)).await;
    from.flip(&packs[0], 5 * C).await;
    let report = copied(&from.vault, &to.vault, &Choice::All).await;
    let [(id, Refusal::Damaged(_))] = report.refused().collect::<Vec<_>>()[..] else { panic!("{report:?}") };
    assert_eq!(id, hurt);
    assert!(restored(&to.vault, child).await == next);
    assert!(restored(&to.vault, other).await == noise(3, 5 * C));
    assert_eq!(from.names("damage/").await.len(), 1, "and the vault knows now");
    assert!(is_clean(&to.vault).await);
    let second = vault(true, false).await;
    let (_, again) = from.full(&image).await;
    assert_eq!(again.new, C as u64, "the next backup heals it");
    assert_eq!(copied(&from.vault, &second.vault, &Choice::All).await.refused().count(), 0);
    assert!(restored(&second.vault, hurt).await == image);
}

#[tokio::test]
async fn nothing_goes_from_an_encrypted_vault_into_the_open_unless_allowed_and_secrets_never() {
    let (from, to) = (vault(true, false).await, vault(false, false).await);
    let bytes = noise(1, 2 * C);
    let disks = [("vda", &bytes[..])];
    let plain = Box::pin(commit(&from.vault, DOMAIN, &disks, &[("nvram", &bytes[..])], |_| {})).await;
    let mut secret = Vec::new();
    for (definition, format, stream) in [
        ("", "raw", Some("memory")),
        ("", "raw", Some("something new")),
        ("", "luks", None),
        ("<disk><encryption format='luks'/></disk>", "raw", None),
        ("<graphics type='vnc' passwd = \"x\"/>", "raw", None),
    ] {
        let streams: Vec<(&str, &[u8])> = stream.iter().map(|name| (*name, &bytes[..])).collect();
        let change = |manifest: &mut Manifest| {
            manifest.definition = definition.into();
            manifest.disks[0].source_format = format.into();
        };
        secret.push(Box::pin(commit(&from.vault, DOMAIN, &disks, &streams, change)).await);
    }
    let refused = Box::pin(copy(&from.vault, &to.vault, &Choice::All, Options::default())).await;
    assert_eq!(refused.unwrap_err().code(), "VAULT_COPY_REFUSED");
    assert!(to.names("leases/").await.is_empty(), "before anything is put");
    let options = Options { allow_plain: true, ..Options::default() };
    let report = Box::pin(copy(&from.vault, &to.vault, &Choice::All, options)).await.unwrap();
    let refused: BTreeSet<BackupId> = report.refused().map(|(id, _)| id).collect();
    assert_eq!(refused, secret.into_iter().collect());
    assert!(report.refused().all(|(_, refusal)| matches!(refusal, Refusal::Secret(_))));
    assert!(restored(&to.vault, plain).await == bytes);
    // The other way, and between two that lie in the open, nobody has to be asked.
    let (third, fourth) = (vault(true, false).await, vault(false, false).await);
    for (from, to) in [(&to, &third), (&to, &fourth)] {
        assert_eq!(copied(&from.vault, &to.vault, &Choice::All).await.refused().count(), 0);
    }
    let same = Box::pin(copy(&to.vault, &to.vault, &Choice::All, Options::default())).await;
    assert_eq!(same.unwrap_err().code(), "VAULT_COPY_REFUSED");
}

#[tokio::test]
async fn a_parent_goes_before_its_child_although_a_clock_went_back() {
    let from = vault(false, false).await;
    let bytes = noise(1, C);
    let mut ids: Vec<BackupId> = Vec::new();
    for year in [9, 3, 5] {
        let parent = ids.last().copied();
        let change = |manifest: &mut Manifest| {
            manifest.parent = parent;
            manifest.taken = Timestamp::from_second(year * 31_557_600).unwrap();
        };
        ids.push(Box::pin(commit(&from.vault, DOMAIN, &[("vda", &bytes[..])], &[], change)).await);
    }
    let all = Backups::load(&from.vault, None).await.unwrap();
    assert_eq!(order(&all, &chosen(&all, &Choice::All)), ids);
    let two = Choice::Backups(vec![ids[2], ids[0]]);
    assert_eq!(order(&all, &chosen(&all, &two)), [ids[2], ids[0]], "by time, where no parent is copied");
}

#[tokio::test]
async fn a_damaged_copy_of_the_parent_is_not_built_upon() {
    for node in [false, true] {
        let (from, to) = (vault(true, false).await, vault(true, false).await);
        let image = noise(1, 200 * C);
        let (first, _) = from.full(&image).await;
        copied(&from.vault, &to.vault, &Choice::All).await;
        let (area, at) = if node { ("tree/", 60) } else { ("data/", 5 * C) };
        let packs = to.names(area).await;
        to.flip(&packs[0], at).await;
        if !node {
            // A node is found when it is needed; a chunk of the parent's that nobody reads, by a check.
            Box::pin(check::check(&to.vault, &Holder::default(), None, true)).await.unwrap();
        }
        let mut next = image.clone();
        next[C..2 * C].copy_from_slice(&noise(9, C));
        let (second, _) = Box::pin(from.backup(next.len(), difference(&image, &next), Some(first))).await;
        let report = copied(&from.vault, &to.vault, &Choice::All).await;
        let read = amount(&report, second).read / u64::from(CHUNK);
        assert_eq!(read, if node { 200 } else { 2 });
        assert!(restored(&to.vault, second).await == next);
        assert!(node || restored(&to.vault, first).await == image, "the chunk heals it, another node cannot");
    }
}

#[tokio::test]
async fn damage_there_that_turns_up_meanwhile_is_sent_again_before_the_commit() {
    let (from, to) = (vault(true, false).await, vault(false, false).await);
    let image = noise(1, 40 * C);
    let (first, _) = from.full(&image).await;
    let allowed = Options { allow_plain: true, ..Options::default() };
    Box::pin(copy(&from.vault, &to.vault, &Choice::All, allowed.clone())).await.unwrap();
    let mut next = image.clone();
    next[..C].fill(7);
    let (second, _) = Box::pin(from.backup(next.len(), difference(&image, &next), Some(first))).await;
    let id = to.vault.ids(DOMAIN).id(BlobType::Data, &image[9 * C..10 * C]);
    let hook = Arc::new(Hook::new(&to.vault, Deed::Damage(id)));
    let options = Options { progress: hook, ..allowed };
    let report = Box::pin(copy(&from.vault, &to.vault, &Choice::All, options)).await.unwrap();
    assert_eq!(amount(&report, second).read, 2 * C as u64);
    let index = Index::load(&to.vault, None).await.unwrap();
    assert_eq!(index.find(BlobType::Data, id).await.unwrap().iter().filter(|one| one.usable).count(), 1);
    assert!(restored(&to.vault, second).await == next);
}

#[tokio::test]
async fn a_lease_that_is_revoked_at_any_point_costs_another_session_and_nothing_else() {
    for deed in [Deed::RevokeBegun, Deed::RevokeWritten, Deed::RevokeCommit] {
        let (from, to) = (vault(true, false).await, vault(true, false).await);
        let image = noise(1, 20 * C);
        let (id, _) = from.full(&image).await;
        let way = Arc::new(Way::new(to.backend.clone()));
        if deed == Deed::RevokeCommit {
            way.revoke_at_commit(&to.vault);
        }
        let hook = Arc::new(Hook::new(&to.vault, deed));
        let options = Options { progress: hook.clone(), ..Options::default() };
        let report = Box::pin(copy(&from.vault, &to.vault.by(way), &Choice::All, options)).await.unwrap();
        assert_eq!(amount(&report, id).read, 20 * C as u64);
        let leases = crate::lease::all(&to.vault).await.unwrap();
        assert_eq!(leases.values().filter(|lease| lease.revoked).count(), 1, "{deed:?}");
        assert!(restored(&to.vault, id).await == image);
        let all = Backups::load(&to.vault, None).await.unwrap();
        assert!(all.has(id, MarkKind::Checked), "{deed:?}");
        let sessions = hook.begun().len();
        assert_eq!(sessions, if deed == Deed::RevokeCommit { 1 } else { 2 }, "{deed:?}: settled, or again");
    }
}

#[tokio::test]
async fn one_that_is_there_and_unchecked_is_settled_and_not_sent_again() {
    let (from, to) = (vault(true, false).await, vault(true, false).await);
    let (id, _) = from.full(&noise(1, 20 * C)).await;
    copied(&from.vault, &to.vault, &Choice::All).await;
    for mark in to.names("marks/").await {
        to.backend.delete(&mark).await.unwrap();
    }
    let way = Arc::new(Way::new(from.backend.clone()));
    let report = copied(&from.vault.by(way.clone()), &to.vault, &Choice::All).await;
    assert_eq!(report.fates, [(id, Fate::Already)]);
    assert!(way.gets("data/").is_empty() && to.names("backups/").await.len() == 1);
    assert!(Backups::load(&to.vault, None).await.unwrap().has(id, MarkKind::Checked));
    // And here an unchecked one is nothing to be copied.
    let (unchecked, written) = from.full(&noise(2, C)).await;
    assert_eq!(written.new, C as u64);
    for (kind, mark) in Backups::load(&from.vault, None).await.unwrap().marks(unchecked) {
        from.backend.delete(&ObjectName::Mark(unchecked, kind, mark).to_string()).await.unwrap();
    }
    let report = copied(&from.vault, &to.vault, &Choice::All).await;
    assert_eq!(report.fates[1], (unchecked, Fate::Refused(Refusal::Unchecked)));
}

#[tokio::test]
async fn a_manifest_there_that_cannot_be_read_is_healed_by_another_of_the_same_backup() {
    let (from, to) = (vault(true, false).await, vault(true, false).await);
    let image = noise(1, 20 * C);
    let (id, _) = from.full(&image).await;
    copied(&from.vault, &to.vault, &Choice::All).await;
    let names = to.names("backups/").await;
    to.flip(&names[0], 60).await;
    let report = copied(&from.vault, &to.vault, &Choice::All).await;
    assert_eq!(amount(&report, id).new, 0, "its chunks are there");
    assert!(restored(&to.vault, id).await == image);
}

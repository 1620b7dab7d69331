use super::*;
use crate::ids::{BackupId, LeaseId, MarkId};
use crate::names::MarkKind;

fn both_sorts() -> [Keys; 2] {
    let vault = VaultId::new([1; 16]);
    [Keys::new(vault, Root::None), Keys::new(vault, Root::Master(Zeroizing::new([2; 32])))]
}

fn name() -> ObjectName {
    ObjectName::Damage(MarkId::new([3; 16]))
}

#[test]
fn a_box_opens_only_whole_in_its_place_and_with_its_key() {
    for keys in both_sorts() {
        let sealed = keys.seal_box(&name(), 5, b"what is in it").unwrap();
        assert_eq!(sealed.len(), 13 + keys.overhead());
        assert_eq!(keys.open_box(&name(), 5, &sealed).unwrap(), b"what is in it");
        for at in 0..sealed.len() {
            let mut flipped = sealed.clone();
            flipped[at] ^= 0x10;
            assert!(keys.open_box(&name(), 5, &flipped).is_err(), "byte {at}");
            assert!(keys.open_box(&name(), 5, &sealed[..at]).is_err(), "cut at {at}");
        }
        let elsewhere = [
            (ObjectName::Damage(MarkId::new([4; 16])), 5),
            (ObjectName::Condemned(LeaseId::new([3; 16])), 5),
            (name(), 6),
        ];
        for (other, block) in elsewhere {
            assert!(keys.open_box(&other, block, &sealed).is_err(), "{other} {block}");
        }
        let stranger = Keys::new(VaultId::new([9; 16]), keys.root().clone());
        assert!(stranger.open_box(&name(), 5, &sealed).is_err());
    }
}

#[test]
fn an_encrypted_box_tells_nothing_and_never_looks_the_same_twice() {
    let [_, keys] = both_sorts();
    let (one, two) =
        (keys.seal_box(&name(), 0, &[7; 64]).unwrap(), keys.seal_box(&name(), 0, &[7; 64]).unwrap());
    assert_ne!(one, two);
    assert!(!one.windows(8).any(|window| window == [7; 8]));
}

#[test]
fn the_same_bytes_have_another_id_in_each_type_level_vault_and_domain() {
    let mut seen = std::collections::HashSet::new();
    let mut vaults = both_sorts().to_vec_of_keys();
    vaults.push(Keys::new(VaultId::new([8; 16]), Root::None));
    for keys in &vaults {
        for domain in [None, Some(DomainId::new([1; 16])), Some(DomainId::new([2; 16]))] {
            let ids = keys.ids(domain);
            let mut types = vec![BlobType::Data, BlobType::Stream, BlobType::Table];
            types.extend((0..=BlobType::MAX_LEVEL).map(BlobType::Node));
            for kind in types {
                assert!(seen.insert(ids.id(kind, b"the same")), "{keys:?} {domain:?} {kind:?}");
            }
            let top = BlobId::new([1; 32]);
            for (leaves, size) in [(BlobType::Data, 1), (BlobType::Data, 2), (BlobType::Stream, 1)] {
                assert!(seen.insert(ids.root(leaves, size, 1, top)));
            }
        }
    }
}

trait ToVec {
    fn to_vec_of_keys(self) -> Vec<Keys>;
}

impl ToVec for [Keys; 2] {
    fn to_vec_of_keys(self) -> Vec<Keys> {
        self.into_iter().collect()
    }
}

#[test]
fn a_mask_hides_which_packs_share_a_chunk_and_comes_off_again() {
    let [plain, keys] = both_sorts();
    let id = BlobId::new([5; 32]);
    let pack = |byte| PackId::new([byte; 24]);
    let masked: Vec<_> = [(1, 32), (1, 33), (2, 32)].map(|(p, at)| keys.mask(id, pack(p), at)).into();
    assert!(masked[0] != id && masked[0] != masked[1] && masked[0] != masked[2]);
    assert_eq!(keys.mask(masked[0], pack(1), 32), id);
    assert_eq!(plain.mask(id, pack(1), 32), id);
}

#[test]
fn a_writer_reads_and_writes_all_and_signs_nothing() {
    let [_, full] = both_sorts();
    let Root::Master(master) = full.root() else { panic!("no master key") };
    let writer = Keys::new(full.vault(), Root::Work(work_key(master))).with_verifier(full.public());
    assert_eq!((full.role(), writer.role()), (Role::Full, Role::Writer));
    let sealed = writer.seal_box(&name(), 0, b"x").unwrap();
    assert_eq!(full.open_box(&name(), 0, &sealed).unwrap(), b"x");
    assert_eq!(full.header_hash(b"h"), writer.header_hash(b"h"));
    assert_eq!(full.ids(None).id(BlobType::Data, b"x"), writer.ids(None).id(BlobType::Data, b"x"));

    let prune = ObjectName::Mark(BackupId::now(), MarkKind::Prune, MarkId::new([1; 16]));
    assert!(matches!(writer.sign(&prune, b"go"), Err(KeyError::MayNotSign)));
    let signed = [b"go", &full.sign(&prune, b"go").unwrap()[..]].concat();
    assert_eq!(writer.verify(&prune, &signed).unwrap(), b"go");
    let other = ObjectName::Mark(BackupId::new([9; 16]), MarkKind::Prune, MarkId::new([1; 16]));
    assert!(writer.verify(&other, &signed).is_err(), "a signature is bound to the name");
    for at in 0..signed.len() {
        let mut flipped = signed.clone();
        flipped[at] ^= 1;
        assert!(writer.verify(&prune, &flipped).is_err(), "byte {at}");
        assert!(writer.verify(&prune, &signed[..at]).is_err(), "cut at {at}");
    }
}

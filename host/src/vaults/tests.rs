use std::path::PathBuf;

use vmkeep_vault::backend::{BackendError, BackendErrorKind};
use vmkeep_vault::header::{Cipher, Header};
use vmkeep_vault::ids::{LeaseId, VaultId};
use vmkeep_vault::keys::KeyError;
use vmkeep_workflow::Class;

use super::*;
use crate::codes;

const VAULT: VaultId = VaultId::new([7; 16]);

fn known(header: &str) -> Remembered {
    Remembered { id: VAULT, header: header.to_owned(), keys: Vec::new() }
}

fn memory(state_dir: &Path, url: &str) -> Memory {
    Memory::of(&VaultSettings::at(url.parse().unwrap()), state_dir)
}

#[test]
fn each_failure_of_a_vaults_place_has_a_code_of_its_own() {
    for (kind, code) in [
        (BackendErrorKind::Transient, codes::VAULT_UNREACHABLE),
        (BackendErrorKind::Denied, codes::VAULT_DENIED),
        (BackendErrorKind::Broken, codes::VAULT_UNFIT),
        (BackendErrorKind::Full, codes::NOT_ENOUGH_DISK_SPACE),
    ] {
        let failed =
            || BackendError { place: "/srv/v".into(), name: "keys/".into(), kind, cause: "so it is".into() };
        let told = fault("open the vault", &"home", &failed().into());
        assert_eq!((told.code, told.object.as_str()), (code, "home"), "{told}");
        assert!(told.cause.contains("/srv/v") && told.cause.contains("so it is"), "{told}");
        assert!(!codes::remedy(&told).is_empty(), "{told}");
        assert_eq!(told, backend_fault("open the vault", &"home", &failed()));
    }
}

#[test]
fn every_error_of_a_vault_says_the_way_on_and_only_what_may_pass_is_tried_again() {
    let lease = LeaseId::new([1; 16]);
    for (error, code, class) in [
        (VaultError::NoVault { place: "p".into() }, codes::NO_VAULT, Class::Permanent),
        (
            VaultError::Occupied { place: "p".into(), found: vec![VAULT] },
            codes::VAULT_EXISTS,
            Class::Permanent,
        ),
        (VaultError::HeaderChanged { vault: VAULT }, codes::VAULT_EXCHANGED, Class::Permanent),
        (VaultError::NotEncrypted { vault: VAULT }, codes::VAULT_EXCHANGED, Class::Permanent),
        (VaultError::WrongKey { vault: VAULT }, codes::VAULT_KEY_WRONG, Class::Permanent),
        (VaultError::Key(KeyError::Refused("why")), codes::VAULT_KEY_REFUSED, Class::Permanent),
        (VaultError::Key(KeyError::MayNotSign), codes::VAULT_MAY_NOT, Class::Permanent),
        (VaultError::Key(KeyError::NotGenuine), codes::VAULT_DAMAGED, Class::Permanent),
        (
            VaultError::Newer { object: "o".into(), found: 2, known: 1 },
            codes::VAULT_TOO_NEW,
            Class::Permanent,
        ),
        (VaultError::Missing { object: "o".into() }, codes::VAULT_DAMAGED, Class::Permanent),
        (VaultError::Lost { lost: 1, first: "f".into() }, codes::VAULT_DAMAGED, Class::Permanent),
        (VaultError::Revoked { lease }, codes::VAULT_BUSY, Class::Transient),
        (VaultError::CopyRefused { cause: "why" }, codes::VAULT_COPY_REFUSED, Class::Permanent),
        (VaultError::Contract("why".into()), codes::UNDEFINED_ERROR, Class::Permanent),
    ] {
        let told = fault("do it", &"home", &error);
        assert_eq!((told.code, told.class), (code, class), "{told}");
        assert!(!codes::remedy(&told).is_empty() && !told.cause.is_empty(), "{told}");
    }
}

#[test]
fn what_is_learnt_of_a_vault_is_kept_for_its_owner_alone_and_never_replaced_by_another() {
    use std::os::unix::fs::MetadataExt as _;
    let dir = tempfile::tempdir().unwrap();
    // The state folder is not there before the daemon's first start.
    let state = dir.path().join("not/yet");
    let memory = memory(&state, "file:///srv/v");
    assert_eq!(memory.load().unwrap(), None);
    memory.keep_new(&known("one")).unwrap();
    assert_eq!(memory.load().unwrap(), Some(known("one")));
    assert_eq!(memory.path().metadata().unwrap().mode() & 0o7777, 0o600);
    memory.keep_new(&known("one")).unwrap();
    assert_eq!(memory.keep_new(&known("two")).unwrap_err().code, codes::VAULT_EXCHANGED);
    assert_eq!(memory.load().unwrap(), Some(known("one")));
    let with_key =
        Remembered { keys: vec![(vmkeep_vault::ids::KeyId::new([3; 16]), vec![1, 2])], ..known("one") };
    memory.replace(&with_key).unwrap();
    assert_eq!(memory.load().unwrap(), Some(with_key));
    assert_eq!(std::fs::read_dir(state.join("vaults")).unwrap().count(), 1, "something was left beside it");

    // Cut off before the rename: what nobody reads.
    std::fs::write(state.join("vaults/at.0.new"), "{").unwrap();
    assert!(memory.load().unwrap().is_some());
    std::fs::write(memory.path(), "{").unwrap();
    let told = memory.load().unwrap_err();
    assert_eq!(told.code, codes::VAULT_DAMAGED, "damage is not taken for nothing: {told}");
    assert!(memory.forget().unwrap() && !memory.forget().unwrap());
}

#[test]
fn two_vaults_never_share_what_is_known_of_them() {
    let state = Path::new("/s");
    let files: Vec<PathBuf> =
        ["file:///a", "file:///b", "sftp://h/a"].map(|url| memory(state, url).path()).into();
    assert!(files[0] != files[1] && files[1] != files[2] && files[0] != files[2], "{files:?}");
    let named = VaultSettings {
        name: Some("at".parse().unwrap()),
        ..VaultSettings::at("file:///a".parse().unwrap())
    };
    assert_eq!(Memory::of(&named, state).path(), Path::new("/s/vaults/at.json"));
    assert_eq!(Memory::of(&named, state).cache(), Path::new("/s/vaults/at.cache"));
}

#[tokio::test]
async fn a_vault_that_is_opened_for_the_first_time_is_remembered_and_an_exchanged_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (place, state) = (dir.path().join("v"), dir.path().join("s"));
    let settings = VaultSettings::at(format!("file://{}", place.display()).parse().unwrap());
    let make = async || {
        let backend = address::open(&settings.url, &settings.options(true)).await.unwrap();
        let made = vmkeep_vault::vault::Confirmed::plain(false).unwrap();
        Box::pin(made.put(backend, None)).await.unwrap()
    };
    let first = make().await;
    // Steps of the daemon run on any of its threads.
    let opening: std::pin::Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(open(&settings, &state, None));
    let opened = opening.await.unwrap();
    let header: &Header = opened.header();
    assert_eq!((opened.id(), header.cipher), (first.id(), Cipher::None));
    let memory = Memory::of(&settings, &state);
    assert_eq!(memory.load().unwrap().unwrap().id, first.id());
    assert!(memory.cache().is_dir());
    std::fs::remove_dir_all(&place).unwrap();
    make().await;
    let told = Box::pin(open(&settings, &state, None)).await.unwrap_err();
    assert_eq!(told.code, codes::VAULT_EXCHANGED, "{told}");
    let key = Credential::passphrase("x");
    assert_eq!(Box::pin(open(&settings, &state, Some(key))).await.unwrap_err().code, codes::VAULT_EXCHANGED);
}

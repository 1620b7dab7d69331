use super::*;
use crate::backend::memory::Memory;
use crate::keys::wrap::{FEWEST_PASSES, LEAST_MEMORY};

const CHEAP: Cost = Cost { memory: LEAST_MEMORY, passes: FEWEST_PASSES, lanes: 1 };

fn file(byte: u8) -> Credential {
    Credential::key_file(&[byte; 32])
}

async fn encrypted(backend: &Arc<Memory>) -> (Vault, Zeroizing<String>) {
    let draft = Draft::encrypted(false).unwrap();
    let words = draft.recovery_words().unwrap();
    let confirmed = draft.confirm(&words).unwrap();
    let vault = confirmed.put(backend.clone(), Some((file(1), CHEAP, "first".into()))).await.unwrap();
    (vault, words)
}

async fn plain(backend: &Arc<Memory>) -> Vault {
    Confirmed::plain(false).unwrap().put(backend.clone(), None).await.unwrap()
}

async fn code(backend: &Arc<Memory>, by: Option<Credential>, known: Option<&Remembered>) -> &'static str {
    Vault::attach(backend.clone(), by, known).await.map_or_else(|error| error.code(), |_| "OPEN")
}

#[tokio::test]
async fn nothing_is_made_before_the_recovery_key_was_typed_in() {
    let (draft, other) = (Draft::encrypted(false).unwrap(), Draft::encrypted(false).unwrap());
    assert!(draft.confirm("").is_err());
    assert!(draft.confirm(&other.recovery_words().unwrap()).is_err());
    assert!(draft.confirm(&draft.recovery_words().unwrap()).is_ok());
}

#[tokio::test]
async fn an_encrypted_vault_opens_with_its_key_file_passphrase_and_words_alone() {
    let backend = Arc::new(Memory::default());
    let (vault, words) = encrypted(&backend).await;
    let pass = Credential::passphrase("a new one");
    vault.add_key(pass.clone(), Role::Writer, CHEAP, "host".into()).await.unwrap();
    for (by, role) in
        [(file(1), Role::Full), (pass, Role::Writer), (Credential::recovery(&words), Role::Full)]
    {
        let again = Vault::attach(backend.clone(), Some(by), None).await.unwrap();
        assert_eq!((again.id(), again.keys().role()), (vault.id(), role));
        assert_eq!(
            again.keys().public(),
            vault.keys().public(),
            "a writer verifies what the full key signed"
        );
    }
    assert_eq!(code(&backend, Some(file(2)), None).await, "VAULT_WRONG_KEY");
    assert_eq!(code(&backend, Some(Credential::passphrase("a new one ")), None).await, "VAULT_WRONG_KEY");
    let stranger = Draft::encrypted(false).unwrap().recovery_words().unwrap();
    assert_eq!(code(&backend, Some(Credential::recovery(&stranger)), None).await, "VAULT_WRONG_KEY");
    assert_eq!(code(&backend, None, None).await, "VAULT_KEY_NEEDED");
}

#[tokio::test]
async fn a_passphrase_changes_without_touching_anything_else() {
    let backend = Arc::new(Memory::default());
    let (vault, _) = encrypted(&backend).await;
    let keys = vault.wrapped_keys().await.unwrap();
    let [(old, _)] = &keys[..] else { panic!("one key") };
    vault.add_key(file(2), Role::Full, CHEAP, "second".into()).await.unwrap();
    vault.remove_key(*old).await.unwrap();
    assert_eq!(code(&backend, Some(file(1)), None).await, "VAULT_WRONG_KEY");
    assert_eq!(code(&backend, Some(file(2)), None).await, "OPEN");
    let left = vault.wrapped_keys().await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].1.as_ref().unwrap().label, "second");
}

#[tokio::test]
async fn a_host_that_remembers_opens_a_vault_whose_keys_are_lost() {
    let backend = Arc::new(Memory::default());
    let (vault, words) = encrypted(&backend).await;
    let known = vault.remember().await.unwrap();
    let known: Remembered = serde_json::from_str(&serde_json::to_string(&known).unwrap()).unwrap();
    for (id, _) in vault.wrapped_keys().await.unwrap() {
        vault.remove_key(id).await.unwrap();
    }
    assert_eq!(code(&backend, Some(file(1)), None).await, "VAULT_WRONG_KEY");
    assert_eq!(code(&backend, Some(file(1)), Some(&known)).await, "OPEN");
    assert_eq!(code(&backend, Some(Credential::recovery(&words)), None).await, "OPEN");
}

#[tokio::test]
async fn where_there_is_no_header_there_is_no_vault_and_where_there_are_two_both_are_refused() {
    let backend = Arc::new(Memory::default());
    assert_eq!(code(&backend, None, None).await, "VAULT_NOT_FOUND");
    plain(&backend).await;
    let second = Confirmed::plain(false).unwrap().put(backend.clone(), None).await;
    assert_eq!(second.unwrap_err().code(), "VAULT_OCCUPIED");
    // Two that met: the header of another vault arrives.
    let elsewhere = Arc::new(Memory::default());
    let other = plain(&elsewhere).await;
    backend.put(&ObjectName::Header(other.id()).to_string(), other.header_bytes().clone()).await.unwrap();
    assert_eq!(code(&backend, None, None).await, "VAULT_OCCUPIED");
}

#[tokio::test]
async fn nobody_turns_encryption_off_by_replacing_a_file() {
    let backend = Arc::new(Memory::default());
    let (vault, _) = encrypted(&backend).await;
    let known = vault.remember().await.unwrap();
    let name = ObjectName::Header(vault.id());
    let bare = Keys::new(vault.id(), Root::None);
    let forged = Header::new(&bare, false).encode(&bare).unwrap();
    backend.put(&name.to_string(), forged).await.unwrap();
    assert_eq!(code(&backend, Some(file(1)), Some(&known)).await, "VAULT_HEADER_CHANGED");
    assert_eq!(code(&backend, None, Some(&known)).await, "VAULT_HEADER_CHANGED");
    assert_eq!(code(&backend, Some(file(1)), None).await, "VAULT_NOT_ENCRYPTED");
}

#[tokio::test]
async fn a_flip_of_any_byte_of_the_header_and_a_cut_anywhere_are_seen() {
    for sort in [true, false] {
        let backend = Arc::new(Memory::default());
        let (vault, by) = match sort {
            true => (encrypted(&backend).await.0, Some(file(1))),
            false => (plain(&backend).await, None),
        };
        let name = ObjectName::Header(vault.id()).to_string();
        let whole = vault.header_bytes().clone();
        for at in 0..whole.len() {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 1;
            for bytes in [bytes, whole[..at].to_vec()] {
                backend.put(&name, bytes.into()).await.unwrap();
                assert_ne!(code(&backend, by.clone(), None).await, "OPEN", "byte {at}");
            }
        }
    }
}

#[tokio::test]
async fn a_newer_vault_is_refused_or_read_only_and_an_unknown_field_does_no_harm() {
    let backend = Arc::new(Memory::default());
    let vault = plain(&backend).await;
    let name = ObjectName::Header(vault.id()).to_string();
    let line = std::str::from_utf8(vault.header_bytes()).unwrap().lines().next().unwrap().to_owned();
    for (from, to, expected, writable) in [
        ("\"min_reader\":1", "\"min_reader\":2", "VAULT_NEWER", false),
        ("\"min_writer\":1", "\"min_writer\":2", "OPEN", false),
        ("\"separate\"", "\"later\":[1],\"separate\"", "OPEN", true),
        ("\"fan_out\":64", "\"fan_out\":65", "VAULT_OBJECT_DAMAGED", false),
    ] {
        let changed = line.replace(from, to);
        assert_ne!(changed, line);
        let hash = vault.keys().header_hash(changed.as_bytes()).to_hex();
        backend.put(&name, format!("{changed}\n\"{hash}\"\n").into()).await.unwrap();
        assert_eq!(code(&backend, None, None).await, expected, "{to}");
        if expected == "OPEN" {
            let again = Vault::attach(backend.clone(), None, None).await.unwrap();
            assert_eq!(again.writable().is_ok(), writable, "{to}");
        }
    }
}

#[tokio::test]
async fn domains_share_ids_unless_they_are_kept_separate() {
    for separate in [false, true] {
        let vault = Confirmed::plain(separate).unwrap().put(Arc::new(Memory::default()), None).await.unwrap();
        let id = |domain| vault.ids(DomainId::new([domain; 16])).id(crate::blob::BlobType::Data, b"x");
        assert_eq!(id(1) != id(2), separate);
    }
}

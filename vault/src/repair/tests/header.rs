//! The header, keys, wrong keys, and what came later.

use super::*;
use crate::keys::Role;
use crate::keys::wrap::{Cost, Credential, FEWEST_PASSES, LEAST_MEMORY};
use crate::write::Session;

const CHEAP: Cost = Cost { memory: LEAST_MEMORY, passes: FEWEST_PASSES, lanes: 1 };

fn file(byte: u8) -> Credential {
    Credential::key_file(&[byte; 32])
}

impl Folder {
    fn header(&self) -> String {
        ObjectName::Header(self.vault.id()).to_string()
    }

    fn recovery(&self) -> Credential {
        Credential::recovery(&self.words)
    }

    async fn attach(&self, by: Option<Credential>) -> Result<Vault, VaultError> {
        Vault::attach(self.backend.clone(), by, None).await
    }

    async fn repair(&self, copy: HeaderCopy<'_>, by: Option<Credential>) -> Result<HeaderRepair, VaultError> {
        Box::pin(super::super::header(self.backend.clone(), copy, by)).await
    }
}

#[tokio::test]
async fn a_bad_header_is_put_back_from_a_host_or_a_manifest_by_who_has_the_key() {
    for encrypted in [true, false] {
        let folder = Folder::new(encrypted, false).await;
        let image = noise(1, 3 * C);
        let one = folder.full(&image).await;
        let key = || encrypted.then(|| folder.recovery());
        let known = folder.vault.remember().await.unwrap();
        let manifest = HeaderCopy::Manifest(None);
        for copy in [HeaderCopy::Kept(&known), manifest] {
            assert_eq!(folder.repair(copy, key()).await.unwrap(), HeaderRepair::Sound);
            folder.flip(&folder.header(), 30);
            assert!(folder.attach(key()).await.is_err());
            let (wrong, said) = match encrypted {
                true => (
                    Draft::encrypted(false).unwrap().recovery_words().unwrap().to_string(),
                    "VAULT_WRONG_KEY",
                ),
                false => (String::new(), "VAULT_NOT_ENCRYPTED"),
            };
            if encrypted {
                let stranger = Some(Credential::recovery(&wrong));
                assert_eq!(folder.repair(copy, stranger).await.unwrap_err().code(), said);
                assert!(folder.repair(copy, None).await.is_err());
            } else if let HeaderCopy::Kept(_) = copy {
                assert_eq!(folder.repair(copy, Some(file(1))).await.unwrap_err().code(), said);
            }
            assert!(folder.attach(key()).await.is_err(), "nothing was put");
            assert_eq!(folder.repair(copy, key()).await.unwrap(), HeaderRepair::Replaced);
            let vault = folder.attach(key()).await.unwrap();
            assert!(restored(&vault, one).await == image);
        }
        // Gone altogether: now its name must be known.
        folder.remove(&folder.header());
        assert_eq!(folder.repair(manifest, key()).await.unwrap_err().code(), "VAULT_NOT_FOUND");
        let named = HeaderCopy::Manifest(Some(folder.vault.id()));
        for name in folder.names("backups/").await {
            folder.flip(&name, 60);
            assert_eq!(folder.repair(named, key()).await.unwrap_err().code(), "VAULT_OBJECT_DAMAGED");
            folder.flip(&name, 60);
        }
        assert_eq!(folder.repair(named, key()).await.unwrap(), HeaderRepair::Put);
        assert_eq!(std::fs::read(folder.path(&folder.header())).unwrap(), folder.vault.header_bytes()[..]);
    }
}

#[tokio::test]
async fn the_header_of_another_vault_is_not_replaced() {
    let (folder, other) = (Folder::new(false, false).await, Folder::new(false, false).await);
    let known = folder.vault.remember().await.unwrap();
    let error = Box::pin(super::super::header(other.backend.clone(), HeaderCopy::Kept(&known), None)).await;
    assert_eq!(error.unwrap_err().code(), "VAULT_OCCUPIED");
    assert_eq!(other.names("vault.").await, [other.header()]);
}

#[tokio::test]
async fn with_bad_keys_the_words_and_a_host_that_remembers_still_open_the_vault() {
    let folder = Folder::new(true, false).await;
    let image = noise(2, 3 * C);
    let one = folder.full(&image).await;
    folder.vault.add_key(file(1), Role::Full, CHEAP, "first".into()).await.unwrap();
    let known = folder.vault.remember().await.unwrap();
    let key = folder.names("keys/").await.remove(0);
    folder.flip(&key, 100);
    // Not called a wrong key: nobody knows whether it was.
    assert_eq!(folder.attach(Some(file(1))).await.unwrap_err().code(), "VAULT_KEY");
    let vault = Vault::attach(folder.backend.clone(), Some(file(1)), Some(&known)).await.unwrap();
    assert!(restored(&vault, one).await == image);
    folder.remove(&key);
    let vault = folder.attach(Some(folder.recovery())).await.unwrap();
    vault.add_key(file(2), Role::Full, CHEAP, "second".into()).await.unwrap();
    assert!(restored(&folder.attach(Some(file(2))).await.unwrap(), one).await == image);
}

#[tokio::test]
async fn a_wrong_key_is_said_before_anything_is_read() {
    let folder = Folder::new(true, false).await;
    folder.vault.add_key(file(1), Role::Full, CHEAP, "first".into()).await.unwrap();
    folder.full(&noise(3, 3 * C)).await;
    for prefix in ["data/", "tree/", "index/", "backups/", "marks/", "leases/"] {
        for name in folder.names(prefix).await {
            folder.flip(&name, 50);
        }
    }
    let stranger = Draft::encrypted(false).unwrap().recovery_words().unwrap();
    for wrong in [file(2), Credential::passphrase("no"), Credential::recovery(&stranger)] {
        assert_eq!(folder.attach(Some(wrong)).await.unwrap_err().code(), "VAULT_WRONG_KEY");
    }
}

#[tokio::test]
async fn what_came_later_is_refused_or_read_only_for_whoever_repairs_too() {
    for (reader, writer, feature) in [(2, 2, false), (1, 2, false), (2, 2, true), (1, 2, true)] {
        let folder = Folder::new(false, false).await;
        let image = noise(4, 3 * C);
        let one = folder.full(&image).await;
        let manifest_name: ObjectName = folder.names("backups/").await.remove(0).parse().unwrap();
        let bytes = folder.vault.get(&manifest_name).await.unwrap().unwrap();
        if feature {
            let name = ObjectName::Feature("later".into());
            let said = serde_json::json!({ "min_reader": reader, "min_writer": writer });
            let object = crate::codec::encode(folder.vault.keys(), &name, &said).unwrap();
            folder.vault.put(&name, object).await.unwrap();
        } else {
            let line = std::str::from_utf8(folder.vault.header_bytes()).unwrap().lines().next().unwrap();
            let line = line
                .replace("\"min_reader\":1", &format!("\"min_reader\":{reader}"))
                .replace("\"min_writer\":1", &format!("\"min_writer\":{writer}"));
            let hash = folder.vault.keys().header_hash(line.as_bytes()).to_hex();
            folder.remove(&folder.header());
            let object = Bytes::from(format!("{line}\n\"{hash}\"\n"));
            folder.backend.put(&folder.header(), object).await.unwrap();
        }
        let before = folder.names("").await;
        let vault = match folder.attach(None).await {
            Ok(vault) => vault,
            Err(error) => {
                assert!(reader == 2 && !feature && error.code() == "VAULT_NEWER", "{error}");
                continue;
            }
        };
        let reads = features::check_reader(&vault).await;
        assert_eq!(reads.is_ok(), reader == 1);
        let expected = if reader == 2 { "VAULT_NEWER" } else { "VAULT_READ_ONLY" };
        let holder = Holder::default();
        let said = [
            Box::pin(heal(&vault, &holder, None, &[])).await.map(drop),
            Box::pin(super::super::index(&vault, &holder, None)).await.map(drop),
            Box::pin(super::super::manifest(&vault, &holder, &manifest_name, &bytes)).await.map(drop),
            Box::pin(check(&vault, &holder, None, true)).await.map(drop),
            Box::pin(Session::begin(&vault, DOMAIN, crate::write::Options::default())).await.map(drop),
        ];
        for one in said {
            assert_eq!(one.unwrap_err().code(), expected);
        }
        // Nothing but leases that have ended, where the feature was found under one.
        let after = folder.names("").await;
        let new: Vec<&String> = after.iter().filter(|name| !before.contains(name)).collect();
        assert!(new.iter().all(|name| feature && name.starts_with("leases/")), "{new:?}");
        if reader == 1 {
            assert!(restored(&vault, one).await == image, "it is read all the same");
        }
    }
}

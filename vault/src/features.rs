//! Features that came after this version of the format (`FORMAT.md`, §3): none is known, so each decides by what it asks for.

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::error::VaultError;
use crate::header::FORMAT;
use crate::names::ObjectName;
use crate::vault::Vault;

#[derive(Serialize, Deserialize)]
struct Feature {
    min_reader: u32,
    min_writer: u32,
}

/// Whether this program may write. To be asked after the lease was put.
///
/// # Errors
/// If a feature asks for a later program, one cannot be read, or what the backend could not do.
pub async fn check_writer(vault: &Vault) -> Result<(), VaultError> {
    for (name, feature) in load(vault).await? {
        if feature.min_writer > FORMAT {
            let cause = format!("{name} asks writers for format {}, known is {FORMAT}", feature.min_writer);
            return Err(VaultError::ReadOnly { vault: vault.id(), cause });
        }
    }
    Ok(())
}

/// Whether this program may read.
///
/// # Errors
/// As [`check_writer`].
pub async fn check_reader(vault: &Vault) -> Result<(), VaultError> {
    load(vault).await.map(drop)
}

async fn load(vault: &Vault) -> Result<Vec<(ObjectName, Feature)>, VaultError> {
    let mut all = Vec::new();
    for (name, _) in vault.list("features/").await? {
        let Some(object) = vault.get(&name).await? else { continue };
        let feature: Feature = codec::decode(vault.keys(), &name, &object)?;
        if feature.min_reader > FORMAT {
            return Err(VaultError::Newer {
                object: name.to_string(),
                found: feature.min_reader,
                known: FORMAT,
            });
        }
        all.push((name, feature));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::memory::Memory;
    use crate::vault::Confirmed;

    #[tokio::test]
    async fn a_later_feature_keeps_older_programs_from_writing_or_reading() {
        for (min_reader, min_writer, reads, writes) in
            [(1, 1, true, true), (1, 2, true, false), (2, 2, false, false)]
        {
            let vault =
                Confirmed::plain(false).unwrap().put(Arc::new(Memory::default()), None).await.unwrap();
            let name = ObjectName::Feature("later".into());
            let object = codec::encode(vault.keys(), &name, &Feature { min_reader, min_writer }).unwrap();
            vault.put(&name, object).await.unwrap();
            assert_eq!(check_reader(&vault).await.is_ok(), reads);
            assert_eq!(check_writer(&vault).await.is_ok(), writes);
        }
    }
}

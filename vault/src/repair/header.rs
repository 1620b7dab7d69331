//! Putting the header back (`FORMAT.md`, §6): without it nothing of a vault is read. Every host that was attached has a copy,
//! and so has every manifest, which opens with any key of the vault.
//!
//! This is the one object that is replaced: it never changes, so whatever else stands under its name is wrong. What is put is
//! proven first, with the key where there is one. A power cut between the deletion and the put leaves no header, and the same
//! copies to put it from.

use std::sync::Arc;

use bytes::Bytes;

use crate::backend::Backend;
use crate::codec;
use crate::error::VaultError;
use crate::header::{Cipher, Header};
use crate::ids::VaultId;
use crate::keys::wrap::Credential;
use crate::keys::{Keys, Root};
use crate::manifest::Manifest;
use crate::names::ObjectName;
use crate::vault::{Remembered, headers, unlock};

/// Where a header is taken from.
#[derive(Clone, Copy, Debug)]
pub enum HeaderCopy<'a> {
    /// What a host has kept since it was attached.
    Kept(&'a Remembered),
    /// Any manifest that opens. The vault's id must be known if nothing stands under the name of its header.
    Manifest(Option<VaultId>),
}

/// What became of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderRepair {
    /// It is the one that was put when the vault was made.
    Sound,
    /// It was missing, and was put.
    Put,
    /// Something else stood there, and it was put instead.
    Replaced,
}

/// Puts the header back if it is missing, damaged or another. With a key in an encrypted vault, with none in one without.
///
/// # Errors
/// If headers of other vaults are there, the key is missing, wrong or too much, no copy is good, or what the backend could not
/// do: it must be able to delete.
pub async fn header(
    backend: Arc<dyn Backend>,
    copy: HeaderCopy<'_>,
    by: Option<Credential>,
) -> Result<HeaderRepair, VaultError> {
    let found = headers(&*backend).await?;
    let place = backend.place().to_owned();
    let vault = match (copy, found.as_slice()) {
        (HeaderCopy::Kept(known), _) => known.id,
        (HeaderCopy::Manifest(Some(vault)), _) => vault,
        (HeaderCopy::Manifest(None), [vault]) => *vault,
        (HeaderCopy::Manifest(None), []) => return Err(VaultError::NoVault { place }),
        (HeaderCopy::Manifest(None), _) => return Err(VaultError::Occupied { place, found }),
    };
    if found.iter().any(|other| *other != vault) {
        return Err(VaultError::Occupied { place, found });
    }
    let good = match copy {
        HeaderCopy::Kept(known) => kept(&*backend, known, by).await?,
        HeaderCopy::Manifest(_) => out_of_a_manifest(&*backend, vault, by).await?,
    };
    let name = ObjectName::Header(vault).to_string();
    let there = backend.get(&name, None).await?;
    if there.as_ref() == Some(&good) {
        return Ok(HeaderRepair::Sound);
    }
    if there.is_some() {
        backend.delete(&name).await?;
    }
    backend.put(&name, good).await?;
    let found = headers(&*backend).await?;
    if found != [vault] {
        return Err(VaultError::Occupied { place, found });
    }
    Ok(if there.is_some() { HeaderRepair::Replaced } else { HeaderRepair::Put })
}

/// The header that a host has kept, once the key fits it.
async fn kept(
    backend: &dyn Backend,
    known: &Remembered,
    by: Option<Credential>,
) -> Result<Bytes, VaultError> {
    let bytes = Bytes::from(known.header.clone());
    let header = Header::decode(&ObjectName::Header(known.id), &bytes)?;
    let keys = match (header.cipher, by) {
        (Cipher::None, None) => Keys::new(known.id, Root::None),
        (Cipher::None, Some(_)) => return Err(VaultError::NotEncrypted { vault: known.id }),
        (Cipher::XChaCha20Poly1305, None) => return Err(VaultError::KeyNeeded { vault: known.id }),
        (Cipher::XChaCha20Poly1305, Some(by)) => unlock(backend, known.id, by, Some(known)).await?,
    };
    header.check(&bytes, &keys)?;
    Ok(bytes)
}

/// The header that a manifest holds, once the key fits both.
async fn out_of_a_manifest(
    backend: &dyn Backend,
    vault: VaultId,
    by: Option<Credential>,
) -> Result<Bytes, VaultError> {
    let has_key = by.is_some();
    let keys = match by {
        None => Keys::new(vault, Root::None),
        Some(by) => unlock(backend, vault, by, None).await?,
    };
    let mut last = None;
    for listed in backend.list("backups/").await? {
        let Ok(name) = listed.name.parse::<ObjectName>() else { continue };
        let Some(object) = backend.get(&listed.name, None).await? else { continue };
        let manifest: Manifest = match codec::decode(&keys, &name, &object) {
            Ok(manifest) => manifest,
            Err(error) => {
                // Whole, and yet it does not open: the key is another vault's.
                let is_whole = codec::unwrap(&keys, &name, &object).is_ok();
                last = Some(if has_key && is_whole { VaultError::WrongKey { vault } } else { error });
                continue;
            }
        };
        let bytes = Bytes::from(manifest.header);
        let proven = Header::decode(&ObjectName::Header(vault), &bytes).and_then(|header| {
            header.check(&bytes, &keys)?;
            // A vault without encryption is opened without a key, and the other way round.
            if (header.cipher == Cipher::None) == has_key {
                Err(VaultError::WrongKey { vault })
            } else {
                Ok(())
            }
        });
        match proven {
            Ok(()) => return Ok(bytes),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| VaultError::Missing { object: "a manifest, to take the header from".into() }))
}

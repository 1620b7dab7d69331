//! Putting a manifest again that is damaged or gone, from bytes that somebody has kept: the journal of the host that made the
//! backup has them since before the commit (`FORMAT.md`, §5).
//!
//! What the backup needs is still there: while the manifest of a checked backup is missing or cannot be read, and nobody has
//! pruned it, nothing is collected. A name that is taken is never used again with other bytes; so beside a damaged manifest
//! the same one is put under this lease, and two of one backup are the same backup.

use bytes::Bytes;

use crate::backups::{self, Backups};
use crate::codec;
use crate::error::VaultError;
use crate::features;
use crate::ids::BackupId;
use crate::index::tidings;
use crate::lease::{Holder, Lease};
use crate::names::{MarkKind, ObjectName};
use crate::vault::Vault;

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManifestRepair {
    /// The vault has one that can be read.
    Sound,
    /// The backup is to be pruned, or being deleted: it stays as it is.
    Pruned,
    /// It was put. Whether all that it needs is there, a check tells; where it was never checked, it must be settled.
    Put {
        /// Whether it was checked once.
        checked: bool,
    },
    /// The lease was revoked meanwhile: the manifest may count or not, so this is to be done again.
    Revoked,
}

/// Puts a manifest again: the bytes of the object, and the name that they were put under.
///
/// # Errors
/// If they are no manifest of this vault and name, or what the backend could not do.
pub async fn manifest(
    vault: &Vault,
    holder: &Holder,
    name: &ObjectName,
    object: &Bytes,
) -> Result<ManifestRepair, VaultError> {
    vault.writable()?;
    let kept = backups::decode(vault, name, object)?;
    let lease = Lease::begin(vault, holder).await?;
    let put = Box::pin(under(vault, &lease, name, object, kept)).await;
    lease.end().await?;
    put
}

async fn under(
    vault: &Vault,
    lease: &Lease,
    name: &ObjectName,
    object: &Bytes,
    mut kept: crate::manifest::Manifest,
) -> Result<ManifestRepair, VaultError> {
    features::check_writer(vault).await?;
    let backup = kept.backup;
    let all = Backups::load(vault, None).await?;
    if all.has(backup, MarkKind::Prune) || is_condemned(vault, backup).await? {
        return Ok(ManifestRepair::Pruned);
    }
    if all.get(backup).is_some_and(|found| found.manifest.is_ok()) {
        return Ok(ManifestRepair::Sound);
    }
    if vault.get(name).await?.is_none() {
        vault.put(name, object.clone()).await?;
    } else {
        kept.lease = lease.id();
        let name = kept.name();
        vault.put(&name, codec::encode(vault.keys(), &name, &kept)?).await?;
    }
    let checked = all.has(backup, MarkKind::Checked);
    Ok(if lease.is_revoked().await? { ManifestRepair::Revoked } else { ManifestRepair::Put { checked } })
}

async fn is_condemned(vault: &Vault, backup: BackupId) -> Result<bool, VaultError> {
    let condemned = tidings::condemnations(vault).await?;
    Ok(condemned.iter().any(|(_, one)| one.backups.iter().any(|name| name.1 == backup)))
}

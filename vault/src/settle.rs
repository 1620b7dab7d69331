//! Settling a backup of which nobody knows whether collections keep what it needs (`FORMAT.md`, §7): one whose lease was
//! revoked, or whose writer died after its manifest.
//!
//! Under a lease of its own everything is listed anew; every blob must have a usable place, or lie in an uncondemned pack of
//! the writer's own that is there when looked for. If the new lease still stands then, the backup is checked. That the old
//! lease was never revoked proves nothing to anybody but its writer: the manifest may have arrived after it had ended.

use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use crate::backups::{self, Backups, Hurt, Mark};
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::ids::BackupId;
use crate::index::Index;
use crate::lease::{Holder, Lease};
use crate::names::{MarkKind, ObjectName};
use crate::vault::Vault;
use crate::walk::{Judge, Walk};
use crate::write::Prepared;

/// How a settlement ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The backup is checked: now, or it was already.
    Checked,
    /// There is no such manifest.
    Absent,
    /// It is to be pruned, or being deleted: it stays unchecked.
    Pruned,
    /// It lacks something. Its writer may make a new backup of the same point in time, which stores only that; the manifest
    /// stays unchecked, and is pruned.
    Lacks(Vec<Hurt>),
    /// The lease of the settlement was revoked as well: to be tried again.
    Revoked,
}

/// Settles a backup.
///
/// # Errors
/// If its manifest cannot be read, or what the backend could not do.
pub async fn settle(
    vault: &Vault,
    backup: BackupId,
    holder: &Holder,
    folder: Option<&Path>,
) -> Result<Settled, VaultError> {
    vault.writable()?;
    let lease = Lease::begin(vault, holder).await?;
    let settled = Box::pin(under(vault, backup, &lease, holder, folder)).await;
    lease.end().await?;
    settled
}

/// Commits what was prepared by a session whose lease is over, and settles it: puts the manifest, with the bytes that any put of
/// it has, and looks at everything that it needs.
///
/// # Errors
/// As [`settle`].
pub async fn commit(
    vault: &Vault,
    prepared: &Prepared,
    holder: &Holder,
    folder: Option<&Path>,
) -> Result<Settled, VaultError> {
    let ObjectName::Manifest(_, backup, _) = &prepared.name else {
        return Err(VaultError::Contract("what is committed is no manifest".into()));
    };
    vault.put(&prepared.name, prepared.object.clone()).await?;
    Box::pin(settle(vault, *backup, holder, folder)).await
}

async fn under(
    vault: &Vault,
    backup: BackupId,
    lease: &Lease,
    holder: &Holder,
    folder: Option<&Path>,
) -> Result<Settled, VaultError> {
    crate::features::check_writer(vault).await?;
    let index = Arc::new(Index::load(vault, folder).await?);
    let all = Backups::load(vault, None).await?;
    let Some(found) = all.get(backup) else { return Ok(Settled::Absent) };
    let doomed = index.condemnations().iter().any(|(_, one)| one.backups.iter().any(|name| name.1 == backup));
    if doomed || all.has(backup, MarkKind::Prune) {
        return Ok(Settled::Pruned);
    }
    if all.has(backup, MarkKind::Checked) {
        return Ok(Settled::Checked);
    }
    let manifest = match &found.manifest {
        Ok(manifest) => manifest,
        Err(error) => return Err(VaultError::damaged(format!("the manifest of {backup}"), error)),
    };
    let ids = vault.ids(manifest.domain);
    let fetcher = Fetcher::new(vault, ids, index, folder.map(Path::to_owned), true);
    let lacks = Walk::new(vault, &fetcher, Judge::Kept(manifest.lease)).backup(manifest).await?.hurt;
    if !lacks.is_empty() {
        return Ok(Settled::Lacks(lacks));
    }
    if lease.is_revoked().await? {
        return Ok(Settled::Revoked);
    }
    let mark = Mark::new(Timestamp::now(), &holder.host);
    backups::put_mark(vault, backup, MarkKind::Checked, &mark).await?;
    Ok(Settled::Checked)
}

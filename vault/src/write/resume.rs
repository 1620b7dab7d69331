//! Going on where a process died: its packs are there, and some of them no run names (`FORMAT.md`, §5).

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;

use super::store::Store;
use crate::error::VaultError;
use crate::ids::{LeaseId, PackId};
use crate::index::Index;
use crate::names::{Area, ObjectName};
use crate::pack::{self, FOOT};
use crate::vault::Vault;

/// Puts a run of all whole packs of a lease that no usable run names. Those that are torn are left to a collector.
pub(crate) async fn take_up(
    vault: &Vault,
    index: &Index,
    lease: LeaseId,
    store: &mut Store,
) -> Result<(), VaultError> {
    let named: HashSet<PackId> = index.packs_of(lease).await?;
    for area in [Area::Data, Area::Tree] {
        for (name, size) in vault.list(&format!("{}/", area.folder())).await? {
            let ObjectName::Pack(_, pack) = name else { continue };
            if pack.lease() != lease || named.contains(&pack) {
                continue;
            }
            match table(vault, area, pack, size).await {
                Ok(entries) => store.take_up(area, pack, &entries).await?,
                Err(error @ (VaultError::Damaged { .. } | VaultError::Missing { .. })) => {
                    tracing::warn!(%error, "a pack of the process that died is not whole");
                }
                Err(error) => return Err(error),
            }
        }
    }
    store.flush().await
}

/// The table of a pack that was listed with this size.
///
/// # Errors
/// If it is damaged, or what the backend could not do.
pub(crate) async fn table(
    vault: &Vault,
    area: Area,
    pack: PackId,
    size: u64,
) -> Result<Vec<pack::Entry>, VaultError> {
    let name = ObjectName::Pack(area, pack);
    let foot = part(vault, &name, size.saturating_sub(FOOT as u64)..size).await?;
    let range = pack::table_range(&name, size, &foot)?;
    let bytes = part(vault, &name, range.clone()).await?;
    pack::read_table(vault.keys(), area, pack, range.start, &bytes)
}

async fn part(vault: &Vault, name: &ObjectName, range: Range<u64>) -> Result<Bytes, VaultError> {
    let bytes = vault.backend().get(&name.to_string(), Some(range)).await?;
    bytes.ok_or_else(|| VaultError::Missing { object: name.to_string() })
}

//! Backups in vaults, as this host knows of them without asking a vault.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_vault::manifest::BackupKind;

/// The last backup of a domain that a job of this host has put into a vault. It was committed, with all that it needs; what has
/// become of it since only the vault tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultedRow {
    /// The domain's name at the time.
    pub domain: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// The vault's name in the configuration: of now, if it is known there, else of then.
    pub vault: String,
    /// The vault's id.
    pub vault_id: String,
    /// Whether the configuration names a vault that this host knows to be that one.
    pub configured: bool,
    /// The backup's whole id.
    pub id: String,
    /// The point in time that it holds.
    pub at: Timestamp,
    /// What was read for it; each can be restored by itself.
    pub kind: BackupKind,
    /// The job that made it.
    pub job: String,
}

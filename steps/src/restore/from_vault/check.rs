//! Everything that can be found out before anything is touched.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmkeep_vault::backups::{self, Backups, Hurt};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::features;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::header::Cipher;
use vmkeep_vault::ids::{BackupId, BlobId, DomainId, VaultId};
use vmkeep_vault::index::Index;
use vmkeep_vault::manifest::Manifest;
use vmkeep_vault::names::MarkKind;
use vmkeep_vault::read::most;
use vmkeep_workflow::{Class, Code, Fault};

use super::reader;
use crate::codes;
use crate::hypervisor::{Definition, DomainRef};
use crate::manifest::Digest;
use crate::restore::check::{Holds, no_longer_free, reaches_nowhere};
use crate::snapshot::{Places, World};
use crate::vaults::{Opened, Vaults, fault};

const DOING: &str = "find the backup in the vault";
/// Ranges of a disk that a message names.
const SHOWN: usize = 8;

/// What the plan was built on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    /// The vault's name.
    pub(super) vault: String,
    /// Which vault that is.
    pub(super) id: VaultId,
    /// The domain that the backup is of.
    pub(super) of: DomainId,
    /// The backup.
    pub(super) backup: BackupId,
    /// Also if it is unchecked, to be pruned, or known to be damaged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) unchecked: bool,
    /// The hash of its definition.
    pub(super) definition: Digest,
    /// What proves the content of each of its disks and streams, by its name.
    pub(super) roots: Vec<(String, BlobId)>,
    /// The new domain: neither its name nor its UUID exist.
    pub(super) domain: DomainRef,
    /// Paths that do not exist.
    pub(super) free: Vec<PathBuf>,
}

/// What proves the content of each disk and stream.
pub(super) fn roots(manifest: &Manifest) -> Vec<(String, BlobId)> {
    manifest.images().into_iter().map(|(name, _, image)| (name.to_owned(), image.root)).collect()
}

pub(super) fn hash(definition: &str) -> Digest {
    Digest(blake3::hash(definition.as_bytes()))
}

/// The backup's manifest, if the backup may be restored.
pub(super) async fn manifest(
    opened: &Opened,
    vault: &str,
    (domain, backup): (DomainId, BackupId),
    unchecked: bool,
) -> Result<Manifest, Fault> {
    let failed = |error: &VaultError| fault(DOING, &vault, error);
    features::check_reader(&opened.vault).await.map_err(|e| failed(&e))?;
    let all = Box::pin(Backups::load(&opened.vault, Some(domain))).await.map_err(|e| failed(&e))?;
    let manifest = match all.get(backup).map(|one| &one.manifest) {
        Some(Ok(manifest)) => manifest.clone(),
        Some(Err(error)) => return Err(fault("read the backup's manifest", &vault, error)),
        None => {
            let cause = format!("the vault {vault} does not have it");
            return Err(Fault::permanent(codes::NO_SUCH_BACKUP, DOING, backup.to_string(), cause)
                .remedy(format!("`vmkeep vault list {vault}`")));
        }
    };
    if let Some(feature) = manifest.features.first() {
        let cause = format!("it uses the feature `{feature}`, which this version does not know");
        return Err(Fault::permanent(codes::VAULT_TOO_NEW, DOING, backup.to_string(), cause));
    }
    if !unchecked {
        good(opened, vault, &all, backup).await?;
    }
    Ok(manifest)
}

/// Whether all that the backup needs is known to be there, and to stay.
async fn good(opened: &Opened, vault: &str, all: &Backups, backup: BackupId) -> Result<(), Fault> {
    let failed = |error: VaultError| fault(DOING, &vault, &error);
    let refused = |cause: &str| {
        Fault::permanent(codes::BACKUP_NOT_SURE, DOING, backup.to_string(), cause)
            .remedy("Restore another one. This one, if it is still whole: `--unchecked`")
    };
    if !all.has(backup, MarkKind::Checked) {
        return Err(refused("it is unchecked: nobody knows whether all that it needs is there"));
    }
    let marks = all.all_marks();
    if !marks.prunes(&opened.vault, backup).await.map_err(failed)?.is_empty()
        && marks.protections(&opened.vault, backup).await.map_err(failed)?.is_empty()
    {
        return Err(refused("it is to be pruned: the next collection deletes what it needs"));
    }
    let mut hurt = Vec::new();
    for mark in marks.of_kind(backup, MarkKind::Hurt) {
        let mark = backups::read_mark(&opened.vault, backup, MarkKind::Hurt, mark).await.map_err(failed)?;
        hurt.extend(mark.into_iter().flat_map(|mark| mark.hurt).map(|one| words(&one)));
    }
    if hurt.is_empty() {
        return Ok(());
    }
    hurt.sort();
    hurt.dedup();
    let remedy = format!(
        "Restore another one; or heal this one: `vmkeep vault repair {vault}`. If it was healed since, `vmkeep vault check \
         {vault}` says so"
    );
    Err(Fault::permanent(codes::VAULT_DAMAGED, DOING, backup.to_string(), hurt.join("; ")).remedy(remedy))
}

/// What a check has found to be lost of an image.
fn words(hurt: &Hurt) -> String {
    let shown = hurt.ranges.iter().take(SHOWN).map(|(first, end)| format!("{first}..{end}"));
    let mut text = format!("of {} bytes {} are lost", hurt.image, shown.collect::<Vec<_>>().join(", "));
    if let Some(more) = hurt.ranges.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        text.push_str(&format!(", and {more} ranges more"));
    }
    if hurt.open_ended {
        text.push_str(", and perhaps more");
    }
    text
}

/// Whether the definition may be used. What lies in an encrypted vault was written by somebody who has its key; in one
/// without encryption whoever can write there may have written it.
pub(super) fn harmless(
    opened: &Opened,
    trusted: bool,
    definition: &Definition,
    held: Holds<'_>,
) -> Result<(), Fault> {
    if trusted || opened.vault.header().cipher != Cipher::None {
        return Ok(());
    }
    reaches_nowhere("use a definition from a vault without encryption", definition, held)
}

/// At most how many bytes each disk takes, in the manifest's order.
pub(super) async fn weights(opened: &Opened, vault: &str, manifest: &Manifest) -> Result<Vec<u64>, Fault> {
    let failed = |error: VaultError| fault("see how much room the disks take", &vault, &error);
    let index = Box::pin(Index::load(&opened.vault, opened.cache.as_deref())).await.map_err(failed)?;
    let ids = opened.vault.ids(manifest.domain);
    let fetcher = Fetcher::new(&opened.vault, ids, Arc::new(index), opened.cache.clone(), false);
    let mut weights = Vec::with_capacity(manifest.disks.len());
    for disk in &manifest.disks {
        weights.push(Box::pin(most(&fetcher, &disk.image)).await.map_err(failed)?);
    }
    Ok(weights)
}

impl Facts {
    /// What differs from when the plan was made, if anything does. The lease is there by now.
    pub(super) async fn differ(
        &self,
        world: &World,
        places: &Places,
        vaults: &dyn Vaults,
    ) -> Result<Option<String>, Fault> {
        let found = async {
            let opened = reader::open(vaults, &self.vault, self.id).await?;
            manifest(&opened, &self.vault, (self.of, self.backup), self.unchecked).await
        };
        match found.await {
            Ok(now) if roots(&now) == self.roots && hash(&now.definition) == self.definition => {}
            Ok(_) => return Ok(Some("the backup's manifest has changed".to_owned())),
            Err(fault) if fault.class == Class::Transient => return Err(fault),
            Err(fault) => return Ok(Some(fault.to_string())),
        }
        no_longer_free(world, places, &self.domain, &self.free).await
    }
}

/// A manifest that says what no writer says.
pub(super) fn mismatch(manifest: &Manifest, cause: impl std::fmt::Display) -> Fault {
    let code: Code = codes::MANIFEST_MISMATCH;
    Fault::permanent(code, "read the backup's manifest", manifest.backup.to_string(), cause)
}

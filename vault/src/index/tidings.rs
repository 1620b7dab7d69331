//! What is bad, and what will be deleted: `damage/` and `condemned/`.

use std::collections::HashSet;

use futures_util::StreamExt;
use serde::{Deserialize, Serialize};

use super::AT_ONCE;
use crate::codec;
use crate::error::VaultError;
use crate::ids::{BackupId, BlobId, DomainId, LeaseId, MarkId, PackId, RunId};
use crate::names::{Area, ObjectName};
use crate::vault::Vault;

/// What a collection will delete. A condemned name is never reprieved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condemnation {
    /// Manifests.
    pub backups: Vec<(DomainId, BackupId, LeaseId)>,
    /// Packs.
    pub packs: Vec<(Packed, PackId)>,
    /// Runs.
    pub runs: Vec<RunId>,
    /// Older condemnations that this one takes over.
    pub takes_over: Vec<LeaseId>,
}

/// What is in a pack, as a condemnation spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packed {
    /// Chunks.
    Data,
    /// Nodes.
    Tree,
}

impl From<Area> for Packed {
    fn from(area: Area) -> Self {
        match area {
            Area::Data => Self::Data,
            Area::Tree => Self::Tree,
        }
    }
}

impl From<Packed> for Area {
    fn from(packed: Packed) -> Self {
        match packed {
            Packed::Data => Self::Data,
            Packed::Tree => Self::Tree,
        }
    }
}

/// All condemnations. One that cannot be read is an error: a writer that does not know what is condemned must not go on.
///
/// # Errors
/// That, or what the backend could not do.
pub async fn condemnations(vault: &Vault) -> Result<Vec<(LeaseId, Condemnation)>, VaultError> {
    let mut all = Vec::new();
    for (name, _) in vault.list("condemned/").await? {
        let ObjectName::Condemned(lease) = name else { continue };
        // One that was listed and is gone: its collection has ended since.
        if let Some(object) = vault.get(&name).await? {
            all.push((lease, codec::decode(vault.keys(), &name, &object)?));
        }
    }
    Ok(all)
}

/// A place that was found bad, or missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BadPlace {
    /// The pack.
    pub pack: PackId,
    /// Where in it.
    pub offset: u32,
    /// What should be there.
    pub id: BlobId,
}

#[derive(Serialize, Deserialize)]
struct Report {
    places: Vec<BadPlace>,
}

/// All places that were found bad.
#[derive(Debug, Default)]
pub struct Damage {
    places: HashSet<BadPlace>,
}

impl Damage {
    /// Reads all reports. One that cannot be read is passed over: what it says will be found again.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn load(vault: &Vault) -> Result<Self, VaultError> {
        let names: Vec<ObjectName> = vault.list("damage/").await?.into_iter().map(|(name, _)| name).collect();
        let mut read = futures_util::stream::iter(names)
            .map(|name| async move {
                let object = vault.get(&name).await?;
                Ok::<_, VaultError>(
                    object.map(|object| codec::decode::<Report>(vault.keys(), &name, &object)),
                )
            })
            .buffer_unordered(AT_ONCE);
        let mut places = HashSet::new();
        while let Some(report) = read.next().await {
            match report? {
                Some(Ok(report)) => places.extend(report.places),
                Some(Err(error)) => tracing::warn!(%error, "a report of damage cannot be read"),
                None => {}
            }
        }
        Ok(Self { places })
    }

    /// Whether a blob's place was found bad.
    #[must_use]
    pub fn has(&self, pack: PackId, offset: u32, id: BlobId) -> bool {
        self.places.contains(&BadPlace { pack, offset, id })
    }

    /// Takes one in.
    pub fn note(&mut self, bad: BadPlace) {
        self.places.insert(bad);
    }

    /// Packs of which some place is bad.
    #[must_use]
    pub fn packs(&self) -> HashSet<PackId> {
        self.places.iter().map(|bad| bad.pack).collect()
    }

    /// All of them.
    pub fn places(&self) -> impl Iterator<Item = &BadPlace> {
        self.places.iter()
    }
}

/// The reports of damage, by name, with the packs that they are about. One that cannot be read is left out.
///
/// # Errors
/// What the backend could not do.
pub async fn reports(vault: &Vault) -> Result<Vec<(ObjectName, HashSet<PackId>)>, VaultError> {
    let mut all = Vec::new();
    for (name, _) in vault.list("damage/").await? {
        let Some(object) = vault.get(&name).await? else { continue };
        if let Ok(report) = codec::decode::<Report>(vault.keys(), &name, &object) {
            all.push((name, report.places.into_iter().map(|bad| bad.pack).collect()));
        }
    }
    Ok(all)
}

/// Reports bad places: from now on, whoever begins treats them as absent.
///
/// # Errors
/// What the backend could not do.
pub async fn report_damage(vault: &Vault, places: Vec<BadPlace>) -> Result<(), VaultError> {
    if places.is_empty() {
        return Ok(());
    }
    let name = ObjectName::Damage(MarkId::random()?);
    let object = codec::encode(vault.keys(), &name, &Report { places })?;
    vault.put(&name, object).await
}

//! The backups that are there, with what marks say of them (`FORMAT.md`, §2, §5 and §6).

use std::collections::BTreeMap;

use futures_util::StreamExt;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::codec;
use crate::error::VaultError;
use crate::header::FORMAT;
use crate::ids::{BackupId, DomainId, LeaseId, MarkId};
use crate::manifest::Manifest;
use crate::marks::Marks;
use crate::names::{MarkKind, ObjectName};
use crate::vault::Vault;

const AT_ONCE: usize = 64;

/// Chunks of an image that have no good place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hurt {
    /// The disk's target, or the stream's name.
    pub image: String,
    /// Ranges of bytes, first and end.
    pub ranges: Vec<(u64, u64)>,
    /// Whether more may be bad: a node is, so what is below cannot be named.
    pub open_ended: bool,
}

/// What a mark says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// When it was put, by the clock of who did.
    pub at: Timestamp,
    /// Who, for people.
    pub by: String,
    /// What is bad, of `hurt`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hurt: Vec<Hurt>,
    /// When the reading began that ended at `at`, of `verified`. Older releases did not say it: they read all in one run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The protection that ends, of `unprotect`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends: Option<MarkId>,
}

impl Mark {
    /// One that says nothing more.
    #[must_use]
    pub fn new(at: Timestamp, by: &str) -> Self {
        Self { at, by: by.to_owned(), hurt: Vec::new(), since: None, ends: None }
    }
}

/// Puts a mark on a backup.
///
/// # Errors
/// If this key may not sign what must be signed, or what the backend could not do.
pub async fn put_mark(
    vault: &Vault,
    backup: BackupId,
    kind: MarkKind,
    mark: &Mark,
) -> Result<MarkId, VaultError> {
    let id = MarkId::random()?;
    let name = ObjectName::Mark(backup, kind, id);
    vault.put(&name, codec::encode(vault.keys(), &name, mark)?).await?;
    Ok(id)
}

/// A manifest that is there.
#[derive(Debug)]
pub struct Backup {
    /// The domain.
    pub domain: DomainId,
    /// The lease that it was put under.
    pub lease: LeaseId,
    /// What it says; or why it cannot be read.
    pub manifest: Result<Manifest, VaultError>,
}

/// The backups of a vault, as they were listed: manifests first, then marks.
#[derive(Debug, Default)]
pub struct Backups {
    manifests: BTreeMap<BackupId, Vec<Backup>>,
    marks: Marks,
}

impl Backups {
    /// Lists and reads all manifests, of one domain or of all; lists all marks.
    ///
    /// # Errors
    /// What the backend could not do. A manifest that cannot be read is told beside the others.
    pub async fn load(vault: &Vault, domain: Option<DomainId>) -> Result<Self, VaultError> {
        let prefix = domain.map_or_else(|| "backups/".to_owned(), |domain| format!("backups/{domain}/"));
        let names = names(vault, &prefix).await?;
        let mut all = Self { manifests: BTreeMap::new(), marks: Marks::list(vault).await? };
        all.read(vault, names).await?;
        if domain.is_none() && !all.missing().is_empty() {
            // Committed and checked between the two lists, or gone: the next list of manifests tells.
            let names = names_of(vault, &prefix, &all.missing()).await?;
            all.read(vault, names).await?;
        }
        Ok(all)
    }

    async fn read(&mut self, vault: &Vault, names: Vec<ObjectName>) -> Result<(), VaultError> {
        let mut read = futures_util::stream::iter(names)
            .map(|name| async move { Ok::<_, VaultError>((vault.get(&name).await?, name)) })
            .buffer_unordered(AT_ONCE);
        while let Some(one) = read.next().await {
            let (object, name) = one?;
            // Deleted since it was listed: it is not there.
            let (Some(object), ObjectName::Manifest(domain, backup, lease)) = (object, &name) else {
                continue;
            };
            let manifest = decode(vault, &name, &object);
            let one = Backup { domain: *domain, lease: *lease, manifest };
            self.manifests.entry(*backup).or_default().push(one);
        }
        Ok(())
    }

    /// Each backup with the manifest to read it by: two of one backup are the same, and one that cannot be read does not
    /// hide the other.
    pub fn iter(&self) -> impl Iterator<Item = (BackupId, &Backup)> {
        self.manifests.iter().filter_map(|(id, all)| {
            Some((*id, all.iter().find(|one| one.manifest.is_ok()).or_else(|| all.first())?))
        })
    }

    /// A backup.
    #[must_use]
    pub fn get(&self, backup: BackupId) -> Option<&Backup> {
        let all = self.manifests.get(&backup)?;
        all.iter().find(|one| one.manifest.is_ok()).or_else(|| all.first())
    }

    /// Whether a backup has a mark of this kind.
    #[must_use]
    pub fn has(&self, backup: BackupId, kind: MarkKind) -> bool {
        self.marks(backup).any(|(found, _)| found == kind)
    }

    /// Whether all of a backup was read and found good since it was put, and nothing was found bad since then.
    #[must_use]
    pub fn is_verified(&self, backup: BackupId) -> bool {
        self.has(backup, MarkKind::Verified) && !self.has(backup, MarkKind::Hurt)
    }

    /// The marks of a backup.
    pub fn marks(&self, backup: BackupId) -> impl Iterator<Item = (MarkKind, MarkId)> {
        self.marks.of(backup)
    }

    /// All marks, as they were listed.
    #[must_use]
    pub fn all_marks(&self) -> &Marks {
        &self.marks
    }

    /// All manifests that are there, with those that say the same as another.
    pub fn all_manifests(&self) -> impl Iterator<Item = (BackupId, &Backup)> {
        self.manifests.iter().flat_map(|(id, all)| all.iter().map(|one| (*id, one)))
    }

    /// Backups that were checked once and whose manifest is not there, although nobody pruned them.
    #[must_use]
    pub fn missing(&self) -> Vec<BackupId> {
        let gone = |backup: &&BackupId| {
            !self.manifests.contains_key(backup)
                && self.has(**backup, MarkKind::Checked)
                && !self.has(**backup, MarkKind::Prune)
        };
        self.marks.backups().filter(gone).copied().collect()
    }
}

async fn names(vault: &Vault, prefix: &str) -> Result<Vec<ObjectName>, VaultError> {
    Ok(vault.list(prefix).await?.into_iter().map(|(name, _)| name).collect())
}

/// The manifests of some backups.
async fn names_of(vault: &Vault, prefix: &str, of: &[BackupId]) -> Result<Vec<ObjectName>, VaultError> {
    let mut names = names(vault, prefix).await?;
    names.retain(|name| matches!(name, ObjectName::Manifest(_, backup, _) if of.contains(backup)));
    Ok(names)
}

/// Reads a manifest.
///
/// # Errors
/// If it is damaged, or newer than this program can read.
pub fn decode(vault: &Vault, name: &ObjectName, object: &bytes::Bytes) -> Result<Manifest, VaultError> {
    #[derive(Deserialize)]
    struct Preamble {
        min_reader: u32,
    }
    // Twice, so that a manifest of a later form is said to be newer and not damaged.
    let preamble: Preamble = codec::decode(vault.keys(), name, object)?;
    if preamble.min_reader > FORMAT {
        return Err(VaultError::Newer {
            object: name.to_string(),
            found: preamble.min_reader,
            known: FORMAT,
        });
    }
    let manifest: Manifest = codec::decode(vault.keys(), name, object)?;
    let ids = vault.ids(manifest.domain);
    if manifest.name() != *name
        || !manifest.images().iter().all(|(_, leaves, image)| image.is_sound(&ids, *leaves))
    {
        return Err(VaultError::damaged(name, "it is another's, or a root does not fit its image"));
    }
    Ok(manifest)
}

/// Reads a mark.
///
/// # Errors
/// If it is damaged or not signed as it must be, or what the backend could not do.
pub async fn read_mark(
    vault: &Vault,
    backup: BackupId,
    kind: MarkKind,
    mark: MarkId,
) -> Result<Option<Mark>, VaultError> {
    let name = ObjectName::Mark(backup, kind, mark);
    vault.get(&name).await?.map(|object| codec::decode(vault.keys(), &name, &object)).transpose()
}

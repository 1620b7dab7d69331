//! A backup, from its lease to its commit (`FORMAT.md`, §5).
//!
//! [`Session::begin`] puts the lease and then lists, in the order that the protocol relies on. Images are written one after
//! the other; [`Session::prepare`] makes all of it durable and gives the manifest's bytes, which the caller's journal must
//! hold before [`Session::commit`] puts them. Memory goes with what is in flight (about 100 MiB at most), not with the image.

mod extents;
mod image;
mod proof;
pub(crate) mod resume;
mod sample;
pub(crate) mod store;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

pub use extents::{Extent, Parts, Source};
pub use image::Written;
pub use proof::proof_of;
pub use store::{Log, NoLog, Stored};

use crate::backups::{self, Backups, Mark};
use crate::blob::BlobType;
use crate::codec;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::{CHUNK, Cipher, FORMAT};
use crate::ids::{BackupId, BlobId, DomainId, LeaseId, RunId};
use crate::index::Index;
use crate::keys::IdKeys;
use crate::lease::{self, Holder, Lease};
use crate::manifest::Manifest;
use crate::names::{MarkKind, ObjectName};
use crate::tree::{Tree, chunks};
use crate::vault::Vault;
use crate::{features, leaves, mutation};
use store::Store;

/// How a session is to be.
#[derive(Clone)]
pub struct Options {
    /// Who it is, for people.
    pub holder: Holder,
    /// A folder for copies of the index.
    pub folder: Option<PathBuf>,
    /// Who writes down what must be known before it is put.
    pub log: Arc<dyn Log>,
    /// A session of a process that died, to go on with.
    pub resume: Option<Resume>,
}

impl Default for Options {
    fn default() -> Self {
        Self { holder: Holder::default(), folder: None, log: Arc::new(NoLog), resume: None }
    }
}

/// What is known of a session whose process died.
#[derive(Clone, Debug)]
pub struct Resume {
    /// Its lease.
    pub lease: LeaseId,
    /// Runs that were named and of which nobody knows whether they were put.
    pub in_flight: Vec<RunId>,
}

/// A backup that is being made.
pub struct Session {
    vault: Vault,
    domain: DomainId,
    ids: IdKeys,
    lease: Lease,
    fetcher: Fetcher,
    index: Arc<Index>,
    backups: Backups,
    bad: HashSet<BlobId>,
    /// Whether something that the manifest needs may be damaged in a way that was known before: it was written by a session
    /// that is gone, or has not been written again since it was found.
    doubtful: bool,
    store: Store,
    holder: Holder,
    /// Whether an image was not written to its end: blobs count as there that were never put.
    torn: bool,
}

/// A backup that another may be based on.
#[derive(Clone, Debug)]
pub struct Parent {
    /// What it is.
    pub manifest: Manifest,
    /// Ranges of bytes of its images that must be read from the source, changed or not: their chunks are damaged.
    pub reread: BTreeMap<String, Vec<Range<u64>>>,
}

/// What a commit needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The manifest's name.
    pub name: ObjectName,
    /// Its bytes. Any put of it has these.
    pub object: Bytes,
}

/// Whether a backup is ready to be committed.
#[derive(Clone, Debug)]
pub enum Readiness {
    /// It is.
    Ready(Prepared),
    /// What it reuses was found damaged meanwhile: these ranges of bytes of its images must be written again, each image
    /// with the tree that it has now as its parent.
    Damaged(BTreeMap<String, Vec<Range<u64>>>),
    /// The lease was revoked: everything must be looked at again, which settling does.
    Revoked,
}

/// How a commit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The backup is there and will be kept.
    Checked,
    /// The manifest was put, but the lease was revoked: it must be settled.
    Revoked,
}

impl Session {
    /// Puts the lease, or goes on with one, and lists what is there.
    ///
    /// # Errors
    /// If the vault may only be read, a lease to go on with is over, a condemnation cannot be read, or what the backend
    /// could not do.
    pub async fn begin(vault: &Vault, domain: DomainId, options: Options) -> Result<Self, VaultError> {
        vault.writable()?;
        let lease = match &options.resume {
            None => Lease::begin(vault, &options.holder).await?,
            Some(resume) => Lease::resume(vault, resume.lease).await?,
        };
        match Box::pin(Self::list(vault, domain, &options)).await {
            Ok((index, backups)) => {
                Box::pin(Self::start(vault, domain, options, lease, index, backups)).await
            }
            Err(error) => {
                // Nothing was put under it, but by one that is resumed.
                if options.resume.is_none() {
                    lease.end().await?;
                }
                Err(error)
            }
        }
    }

    async fn list(
        vault: &Vault,
        domain: DomainId,
        options: &Options,
    ) -> Result<(Arc<Index>, Backups), VaultError> {
        features::check_writer(vault).await?;
        let index = Arc::new(Index::load(vault, options.folder.as_deref()).await?);
        Ok((index, Backups::load(vault, Some(domain)).await?))
    }

    async fn start(
        vault: &Vault,
        domain: DomainId,
        options: Options,
        lease: Lease,
        index: Arc<Index>,
        backups: Backups,
    ) -> Result<Self, VaultError> {
        let ids = vault.ids(domain);
        let fetcher = Fetcher::new(vault, ids.clone(), index.clone(), options.folder.clone(), true);
        let lost = options.resume.map(|resume| resume.in_flight);
        let resumed = lost.is_some();
        let lost = lost.unwrap_or_default();
        for run in &lost {
            index.void(*run);
        }
        let bad = index.damaged_ids();
        let mut store = Store::new(vault, index.clone(), lease.id(), options.log, lost);
        if resumed {
            Box::pin(resume::take_up(vault, &index, lease.id(), &mut store)).await?;
        }
        let holder = options.holder;
        let vault = vault.clone();
        let doubtful = resumed;
        Ok(Self {
            vault,
            domain,
            ids,
            lease,
            fetcher,
            index,
            backups,
            bad,
            doubtful,
            store,
            holder,
            torn: false,
        })
    }

    /// Who writes down from now on what must be known before it is put.
    pub fn log_to(&mut self, log: Arc<dyn Log>) {
        self.store.log_to(log);
    }

    /// Its lease.
    #[must_use]
    pub fn lease(&self) -> LeaseId {
        self.lease.id()
    }

    /// Whether the vault is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.vault.header().cipher != Cipher::None
    }

    /// The keys of its ids.
    #[must_use]
    pub fn ids(&self) -> &IdKeys {
        &self.ids
    }

    /// The domain's backups, as they were listed after the lease was put.
    #[must_use]
    pub fn backups(&self) -> &Backups {
        &self.backups
    }

    /// The index, as it was listed.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// What was put so far.
    #[must_use]
    pub fn stored(&self) -> Stored {
        self.store.stored()
    }

    /// A manifest of this session's, to be filled in.
    #[must_use]
    pub fn manifest(&self, backup: BackupId, taken: Timestamp) -> Manifest {
        Manifest::new(self.domain, backup, self.lease.id(), taken, self.vault.header_bytes())
    }

    /// A backup to base this one on; or why it cannot be.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn parent(&self, backup: BackupId) -> Result<Result<Parent, String>, VaultError> {
        let no = |why: &str| Ok(Err(format!("the backup {backup} {why}")));
        let Some(found) = self.backups.get(backup) else { return no("is not in the vault") };
        let manifest = match &found.manifest {
            Ok(manifest) => manifest.clone(),
            Err(error) => return no(&format!("cannot be read: {error}")),
        };
        if !self.backups.has(backup, MarkKind::Checked) {
            return no("was never checked");
        }
        let trusting = mutation::on("parents_prune");
        if self.backups.has(backup, MarkKind::Prune) && !trusting {
            return no("is to be pruned");
        }
        let doomed = |name: &(DomainId, BackupId, LeaseId)| name.1 == backup;
        if self.index.condemnations().iter().any(|(_, one)| one.backups.iter().any(doomed)) && !trusting {
            return no("is being deleted");
        }
        let mut reread = BTreeMap::new();
        for (name, _, image) in manifest.images() {
            match Box::pin(self.positions(image.tree())).await? {
                None => return no("has damage in its tree"),
                Some(ranges) if ranges.is_empty() => {}
                Some(ranges) => drop(reread.insert(name.to_owned(), ranges)),
            }
        }
        Ok(Ok(Parent { manifest, reread }))
    }

    /// Ranges of bytes of a tree's chunks that have a damaged place and no usable one; nothing if a node cannot be read.
    async fn positions(&self, tree: Tree) -> Result<Option<Vec<Range<u64>>>, VaultError> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut lacking = HashSet::new();
        for id in &self.bad {
            let chunk = self.index.usable(BlobType::Data, *id).await?;
            if chunk.is_none() && self.index.usable(BlobType::Stream, *id).await?.is_none() {
                lacking.insert(*id);
            }
        }
        if lacking.is_empty() {
            return Ok(Some(ranges));
        }
        let total = chunks(tree.size);
        for start in (0..total).step_by(1 << 20) {
            let leaves = leaves::leaves(&self.fetcher, tree, start..start.saturating_add(1 << 20)).await?;
            if !leaves.lost.is_empty() {
                return Ok(None);
            }
            for (chunk, _) in leaves.chunks.iter().filter(|(_, id)| lacking.contains(id)) {
                let begin = chunk * u64::from(CHUNK);
                let end = (begin + u64::from(CHUNK)).min(tree.size);
                match ranges.last_mut() {
                    Some(last) if last.end == begin => last.end = end,
                    _ => ranges.push(begin..end),
                }
            }
        }
        Ok(Some(ranges))
    }

    /// Makes all that was written durable, looks for damage that was reported meanwhile, and gives the manifest's bytes.
    ///
    /// # Errors
    /// If the manifest is not of this session, or what the backend could not do.
    pub async fn prepare(&mut self, manifest: &Manifest) -> Result<Readiness, VaultError> {
        if manifest.lease != self.lease.id() || manifest.domain != self.domain || manifest.min_reader > FORMAT
        {
            return Err(VaultError::Contract("the manifest is not of this session".into()));
        }
        if self.torn {
            return Err(VaultError::Contract("an image of this session was not written to its end".into()));
        }
        Box::pin(self.store.flush()).await?;
        Box::pin(self.store.merge()).await?;
        self.index.refresh_damage().await?;
        let now = self.index.damaged_ids();
        if self.doubtful || !now.is_subset(&self.bad) {
            (self.bad, self.doubtful) = (now, true);
            let mut hurt = BTreeMap::new();
            for (name, _, image) in manifest.images() {
                match Box::pin(self.positions(image.tree())).await? {
                    None => drop(hurt.insert(name.to_owned(), std::iter::once(0..image.size).collect())),
                    Some(ranges) if ranges.is_empty() => {}
                    Some(ranges) => drop(hurt.insert(name.to_owned(), ranges)),
                }
            }
            if !hurt.is_empty() {
                return Ok(Readiness::Damaged(hurt));
            }
            self.doubtful = false;
        }
        if self.lease.is_revoked().await? {
            return Ok(Readiness::Revoked);
        }
        let name = manifest.name();
        let object = codec::encode(self.vault.keys(), &name, manifest)?;
        Ok(Readiness::Ready(Prepared { name, object }))
    }

    /// Puts the manifest: the commit. May be repeated, with the same bytes, when its answer was lost.
    ///
    /// # Errors
    /// What the backend could not do. Whether the manifest was put is then not known.
    pub async fn commit(&self, prepared: &Prepared) -> Result<Outcome, VaultError> {
        let ObjectName::Manifest(_, backup, _) = &prepared.name else {
            return Err(VaultError::Contract("what is committed is no manifest".into()));
        };
        self.vault.put(&prepared.name, prepared.object.clone()).await?;
        if self.lease.is_revoked().await? && !mutation::on("look_after_manifest") {
            return Ok(Outcome::Revoked);
        }
        let mark = Mark::new(Timestamp::now(), &self.holder.host);
        backups::put_mark(&self.vault, *backup, MarkKind::Checked, &mark).await?;
        Ok(Outcome::Checked)
    }

    /// Makes all that was written so far durable: an image that was written to its end need not be written again by whoever
    /// goes on with this session.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn make_durable(&mut self) -> Result<(), VaultError> {
        Box::pin(self.store.flush()).await
    }

    /// Makes what was put count although no backup comes of it, so that whoever begins next has no need to put it again. Only
    /// for a session whose source failed: after a put that failed it is not known what is there.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn keep(&mut self) -> Result<(), VaultError> {
        self.torn = true;
        Box::pin(self.store.flush()).await
    }

    /// Ends the lease, after the journal knows how it went, whether the backup was made or not. Where a run may still arrive
    /// of which nobody knows, the lease is revoked instead: then that run is void.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn end(mut self) -> Result<(), VaultError> {
        self.store.rest().await;
        if self.store.leaves_a_run() {
            return lease::revoke(&self.vault, self.lease.id(), &self.holder).await;
        }
        self.lease.end().await
    }
}

#[cfg(test)]
mod tests;

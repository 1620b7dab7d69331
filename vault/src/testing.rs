//! What tests of whole backups share: vaults in memory, images, and a sink that remembers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::backend::memory::Memory;
use crate::backend::{Backend, BackendError, BackendErrorKind, Listed};
use crate::backups::Backups;
use crate::blob::BlobType;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::{BackupId, DomainId};
use crate::index::Index;
use crate::manifest::{Disk, Image, Manifest};
use crate::read::{self, ReadReport, Sink};
use crate::vault::{Confirmed, Draft, Vault};
use crate::write::{Extent, Options, Outcome, Parts, Prepared, Readiness, Session, Written};

pub(crate) const C: usize = CHUNK as usize;
pub(crate) const DOMAIN: DomainId = DomainId::new([0xd0; 16]);

/// Memory whose next puts under a prefix fail, the first of them with its effect.
#[derive(Debug, Default)]
pub(crate) struct Flaky {
    pub(crate) memory: Memory,
    pub(crate) failing: AtomicU32,
    pub(crate) prefix: std::sync::Mutex<String>,
}

impl Flaky {
    pub(crate) fn fail(&self, prefix: &str, times: u32) {
        *self.prefix.lock().unwrap() = prefix.to_owned();
        self.failing.store(times, Ordering::Relaxed);
    }
}

#[async_trait]
impl Backend for Flaky {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        let hit = name.starts_with(&*self.prefix.lock().unwrap());
        if hit && self.failing.load(Ordering::Relaxed) > 0 {
            self.memory.put(name, bytes).await?;
            self.failing.fetch_sub(1, Ordering::Relaxed);
            let (place, name) = ("flaky".to_owned(), name.to_owned());
            return Err(BackendError {
                place,
                name,
                kind: BackendErrorKind::Transient,
                cause: "no answer".into(),
            });
        }
        self.memory.put(name, bytes).await
    }

    async fn get(
        &self,
        name: &str,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<Option<Bytes>, BackendError> {
        self.memory.get(name, range).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        self.memory.list(prefix).await
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        self.memory.delete(name).await
    }

    fn place(&self) -> &str {
        "flaky"
    }
}

pub(crate) struct Bench {
    pub(crate) vault: Vault,
    pub(crate) backend: Arc<Flaky>,
}

impl Bench {
    pub(crate) async fn new(encrypted: bool) -> Self {
        let backend = Arc::new(Flaky::default());
        let confirmed = if encrypted {
            let draft = Draft::encrypted(false).unwrap();
            draft.confirm(&draft.recovery_words().unwrap()).unwrap()
        } else {
            Confirmed::plain(false).unwrap()
        };
        let vault = confirmed.put(backend.clone(), None).await.unwrap();
        Self { vault, backend }
    }

    pub(crate) async fn session(&self) -> Session {
        Box::pin(Session::begin(&self.vault, DOMAIN, Options::default())).await.unwrap()
    }

    /// Names under a prefix.
    pub(crate) async fn names(&self, prefix: &str) -> Vec<String> {
        self.backend.list(prefix).await.unwrap().into_iter().map(|one| one.name).collect()
    }

    /// Bytes of all objects under a prefix.
    pub(crate) async fn size(&self, prefix: &str) -> u64 {
        self.backend.list(prefix).await.unwrap().iter().map(|one| one.size).sum()
    }

    /// Flips a byte of an object.
    pub(crate) async fn flip(&self, name: &str, at: usize) {
        let mut bytes = self.backend.get(name, None).await.unwrap().unwrap().to_vec();
        bytes[at] ^= 0x20;
        self.backend.put(name, bytes.into()).await.unwrap();
    }

    /// A committed full backup.
    pub(crate) async fn full(&self, image: &[u8]) -> (BackupId, Written) {
        Box::pin(self.backup(image.len(), vec![Extent::Data(image.to_vec().into())], None)).await
    }

    /// A committed backup of one disk.
    pub(crate) async fn backup(
        &self,
        size: usize,
        parts: Vec<Extent>,
        parent: Option<BackupId>,
    ) -> (BackupId, Written) {
        let id = BackupId::now();
        (id, Box::pin(backup_as(&self.vault, id, size, parts, parent)).await)
    }

    pub(crate) async fn manifest(&self, backup: BackupId) -> Manifest {
        let all = Backups::load(&self.vault, None).await.unwrap();
        all.get(backup).unwrap().manifest.as_ref().unwrap().clone()
    }

    pub(crate) async fn fetcher(&self) -> Fetcher {
        let index = Arc::new(Index::load(&self.vault, None).await.unwrap());
        Fetcher::new(&self.vault, self.vault.ids(DOMAIN), index, None, true)
    }

    pub(crate) async fn try_read(
        &self,
        image: &Image,
        partial: bool,
    ) -> Result<(Vec<u8>, ReadReport), crate::error::VaultError> {
        let mut sink = Remembering(vec![0x55; image.size as usize]);
        let ids = self.vault.ids(DOMAIN);
        let fetcher = self.fetcher().await;
        let report =
            read::read_image(&self.vault, &ids, &fetcher, BlobType::Data, image, &mut sink, partial).await?;
        Ok((sink.0, report))
    }

    pub(crate) async fn restore(&self, backup: BackupId) -> Vec<u8> {
        let manifest = self.manifest(backup).await;
        self.try_read(&manifest.disks[0].image, false).await.unwrap().0
    }
}

/// A committed backup of one disk in any vault, under a given id.
pub(crate) async fn backup_as(
    vault: &Vault,
    id: BackupId,
    size: usize,
    parts: Vec<Extent>,
    parent: Option<BackupId>,
) -> Written {
    let mut session = Box::pin(Session::begin(vault, DOMAIN, Options::default())).await.unwrap();
    let tree = match parent {
        None => None,
        Some(parent) => Some(session.parent(parent).await.unwrap().unwrap().manifest.disks[0].image.tree()),
    };
    let source = &mut Parts::new(parts);
    let written = Box::pin(session.write_image(source, size as u64, BlobType::Data, tree)).await.unwrap();
    let manifest = manifest_of(&session, id, &written);
    let Readiness::Ready(prepared) = session.prepare(&manifest).await.unwrap() else { panic!("not ready") };
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
    session.end().await.unwrap();
    written
}

/// The image of a backup's only disk, read from any vault.
pub(crate) async fn restored(vault: &Vault, backup: BackupId) -> Vec<u8> {
    let all = Backups::load(vault, None).await.unwrap();
    let image = all.get(backup).unwrap().manifest.as_ref().unwrap().disks[0].image;
    let index = Arc::new(Index::load(vault, None).await.unwrap());
    let fetcher = Fetcher::new(vault, vault.ids(DOMAIN), index, None, true);
    let mut sink = Remembering(vec![0x55; image.size as usize]);
    let ids = vault.ids(DOMAIN);
    read::read_image(vault, &ids, &fetcher, BlobType::Data, &image, &mut sink, false).await.unwrap();
    sink.0
}

/// A manifest of one disk, ready to be committed.
pub(crate) async fn prepare(session: &mut Session, written: &Written) -> (BackupId, Prepared) {
    let manifest = manifest(session, written);
    match session.prepare(&manifest).await.unwrap() {
        Readiness::Ready(prepared) => (manifest.backup, prepared),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn manifest(session: &Session, written: &Written) -> Manifest {
    manifest_of(session, BackupId::now(), written)
}

pub(crate) fn manifest_of(session: &Session, backup: BackupId, written: &Written) -> Manifest {
    let mut manifest = session.manifest(backup, Timestamp::UNIX_EPOCH);
    manifest.disks.push(Disk {
        dirty: written.read,
        stored: written.stored,
        ..Disk::new("vda", written.image, "raw")
    });
    manifest
}

/// Bytes that do not shrink.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    rng.fill(&mut bytes);
    bytes
}

/// What a source says of an image whose parent was another.
pub(crate) fn difference(old: &[u8], new: &[u8]) -> Vec<Extent> {
    let common = if old.len() == new.len() { new.len() } else { old.len().min(new.len()) / C * C };
    let mut parts = Vec::new();
    for at in (0..new.len()).step_by(C) {
        let end = (at + C).min(new.len());
        let piece = &new[at..end];
        parts.push(match piece {
            _ if end <= common && old[at..end] == *piece => Extent::Unchanged(piece.len() as u64),
            _ if piece.iter().all(|byte| *byte == 0) => Extent::Zero(piece.len() as u64),
            _ => Extent::Data(piece.to_vec().into()),
        });
    }
    parts
}

struct Remembering(Vec<u8>);

#[async_trait]
impl Sink for Remembering {
    async fn write(&mut self, offset: u64, bytes: Bytes) -> std::io::Result<()> {
        self.0[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        Ok(())
    }

    async fn zero(&mut self, offset: u64, length: u64) -> std::io::Result<()> {
        self.0[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
}

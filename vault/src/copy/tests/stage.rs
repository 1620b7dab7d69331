//! A way to a vault on which things happen, and somebody who does them.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::Notify;

use super::*;
use crate::backend::{BackendError, Listed};
use crate::ids::{BlobId, RunId};
use crate::index::tidings::{BadPlace, report_damage};

/// A way to a vault: it notes what is got, may break at one call for good, or hang at one.
#[derive(Debug)]
pub(super) struct Way {
    inner: Arc<dyn Backend>,
    /// Calls until it breaks.
    left: AtomicU64,
    /// Whether the put at which it breaks has its effect.
    late: bool,
    broke: AtomicBool,
    gets: Mutex<Vec<(String, Option<u64>)>>,
    revoke: Mutex<Option<Vault>>,
    hang: Mutex<Option<String>>,
    pub(super) hung: Notify,
}

impl Way {
    pub(super) fn new(inner: Arc<dyn Backend>) -> Self {
        Self::breaking(inner, u64::MAX, false)
    }

    pub(super) fn breaking(inner: Arc<dyn Backend>, after: u64, late: bool) -> Self {
        Self {
            inner,
            left: AtomicU64::new(after),
            late,
            broke: AtomicBool::new(false),
            gets: Mutex::default(),
            revoke: Mutex::default(),
            hang: Mutex::default(),
            hung: Notify::new(),
        }
    }

    /// The first put under a prefix is never answered.
    pub(super) fn hang_at(&self, prefix: &str) {
        *self.hang.lock().unwrap() = Some(prefix.to_owned());
    }

    /// The lease of the next manifest is revoked as soon as it was put.
    pub(super) fn revoke_at_commit(&self, vault: &Vault) {
        *self.revoke.lock().unwrap() = Some(vault.clone());
    }

    pub(super) fn broke(&self) -> bool {
        self.broke.load(Ordering::Relaxed)
    }

    /// How much was asked for at once of objects under a prefix.
    pub(super) fn gets(&self, prefix: &str) -> Vec<Option<u64>> {
        let gets = self.gets.lock().unwrap();
        gets.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, length)| *length).collect()
    }

    /// Whether a call goes through; the one that it breaks at.
    fn pass(&self, name: &str) -> Result<(), (bool, BackendError)> {
        let less = |left: u64| left.checked_sub(1);
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            return Ok(());
        }
        let first = !self.broke.swap(true, Ordering::Relaxed);
        Err((first, BackendError::new("way", name, crate::backend::BackendErrorKind::Transient, "broken")))
    }
}

#[async_trait]
impl Backend for Way {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        if let Err((first, error)) = self.pass(name) {
            if first && self.late {
                self.inner.put(name, bytes).await?;
            }
            return Err(error);
        }
        let hangs = self.hang.lock().unwrap().take_if(|prefix| name.starts_with(&**prefix)).is_some();
        if hangs {
            self.hung.notify_one();
            std::future::pending::<()>().await;
        }
        self.inner.put(name, bytes).await?;
        if let Ok(ObjectName::Manifest(_, _, lease)) = name.parse() {
            let revoke = self.revoke.lock().unwrap().take();
            if let Some(vault) = revoke {
                lease::revoke(&vault, lease, &Holder::default()).await.unwrap();
            }
        }
        Ok(())
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        self.pass(name).map_err(|(_, error)| error)?;
        let length = range.as_ref().map(|range| range.end - range.start);
        self.gets.lock().unwrap().push((name.to_owned(), length));
        self.inner.get(name, range).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        self.pass(prefix).map_err(|(_, error)| error)?;
        self.inner.list(prefix).await
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        self.pass(name).map_err(|(_, error)| error)?;
        self.inner.delete(name).await
    }

    fn place(&self) -> &str {
        "way"
    }
}

/// What somebody does once, while a backup is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    Nothing,
    RevokeBegun,
    RevokeWritten,
    RevokeCommit,
    /// Prunes a backup in the other vault, when another was copied.
    Prune(BackupId),
    /// Reports the place of a chunk as bad, when everything was written.
    Damage(BlobId),
}

/// Who is told how far a copy is, and does something then. The journal of its runs as well.
pub(super) struct Hook {
    vault: Vault,
    deed: Mutex<Deed>,
    begun: Mutex<Vec<LeaseId>>,
    pub(super) in_flight: Mutex<Vec<RunId>>,
    pub(super) fates: Mutex<Vec<(BackupId, Fate)>>,
}

impl Hook {
    pub(super) fn new(vault: &Vault, deed: Deed) -> Self {
        let (begun, in_flight, fates) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { vault: vault.clone(), deed: Mutex::new(deed), begun, in_flight, fates }
    }

    /// The leases of the sessions so far.
    pub(super) fn begun(&self) -> Vec<LeaseId> {
        self.begun.lock().unwrap().clone()
    }

    /// Whether it is time for a deed, which is done once.
    fn is_time(&self, deed: Deed) -> bool {
        let mut next = self.deed.lock().unwrap();
        let now = *next == deed;
        if now {
            *next = Deed::Nothing;
        }
        now
    }

    async fn revoke(&self) {
        let lease = *self.begun().last().unwrap();
        lease::revoke(&self.vault, lease, &Holder::default()).await.unwrap();
    }
}

#[async_trait]
impl Progress for Hook {
    async fn begun(&self, _: BackupId, lease: LeaseId) -> std::io::Result<()> {
        self.begun.lock().unwrap().push(lease);
        if self.is_time(Deed::RevokeBegun) {
            self.revoke().await;
        }
        Ok(())
    }

    async fn written(&self, _: BackupId, _: &str, _: &Written) -> std::io::Result<()> {
        if self.is_time(Deed::RevokeWritten) {
            self.revoke().await;
        }
        let deed = *self.deed.lock().unwrap();
        if let Deed::Damage(id) = deed
            && self.is_time(deed)
        {
            let index = Index::load(&self.vault, None).await.unwrap();
            let place = index.usable(BlobType::Data, id).await.unwrap().unwrap();
            let bad = BadPlace { pack: place.pack, offset: place.offset, id };
            report_damage(&self.vault, vec![bad]).await.unwrap();
        }
        Ok(())
    }

    async fn done(&self, backup: BackupId, fate: &Fate) -> std::io::Result<()> {
        self.fates.lock().unwrap().push((backup, fate.clone()));
        let deed = *self.deed.lock().unwrap();
        if let Deed::Prune(other) = deed
            && self.is_time(deed)
        {
            prune(&self.vault, other, "test").await.unwrap();
        }
        Ok(())
    }
}

#[async_trait]
impl Log for Hook {
    async fn run_named(&self, run: RunId) -> std::io::Result<()> {
        self.in_flight.lock().unwrap().push(run);
        Ok(())
    }

    async fn run_put(&self, run: RunId) -> std::io::Result<()> {
        self.in_flight.lock().unwrap().retain(|named| *named != run);
        Ok(())
    }
}

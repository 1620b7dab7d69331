//! Leases: who is using the vault (`FORMAT.md`, §7). Collectors wait for what was begun before they looked.
//!
//! A lease begins before its holder's first list, shows every five minutes that it is alive, and ends when its holder has
//! nothing in flight any more. It is never ended for a process that died, nor when it is merely dropped: a put may be on its
//! way. Anybody may revoke it at any time: that is always safe, and costs its holder a settlement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::codec;
use crate::error::VaultError;
use crate::ids::LeaseId;
use crate::names::{LeasePart, ObjectName};
use crate::vault::Vault;

/// How often a lease shows that it is alive.
pub const BEAT: Duration = Duration::from_secs(300);

/// What a lease says of its holder. For people, but for the last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The host's name.
    pub host: String,
    /// What for.
    pub purpose: String,
    /// Whether it collects. This is relied upon: two that collect are never both unrevoked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub collects: bool,
}

/// A lease that is held.
#[derive(Debug)]
pub struct Lease {
    id: LeaseId,
    vault: Vault,
    stop: watch::Sender<bool>,
    beats: JoinHandle<()>,
}

impl Lease {
    /// Puts a new one.
    ///
    /// # Errors
    /// What the backend could not do. It may then be there; nothing was begun under it, and a collector revokes it.
    pub async fn begin(vault: &Vault, holder: &Holder) -> Result<Self, VaultError> {
        let id = LeaseId::random()?;
        put(vault, id, LeasePart::Begun, holder).await?;
        Ok(Self::hold(vault, id, 0))
    }

    /// Goes on with one of a process that died, unless it is over.
    ///
    /// # Errors
    /// [`VaultError::Revoked`] if it is over or never began, or what the backend could not do.
    pub async fn resume(vault: &Vault, id: LeaseId) -> Result<Self, VaultError> {
        let parts = parts(vault, id).await?;
        if !parts.contains(&LeasePart::Begun)
            || parts.contains(&LeasePart::Ended)
            || parts.contains(&LeasePart::Revoked)
        {
            return Err(VaultError::Revoked { lease: id });
        }
        let beat = |part: &LeasePart| if let LeasePart::Beat(n) = part { Some(*n) } else { None };
        let next = parts.iter().filter_map(beat).max().map_or(0, |last| last.saturating_add(1));
        Ok(Self::hold(vault, id, next))
    }

    fn hold(vault: &Vault, id: LeaseId, next: u64) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let beating = vault.clone();
        let beats = tokio::spawn(async move {
            for n in next.. {
                tokio::select! {
                    () = tokio::time::sleep(BEAT) => {}
                    _ = stopped.changed() => return,
                }
                if let Err(error) = put(&beating, id, LeasePart::Beat(n), &Holder::default()).await {
                    tracing::warn!(%error, lease = %id, "the vault was not told that this lease is alive");
                }
            }
        });
        Self { id, vault: vault.clone(), stop, beats }
    }

    /// The lease.
    #[must_use]
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// Whether somebody has revoked it, as of now.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn is_revoked(&self) -> Result<bool, VaultError> {
        let name = ObjectName::Lease(self.id, LeasePart::Revoked);
        // By listing and not by reading: a mark that is damaged was put as well.
        Ok(self.vault.list(&name.to_string()).await?.iter().any(|(found, _)| *found == name))
    }

    /// Ends it. Only for who has nothing in flight any more.
    ///
    /// # Errors
    /// What the backend could not do; it is then as if its holder had died.
    pub async fn end(mut self) -> Result<(), VaultError> {
        self.stop.send_replace(true);
        // A beat may be in flight, and is no harm; but `ended` says that nothing is.
        (&mut self.beats).await?;
        put(&self.vault, self.id, LeasePart::Ended, &Holder::default()).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.beats.abort();
    }
}

async fn put(vault: &Vault, id: LeaseId, part: LeasePart, holder: &Holder) -> Result<(), VaultError> {
    let name = ObjectName::Lease(id, part);
    vault.put(&name, codec::encode(vault.keys(), &name, holder)?).await
}

/// The parts of a lease that are there.
///
/// # Errors
/// What the backend could not do.
pub async fn parts(vault: &Vault, id: LeaseId) -> Result<Vec<LeasePart>, VaultError> {
    let listed = vault.list(&format!("leases/{id}/")).await?;
    Ok(listed
        .into_iter()
        .filter_map(|(name, _)| match name {
            ObjectName::Lease(lease, part) if lease == id => Some(part),
            _ => None,
        })
        .collect())
}

/// What is there of a lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Whether it says who it is.
    pub begun: bool,
    /// The last time that it showed that it is alive.
    pub beat: Option<u64>,
    /// Whether its holder has nothing in flight any more.
    pub ended: bool,
    /// Whether nobody waits for it any more.
    pub revoked: bool,
}

impl Standing {
    /// Whether nobody has to wait for it.
    #[must_use]
    pub fn is_over(self) -> bool {
        self.ended || self.revoked
    }
}

/// All leases that are there.
///
/// # Errors
/// What the backend could not do.
pub async fn all(vault: &Vault) -> Result<BTreeMap<LeaseId, Standing>, VaultError> {
    let mut all: BTreeMap<LeaseId, Standing> = BTreeMap::new();
    for (name, _) in vault.list("leases/").await? {
        let ObjectName::Lease(lease, part) = name else { continue };
        let standing = all.entry(lease).or_default();
        match part {
            LeasePart::Begun => standing.begun = true,
            LeasePart::Beat(n) => standing.beat = standing.beat.max(Some(n)),
            LeasePart::Ended => standing.ended = true,
            LeasePart::Revoked => standing.revoked = true,
        }
    }
    Ok(all)
}

/// Whether a lease is a collector's. One that does not say so in a way that can be read counts as one.
///
/// # Errors
/// What the backend could not do.
pub async fn collects(vault: &Vault, lease: LeaseId) -> Result<bool, VaultError> {
    let name = ObjectName::Lease(lease, LeasePart::Begun);
    let Some(object) = vault.get(&name).await? else { return Ok(false) };
    Ok(codec::decode::<Holder>(vault.keys(), &name, &object).map_or(true, |holder| holder.collects))
}

/// Revokes a lease: nobody waits for it any more, and its holder will find out. Always safe.
///
/// # Errors
/// What the backend could not do.
pub async fn revoke(vault: &Vault, id: LeaseId, by: &Holder) -> Result<(), VaultError> {
    put(vault, id, LeasePart::Revoked, by).await
}

/// A lease that several tasks use.
pub type Shared = Arc<Lease>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::memory::Memory;
    use crate::vault::Confirmed;

    async fn vault() -> Vault {
        Confirmed::plain(false).unwrap().put(Arc::new(Memory::default()), None).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_shows_that_it_is_alive_until_it_ends() {
        let vault = vault().await;
        let lease = Lease::begin(&vault, &Holder::default()).await.unwrap();
        let id = lease.id();
        tokio::time::sleep(BEAT * 3 + BEAT / 2).await;
        lease.end().await.unwrap();
        tokio::time::sleep(BEAT * 3).await;
        let mut found = parts(&vault, id).await.unwrap();
        found.sort_unstable();
        let beats = [0, 1, 2].map(LeasePart::Beat);
        assert_eq!(found, [&[LeasePart::Begun][..], &beats, &[LeasePart::Ended]].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_dropped_does_not_end_and_can_be_resumed_with_growing_numbers() {
        let vault = vault().await;
        let lease = Lease::begin(&vault, &Holder::default()).await.unwrap();
        let id = lease.id();
        tokio::time::sleep(BEAT + BEAT / 2).await;
        drop(lease);
        tokio::time::sleep(BEAT * 3).await;
        let again = Lease::resume(&vault, id).await.unwrap();
        tokio::time::sleep(BEAT + BEAT / 2).await;
        let mut found = parts(&vault, id).await.unwrap();
        found.sort_unstable();
        assert_eq!(found, [LeasePart::Begun, LeasePart::Beat(0), LeasePart::Beat(1)]);
        again.end().await.unwrap();
        assert!(matches!(Lease::resume(&vault, id).await, Err(VaultError::Revoked { .. })));
    }

    #[tokio::test]
    async fn a_holder_finds_out_that_it_was_revoked() {
        let vault = vault().await;
        let (lease, other) = (
            Lease::begin(&vault, &Holder::default()).await.unwrap(),
            Lease::begin(&vault, &Holder::default()).await.unwrap(),
        );
        revoke(&vault, lease.id(), &Holder::default()).await.unwrap();
        assert!(lease.is_revoked().await.unwrap() && !other.is_revoked().await.unwrap());
        assert!(matches!(Lease::resume(&vault, lease.id()).await, Err(VaultError::Revoked { .. })));
        assert!(Lease::resume(&vault, LeaseId::random().unwrap()).await.is_err(), "one that never began");
    }
}

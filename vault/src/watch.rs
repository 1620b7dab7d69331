//! Waiting for leases (`FORMAT.md`, §7): who watches, and by which clock.
//!
//! A lease is over when it was ended or revoked, or has left. One of a process that died is never ended; whoever has itself
//! watched it for a day, on its own monotonic clock, without a sign of life, revokes it. A watch outlives a single collection:
//! a collector that finds another one at work goes away and comes again, and goes on watching then.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use crate::error::VaultError;
use crate::ids::LeaseId;
use crate::lease::{self, Holder, Lease, Standing};
use crate::vault::Vault;

/// How long a lease is watched without a sign of life before it is revoked.
pub const PATIENCE: Duration = Duration::from_secs(24 * 3600);
/// How often leases that are waited for are listed.
const LOOK: Duration = Duration::from_secs(60);

/// A clock that only runs forward, and somebody to wait by it.
#[async_trait]
pub trait Clock: Send + Sync + fmt::Debug {
    /// Time since some instant that is always the same for this process.
    fn now(&self) -> Duration;
    /// Waits for about this long.
    async fn pause(&self, length: Duration);
}

/// The host's.
#[derive(Debug)]
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Self {
        Self(Instant::now())
    }
}

#[async_trait]
impl Clock for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    async fn pause(&self, length: Duration) {
        tokio::time::sleep(length).await;
    }
}

/// What one process has seen of leases that are not over.
#[derive(Debug)]
pub struct Watch {
    clock: Arc<dyn Clock>,
    patience: Duration,
    seen: BTreeMap<LeaseId, (Option<u64>, Duration)>,
}

/// How a waiting ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waited {
    /// All leases that were there when it began are over.
    Over,
    /// It lasted too long: these are not.
    Still(BTreeSet<LeaseId>),
    /// The waiter's own lease was revoked.
    Revoked,
}

impl Default for Watch {
    fn default() -> Self {
        Self::new(Arc::new(Monotonic::default()), PATIENCE)
    }
}

impl Watch {
    /// By a clock, revoking what shows no sign of life for this long.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, patience: Duration) -> Self {
        Self { clock, patience, seen: BTreeMap::new() }
    }

    /// Takes a list of leases in, and revokes what was watched in vain for long enough. Gives those that are not over.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn look(
        &mut self,
        vault: &Vault,
        leases: &BTreeMap<LeaseId, Standing>,
        own: LeaseId,
        by: &Holder,
    ) -> Result<BTreeSet<LeaseId>, VaultError> {
        let now = self.clock.now();
        let alive: BTreeMap<LeaseId, Option<u64>> = leases
            .iter()
            .filter(|(lease, standing)| **lease != own && !standing.is_over())
            .map(|(lease, standing)| (*lease, standing.beat))
            .collect();
        self.seen.retain(|lease, _| alive.contains_key(lease));
        let mut still = BTreeSet::new();
        for (lease, beat) in alive {
            let seen = self.seen.entry(lease).or_insert((beat, now));
            if seen.0 != beat {
                *seen = (beat, now);
            }
            if now.saturating_sub(seen.1) >= self.patience {
                tracing::warn!(%lease, "a lease shows no sign of life and is revoked");
                lease::revoke(vault, lease, by).await?;
                self.seen.remove(&lease);
            } else {
                still.insert(lease);
            }
        }
        Ok(still)
    }

    /// Waits until every lease that is there now, but the waiter's own, is over.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn wait(
        &mut self,
        vault: &Vault,
        own: &Lease,
        by: &Holder,
        limit: Option<Duration>,
    ) -> Result<Waited, VaultError> {
        let begun = self.clock.now();
        let mut leases = lease::all(vault).await?;
        let mut waited_for = self.look(vault, &leases, own.id(), by).await?;
        loop {
            if leases.get(&own.id()).is_some_and(|standing| standing.revoked) {
                return Ok(Waited::Revoked);
            }
            if waited_for.is_empty() {
                return Ok(Waited::Over);
            }
            if limit.is_some_and(|limit| self.clock.now().saturating_sub(begun) >= limit) {
                return Ok(Waited::Still(waited_for));
            }
            self.clock.pause(LOOK).await;
            leases = lease::all(vault).await?;
            let still = self.look(vault, &leases, own.id(), by).await?;
            waited_for.retain(|lease| still.contains(lease));
        }
    }
}

#[cfg(test)]
mod tests;

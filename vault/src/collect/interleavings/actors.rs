//! Who is on the stage: writers, collectors, whoever prunes, protects and settles.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use jiff::Timestamp;

use super::stage::Seat;
use crate::blob::BlobType;
use crate::collect::{Collector, Policy, collect};
use crate::error::VaultError;
use crate::ids::BackupId;
use crate::lease::Holder;
use crate::marks::{self, Protection};
use crate::settle::{Settled, settle};
use crate::testing::{C, DOMAIN, manifest_of};
use crate::vault::Vault;
use crate::watch::{PATIENCE, Watch};
use crate::write::{Extent, Options, Outcome, Parts, Readiness, Session};

/// Chunks of an image.
pub(super) const CHUNKS: usize = 5;

/// What the actors know of each other's work.
#[derive(Default)]
pub(super) struct World {
    /// Backups that were begun, with their content.
    pub(super) backups: BTreeMap<BackupId, Vec<u8>>,
    /// Backups whose protection was said to stand.
    pub(super) protected: BTreeSet<BackupId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Write,
    Collect,
    Prune,
    Protect,
    Settle,
}

/// What an actor is to do, decided beforehand.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) act: Act,
    pub(super) backup: BackupId,
    pub(super) content: Vec<u8>,
    pub(super) parent: Option<(BackupId, Vec<u8>)>,
    pub(super) gives_up: bool,
}

pub(super) fn image(content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    content.iter().for_each(|value| bytes.extend_from_slice(&vec![*value; C]));
    bytes
}

pub(super) async fn play(
    vault: Vault,
    seat: Seat,
    world: Arc<Mutex<World>>,
    part: Part,
) -> Result<(), VaultError> {
    match part.act {
        Act::Write => Box::pin(write(&vault, &world, &part)).await,
        Act::Collect => {
            let watch = Watch::new(Arc::new(seat), PATIENCE);
            let mut collector = Collector::new(Holder::default(), None, Policy::default(), watch);
            Box::pin(collect(&vault, &mut collector, Timestamp::UNIX_EPOCH)).await.map(drop)
        }
        Act::Prune => marks::prune(&vault, part.backup, "x").await.map(drop),
        Act::Protect => {
            let protection = Box::pin(marks::protect(&vault, part.backup, &Holder::default())).await?;
            if matches!(protection, Protection::Stands(_)) {
                world.lock().unwrap().protected.insert(part.backup);
            }
            Ok(())
        }
        Act::Settle => Box::pin(settle_it(&vault, part.backup)).await,
    }
}

async fn settle_it(vault: &Vault, backup: BackupId) -> Result<(), VaultError> {
    match settle(vault, backup, &Holder::default(), None).await? {
        Settled::Checked | Settled::Absent | Settled::Pruned | Settled::Revoked => Ok(()),
        Settled::Lacks(_) => marks::prune(vault, backup, "x").await.map(drop),
    }
}

async fn write(vault: &Vault, world: &Mutex<World>, part: &Part) -> Result<(), VaultError> {
    let mut session = Session::begin(vault, DOMAIN, Options::default()).await?;
    let done = Box::pin(write_under(vault, &mut session, world, part)).await;
    session.end().await?;
    if done? == Some(Outcome::Revoked) { settle_it(vault, part.backup).await } else { Ok(()) }
}

async fn write_under(
    vault: &Vault,
    session: &mut Session,
    world: &Mutex<World>,
    part: &Part,
) -> Result<Option<Outcome>, VaultError> {
    let mut parent = None;
    if let Some((id, content)) = &part.parent
        && let Ok(found) = session.parent(*id).await?
        && found.reread.is_empty()
    {
        parent = Some((found.manifest.disks[0].image.tree(), content));
    }
    let extents = part.content.iter().enumerate().map(|(at, value)| match &parent {
        Some((_, before)) if before[at] == *value => Extent::Unchanged(C as u64),
        _ => Extent::Data(vec![*value; C].into()),
    });
    let source = &mut Parts::new(extents.collect());
    let size = (part.content.len() * C) as u64;
    let tree = parent.map(|(tree, _)| tree);
    let written = Box::pin(session.write_image(source, size, BlobType::Data, tree)).await?;
    world.lock().unwrap().backups.insert(part.backup, part.content.clone());
    let manifest = manifest_of(session, part.backup, &written);
    let prepared = match session.prepare(&manifest).await? {
        Readiness::Ready(prepared) => prepared,
        Readiness::Damaged(_) | Readiness::Revoked => return Ok(None),
    };
    if part.gives_up {
        return Ok(None);
    }
    for _ in 0..2 {
        // Its answer may be lost: the same bytes again.
        if let Ok(outcome) = session.commit(&prepared).await {
            return Ok(Some(outcome));
        }
    }
    marks::prune(vault, part.backup, "x").await?;
    Ok(None)
}

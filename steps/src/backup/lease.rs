//! `take-lease`, `release-lease`: the time during which this job uses the vault, and on what each disk is based.
//!
//! The lease comes before every look at the vault, so that nothing that is found then is collected before it ends. What a disk
//! is based on, the parent's root and the checkpoint since which QEMU tells changes, is taken from *one* manifest, never from
//! two: from the newest checked backup of this vault whose checkpoint libvirt still lists and that was read from this very file.
//! Newest by the manifests' own parents, since clocks are set.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use vmkeep_vault::backups::Backups;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{BackupId, LeaseId, VaultId};
use vmkeep_vault::lease;
use vmkeep_vault::manifest::{BackupKind, Disk, Image, Manifest};
use vmkeep_vault::names::MarkKind;
use vmkeep_vault::write::{NoLog, Session};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Fault, JobId, Step, StepContext, StepName, Verdict};

use super::disk::{BackupDisk, another};
use super::held::Sessions;
use super::left::LeftLeases;
use super::options::Asked;
use super::read::ReadDisks;
use crate::codes;
use crate::hypervisor::{DomainRef, Target};
use crate::snapshot::World;
use crate::vaults::{Opened, fault};

/// Takes a lease.
#[derive(Debug)]
pub struct TakeLease {
    pub(super) world: World,
    pub(super) sessions: Sessions,
    pub(super) left: Arc<LeftLeases>,
}

/// Ends it.
#[derive(Debug)]
pub struct ReleaseLease {
    pub(super) sessions: Sessions,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseInput {
    /// The vault's name.
    pub vault: String,
    /// The domain.
    pub domain: DomainRef,
    /// What was asked for.
    pub kind: Asked,
    /// The disks.
    pub disks: Vec<BackupDisk>,
    /// After so many days a disk is read whole again.
    pub full_every_days: u32,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseOutput {
    /// The lease.
    pub lease: LeaseId,
    /// The vault.
    pub vault: VaultId,
    /// On what each disk is based, in their order.
    pub disks: Vec<Based>,
    /// Checkpoints that stay whatever comes of this backup: those of the newest backups of disks that take no part in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
    /// The checkpoint of the newest full backup, on which differential ones are based.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full: Option<String>,
    /// Jobs that were over and had left a lease in this vault, which was ended first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tidied: Vec<JobId>,
}

/// On what a disk is based.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Based {
    /// The disk.
    pub target: Target,
    /// The backup whose tree is compared with; nothing if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// The checkpoint that was made with that very backup, since which changes are to be read; nothing: all is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Why all is read although something else was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_because: Option<String>,
}

/// A disk of an earlier backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The backup.
    pub backup: BackupId,
    /// The disk's content.
    pub image: Image,
    /// When all of it was last read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole: Option<Timestamp>,
}

/// What is needed to end a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseInput {
    /// The vault's name.
    pub vault: String,
    /// The domain.
    pub domain: DomainRef,
    /// The step that has taken it.
    pub lease: StepName,
    /// The step that has read under it.
    pub read: StepName,
}

/// What it leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseOutput {
    /// Why the lease could not be ended. The next backup into this vault ends it, or the next vmkeepd; a collection gives it up
    /// when it has watched it for a day; an operator may at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<String>,
}

/// How often a vault that cannot be reached is told that the lease has ended.
const RELEASE_TRIES: u32 = 5;
const TAKE: &str = "take a lease in the vault";
const RELEASE: &str = "end the lease in the vault";

#[async_trait]
impl Step for TakeLease {
    const KIND: StepKind = StepKind::new("take-lease", 1);
    type Input = LeaseInput;
    type Output = LeaseOutput;

    async fn run(&self, cx: &StepContext, input: LeaseInput) -> Result<LeaseOutput, Fault> {
        let opened = self.sessions.vaults.open(&input.vault).await?;
        let failed = |e: VaultError| fault(TAKE, &input.vault, &e);
        let seen = self.world.observe(&input.domain.id, codes::CANNOT_BEGIN_PULL).await?;
        let tidied = self.tidy(&input.vault, &opened).await;
        let session = Box::pin(Sessions::begin(&opened, &input.domain)).await.map_err(failed)?;
        let series = newest_first(session.backups());
        let disks = match Box::pin(based(&session, &input, &series, &seen.checkpoints)).await {
            Ok(disks) => disks,
            Err(error) => {
                // Another attempt takes another one, and collections would wait for this one for a day.
                if let Err(error) = Box::pin(session.end()).await {
                    tracing::warn!(%error, "the lease is left to a collection");
                }
                return Err(failed(error));
            }
        };
        let full = series.iter().find(|backup| backup.kind == BackupKind::Full);
        let full = full.and_then(|full| full.checkpoint.clone());
        let others = others(&series, &input.disks);
        let output =
            LeaseOutput { lease: session.lease(), vault: opened.vault.id(), disks, others, full, tidied };
        self.sessions.keep(cx.job, session);
        Ok(output)
    }

    /// A lease of an attempt that was cut off is nobody's: a collector gives it up. Another is taken.
    async fn probe(&self, cx: &StepContext, _: LeaseInput) -> Verdict<LeaseOutput> {
        cx.may_repeat()
    }
}

impl TakeLease {
    /// Ends what earlier jobs have left in the vault. Nothing of this job depends on it: what does not work is tried the next time.
    async fn tidy(&self, name: &str, opened: &Opened) -> Vec<JobId> {
        match self.left.end(name, opened).await {
            Ok(jobs) => {
                jobs.iter().for_each(|job| self.sessions.forget(*job));
                jobs
            }
            Err(fault) => {
                tracing::warn!(vault = name, %fault, "leases of jobs that are over stay for now");
                Vec::new()
            }
        }
    }
}

/// On what each disk is based.
async fn based(
    session: &Session,
    input: &LeaseInput,
    series: &[Manifest],
    listed: &[String],
) -> Result<Vec<Based>, VaultError> {
    let mut disks = Vec::with_capacity(input.disks.len());
    for disk in &input.disks {
        disks.push(usable(session, choose(disk, input, series, listed, Timestamp::now())).await?);
    }
    Ok(disks)
}

/// The checked backups that nobody prunes, those that others are based on after those.
fn newest_first(backups: &Backups) -> Vec<Manifest> {
    let good = |id: BackupId| backups.has(id, MarkKind::Checked) && !backups.has(id, MarkKind::Prune);
    let good = backups.iter().filter(|(id, _)| good(*id));
    let good: HashMap<BackupId, Manifest> =
        good.filter_map(|(id, backup)| Some((id, backup.manifest.as_ref().ok()?.clone()))).collect();
    let mut left: HashSet<BackupId> = good.keys().copied().collect();
    let mut order = Vec::with_capacity(good.len());
    while !left.is_empty() {
        let parents: HashSet<BackupId> = left
            .iter()
            .filter_map(|id| good.get(id)?.parent)
            .filter(|parent| left.contains(parent))
            .collect();
        let heads = left.iter().filter(|id| !parents.contains(id)).copied();
        // A loop, which no writer makes, is cut anywhere.
        let newest =
            heads.max_by_key(|id| good.get(id).map(|one| one.taken)).or_else(|| left.iter().next().copied());
        let Some(newest) = newest else { break };
        left.remove(&newest);
        order.extend(good.get(&newest).cloned());
    }
    order
}

/// The checkpoints of the newest backups of disks other than these.
fn others(series: &[Manifest], disks: &[BackupDisk]) -> Vec<String> {
    let mut seen: HashSet<&str> = disks.iter().map(|disk| disk.target.0.as_str()).collect();
    let mut kept = Vec::new();
    for backup in series {
        for disk in backup.disks.iter().filter(|disk| disk.bitmap) {
            if seen.insert(&disk.target)
                && let Some(checkpoint) = &backup.checkpoint
                && !kept.contains(checkpoint)
            {
                kept.push(checkpoint.clone());
            }
        }
    }
    kept
}

/// On what a disk is best based.
fn choose(
    disk: &BackupDisk,
    input: &LeaseInput,
    series: &[Manifest],
    listed: &[String],
    now: Timestamp,
) -> Based {
    let of = |backup: &Manifest| -> Option<Disk> {
        backup.disks.iter().find(|other| other.target == disk.target.0).cloned()
    };
    let parent = |backup: &Manifest, disk: &Disk| Parent {
        backup: backup.backup,
        image: disk.image,
        whole: disk.whole,
    };
    let newest = series.iter().find_map(|backup| Some(parent(backup, &of(backup)?)));
    let whole = |whole_because: Option<String>| Based {
        target: disk.target.clone(),
        parent: newest.clone(),
        since: None,
        whole_because,
    };
    if input.kind == Asked::Full {
        return whole(None);
    }
    if let Some(why) = &disk.no_bitmap {
        return whole(Some(why.clone()));
    }
    if newest.is_none() {
        return whole(Some("the vault has no checked backup of this disk".to_owned()));
    }
    let mut why = "no backup of this vault was made with a checkpoint that libvirt still lists".to_owned();
    let fit = |backup: &&Manifest| input.kind != Asked::Differential || backup.kind == BackupKind::Full;
    for backup in series.iter().filter(fit) {
        let (Some(then), Some(checkpoint)) = (of(backup), &backup.checkpoint) else { continue };
        if !then.bitmap || !listed.contains(checkpoint) {
            continue;
        }
        if let Some(other) = another(&disk.files, &then.files) {
            why = other;
            continue;
        }
        let days = i64::from(input.full_every_days);
        let since_whole = then.whole.map(|whole| now.duration_since(whole));
        if since_whole.is_none_or(|since| since > SignedDuration::from_hours(24 * days)) {
            return whole(Some(format!("it has not been read whole for {days} days")));
        }
        return Based {
            target: disk.target.clone(),
            parent: Some(parent(backup, &then)),
            since: Some(checkpoint.clone()),
            whole_because: None,
        };
    }
    whole(Some(why))
}

/// The same, if the backup that it names can be built upon.
async fn usable(session: &Session, based: Based) -> Result<Based, VaultError> {
    let Some(parent) = &based.parent else { return Ok(based) };
    Ok(match Box::pin(session.parent(parent.backup)).await? {
        Err(why) => Based { parent: None, since: None, whole_because: Some(why), ..based },
        Ok(found) if found.reread.contains_key(&based.target.0) => {
            let why = format!("a part of it is damaged in the backup {}", parent.backup);
            Based { since: None, whole_because: Some(why), ..based }
        }
        Ok(_) => based,
    })
}

impl ReleaseLease {
    async fn end(&self, cx: &StepContext, input: &ReleaseInput, taken: LeaseId) -> Result<(), Fault> {
        let failed = |e: VaultError| fault(RELEASE, &input.vault, &e);
        let opened = self.sessions.vaults.open(&input.vault).await?;
        if let Some(session) = self.sessions.take(cx.job, taken) {
            return Box::pin(session.end()).await.map_err(failed);
        }
        if cx.outputs.of::<ReadDisks>(&input.read)?.is_some() {
            // All that was put has been answered.
            let log = Arc::new(NoLog);
            match Box::pin(Sessions::resume(&opened, &input.domain, taken, Vec::new(), log)).await {
                Ok(session) => return Box::pin(session.end()).await.map_err(failed),
                Err(VaultError::Revoked { .. }) => return Ok(()),
                Err(error) => tracing::warn!(%error, "the lease is given up instead of ended"),
            }
        }
        // Something may still be on its way of which nobody knows any more: nobody is to wait for it.
        lease::revoke(&opened.vault, taken, &opened.holder("release")).await.map_err(failed)
    }
}

#[async_trait]
impl Step for ReleaseLease {
    const KIND: StepKind = StepKind::new("release-lease", 1);
    type Input = ReleaseInput;
    type Output = ReleaseOutput;

    /// As long as this job lasts nobody else can work on the domain. So a vault that is full, or gone, does not hold it: a lease
    /// that stays costs a collection a wait, and no more.
    async fn run(&self, cx: &StepContext, input: ReleaseInput) -> Result<ReleaseOutput, Fault> {
        // Without an output nothing was begun under the lease; a collector gives it up.
        let Some(taken) = cx.outputs.of::<TakeLease>(&input.lease)? else {
            return Ok(ReleaseOutput::default());
        };
        match self.end(cx, &input, taken.lease).await {
            Ok(()) => Ok(ReleaseOutput::default()),
            Err(fault) if fault.class == Class::Transient && cx.attempt < RELEASE_TRIES => Err(fault),
            Err(fault) => {
                tracing::warn!(lease = %taken.lease, %fault, "the lease is left for now");
                Ok(ReleaseOutput { left: Some(fault.to_string()) })
            }
        }
    }

    /// Ending what has ended is harmless.
    async fn probe(&self, cx: &StepContext, _: ReleaseInput) -> Verdict<ReleaseOutput> {
        cx.may_repeat()
    }
}

#[cfg(test)]
mod tests;

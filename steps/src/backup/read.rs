//! `read-disks`: from the pull into the vault, up to a manifest that is ready to be put.
//!
//! Disks are read one after the other, each over several connections. What is durable after each is written down, so an attempt
//! that goes on where another was cut off (*within the same point in time*: the very job, QEMU and exports) does not write it
//! again; of the disk in the middle the packs that were put count, and its chunks are read and not stored again.
//!
//! A disk is read by its bitmap only if QEMU shows it, the parent can be built upon, and a sample of what it calls clean is what
//! the parent has; else whole, with the reason. What it reads whole is compared with the parent all the same.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{BackupId, LeaseId};
use vmkeep_vault::manifest::{self, BackupKind};
use vmkeep_vault::write::{Log, Session};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::commit::StoredManifest;
use super::disk::BackupDisk;
use super::from::{Point, ReadFrom};
use super::held::Sessions;
use super::lease::{LeaseOutput, TakeLease};
use super::notes::Notes;
use super::options::Asked;
use super::reading::{Reading, kind};
use super::state::StateInput;
use crate::codes;
use crate::hypervisor::DomainRef;
use crate::image::space::LowWater;
use crate::snapshot::World;
use crate::vaults::{Opened, fault};

pub(super) const DOING: &str = "read the disks into the vault";

/// Reads disks into the vault.
#[derive(Debug)]
pub struct ReadDisks {
    pub(super) world: World,
    pub(super) sessions: Sessions,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadInput {
    /// The vault's name.
    pub vault: String,
    /// The domain.
    pub domain: DomainRef,
    /// Where they are.
    pub from: ReadFrom,
    /// What was asked for.
    pub kind: Asked,
    /// The disks.
    pub disks: Vec<BackupDisk>,
    /// Firmware variables and TPM.
    #[serde(default)]
    pub state: StateInput,
    /// The step that has taken the lease.
    pub lease: StepName,
    /// Bytes per second; 0 for no limit.
    pub bandwidth: u64,
    /// What stays free beside the scratch files.
    pub low_water: LowWater,
    /// What is secret may lie in a vault without encryption.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_plaintext: bool,
    /// When the job was planned.
    pub planned: Timestamp,
    /// The rest of the manifest.
    pub about: About,
}

/// What the manifest says besides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The domain's definition.
    pub definition: String,
    /// It starts with its host.
    pub autostart: bool,
    /// The host.
    pub host: manifest::Host,
    /// The journal.
    pub journal: String,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadOutput {
    /// The backup.
    pub backup: BackupId,
    /// The lease that it was read under.
    pub lease: LeaseId,
    /// What was read.
    pub kind: BackupKind,
    /// What became of each disk.
    pub disks: Vec<ReadDisk>,
    /// The manifest, ready to be put.
    pub manifest: StoredManifest,
    /// What the owner should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What became of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadDisk {
    /// What the manifest says of it.
    pub disk: manifest::Disk,
    /// Bytes of chunks that the vault did not have.
    pub new: u64,
}

impl ReadInput {
    pub(super) fn scratch(&self) -> Vec<PathBuf> {
        self.disks.iter().map(|disk| disk.scratch.clone()).collect()
    }

    pub(super) fn total(&self) -> u64 {
        self.disks.iter().map(|disk| disk.virtual_size).sum()
    }

    /// The failure of a lease that nobody waits for any more.
    pub(super) fn revoked(&self) -> Fault {
        let cause = "another host gave this job's lease up for dead";
        Fault::permanent(codes::VAULT_BUSY, DOING, &self.domain.name, cause).remedy("Start the backup again")
    }
}

#[async_trait]
impl Step for ReadDisks {
    const KIND: StepKind = StepKind::new("read-disks", 1);
    type Input = ReadInput;
    type Output = ReadOutput;

    async fn run(&self, cx: &StepContext, input: ReadInput) -> Result<ReadOutput, Fault> {
        let leased = cx.outputs.of::<TakeLease>(&input.lease)?;
        let leased = leased.ok_or_else(|| {
            Fault::permanent(Code::UNDEFINED, DOING, &input.domain.name, "there is no lease")
        })?;
        let point = Point::of(cx, &self.world, &input)?;
        let opened = self.sessions.vaults.open(&input.vault).await?;
        let notes = Arc::new(Notes::of(&cx.progress));
        let mut session = self.session(cx, &opened, &input, &leased, &notes).await?;
        let work = Reading { cx, input: &input, leased: &leased, point: &point, notes: &notes };
        // What stops a guest is ended at once, whatever else is under way.
        let outcome = tokio::select! {
            outcome = Box::pin(work.all(&mut session)) => outcome,
            fault = point.alarm() => Err(fault.into()),
            () = cx.stop.cancelled() => Err(point.leave().await.into()),
        };
        match outcome {
            Ok((manifest, warnings)) => {
                self.sessions.keep(cx.job, session);
                let disks = notes.disks();
                let kind = kind(&input, &disks);
                Ok(ReadOutput { backup: backup_id(cx), lease: leased.lease, kind, disks, manifest, warnings })
            }
            Err(ended) => {
                let failed = work.failed(ended).await;
                // What was put counts for whoever begins next, where it is known what that is.
                if failed.class != Class::Stopped {
                    match Box::pin(session.keep()).await {
                        Ok(()) => self.sessions.keep(cx.job, session),
                        Err(error) => tracing::debug!(%error, "what was put is left to a collection"),
                    }
                }
                Err(failed)
            }
        }
    }

    /// Reading again does no harm, as long as the point in time is there; an attempt finds out.
    async fn probe(&self, cx: &StepContext, _: ReadInput) -> Verdict<ReadOutput> {
        cx.may_repeat()
    }
}

/// The backup of a job bears its id.
pub(super) fn backup_id(cx: &StepContext) -> BackupId {
    BackupId::new(*cx.job.uuid().as_bytes())
}

impl ReadDisks {
    /// The session of this job: the one that is kept, or another under the same lease.
    async fn session(
        &self,
        cx: &StepContext,
        opened: &Opened,
        input: &ReadInput,
        leased: &LeaseOutput,
        notes: &Arc<Notes>,
    ) -> Result<Session, Fault> {
        let log: Arc<dyn Log> = notes.clone();
        // One that an attempt has failed with is of no more use than its lease.
        let first = cx.attempt == 1 && cx.resume.is_none();
        if let Some(mut session) = self.sessions.take(cx.job, leased.lease).filter(|_| first) {
            session.log_to(log);
            return Ok(session);
        }
        let resumed = Sessions::resume(opened, &input.domain, leased.lease, notes.in_flight(), log);
        Box::pin(resumed).await.map_err(|error| match error {
            VaultError::Revoked { .. } => input.revoked(),
            error => fault(DOING, &input.vault, &error),
        })
    }
}

//! `commit-backup`: the manifest, whose put is the commit.
//!
//! Its bytes are in the journal before, and any put of it has these: so it may be put again whenever nobody knows. Where the
//! lease was revoked meanwhile, the backup is settled: every blob that it needs is looked at, and it is checked, or lacks some.

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{BackupId, LeaseId};
use vmkeep_vault::manifest::BackupKind;
use vmkeep_vault::marks;
use vmkeep_vault::names::ObjectName;
use vmkeep_vault::settle::{self, Settled};
use vmkeep_vault::write::{NoLog, Outcome, Prepared};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::held::Sessions;
use super::read::ReadDisks;
use crate::codes;
use crate::hypervisor::DomainRef;
use crate::vaults::{Opened, fault};

const DOING: &str = "commit the backup";

/// Commits a backup.
#[derive(Debug)]
pub struct CommitBackup(pub(super) Sessions);

/// A manifest's name and bytes, as a journal holds them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredManifest {
    /// The object's name.
    pub name: String,
    /// Its bytes, in base64.
    pub object: String,
}

impl StoredManifest {
    pub(super) fn of(prepared: &Prepared) -> Self {
        Self { name: prepared.name.to_string(), object: STANDARD.encode(&prepared.object) }
    }

    fn prepared(&self) -> Option<Prepared> {
        let name: ObjectName = self.name.parse().ok()?;
        Some(Prepared { name, object: STANDARD.decode(&self.object).ok()?.into() })
    }
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitInput {
    /// The vault's name.
    pub vault: String,
    /// The domain.
    pub domain: DomainRef,
    /// The step that has read it.
    pub read: StepName,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitOutput {
    /// The backup.
    pub backup: BackupId,
    /// What was read.
    pub kind: BackupKind,
    /// Whether it is certain that all that it needs is there and stays.
    pub checked: bool,
}

impl CommitBackup {
    async fn commit(
        &self,
        cx: &StepContext,
        opened: &Opened,
        input: &CommitInput,
        lease: LeaseId,
        prepared: &Prepared,
    ) -> Result<Settled, VaultError> {
        let session = match self.0.take(cx.job, lease) {
            Some(session) => Ok(session),
            None => {
                Box::pin(Sessions::resume(
                    opened,
                    &input.domain,
                    lease,
                    Vec::new(),
                    std::sync::Arc::new(NoLog),
                ))
                .await
            }
        };
        let outcome = match session {
            Ok(session) => {
                let outcome = session.commit(prepared).await;
                self.0.keep(cx.job, session);
                outcome?
            }
            Err(VaultError::Revoked { .. }) => Outcome::Revoked,
            Err(error) => return Err(error),
        };
        if outcome == Outcome::Checked {
            return Ok(Settled::Checked);
        }
        let (holder, cache) = (opened.holder("settle a backup"), opened.cache.as_deref());
        Box::pin(settle::commit(&opened.vault, prepared, &holder, cache)).await
    }
}

#[async_trait]
impl Step for CommitBackup {
    const KIND: StepKind = StepKind::new("commit-backup", 1);
    type Input = CommitInput;
    type Output = CommitOutput;

    async fn run(&self, cx: &StepContext, input: CommitInput) -> Result<CommitOutput, Fault> {
        let broken = |cause: &str| Fault::permanent(Code::UNDEFINED, DOING, &input.domain.name, cause);
        let read = cx.outputs.of::<ReadDisks>(&input.read)?.ok_or_else(|| broken("nothing was read"))?;
        let prepared =
            read.manifest.prepared().ok_or_else(|| broken("the manifest in the journal is none"))?;
        let opened = self.0.vaults.open(&input.vault).await?;
        let failed = |e: VaultError| fault(DOING, &input.vault, &e);
        let settled = self.commit(cx, &opened, &input, read.lease, &prepared).await;
        let busy = |cause: &str, remedy: &str| {
            Fault::permanent(codes::VAULT_BUSY, DOING, &input.domain.name, cause).remedy(remedy)
        };
        match settled.map_err(|e| failed(e).in_doubt())? {
            Settled::Checked => Ok(CommitOutput { backup: read.backup, kind: read.kind, checked: true }),
            // Nothing is wrong with the backup: it is looked at once more, under another lease.
            Settled::Revoked => {
                let cause = "another host gave the lease up under which this backup was looked at once more";
                let remedy = "Give leases more time: see `vmkeep vault leases`";
                Err(busy(cause, remedy).class(Class::Transient).in_doubt())
            }
            Settled::Pruned | Settled::Absent => {
                Err(busy("somebody has ordered that this backup goes", "Start the backup again"))
            }
            Settled::Lacks(_) => {
                // Nobody is to build on it or to count on it.
                marks::ask(&opened.vault, read.backup, &opened.host).await.map_err(failed)?;
                let cause = "another host gave this backup's lease up for dead, and a collection has taken something that it needs";
                Err(busy(
                    cause,
                    "Start the backup again: only what is missing is stored. Give leases more time, if the link is slow",
                ))
            }
        }
    }

    /// Putting it again is harmless, with the bytes that it has.
    async fn probe(&self, cx: &StepContext, _: CommitInput) -> Verdict<CommitOutput> {
        cx.may_repeat()
    }
}

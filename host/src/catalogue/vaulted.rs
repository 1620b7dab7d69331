//! What jobs of this host have put into vaults, from their journals.
//!
//! A vault may be far away, or gone; so no look at this host opens one. That a backup was committed, with all that it needs in
//! the vault, is in the journal of its job. What has become of it since, by others or by the vault's own commands, is not:
//! whoever shows this says so.

use std::collections::HashMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmkeep_steps::backup::begin::BeginPull;
use vmkeep_steps::backup::commit::{CommitBackup, CommitInput, CommitOutput};
use vmkeep_steps::backup::lease::{LeaseOutput, TakeLease};
use vmkeep_steps::snapshot::rest::TakeAtRest;
use vmkeep_vault::ids::{BackupId, VaultId};
use vmkeep_vault::manifest::BackupKind;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Body, Event, JobId, Step, StepName};

/// The jobs that put backups into vaults.
pub(super) const WORKFLOWS: &[&str] = &[vmkeep_steps::backup::NAME];

/// A backup that a job has put into a vault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vaulted {
    /// The vault.
    pub vault: VaultId,
    /// What it was called in the configuration of then.
    pub vault_name: String,
    /// The backup.
    pub backup: BackupId,
    /// What was read for it.
    pub kind: BackupKind,
    /// The domain's name at the time.
    pub domain: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// The instant that it holds.
    pub at: Timestamp,
    /// The job that made it.
    pub job: String,
}

/// What a job's events tell of the backup that it made: nothing unless it was committed, whatever came after that.
pub(super) fn of(job: JobId, events: &mut dyn Iterator<Item = Event>) -> Vec<Vaulted> {
    let mut steps: HashMap<StepName, (StepKind, Value)> = HashMap::new();
    let (mut subject, mut vault, mut at) = (None, None, None);
    let mut found = Vec::new();
    for event in events {
        let body = match event.body {
            Body::JobRequested(request) => {
                subject = Some(request.subject);
                continue;
            }
            Body::JobPlanned(plan) => {
                steps = plan.steps.into_iter().map(|step| (step.name, (step.kind, step.input))).collect();
                continue;
            }
            body => body,
        };
        let Some((step, output)) = body.output() else { continue };
        let Some((kind, input)) = steps.get(step) else { continue };
        if *kind == TakeLease::KIND {
            vault = LeaseOutput::deserialize(output).ok().map(|taken| taken.vault);
        } else if *kind == BeginPull::KIND || *kind == TakeAtRest::KIND {
            at = output.get("at").and_then(|at| Timestamp::deserialize(at).ok());
        } else if *kind == CommitBackup::KIND
            && let (Ok(input), Ok(committed)) =
                (CommitInput::deserialize(input), CommitOutput::deserialize(output))
            && let (Some(subject), Some(vault), Some(at), true) = (&subject, vault, at, committed.checked)
        {
            found.push(Vaulted {
                vault,
                vault_name: input.vault,
                backup: committed.backup,
                kind: committed.kind,
                domain: subject.label.clone(),
                domain_uuid: subject.id.clone(),
                at,
                job: job.to_string(),
            });
        }
    }
    found
}

#[cfg(test)]
mod tests;

//! Leases that jobs which are over have left in a vault.
//!
//! A job whose vault is gone or full ends without having ended its lease: as long as it lasts nobody else can work on its domain.
//! Collections then wait for that lease until one of them has watched it for a day. The journal knows better: a job that is over
//! uses no vault. So such leases are ended as soon as the vault answers again: before the next backup takes its own there, and
//! when vmkeepd starts.
//!
//! Only what the journal tells is touched: a lease that is the output of a step, of a job that is over. One of a job that goes
//! on, of another host, or of an attempt that was cut off before its outcome stays. A lease is *ended* only if its job has
//! succeeded, so that nothing is on its way any more. Else it is *revoked*, which is always safe (`vault/FORMAT.md`, §7): what an
//! attempt that was given up has sent may still arrive. Either is one object, under a name that is the lease's: whoever is cut
//! off has put it or not, and what was not put is seen to the next time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize as _;
use serde_json::Value;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{LeaseId, VaultId};
use vmkeep_vault::lease::{self, Lease};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Body, Event, Fault, JobId, JobStatus, JobSummary, Step, StepName};

use super::NAME;
use super::lease::{LeaseInput, LeaseOutput, ReleaseLease, ReleaseOutput, TakeLease};
use crate::codes;
use crate::reconcile::sweep::Jobs;
use crate::restore::from_vault::reader::{
    EndReading, EndReadingOutput, ReadingInput, ReadingOutput, TakeReading,
};
use crate::restore::from_vault::workflow::NAME as RESTORE;
use crate::vaults::{Opened, Vaults, fault};

/// How long the leases of others may keep a job from taking its own.
const PATIENCE: Duration = Duration::from_secs(60);
const DOING: &str = "end leases that jobs which are over have left";

/// The leases that the journal tells of.
pub struct LeftLeases {
    jobs: Arc<dyn Jobs>,
    /// What each job that is over has taken: nothing is added to its journal any more.
    known: Mutex<HashMap<JobId, Vec<Taken>>>,
}

impl std::fmt::Debug for LeftLeases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LeftLeases")
    }
}

/// A lease that a job has taken.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Taken {
    /// What the vault was called.
    name: String,
    vault: VaultId,
    lease: LeaseId,
    /// Whether the job has said that it has ended it.
    released: bool,
}

impl LeftLeases {
    /// Those of these journals.
    #[must_use]
    pub fn new(jobs: Arc<dyn Jobs>) -> Self {
        Self { jobs, known: Mutex::default() }
    }

    /// Ends what jobs that are over have left in this vault; whose leases that were. Costs one list where nobody uses the vault.
    ///
    /// # Errors
    /// If the vault or the journal does not answer. What was not ended is left for the next time.
    pub async fn end(&self, name: &str, opened: &Opened) -> Result<Vec<JobId>, Fault> {
        let ended = tokio::time::timeout(PATIENCE, Box::pin(self.end_all(name, opened))).await;
        ended.unwrap_or_else(|_| {
            Err(Fault::transient(codes::VAULT_UNREACHABLE, DOING, name, "the vault does not answer"))
        })
    }

    async fn end_all(&self, name: &str, opened: &Opened) -> Result<Vec<JobId>, Fault> {
        let failed = |e: VaultError| fault(DOING, &name, &e);
        let all = lease::all(&opened.vault).await.map_err(failed)?;
        let stands = all.into_iter().filter(|(_, standing)| standing.begun && !standing.is_over());
        let stands: HashSet<LeaseId> = stands.map(|(lease, _)| lease).collect();
        let mut ended = Vec::new();
        if stands.is_empty() {
            return Ok(ended);
        }
        for job in self.over().await? {
            for taken in self.taken(job.job).await {
                if taken.vault != opened.vault.id() || !stands.contains(&taken.lease) {
                    continue;
                }
                end(opened, &job, taken.lease).await.map_err(failed)?;
                tracing::info!(job = %job.job, lease = %taken.lease, vault = name, "the lease of a job that is over was ended");
                ended.push(job.job);
            }
        }
        Ok(ended)
    }

    /// The same in every vault in which, by the journal, something may have been left; no other is opened. What does not work is
    /// logged, and left to the next backup there.
    pub async fn end_everywhere(&self, vaults: &dyn Vaults) {
        let names = match self.names().await {
            Ok(names) => names,
            Err(fault) => {
                tracing::warn!(%fault, "which leases were left in vaults is not known");
                return;
            }
        };
        for name in names {
            let ended = match vaults.open(&name).await {
                Ok(opened) => self.end(&name, &opened).await,
                Err(fault) => Err(fault),
            };
            if let Err(fault) = ended {
                tracing::warn!(vault = name, %fault, "leases of jobs that are over stay until the next backup there");
            }
        }
    }

    /// What the vaults are called in which a job that is over has not said that it has ended its lease.
    async fn names(&self) -> Result<BTreeSet<String>, Fault> {
        let mut names = BTreeSet::new();
        for job in self.over().await? {
            let left = self.taken(job.job).await.into_iter().filter(|taken| !taken.released);
            names.extend(left.map(|taken| taken.name));
        }
        Ok(names)
    }

    /// The jobs that have used a vault and are over.
    async fn over(&self) -> Result<Vec<JobSummary>, Fault> {
        let mut jobs = self.jobs.all().await?;
        jobs.retain(|job| {
            [NAME, RESTORE].contains(&job.workflow.as_str())
                && job.status.ended()
                && job.status != JobStatus::Refused
        });
        Ok(jobs)
    }

    /// What a job that is over has taken. A history that was pruned, or cannot be read, tells nothing.
    async fn taken(&self, job: JobId) -> Vec<Taken> {
        if let Some(known) = self.known().get(&job) {
            return known.clone();
        }
        let Ok(history) = self.jobs.history(job).await else { return Vec::new() };
        let taken = of(history);
        self.known().insert(job, taken.clone());
        taken
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, Vec<Taken>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a lease of a job that is over.
async fn end(opened: &Opened, job: &JobSummary, lease: LeaseId) -> Result<(), VaultError> {
    if job.status != JobStatus::Succeeded {
        return lease::revoke(&opened.vault, lease, &opened.holder("release")).await;
    }
    match Lease::resume(&opened.vault, lease).await {
        Ok(lease) => lease.end().await,
        Err(VaultError::Revoked { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// What a job's events tell of the leases that it has taken.
fn of(history: Vec<Event>) -> Vec<Taken> {
    let mut steps: HashMap<StepName, (StepKind, Value)> = HashMap::new();
    let mut taken: Vec<Taken> = Vec::new();
    for event in history {
        if let Body::JobPlanned(plan) = event.body {
            steps = plan.steps.into_iter().map(|step| (step.name, (step.kind, step.input))).collect();
            continue;
        }
        let Some((step, output)) = event.body.output() else { continue };
        let Some((kind, input)) = steps.get(step) else { continue };
        let released = if *kind == TakeLease::KIND {
            taken.extend(backup(input, output));
            false
        } else if *kind == TakeReading::KIND {
            taken.extend(restore(input, output));
            false
        } else if *kind == ReleaseLease::KIND {
            ReleaseOutput::deserialize(output).is_ok_and(|output| output.left.is_none())
        } else {
            *kind == EndReading::KIND
                && EndReadingOutput::deserialize(output).is_ok_and(|output| output.left.is_none())
        };
        taken.iter_mut().for_each(|taken| taken.released |= released);
    }
    taken
}

fn backup(input: &Value, output: &Value) -> Option<Taken> {
    let (input, output) = (LeaseInput::deserialize(input).ok()?, LeaseOutput::deserialize(output).ok()?);
    Some(Taken { name: input.vault, vault: output.vault, lease: output.lease, released: false })
}

fn restore(input: &Value, output: &Value) -> Option<Taken> {
    let (input, output) = (ReadingInput::deserialize(input).ok()?, ReadingOutput::deserialize(output).ok()?);
    Some(Taken { name: input.vault, vault: input.id, lease: output.lease?, released: false })
}

#[cfg(test)]
mod tests;

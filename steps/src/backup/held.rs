//! Sessions of the vault between the steps of a job.
//!
//! A session that is kept saves its job the lists of the vault; it is never needed: whoever finds none goes on with the lease.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{DomainId, LeaseId, RunId};
use vmkeep_vault::write::{Options, Resume, Session};
use vmkeep_workflow::JobId;

use crate::hypervisor::DomainRef;
use crate::vaults::{Opened, Vaults};

/// What the vault is used for.
const PURPOSE: &str = "backup";

/// The sessions of this process, and who opens vaults.
#[derive(Clone)]
pub(super) struct Sessions {
    pub(super) vaults: Arc<dyn Vaults>,
    held: Arc<Mutex<HashMap<JobId, Session>>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sessions")
    }
}

impl Sessions {
    pub(super) fn new(vaults: Arc<dyn Vaults>) -> Self {
        Self { vaults, held: Arc::default() }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, Session>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a session that has nothing in flight for the job's next step.
    pub(super) fn keep(&self, job: JobId, session: Session) {
        self.held().insert(job, session);
    }

    /// The session that was kept.
    pub(super) fn take(&self, job: JobId, lease: LeaseId) -> Option<Session> {
        self.held().remove(&job).filter(|session| session.lease() == lease)
    }

    /// Drops what was kept for a job that is over: its lease shows no more that it is alive.
    pub(super) fn forget(&self, job: JobId) {
        self.held().remove(&job);
    }

    /// Goes on with a lease, where `in_flight` are the runs that were named and of which nobody knows whether they were put.
    pub(super) async fn resume(
        opened: &Opened,
        domain: &DomainRef,
        lease: LeaseId,
        in_flight: Vec<RunId>,
        log: Arc<dyn vmkeep_vault::write::Log>,
    ) -> Result<Session, VaultError> {
        let options = Options {
            holder: opened.holder(PURPOSE),
            folder: opened.cache.clone(),
            log,
            resume: Some(Resume { lease, in_flight }),
        };
        Session::begin(&opened.vault, domain_id(domain), options).await
    }

    /// Begins with a new lease.
    pub(super) async fn begin(opened: &Opened, domain: &DomainRef) -> Result<Session, VaultError> {
        let options =
            Options { holder: opened.holder(PURPOSE), folder: opened.cache.clone(), ..Options::default() };
        Session::begin(&opened.vault, domain_id(domain), options).await
    }
}

/// A domain, as the vault knows it.
#[must_use]
pub(super) fn domain_id(domain: &DomainRef) -> DomainId {
    DomainId::new(*domain.id.0.as_bytes())
}

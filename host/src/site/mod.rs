//! What the API needs of this host besides the engine: its domains, its backups, and orders made from requests.
//!
//! A trait, so that the API can be proven over a real socket with a host of its own making.

mod backups;
mod checkpoints;
mod deletions;
mod domains;
mod exchange;
mod from_vault;
mod host;
pub(crate) mod leftovers;
mod orders;
mod patience;
mod roots;
mod vaulted;

use async_trait::async_trait;
use serde_json::Value;
use vmkeep_workflow::journal::Record;
use vmkeep_workflow::{Actor, Engine, Fault, Subject, WorkflowName};

pub use host::{Host, limits, registry};
pub use roots::OpenRoots;

use crate::api::types::{
    BackupDetail, BackupRequest, BackupRow, Backups, DeleteRequest, DiscardRequest, DomainRow, Finding,
    ForgetRequest, InPlaceRequest, KeptRow, LibvirtStatus, ProtectRequest, PruneRequest, RebuildRequest,
    RestoreRequest, SnapshotRequest, UndoRequest, VaultedRow,
};
use crate::catalogue::Report;

/// A request translated for the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// The recipe.
    pub workflow: WorkflowName,
    /// What is locked.
    pub subject: Subject,
    /// The recipe's options, with all defaults filled in.
    pub options: Value,
    /// Further limits that the job counts against: the root it writes to.
    pub limits: Vec<String>,
}

/// A host with domains and backups.
#[async_trait]
pub trait Site: Send + Sync + 'static {
    /// Whether the hypervisor answers.
    async fn libvirt(&self) -> LibvirtStatus;

    /// The domains, by name, without what only the engine knows.
    ///
    /// # Errors
    /// When the hypervisor does not answer.
    async fn domains(&self) -> Result<Vec<DomainRow>, Fault>;

    /// The order for a backup.
    ///
    /// # Errors
    /// When the domain is unknown or the request makes no sense.
    async fn snapshot(&self, request: &SnapshotRequest) -> Result<Order, Fault>;

    /// The order for a backup into a vault.
    ///
    /// # Errors
    /// When the domain is unknown or the request makes no sense.
    async fn back_up(&self, request: &BackupRequest) -> Result<Order, Fault>;

    /// The order for a restore. The new domain's UUID is made here; with a key it is made of that, so that a repeated
    /// request means the same domain.
    ///
    /// # Errors
    /// When the backup is unknown or the request makes no sense.
    async fn restore(&self, request: &RestoreRequest, key: Option<&str>) -> Result<Order, Fault>;

    /// The order for a restore in place.
    ///
    /// # Errors
    /// When the backup is unknown or the request makes no sense.
    async fn in_place(&self, request: &InPlaceRequest) -> Result<Order, Fault>;

    /// The order for bringing back what is kept aside.
    ///
    /// # Errors
    /// When nothing is kept under that job.
    async fn undo(&self, request: &UndoRequest) -> Result<Order, Fault>;

    /// The order for removing what is kept aside.
    ///
    /// # Errors
    /// When nothing is kept under that job.
    async fn discard(&self, request: &DiscardRequest) -> Result<Order, Fault>;

    /// The machines that are kept aside, newest first. What could not be read comes along as warnings.
    ///
    /// # Errors
    /// When it could not be looked at all.
    async fn kept(&self) -> Result<(Vec<KeptRow>, Vec<String>), Fault>;

    /// The order for reading a backup again.
    ///
    /// # Errors
    /// When the backup is unknown.
    async fn verify(&self, backup: &str) -> Result<Order, Fault>;

    /// The backups below all roots, newest first, and those that are missing. What could not be read comes along as
    /// warnings.
    ///
    /// # Errors
    /// When no root could be read.
    async fn backups(&self) -> Result<Backups, Fault>;

    /// The last backup of each domain that a job of this host has put into each vault, and why that may not be all. No vault is
    /// opened.
    async fn in_vaults(&self) -> (Vec<VaultedRow>, Vec<String>);

    /// The orders for deleting backups: one per domain.
    ///
    /// # Errors
    /// When one of them is unknown.
    async fn delete(&self, request: &DeleteRequest) -> Result<Vec<Order>, Fault>;

    /// The orders for thinning backups out: one per domain.
    ///
    /// # Errors
    /// When the domain has no backups, or the request makes no sense.
    async fn prune(&self, request: &PruneRequest) -> Result<Vec<Order>, Fault>;

    /// Protects a backup from deletion, or, without `on`, ends that.
    ///
    /// # Errors
    /// When it is unknown, or its folder cannot be written.
    async fn protect(&self, request: &ProtectRequest, on: bool, by: Actor) -> Result<BackupRow, Fault>;

    /// Reads every manifest anew, below the roots or another folder.
    ///
    /// # Errors
    /// When nothing can be read.
    async fn rebuild(&self, request: &RebuildRequest, by: Actor) -> Result<Report, Fault>;

    /// Forgets a backup that is missing.
    ///
    /// # Errors
    /// When it is unknown, or not missing.
    async fn forget(&self, request: &ForgetRequest, by: Actor) -> Result<(), Fault>;

    /// What the catalogue remembers, record by record.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn catalogue(&self) -> Result<Vec<Record>, Fault>;

    /// One backup.
    ///
    /// # Errors
    /// When it is unknown or its manifest cannot be read.
    async fn backup(&self, backup: &str) -> Result<BackupDetail, Fault>;

    /// What would make backups fail here.
    async fn doctor(&self) -> Vec<Finding>;

    /// The orders for taking away what jobs that are over have left, as far as that is safe: one per domain.
    ///
    /// # Errors
    /// When it could not be looked at.
    async fn repair(&self) -> Result<Vec<Order>, Fault>;

    /// Called before a job is asked for: a chance to gather what its journal should tell of the world.
    async fn before_job(&self, engine: &Engine) {
        let _ = engine;
    }
}

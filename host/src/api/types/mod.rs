//! What goes over the wire: the API's requests and answers, shared by daemon and command line.
//!
//! These shapes are a contract with programs that other people write. Fields are added, never renamed; every absent
//! option means the default that is stated here; times are RFC 3339 in UTC, sizes are bytes, spans are milliseconds
//! where the name ends in `_ms`.

mod exchange;
mod journal;
mod requests;
mod vaulted;

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vmkeep_workflow::engine::{StageView, StepState};
use vmkeep_workflow::event::Item;
use vmkeep_workflow::fault::Class;
use vmkeep_workflow::plan::Plan;
use vmkeep_workflow::{Code, Fault, JobId, JobStatus, JobSummary, Phase};

use crate::codes;

pub use crate::catalogue::Report as Rebuilt;
pub use exchange::{DiscardRequest, InPlaceRequest, KeptRow, RestRequest, UndoRequest};
pub use journal::{Audited, KeyChange, Pruned, PrunedJob, StoreInfo, Vouching};
pub use requests::{
    Act, BackupRequest, DeleteRequest, ForgetRequest, HistoryPruneRequest, ImageFormat, OnBusyMemory,
    ProtectRequest, PruneRequest, RamDisk, RebuildRequest, RepairRequest, RestoreRequest, SnapshotRequest,
    StartAs, WaitBefore, WithoutState,
};
pub use vaulted::VaultedRow;

/// The header that makes a repeated request harmless.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Every error's body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The stable code; also the command line's exit status.
    pub code: u16,
    /// The code's name.
    pub name: String,
    /// What was being done.
    pub doing: String,
    /// To which object.
    pub object: String,
    /// Why it failed.
    pub cause: String,
    /// What helps.
    pub remedy: String,
}

impl From<&Fault> for ErrorBody {
    fn from(fault: &Fault) -> Self {
        Self {
            code: fault.code.0,
            name: codes::name(fault.code).to_owned(),
            doing: fault.doing.clone(),
            object: fault.object.clone(),
            cause: fault.cause.clone(),
            remedy: codes::remedy(fault),
        }
    }
}

impl From<ErrorBody> for Fault {
    fn from(body: ErrorBody) -> Self {
        Self {
            code: Code(body.code),
            class: Class::Permanent,
            in_doubt: false,
            doing: body.doing,
            object: body.object,
            cause: body.cause,
            remedy: body.remedy,
        }
    }
}

/// Where the daemon stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DaemonPhase {
    /// Waits for the hypervisor; jobs that were interrupted wait as well.
    WaitingForLibvirt,
    /// Frees guests and takes interrupted jobs over.
    Recovering,
    /// Takes requests.
    Ready,
    /// Brings jobs to a safe place and ends.
    Stopping,
}

/// The daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its release.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// When it started.
    pub started: Timestamp,
    /// Where it stands.
    pub phase: DaemonPhase,
    /// The store's identity.
    pub store: String,
    /// Whether the store lives on its reserve, in which case no new job starts.
    pub reserve_spent: bool,
    /// The state folder.
    pub state_dir: PathBuf,
}

/// The hypervisor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LibvirtStatus {
    /// Its URI.
    pub uri: String,
    /// Whether it answers.
    pub reachable: bool,
    /// libvirt's and QEMU's versions, when it answers.
    pub versions: Option<String>,
    /// Why it does not answer.
    pub fault: Option<ErrorBody>,
}

/// The last good backup of a domain, of those in folders.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LastBackup {
    /// The backup.
    pub id: String,
    /// The point in time that it holds.
    pub at: Timestamp,
}

/// A domain in one row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DomainRow {
    /// Its name, as it is.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// `running`, `paused`, `shut off` …
    pub state: String,
    /// Whether its definition outlives it.
    pub persistent: bool,
    /// The disks that a backup takes.
    pub disks: Vec<DiskRow>,
    /// The last good backup in a folder.
    pub last_backup: Option<LastBackup>,
    /// The last backup that a job of this host has put into each vault.
    #[serde(default)]
    pub in_vaults: Vec<VaultedRow>,
    /// The job that holds it.
    pub job: Option<String>,
    /// Why it cannot be backed up, if it cannot.
    pub obstacle: Option<ErrorBody>,
}

/// A disk in one row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskRow {
    /// The target device: `vda`.
    pub target: String,
    /// Where its data is.
    pub source: String,
    /// `qcow2`, `raw` …
    pub format: String,
    /// Why a backup leaves it out; nothing if it takes it.
    pub left_out: Option<String>,
}

/// The first screen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The daemon.
    pub daemon: DaemonStatus,
    /// The hypervisor.
    pub libvirt: LibvirtStatus,
    /// All domains.
    pub domains: Vec<DomainRow>,
    /// Jobs under way.
    pub running: Vec<JobRow>,
    /// Jobs that need an operator.
    pub attention: Vec<JobRow>,
    /// Machines that restores in place have set aside.
    #[serde(default)]
    pub kept: Vec<KeptRow>,
    /// Anything else that should worry somebody.
    pub warnings: Vec<String>,
}

/// Something that a job waits for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ItemRow {
    /// The step.
    pub step: String,
    /// Forward or undo.
    pub phase: Phase,
    /// What is wrong and what helps.
    pub fault: ErrorBody,
}

impl From<&Item> for ItemRow {
    fn from(item: &Item) -> Self {
        Self { step: item.step.to_string(), phase: item.phase, fault: (&item.fault).into() }
    }
}

/// A job in one row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobRow {
    /// The whole id.
    pub id: JobId,
    /// The shortest form that is unique among all jobs; takes the place of the whole id everywhere.
    pub short: String,
    /// The recipe.
    pub workflow: String,
    /// The domain's name.
    pub domain: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// One line for people, never empty: what was asked for until there is a plan.
    pub title: String,
    /// Where it stands.
    pub status: JobStatus,
    /// Who asked for it.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
    /// When it was asked for.
    pub requested: Timestamp,
    /// When it last changed.
    pub updated: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// Steps in the plan.
    pub steps: u32,
    /// Steps that succeeded.
    pub steps_done: u32,
    /// The failure that ended it or holds it.
    pub fault: Option<ErrorBody>,
    /// What it waits for when it needs attention.
    pub needs: Vec<ItemRow>,
}

impl JobRow {
    /// A row, with the short form that was found for it.
    #[must_use]
    pub fn new(summary: &JobSummary, short: String) -> Self {
        Self {
            id: summary.job,
            short,
            workflow: summary.workflow.to_string(),
            domain: summary.subject.label.clone(),
            domain_uuid: summary.subject.id.clone(),
            title: match summary.title.as_str() {
                "" => format!("{} of {}", summary.workflow, summary.subject.label),
                title => title.to_owned(),
            },
            status: summary.status,
            by: summary.by.who.clone(),
            reason: summary.by.why.clone(),
            requested: summary.requested,
            updated: summary.updated,
            ended: summary.ended,
            steps: summary.steps,
            steps_done: summary.steps_done,
            fault: summary.fault.as_ref().map(Into::into),
            needs: summary.items.iter().map(Into::into).collect(),
        }
    }
}

/// How far a step is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressRow {
    /// So much is done.
    pub done: u64,
    /// Of so much; 0 when not known.
    pub total: u64,
    /// The unit.
    pub unit: String,
}

/// A step of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// One line for people.
    pub title: String,
    /// Where it stands.
    pub state: StepState,
    /// How often it was tried.
    pub attempts: u32,
    /// Its failure.
    pub fault: Option<ErrorBody>,
    /// What it left for the steps after it.
    pub output: Option<Value>,
    /// How far it is.
    pub progress: Option<ProgressRow>,
    /// Where its undo stands; absent while there was none.
    pub undo: Option<StepState>,
    /// The undo's failure.
    pub undo_fault: Option<ErrorBody>,
    /// The phase of the job that it belongs to.
    #[serde(default)]
    pub phase: Option<String>,
    /// The signal that it waits for; `vmkeep job signal` sends it.
    #[serde(default)]
    pub awaits: Option<String>,
    /// When it goes on without.
    #[serde(default)]
    pub awaits_until: Option<Timestamp>,
}

/// A phase of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseRow {
    /// `snapshot`, `retain`, `merge`.
    pub name: String,
    /// Where it stands.
    pub state: StepState,
    /// When it began.
    pub began: Option<Timestamp>,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// How long it took; absent while it goes on.
    pub duration_ms: Option<u64>,
}

impl From<&StageView> for PhaseRow {
    fn from(stage: &StageView) -> Self {
        let span = stage.began.zip(stage.ended).map(|(began, ended)| ended.duration_since(began).as_millis());
        Self {
            name: stage.name.clone(),
            state: stage.state,
            began: stage.began,
            ended: stage.ended,
            duration_ms: span.and_then(|ms| u64::try_from(ms).ok()),
        }
    }
}

/// A job with its steps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobDetail {
    /// The row.
    pub job: JobRow,
    /// The plan's point of no return.
    pub point_of_no_return: Option<String>,
    /// When a pause ends by itself.
    pub paused_until: Option<Timestamp>,
    /// The steps, by title, that must be done before the job is in a safe place, where a pause takes effect; empty if it
    /// is in one.
    #[serde(default)]
    pub safe_after: Vec<String>,
    /// Why this daemon set it aside, if it did.
    pub parked: Option<ErrorBody>,
    /// Who asked to cancel it after its point of no return; it goes on to its end.
    pub cancelled_too_late: Option<String>,
    /// What it has come to so far, in words: the backup that it made, how long the guest stood still.
    pub results: Vec<String>,
    /// Its phases, in their order; empty for jobs that have none.
    #[serde(default)]
    pub phases: Vec<PhaseRow>,
    /// The steps, in the plan's order.
    pub steps: Vec<StepRow>,
}

/// What a change answers: the job that carries it out, or the plan that it would have.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accepted {
    /// The job that was made, or that the same key had made before.
    Job(Box<JobRow>),
    /// A dry run's plan. Nothing was changed.
    Plan(Box<Plan>),
}

/// What an act did, or would do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Acted {
    /// In words.
    pub message: String,
    /// The job afterwards.
    pub job: JobRow,
}

/// An event of a journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HistoryRow {
    /// Its place.
    pub seq: u64,
    /// The record's hash, in hexadecimal.
    pub hash: String,
    /// The event as it is stored.
    pub event: Value,
}

/// A story in plain words.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// What happened, in its order.
    pub lines: Vec<vmkeep_workflow::explain::Line>,
    /// What it comes to: how long the guest stood still, what was undone, what is left.
    pub summary: Vec<String>,
}

/// What a replay found. A divergence is an error and no answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Replayed {
    /// The job.
    pub job: String,
    /// How many events were folded.
    pub events: u64,
    /// How many of them are decisions that were taken again and came out the same.
    pub decisions: u64,
    /// Where the job stands.
    pub status: JobStatus,
}

/// One thing that the doctor looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at: `libvirt`.
    pub topic: String,
    /// How it is.
    pub grade: Grade,
    /// What was found.
    pub text: String,
    /// What helps; empty when nothing needs to.
    pub remedy: String,
}

/// How a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// As it should be.
    Good,
    /// Worth knowing; backups work.
    Note,
    /// Some backups will fail, or be worse than they could be.
    Warning,
    /// Backups will fail.
    Bad,
}

/// One message of a job's live stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
pub enum Live {
    /// The job as it is now. Sent first, after every event, and while steps advance.
    Job(Box<JobDetail>),
    /// The job ended or needs attention: the stream ends.
    End(Box<JobDetail>),
}

/// A backup in one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRow {
    /// Its whole id.
    pub id: String,
    /// The shortest beginning that is unique among all backups.
    pub short: String,
    /// The domain's name at the time.
    pub domain: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// The point in time that it holds.
    pub at: Timestamp,
    /// Whether it holds memory.
    pub memory: bool,
    /// Its disks, by target.
    pub disks: Vec<String>,
    /// What its files take, in bytes.
    pub size: u64,
    /// Its folder.
    pub folder: PathBuf,
    /// The job that made it.
    pub job: Option<String>,
    /// Why it must not be deleted, if it must not.
    #[serde(default)]
    pub protection: Option<ProtectionRow>,
    /// What its last verification found; absent: none that is known of.
    #[serde(default)]
    pub verified: Option<VerifiedRow>,
    /// Further folders in which the very same backup lies: somebody copied it.
    #[serde(default)]
    pub copies: Vec<PathBuf>,
}

/// What reading a backup again found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifiedRow {
    /// When.
    pub at: Timestamp,
    /// The job: a verification, or a retention that made sure of it.
    pub job: String,
    /// What was wrong; absent: all of it is what was published.
    pub problem: Option<String>,
}

/// Why a backup must not be deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectionRow {
    /// Who said so.
    pub by: String,
    /// When.
    pub at: Timestamp,
    /// When that ends by itself; absent: never.
    pub until: Option<Timestamp>,
    /// Why.
    pub why: Option<String>,
}

/// A backup that was there once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingRow {
    /// What its manifest said.
    pub backup: BackupRow,
    /// What is known of why it is not there.
    pub why: String,
}

/// A backup with its manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackupDetail {
    /// The row.
    pub backup: BackupRow,
    /// What shows that its manifest is not the one that was published. `verify` fails with these.
    #[serde(default)]
    pub problems: Vec<String>,
    /// What somebody who restores it should know.
    pub notes: Vec<String>,
    /// The manifest as it is stored.
    pub manifest: Value,
}

/// The backups, and what could not be read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Backups {
    /// Newest first.
    pub backups: Vec<BackupRow>,
    /// Those that were seen once, were not deleted by vmkeep, and are not there; newest first.
    #[serde(default)]
    pub missing: Vec<MissingRow>,
    /// The last backup of each domain that a job of this host has put into each vault; a domain may be gone since.
    #[serde(default)]
    pub in_vaults: Vec<VaultedRow>,
    /// Folders that cannot be looked into, manifests that cannot be read, deletions that were given up.
    pub warnings: Vec<String>,
    /// Whether there may be backups that could not be seen; a warning names each place.
    #[serde(default)]
    pub partial: bool,
}

//! Domain jobs (save, snapshot, backup, migration) and backup jobs. All calls here block.
//!
//! A domain has at most one job of this kind. Statistics of a job that ended live in libvirtd's memory
//! only: one read without `KEEP_COMPLETED`, or one restart of libvirtd, and they are gone. A pull-mode
//! backup has no end of its own: [`Domain::abort_job`] ends it, and libvirt then reports a completed
//! job with the error text "Operation canceled", which is success.

use serde::{Deserialize, Serialize};
use virt_sys as sys;

use crate::block::params_of_job;
use crate::domain::Domain;
use crate::error::{Error, ErrorCode, Result};
use crate::ffi::{Params, cstr, cstr_opt, opt_ptr, take_str};
use crate::flags::{BackupBeginFlags, JobStatsFlags};

/// What libvirt says of a job's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobPhase {
    /// No job.
    None,
    /// It runs, its end is foreseeable.
    Bounded,
    /// It runs, its end is not foreseeable.
    Unbounded,
    /// It ended well.
    Completed,
    /// It failed.
    Failed,
    /// It was aborted.
    Cancelled,
    /// A state this crate does not know.
    Other(i32),
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobOperation {
    /// libvirt does not say.
    Unknown,
    /// Starts the domain.
    Start,
    /// Saves it.
    Save,
    /// Restores it.
    Restore,
    /// Receives a migration.
    MigrationIn,
    /// Sends a migration.
    MigrationOut,
    /// Makes a snapshot.
    Snapshot,
    /// Reverts to a snapshot.
    SnapshotRevert,
    /// Dumps memory.
    Dump,
    /// Runs a backup.
    Backup,
    /// Deletes a snapshot.
    SnapshotDelete,
    /// An operation this crate does not know.
    Other(i32),
}

impl JobPhase {
    pub(crate) fn from_raw(raw: i32) -> Self {
        match u32::try_from(raw).unwrap_or(u32::MAX) {
            sys::VIR_DOMAIN_JOB_NONE => Self::None,
            sys::VIR_DOMAIN_JOB_BOUNDED => Self::Bounded,
            sys::VIR_DOMAIN_JOB_UNBOUNDED => Self::Unbounded,
            sys::VIR_DOMAIN_JOB_COMPLETED => Self::Completed,
            sys::VIR_DOMAIN_JOB_FAILED => Self::Failed,
            sys::VIR_DOMAIN_JOB_CANCELLED => Self::Cancelled,
            _ => Self::Other(raw),
        }
    }

    /// Whether it runs now.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Bounded | Self::Unbounded)
    }
}

impl JobOperation {
    fn from_raw(raw: i32) -> Self {
        match u32::try_from(raw).unwrap_or(u32::MAX) {
            sys::VIR_DOMAIN_JOB_OPERATION_UNKNOWN => Self::Unknown,
            sys::VIR_DOMAIN_JOB_OPERATION_START => Self::Start,
            sys::VIR_DOMAIN_JOB_OPERATION_SAVE => Self::Save,
            sys::VIR_DOMAIN_JOB_OPERATION_RESTORE => Self::Restore,
            sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN => Self::MigrationIn,
            sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT => Self::MigrationOut,
            sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT => Self::Snapshot,
            sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT => Self::SnapshotRevert,
            sys::VIR_DOMAIN_JOB_OPERATION_DUMP => Self::Dump,
            sys::VIR_DOMAIN_JOB_OPERATION_BACKUP => Self::Backup,
            sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE => Self::SnapshotDelete,
            _ => Self::Other(raw),
        }
    }
}

/// A job's statistics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobStats {
    /// Whether and how it runs or ended.
    pub phase: JobPhase,
    /// What it does.
    pub operation: JobOperation,
    /// Milliseconds since it began.
    pub elapsed_ms: Option<u64>,
    /// Bytes in all, processed, left.
    pub data: Option<(u64, u64, u64)>,
    /// Guest memory: bytes in all, processed, left.
    pub memory: Option<(u64, u64, u64)>,
    /// Disk bytes in all, processed, left.
    pub disk: Option<(u64, u64, u64)>,
    /// libvirt's word on how it went wrong.
    pub error: Option<String>,
    /// Whether it succeeded, where libvirt says so.
    pub success: Option<bool>,
    /// All fields as libvirt gave them.
    pub raw: Params,
}

impl JobStats {
    pub(crate) fn from_params(phase: JobPhase, raw: Params) -> Self {
        let number = |key: &str| raw.get(key).and_then(crate::ffi::ParamValue::as_u64);
        let triple = |stem: &str| {
            let part = |what: &str| number(&format!("{stem}_{what}"));
            Some((part("total")?, part("processed")?, part("remaining")?))
        };
        let operation = number("operation").and_then(|n| i32::try_from(n).ok());
        Self {
            phase,
            operation: operation.map_or(JobOperation::Unknown, JobOperation::from_raw),
            elapsed_ms: number("time_elapsed"),
            data: triple("data"),
            memory: triple("memory"),
            disk: triple("disk"),
            error: raw.get("errmsg").and_then(|v| v.as_str()).map(str::to_owned),
            success: match raw.get("success") {
                Some(crate::ffi::ParamValue::Bool(b)) => Some(*b),
                _ => None,
            },
            raw,
        }
    }
}

impl Domain {
    /// Statistics of the present job; with `COMPLETED` of the one that ended last.
    ///
    /// # Errors
    /// libvirt's.
    pub fn job_stats(&self, flags: JobStatsFlags) -> Result<JobStats> {
        let (kind, params) = params_of_job(self, flags.bits())?;
        Ok(JobStats::from_params(JobPhase::from_raw(kind), params))
    }

    /// Whether a job runs now, and how.
    ///
    /// # Errors
    /// libvirt's.
    pub fn job_phase(&self) -> Result<JobPhase> {
        // SAFETY: plain numbers, for which zero is valid.
        let mut raw: sys::virDomainJobInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is valid and the pointer is to a local of the right type.
        let ret = unsafe { sys::virDomainGetJobInfo(self.ptr(), &raw mut raw) };
        self.status("virDomainGetJobInfo", ret)?;
        Ok(JobPhase::from_raw(raw.type_))
    }

    /// Aborts the present job, whosever it is. Prove that it is yours first.
    ///
    /// # Errors
    /// [`ErrorCode::OperationInvalid`] when none runs.
    pub fn abort_job(&self) -> Result<()> {
        self.abort_job_flags(0)
    }

    /// As [`Self::abort_job`], with libvirt's `virDomainAbortJobFlagsValues`.
    ///
    /// # Errors
    /// libvirt's.
    pub fn abort_job_flags(&self, flags: u32) -> Result<()> {
        // SAFETY: the handle is valid. Without flags the older function serves older libvirts too.
        let (call, ret) = unsafe {
            if flags == 0 {
                ("virDomainAbortJob", sys::virDomainAbortJob(self.ptr()))
            } else {
                ("virDomainAbortJobFlags", sys::virDomainAbortJobFlags(self.ptr(), flags))
            }
        };
        self.status(call, ret).map(drop)
    }

    /// Begins a backup job, and a checkpoint in the same instant if `checkpoint` is given.
    ///
    /// # Errors
    /// [`ErrorCode::CheckpointInconsistent`] when the bitmap of an incremental cannot be used. A backup
    /// that fails later leaves its new checkpoint behind.
    pub fn backup_begin(
        &self,
        backup: &str,
        checkpoint: Option<&str>,
        flags: BackupBeginFlags,
    ) -> Result<()> {
        const CALL: &str = "virDomainBackupBegin";
        let c_backup = cstr(CALL, &self.label(), backup)?;
        let c_checkpoint = cstr_opt(CALL, &self.label(), checkpoint)?;
        // SAFETY: the handle is valid, the strings outlive the call, null means "no checkpoint".
        let ret = unsafe {
            sys::virDomainBackupBegin(
                self.ptr(),
                c_backup.as_ptr(),
                opt_ptr(c_checkpoint.as_ref()),
                flags.bits(),
            )
        };
        self.status(CALL, ret).map(drop)
    }

    /// The present backup job's description, with what libvirt filled in; `None` if none runs.
    ///
    /// # Errors
    /// libvirt's.
    pub fn backup_xml(&self) -> Result<Option<String>> {
        const CALL: &str = "virDomainBackupGetXMLDesc";
        // SAFETY: the handle is valid; the answer is ours to free.
        match unsafe { take_str(sys::virDomainBackupGetXMLDesc(self.ptr(), 0)) } {
            Some(xml) => Ok(Some(xml)),
            None => match Error::last(CALL, self.label()) {
                e if e.code == ErrorCode::NoDomainBackup => Ok(None),
                e => Err(e),
            },
        }
    }
}

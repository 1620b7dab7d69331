//! Disks and block jobs. All calls here block.
//!
//! `disk` is a target (`vda`) or the path of the disk's source; where a link deeper in the chain is
//! meant, `vda[3]` with the index of the live XML.
//!
//! Rates are in MiB/s unless the flags say bytes. A rate of 0 means "no limit".
//!
//! libvirt's own view of a block job has no "ready": an active commit is ready when the live XML's
//! `<mirror>` says `ready='yes'` ([`crate::xml::Mirror`]) or QEMU says so ([`crate::qemu`]). Equal
//! `cur` and `end` are not proof.

use serde::{Deserialize, Serialize};
use virt_sys as sys;

use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::ffi::{ParamArray, Params, cstr, cstr_opt, opt_ptr, read_params};
use crate::flags::{BlockJobAbortFlags, BlockJobRateFlags, CommitFlags, PullFlags, ResizeFlags};

/// What a block job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockJobKind {
    /// libvirt does not know.
    Unknown,
    /// Pulls the chain into its top.
    Pull,
    /// Copies to another image.
    Copy,
    /// Commits links below the top.
    Commit,
    /// Commits the top; ends with a pivot.
    ActiveCommit,
    /// Belongs to a backup job.
    Backup,
    /// A kind this crate does not know.
    Other(i32),
}

impl BlockJobKind {
    pub(crate) fn from_raw(raw: i32) -> Self {
        match u32::try_from(raw).unwrap_or(u32::MAX) {
            sys::VIR_DOMAIN_BLOCK_JOB_TYPE_UNKNOWN => Self::Unknown,
            sys::VIR_DOMAIN_BLOCK_JOB_TYPE_PULL => Self::Pull,
            sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COPY => Self::Copy,
            sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT => Self::Commit,
            sys::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT => Self::ActiveCommit,
            sys::VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP => Self::Backup,
            _ => Self::Other(raw),
        }
    }
}

/// Progress of a block job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockJobInfo {
    /// What it does.
    pub kind: BlockJobKind,
    /// The limit, in the unit that was asked for.
    pub bandwidth: u64,
    /// How far it is; in the unit of `end`, which is not always bytes.
    pub cur: u64,
    /// Where it ends.
    pub end: u64,
}

/// Sizes of a disk, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockInfo {
    /// What the guest sees.
    pub capacity: u64,
    /// Highest offset in use by the guest's data.
    pub allocation: u64,
    /// What the host's file occupies.
    pub physical: u64,
}

impl Domain {
    /// Begins to commit `top` into `base`; `None` for the current top and the deepest base.
    ///
    /// # Errors
    /// [`crate::ErrorCode::BlockCopyActive`] when a job already runs on the disk.
    pub fn block_commit(
        &self,
        disk: &str,
        base: Option<&str>,
        top: Option<&str>,
        bandwidth: u64,
        flags: CommitFlags,
    ) -> Result<()> {
        const CALL: &str = "virDomainBlockCommit";
        let object = self.disk_label(disk);
        let c_disk = cstr(CALL, &object, disk)?;
        let (c_base, c_top) = (cstr_opt(CALL, &object, base)?, cstr_opt(CALL, &object, top)?);
        // SAFETY: the handle is valid, the strings outlive the call, null means the default.
        let ret = unsafe {
            sys::virDomainBlockCommit(
                self.ptr(),
                c_disk.as_ptr(),
                opt_ptr(c_base.as_ref()),
                opt_ptr(c_top.as_ref()),
                bandwidth,
                flags.bits(),
            )
        };
        self.disk_status(CALL, disk, ret).map(drop)
    }

    /// Begins to pull the whole chain into the top.
    ///
    /// # Errors
    /// libvirt's.
    pub fn block_pull(&self, disk: &str, bandwidth: u64, flags: PullFlags) -> Result<()> {
        const CALL: &str = "virDomainBlockPull";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ret = unsafe { sys::virDomainBlockPull(self.ptr(), c_disk.as_ptr(), bandwidth, flags.bits()) };
        self.disk_status(CALL, disk, ret).map(drop)
    }

    /// Ends the disk's block job; with `PIVOT` it ends on the base of an active commit.
    ///
    /// # Errors
    /// [`crate::ErrorCode::InvalidArg`] when there is no job, [`crate::ErrorCode::BlockCopyActive`]
    /// when it is not ready for a pivot.
    pub fn block_job_abort(&self, disk: &str, flags: BlockJobAbortFlags) -> Result<()> {
        const CALL: &str = "virDomainBlockJobAbort";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ret = unsafe { sys::virDomainBlockJobAbort(self.ptr(), c_disk.as_ptr(), flags.bits()) };
        self.disk_status(CALL, disk, ret).map(drop)
    }

    /// The disk's block job; `None` if there is none.
    ///
    /// # Errors
    /// libvirt's.
    pub fn block_job_info(&self, disk: &str) -> Result<Option<BlockJobInfo>> {
        const CALL: &str = "virDomainGetBlockJobInfo";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        // SAFETY: plain numbers, for which zero is valid.
        let mut raw: sys::virDomainBlockJobInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is valid, the string outlives the call, the pointer is to a local.
        let ret = unsafe {
            sys::virDomainGetBlockJobInfo(
                self.ptr(),
                c_disk.as_ptr(),
                &raw mut raw,
                sys::VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES,
            )
        };
        let found = self.disk_status(CALL, disk, ret)? > 0;
        Ok(found.then(|| BlockJobInfo {
            kind: BlockJobKind::from_raw(raw.type_),
            bandwidth: raw.bandwidth,
            cur: raw.cur,
            end: raw.end,
        }))
    }

    /// Limits the disk's block job.
    ///
    /// # Errors
    /// libvirt's.
    pub fn block_job_set_speed(&self, disk: &str, bandwidth: u64, flags: BlockJobRateFlags) -> Result<()> {
        const CALL: &str = "virDomainBlockJobSetSpeed";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ret =
            unsafe { sys::virDomainBlockJobSetSpeed(self.ptr(), c_disk.as_ptr(), bandwidth, flags.bits()) };
        self.disk_status(CALL, disk, ret).map(drop)
    }

    /// Sizes of a disk.
    ///
    /// # Errors
    /// libvirt's.
    pub fn block_info(&self, disk: &str) -> Result<BlockInfo> {
        const CALL: &str = "virDomainGetBlockInfo";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        // SAFETY: plain numbers, for which zero is valid.
        let mut raw: sys::virDomainBlockInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is valid, the string outlives the call, the pointer is to a local.
        let ret = unsafe { sys::virDomainGetBlockInfo(self.ptr(), c_disk.as_ptr(), &raw mut raw, 0) };
        self.disk_status(CALL, disk, ret)?;
        Ok(BlockInfo { capacity: raw.capacity, allocation: raw.allocation, physical: raw.physical })
    }

    /// Counters of a disk (`rd_bytes`, `wr_bytes`, `flush_operations`, …), since the domain's start.
    ///
    /// # Errors
    /// libvirt's.
    pub fn block_stats(&self, disk: &str) -> Result<Params> {
        const CALL: &str = "virDomainBlockStatsFlags";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        let mut count = 0;
        // SAFETY: a null array asks how many there are.
        let ret = unsafe {
            sys::virDomainBlockStatsFlags(
                self.ptr(),
                c_disk.as_ptr(),
                std::ptr::null_mut(),
                &raw mut count,
                0,
            )
        };
        self.disk_status(CALL, disk, ret)?;
        // SAFETY: all-zero is a valid typed parameter (type 0 is skipped by the reader).
        let zero: sys::virTypedParameter = unsafe { std::mem::zeroed() };
        let mut array = vec![zero; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the array has `count` elements; the call sets `count` to how many it filled.
        let ret = unsafe {
            sys::virDomainBlockStatsFlags(self.ptr(), c_disk.as_ptr(), array.as_mut_ptr(), &raw mut count, 0)
        };
        self.disk_status(CALL, disk, ret)?;
        let filled = usize::try_from(count).unwrap_or(0).min(array.len());
        // SAFETY: the first `filled` elements were filled by libvirt. Block statistics are numbers, so
        // there are no strings to free.
        Ok(unsafe { read_params(array.as_ptr(), filled) })
    }

    /// Asks for one event when writes go beyond `bytes` in the image (0 takes it back).
    ///
    /// # Errors
    /// libvirt's.
    pub fn set_block_threshold(&self, disk: &str, bytes: u64) -> Result<()> {
        const CALL: &str = "virDomainSetBlockThreshold";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ret = unsafe { sys::virDomainSetBlockThreshold(self.ptr(), c_disk.as_ptr(), bytes, 0) };
        self.disk_status(CALL, disk, ret).map(drop)
    }

    /// Resizes a disk of a running domain to `bytes`.
    ///
    /// # Errors
    /// libvirt's.
    pub fn block_resize(&self, disk: &str, bytes: u64) -> Result<()> {
        const CALL: &str = "virDomainBlockResize";
        let c_disk = cstr(CALL, &self.disk_label(disk), disk)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ret = unsafe {
            sys::virDomainBlockResize(self.ptr(), c_disk.as_ptr(), bytes, ResizeFlags::BYTES.bits())
        };
        self.disk_status(CALL, disk, ret).map(drop)
    }

    fn disk_label(&self, disk: &str) -> String {
        format!("disk '{disk}' of domain '{}'", self.name())
    }

    fn disk_status(&self, call: &'static str, disk: &str, ret: libc::c_int) -> Result<libc::c_int> {
        if ret < 0 { Err(Error::last(call, self.disk_label(disk))) } else { Ok(ret) }
    }
}

/// The statistics of a domain job, however it is asked for.
pub(crate) fn params_of_job(domain: &Domain, flags: u32) -> Result<(libc::c_int, Params)> {
    let mut kind = 0;
    let mut array = ParamArray::new();
    // SAFETY: the handle is valid; libvirt allocates the array, which `ParamArray` frees.
    let ret = unsafe {
        sys::virDomainGetJobStats(domain.ptr(), &raw mut kind, &raw mut array.ptr, &raw mut array.len, flags)
    };
    domain.status("virDomainGetJobStats", ret)?;
    Ok((kind, array.to_map()))
}

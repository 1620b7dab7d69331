//! Whether libvirt is busy with a domain.
//!
//! The one question about a domain that waits for nothing: libvirt answers it from its own memory,
//! without its job lock and without QEMU, so it is answered at once also while QEMU stands still and
//! every other call waits. It sees calls, not the asynchronous job (save, snapshot, migration) that
//! they may have started: [`Domain::job_stats`] sees that.

use virt_sys as sys;

use crate::domain::Domain;
use crate::error::Result;

/// Whether libvirt is busy with a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// It is not.
    Idle,
    /// A call is being executed, or waits for QEMU's answer.
    Busy {
        /// Since so many milliseconds.
        for_ms: u64,
    },
    /// It cannot talk to QEMU.
    Broken,
}

impl Domain {
    /// Whether libvirt is busy with it.
    ///
    /// # Errors
    /// [`crate::ErrorCode::OperationInvalid`] when it is not running.
    pub fn control(&self) -> Result<Control> {
        const CALL: &str = "virDomainGetControlInfo";
        // SAFETY: plain numbers, for which zero is valid.
        let mut raw: sys::virDomainControlInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is valid, the pointer is to a local.
        let ret = unsafe { sys::virDomainGetControlInfo(self.ptr(), &raw mut raw, 0) };
        self.status(CALL, ret)?;
        Ok(match raw.state {
            sys::VIR_DOMAIN_CONTROL_OK => Control::Idle,
            sys::VIR_DOMAIN_CONTROL_JOB | sys::VIR_DOMAIN_CONTROL_OCCUPIED => {
                Control::Busy { for_ms: raw.stateTime }
            }
            _ => Control::Broken,
        })
    }
}

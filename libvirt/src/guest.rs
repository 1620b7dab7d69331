//! The guest agent: freezing and thawing file systems, and commands of its own. All calls here block.
//!
//! A freeze that got no answer may still happen as soon as the guest is scheduled again
//! ([`crate::Class::InDoubt`]): record the request before calling, and thaw whatever the answer was.

use serde::{Deserialize, Serialize};
use virt_sys as sys;

use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::ffi::{borrow_str, cstr, take_list, take_str};

/// A file system mounted in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFilesystem {
    /// Where it is mounted, in the guest's words.
    pub mountpoint: String,
    /// The guest's name of its device.
    pub name: String,
    /// Its type.
    pub fstype: String,
    /// The domain's disks it lives on (targets such as `vda`).
    pub disks: Vec<String>,
}

impl Domain {
    /// Freezes the file systems at `mountpoints`, all for none. Returns how many were frozen.
    ///
    /// # Errors
    /// [`crate::ErrorCode::AgentUnresponsive`], [`crate::ErrorCode::AgentCommandFailed`] and the like.
    pub fn fs_freeze(&self, mountpoints: &[&str]) -> Result<u32> {
        const CALL: &str = "virDomainFSFreeze";
        let owned = mountpoints.iter().map(|m| cstr(CALL, &self.label(), m)).collect::<Result<Vec<_>>>()?;
        let mut raw: Vec<*const libc::c_char> = owned.iter().map(|m| m.as_ptr()).collect();
        let (list, count) = list_args(&mut raw);
        // SAFETY: the handle is valid; the array has `count` strings that outlive the call.
        let ret = unsafe { sys::virDomainFSFreeze(self.ptr(), list, count, 0) };
        self.status(CALL, ret).map(|n| u32::try_from(n).unwrap_or(0))
    }

    /// Thaws what is frozen. Returns how many file systems were thawed, 0 when none was frozen.
    ///
    /// # Errors
    /// As [`Self::fs_freeze`].
    pub fn fs_thaw(&self) -> Result<u32> {
        const CALL: &str = "virDomainFSThaw";
        // SAFETY: the handle is valid; a null list means all.
        let ret = unsafe { sys::virDomainFSThaw(self.ptr(), std::ptr::null_mut(), 0, 0) };
        self.status(CALL, ret).map(|n| u32::try_from(n).unwrap_or(0))
    }

    /// The guest's mounted file systems.
    ///
    /// # Errors
    /// As [`Self::fs_freeze`].
    pub fn fs_info(&self) -> Result<Vec<GuestFilesystem>> {
        let mut list = std::ptr::null_mut();
        // SAFETY: the handle is valid; libvirt allocates the list.
        let ret = unsafe { sys::virDomainGetFSInfo(self.ptr(), &raw mut list, 0) };
        let count = usize::try_from(self.status("virDomainGetFSInfo", ret)?).unwrap_or(0);
        // SAFETY: the list has `count` entries, each ours to free after it was copied; an entry's array
        // has as many strings as it says.
        Ok(unsafe {
            take_list(list, count, |p: sys::virDomainFSInfoPtr| {
                let entry = GuestFilesystem {
                    mountpoint: borrow_str((*p).mountpoint).unwrap_or_default(),
                    name: borrow_str((*p).name).unwrap_or_default(),
                    fstype: borrow_str((*p).fstype).unwrap_or_default(),
                    disks: (0..(*p).ndevAlias).filter_map(|i| borrow_str(*(*p).devAlias.add(i))).collect(),
                };
                sys::virDomainFSInfoFree(p);
                entry
            })
        })
    }

    /// Sends a command to the guest agent and gives its answer, both JSON. `timeout_s` is in seconds;
    /// `None` means libvirt's default.
    ///
    /// # Errors
    /// As [`Self::fs_freeze`].
    pub fn agent_command(&self, json: &str, timeout_s: Option<i32>) -> Result<String> {
        const CALL: &str = "virDomainQemuAgentCommand";
        let c_json = cstr(CALL, &self.label(), json)?;
        let timeout = timeout_s.map_or(sys::VIR_DOMAIN_QEMU_AGENT_COMMAND_DEFAULT, |t| t.max(0));
        // SAFETY: the handle is valid, the string outlives the call, the answer is ours to free.
        let answer =
            unsafe { take_str(sys::virDomainQemuAgentCommand(self.ptr(), c_json.as_ptr(), timeout, 0)) };
        answer.ok_or_else(|| Error::last(CALL, self.label()))
    }

    /// Whether the guest agent answers within `timeout_s` seconds.
    ///
    /// # Errors
    /// As [`Self::fs_freeze`].
    pub fn agent_ping(&self, timeout_s: i32) -> Result<()> {
        self.agent_command(r#"{"execute":"guest-ping"}"#, Some(timeout_s)).map(drop)
    }
}

fn list_args(raw: &mut [*const libc::c_char]) -> (*mut *const libc::c_char, libc::c_uint) {
    if raw.is_empty() {
        return (std::ptr::null_mut(), 0);
    }
    (raw.as_mut_ptr(), libc::c_uint::try_from(raw.len()).unwrap_or(libc::c_uint::MAX))
}

//! QEMU's monitor, through libvirt. All calls here block.
//!
//! libvirt marks a domain as tainted when its monitor is used; that is a note in its log and in
//! `<domainstats>`, nothing else. Only queries are sent by this crate itself ([`crate::qemu`]).

use serde::de::DeserializeOwned;
use virt_sys as sys;

use crate::domain::Domain;
use crate::error::{Error, ErrorCode, Result};
use crate::ffi::{cstr, take_str};

impl Domain {
    fn monitor(&self, call: &'static str, command: &str, flags: u32) -> Result<String> {
        let c_command = cstr(call, &self.label(), command)?;
        let mut answer = std::ptr::null_mut();
        // SAFETY: the handle is valid, the string outlives the call, the pointer is to a local.
        let ret = unsafe {
            sys::virDomainQemuMonitorCommand(self.ptr(), c_command.as_ptr(), &raw mut answer, flags)
        };
        // SAFETY: null, or a string that libvirt hands over.
        let text = unsafe { take_str(answer) };
        self.status(call, ret)?;
        text.ok_or_else(|| Error::own(call, self.label(), ErrorCode::Unreadable, "no answer"))
    }

    /// Sends one QMP command, as JSON, and gives the whole answer, as JSON. An error of QEMU's is an
    /// answer too (its member is `error` instead of `return`).
    ///
    /// # Errors
    /// libvirt's.
    pub fn qmp_raw(&self, json: &str) -> Result<String> {
        self.monitor("virDomainQemuMonitorCommand", json, sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)
    }

    /// Sends one command of QEMU's human monitor and gives its text.
    ///
    /// # Errors
    /// libvirt's.
    pub fn hmp(&self, command: &str) -> Result<String> {
        self.monitor("virDomainQemuMonitorCommand", command, sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
    }

    /// Sends one QMP command without side effects and reads its answer. `command` names itself in
    /// errors, as `qmp:query-block`.
    ///
    /// # Errors
    /// libvirt's; [`ErrorCode::Unreadable`] for an answer of another shape;
    /// [`ErrorCode::OperationFailed`] for QEMU's refusal.
    pub fn qmp_query<T: DeserializeOwned>(&self, command: &'static QmpQuery) -> Result<T> {
        #[derive(serde::Deserialize)]
        struct Answer<T> {
            #[serde(rename = "return")]
            value: Option<T>,
            error: Option<QmpError>,
        }
        #[derive(serde::Deserialize)]
        struct QmpError {
            desc: String,
        }
        let text = self.monitor(
            command.label,
            &serde_json::json!({ "execute": command.execute }).to_string(),
            sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT,
        )?;
        let unreadable = |m: String| Error::own(command.label, self.label(), ErrorCode::Unreadable, m);
        let answer: Answer<T> = serde_json::from_str(&text).map_err(|e| unreadable(e.to_string()))?;
        match (answer.value, answer.error) {
            (Some(value), _) => Ok(value),
            (None, Some(e)) => {
                Err(Error::own(command.label, self.label(), ErrorCode::OperationFailed, e.desc))
            }
            (None, None) => Err(unreadable("neither a result nor an error".to_owned())),
        }
    }
}

/// A QMP command that only asks.
#[derive(Debug)]
pub struct QmpQuery {
    execute: &'static str,
    label: &'static str,
}

impl QmpQuery {
    /// `query-block`
    pub const BLOCK: Self = Self { execute: "query-block", label: "qmp:query-block" };
    /// `query-named-block-nodes`
    pub const NAMED_BLOCK_NODES: Self =
        Self { execute: "query-named-block-nodes", label: "qmp:query-named-block-nodes" };
    /// `query-block-jobs`
    pub const BLOCK_JOBS: Self = Self { execute: "query-block-jobs", label: "qmp:query-block-jobs" };
    /// `query-status`
    pub const STATUS: Self = Self { execute: "query-status", label: "qmp:query-status" };
    /// `query-migrate`
    pub const MIGRATE: Self = Self { execute: "query-migrate", label: "qmp:query-migrate" };
    /// `query-jobs`
    pub const JOBS: Self = Self { execute: "query-jobs", label: "qmp:query-jobs" };
}

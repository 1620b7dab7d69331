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
        let text = self.monitor(command.label, command.json, sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)?;
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
    json: &'static str,
    label: &'static str,
}

macro_rules! queries {
    ($($(#[$doc:meta])* $name:ident = $execute:literal $($arguments:literal)?;)*) => {
        impl QmpQuery {
            $(
                $(#[$doc])*
                pub const $name: Self = Self {
                    json: concat!("{\"execute\":\"", $execute, "\"", $(",\"arguments\":", $arguments,)? "}"),
                    label: concat!("qmp:", $execute),
                };
            )*
        }
    };
}

queries! {
    /// The guest's drives.
    BLOCK = "query-block";
    /// Every node of the block graph, each without what lies below it.
    NAMED_BLOCK_NODES = "query-named-block-nodes" r#"{"flat":true}"#;
    /// Which node is whose child. QEMU calls it unstable; it has been the same since 3.0, and nothing
    /// else tells the chain by node. Callers must do without it.
    BLOCK_GRAPH = "x-debug-query-block-graph";
    /// Block jobs.
    BLOCK_JOBS = "query-block-jobs";
    /// All jobs.
    JOBS = "query-jobs";
    /// Whether the guest runs.
    STATUS = "query-status";
    /// The migration in progress; saving is one.
    MIGRATE = "query-migrate";
}

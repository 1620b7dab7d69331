//! Typed errors of libvirt calls.
//!
//! Invariant: every failed call yields an [`Error`] that says which function failed on which object,
//! with libvirt's own code, and [`Error::class`] never calls an effect "not happened" that may still
//! happen. The second half deserves a word.
//!
//! A libvirt call is a message to a daemon. Three kinds of failure leave the caller not knowing
//! whether the effect took place: the connection broke while the answer was awaited (libvirtd goes on
//! executing the call of a client that is gone), the guest agent did not answer in time (it may act on
//! the command as soon as it is scheduled again), or a timeout fired inside the hypervisor. Those are
//! [`Class::InDoubt`] for a call that changes something, and merely [`Class::ConnectionLost`] or
//! [`Class::Transient`] for one that only reads. One timeout is certain: "cannot acquire state change
//! lock" is reported before the call has done anything, so it is transient.
//!
//! The texts of messages are consulted only where libvirt has no code of its own, and always next to
//! something firmer: the domain of the error for broken connections, `int1`, which carries `errno`,
//! for a full disk.

use std::ffi::CStr;
use std::fmt;

use virt::error::{ErrorDomain, ErrorNumber};
use virt_sys as sys;

/// The result of every fallible operation of this crate that ends in libvirt.
pub type Result<T> = std::result::Result<T, Error>;

/// A libvirt call that failed (or that this crate refused to make).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} on {object}: {message} [{code}]")]
pub struct Error {
    /// The C function, for example `virDomainBlockCommit`.
    pub call: &'static str,
    /// What the call was about, in words: "domain 'web'", "connection qemu:///session".
    pub object: String,
    /// What libvirt says went wrong.
    pub code: ErrorCode,
    /// The raw number of the libvirt subsystem that reported it (`virErrorDomain`).
    pub origin: i32,
    /// The `errno` behind a [`ErrorCode::SystemError`], when libvirt passed it on.
    pub errno: Option<i32>,
    /// libvirt's own sentence.
    pub message: String,
}

/// What a caller may conclude from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// It did not take effect and may succeed when tried again later.
    Transient,
    /// It did not take effect and the same call will fail again.
    Permanent,
    /// The connection is gone; the call changed nothing. Reconnect, then ask again.
    ConnectionLost,
    /// It may have taken effect, or may still: look at the world before doing anything else.
    InDoubt,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $raw:ident,)*) => {
        /// libvirt's error numbers that matter here, and this crate's own few.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorCode {
            $($(#[$doc])* $name,)*
            /// The disk is full (`ENOSPC`, or the message says so).
            NoSpace,
            /// This crate refused a URI that names another host.
            RemoteUri,
            /// This crate refused an argument that C cannot represent (a NUL byte).
            NulByte,
            /// libvirt or QEMU answered something this crate cannot read.
            Unreadable,
            /// There is no connection at the moment and the caller did not want to wait.
            Disconnected,
            /// Any other number of libvirt's.
            Other(i32),
        }

        impl ErrorCode {
            /// From libvirt's number.
            pub fn from_raw(raw: i32) -> Self {
                match u32::try_from(raw).unwrap_or(0) {
                    $(sys::$raw => Self::$name,)*
                    _ => Self::Other(raw),
                }
            }

            /// libvirt's number; `None` for this crate's own codes.
            pub fn raw(self) -> Option<i32> {
                match self {
                    $(Self::$name => i32::try_from(sys::$raw).ok(),)*
                    Self::Other(raw) => Some(raw),
                    Self::NoSpace => i32::try_from(sys::VIR_ERR_SYSTEM_ERROR).ok(),
                    _ => None,
                }
            }
        }
    };
}

codes! {
    /// libvirt's catch-all; QEMU's refusals arrive as this too.
    InternalError = VIR_ERR_INTERNAL_ERROR,
    /// Out of memory.
    NoMemory = VIR_ERR_NO_MEMORY,
    /// The driver lacks the function.
    NoSupport = VIR_ERR_NO_SUPPORT,
    /// Nobody listens on the socket.
    NoConnect = VIR_ERR_NO_CONNECT,
    /// The connection handle is not valid.
    InvalidConn = VIR_ERR_INVALID_CONN,
    /// The domain handle is not valid.
    InvalidDomain = VIR_ERR_INVALID_DOMAIN,
    /// An argument is not acceptable.
    InvalidArg = VIR_ERR_INVALID_ARG,
    /// The operation failed.
    OperationFailed = VIR_ERR_OPERATION_FAILED,
    /// The XML is not acceptable.
    XmlError = VIR_ERR_XML_ERROR,
    /// The XML is not well formed.
    XmlDetail = VIR_ERR_XML_DETAIL,
    /// The XML does not match the schema.
    XmlInvalidSchema = VIR_ERR_XML_INVALID_SCHEMA,
    /// A domain of that name or UUID exists.
    DomExist = VIR_ERR_DOM_EXIST,
    /// Not allowed on this connection.
    OperationDenied = VIR_ERR_OPERATION_DENIED,
    /// A file could not be opened.
    OpenFailed = VIR_ERR_OPEN_FAILED,
    /// A file could not be read.
    ReadFailed = VIR_ERR_READ_FAILED,
    /// A file could not be written.
    WriteFailed = VIR_ERR_WRITE_FAILED,
    /// A system call failed; see [`Error::errno`].
    SystemError = VIR_ERR_SYSTEM_ERROR,
    /// The RPC layer failed.
    RpcError = VIR_ERR_RPC,
    /// No such domain.
    NoDomain = VIR_ERR_NO_DOMAIN,
    /// Authentication failed.
    AuthFailed = VIR_ERR_AUTH_FAILED,
    /// Authentication was cancelled.
    AuthCancelled = VIR_ERR_AUTH_CANCELLED,
    /// No way to authenticate is available.
    AuthUnavailable = VIR_ERR_AUTH_UNAVAILABLE,
    /// An access rule forbids it.
    AccessDenied = VIR_ERR_ACCESS_DENIED,
    /// Not possible in the object's present state.
    OperationInvalid = VIR_ERR_OPERATION_INVALID,
    /// A timeout; also when the domain's job lock is not free within 30 s.
    OperationTimeout = VIR_ERR_OPERATION_TIMEOUT,
    /// Somebody aborted it.
    OperationAborted = VIR_ERR_OPERATION_ABORTED,
    /// The hypervisor cannot do this here.
    OperationUnsupported = VIR_ERR_OPERATION_UNSUPPORTED,
    /// No such snapshot.
    NoDomainSnapshot = VIR_ERR_NO_DOMAIN_SNAPSHOT,
    /// No such checkpoint.
    NoDomainCheckpoint = VIR_ERR_NO_DOMAIN_CHECKPOINT,
    /// No backup job runs.
    NoDomainBackup = VIR_ERR_NO_DOMAIN_BACKUP,
    /// No metadata of that namespace.
    NoDomainMetadata = VIR_ERR_NO_DOMAIN_METADATA,
    /// The checkpoint's bitmap is missing or unusable.
    CheckpointInconsistent = VIR_ERR_CHECKPOINT_INCONSISTENT,
    /// A flag or argument this libvirt does not know.
    ArgumentUnsupported = VIR_ERR_ARGUMENT_UNSUPPORTED,
    /// The configuration is not supported.
    ConfigUnsupported = VIR_ERR_CONFIG_UNSUPPORTED,
    /// A block job is already active on the disk.
    BlockCopyActive = VIR_ERR_BLOCK_COPY_ACTIVE,
    /// Something else uses it.
    ResourceBusy = VIR_ERR_RESOURCE_BUSY,
    /// The guest agent is not there or does not answer.
    AgentUnresponsive = VIR_ERR_AGENT_UNRESPONSIVE,
    /// The guest agent is out of step.
    AgentUnsynced = VIR_ERR_AGENT_UNSYNCED,
    /// The guest agent did not finish the command in time.
    AgentCommandTimeout = VIR_ERR_AGENT_COMMAND_TIMEOUT,
    /// The guest agent refused the command.
    AgentCommandFailed = VIR_ERR_AGENT_COMMAND_FAILED,
    /// No such device in the domain.
    DeviceMissing = VIR_ERR_DEVICE_MISSING,
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other(raw) => match ErrorNumber::from_raw(u32::try_from(*raw).unwrap_or(0)) {
                // The binding knows more numbers by name than matter to us.
                ErrorNumber::Last => write!(f, "libvirt error {raw}"),
                known => write!(f, "{known:?} ({raw})"),
            },
            known => match known.raw() {
                Some(raw) => write!(f, "{known:?} ({raw})"),
                None => write!(f, "{known:?}"),
            },
        }
    }
}

impl Error {
    /// The error libvirt left for this thread by the call that just failed.
    pub(crate) fn last(call: &'static str, object: impl Into<String>) -> Self {
        // SAFETY: virGetLastError returns null or a pointer to this thread's error, which stays valid
        // until the next libvirt call on this thread; it is only read here, before any such call.
        let (raw, origin, int1, message) = unsafe {
            let e = sys::virGetLastError();
            if e.is_null() {
                (
                    i32::try_from(sys::VIR_ERR_INTERNAL_ERROR).unwrap_or(1),
                    0,
                    0,
                    "failed without saying why".to_owned(),
                )
            } else {
                let message = if (*e).message.is_null() {
                    "failed without a message".to_owned()
                } else {
                    CStr::from_ptr((*e).message).to_string_lossy().into_owned()
                };
                ((*e).code, (*e).domain, (*e).int1, message)
            }
        };
        Self::from_parts(call, object.into(), raw, origin, int1, message)
    }

    fn from_parts(
        call: &'static str,
        object: String,
        raw: i32,
        origin: i32,
        int1: i32,
        message: String,
    ) -> Self {
        let mut code = ErrorCode::from_raw(raw);
        let errno = (code == ErrorCode::SystemError && int1 > 0).then_some(int1);
        // QEMU's own ENOSPC arrives inside an internal error or a failed operation, as text.
        let says_full = message.contains("No space left on device");
        if errno == Some(libc::ENOSPC)
            || (says_full
                && matches!(
                    code,
                    ErrorCode::SystemError
                        | ErrorCode::InternalError
                        | ErrorCode::OperationFailed
                        | ErrorCode::OperationAborted
                        | ErrorCode::WriteFailed
                ))
        {
            code = ErrorCode::NoSpace;
        }
        Self { call, object, code, origin, errno, message }
    }

    /// An error of this crate's own making.
    pub(crate) fn own(
        call: &'static str,
        object: impl Into<String>,
        code: ErrorCode,
        message: impl Into<String>,
    ) -> Self {
        Self { call, object: object.into(), code, origin: 0, errno: None, message: message.into() }
    }

    /// The libvirt subsystem that reported it.
    pub fn domain(&self) -> ErrorDomain {
        ErrorDomain::from_raw(u32::try_from(self.origin).unwrap_or(0))
    }

    /// Whether the function changes something when it succeeds. Unknown functions count as changing.
    pub fn call_mutates(&self) -> bool {
        // This crate labels only QMP commands that ask.
        const READS: &[&str] =
            &["Get", "List", "Lookup", "Is", "Has", "Open", "Num", "Stats", "Info", "Query"];
        !(self.call.starts_with("qmp:") || READS.iter().any(|r| self.call.contains(r)))
    }

    /// Whether the connection to libvirtd is what failed.
    pub fn is_connection_lost(&self) -> bool {
        let rpc = self.domain() == ErrorDomain::Rpc || self.domain() == ErrorDomain::Remote;
        match self.code {
            ErrorCode::InvalidConn | ErrorCode::NoConnect | ErrorCode::Disconnected => true,
            // The RPC layer (sockets, keepalive, client state) reports a broken connection as an
            // internal or a system error; nothing else of that layer uses these two codes.
            ErrorCode::InternalError | ErrorCode::SystemError => {
                rpc || self.message.contains("client socket is closed")
                    || self.message.contains("keepalive timeout")
            }
            ErrorCode::RpcError => {
                // Too large or undecodable messages are RPC errors too, and those are permanent.
                !(self.message.contains("encode") || self.message.contains("too large"))
            }
            _ => false,
        }
    }

    /// What may be concluded from the failure; see the module's description.
    pub fn class(&self) -> Class {
        if self.is_connection_lost() {
            // A connection that never was cannot have carried the call.
            let never_sent = matches!(self.code, ErrorCode::NoConnect | ErrorCode::Disconnected);
            return if self.call_mutates() && !never_sent { Class::InDoubt } else { Class::ConnectionLost };
        }
        let unless_read = |when_mutating: Class| {
            if self.call_mutates() { when_mutating } else { Class::Transient }
        };
        match self.code {
            ErrorCode::OperationTimeout if self.message.contains("state change lock") => Class::Transient,
            ErrorCode::OperationTimeout | ErrorCode::AgentCommandTimeout | ErrorCode::AgentUnsynced => {
                unless_read(Class::InDoubt)
            }
            // "Guest agent is not responding" also covers an agent that took the command and then
            // stopped answering; only the one that is not connected surely did nothing.
            ErrorCode::AgentUnresponsive if self.message.contains("not connected") => Class::Transient,
            ErrorCode::AgentUnresponsive => unless_read(Class::InDoubt),
            ErrorCode::ResourceBusy
            | ErrorCode::BlockCopyActive
            | ErrorCode::NoMemory
            | ErrorCode::NoSpace => Class::Transient,
            ErrorCode::SystemError => match self.errno {
                Some(
                    libc::EAGAIN | libc::EINTR | libc::EBUSY | libc::EMFILE | libc::ENFILE | libc::ENOMEM,
                ) => Class::Transient,
                _ => Class::Permanent,
            },
            _ => Class::Permanent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn err(call: &'static str, code: u32, origin: u32, int1: i32, message: &str) -> Error {
        Error::from_parts(
            call,
            "domain 'x'".into(),
            i32::try_from(code).unwrap(),
            i32::try_from(origin).unwrap(),
            int1,
            message.into(),
        )
    }

    #[test]
    fn known_numbers_map_to_names_and_back_and_unknown_ones_are_kept() {
        for raw in 0..200 {
            assert_eq!(ErrorCode::from_raw(raw).raw(), Some(raw));
        }
        assert_eq!(ErrorCode::from_raw(42), ErrorCode::NoDomain);
        assert_eq!(ErrorCode::from_raw(9999), ErrorCode::Other(9999));
        assert_eq!(ErrorCode::from_raw(9999).to_string(), "libvirt error 9999");
        assert_eq!(ErrorCode::NoDomain.to_string(), "NoDomain (42)");
    }

    #[test]
    fn a_full_disk_is_recognised_by_errno_in_any_language_and_by_qemus_text() {
        let by_errno =
            err("virDomainSaveFlags", sys::VIR_ERR_SYSTEM_ERROR, sys::VIR_FROM_QEMU, libc::ENOSPC, "voll");
        assert_eq!(by_errno.code, ErrorCode::NoSpace);
        let by_text = err(
            "virDomainSaveFlags",
            sys::VIR_ERR_OPERATION_FAILED,
            sys::VIR_FROM_QEMU,
            0,
            "operation failed: No space left on device",
        );
        assert_eq!((by_text.code, by_text.class()), (ErrorCode::NoSpace, Class::Transient));
        let other = err("virDomainSaveFlags", sys::VIR_ERR_SYSTEM_ERROR, 10, libc::EACCES, "no");
        assert_eq!(
            (other.code, other.errno, other.class()),
            (ErrorCode::SystemError, Some(libc::EACCES), Class::Permanent)
        );
    }

    #[test]
    fn a_connection_that_breaks_in_mid_call_leaves_a_mutation_in_doubt_and_a_read_merely_lost() {
        for (code, msg) in [
            (sys::VIR_ERR_INTERNAL_ERROR, "internal error: client socket is closed"),
            (sys::VIR_ERR_SYSTEM_ERROR, "End of file while reading data: Input/output error"),
            (sys::VIR_ERR_SYSTEM_ERROR, "Cannot recv data: Connection reset by peer"),
            (sys::VIR_ERR_INTERNAL_ERROR, "internal error: connection closed due to keepalive timeout"),
        ] {
            assert_eq!(
                err("virDomainSaveFlags", code, sys::VIR_FROM_RPC, 5, msg).class(),
                Class::InDoubt,
                "{msg}"
            );
            assert_eq!(
                err("virDomainGetXMLDesc", code, sys::VIR_FROM_RPC, 5, msg).class(),
                Class::ConnectionLost
            );
        }
        // The same codes from the QEMU driver are about QEMU, not about the connection.
        let qemu =
            err("virDomainBlockCommit", sys::VIR_ERR_INTERNAL_ERROR, sys::VIR_FROM_QEMU, 0, "node busy");
        assert_eq!(qemu.class(), Class::Permanent);
        let too_big = err(
            "virDomainDefineXMLFlags",
            sys::VIR_ERR_RPC,
            sys::VIR_FROM_RPC,
            0,
            "Unable to encode message payload",
        );
        assert_eq!(too_big.class(), Class::Permanent);
    }

    #[test]
    fn only_the_lock_timeout_is_certain_not_to_have_acted() {
        let lock = err(
            "virDomainSaveFlags",
            sys::VIR_ERR_OPERATION_TIMEOUT,
            sys::VIR_FROM_QEMU,
            0,
            "Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchX)",
        );
        assert_eq!(lock.class(), Class::Transient);
        let other =
            err("virDomainSaveFlags", sys::VIR_ERR_OPERATION_TIMEOUT, sys::VIR_FROM_QEMU, 0, "timeout");
        assert_eq!(other.class(), Class::InDoubt);
    }

    #[test]
    fn a_freeze_without_an_answer_may_still_freeze() {
        let silent = err(
            "virDomainFSFreeze",
            sys::VIR_ERR_AGENT_UNRESPONSIVE,
            sys::VIR_FROM_QEMU,
            0,
            "Guest agent is not responding: Guest agent not available for now",
        );
        assert_eq!(silent.class(), Class::InDoubt);
        let absent = err(
            "virDomainFSFreeze",
            sys::VIR_ERR_AGENT_UNRESPONSIVE,
            sys::VIR_FROM_QEMU,
            0,
            "Guest agent is not responding: QEMU guest agent is not connected",
        );
        assert_eq!(absent.class(), Class::Transient);
    }
}

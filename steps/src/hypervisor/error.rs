//! What goes wrong between us and the hypervisor, in terms that decisions can be made on.

use std::fmt;

use vmkeep_workflow::{Code, Fault};

use crate::codes;

/// The kinds of trouble that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trouble {
    /// There is no such domain.
    NoSuchDomain,
    /// The hypervisor's daemon cannot be reached, or the connection broke.
    Unreachable,
    /// No answer in time: from QEMU's monitor or from libvirt.
    TimedOut,
    /// Somebody else's job holds the domain.
    Busy,
    /// The domain does not run.
    NotRunning,
    /// The guest has no agent, or none that is configured.
    NoAgent,
    /// The guest's agent does not answer.
    AgentSilent,
    /// A file system is full.
    NoSpace,
    /// Another process holds the image.
    Locked,
    /// Ended by an abort.
    Cancelled,
    /// Not permitted.
    Denied,
    /// A file that should be there is not.
    Missing,
    /// A file that should not be there is.
    Exists,
    /// This hypervisor cannot do that.
    Unsupported,
    /// A file cannot be given to its owner.
    OwnerRefused,
    /// A file cannot be given its mode.
    ModeRefused,
    /// A bitmap is missing, or cannot be relied upon.
    BitmapUnusable,
    /// Input or output failed.
    Io,
    /// The hypervisor's daemon says that the domain is off, and its QEMU runs.
    Forgotten,
    /// The hypervisor's daemon says that a job goes on of which it knows nothing, and lets nobody work on the domain: it was
    /// killed while it began a backup.
    JobLost,
    /// Anything else that it refused.
    Refused,
}

/// How libvirt can be made to know a domain again whose note it could not read. Tried on libvirt 9.0.
const REMEMBER: &str = "Nothing is lost, and vmkeepd goes on by itself as soon as one of these is done. To keep the \
    guest: stop libvirtd and its sockets (guests stay), write job='active-commit' where its note of the domain says \
    job='' (/run/libvirt/qemu/DOMAIN.xml, or $XDG_RUNTIME_DIR/libvirt/qemu/run/DOMAIN.xml for a user's own), and start \
    libvirtd. Do not start the domain before that: it fails, and libvirt then removes its note. Otherwise, or if the \
    note is gone, end that QEMU (kill PROCESS) and start the domain when the job is over";

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct HvError {
    /// The kind of trouble.
    pub trouble: Trouble,
    /// Whether the call may have taken effect all the same, or may yet do so.
    pub in_doubt: bool,
    /// What was said.
    pub message: String,
}

/// The result of a call.
pub type HvResult<T> = Result<T, HvError>;

impl fmt::Display for HvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl HvError {
    /// A failed call that did not take effect.
    #[must_use]
    pub fn new(trouble: Trouble, message: impl Into<String>) -> Self {
        Self { trouble, in_doubt: false, message: message.into() }
    }

    /// The same, with the effect in doubt.
    #[must_use]
    pub fn in_doubt(mut self) -> Self {
        self.in_doubt = true;
        self
    }

    /// Whether the same call may well work a little later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self.trouble,
            Trouble::Unreachable
                | Trouble::TimedOut
                | Trouble::Busy
                | Trouble::AgentSilent
                | Trouble::Locked
                | Trouble::Io
                | Trouble::Forgotten
        )
    }

    /// As a step's failure. Kinds of trouble that have a code of their own keep it; all others become `code`.
    #[must_use]
    pub fn fault(self, code: Code, doing: impl Into<String>, object: impl Into<String>) -> Fault {
        let code = match self.trouble {
            Trouble::NoSuchDomain => codes::CANNOT_FIND_MACHINE,
            Trouble::Unreachable => codes::HYPERVISOR_UNREACHABLE,
            Trouble::NoSpace => codes::NOT_ENOUGH_DISK_SPACE,
            Trouble::Unsupported => codes::HYPERVISOR_TOO_OLD,
            Trouble::Forgotten => codes::HYPERVISOR_FORGOT_DOMAIN,
            Trouble::OwnerRefused => codes::CANNOT_SET_DISK_IMAGE_OWNERSHIP,
            Trouble::ModeRefused => codes::CANNOT_SET_DISK_IMAGE_PERMISSION,
            _ => code,
        };
        let fault = if self.is_transient() {
            Fault::transient(code, doing, object, &self.message)
        } else {
            Fault::permanent(code, doing, object, &self.message)
        };
        let fault = if self.trouble == Trouble::Forgotten { fault.remedy(REMEMBER) } else { fault };
        if self.in_doubt { fault.in_doubt() } else { fault }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codes::assert_told;

    #[test]
    fn trouble_that_has_a_code_of_its_own_keeps_it_and_what_cannot_be_is_not_tried_again() {
        let of = |trouble| {
            HvError::new(trouble, "as libvirt says").fault(codes::CANNOT_DEFINE_MACHINE, "define", "web")
        };
        for (trouble, code, transient) in [
            (Trouble::Unsupported, codes::HYPERVISOR_TOO_OLD, false),
            (Trouble::Forgotten, codes::HYPERVISOR_FORGOT_DOMAIN, true),
            (Trouble::NoSuchDomain, codes::CANNOT_FIND_MACHINE, false),
            (Trouble::Unreachable, codes::HYPERVISOR_UNREACHABLE, true),
            (Trouble::NoSpace, codes::NOT_ENOUGH_DISK_SPACE, false),
            (Trouble::Refused, codes::CANNOT_DEFINE_MACHINE, false),
        ] {
            let fault = of(trouble);
            assert_told(&fault, code, "web");
            assert_eq!(fault.class == vmkeep_workflow::Class::Transient, transient, "{trouble:?}");
            assert_eq!(fault.cause, "as libvirt says");
        }
        assert!(of(Trouble::Forgotten).remedy.contains("Nothing is lost"));
    }
}

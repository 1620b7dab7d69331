//! libvirt's errors in the terms of the steps.

use vmkeep_libvirt::{Class, Error, ErrorCode};
use vmkeep_steps::hypervisor::{HvError, Trouble};

/// What a failed call means. Whether the effect is in doubt is the wrapper's word, never guessed here.
pub(super) fn of(error: &Error) -> HvError {
    HvError::new(kind(error), error.to_string())
}

/// The same, with the doubt that the wrapper has.
pub(super) fn doubtful(error: &Error) -> HvError {
    let plain = of(error);
    if error.class() == Class::InDoubt { plain.in_doubt() } else { plain }
}

fn kind(error: &Error) -> Trouble {
    if error.is_connection_lost() {
        return Trouble::Unreachable;
    }
    let says = |text: &str| error.message.contains(text);
    match error.code {
        ErrorCode::NoDomain => Trouble::NoSuchDomain,
        // The state change lock was not free within libvirt's patience: somebody's job holds it.
        ErrorCode::OperationTimeout if says("state change lock") => Trouble::Busy,
        ErrorCode::OperationTimeout => Trouble::TimedOut,
        ErrorCode::AgentCommandTimeout | ErrorCode::AgentUnsynced => Trouble::AgentSilent,
        ErrorCode::AgentUnresponsive => Trouble::AgentSilent,
        ErrorCode::ArgumentUnsupported if says("agent") => Trouble::NoAgent,
        ErrorCode::ConfigUnsupported if says("agent") => Trouble::NoAgent,
        ErrorCode::NoSpace => Trouble::NoSpace,
        ErrorCode::OperationAborted => Trouble::Cancelled,
        ErrorCode::OperationDenied
        | ErrorCode::AccessDenied
        | ErrorCode::AuthFailed
        | ErrorCode::AuthCancelled
        | ErrorCode::AuthUnavailable => Trouble::Denied,
        ErrorCode::NoSupport | ErrorCode::OperationUnsupported | ErrorCode::ArgumentUnsupported => {
            Trouble::Unsupported
        }
        ErrorCode::ResourceBusy | ErrorCode::BlockCopyActive => Trouble::Busy,
        ErrorCode::DomExist => Trouble::Exists,
        ErrorCode::CheckpointInconsistent | ErrorCode::NoDomainCheckpoint => Trouble::BitmapUnusable,
        // QEMU's refusals come as text inside catch-all codes.
        _ if says("Failed to get \"write\" lock")
            || says("Failed to get shared")
            || says("Is another process using the image") =>
        {
            Trouble::Locked
        }
        ErrorCode::InternalError if says("backup job data missing") => Trouble::JobLost,
        ErrorCode::OperationInvalid if says("not running") => Trouble::NotRunning,
        ErrorCode::OperationFailed if says("already exists with uuid") => Trouble::Exists,
        ErrorCode::OpenFailed | ErrorCode::ReadFailed | ErrorCode::WriteFailed => Trouble::Io,
        ErrorCode::SystemError => match error.errno.map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::NOENT) => Trouble::Missing,
            Some(rustix::io::Errno::EXIST) => Trouble::Exists,
            Some(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => Trouble::Denied,
            _ => Trouble::Io,
        },
        _ => Trouble::Refused,
    }
}

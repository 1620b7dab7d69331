//! libvirt's event loop: registered once per process, run on one thread of its own.
//!
//! Invariant: the default implementation is registered before any connection is opened by this crate,
//! and exactly one thread runs it until the process ends. Without it there are no domain events, no
//! keepalive, no close callbacks. libvirt's own messages to standard error are switched off here too:
//! every error reaches the caller as a value.

use std::sync::OnceLock;

use virt_sys as sys;

use crate::error::{Error, Result};

static STARTED: OnceLock<Result<()>> = OnceLock::new();

/// Makes sure that the loop runs. Cheap after the first call.
///
/// # Errors
/// What libvirt said when the implementation could not be registered, at every call.
pub(crate) fn ensure() -> Result<()> {
    STARTED.get_or_init(start).clone()
}

fn start() -> Result<()> {
    virt::error::clear_error_callback();
    // SAFETY: no arguments; the OnceLock guarantees that it happens once and before any connection of
    // this crate, as libvirt demands.
    if unsafe { sys::virEventRegisterDefaultImpl() } < 0 {
        return Err(Error::last("virEventRegisterDefaultImpl", "event loop"));
    }
    std::thread::Builder::new()
        .name("libvirt-events".to_owned())
        .spawn(|| {
            loop {
                // SAFETY: the implementation is registered, and this thread alone runs it.
                if unsafe { sys::virEventRunDefaultImpl() } < 0 {
                    let error = Error::last("virEventRunDefaultImpl", "event loop");
                    tracing::error!(%error, "libvirt's event loop reported an error");
                    // A persistent error must not become a busy loop.
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        })
        .map(|_| ())
        .map_err(|e| {
            Error::own(
                "virEventRunDefaultImpl",
                "event loop",
                crate::error::ErrorCode::SystemError,
                e.to_string(),
            )
        })
}

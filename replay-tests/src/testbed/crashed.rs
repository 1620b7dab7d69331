//! A libvirtd that crashes by itself is started again, as Debian's unit does.
//!
//! libvirt 9.0 takes a client's events apart in two threads when the client goes in the middle of a call, and can fall
//! over (`steps/STEPS.md`, E29). That is rare, says nothing about who is under test, and no host stays without libvirtd
//! for it. It is told of, since a crash that came often would be somebody's fault. Ends that a test brings about have other
//! signals, and are left as they are.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;

use super::hypervisor::Hypervisor;

/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Where a hypervisor keeps its libvirtd.
pub(super) type Slot = Arc<Mutex<Option<Child>>>;

/// Looks after the libvirtd with this process id until it ends, or nobody has it any more. `again` starts one.
pub(super) fn look_after(slot: &Slot, pid: u32, hypervisor: &Hypervisor) {
    let (slot, hypervisor) = (Arc::downgrade(slot), hypervisor.downgrade());
    std::thread::spawn(move || {
        let ended = loop {
            std::thread::sleep(LOOK);
            let Some(slot) = slot.upgrade() else { return };
            let mut held = slot.lock().unwrap_or_else(PoisonError::into_inner);
            match held.as_mut().filter(|child| child.id() == pid).map(Child::try_wait) {
                Some(Ok(None)) => {}
                Some(Ok(Some(status))) => break status,
                Some(Err(_)) | None => return,
            }
        };
        if !is_crash(ended) {
            return;
        }
        let Some(hypervisor) = hypervisor.upgrade() else { return };
        eprintln!(
            "test bed: libvirtd {pid} crashed ({ended}) and is started again: {}",
            hypervisor.dir().display()
        );
        if let Err(error) = hypervisor.start_libvirtd() {
            eprintln!("test bed: {error}");
        }
    });
}

fn is_crash(ended: ExitStatus) -> bool {
    let crashes = [Signal::SEGV, Signal::BUS, Signal::ABORT, Signal::ILL, Signal::FPE];
    ended.signal().is_some_and(|signal| crashes.iter().any(|crash| crash.as_raw() == signal))
}

//! What is done to everybody in a job, and how it is put right again.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use fastrand::Rng;
use rustix::net::{Shutdown, SocketAddrUnix, getpeername, shutdown};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};

use crate::Chaos;
use crate::support::Daemon;

/// What is done to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blow {
    KillVmkeepd,
    KillLibvirtd,
    KillVirtlogd,
    KillQemu,
    /// All of them at once.
    HostDown,
    /// vmkeepd's connections to libvirt break; both live on.
    CutConnection,
    /// QEMU does not answer for a while.
    StopQemu,
    /// The guest's agent does not answer until the round is over.
    StopAgent,
    /// Somebody pauses the guest, and resumes it.
    PauseGuest,
    /// Somebody resets the guest.
    ResetGuest,
    /// Somebody cancels the job.
    Cancel,
    /// The folders of unfinished backups are removed.
    RemoveTarget,
    /// The target has no room left, until the round is over.
    FillTarget,
    /// The target is not there, until the round is over.
    LoseTarget,
}

const BLOWS: [Blow; 14] = [
    Blow::KillVmkeepd,
    Blow::KillLibvirtd,
    Blow::KillVirtlogd,
    Blow::KillQemu,
    Blow::HostDown,
    Blow::CutConnection,
    Blow::StopQemu,
    Blow::StopAgent,
    Blow::PauseGuest,
    Blow::ResetGuest,
    Blow::Cancel,
    Blow::RemoveTarget,
    Blow::FillTarget,
    Blow::LoseTarget,
];

impl Blow {
    pub fn any(rng: &mut Rng) -> Self {
        *rng.choice(&BLOWS).unwrap()
    }
}

/// What somebody has to put right himself.
#[derive(Debug, Default)]
pub struct Harm {
    pub paused: bool,
    /// The guest was paused in this round.
    was_paused: bool,
    /// The machine that is kept aside was paused when it was set aside, and comes back so.
    paused_aside: bool,
    /// The guest was taken from its operator, who wants it back.
    pub qemu_ended: bool,
    /// What the guest says is lost until it is started anew.
    pub unheard: bool,
    /// The agent stands still.
    pub silenced: bool,
    pub full: bool,
    pub lost: bool,
    /// vmkeepd was started while the target was lost: it asks to be started anew when that is back.
    pub blind: bool,
    /// In this round the target was lost: what could not be removed there stays.
    pub was_lost: bool,
}

impl Harm {
    /// The job of a round is over. Whoever pauses a machine that another takes the place of finds it paused when it comes back.
    pub fn is_over(&mut self, exchanged: bool, undone: bool) {
        let was_paused = std::mem::take(&mut self.was_paused);
        if exchanged {
            let comes_back_paused = std::mem::replace(&mut self.paused_aside, was_paused);
            self.paused |= undone && comes_back_paused;
        }
    }
}

impl Chaos {
    pub fn strike(&mut self, blow: Blow, job: &str) {
        *self.tally.blows.entry(blow).or_default() += 1;
        self.do_harm(blow, job);
    }

    fn do_harm(&mut self, blow: Blow, job: &str) {
        let hypervisor = &self.bed.host.hypervisor;
        match blow {
            Blow::KillVmkeepd => self.daemon = None,
            Blow::KillLibvirtd => hypervisor.kill_libvirtd().unwrap(),
            Blow::KillVirtlogd => self.harm.unheard |= hypervisor.kill_virtlogd().is_ok(),
            // One that is being saved or loaded may be gone already.
            Blow::KillQemu => self.harm.qemu_ended |= hypervisor.kill_qemu("web1").is_ok(),
            Blow::HostDown => {
                for blow in [Blow::KillVmkeepd, Blow::KillLibvirtd, Blow::KillQemu] {
                    self.do_harm(blow, job);
                }
            }
            Blow::CutConnection => self.daemon.iter().for_each(cut_off),
            Blow::StopQemu => {
                if let Ok(qemu) = hypervisor.qemu("web1") {
                    qemu.id.signal(Signal::STOP);
                    std::thread::sleep(Duration::from_millis(self.rng.u64(100..2000)));
                    qemu.id.signal(Signal::CONT);
                }
            }
            // A guest that stands still hears nothing.
            Blow::StopAgent if self.harm.paused => {}
            Blow::StopAgent => {
                let stopped = self.bed.guest.send("sh kill -STOP $(pidof qemu-ga)");
                self.harm.silenced |= stopped.is_ok();
            }
            Blow::PauseGuest => {
                let paused = self.bed.guest.virsh("suspend", &[]).is_ok();
                self.harm.paused |= paused;
                self.harm.was_paused |= paused;
            }
            Blow::ResetGuest => drop(self.bed.guest.virsh("reset", &[])),
            Blow::Cancel => drop(self.bed.host.vmkeep(&["job", "cancel", job, "--reason", "chaos"])),
            Blow::RemoveTarget => self.bed.remove_unpublished(),
            Blow::FillTarget => {
                if let Some(target) = self.target.as_ref().filter(|_| !self.harm.full && !self.harm.lost) {
                    target.fill(self.rng.u64(0..4 << 20));
                    self.harm.full = true;
                }
            }
            Blow::LoseTarget => {
                if let Some(target) = self.target.as_ref().filter(|_| !self.harm.lost) {
                    target.lose();
                    (self.harm.lost, self.harm.was_lost) = (true, true);
                }
            }
        }
    }

    /// The target is as it should be.
    pub fn put_right(&mut self) {
        if let Some(target) = &self.target {
            if std::mem::take(&mut self.harm.lost) {
                target.come_back();
            }
            if std::mem::take(&mut self.harm.blind) {
                self.daemon = None;
            }
            if std::mem::take(&mut self.harm.full) {
                target.clear();
            }
        }
    }

    /// The guest as its operator wants it: he resumes what he has paused, starts what was taken from him, and lets its agent
    /// speak.
    pub fn operator(&mut self) {
        let Ok(state) = self.bed.guest.state() else { return };
        // One that a job has down meanwhile may come back as it was.
        match state.state.as_str() {
            "paused" if self.harm.paused => self.harm.paused = self.bed.guest.virsh("resume", &[]).is_err(),
            "running" => self.harm.paused = false,
            _ => {}
        }
        if self.harm.qemu_ended && state.state == "shut off" {
            // Refused as long as somebody has the images open; asked again then.
            self.harm.qemu_ended = self.bed.guest.virsh("start", &[]).is_err();
        }
        if self.harm.silenced && state.state == "running" {
            self.harm.silenced = self.bed.guest.send("sh kill -CONT $(pidof qemu-ga)").is_err();
        }
    }
}

/// Breaks each connection of vmkeepd to libvirt, as a libvirtd that is restarted does, but that this one lives on, and ends
/// what it has begun.
fn cut_off(daemon: &Daemon) {
    let pid = Pid::from_raw(daemon.pid().try_into().unwrap()).unwrap();
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let Ok(files) = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())) else { return };
    let numbers = files.flatten().filter_map(|file| file.file_name().to_string_lossy().parse().ok());
    for number in numbers {
        let file = pidfd_getfd(process.as_fd(), number, PidfdGetfdFlags::empty());
        if let Ok(file) = file.as_ref().map(OwnedFd::as_fd)
            && let Ok(Some(peer)) = getpeername(file)
            && let Ok(peer) = SocketAddrUnix::try_from(peer)
            && peer.path_bytes().is_some_and(|path| path.ends_with(b"libvirt-sock"))
        {
            let _ = shutdown(file, Shutdown::Both);
        }
    }
}

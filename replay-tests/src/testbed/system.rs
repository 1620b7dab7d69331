//! libvirtd as root, `qemu:///system`, in a name space of mounts of its own.
//!
//! The system's daemon has fixed places. In the name space the test bed's folders lie over them, in the layout that a
//! session daemon has (`config/libvirt`, `run/libvirt`, …), so that nothing of the host's daemon is seen or touched,
//! and whoever looks into the folder finds the same files in the same places. QEMU runs as the unprivileged test
//! user, which is what makes ownership and modes of images matter. A process that only sleeps, the *holder*, keeps the
//! name space while libvirtd and virtlogd are killed and started.
//!
//! `/dev` is made anew with the few devices that QEMU needs: a root daemon opens `/dev/kvm` whatever its mode, and takes
//! whatever opens for a working KVM.

use super::{
    error::{Error, IoContext, Result},
    hypervisor::Hypervisor,
    process::{ProcessId, Role, until},
};
use std::{
    ffi::OsStr,
    fs,
    process::{Command, Stdio},
    time::Duration,
};

/// The holder's name in the process list.
pub(super) const HOLDER: &str = "vmkeep-testbed-holder";

/// Argument: the test bed's folder, which is also the working folder.
const ENTER: &str = r#"
set -eu
cover() { mkdir -p "$1" "$2"; mount --bind "$1" "$2"; }
cover config/libvirt /etc/libvirt
for part in lib cache log; do cover "system/$part" "/var/$part/libvirt"; done
# libvirt's programs look for each other's sockets in /run.
cover run /run
# swtpm runs as a user of its own, who signs certificates of TPMs and logs in places of his.
cover system/log/swtpm /var/log/swtpm
if id tss >/dev/null 2>&1; then
    cover system/localca /var/lib/swtpm-localca
    chown tss system/localca
    chmod 750 system/localca
fi
mkdir -p system/dev
mount -t tmpfs none system/dev
for device in null zero full random urandom tty; do
    touch "system/dev/$device"
    mount --bind "/dev/$device" "system/dev/$device"
done
mkdir system/dev/pts system/dev/shm
mount --bind /dev/pts system/dev/pts
ln -s pts/ptmx system/dev/ptmx
mount --move system/dev /dev
exec -a "$0" sleep infinity
"#;

impl Hypervisor {
    /// Makes the name space and writes the daemons' settings.
    pub(super) fn enter_system(&self) -> Result<()> {
        let config = self.dir().join("config/libvirt");
        let (user, group) = (self.user().uid, self.user().gid);
        for (name, text) in [
            ("libvirtd.conf", "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n".to_owned()),
            (
                "qemu.conf",
                // Groups of control and a private /dev for each QEMU belong to the host's init system.
                format!(
                    "user = \"+{user}\"\ngroup = \"+{group}\"\ncgroup_controllers = []\nnamespaces = []\n"
                ),
            ),
        ] {
            let path = config.join(name);
            fs::write(&path, text).doing("write", &path)?;
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c", ENTER, HOLDER]);
        command.envs(self.env()).current_dir(self.dir()).stdin(Stdio::null());
        command.spawn().map_err(|source| Error::Spawn { program: "unshare".into(), source })?;
        until(
            Duration::from_secs(20),
            || "the name space".to_owned(),
            || self.holder().map(drop).ok_or_else(|| "nobody holds it".to_owned()),
        )
    }

    /// The process that keeps the name space.
    fn holder(&self) -> Option<ProcessId> {
        self.processes().into_iter().find(|p| p.role == Role::Holder).map(|p| p.id)
    }

    /// A program inside the name space, by root.
    pub(super) fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let holder = self.holder().map_or(0, |id| id.pid);
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{holder}/ns/mnt")).arg("--").arg(program);
        command
    }

    /// Starts virtlogd, which only a session daemon starts by itself.
    pub(super) fn start_system_virtlogd(&self) -> Result<()> {
        if self.virtlogd().is_some() {
            return Ok(());
        }
        // Daemonised by itself, so that it is nobody's zombie.
        let mut command = self.command("virtlogd");
        let status = command.arg("--daemon").status();
        status.map_err(|source| Error::Spawn { program: "virtlogd".into(), source })?;
        until(
            Duration::from_secs(20),
            || "virtlogd".to_owned(),
            || self.virtlogd().map(drop).ok_or_else(|| "it does not run".to_owned()),
        )
    }
}

//! A private hypervisor for tests: a session libvirtd of an unprivileged user in a folder of its own.
//!
//! It sees no other domain of the host. As root the daemon is started as another user (`nobody`, or the
//! one named by `VMKEEP_TEST_USER`), because for root a session is the system's daemon; this process
//! then talks to it through its socket. As an ordinary user everything runs as that user.
//!
//! Whatever becomes of the test, nothing is left behind: a small shell holds the reading end of a pipe
//! from this process; when the pipe closes, it ends the processes that were started from the folder,
//! by number and only after seeing the folder in their command line, and removes the folder.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::Duration;

use uuid::Uuid;
use vmkeep_libvirt::flags::{CreateFlags, DefineFlags};
use vmkeep_libvirt::{Connection, Domain, Event, ProcessId};

/// Longer than anything takes on a slow machine; reached only when a test fails.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Hypervisor {
    folder: PathBuf,
    user: Option<(u32, u32)>,
    daemon: Mutex<Option<Child>>,
    reaper: Child,
}

/// Ends the processes that bear the folder in their command line, then removes the folder.
const REAPER: &str = r#"
cat >/dev/null
for round in 1 2 3; do
    for f in "$1"/r/libvirt/libvirtd.pid "$1"/r/libvirt/qemu/run/*.pid; do
        pid=$(cat "$f" 2>/dev/null) || continue
        tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$1" && kill -9 "$pid"
    done
done
rm -rf "$1"
"#;

impl Drop for Hypervisor {
    fn drop(&mut self) {
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
        if let Some(mut daemon) = self.daemon.lock().ok().and_then(|mut d| d.take()) {
            let _ = daemon.wait();
        }
    }
}

impl Hypervisor {
    pub(crate) fn prepare() -> Self {
        let folder = tempfile::Builder::new().prefix("vkl").tempdir_in("/tmp").unwrap().keep();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let user = rustix_root().then(unprivileged_user);
        for sub in ["r", "c", "k", "d", "h", "img"] {
            let path = folder.join(sub);
            fs::create_dir(&path).unwrap();
            own(&path, user);
        }
        fs::set_permissions(folder.join("r"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::create_dir_all(folder.join("c/libvirt")).unwrap();
        // Without a separate log daemon there is one process less to look after.
        fs::write(folder.join("c/libvirt/qemu.conf"), "stdio_handler = \"file\"\n").unwrap();
        own(&folder.join("c/libvirt"), user);
        fs::write(folder.join("libvirtd.conf"), "").unwrap();
        let reaper = Command::new("setsid")
            .args(["sh", "-c", REAPER, "reaper"])
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { folder, user, daemon: Mutex::new(None), reaper }
    }

    pub(crate) fn start() -> Self {
        let hypervisor = Self::prepare();
        hypervisor.start_daemon();
        hypervisor
    }

    pub(crate) fn start_daemon(&self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.join("log")).unwrap();
        let f = |sub: &str| self.folder.join(sub);
        let daemon = self
            .as_user("libvirtd")
            .arg("--config")
            .arg(f("libvirtd.conf"))
            .env("HOME", f("h"))
            .env("XDG_RUNTIME_DIR", f("r"))
            .env("XDG_CONFIG_HOME", f("c"))
            .env("XDG_CACHE_HOME", f("k"))
            .env("XDG_DATA_HOME", f("d"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("libvirtd and setpriv are needed for this test");
        *self.daemon.lock().unwrap() = Some(daemon);
    }

    /// As a power cut would: nothing is written, nothing is told.
    pub(crate) fn kill_daemon(&self) {
        let mut daemon = self.daemon.lock().unwrap().take().expect("a daemon runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    fn as_user(&self, program: &str) -> Command {
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let mut command = match self.user {
            Some((uid, gid)) => {
                let mut c = Command::new("setpriv");
                c.arg(format!("--reuid={uid}"))
                    .arg(format!("--regid={gid}"))
                    .args(["--clear-groups", program]);
                c
            }
            None => Command::new(program),
        };
        command.env_clear().env("PATH", path).env("LC_ALL", "C");
        command
    }

    pub(crate) fn uri(&self) -> String {
        format!("qemu:///session?socket={}/r/libvirt/libvirt-sock", self.folder.display())
    }

    pub(crate) fn connect(&self) -> Connection {
        // The daemon announces its socket in no other way than by its being there.
        let deadline = std::time::Instant::now() + LONG;
        loop {
            match Connection::open(&self.uri()) {
                Ok(c) => return c,
                Err(e) if std::time::Instant::now() > deadline => panic!("{e}\n{}", self.log()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        fs::File::open(self.folder.join("log")).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join("img").join(name)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.file(name).to_str().unwrap().to_owned()
    }

    /// Makes a file the hypervisor's own.
    pub(crate) fn give(&self, path: &Path) {
        own(path, self.user);
    }

    pub(crate) fn qemu_img(&self, args: &[&str]) {
        let out = self.as_user("qemu-img").args(args).output().unwrap();
        assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// A domain with two disks that idles in its firmware, defined and started.
    pub(crate) fn idle_domain(&self, conn: &Connection, name: &str) -> Domain {
        let (a, b) = (format!("{name}-a.qcow2"), format!("{name}-b.raw"));
        self.qemu_img(&["create", "-q", "-f", "qcow2", &self.path(&a), "64M"]);
        self.qemu_img(&["create", "-q", "-f", "raw", &self.path(&b), "16M"]);
        let xml = domain_xml(name, Uuid::new_v4(), &self.path(&a), &self.path(&b));
        let domain = conn.define(&xml, DefineFlags::VALIDATE).unwrap();
        domain.start(CreateFlags::NONE).unwrap();
        domain
    }
}

/// No escaping: the callers' names need none.
pub(crate) fn domain_xml(name: &str, uuid: Uuid, qcow2: &str, raw: &str) -> String {
    format!(
        "<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{qcow2}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{raw}'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>"
    )
}

/// Lets the guest's first disk be written, as by the guest.
pub(crate) fn guest_writes(domain: &Domain, pattern: u8, offset: &str, length: &str) {
    let device = "/machine/peripheral/virtio-disk0/virtio-backend";
    let out = domain.hmp(&format!("qemu-io -d {device} \"write -P {pattern} {offset} {length}\"")).unwrap();
    assert!(out.trim().is_empty() || out.contains("wrote"), "{out}");
}

/// Waits for the first event that `wanted` says yes to.
pub(crate) fn wait_for(events: &mpsc::Receiver<Event>, wanted: impl Fn(&Event) -> bool) -> Event {
    loop {
        let event = events.recv_timeout(LONG).expect("the event came in time");
        if wanted(&event) {
            return event;
        }
    }
}

pub(crate) fn signal(process: &ProcessId, name: &str) {
    assert!(process.is_alive());
    let status = Command::new("kill").args(["-s", name, &process.pid.to_string()]).status().unwrap();
    assert!(status.success());
}

fn rustix_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// Numbers of the user that runs the hypervisor when this process is root.
fn unprivileged_user() -> (u32, u32) {
    let wanted = std::env::var("VMKEEP_TEST_USER").unwrap_or_else(|_| "nobody".to_owned());
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|l| l.split(':').next() == Some(&wanted)).expect("the user exists");
    let mut fields = line.split(':').skip(2);
    let mut number = || fields.next().unwrap().parse().unwrap();
    (number(), number())
}

fn own(path: &Path, user: Option<(u32, u32)>) {
    if let Some((uid, gid)) = user {
        chown(path, Some(uid), Some(gid)).unwrap();
    }
}

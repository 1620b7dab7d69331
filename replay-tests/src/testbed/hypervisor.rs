//! A private session libvirtd in a folder of its own.
//!
//! A session daemon keeps everything below the XDG folders, so private ones make a private hypervisor: it sees no
//! other domain and nobody sees its own. Two traps shape this module:
//! - A Unix socket's path has at most 108 bytes, and libvirt's are long: a folder with a long path is refused.
//! - libvirt's clients start a session daemon when they find none. In a test that has just killed it, that would
//!   be a second, unasked-for one; so [`Hypervisor::env`] forbids it, and the end of a test bed looks for daemons
//!   by their folder, not only for the one that it started.

use super::{
    command::run,
    crashed::{Slot, look_after},
    error::{Error, IoContext, Result},
    process::{Process, ProcessId, Role, end_all, processes_of, until},
    state::State,
    user::TestUser,
};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Longest path of a test bed's folder, so that libvirt's sockets in it fit (in bytes).
const LONGEST_FOLDER: usize = 24;
const FOLDERS: [&str; 10] =
    ["run", "config", "config/libvirt", "cache", "data", "state", "home", "images", "serial", "log"];
const URI: &str = "qemu:///session";

/// Whether `/dev/kvm` is covered up for the hypervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HideKvm {
    /// If the user could open it.
    #[default]
    Auto,
    /// In any case.
    Always,
    /// Never.
    Never,
}

/// How a hypervisor is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// See [`HideKvm`].
    pub hide_kvm: HideKvm,
    /// Let QEMU write serial files itself instead of through virtlogd (libvirt's default): the files then go on
    /// after a kill of virtlogd, but two domains may write to the same one unnoticed.
    pub without_virtlogd: bool,
    /// Leave it running when the last handle is dropped.
    pub keep: bool,
    /// `qemu:///system` by root, with QEMU as the unprivileged user. Needs root.
    pub system: bool,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    user: TestUser,
    hide_kvm: bool,
    system: bool,
    daemon: Slot,
    ends_with_handle: AtomicBool,
}

/// A handle of a private hypervisor. Clones are handles of the same one; with the last it ends, its guests and
/// its folder included, unless [`Hypervisor::keep`] was called.
///
/// A `static` is never dropped: what it holds is ended by the next [`Hypervisor::start_temp`] or `testbed sweep`.
#[derive(Clone, Debug)]
pub struct Hypervisor(Arc<Inner>);

/// The same, without keeping it.
pub(super) struct WeakHypervisor(Weak<Inner>);

impl WeakHypervisor {
    pub(super) fn upgrade(&self) -> Option<Hypervisor> {
        self.0.upgrade().map(Hypervisor)
    }
}

impl Hypervisor {
    /// Starts one in a new folder `/tmp/vk-…`, after ending those whose owner was killed.
    pub fn start_temp() -> Result<Self> {
        Self::start_temp_with(&Options::default())
    }

    /// As [`Hypervisor::start_temp`].
    pub fn start_temp_with(options: &Options) -> Result<Self> {
        Self::sweep()?;
        let dir =
            tempfile::Builder::new().prefix("vk-").tempdir_in("/tmp").doing("make a folder in", "/tmp")?;
        Self::start_with(&dir.keep(), options)
    }

    /// Starts one in `dir`, which is made if needed, must be empty and have a path of at most 24 bytes.
    pub fn start(dir: &Path) -> Result<Self> {
        Self::start_with(dir, &Options::default())
    }

    /// As [`Hypervisor::start`].
    pub fn start_with(dir: &Path, options: &Options) -> Result<Self> {
        let user = TestUser::current()?;
        fs::create_dir_all(dir).doing("make", dir)?;
        let dir = &dir.canonicalize().doing("resolve", dir)?;
        let refuse = |why: String| Error::Folder { path: dir.clone(), why };
        if dir.as_os_str().len() > LONGEST_FOLDER {
            return Err(refuse(format!(
                "a path of more than {LONGEST_FOLDER} bytes leaves no room for sockets"
            )));
        }
        if fs::read_dir(dir).doing("read", dir)?.next().is_some() {
            return Err(refuse("it is not empty".to_owned()));
        }
        let hide_kvm = match options.hide_kvm {
            // The system's daemon gets a /dev of its own.
            _ if options.system => false,
            HideKvm::Auto => user.reaches_kvm() && can_hide_kvm(),
            HideKvm::Always => true,
            HideKvm::Never => false,
        };
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).doing("open up", dir)?;
        let owner = if options.keep { None } else { ProcessId::me() };
        State::new(owner, &user.name, hide_kvm, options.system).save(dir)?;
        let inner = Inner {
            dir: dir.clone(),
            user,
            hide_kvm,
            system: options.system,
            daemon: Slot::default(),
            ends_with_handle: AtomicBool::new(!options.keep),
        };
        // From here on a failure drops the handle, which ends what has been begun.
        let hypervisor = Self(Arc::new(inner));
        hypervisor.make_folders(options)?;
        if options.system {
            hypervisor.enter_system()?;
        }
        hypervisor.seed_capabilities(true);
        hypervisor.start_libvirtd()?;
        hypervisor.virsh(["domcapabilities", "--virttype", "qemu"])?;
        hypervisor.seed_capabilities(false);
        Ok(hypervisor)
    }

    /// A handle of a hypervisor that runs in `dir` already. Dropping it ends nothing.
    pub fn attach(dir: &Path) -> Result<Self> {
        let dir = dir.canonicalize().doing("resolve", dir)?;
        let state = State::load(&dir)?;
        let user = TestUser::lookup(&state.user)?;
        Ok(Self(Arc::new(Inner {
            dir,
            user,
            hide_kvm: state.hide_kvm,
            system: state.system,
            daemon: Slot::default(),
            ends_with_handle: AtomicBool::new(false),
        })))
    }

    /// Ends every test bed in `/tmp/vk-…` of this user whose owner no longer runs; returns their folders.
    pub fn sweep() -> Result<Vec<PathBuf>> {
        let user = TestUser::current()?;
        let mut ended = Vec::new();
        for entry in fs::read_dir("/tmp").doing("read", "/tmp")?.flatten() {
            let dir = entry.path();
            if !entry.file_name().to_string_lossy().starts_with("vk-") {
                continue;
            }
            let Ok(state) = State::load(&dir) else { continue };
            let Ok(meta) = fs::symlink_metadata(dir.join("images")) else { continue };
            let ours = if state.system { rustix::process::geteuid().as_raw() } else { user.uid };
            if state.owner.is_none_or(ProcessId::is_alive) || meta.uid() != ours {
                continue;
            }
            if end_all(&dir).is_ok() && fs::remove_dir_all(&dir).is_ok() {
                ended.push(dir);
            }
        }
        Ok(ended)
    }

    fn make_folders(&self, options: &Options) -> Result<()> {
        for name in FOLDERS {
            let path = self.dir().join(name);
            fs::create_dir(&path).doing("make", &path)?;
            // Others than root have business in the system's /run, which this stands for.
            let mode = if name == "run" && !options.system { 0o700 } else { 0o755 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).doing("open up", &path)?;
        }
        let config = self.dir().join("config/libvirt");
        // Serial files hold every tick of a test: they may not be rotated away.
        fs::write(config.join("virtlogd.conf"), "max_size = 0\n").doing("write", &config)?;
        if options.without_virtlogd {
            fs::write(config.join("qemu.conf"), "stdio_handler = \"file\"\n").doing("write", &config)?;
        }
        let no_kvm = self.dir().join("log/no-kvm");
        fs::write(&no_kvm, "").doing("write", &no_kvm)?;
        fs::set_permissions(&no_kvm, fs::Permissions::from_mode(0o0)).doing("close", &no_kvm)?;
        self.give_to_user(self.dir(), 6)
    }

    /// Gives a file or folder, and what is in it, to the unprivileged user (nothing to do unless root). With the
    /// system's daemon everything is root's, and libvirt itself gives images to QEMU.
    pub(crate) fn give_to_user(&self, path: &Path, depth: usize) -> Result<()> {
        if !rustix::process::geteuid().is_root() || self.0.system {
            return Ok(());
        }
        chown(path, Some(self.user().uid), Some(self.user().gid)).doing("give away", path)?;
        if depth > 0 && path.is_dir() {
            for entry in fs::read_dir(path).doing("read", path)?.flatten() {
                self.give_to_user(&entry.path(), depth - 1)?;
            }
        }
        Ok(())
    }

    /// The folder of everything.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Where disks lie by default.
    pub fn images(&self) -> PathBuf {
        self.dir().join("images")
    }

    /// Who it runs as.
    pub fn user(&self) -> &TestUser {
        &self.0.user
    }

    /// The URI for processes that run as the user with [`Hypervisor::env`].
    pub fn uri(&self) -> &'static str {
        if self.0.system { "qemu:///system" } else { URI }
    }

    /// A URI for any process that may reach the socket: the user itself, and root.
    pub fn socket_uri(&self) -> String {
        let what = if self.0.system { "system" } else { "session" };
        format!("qemu+unix:///{what}?socket={}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.dir().join("run/libvirt/libvirt-sock")
    }

    /// The environment in which `qemu:///session` is this hypervisor. libvirt's clients do not start a daemon in
    /// it (`LIBVIRT_AUTOSTART=0`): a killed libvirtd stays away until [`Hypervisor::start_libvirtd`].
    pub fn env(&self) -> BTreeMap<String, String> {
        let folder = |name: &str| self.dir().join(name).display().to_string();
        let mut path = std::env::var("PATH").unwrap_or_default();
        for extra in ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"] {
            if !path.split(':').any(|p| p == extra) {
                path = format!("{path}:{extra}");
            }
        }
        // A daemon by root keeps to the system's places, unless it is told otherwise.
        let told = [
            ("VMKEEP_STATE_DIR", folder("state/vmkeep")),
            ("VMKEEP_SOCKET", folder("run/vmkeep/vmkeepd.sock")),
        ];
        [
            ("HOME", folder("home")),
            ("USER", self.user().name.clone()),
            ("LOGNAME", self.user().name.clone()),
            ("XDG_RUNTIME_DIR", folder("run")),
            ("XDG_CONFIG_HOME", folder("config")),
            ("XDG_CACHE_HOME", folder("cache")),
            ("XDG_DATA_HOME", folder("data")),
            ("XDG_STATE_HOME", folder("state")),
            ("LIBVIRT_DEFAULT_URI", self.uri().to_owned()),
            ("LIBVIRT_AUTOSTART", "0".to_owned()),
            ("LANG", "C.UTF-8".to_owned()),
            ("LC_ALL", "C.UTF-8".to_owned()),
            ("PATH", path),
        ]
        .into_iter()
        .chain(told.into_iter().filter(|_| self.0.system))
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    /// A command that runs as the user, in the hypervisor's environment and folder.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = if self.0.system { self.inside(program) } else { Command::new(program) };
        // A bus or a runtime folder of the caller must not be taken for the hypervisor's.
        command.env_remove("DBUS_SESSION_BUS_ADDRESS").env_remove("DISPLAY").envs(self.env());
        command.current_dir(self.dir()).stdin(Stdio::null());
        if !self.0.system {
            self.user().run_as(&mut command);
        }
        command
    }

    /// Runs a program as the user and returns its standard output.
    pub fn run<I>(&self, program: &str, args: I) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        run(self.command(program).args(args))
    }

    /// Runs `virsh` and returns its standard output.
    pub fn virsh<I>(&self, args: I) -> Result<String>
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        run(self.command("virsh").args(["-q", "-c", self.uri()]).args(args))
    }

    /// Starts libvirtd unless it runs, and waits until it answers: one that has just begun may listen, and close or refuse its
    /// first connections.
    pub fn start_libvirtd(&self) -> Result<ProcessId> {
        if let Some(running) = self.libvirtd() {
            return Ok(running);
        }
        if self.0.system {
            self.start_system_virtlogd()?;
        }
        let log_path = self.dir().join("log/libvirtd.log");
        let log =
            fs::OpenOptions::new().create(true).append(true).open(&log_path).doing("open", &log_path)?;
        let errors = log.try_clone().doing("open", &log_path)?;
        let mut command = self.daemon_command();
        // A group of its own: an interrupt at the terminal reaches the test, which then ends the daemon in order.
        command.stdout(log).stderr(errors).process_group(0);
        let mut child =
            command.spawn().map_err(|source| Error::Spawn { program: "libvirtd".into(), source })?;
        let socket = self.socket();
        let mut listening = || {
            let ended = child.try_wait().ok().flatten();
            match UnixStream::connect(&socket) {
                Ok(_) => self.virsh(["uri"]).map(|_| Ok(())).map_err(|e| e.to_string()),
                Err(_) if ended.is_some() => Ok(Err(ended)),
                Err(e) => Err(e.to_string()),
            }
        };
        let waited = until(Duration::from_secs(30), || "libvirtd to listen".to_owned(), &mut listening)?;
        if let Err(status) = waited {
            let output = fs::read_to_string(&log_path).unwrap_or_default();
            let status = status.map(|s| s.to_string()).unwrap_or_default();
            return Err(Error::Command { command: "libvirtd".into(), status, output });
        }
        let (pid, id) = (child.id(), ProcessId::of(child.id()));
        *self.daemon() = Some(child);
        look_after(&self.0.daemon, pid, self);
        self.libvirtd().or(id).ok_or(Error::Missing { what: "libvirtd".into() })
    }

    fn daemon(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.0.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// libvirtd, behind whatever covers up `/dev/kvm` (all of it runs on in the same process, by exec).
    fn daemon_command(&self) -> Command {
        if !self.0.hide_kvm {
            return self.command("libvirtd");
        }
        let (uid, gid) = (self.user().uid.to_string(), self.user().gid.to_string());
        let mut command = Command::new("unshare");
        // A file that nobody may open. (Not /dev/null: that opens, and libvirt then takes it for KVM.)
        let cover = "mount --bind log/no-kvm /dev/kvm && exec \"$@\"";
        if rustix::process::geteuid().is_root() {
            command.args(["--mount", "--propagation", "slave", "sh", "-c", cover, "sh"]);
            command.args(["setpriv", "--reuid", &uid, "--regid", &gid, "--clear-groups", "--", "libvirtd"]);
        } else {
            // To mount one must be root, in a name space of users; inside it another brings the own number back.
            command.args(["--map-root-user", "--mount", "sh", "-c", cover, "sh"]);
            command.args(["unshare", "--map-user", &uid, "--map-group", &gid, "libvirtd"]);
        }
        command.env_remove("DBUS_SESSION_BUS_ADDRESS").env_remove("DISPLAY").envs(self.env());
        command.current_dir(self.dir()).stdin(Stdio::null());
        command
    }

    /// Everything that runs for this hypervisor.
    pub fn processes(&self) -> Vec<Process> {
        self.reap();
        processes_of(self.dir())
    }

    /// A daemon that was our child stays a zombie until somebody asks for its end.
    fn reap(&self) {
        if let Some(child) = self.daemon().as_mut() {
            let _ = child.try_wait();
        }
    }

    fn of_role(&self, role: Role) -> Vec<Process> {
        self.processes().into_iter().filter(|p| p.role == role).collect()
    }

    /// libvirtd, if it runs.
    pub fn libvirtd(&self) -> Option<ProcessId> {
        self.of_role(Role::Libvirtd).first().map(|p| p.id)
    }

    /// virtlogd, if it runs (libvirtd starts it with the first serial file).
    pub fn virtlogd(&self) -> Option<ProcessId> {
        self.of_role(Role::Virtlogd).first().map(|p| p.id)
    }

    /// All QEMU processes of domains (not those that libvirt starts to ask what QEMU can do).
    pub fn qemus(&self) -> Vec<Process> {
        self.of_role(Role::Qemu).into_iter().filter(|p| p.qemu_domain().is_some()).collect()
    }

    /// The QEMU process of a domain, by its name.
    pub fn qemu(&self, domain: &str) -> Result<Process> {
        self.qemus()
            .into_iter()
            .find(|p| p.qemu_domain().as_deref() == Some(domain))
            .ok_or_else(|| Error::Missing { what: format!("QEMU process of {domain:?}") })
    }

    /// `kill -9` of libvirtd. Guests and jobs of QEMU go on.
    pub fn kill_libvirtd(&self) -> Result<()> {
        self.kill_role(Role::Libvirtd)
    }

    /// `kill -9` of virtlogd. Guests go on, what they say is lost until they start again.
    pub fn kill_virtlogd(&self) -> Result<()> {
        self.kill_role(Role::Virtlogd)
    }

    /// `kill -9` of the QEMU process of a domain, by its name.
    pub fn kill_qemu(&self, domain: &str) -> Result<()> {
        self.qemu(domain)?.id.kill()
    }

    fn kill_role(&self, role: Role) -> Result<()> {
        for process in self.of_role(role) {
            process.id.kill()?;
        }
        self.reap();
        Ok(())
    }

    /// Kills libvirtd and starts it again.
    pub fn restart_libvirtd(&self) -> Result<ProcessId> {
        self.kill_libvirtd()?;
        self.start_libvirtd()
    }

    /// Leaves it running when the last handle is dropped, and out of [`Hypervisor::sweep`].
    pub fn keep(&self) -> Result<()> {
        self.0.ends_with_handle.store(false, Ordering::SeqCst);
        State::new(None, &self.user().name, self.0.hide_kvm, self.0.system).save(self.dir())
    }

    /// A handle that does not keep it.
    pub(super) fn downgrade(&self) -> WeakHypervisor {
        WeakHypervisor(Arc::downgrade(&self.0))
    }

    /// Ends all processes of this hypervisor and removes its folder. May be called again.
    pub fn stop(&self) -> Result<()> {
        self.0.stop()
    }
}

impl Inner {
    fn stop(&self) -> Result<()> {
        end_all(&self.dir)?;
        if let Some(mut child) = self.daemon.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = child.wait(); // killed above
        }
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).doing("remove", &self.dir),
            _ => Ok(()),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.ends_with_handle.load(Ordering::SeqCst)
            && let Err(error) = self.stop()
        {
            eprintln!("test bed: {error}");
        }
    }
}

/// Root always can; others need name spaces of users, which some hosts forbid.
fn can_hide_kvm() -> bool {
    rustix::process::geteuid().is_root()
        || Command::new("unshare")
            .args(["--map-root-user", "--mount", "true"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

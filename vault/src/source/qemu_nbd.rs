//! A `qemu-nbd` of our own, which shows one image, read-only.
//!
//! **No race at the start.** The socket is made, and listens, before the program is started, which is handed it ready (systemd's
//! socket activation: descriptor 3, `LISTEN_FDS`, and `LISTEN_PID`, its own process id). A client may connect at once: it waits until
//! the program lets it in, or is told that nobody listens any more. `LISTEN_PID` is known in the child alone, and putting a
//! descriptor at 3 in the child takes `unsafe` in Rust; both are one line of `/bin/sh`, which gets the socket as its standard input.
//!
//! **It dies with its parent**, by `setpriv --pdeathsig`, which becomes the shell, which becomes the program: one process id. The
//! signal is sent when the parent *thread* ends: a thread of its own starts the program, and waits for it. And a parent that
//! has died before the signal was arranged is noticed by the shell, whose parent is then somebody else.
//!
//! **Who may connect**: who may traverse the socket's folder, 0700, made for it. The socket is taken away from there once all
//! connections are made ([`QemuNbd::hide`]): then nothing is left behind, whatever ends this process.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::watch;

use super::SourceError;
use crate::nbd::Address;

/// What is kept of its complaints, bytes.
const MOST_COMPLAINT: usize = 8 << 10;
const PROGRAM: &str = "qemu-nbd";
/// The name of the export.
const EXPORT: &str = "vmkeep";
/// The parent that it must have; then the program and its arguments.
const ACTIVATE: &str =
    r#"[ "$PPID" = "$1" ] || exit 96; shift; exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@""#;

/// How an image is to be taken. There is no guessing: a guest can write into its raw disk what looks like another format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// A file or block device of this format, with what lies below it as its header says.
    Named {
        /// `raw`, `qcow2`, …
        format: String,
        /// Where it is: absolute.
        file: PathBuf,
    },
    /// A chain that is spelled out, in QEMU's words (`--image-opts`).
    Options(String),
}

/// Whom the program runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub user: u32,
    /// Group id.
    pub group: u32,
}

/// What to show, and how.
#[derive(Clone, Debug)]
pub struct QemuNbdOptions {
    /// The image.
    pub image: Format,
    /// A persistent bitmap of it that is shown with it.
    pub bitmap: Option<String>,
    /// Connections that are let in at once.
    pub connections: usize,
    /// Whom it runs as, if not as this process: takes its rights.
    pub owner: Option<Owner>,
    /// An existing folder, with a short path, in which one for the socket is made.
    pub folder: PathBuf,
}

/// A program that shows an image; it ends with this.
#[derive(Debug)]
pub struct QemuNbd {
    folder: Option<PathBuf>,
    socket: PathBuf,
    image: String,
    process: u32,
    pidfd: OwnedFd,
    end: watch::Receiver<Option<End>>,
}

/// How it ended.
#[derive(Clone, Debug)]
struct End {
    status: String,
    complaint: String,
}

impl QemuNbd {
    /// Starts it. Whether it can show the image is not known yet: [`Self::ended`] tells if it could not.
    ///
    /// # Errors
    /// If the socket cannot be made, or the program not be started.
    pub async fn start(options: &QemuNbdOptions) -> Result<Self, SourceError> {
        let options = options.clone();
        let started = tokio::task::spawn_blocking(move || Self::start_blocking(&options)).await;
        started.map_err(|error| not_started("the task that starts qemu-nbd", &error))?
    }

    fn start_blocking(options: &QemuNbdOptions) -> Result<Self, SourceError> {
        // A random name in a path of at most 107 bytes.
        let name: String = uuid::Uuid::new_v4().simple().to_string().chars().take(12).collect();
        let folder = options.folder.join(format!("nbd-{name}"));
        let socket = folder.join("s");
        let failed = |error: &dyn std::fmt::Display| not_started(folder.display(), error);
        std::fs::DirBuilder::new().mode(0o700).create(&folder).map_err(|error| failed(&error))?;
        let folder = Folder(Some(folder.clone()));
        let listener = UnixListener::bind(&socket).map_err(|error| not_started(socket.display(), &error))?;
        let (image, command) = command(options, listener);
        let (tell, end) = watch::channel(None);
        let (started_tell, started) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("qemu-nbd".to_owned());
        let life = move || live(command, &started_tell, &tell);
        thread.spawn(life).map_err(|error| not_started(PROGRAM, &error))?;
        let started = started.recv().map_err(|error| not_started(PROGRAM, &error))?;
        let (process, pidfd) = started.map_err(|error| not_started(PROGRAM, &error))?;
        tracing::debug!(process, image, "qemu-nbd started");
        Ok(Self { folder: folder.keep(), socket, image, process, pidfd, end })
    }

    /// Where it shows the image.
    #[must_use]
    pub fn address(&self) -> Address {
        Address::unix(&self.socket, EXPORT)
    }

    /// Its process id.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.process
    }

    /// Takes the socket out of the file system: connections that are made go on, further ones cannot be made.
    pub fn hide(&mut self) {
        if let Some(folder) = self.folder.take() {
            drop(Folder(Some(folder)));
        }
    }

    /// Waits for its end, which is an error, since nobody has asked for it.
    pub async fn ended(&self) -> SourceError {
        let mut end = self.end.clone();
        let end = end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        self.error(end)
    }

    /// The error of its end, if it has ended.
    #[must_use]
    pub fn has_ended(&self) -> Option<SourceError> {
        let end = self.end.borrow().clone();
        end.map(|end| self.error(Some(end)))
    }

    fn error(&self, end: Option<End>) -> SourceError {
        let end = end.unwrap_or_else(|| End { status: "unknown how".into(), complaint: String::new() });
        let (program, image) = (PROGRAM.to_owned(), self.image.clone());
        SourceError::Ended { program, image, status: end.status, complaint: end.complaint }
    }

    /// Ends it, and waits until it is gone: then it has let go of the image.
    pub async fn end(self) {
        self.kill();
        let mut end = self.end.clone();
        // An error means that its thread is gone, which goes last.
        drop(end.wait_for(Option::is_some).await);
    }

    /// Ends it without waiting.
    pub(super) fn kill(&self) {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::warn!(%error, process = self.process, "qemu-nbd cannot be ended"),
        }
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        self.kill();
        self.hide();
    }
}

fn not_started(what: impl std::fmt::Display, cause: &dyn std::fmt::Display) -> SourceError {
    SourceError::Start { what: what.to_string(), cause: cause.to_string() }
}

/// A folder with a socket in it, removed unless it is kept.
struct Folder(Option<PathBuf>);

impl Folder {
    fn keep(mut self) -> Option<PathBuf> {
        self.0.take()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let Some(folder) = &self.0 else { return };
        // The socket may not have been made.
        std::fs::remove_file(folder.join("s")).ok();
        if let Err(error) = std::fs::remove_dir(folder) {
            tracing::warn!(%error, folder = %folder.display(), "a folder of a socket was not removed");
        }
    }
}

/// The image for messages, and how the program is started: with the socket as its standard input.
fn command(options: &QemuNbdOptions, listener: UnixListener) -> (String, Command) {
    let mut command = Command::new("setpriv");
    if let Some(owner) = options.owner {
        command.arg("--reuid").arg(owner.user.to_string());
        command.arg("--regid").arg(owner.group.to_string()).arg("--clear-groups");
    }
    command.args(["--pdeathsig", "KILL", "--", "/bin/sh", "-c", ACTIVATE, "sh"]);
    command.arg(std::process::id().to_string()).arg(PROGRAM);
    command.args(["--read-only", "--persistent", "--export-name", EXPORT]);
    command.arg(format!("--shared={}", options.connections.max(1)));
    if let Some(bitmap) = &options.bitmap {
        command.arg(format!("--bitmap={bitmap}"));
    }
    let image: OsString = match &options.image {
        Format::Named { format, file } => {
            command.arg(format!("--format={format}"));
            file.into()
        }
        Format::Options(options) => {
            command.arg("--image-opts");
            options.into()
        }
    };
    command.arg("--").arg(&image);
    command.env_clear().env("LC_ALL", "C").current_dir("/");
    command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into()));
    command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::piped());
    (Path::new(&image).display().to_string(), command)
}

type Started = std::io::Result<(u32, OwnedFd)>;

/// The whole life of the program, on one thread.
fn live(
    mut command: Command,
    started: &std::sync::mpsc::SyncSender<Started>,
    ended: &watch::Sender<Option<End>>,
) {
    let child = command.spawn();
    // Our end of the socket: it shall be closed when the program's is.
    drop(command);
    let (mut child, pidfd) = match child.and_then(with_pidfd) {
        Ok(both) => both,
        Err(error) => return drop(started.send(Err(error))),
    };
    // Whoever waits for it waits until it is told.
    drop(started.send(Ok((child.id(), pidfd))));
    let complaint = child.stderr.take().map(complaint).unwrap_or_default();
    let status = child.wait().map_or_else(|error| error.to_string(), |status: ExitStatus| status.to_string());
    ended.send_replace(Some(End { status, complaint }));
}

fn with_pidfd(mut child: Child) -> std::io::Result<(Child, OwnedFd)> {
    match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        Ok(pidfd) => Ok((child, pidfd)),
        Err(error) => {
            child.kill()?;
            child.wait()?;
            Err(error.into())
        }
    }
}

/// The beginning of what it complains about; it is never kept from complaining on.
fn complaint(mut from: impl Read) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                let room = MOST_COMPLAINT - kept.len();
                kept.extend(buffer.iter().take(count.min(room)));
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&kept).trim().to_owned()
}

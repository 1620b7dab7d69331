//! Running a helper program: no shell, no inherited surroundings, a time limit, and no survivors.
//!
//! **A helper dies with its parent.** `prctl(PR_SET_PDEATHSIG)` must be called in the child between fork and exec,
//! which in Rust means `pre_exec`, which is `unsafe`. Here it is done by `setpriv --pdeathsig KILL -- PROGRAM …` of
//! util-linux, which does exactly that and then becomes the program: same process id, nothing in between. Two facts
//! about that signal matter. It is sent when the parent *thread* ends, so the thread that starts a helper must be the
//! one that waits for it: [`run`] blocks and does just that. And `setpriv` does not look whether the parent died in
//! the millisecond before its `prctl`; such an orphan would run to its end. All helpers but `convert` end by
//! themselves in milliseconds, `convert` writes only into files that carry the job's id, and every image is locked by
//! QEMU while a helper has it open, so a successor finds out. That is why the rest risk was taken rather than a
//! second binary of our own.
//!
//! The environment is empty but for `PATH` and the C locale: messages are parsed by people, and numbers by us.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Why a helper gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// It could not be started.
    #[error("cannot start {program:?}: {source}")]
    Start {
        /// Which.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its output could not be read, or its end not be waited for.
    #[error("cannot follow {program:?}: {source}")]
    Follow {
        /// Which.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It took too long and was killed.
    #[error("{program:?} did not end within {limit:?} and was killed")]
    TimedOut {
        /// Which.
        program: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// It does not even react to SIGKILL: it hangs in the kernel, as on a dead network file system.
    #[error("{program:?} (process {pid}) hangs in the kernel and cannot be killed")]
    Stuck {
        /// Which.
        program: PathBuf,
        /// Its process id.
        pid: u32,
    },
    /// Asked to stop; it was killed.
    #[error("{program:?} was stopped, as asked")]
    Stopped {
        /// Which.
        program: PathBuf,
    },
    /// It printed more than any answer has.
    #[error("{program:?} printed more than {limit} bytes")]
    TooMuch {
        /// Which.
        program: PathBuf,
        /// The limit.
        limit: usize,
    },
}

/// What a helper left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained about.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Its complaint, shortened for a message.
    pub fn complaint(&self) -> String {
        let text = String::from_utf8_lossy(&self.stderr);
        let text = text.trim();
        match text.char_indices().nth(2000) {
            Some((at, _)) => format!("{} …", &text[..at]),
            None => text.to_owned(),
        }
    }
}

const MOST_OUTPUT: usize = 16 << 20;
/// How often a request to stop is looked for.
const TICK: Duration = Duration::from_millis(20);
/// How long a killed helper may take to be gone.
const DYING: Duration = Duration::from_secs(10);

/// Runs a program to its end and returns what it printed. Blocks; see the module for why on this very thread.
pub fn run(
    program: &Path,
    args: &[OsString],
    limit: Duration,
    stop: &dyn Fn() -> bool,
) -> Result<Finished, RunError> {
    let mut command = Command::new("setpriv");
    command.arg("--pdeathsig").arg("KILL").arg("--").arg(program).args(args);
    command.env_clear().env("LC_ALL", "C").env("PATH", path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir("/");
    let start = |source| RunError::Start { program: program.to_owned(), source };
    let mut child = command.spawn().map_err(start)?;
    tracing::debug!(pid = child.id(), ?program, ?args, "helper started");
    let followed = follow(&mut child, program, limit, stop);
    if followed.is_err() {
        end(&mut child, program)?;
    }
    followed
}

fn path() -> OsString {
    std::env::var_os("PATH").unwrap_or_else(|| OsStr::new("/usr/sbin:/usr/bin:/sbin:/bin").to_owned())
}

fn follow(
    child: &mut Child,
    program: &Path,
    limit: Duration,
    stop: &dyn Fn() -> bool,
) -> Result<Finished, RunError> {
    let fail = |source| RunError::Follow { program: program.to_owned(), source };
    let deadline = Instant::now() + limit;
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    // Closed pipes first, then the process: it may close them and go on working.
    while out.is_some() || err.is_some() {
        let ready = {
            let mut fds = Vec::with_capacity(2);
            if let Some(out) = &out {
                fds.push(PollFd::new(out, PollFlags::IN));
            }
            if let Some(err) = &err {
                fds.push(PollFd::new(err, PollFlags::IN));
            }
            wait(&mut fds, program, deadline, limit, stop)?;
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            (out.is_some() && ready.next().unwrap_or(false), ready.next().unwrap_or(false))
        };
        // With one pipe left its answer is in the first place.
        let (out_ready, err_ready) = if out.is_some() { ready } else { (false, true) };
        if out_ready {
            drain(&mut out, &mut stdout).map_err(fail)?;
        }
        if err_ready {
            drain(&mut err, &mut stderr).map_err(fail)?;
        }
        if stdout.len() + stderr.len() > MOST_OUTPUT {
            return Err(RunError::TooMuch { program: program.to_owned(), limit: MOST_OUTPUT });
        }
    }
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(|e| fail(e.into()))?;
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    wait(&mut fds, program, deadline, limit, stop)?;
    let status = child.wait().map_err(fail)?;
    Ok(Finished { status, stdout, stderr })
}

/// Waits until one of the descriptors has something to say.
fn wait(
    fds: &mut [PollFd<'_>],
    program: &Path,
    deadline: Instant,
    limit: Duration,
    stop: &dyn Fn() -> bool,
) -> Result<(), RunError> {
    loop {
        if stop() {
            return Err(RunError::Stopped { program: program.to_owned() });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RunError::TimedOut { program: program.to_owned(), limit });
        }
        match poll(fds, Some(&timespec(left.min(TICK)))) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(RunError::Follow { program: program.to_owned(), source: e.into() }),
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

fn drain(pipe: &mut Option<impl Read>, into: &mut Vec<u8>) -> std::io::Result<()> {
    let Some(open) = pipe else { return Ok(()) };
    let mut buffer = [0; 16 << 10];
    match open.read(&mut buffer) {
        Ok(0) => *pipe = None,
        Ok(n) => into.extend_from_slice(&buffer[..n]),
        Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
        Err(e) => return Err(e),
    }
    Ok(())
}

/// Kills a helper and waits until it is gone.
fn end(child: &mut Child, program: &Path) -> Result<(), RunError> {
    let fail = |source| RunError::Follow { program: program.to_owned(), source };
    child.kill().map_err(fail)?;
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(|e| fail(e.into()))?;
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    match wait(&mut fds, program, Instant::now() + DYING, DYING, &|| false) {
        Ok(()) => child.wait().map(|_| ()).map_err(fail),
        Err(_) => Err(RunError::Stuck { program: program.to_owned(), pid: child.id() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: Duration, stop: &dyn Fn() -> bool) -> Result<Finished, RunError> {
        run(Path::new("/bin/sh"), &["-c".into(), script.into()], limit, stop)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_and_status_come_back_however_they_are_mixed() {
        let done = sh("echo a; echo b >&2; exec >&-; echo c >&2; exit 3", LONG, &|| false).unwrap();
        assert_eq!(
            (done.stdout.as_slice(), done.stderr.as_slice()),
            (b"a\n".as_slice(), b"b\nc\n".as_slice())
        );
        assert_eq!(done.status.code(), Some(3));
        let done = sh("exec 2>&-; head -c 300000 /dev/zero", LONG, &|| false).unwrap();
        assert_eq!(done.stdout.len(), 300_000);
    }

    #[test]
    fn nothing_is_inherited() {
        let done = run(Path::new("/usr/bin/env"), &[], LONG, &|| false).unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        let mut names: Vec<_> =
            text.lines().filter_map(|l| l.split_once('=')).map(|(name, _)| name).collect();
        names.sort_unstable();
        assert_eq!(names, ["LC_ALL", "PATH"]);
    }

    #[test]
    fn a_helper_that_takes_too_long_is_gone_afterwards() {
        let got = sh("echo $$ >&2; exec sleep 1000", Duration::from_millis(300), &|| false);
        assert!(matches!(got, Err(RunError::TimedOut { .. })), "{got:?}");
        // Also when it closed its pipes and cannot be heard any more.
        let got = sh("exec >&- 2>&-; exec sleep 1000", Duration::from_millis(300), &|| false);
        assert!(matches!(got, Err(RunError::TimedOut { .. })), "{got:?}");
    }

    #[test]
    fn a_request_to_stop_ends_it() {
        let asked = std::cell::Cell::new(0);
        let got = sh("exec sleep 1000", LONG, &|| {
            asked.set(asked.get() + 1);
            asked.get() > 1
        });
        assert!(matches!(got, Err(RunError::Stopped { .. })), "{got:?}");
    }

    #[test]
    fn endless_output_is_cut_off() {
        let got = sh("cat /dev/zero", LONG, &|| false);
        assert!(matches!(got, Err(RunError::TooMuch { .. })), "{got:?}");
    }

    #[test]
    fn a_missing_program_is_told() {
        let done = run(Path::new("/no/such/program"), &[], LONG, &|| false).unwrap();
        assert!(!done.status.success() && done.complaint().contains("/no/such/program"));
    }

    #[test]
    fn a_helper_dies_with_the_thread_that_started_it() {
        // The very call that `run` makes, but nobody waits. The thread ends, the helper must end too.
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL", "--", "/bin/sh", "-c", "echo ready; exec sleep 1000"]);
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            // Not before it has asked for the signal.
            let mut ready = [0; 6];
            child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
            child
        })
        .join()
        .unwrap();
        use std::os::unix::process::ExitStatusExt as _;
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}

//! Full disks and I/O errors: a program runs under `faulty` (in C, beside this file), which counts every call that changes
//! something below certain folders and lets one of them fail, or that one and all that follow.
//!
//! What fails was never done: neither the kernel nor the file system has seen it. (What was done in part is what the power
//! cuts are about.) Calls are counted over all threads and children of the program, so with several threads the same number may
//! meet another call in the next run. What was met is known afterwards: [`read`] tells.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The error that a call fails with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Error {
    /// EIO
    Io,
    /// ENOSPC
    NoSpace,
}

/// How long it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lasts {
    /// This call alone.
    Once,
    /// This one, and all that follow and may need room: a full disk.
    Full,
    /// This one and all that follow: a broken disk.
    Broken,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which call it meets, counted from 1.
    pub nth: u64,
    /// What it says.
    pub error: Error,
    /// How long it goes on.
    pub lasts: Lasts,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {:?}, at call {}", self.error, self.lasts, self.nth)
    }
}

/// A call that was counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its name.
    pub call: String,
    /// What it was about.
    pub path: PathBuf,
    /// Whether it was made to fail.
    pub failed: bool,
}

/// Compiles the program `faulty` to this path.
///
/// # Errors
/// When there is no C compiler, or it fails.
pub fn build(at: &Path) -> io::Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/faults/faulty.c");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let done = Command::new(compiler).args(["-O1", "-Wall", "-o"]).arg(at).arg(source).status()?;
    if done.success() { Ok(()) } else { Err(io::Error::other(format!("compiling faulty: {done}"))) }
}

/// The arguments that `faulty` takes ahead of a program and its arguments.
#[must_use]
pub fn arguments(log: &Path, fault: Option<Fault>, roots: &[&Path]) -> Vec<OsString> {
    let (nth, error, how) = match fault {
        None => (0, Error::Io, Lasts::Once),
        Some(Fault { nth, error, lasts }) => (nth, error, lasts),
    };
    let number = match error {
        Error::Io => rustix::io::Errno::IO,
        Error::NoSpace => rustix::io::Errno::NOSPC,
    };
    let how = match how {
        Lasts::Once => "once",
        Lasts::Full => "full",
        Lasts::Broken => "lasting",
    };
    let mut all: Vec<OsString> =
        vec![log.into(), nth.to_string().into(), number.raw_os_error().to_string().into(), how.into()];
    all.extend(roots.iter().map(|root| root.into()));
    all.push("--".into());
    all
}

/// Mends the disk: from now on nothing fails any more.
///
/// # Errors
/// When the note beside the log cannot be written.
pub fn mend(log: &Path) -> io::Result<()> {
    std::fs::write(well(log), "")
}

/// The file that says that the disk is well.
fn well(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".well");
    name.into()
}

/// Removes what is left of an earlier run with this log.
///
/// # Errors
/// When there is something that cannot be removed.
pub fn forget(log: &Path) -> io::Result<()> {
    for left in [log.to_owned(), well(log)] {
        match std::fs::remove_file(left) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// What `faulty` has counted, in order.
///
/// # Errors
/// When its log cannot be read.
pub fn read(log: &Path) -> io::Result<Vec<Operation>> {
    Ok(std::fs::read_to_string(log)?.lines().filter_map(operation).collect())
}

fn operation(line: &str) -> Option<Operation> {
    let mut words = line.splitn(3, ' ').skip(1);
    let (call, rest) = (words.next()?, words.next()?);
    let path = rest.strip_suffix(" FAILED");
    Some(Operation { call: call.to_owned(), path: path.unwrap_or(rest).into(), failed: path.is_some() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What a shell is told when it makes folders, with a fault.
    fn folders(fault: Option<Fault>) -> (String, Vec<Operation>) {
        let place = tempfile::tempdir().unwrap();
        let (faulty, log, root) =
            (place.path().join("faulty"), place.path().join("log"), place.path().join("root"));
        build(&faulty).unwrap();
        std::fs::create_dir(&root).unwrap();
        let script =
            "for n in a b c d; do mkdir $n && echo $n; done; rmdir a && echo -a; mkdir $0 && echo beside";
        let done = Command::new(&faulty)
            .args(arguments(&log, fault, &[&root]))
            .args(["sh", "-c", script])
            .arg(place.path().join("beside"))
            .current_dir(&root)
            .output()
            .unwrap();
        (String::from_utf8(done.stdout).unwrap().replace('\n', " "), read(&log).unwrap())
    }

    #[test]
    fn a_call_fails_as_often_as_it_was_told_and_those_beside_the_roots_never() {
        let fault = |lasts| Some(Fault { nth: 2, error: Error::NoSpace, lasts });
        for (fault, said, failed) in [
            (None, "a b c d -a beside ", 0),
            (fault(Lasts::Once), "a c d -a beside ", 1),
            (fault(Lasts::Full), "a -a beside ", 3),
            (fault(Lasts::Broken), "a beside ", 4),
        ] {
            let (told, met) = folders(fault);
            assert_eq!(told, said, "{fault:?}");
            assert_eq!(met.len(), 5, "{met:?}");
            assert_eq!(met.iter().filter(|met| met.failed).count(), failed, "{met:?}");
        }
    }
}

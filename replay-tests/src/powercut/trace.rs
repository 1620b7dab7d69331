//! A program's system calls on files, in order.
//!
//! strace prints every call with all its bytes. A call of one thread may begin before one of another ends; it is known
//! when each began and when it ended, because a sync speaks only for what had ended when it began.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A call that has ended without an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its place among all beginnings and ends.
    pub begun: usize,
    /// The same of its end.
    pub ended: usize,
    /// Whose descriptors it speaks of: all threads of a process have the same.
    pub process: u32,
    /// What it did.
    pub act: Act,
}

/// What a call did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// A file or folder was opened, and made if it was not there.
    Open {
        /// The descriptor.
        fd: i32,
        /// What was opened.
        path: PathBuf,
        /// Whether it would be made.
        create: bool,
        /// Whether it was emptied.
        truncate: bool,
        /// Whether each write goes to its end.
        append: bool,
    },
    /// A descriptor is the same as another one.
    Duplicate {
        /// The other one.
        fd: i32,
        /// The new one.
        new: i32,
    },
    /// The place of the next write was set.
    Seek {
        /// The descriptor.
        fd: i32,
        /// The place.
        at: u64,
    },
    /// Something was read from where the descriptor stood.
    Read {
        /// The descriptor.
        fd: i32,
        /// So many bytes.
        count: u64,
    },
    /// Bytes were written.
    Write {
        /// The descriptor.
        fd: i32,
        /// Where; absent: where the descriptor stood.
        at: Option<u64>,
        /// What.
        data: Vec<u8>,
    },
    /// The length was set.
    Truncate {
        /// The descriptor.
        fd: i32,
        /// The length.
        len: u64,
    },
    /// Room was allocated.
    Allocate {
        /// The descriptor.
        fd: i32,
        /// How.
        mode: String,
        /// From where.
        at: u64,
        /// How much.
        len: u64,
    },
    /// A file, or a folder's names, were synced.
    Sync {
        /// The descriptor.
        fd: i32,
    },
    /// A name was given to what had another one.
    Rename {
        /// The other one.
        from: PathBuf,
        /// The name.
        to: PathBuf,
    },
    /// A name was removed.
    Remove {
        /// The name.
        path: PathBuf,
    },
    /// A folder was made.
    MakeFolder {
        /// Its name.
        path: PathBuf,
    },
    /// A file was shared with memory, for writing.
    Share {
        /// The descriptor.
        fd: i32,
    },
    /// Something that a disk cannot be built from, if it concerns a file that is followed.
    Strange {
        /// The paths in it.
        paths: Vec<PathBuf>,
        /// The call.
        call: String,
    },
}

/// The calls that are recorded. Everything that changes a file and is not among them would go unnoticed.
const CALLS: &str = "open,openat,openat2,creat,dup,dup2,dup3,fcntl,lseek,read,readv,write,writev,pwrite64,pwritev,pwritev2,\
                     truncate,ftruncate,fallocate,fsync,fdatasync,sync,syncfs,rename,renameat,renameat2,unlink,unlinkat,rmdir,\
                     mkdir,mkdirat,link,linkat,symlink,symlinkat,copy_file_range,sendfile,splice,ioctl,mmap,\
                     clone,clone3,fork,vfork";

/// Runs a program to its end and returns its calls. Its standard output is a pipe; what it writes there is among them.
///
/// # Panics
/// When strace or the program fails.
#[must_use]
pub fn record<'a>(
    program: &Path,
    arguments: &[&str],
    environment: impl IntoIterator<Item = (&'a str, &'a OsStr)>,
) -> Vec<Call> {
    let file = tempfile::NamedTempFile::new().expect("a file for the recording");
    let output = Command::new("strace")
        .args(["-f", "-qq", "-y", "-xx", "-s", "16777216", "-e", "signal=none", "-e"])
        .arg(format!("trace={CALLS}"))
        .arg("-o")
        .arg(file.path())
        .arg(program)
        .args(arguments)
        .envs(environment)
        .stdin(Stdio::null())
        .output()
        .expect("strace runs");
    assert!(output.status.success(), "the recorded program: {}", String::from_utf8_lossy(&output.stderr));
    read(&std::fs::read_to_string(file.path()).expect("the recording"))
}

/// Reads a recording.
///
/// # Panics
/// When a line makes no sense.
#[must_use]
pub fn read(text: &str) -> Vec<Call> {
    let whole = whole(text);
    let parents: HashMap<u32, u32> =
        whole.iter().filter_map(|(thread, .., line)| Some((begun_thread(line)?, *thread))).collect();
    let process = |mut thread: u32| {
        while let Some(parent) = parents.get(&thread) {
            thread = *parent;
        }
        thread
    };
    let understood = whole.iter().filter_map(|(thread, begun, ended, line)| {
        let (begun, ended, process) = (*begun, *ended, process(*thread));
        understand(line).map(|act| Call { begun, ended, process, act })
    });
    understood.collect()
}

/// The calls that have ended, in the order in which they did: whose each was, when it began, when it ended, and what was said
/// of it.
fn whole(text: &str) -> Vec<(u32, usize, usize, String)> {
    let mut begun: HashMap<&str, (usize, &str)> = HashMap::new();
    let mut calls = Vec::new();
    for (now, line) in text.lines().enumerate() {
        let Some((thread, rest)) = line.split_once(' ') else { panic!("a strange line: {line}") };
        let rest = rest.trim_start();
        let (since, whole) = if let Some(first) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(thread, (now, first));
            continue;
        } else if rest.starts_with("<... ") {
            let (since, first) = begun.remove(thread).unwrap_or_else(|| panic!("what has begun? {line}"));
            let (_, last) = rest.split_once(" resumed>").unwrap_or_else(|| panic!("a strange line: {line}"));
            (since, format!("{first}{last}"))
        } else {
            (now, rest.to_owned())
        };
        if whole.starts_with("+++") || whole.starts_with("---") {
            continue;
        }
        calls.push((thread.parse().expect("a thread"), since, now, whole));
    }
    calls
}

/// The thread that a call has begun, if that has the descriptors of its beginner.
fn begun_thread(line: &str) -> Option<u32> {
    if !line.starts_with("clone") || !line.contains("CLONE_FILES") {
        return None;
    }
    line.rsplit_once(" = ")?.1.trim().parse().ok()
}

fn understand(line: &str) -> Option<Act> {
    let (name, rest) = line.split_once('(')?;
    let (inner, result) = rest.rsplit_once(" = ")?;
    let inner = inner.trim_end().strip_suffix(')')?;
    // A call that failed has changed nothing.
    let returned: i64 = result.split(|c: char| !(c.is_ascii_digit() || c == '-')).next()?.parse().ok()?;
    if returned < 0 {
        return None;
    }
    let args = split(inner);
    let arg = |n: usize| args.get(n).copied().unwrap_or_default();
    let fd = |n: usize| descriptor(arg(n));
    let number = |n: usize| arg(n).parse::<u64>().unwrap_or_else(|_| panic!("a number: {line}"));
    let path = |folder: Option<usize>, n: usize| joined(folder.map(arg), arg(n));
    let opened = |path: PathBuf, flags: &str| Act::Open {
        fd: i32::try_from(returned).expect("a descriptor"),
        path,
        create: flags.contains("O_CREAT"),
        truncate: flags.contains("O_TRUNC"),
        append: flags.contains("O_APPEND"),
    };
    let count = usize::try_from(returned).ok()?;
    let strange = || Act::Strange {
        paths: args.iter().filter_map(|arg| mentioned(arg)).collect(),
        call: line.chars().take(300).collect(),
    };
    Some(match name {
        "open" => opened(path(None, 0), arg(1)),
        "openat" | "openat2" if arg(2).contains("O_TMPFILE") => strange(),
        "openat" | "openat2" => opened(path(Some(0), 1), arg(2)),
        "dup" | "dup2" | "dup3" => Act::Duplicate { fd: fd(0)?, new: i32::try_from(returned).ok()? },
        "fcntl" if arg(1).starts_with("F_DUPFD") => {
            Act::Duplicate { fd: fd(0)?, new: i32::try_from(returned).ok()? }
        }
        "fcntl" => return None,
        "lseek" => Act::Seek { fd: fd(0)?, at: u64::try_from(returned).ok()? },
        "read" => Act::Read { fd: fd(0)?, count: u64::try_from(returned).ok()? },
        "write" => Act::Write { fd: fd(0)?, at: None, data: bytes(arg(1), count) },
        "pwrite64" => Act::Write { fd: fd(0)?, at: Some(number(3)), data: bytes(arg(1), count) },
        "writev" => Act::Write { fd: fd(0)?, at: None, data: vectored(arg(1), count) },
        "pwritev" | "pwritev2" => {
            Act::Write { fd: fd(0)?, at: Some(number(3)), data: vectored(arg(1), count) }
        }
        "ftruncate" => Act::Truncate { fd: fd(0)?, len: number(1) },
        "fallocate" => Act::Allocate { fd: fd(0)?, mode: arg(1).to_owned(), at: number(2), len: number(3) },
        "fsync" | "fdatasync" => Act::Sync { fd: fd(0)? },
        "rename" => Act::Rename { from: path(None, 0), to: path(None, 1) },
        "renameat2" if arg(4).contains("RENAME_EXCHANGE") => strange(),
        "renameat" | "renameat2" => Act::Rename { from: path(Some(0), 1), to: path(Some(2), 3) },
        "unlink" | "rmdir" => Act::Remove { path: path(None, 0) },
        "unlinkat" => Act::Remove { path: path(Some(0), 1) },
        "mkdir" => Act::MakeFolder { path: path(None, 0) },
        "mkdirat" => Act::MakeFolder { path: path(Some(0), 1) },
        "mmap"
            if arg(2).contains("PROT_WRITE")
                && arg(3).contains("MAP_SHARED")
                && !arg(3).contains("ANONYMOUS") =>
        {
            Act::Share { fd: fd(4)? }
        }
        "mmap" | "clone" | "clone3" | "fork" | "vfork" => return None,
        "ioctl" if !arg(1).contains("CLONE") => return None,
        _ => strange(),
    })
}

/// Arguments at their commas; those within brackets and quotes belong to one.
fn split(inner: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut quoted, mut start) = (Vec::new(), 0_i32, false, 0);
    for (at, byte) in inner.bytes().enumerate() {
        match byte {
            b'"' => quoted = !quoted,
            b'[' | b'{' | b'<' | b'(' if !quoted => depth += 1,
            b']' | b'}' | b'>' | b')' if !quoted => depth -= 1,
            b',' if !quoted && depth == 0 => {
                parts.push(inner[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(inner[start..].trim());
    parts
}

/// `7</path>`. Pipes, sockets and events are not followed, whoever has had a file under that number; but for the standard
/// output, which is a pipe.
fn descriptor(arg: &str) -> Option<i32> {
    let (fd, inside) = arg.split_once('<').unwrap_or((arg, r"\x2f"));
    let fd = fd.parse().ok()?;
    (fd == 1 || inside.starts_with(r"\x2f")).then_some(fd)
}

/// The bytes of `\x2f\x74`.
fn unescaped(text: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok()).expect("a digit");
    text.as_bytes().chunks(4).map(|four| digit(four[2]) << 4 | digit(four[3])).collect()
}

fn quoted(arg: &str) -> Option<&str> {
    let (_, rest) = arg.split_once('"')?;
    rest.split_once('"').map(|(inside, _)| inside)
}

fn bytes(arg: &str, count: usize) -> Vec<u8> {
    let mut data = unescaped(quoted(arg).expect("bytes"));
    assert!(data.len() >= count, "strace left bytes out");
    // A short write.
    data.truncate(count);
    data
}

fn vectored(arg: &str, count: usize) -> Vec<u8> {
    let mut data: Vec<u8> = arg.split("iov_base=").skip(1).filter_map(quoted).flat_map(unescaped).collect();
    assert!(data.len() >= count, "strace left bytes out");
    data.truncate(count);
    data
}

/// The path within `7<...>` or quotes.
fn mentioned(arg: &str) -> Option<PathBuf> {
    let inside = match arg.split_once('<') {
        Some((_, rest)) => rest.split_once('>')?.0,
        None => quoted(arg)?,
    };
    inside.starts_with("\\x").then(|| std::ffi::OsString::from_vec(unescaped(inside)).into())
}

fn joined(folder: Option<&str>, name: &str) -> PathBuf {
    let name = PathBuf::from(std::ffi::OsString::from_vec(unescaped(quoted(name).expect("a path"))));
    match folder.and_then(mentioned) {
        Some(folder) if name.is_relative() => folder.join(name),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_two_threads_are_told_apart_and_keep_their_beginnings_and_ends() {
        let text = r#"10 clone3({flags=CLONE_VM|CLONE_FS|CLONE_FILES|CLONE_THREAD, stack_size=0x1}, 88) = 11
10 openat(AT_FDCWD<\x2f\x61>, "\x62", O_RDWR|O_CREAT|O_CLOEXEC, 0600) = 4<\x2f\x61\x2f\x62>
10 pwrite64(4<\x2f\x61\x2f\x62>, "\x2c\x22\x28", 3, 512 <unfinished ...>
11 fdatasync(4<\x2f\x61\x2f\x62>)   = 0
10 <... pwrite64 resumed>) = 2
11 write(4<\x61\x6e\x6f\x6e>, "\x01", 1) = 1
11 unlink("\x2f\x7a") = -1 ENOENT (No such file or directory)
11 rename("\x2f\x61\x2f\x62", "\x2f\x61\x2f\x63") = 0
10 clone3({flags=CLONE_VM|CLONE_VFORK, exit_signal=SIGCHLD, stack_size=0x1}, 88) = 12
12 fsync(4<\x2f\x61\x2f\x64>) = 0
11 +++ exited with 0 +++"#;
        let open = Act::Open { fd: 4, path: "/a/b".into(), create: true, truncate: false, append: false };
        assert_eq!(
            read(text),
            [
                Call { begun: 1, ended: 1, process: 10, act: open },
                Call { begun: 3, ended: 3, process: 10, act: Act::Sync { fd: 4 } },
                Call {
                    begun: 2,
                    ended: 4,
                    process: 10,
                    act: Act::Write { fd: 4, at: Some(512), data: b",\"".to_vec() }
                },
                Call {
                    begun: 7,
                    ended: 7,
                    process: 10,
                    act: Act::Rename { from: "/a/b".into(), to: "/a/c".into() }
                },
                Call { begun: 9, ended: 9, process: 12, act: Act::Sync { fd: 4 } },
            ]
        );
    }
}

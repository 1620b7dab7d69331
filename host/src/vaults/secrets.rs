//! Secrets that open vaults, in files. None is ever taken from a command line or the environment, shown, or logged.
//!
//! A file with a secret must be a regular one of the user who asks, and nobody else may read it. That is asked of the open file,
//! so it cannot be exchanged in between. It may be reached through a symbolic link: whoever named it chose that.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::rand::{GetRandomFlags, getrandom};
use vmkeep_vault::keys::wrap::{Credential, LONGEST_FILE, SHORTEST_FILE};
use vmkeep_workflow::Fault;
use zeroize::Zeroizing;

use crate::codes;
use crate::config::KeySource;

/// Rights that nobody but the owner may have.
const OTHERS: u32 = 0o077;
/// Random bytes of a key file that we make.
const RANDOM: usize = 32;

const READ: &str = "read a secret";
const MAKE: &str = "make the file";

/// What a file holds that opens a vault.
///
/// # Errors
/// If it is not there, others may read it, or it is no such secret.
pub fn of(source: &KeySource) -> Result<Credential, Fault> {
    match source {
        KeySource::KeyFile(path) => {
            let bytes = read(path)?;
            if bytes.len() < SHORTEST_FILE {
                return Err(refused(path, &format!("a key file has at least {SHORTEST_FILE} bytes")));
            }
            Ok(Credential::KeyFile(bytes))
        }
        KeySource::PassphraseFile(path) => Ok(Credential::Passphrase(line(path)?)),
    }
}

/// The text of a file with a secret, without the end of its only line.
///
/// # Errors
/// As [`of`]; or if it is empty, has more than one line, or is no text.
pub fn line(path: &Path) -> Result<Zeroizing<String>, Fault> {
    let text = text(path)?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.is_empty() {
        return Err(refused(path, &"it is empty"));
    }
    if line.contains('\n') {
        return Err(refused(path, &"it has more than one line"));
    }
    Ok(Zeroizing::new(line.to_owned()))
}

/// The text of a file with a secret.
///
/// # Errors
/// As [`of`], or if it is no text.
pub fn text(path: &Path) -> Result<Zeroizing<String>, Fault> {
    let bytes = read(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|_| refused(path, &"it is not UTF-8"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, Fault> {
    let failed = |error: std::io::Error| refused(path, &error);
    // Without O_NONBLOCK the open of a FIFO would wait for ever.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(refused(path, &"it is not a regular file"));
    }
    let me = rustix::process::geteuid().as_raw();
    if meta.uid() != me {
        return Err(refused(
            path,
            &format!("it belongs to the user {}, and not to {me} who asks", meta.uid()),
        ));
    }
    if meta.mode() & OTHERS != 0 {
        let mode = meta.mode() & 0o7777;
        return Err(refused(path, &format!("others may read or write it: its mode is {mode:04o}")));
    }
    // Of its whole size from the beginning: what grows leaves copies behind that nobody wipes.
    let mut bytes = Zeroizing::new(Vec::with_capacity(LONGEST_FILE + 1));
    file.take(LONGEST_FILE as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > LONGEST_FILE {
        return Err(refused(path, &format!("it has more than {LONGEST_FILE} bytes")));
    }
    Ok(bytes)
}

/// Makes a key file of 32 random bytes, in hex. Durable on return; nothing is there before.
///
/// # Errors
/// If there is something of that name, or it cannot be written.
pub fn make_key_file(path: &Path) -> Result<(), Fault> {
    let mut random = Zeroizing::new([0; RANDOM]);
    let mut filled = 0;
    while filled < RANDOM {
        match getrandom(&mut random[filled..], GetRandomFlags::empty()) {
            Ok(more) => filled += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(unmade(path, &error.into())),
        }
    }
    let mut text = Zeroizing::new(String::with_capacity(2 * RANDOM + 1));
    for byte in random.iter() {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or_default());
        }
    }
    text.push('\n');
    make(path, text.as_bytes())
}

/// Makes a file that only its owner may read. File and name are durable on return; nothing of that name is there before.
///
/// # Errors
/// If there is something of that name, or it cannot be written.
pub fn make(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    let failed = |error: std::io::Error| unmade(path, &error);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let written = file
        .write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| File::open(folder).and_then(|folder| folder.sync_all()));
    written.map_err(|error| {
        // It is ours, and nobody has been told of it.
        let _ = std::fs::remove_file(path);
        failed(error)
    })
}

fn unmade(path: &Path, error: &std::io::Error) -> Fault {
    let code = match error.kind() {
        std::io::ErrorKind::AlreadyExists => codes::BACKUP_EXISTS,
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => codes::NOT_ENOUGH_DISK_SPACE,
        _ => codes::VAULT_KEY_REFUSED,
    };
    Fault::permanent(code, MAKE, path.display().to_string(), error)
        .remedy("Name a file that is not there, in a folder of your own")
}

fn refused(path: &Path, cause: &dyn std::fmt::Display) -> Fault {
    Fault::permanent(codes::VAULT_KEY_REFUSED, READ, path.display().to_string(), cause)
}

//! Files opened by name that somebody else may have put there.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

/// Opens a file or folder for reading: neither a pipe nor a terminal holds this up. Blocks.
///
/// # Errors
/// When it cannot be opened.
pub fn to_read(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

/// Opens a file that this process has made a moment ago, in a folder that others may write to. Blocks.
///
/// # Errors
/// When it cannot be opened, or is another: a link, a file with further names, a file of somebody else.
pub fn just_made(path: &Path) -> io::Result<File> {
    let file = to_read(path, OFlags::NOFOLLOW)?;
    let stat = rustix::fs::fstat(&file)?;
    let plain = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink == 1;
    if plain && stat.st_uid == rustix::process::geteuid().as_raw() {
        return Ok(file);
    }
    Err(io::Error::other("somebody has put another file in its place"))
}

//! Files and folders that survive a power cut.
//!
//! A file is there after a power cut only if the folder that names it was fsynced, and that folder only if *its* parent
//! was. So everything that is made here is made from the top downwards, each level fsynced before the next.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmkeep_workflow::journal::StoreError;

/// The mode of folders that we make: nobody but the owner learns what is in a journal.
const FOLDER_MODE: u32 = 0o700;
/// The mode of files that we make.
pub(crate) const FILE_MODE: u32 = 0o600;

/// An error of reading or writing, with what was being done.
pub(crate) fn failed(doing: &str, path: &Path, error: &io::Error) -> StoreError {
    StoreError::Io(format!("could not {doing} {}: {error}", path.display()))
}

/// A path from the root, links left as they are.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, StoreError> {
    std::path::absolute(path).map_err(|e| failed("find", path, &e))
}

/// Fsyncs a folder: what was made, renamed and removed in it is durable then.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes a folder and those above it that are missing, durably. One that is there is left as it is.
pub(crate) fn make_folder(path: &Path) -> Result<(), StoreError> {
    let path = absolute(path)?;
    let missing: Vec<PathBuf> = path.ancestors().take_while(|p| !p.is_dir()).map(Path::to_path_buf).collect();
    for folder in missing.into_iter().rev() {
        match DirBuilder::new().mode(FOLDER_MODE).create(&folder) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
            Err(e) => return Err(failed("make the folder", &folder, &e)),
        }
        if let Some(parent) = folder.parent() {
            sync_folder(parent).map_err(|e| failed("fsync the folder", parent, &e))?;
        }
    }
    Ok(())
}

/// Makes a new file that only its owner may read; an error if there is one.
pub(crate) fn make_file(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(FILE_MODE).open(path)
}

/// Removes a file; one that is not there is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// How many bytes an unprivileged user may still write to the file system of a folder.
pub(crate) fn room(folder: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether a write fails in this folder for want of room, be it of the disk, a quota or a limit.
///
/// SQLite tells a full disk apart, but reports a spent quota like a broken drive. So it is tried out.
pub(crate) fn lacks_room(folder: &Path) -> bool {
    lacks_room_for(folder, 64 << 10)
}

/// The same of so many bytes.
pub(crate) fn lacks_room_for(folder: &Path, bytes: u64) -> bool {
    let path = folder.join("room.probe");
    let outcome = try_write(&path, bytes);
    let _ = remove(&path);
    outcome.is_err_and(|e| is_lack_of_room(&e))
}

fn try_write(path: &Path, bytes: u64) -> io::Result<()> {
    remove(path)?;
    let mut file = make_file(path)?;
    io::copy(&mut io::Read::take(io::repeat(0x5a), bytes), &mut file).map(drop)
}

/// Whether an error means that there is no room.
pub(crate) fn is_lack_of_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

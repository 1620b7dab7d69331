//! The state of an emulated TPM, where libvirt keeps it: in a folder per domain, by UUID.
//!
//! No definition names that folder, so the state cannot change place together with a definition: it is read whole and
//! written whole, while nobody runs. `swtpm` writes aside and renames, and leaves locks; neither is state. Nothing in the
//! folder is followed out of it, since it may belong to another user.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::FileType;

use crate::blocking::{look, touch};
use crate::image::copy::Identity;
use crate::image::root::{Component, Folder, RelPath, RootError, TargetRoot};
use crate::manifest::{TPM_FOLDERS, is_tpm_file};

/// Firmware variables have at most some megabytes; a TPM's state some hundred kilobytes in a handful of files.
pub const LARGEST: u64 = 64 << 20;
const MOST_FILES: usize = 16;

/// How often, and how far apart, a file is read anew that was written meanwhile.
const TRIES: u32 = 50;
const APART: Duration = Duration::from_millis(100);

/// A file of the state.
#[derive(Debug)]
pub(crate) struct StateFile {
    /// Its folder (see [`TPM_FOLDERS`]) and name.
    pub(crate) below: String,
    pub(crate) name: String,
    /// Where it was read.
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
    pub(crate) written: Timestamp,
}

/// What could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TpmError {
    /// Something of a folder.
    #[error(transparent)]
    Place(#[from] RootError),
    /// A file.
    #[error("{path:?}: {cause}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: String,
    },
}

fn failed(path: &Path, cause: impl std::fmt::Display) -> TpmError {
    TpmError::File { path: path.to_owned(), cause: cause.to_string() }
}

fn below(name: &str) -> RelPath {
    RelPath::from(Component::literal(name.to_owned()))
}

/// Reads a file between two equal looks at it, so that it is never half of one state and half of another; says when it
/// was last written.
pub(crate) fn read_still(open: &dyn Fn() -> std::io::Result<File>) -> std::io::Result<(Vec<u8>, Timestamp)> {
    for _ in 0..TRIES {
        look("read")?;
        let mut file = open()?;
        let before = Identity::of(&file).map_err(|e| std::io::Error::other(e.to_string()))?;
        let mut bytes = Vec::new();
        std::io::Read::by_ref(&mut file).take(LARGEST + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LARGEST {
            return Err(std::io::Error::other("it is larger than any such file"));
        }
        let after = Identity::of(&file).map_err(|e| std::io::Error::other(e.to_string()))?;
        if before == after && after.size == bytes.len() as u64 {
            let written = file.metadata()?.modified()?;
            let written = Timestamp::try_from(written).map_err(std::io::Error::other)?;
            return Ok((bytes, written));
        }
        std::thread::sleep(APART);
    }
    Err(std::io::Error::other("it is being written to all the time"))
}

/// Reads the state in the folder of a domain's TPM. No folder, or nothing in it: no state yet.
pub(crate) fn read(folder: &Path) -> Result<Vec<StateFile>, TpmError> {
    let source = match TargetRoot::open(folder) {
        Err(RootError::Missing { .. }) => return Ok(Vec::new()),
        source => source?,
    };
    let mut found = Vec::new();
    for part in TPM_FOLDERS {
        let state = match source.folder().open_folder(&below(part)) {
            Err(RootError::Missing { .. }) => continue,
            state => state?,
        };
        for (name, kind) in state.entries()? {
            if kind != FileType::RegularFile || !is_tpm_file(name.as_str()) {
                continue;
            }
            if found.len() == MOST_FILES {
                return Err(failed(folder, "it holds more files than any TPM has"));
            }
            let (path, relative) = (state.path_of(&name), RelPath::from(name.clone()));
            let open = || state.open_file(&relative).map_err(|e| std::io::Error::other(e.to_string()));
            let (bytes, written) = read_still(&open).map_err(|e| failed(&path, e))?;
            let (below, name) = ((*part).to_owned(), name.as_str().to_owned());
            found.push(StateFile { below, name, path, bytes, written });
        }
    }
    Ok(found)
}

/// Makes a folder hold exactly this state (folder, name and bytes of each file), durably, with the modes that libvirt
/// gives; it gives the files to the user of `swtpm` at the start. Without any file it is left to libvirt to make a new
/// TPM, which it does only where there is nothing at all.
pub(crate) fn write(folder: &Path, files: &[(&str, &str, &[u8])]) -> Result<(), TpmError> {
    if !files.is_empty() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(folder);
        made.map_err(|e| failed(folder, e))?;
    }
    let root = match TargetRoot::open(folder) {
        Err(RootError::Missing { .. }) if files.is_empty() => return Ok(()),
        root => root?,
    };
    for part in TPM_FOLDERS {
        let wanted: Vec<_> = files.iter().filter(|(below, ..)| below == part).collect();
        let state = if wanted.is_empty() {
            match root.folder().open_folder(&below(part)) {
                Err(RootError::Missing { .. }) => continue,
                state => state?,
            }
        } else {
            root.folder().make_folders(&below(part))?
        };
        for (_, name, bytes) in &wanted {
            put(&state, &Component::literal((*name).to_owned()), bytes)?;
        }
        for (name, kind) in state.entries()? {
            let other = wanted.iter().all(|(_, wanted, _)| *wanted != name.as_str());
            let ours = wanted.is_empty() || is_tpm_file(name.as_str());
            if other && ours && kind != FileType::Directory {
                state.remove_file(&name)?;
            }
        }
        state.sync()?;
        if wanted.is_empty() {
            root.folder().remove_folder(&Component::literal((*part).to_owned()))?;
        }
    }
    root.folder().sync()?;
    let above = folder.parent().unwrap_or(folder);
    File::open(above).and_then(|above| above.sync_all()).map_err(|e| failed(above, e))
}

fn put(state: &Folder, name: &Component, bytes: &[u8]) -> Result<(), TpmError> {
    let aside = Component::literal(format!(".vmkeep-{name}"));
    state.remove_file(&aside)?;
    let mut file = state.create_file(&aside)?;
    let written = touch("write").map_err(std::io::Error::from).and_then(|()| file.write_all(bytes));
    let written = written.and_then(|()| crate::blocking::sync(&file));
    written.map_err(|e| failed(&state.path_of(&aside), e))?;
    Ok(state.replace(&aside, name)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(folder: &Path) -> Vec<(String, String, Vec<u8>)> {
        read(folder).unwrap().into_iter().map(|file| (file.below, file.name, file.bytes)).collect()
    }

    #[test]
    fn a_folder_holds_exactly_the_state_that_was_written_last() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("uuid");
        assert_eq!(state(&folder), []);
        write(&folder, &[]).unwrap();
        assert!(!folder.exists(), "nothing is made of nothing");
        let one = [("tpm2", "tpm2-00.permall", &b"one"[..]), ("tpm2", "tpm2-00.volatilestate", b"v")];
        write(&folder, &one).unwrap();
        std::fs::write(folder.join("tpm2/.lock"), b"").unwrap();
        assert_eq!(state(&folder).len(), 2);
        write(&folder, &one[..1]).unwrap();
        assert_eq!(state(&folder), [("tpm2".to_owned(), "tpm2-00.permall".to_owned(), b"one".to_vec())]);
        assert!(folder.join("tpm2/.lock").exists(), "a lock is none of our business");
        let old = [("tpm1.2", "tpm-00.permall", &b"old"[..])];
        write(&folder, &old).unwrap();
        assert_eq!(state(&folder).len(), 1);
        assert!(!folder.join("tpm2").exists());
        write(&folder, &[]).unwrap();
        assert_eq!(
            std::fs::read_dir(&folder).unwrap().count(),
            0,
            "libvirt makes a new one in an empty folder only"
        );
    }
}

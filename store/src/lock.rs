//! The lock that keeps a store to one process.
//!
//! It is an `flock` on a file of its own: held by the open file, not by the process, it also refuses a second opener
//! within the process, and the kernel gives it up whatever ends its holder. (POSIX record locks do neither; and closing
//! any descriptor of the file would drop them.) The file's text tells people who holds it; nothing depends on it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use vmkeep_workflow::journal::StoreError;

use crate::files::{FILE_MODE, failed};

/// The length of the holder's text. It is always overwritten in place, so that it needs no room on a full disk.
const TEXT: usize = 160;

/// A store's lock; given up when dropped.
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock of the store in `folder`, or tells who has it.
    pub(crate) fn take(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("lock");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(&path)
            .map_err(|e| failed("open the lock", &path, &e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(StoreError::InUse {
                    path: folder.display().to_string(),
                    holder: holder(&mut file),
                });
            }
            Err(e) => return Err(failed("lock", &path, &e.into())),
        }
        let mut lock = Self { file };
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        lock.note(&format!("process {} on {host}, since {:.0}", std::process::id(), jiff::Timestamp::now()));
        Ok(lock)
    }

    /// Writes who holds the lock. On a full disk that may fail, and the lock is held all the same.
    fn note(&mut self, text: &str) {
        let mut line = format!("{:<width$.width$}", text, width = TEXT - 1);
        line.push('\n');
        let noted = self.file.seek(SeekFrom::Start(0)).and_then(|_| self.file.write_all(line.as_bytes()));
        if let Err(error) = noted {
            tracing::warn!(%error, "could not note who holds the store's lock");
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.note("");
        // Closing the file is not enough: a child that was forked and has not yet begun its program still has it open.
        if let Err(error) = flock(&self.file, FlockOperation::Unlock) {
            tracing::warn!(%error, "could not give up the store's lock");
        }
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(TEXT as u64).read_to_string(&mut text);
    match text.trim() {
        "" => "another process",
        _ if read.is_err() => "another process",
        text => return text.to_owned(),
    }
    .to_owned()
}

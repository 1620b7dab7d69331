//! Listing a folder of objects.

use rustix::fs::{AtFlags, Dir, FileType};
use rustix::io::Errno;

use super::{Inner, failure};
use crate::backend::{BackendError, BackendErrorKind, Listed, checked, is_wanted};

impl Inner {
    /// Every object below a prefix. An object that stays keeps its place in its folder, so no reading of a folder misses it;
    /// a folder that goes meanwhile held nothing that stays.
    pub(super) fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        if !prefix.is_empty() {
            checked(&self.place, prefix.strip_suffix('/').unwrap_or(prefix))?;
        }
        let top = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
        let mut found = Vec::new();
        let mut folders = vec![top.to_owned()];
        while let Some(folder) = folders.pop() {
            self.read(&folder, prefix, &mut found, &mut folders)?;
        }
        self.absent(prefix, found)
    }

    fn read(
        &self,
        folder: &str,
        prefix: &str,
        found: &mut Vec<Listed>,
        folders: &mut Vec<String>,
    ) -> Result<(), BackendError> {
        let failed = |errno| failure(&self.place, folder, errno);
        let opened = match self.folder(folder) {
            Ok(opened) => opened,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed(errno)),
        };
        for entry in Dir::read_from(&opened).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(last) = entry.file_name().to_str() else { continue };
            let path = if folder.is_empty() { last.to_owned() } else { format!("{folder}/{last}") };
            // Whether it is a folder is asked for only if the name fits: what is none of ours may not be ours to look at.
            if !is_wanted(&path, true, prefix) {
                continue;
            }
            let stat = match rustix::fs::statat(&opened, last, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(failed(errno)),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => folders.push(path),
                FileType::RegularFile if is_wanted(&path, false, prefix) => {
                    found.push(Listed { name: path, size: u64::try_from(stat.st_size).unwrap_or(0) });
                }
                FileType::RegularFile => {}
                // Left out it would be an object that is absent; nobody can be certain of that.
                other => {
                    let cause = format!("{other:?} lies there, which is neither a file nor a folder");
                    return Err(self.fail(&path, BackendErrorKind::Broken, cause));
                }
            }
        }
        Ok(())
    }
}

//! A disk of a backup, and the files that it is read from.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_vault::manifest::SourceFile;

use crate::hypervisor::{Layer, Target};

/// A disk that takes part in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupDisk {
    /// Which.
    pub target: Target,
    /// Its images, from the top down.
    pub chain: Vec<Layer>,
    /// Bytes.
    pub virtual_size: u64,
    /// Where QEMU keeps what the guest overwrites.
    pub scratch: PathBuf,
    /// Why it cannot have a bitmap; nothing if it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_bitmap: Option<String>,
    /// The files of its chain as they were when the job was planned.
    pub files: Vec<SourceFile>,
}

impl BackupDisk {
    /// The image that the guest writes to.
    #[must_use]
    pub fn top(&self) -> Option<&Layer> {
        self.chain.first()
    }
}

/// The files of a chain as they are now. Blocks.
///
/// # Errors
/// If one cannot be looked at.
pub fn source_files(chain: &[Layer]) -> std::io::Result<Vec<SourceFile>> {
    let of = |(depth, layer): (usize, &Layer)| source_file(&layer.path, depth > 0);
    chain.iter().enumerate().map(of).collect()
}

fn source_file(path: &Path, still: bool) -> std::io::Result<SourceFile> {
    let data = std::fs::metadata(path)?;
    // On file systems of disks this is made from their UUID: it lasts, unlike the number of a device.
    let file_system =
        rustix::fs::statvfs(path).map_or_else(|_| String::new(), |vfs| format!("{:016x}", vfs.f_fsid));
    let changed = Timestamp::new(data.mtime(), i32::try_from(data.mtime_nsec()).unwrap_or(0)).ok();
    Ok(SourceFile {
        path: path.display().to_string(),
        file_system,
        inode: data.ino(),
        size: still.then_some(data.len()),
        changed: changed.filter(|_| still),
    })
}

/// Why a bitmap that lies in the first of these files proves nothing about the content that was read from those: nothing if it
/// does.
#[must_use]
pub fn another(now: &[SourceFile], then: &[SourceFile]) -> Option<String> {
    let (Some(top), Some(was)) = (now.first(), then.first()) else {
        return Some("the files that it was read from are not known".to_owned());
    };
    if (&top.file_system, top.inode) != (&was.file_system, was.inode) {
        return Some(format!("{} is another file than the one that was backed up ({})", top.path, was.path));
    }
    if now.get(1..) != then.get(1..) {
        return Some("the images that it stands on have changed".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_counts_only_in_the_very_file_and_on_the_very_images_that_were_backed_up() {
        let dir = tempfile::tempdir().unwrap();
        let layer = |name: &str| Layer { path: dir.path().join(name), format: "qcow2".to_owned() };
        for name in ["top", "base", "other"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let files =
            |chain: &[&str]| source_files(&chain.iter().map(|n| layer(n)).collect::<Vec<_>>()).unwrap();
        let then = files(&["top", "base"]);
        assert_eq!(another(&files(&["top", "base"]), &then), None);
        std::fs::write(dir.path().join("top"), "the guest writes").unwrap();
        assert_eq!(another(&files(&["top", "base"]), &then), None);
        std::fs::rename(dir.path().join("top"), dir.path().join("renamed")).unwrap();
        assert_eq!(another(&files(&["renamed", "base"]), &then), None, "it is the same file");
        assert!(another(&files(&["other", "base"]), &then).unwrap().contains("another file"));
        assert!(another(&files(&["renamed"]), &then).unwrap().contains("stands on"));
        std::fs::write(dir.path().join("base"), "a template that somebody has edited").unwrap();
        assert!(another(&files(&["renamed", "base"]), &then).unwrap().contains("stands on"));
        assert!(another(&then, &[]).is_some());
    }
}

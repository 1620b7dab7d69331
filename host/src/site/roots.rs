//! The configured roots, opened once, and what became of them since.
//!
//! A root is opened when the daemon starts and used through that handle. If another file system is mounted over it
//! afterwards, the handle still leads to the folder underneath: a backup would be written there, and fill up a file
//! system that nobody meant. So before each job the path is looked at again, and must still lead to what was opened.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmkeep_steps::image::root::Roots;
use vmkeep_workflow::Fault;

use crate::codes;

/// The roots that could be opened, and what they were.
#[derive(Clone, Debug)]
pub struct OpenRoots {
    /// For the steps.
    pub roots: Arc<Roots>,
    /// Each configured path with device and inode; nothing for one that could not be opened.
    seen: Vec<(PathBuf, Option<(u64, u64)>)>,
    /// Where restored images go and replaced machines are kept.
    retained: PathBuf,
}

impl OpenRoots {
    /// Opens what can be opened; the rest is told to the log, and to whoever wants to use it. `retained` is the folder of
    /// restored images and of what is kept aside, which may be a root of its own.
    ///
    /// # Errors
    /// When a root that could be looked at cannot be opened.
    pub fn open(paths: &[PathBuf], retained: &Path) -> Result<Self, Fault> {
        let mut seen = Vec::new();
        for path in paths {
            let identity = identity(path);
            if identity.is_none() {
                tracing::warn!(root = %path.display(), "a configured root is not there; mount or make it, then restart vmkeepd");
            }
            seen.push((path.clone(), identity));
        }
        let present = seen.iter().filter(|(_, identity)| identity.is_some()).map(|(path, _)| path);
        let roots = Roots::open(present).map_err(|e| {
            Fault::permanent(codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST, "open the configured roots", "", e)
                .remedy("Mount or make the folder, or take it out of the configuration")
        })?;
        Ok(Self { roots: Arc::new(roots), seen, retained: retained.to_owned() })
    }

    /// Makes sure that the root of a path is there and is what was opened.
    ///
    /// # Errors
    /// When it is not. A path below no root is not judged here.
    pub fn usable(&self, path: &Path) -> Result<(), Fault> {
        let under = self.seen.iter().filter(|(root, _)| path.starts_with(root));
        let Some((root, opened)) = under.max_by_key(|(root, _)| root.as_os_str().len()) else {
            return Ok(());
        };
        let now = identity(root);
        if now.is_some() && now == *opened {
            return Ok(());
        }
        let cause = match (now, opened) {
            (None, _) => "it is not there: its file system may not be mounted",
            (Some(_), None) => "it was not there when vmkeepd started",
            (Some(_), Some(_)) => "another file system was mounted there since vmkeepd started",
        };
        let code = if *root == self.retained {
            codes::RETAIN_ROOT_DIRECTORY_DOES_NOT_EXIST
        } else {
            codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST
        };
        Err(Fault::permanent(code, "use the root", root.display().to_string(), cause)
            .remedy("Mount what belongs there, then restart vmkeepd"))
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().filter(|meta| meta.is_dir()).map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_that_is_missing_or_has_become_another_is_refused_and_hinders_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two, inner) =
            (dir.path().join("one"), dir.path().join("two"), dir.path().join("one/inner"));
        std::fs::create_dir_all(&inner).unwrap();
        let kept = dir.path().join("kept");
        let all = [one.clone(), two.clone(), inner.clone(), kept.clone()];
        let roots = OpenRoots::open(&all, &kept).unwrap();
        roots.usable(&one.join("x/y")).unwrap();
        roots.usable(&inner.join("x")).unwrap();
        roots.usable(Path::new("/elsewhere")).unwrap();
        let error = roots.usable(&two.join("x")).unwrap_err();
        assert_eq!(error.code, codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST);
        let error = roots.usable(&kept.join("kept/job")).unwrap_err();
        assert_eq!(error.code, codes::RETAIN_ROOT_DIRECTORY_DOES_NOT_EXIST);
        assert_eq!(error.object, kept.display().to_string());
        assert!(error.remedy.contains("Mount"), "{error}");
        std::fs::create_dir(&two).unwrap();
        assert!(roots.usable(&two).is_err(), "it was not opened");
        std::fs::rename(&inner, dir.path().join("moved")).unwrap();
        std::fs::create_dir(&inner).unwrap();
        assert!(roots.usable(&inner).is_err(), "another folder took its place");
        roots.usable(&one).unwrap();
    }
}

//! Where kernel and initial RAM disk of the test guest lie. `scripts/install-deps --guest` makes them.
//!
//! They are current only if they were built from the sources beside this crate: the maker keeps a copy of the
//! sources with its products, and a guest of other sources is refused rather than tested with.

use super::error::{Error, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The parts that a guest boots from.
#[derive(Clone, Debug)]
pub struct GuestParts {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The same with `qemu-ga` and its libraries in it.
    pub initrd_agent: PathBuf,
}

impl GuestParts {
    /// Looks in `VMKEEP_TESTBED_CACHE`, or else in the user's cache folder and in that of the host.
    pub fn locate() -> Result<Self> {
        let folders = cache_folders();
        let found = folders.iter().find(|folder| is_current(folder)).ok_or_else(|| Error::NoGuestParts {
            looked: folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", "),
        })?;
        Ok(Self {
            kernel: found.join("vmlinuz"),
            initrd: found.join("initrd.img"),
            initrd_agent: found.join("initrd-agent.img"),
        })
    }
}

/// The cache folders in the order in which they are looked at. Any may be missing.
pub(crate) fn cache_folders() -> Vec<PathBuf> {
    if let Some(folder) = std::env::var_os("VMKEEP_TESTBED_CACHE").filter(|f| !f.is_empty()) {
        return vec![folder.into()];
    }
    let host = PathBuf::from("/var/cache/vmkeep-testbed");
    if rustix::process::geteuid().is_root() {
        return vec![host];
    }
    let own = std::env::var_os("XDG_CACHE_HOME")
        .filter(|f| !f.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    own.into_iter().map(|cache| cache.join("vmkeep-testbed")).chain([host]).collect()
}

fn is_current(folder: &Path) -> bool {
    let parts = ["vmlinuz", "initrd.img", "initrd-agent.img"];
    if !parts.iter().all(|part| fs::metadata(folder.join(part)).is_ok_and(|m| m.len() > 0)) {
        return false;
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    // Without the sources (an installed copy of the tests) whatever was built is taken.
    let Ok(entries) = fs::read_dir(&sources) else { return true };
    entries.flatten().all(|entry| {
        let built_from = fs::read(folder.join("source").join(entry.file_name()));
        matches!((fs::read(entry.path()), built_from), (Ok(now), Ok(then)) if now == then)
    })
}

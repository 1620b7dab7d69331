//! A RAM disk for a test: a folder on the host's tmpfs, which goes with the test.

use std::fs;
use std::path::{Path, PathBuf};

use super::Host;
use super::bed::{folder, give};

pub struct RamDisk(PathBuf);

impl RamDisk {
    /// Makes one and writes a configuration that names it, with these lines besides.
    pub fn new(host: &Host, more: &str) -> Self {
        let name = host.hypervisor.dir().file_name().unwrap().to_string_lossy().into_owned();
        let path = folder(host, &Path::new("/dev/shm").join(format!("vmkeep-{name}")));
        let dir = folder(host, &host.hypervisor.dir().join("config/vmkeep"));
        fs::write(dir.join("vmkeep.toml"), format!("[snapshot]\nram_disk = {path:?}\n{more}\n")).unwrap();
        give(host, &dir.join("vmkeep.toml"));
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What is on it.
    pub fn files(&self) -> Vec<PathBuf> {
        super::files_below(&self.0)
    }

    /// As the end of the host leaves it.
    pub fn empty(&self) {
        for file in self.files() {
            fs::remove_file(file).unwrap();
        }
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

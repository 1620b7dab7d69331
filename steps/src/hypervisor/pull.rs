//! A backup job that only shows a domain's disks, as they were at one instant (libvirt's pull mode).
//!
//! The guest stays on its images. QEMU copies what is about to be overwritten into a *scratch* file for each disk and shows
//! the disk as it was on a NBD server, until the job is ended. Every file of a job bears the job's name, because nothing else
//! tells whose job it is that libvirt knows.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::observation::Target;

/// The name under which an export shows its dirty bitmap.
pub const EXPORT_BITMAP: &str = "dirty";

/// A pull that is to be begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    /// The Unix socket that QEMU makes for its NBD server.
    pub socket: PathBuf,
    /// The checkpoint that is made in the same instant; none without a name.
    pub checkpoint: Option<String>,
    /// The disks that take part. Each is shown under its target's name. All others are left out by name, of the job and of the
    /// checkpoint: libvirt would otherwise include them.
    pub disks: Vec<PullDisk>,
}

/// A disk of a pull.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullDisk {
    /// Which.
    pub target: Target,
    /// Its scratch file, a qcow2 that does not exist yet.
    pub scratch: PathBuf,
    /// The checkpoint since which changes are shown (as [`EXPORT_BITMAP`]); all of it is shown as data without one.
    pub since: Option<String>,
    /// Whether the new checkpoint has a bitmap of it.
    pub bitmap: bool,
}

/// What is seen of pulls of a domain that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pulling {
    /// The scratch files of libvirt's backup job, if it says that it has one.
    pub scratch: Option<Vec<PathBuf>>,
    /// The exports of QEMU's NBD server.
    pub exports: Vec<String>,
    /// Block jobs in QEMU that copy for a backup.
    pub jobs: Vec<String>,
}

impl Pulling {
    /// Whether there is nothing of any pull.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// Whether libvirt's job is the one with these scratch files.
    #[must_use]
    pub fn is_of<'a>(&self, mut scratch: impl Iterator<Item = &'a PathBuf>) -> bool {
        self.scratch.as_ref().is_some_and(|files| scratch.any(|wanted| files.contains(wanted)))
    }
}

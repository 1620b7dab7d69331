//! A disk of a job, and the names of overlays.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmkeep_workflow::JobId;

use crate::hypervisor::{FileId, Layer, Target};
use crate::image::{device, name};

/// A disk that takes part in a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobDisk {
    /// Which.
    pub target: Target,
    /// The image that the guest writes to when the job begins; it stands still while the job copies it.
    pub base: Layer,
    /// Which file that is.
    pub base_id: FileId,
    /// It is a block device of the host, not a file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub device: bool,
    /// What lasts of that device when its name leads elsewhere ([`device::lasting`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lasting: Option<String>,
    /// The disk's size in bytes.
    pub virtual_size: u64,
    /// Where the guest writes meanwhile.
    pub overlay: PathBuf,
}

impl JobDisk {
    /// The overlay as an image.
    #[must_use]
    pub fn overlay_layer(&self) -> Layer {
        Layer { path: self.overlay.clone(), format: "qcow2".to_owned() }
    }

    /// What the device's name leads to if that is not the device any more. Blocks.
    #[must_use]
    pub fn other_device(&self) -> Option<String> {
        let was = self.lasting.as_ref()?;
        let is = device::lasting(&self.base.path);
        (is.as_ref() != Some(was)).then(|| is.unwrap_or_else(|| "nothing".to_owned()))
    }

    /// Whether a path means the base; of a device under any of its names.
    #[must_use]
    pub fn is_base(&self, path: &Path) -> bool {
        path == self.base.path || (self.device && device::same(path, &self.base.path))
    }
}

/// How the names of files begin that lie beside others' and must not be taken for theirs.
const PREFIX: &str = "vmkeep-";

/// The path of an overlay in a folder: with the job and the disk in its name. A file's lies beside its base; one of a
/// device in the folder that was configured for them, since nothing grows in `/dev`.
#[must_use]
pub fn overlay_path(folder: &Path, job: JobId, target: &Target) -> PathBuf {
    folder.join(format!("{PREFIX}{}-{}.qcow2", job.short(), name::encode(&target.0)))
}

/// The path of the scratch file of a pull in a folder.
#[must_use]
pub fn scratch_path(folder: &Path, job: JobId, target: &Target) -> PathBuf {
    folder.join(format!("{PREFIX}{}-{}.scratch", job.short(), name::encode(&target.0)))
}

/// The path of a guest's state on a RAM disk.
#[must_use]
pub fn state_path(ram_disk: &Path, job: JobId, domain: &str) -> PathBuf {
    ram_disk.join(format!("{PREFIX}{}-{}.state", job.short(), name::encode(domain)))
}

/// The job (its short id) that made an overlay, if the path is that of one.
#[must_use]
pub fn overlay_job(path: &Path) -> Option<&str> {
    job_of(path, ".qcow2")
}

/// The job (its short id) that saved a guest's state, if the path is that of one on a RAM disk.
#[must_use]
pub fn state_job(path: &Path) -> Option<&str> {
    job_of(path, ".state")
}

/// The job (its short id) whose pull a scratch file belongs to, if the path is that of one.
#[must_use]
pub fn scratch_job(path: &Path) -> Option<&str> {
    job_of(path, ".scratch")
}

fn job_of<'a>(path: &'a Path, suffix: &str) -> Option<&'a str> {
    let rest = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.strip_suffix(suffix)?;
    let (job, target) = rest.split_once('-')?;
    let hexadecimal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (job.len() == 12 && job.bytes().all(hexadecimal) && !target.is_empty()).then_some(job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_tells_its_job() {
        let job = JobId::new();
        let path = overlay_path(Path::new("/var/lib/images"), job, &Target::from("vda"));
        assert_eq!(path.parent(), Some(Path::new("/var/lib/images")));
        assert_eq!(overlay_job(&path), Some(job.short().as_str()));
    }

    #[test]
    fn other_peoples_files_are_not_taken_for_overlays() {
        for path in [
            "/i/web.qcow2",
            "/i/vmkeep-.qcow2",
            "/i/vmkeep-0123456789ab.qcow2",
            "/i/vmkeep-0123456789AB-vda.qcow2",
            "/i/vmkeep-0123456789ab-vda.raw",
            "/i/vmkeep-manual-vda.qcow2",
        ] {
            assert_eq!(overlay_job(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn strange_targets_stay_within_the_folder() {
        let path = overlay_path(Path::new("/i"), JobId::new(), &Target::from("../x/ y"));
        assert_eq!(path.parent(), Some(Path::new("/i")));
        assert!(overlay_job(&path).is_some());
    }
}

//! A disk of a job, and the names of overlays.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmkeep_workflow::JobId;

use crate::hypervisor::{FileId, Layer, Target};
use crate::image::name;

/// A disk that takes part in a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobDisk {
    /// Which.
    pub target: Target,
    /// The image that the guest writes to when the job begins; it stands still while the job copies it.
    pub base: Layer,
    /// Which file that is.
    pub base_id: FileId,
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
}

/// How the file names of overlays begin.
const PREFIX: &str = "vmkeep-";

/// The path of an overlay: beside its base, with the job and the disk in its name.
#[must_use]
pub fn overlay_path(base: &Path, job: JobId, target: &Target) -> PathBuf {
    base.with_file_name(format!("{PREFIX}{}-{}.qcow2", job.short(), name::encode(&target.0)))
}

/// The job (its short id) that made an overlay, if the path is that of one.
#[must_use]
pub fn overlay_job(path: &Path) -> Option<&str> {
    let rest = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.strip_suffix(".qcow2")?;
    let (job, target) = rest.split_once('-')?;
    let hexadecimal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (job.len() == 12 && job.bytes().all(hexadecimal) && !target.is_empty()).then_some(job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_lies_beside_its_base_and_tells_its_job() {
        let job = JobId::new();
        let path = overlay_path(Path::new("/var/lib/images/web 1.qcow2"), job, &Target::from("vda"));
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
        let path = overlay_path(Path::new("/i/a"), JobId::new(), &Target::from("../x/ y"));
        assert_eq!(path.parent(), Some(Path::new("/i")));
        assert!(overlay_job(&path).is_some());
    }
}

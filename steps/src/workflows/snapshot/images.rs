//! The part of the plan that is about files: which images make up the disks of the job, and where their overlays go.

use std::path::PathBuf;

use vmkeep_workflow::{Code, Fault, JobId};

use super::check::Choice;
use super::plan::Builder;
use crate::codes;
use crate::hypervisor::FileId;
use crate::image::chain::{self, FileToCopy};
use crate::snapshot::disk::{JobDisk, overlay_path};

/// The disks of a job, the files that make them up, and of which each consists.
pub(super) type Images = (Vec<JobDisk>, Vec<FileToCopy>, Vec<Vec<usize>>);

impl Builder<'_> {
    /// The disks of the job and the files that make them up.
    pub(super) async fn images(&self, choice: &Choice) -> Result<Images, Fault> {
        images(self.job, self.settings.overlay_dir.clone(), choice).await
    }
}

/// The same, of any job, with that folder for the overlays of devices.
pub(super) async fn images(
    job: JobId,
    for_devices: Option<PathBuf>,
    choice: &Choice,
) -> Result<Images, Fault> {
    let wanted: Vec<_> =
        choice.disks.iter().map(|disk| (disk.disk.target.clone(), disk.chain.clone())).collect();
    let looked = crate::blocking::run(move || {
        let mut disks = Vec::new();
        let mut elements = Vec::new();
        for (target, layers) in &wanted {
            let chain = chain::from_layers(layers.iter().map(|l| (l.path.as_path(), l.format.as_str())))
                .map_err(|e| (target.to_string(), e.to_string()))?;
            let (Some(base), Some(top)) = (layers.first(), chain.first()) else {
                return Err((target.to_string(), "it has no image".to_owned()));
            };
            let device = top.identity.is_device();
            let folder = if device { for_devices.as_deref() } else { base.path.parent() };
            let Some(folder) = folder else {
                let why = format!("{} is a block device, and its overlay has no place", base.path.display());
                return Err((target.to_string(), why));
            };
            let overlay = overlay_path(folder, job, target);
            if overlay.symlink_metadata().is_ok() {
                return Err((target.to_string(), format!("{} exists already", overlay.display())));
            }
            disks.push(JobDisk {
                target: target.clone(),
                base: base.clone(),
                base_id: FileId { dev: top.identity.dev, ino: top.identity.ino },
                device,
                lasting: device.then(|| crate::image::device::lasting(&base.path)).flatten(),
                virtual_size: top.virtual_size,
                overlay,
            });
            elements.push((target.0.clone(), chain));
        }
        let (files, chains) = chain::lay_out(elements.iter().map(|(t, c)| (t.as_str(), c.as_slice())));
        Ok((disks, files, chains))
    })
    .await;
    match looked {
        Ok(Ok(found)) => Ok(found),
        Ok(Err((target, why))) => {
            Err(Fault::permanent(codes::CHAIN_UNREADABLE, "read the images of the disk", target, why)
                .remedy("qemu-img info -U --backing-chain IMAGE shows what is there"))
        }
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, "read the images of the domain", String::new(), e)),
    }
}

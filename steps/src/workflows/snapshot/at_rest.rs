//! A domain that is off, for whoever reads its images while it is on overlays: what `snapshot` asks of one, and no more.

use vmkeep_workflow::{Fault, JobId};

use super::check::{self, choose};
use super::images::images;
use super::options::{Settings, SnapshotOptions};
use super::{LeftOutDisk, transient};
use crate::codes;
use crate::hypervisor::{Layer, Observation};
use crate::snapshot::World;
use crate::snapshot::disk::JobDisk;

/// Its disks.
pub(crate) struct AtRest {
    /// Those that take part, each with the images that it stands on, from the top down.
    pub(crate) disks: Vec<(JobDisk, Vec<Layer>)>,
    /// Those that do not.
    pub(crate) left_out: Vec<LeftOutDisk>,
    /// Its definition.
    pub(crate) definition: String,
}

/// Whether its disks can be read at rest, and which.
pub(crate) async fn at_rest(
    world: &World,
    settings: &Settings,
    wanted: &[String],
    job: JobId,
    seen: &Observation,
) -> Result<AtRest, Fault> {
    let Some(persistent) = &seen.persistent else { return Err(transient(&seen.domain)) };
    let options = SnapshotOptions { disks: wanted.to_vec(), ..SnapshotOptions::of_disks() };
    let choice = choose(world, settings, &options, seen).await?;
    if choice.saved.is_some() {
        let cause = "it is off with its memory saved by libvirt, which would not be in the backup";
        return Err(check::refuse(codes::DOMAIN_NOT_RUNNING, &seen.domain, cause).remedy(format!(
            "Start it (virsh start {0}) and back it up running; or back it up into files, with that memory: vmkeep snapshot {1}",
            seen.domain.id, seen.domain.name
        )));
    }
    let (disks, ..) = images(job, settings.overlay_dir.clone(), &choice).await?;
    let chains = choice.disks.into_iter().map(|disk| disk.chain);
    Ok(AtRest {
        disks: disks.into_iter().zip(chains).collect(),
        left_out: choice.left_out,
        definition: persistent.xml.clone(),
    })
}

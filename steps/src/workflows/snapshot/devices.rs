//! Disks on block devices: what must hold beyond what the rule says, before anything is touched.
//!
//! Their overlays need a folder of their own. And they have no time of their last change: how much was written to them is
//! counted by the kernel, from the host's start on ([`crate::image::device`]). That tells whether a base stood still while it
//! was copied, which is all that a live backup and one of a domain that is off need. It does not tell which of a disk and a
//! saved memory is the younger one, and that is what decides whether a memory may be given back to a guest that was saved.
//! So such a guest is not taken down by `--save`, and one that libvirt has saved is not backed up as it lies.

use std::path::Path;

use vmkeep_workflow::{Code, Fault};

use super::check::Chosen;
use super::options::{Settings, SnapshotOptions};
use crate::codes;
use crate::hypervisor::{DiskSource, Observation, RunState};
use crate::save::ram_disk::lives_in_memory;

const DOING: &str = "back the domain up";

/// What to do about a disk on a device without a folder for its overlay.
pub(super) const NO_FOLDER: &str = "Name a folder with room for what the guest writes meanwhile: overlay_dir in the section \
                                    [snapshot] of vmkeepd's configuration; or leave the disk out with --disks";

/// Whether the disks on devices can take part in this backup.
pub(super) fn can_take_part(
    seen: &Observation,
    settings: &Settings,
    options: &SnapshotOptions,
    chosen: &[Chosen],
) -> Result<(), Fault> {
    let on_device = |disk: &&Chosen| matches!(disk.disk.source, DiskSource::Block(_));
    let Some(disk) = chosen.iter().find(on_device) else { return Ok(()) };
    let target = &disk.disk.target;
    let refuse = |code: Code, cause: String| Fault::permanent(code, DOING, &seen.domain.name, cause);
    if let Some(folder) = &settings.overlay_dir
        && let Some(why) = unfit(folder)
    {
        let folder = folder.display();
        let cause =
            format!("disk {target} is a block device, and the folder for its overlay, {folder}, {why}");
        return Err(refuse(codes::DISK_CANNOT_TAKE_PART, cause).remedy(NO_FOLDER));
    }
    let younger = format!(
        "disk {target} is a block device, which has no time of its last change: whether saved memory still fits it could \
         not be told"
    );
    if seen.managed_save && seen.state == RunState::Off {
        return Err(refuse(codes::DOMAIN_NOT_RUNNING, younger).remedy(format!(
            "Start it (virsh start {0}) and back it up running, or give its memory up: virsh managedsave-remove {0}",
            seen.domain.id
        )));
    }
    if options.save.is_some() && seen.state.is_active() {
        return Err(refuse(codes::MEMORY_UNSAVEABLE, younger).remedy(
            "Leave --save out: a live backup takes the memory too; or leave the disk out with --disks",
        ));
    }
    Ok(())
}

/// Why a folder is no place for overlays, in words that go on after its name. What the guest has flushed to an overlay must be
/// there after the end of the host.
#[must_use]
pub fn unfit(folder: &Path) -> Option<String> {
    match (std::fs::metadata(folder), lives_in_memory(folder)) {
        (Err(e), _) | (_, Err(e)) => Some(format!("cannot be used: {e}")),
        (Ok(data), _) if !data.is_dir() => Some("is no folder".to_owned()),
        (_, Ok(true)) => Some("lives in memory, and would end with the host".to_owned()),
        (_, Ok(false)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_folder_that_outlives_the_host_is_a_place_for_overlays() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(unfit(here), None);
        for (path, why) in [
            (here.join("gone"), "cannot be used"),
            (here.join("Cargo.toml"), "is no folder"),
            ("/dev".into(), "lives in memory"),
        ] {
            let said = unfit(&path).unwrap();
            assert!(said.contains(why), "{said}");
        }
    }
}

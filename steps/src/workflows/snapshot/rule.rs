//! The rules by which disks are left out of a backup, and transient domains refused. There is one of each, for the planner as
//! for whoever shows beforehand what a backup will hold.
//!
//! Why a transient domain cannot be backed up live. While a guest is on overlays, its images are behind: what it has flushed since
//! the snapshot is only in the overlays. Of a persistent domain that does not matter, because its definition names the
//! overlays, and whoever starts it after a crash, however soon, starts it from there. The definition of a transient domain is
//! in the hands of whoever created it (a cluster's resource agent, a script, a management platform), ends with QEMU, and
//! names the images. Created anew before the overlays are committed (after the end of the host: before vmkeepd is up) the guest
//! starts without what it had flushed, writes to its images, and the overlays are worthless. Committing them as soon as the
//! domain is seen to be gone makes that window shorter; nothing closes it: a lock on the images would have to outlive
//! the host, and a file of another format under their names is not what the creator's definition says. Saving it by
//! `--save` moves it onto overlays as well. So a transient domain is backed up only if its owner makes it a persistent one for
//! that time, and thereby says that nobody else creates it meanwhile.
//!
//! A block device takes part as raw bytes, and only if there is a folder for its overlay: `/dev` is no place for a file that
//! grows. Whether an image format lies on it is not guessed; the definition says it.

use std::path::Path;

use vmkeep_workflow::Fault;

use crate::codes;
use crate::hypervisor::{DiskDef, DiskDevice, DiskSource, DomainRef};

/// The refusal of a transient domain.
#[must_use]
pub fn transient(domain: &DomainRef) -> Fault {
    let cause = "it is transient: whoever creates it anew after a crash in the middle starts it on its images, without what \
                 the guest has written to the overlays since";
    Fault::permanent(codes::DOMAIN_TRANSIENT, "back the domain up", domain.name.clone(), cause).remedy(format!(
        "If nobody creates it anew by themselves, make it persistent for the time of its backup: virsh dumpxml \
         --security-info {0} > FILE; virsh define FILE. Afterwards virsh undefine {0} makes it transient again",
        domain.id
    ))
}

/// Why a disk cannot take part, in words that complete "disk vdc is left out: …"; nothing if it can. `overlays` is the
/// folder for the overlays of disks on block devices, if there is one.
#[must_use]
pub fn cannot_take_part(disk: &DiskDef, overlays: Option<&Path>) -> Option<String> {
    match disk.device {
        DiskDevice::Disk => {}
        DiskDevice::Cdrom => return Some("it is a CD drive".to_owned()),
        DiskDevice::Floppy => return Some("it is a floppy drive".to_owned()),
        DiskDevice::Lun => return Some("it is a device passed through".to_owned()),
    }
    if disk.read_only {
        return Some("it is read-only".to_owned());
    }
    if disk.shareable {
        return Some("other guests may write to it at the same time".to_owned());
    }
    if disk.transient {
        return Some("its changes are thrown away at shutdown".to_owned());
    }
    if disk.encrypted {
        return Some("it is encrypted by QEMU, and what the guest writes meanwhile would not be".to_owned());
    }
    let format = disk.format.as_deref().unwrap_or("raw");
    match &disk.source {
        DiskSource::File(_) => {}
        DiskSource::Block(device) if format != "raw" => {
            let device = device.display();
            return Some(format!(
                "it is the block device {device} with an image of the format {format} on it"
            ));
        }
        DiskSource::Block(device) if overlays.is_none() => {
            let device = device.display();
            return Some(format!(
                "it is the block device {device}, and no folder is configured for its overlay (snapshot.overlay_dir)"
            ));
        }
        DiskSource::Block(_) => {}
        DiskSource::Network(name) => return Some(format!("it is on the network ({name})")),
        DiskSource::Other(what) => return Some(format!("it is {what}")),
        DiskSource::Empty => return Some("it has no medium".to_owned()),
    }
    match format {
        "raw" | "qcow2" => None,
        other => Some(format!("its format is {other}")),
    }
}

//! The rule by which disks are left out of a backup. There is one, for the planner as for whoever shows beforehand what a
//! backup will hold.

use crate::hypervisor::{DiskDef, DiskDevice, DiskSource};

/// Why a disk cannot take part, in words that complete "disk vdc is left out: …"; nothing if it can.
#[must_use]
pub fn cannot_take_part(disk: &DiskDef) -> Option<String> {
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
        return Some("it is encrypted by QEMU".to_owned());
    }
    match &disk.source {
        DiskSource::File(_) => {}
        DiskSource::Block(device) => {
            return Some(format!("it is the block device {}", device.display()));
        }
        DiskSource::Network(name) => return Some(format!("it is on the network ({name})")),
        DiskSource::Other(what) => return Some(format!("it is {what}")),
        DiskSource::Empty => return Some("it has no medium".to_owned()),
    }
    match disk.format.as_deref().unwrap_or("raw") {
        "raw" | "qcow2" => None,
        other => Some(format!("its format is {other}")),
    }
}

//! The domains of this host, as rows.

use vmkeep_steps::hypervisor::{DiskDef, DiskSource, HvError, PauseReason, RunState};
use vmkeep_steps::workflows::snapshot::cannot_take_part;
use vmkeep_workflow::Fault;

use crate::api::types::{DiskRow, DomainRow, ErrorBody};
use crate::codes;
use crate::hypervisor::Overview;

/// A domain in one row, without what only the engine and the catalogue know.
pub(super) fn row(seen: &Overview) -> DomainRow {
    let (disks, obstacle) = match &seen.definition {
        Ok(definition) => (definition.disks.iter().map(disk).collect(), obstacle(seen)),
        Err(error) => (Vec::new(), Some(unreadable(seen, error))),
    };
    DomainRow {
        name: seen.domain.name.clone(),
        uuid: seen.domain.id.to_string(),
        state: state(seen.state).to_owned(),
        persistent: seen.persistent,
        disks,
        last_backup: None,
        job: None,
        obstacle: obstacle.map(|fault| ErrorBody::from(&fault)),
    }
}

fn state(state: RunState) -> &'static str {
    match state {
        RunState::Off => "shut off",
        RunState::Running => "running",
        RunState::Paused(PauseReason::IoError) => "paused: disk error",
        RunState::Paused(PauseReason::Job) => "paused by libvirt",
        RunState::Paused(_) => "paused",
        RunState::Other => "neither running nor off",
    }
}

fn unreadable(seen: &Overview, error: &HvError) -> Fault {
    Fault::permanent(codes::CANNOT_READ_XML_FILE, "read the definition", &seen.domain.name, error)
        .remedy("See `virsh dumpxml`")
}

/// Why a domain cannot be backed up at all, as far as its definition tells.
fn obstacle(seen: &Overview) -> Option<Fault> {
    let definition = seen.definition.as_ref().ok()?;
    let name = &seen.domain.name;
    let fault = |code, cause: String, remedy: &str| {
        Some(Fault::permanent(code, "back the domain up", name, cause).remedy(remedy))
    };
    if !seen.persistent {
        return fault(
            codes::DOMAIN_TRANSIENT,
            "it has no persistent definition".to_owned(),
            "Define it: virsh dumpxml and virsh define",
        );
    }
    if definition.devices.nvram.is_some() || definition.devices.tpm {
        let what = if definition.devices.tpm { "a TPM" } else { "UEFI variables" };
        return fault(
            codes::FIRMWARE_STATE_UNSUPPORTED,
            format!("it has {what}, whose state this release cannot capture"),
            "There is no remedy in this release",
        );
    }
    if definition.disks.iter().all(|disk| cannot_take_part(disk).is_some()) {
        return fault(
            codes::NO_DISK_TO_BACK_UP,
            "none of its disks can take part".to_owned(),
            "`vmkeep domains` tells why, disk by disk",
        );
    }
    None
}

fn disk(disk: &DiskDef) -> DiskRow {
    DiskRow {
        target: disk.target.to_string(),
        source: match &disk.source {
            DiskSource::File(path) | DiskSource::Block(path) => path.display().to_string(),
            DiskSource::Network(name) | DiskSource::Other(name) => name.clone(),
            DiskSource::Empty => "no medium".to_owned(),
        },
        format: disk.format.clone().unwrap_or_else(|| "raw".to_owned()),
        left_out: cannot_take_part(disk),
    }
}

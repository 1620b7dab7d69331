//! The domains of this host, as rows.

use std::path::Path;

use vmkeep_steps::hypervisor::{
    DiskDef, DiskSource, HvError, NvramDef, PauseReason, RunState, TpmDef, TpmKind,
};
use vmkeep_steps::workflows::snapshot::{cannot_take_part, transient};
use vmkeep_workflow::Fault;

use crate::api::types::{DiskRow, DomainRow, ErrorBody};
use crate::codes;
use crate::hypervisor::Overview;

/// A domain in one row, without what only the engine and the catalogue know. `overlays`: see [`cannot_take_part`].
pub(super) fn row(seen: &Overview, overlays: Option<&Path>) -> DomainRow {
    let (disks, obstacle) = match &seen.definition {
        Ok(definition) => {
            let rows: Vec<_> = definition.disks.iter().map(|one| disk(one, overlays)).collect();
            let none = rows.iter().all(|row| row.left_out.is_some());
            (rows, obstacle(seen, none))
        }
        Err(error) => (Vec::new(), Some(unreadable(seen, error))),
    };
    DomainRow {
        name: seen.domain.name.clone(),
        uuid: seen.domain.id.to_string(),
        state: state(seen.state).to_owned(),
        persistent: seen.persistent,
        disks,
        last_backup: None,
        in_vaults: Vec::new(),
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
fn obstacle(seen: &Overview, no_disk: bool) -> Option<Fault> {
    let definition = seen.definition.as_ref().ok()?;
    let name = &seen.domain.name;
    let fault = |code, cause: String, remedy: &str| {
        Some(Fault::permanent(code, "back the domain up", name, cause).remedy(remedy))
    };
    if !seen.persistent {
        return Some(transient(&seen.domain));
    }
    if let Some(TpmDef { kind: TpmKind::Other(kind), .. }) = &definition.devices.tpm {
        return fault(
            codes::FIRMWARE_STATE_UNSUPPORTED,
            format!("its TPM is of the kind {kind}, whose state cannot be captured"),
            "Back the TPM up by its own means and remove it meanwhile, or use an emulated one",
        );
    }
    if let Some(NvramDef { elsewhere: Some(place), .. }) = &definition.devices.nvram {
        return fault(
            codes::FIRMWARE_STATE_UNSUPPORTED,
            format!("its firmware variables are not in a file, but in {place}"),
            "Move them to a file",
        );
    }
    if no_disk {
        return fault(
            codes::NO_DISK_TO_BACK_UP,
            "none of its disks can take part".to_owned(),
            "`vmkeep domains` tells why, disk by disk",
        );
    }
    None
}

fn disk(disk: &DiskDef, overlays: Option<&Path>) -> DiskRow {
    DiskRow {
        target: disk.target.to_string(),
        source: match &disk.source {
            DiskSource::File(path) | DiskSource::Block(path) => path.display().to_string(),
            DiskSource::Network(name) | DiskSource::Other(name) => name.clone(),
            DiskSource::Empty => "no medium".to_owned(),
        },
        format: disk.format.clone().unwrap_or_else(|| "raw".to_owned()),
        left_out: cannot_take_part(disk, overlays),
    }
}

//! What is kept of a machine besides its disks and memory: where it is, and whether it can be kept at all.

use jiff::Timestamp;
use vmkeep_workflow::Fault;

use crate::backup::state::StateInput;
use crate::codes;
use crate::hypervisor::{Devices, DomainRef, NvramDef, Observation, TpmDef, TpmKind};
use crate::snapshot::World;
use crate::snapshot::machine::{KeepInput, KeepNvram, KeepTpm};

const DOING: &str = "back the domain up";

/// Those of what it runs with, else of what it starts from.
fn devices(seen: &Observation) -> Option<&Devices> {
    seen.live.as_ref().or(seen.persistent.as_ref()).map(|definition| &definition.devices)
}

fn refuse(domain: &DomainRef, cause: String) -> Fault {
    Fault::permanent(codes::FIRMWARE_STATE_UNSUPPORTED, DOING, domain.name.clone(), cause)
}

/// Whether all that it has can be kept.
pub(crate) fn can_be_kept(seen: &Observation) -> Result<(), Fault> {
    let Some(devices) = devices(seen) else { return Ok(()) };
    if let Some(NvramDef { elsewhere: Some(place), .. }) = &devices.nvram {
        let cause = format!("its firmware variables are not in a file, but in {place}");
        return Err(refuse(&seen.domain, cause)
            .remedy("Move them to a file, or back the domain up by the means of its storage"));
    }
    if let Some(TpmDef { kind: TpmKind::Other(kind), .. }) = &devices.tpm {
        let cause =
            format!("its TPM is of the kind {kind}, whose state is not on this host for libvirt to know");
        return Err(refuse(&seen.domain, cause)
            .remedy("Back the TPM up by its own means and remove it meanwhile, or use an emulated one"));
    }
    Ok(())
}

/// What there is to keep; nothing for most domains.
pub(crate) async fn kept_state(world: &World, seen: &Observation) -> Result<StateInput, Fault> {
    let Some(devices) = devices(seen) else { return Ok(StateInput::default()) };
    if devices.nvram.is_none() && devices.tpm.is_none() {
        return Ok(StateInput::default());
    }
    let domain = &seen.domain;
    let own = world.hypervisor.own_folders().await;
    let own = own.map_err(|e| e.fault(codes::FIRMWARE_STATE_UNSUPPORTED, DOING, &domain.name))?;
    let nvram = devices.nvram.as_ref().map(|nvram| KeepNvram {
        file: own.variables(nvram, &domain.name),
        format: nvram.format.clone(),
        template: nvram.template.clone(),
    });
    let tpm = devices.tpm.as_ref().map(|tpm| KeepTpm {
        folder: own.tpm(&domain.id),
        version: tpm.version.clone(),
        encrypted: tpm.encrypted,
    });
    Ok(StateInput { nvram, tpm })
}

/// The same, for a backup into that folder.
pub(super) async fn to_keep(
    world: &World,
    seen: &Observation,
    folder: std::path::PathBuf,
) -> Result<Option<KeepInput>, Fault> {
    let StateInput { nvram, tpm } = kept_state(world, seen).await?;
    let some = nvram.is_some() || tpm.is_some();
    Ok(some.then(|| KeepInput { folder, planned: Timestamp::now(), nvram, tpm }))
}

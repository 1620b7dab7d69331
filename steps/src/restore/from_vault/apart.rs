//! What a restore without a daemon has in common with the workflow: which backup may be restored, which definition may be used,
//! what of the machine lies outside its disks, and what the owner of the new domain must know. It has no journal and no
//! roots; how its files come about is its own affair.

use std::path::Path;

use vmkeep_vault::ids::{BackupId, DomainId as VaultDomain};
use vmkeep_vault::manifest::{Manifest, Stream};
use vmkeep_workflow::Fault;

use super::{check, machine_state, mismatch};
use crate::backup::state;
use crate::hypervisor::{Definition, DomainId, Target};
use crate::restore::check as backup;
use crate::restore::ending;
use crate::restore::identity::NewDomain;
use crate::restore::machine::unwritable;
use crate::vaults::Opened;

/// A TPM's state is at most so large, in bytes.
pub use crate::tpm::LARGEST as LARGEST_STATE;

/// The backup's manifest, if the backup may be restored: it is checked, not to be pruned and not known to be damaged, or
/// `unchecked` is given. `vault` is what the vault is called in messages.
///
/// # Errors
/// If it is not there, cannot be read, is of a newer release, or may not be restored.
pub async fn manifest(
    opened: &Opened,
    vault: &str,
    backup: (VaultDomain, BackupId),
    unchecked: bool,
) -> Result<Manifest, Fault> {
    check::manifest(opened, vault, backup, unchecked).await
}

/// Whether the definition fits a restore of these disks and may be used: one from a vault without encryption may have been
/// written by anybody, unless somebody answers for it. Which disks the new domain does without, and what to say of that.
///
/// # Errors
/// If it reaches into the host and nobody answers for it, or lacks one of the disks.
pub async fn fit(
    opened: &Opened,
    manifest: &Manifest,
    disks: &[&str],
    definition: &Definition,
    trusted: bool,
) -> Result<(Vec<Target>, Vec<String>), Fault> {
    if disks.is_empty() || manifest.definition.is_empty() {
        return Err(mismatch(manifest, "it has no disks, or no definition"));
    }
    let all: Vec<&str> = manifest.disks.iter().map(|disk| disk.target.as_str()).collect();
    let held = backup::Holds { name: &manifest.domain_name, id: original(manifest), disks: &all };
    check::harmless(opened, trusted, definition, held)?;
    let (mut without, mut notes) = backup::others(definition, held).await?;
    // Never the original's: not even one that it only reads.
    for left in all.iter().filter(|disk| !disks.contains(disk)) {
        notes.push(format!("Disk {left} was left out, since it was not asked for."));
        without.push(Target((*left).to_owned()));
    }
    Ok((without, notes))
}

/// The domain that the backup is of.
#[must_use]
pub fn original(manifest: &Manifest) -> DomainId {
    DomainId(uuid::Uuid::from_bytes(*manifest.domain.bytes()))
}

/// What a machine keeps outside its disks.
#[derive(Debug, Default)]
pub struct MachineState<'a> {
    /// Its firmware's variables, and how the name of their file ends.
    pub variables: Option<(&'a Stream, &'static str)>,
    /// The files of its TPM's state: the folder in the TPM's, the name there, the content.
    pub tpm: Vec<(String, String, &'a Stream)>,
    /// What to say of what there is and of what there is not.
    pub notes: Vec<String>,
}

/// Of a backup.
///
/// # Errors
/// If a stream is said to lie where no TPM keeps anything.
pub fn state<'a>(manifest: &'a Manifest, definition: &Definition) -> Result<MachineState<'a>, Fault> {
    let mut found = MachineState::default();
    let nvram = manifest.streams.iter().find(|stream| stream.name == state::NVRAM);
    match (nvram, &definition.devices.nvram) {
        (Some(stream), Some(nvram)) => {
            let suffix = if nvram.format == "qcow2" { "qcow2" } else { "fd" };
            found.variables = Some((stream, suffix));
        }
        (None, Some(_)) => found.notes.push(ending::NO_VARIABLES.to_owned()),
        _ => {}
    }
    if definition.devices.tpm.is_some() {
        found.tpm = machine_state::tpm_files(manifest)?;
        found.notes.push(if found.tpm.is_empty() { ending::NO_TPM } else { ending::SAME_TPM }.to_owned());
    }
    Ok(found)
}

/// What the owner of the new domain must know.
#[must_use]
pub fn advice(manifest: &Manifest, new: &NewDomain) -> Vec<String> {
    let mut notes = vec![ending::whose_disks(&manifest.domain_name, manifest.taken)];
    if manifest.consistency != "quiesced" {
        notes.push(ending::POWER_CUT.to_owned());
    }
    notes.extend(ending::autostart(manifest.autostart, false, new));
    notes
}

/// Makes a folder hold exactly this state of a TPM (folder, name and bytes of each file), durably. Blocks.
///
/// # Errors
/// If it cannot be written.
pub fn write_tpm(folder: &Path, files: &[(&str, &str, &[u8])]) -> Result<(), Fault> {
    crate::tpm::write(folder, files).map_err(|error| unwritable(folder, &error))
}

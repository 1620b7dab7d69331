//! What the two machines of an exchange keep outside their disks and memory: firmware variables and the state of an
//! emulated TPM.
//!
//! *Variables* are a file that the definition names. The new machine gets a file of its own, so they change place with
//! the disks, by the one define, and the old file is kept where it is.
//!
//! *A TPM's state* has no name: libvirt keeps it by UUID, and both machines have the same one. So it is copied into the
//! folder of what is kept aside, with the record, and replaced in a step of its own ([`super::tpm`]), while the domain is
//! off and its definition is the new machine's already. A machine that somebody starts in between has a TPM that is not
//! its own; nothing of either state is lost, and the report says so.
//!
//! Both are exchanged if all disks are, and if the machine of the backup had such a thing and the one that takes its place
//! has it too. Otherwise they stay what they are, as disks do that are not restored, and both machines use them.

use std::path::{Path, PathBuf};

use vmkeep_workflow::{Fault, JobId};

use super::check::{DOING, there};
use super::kept::{KeptVariables, new_name};
use super::tpm::TpmFrom;
use crate::codes;
use crate::hypervisor::{Definition, DomainRef, NvramDef, OwnFolders, TpmDef, TpmKind};
use crate::image::rights::Wish;
use crate::image::root::Component;
use crate::manifest::Manifest;
use crate::restore::fetch::Wanted;
use crate::restore::machine::VariablesInput;
use crate::snapshot::World;

/// What an exchange does about it.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The new machine's variables, if they are restored.
    pub(super) variables: Option<VariablesInput>,
    /// The file that its definition names for them, if that is another than the old machine's.
    pub(super) nvram: Option<PathBuf>,
    /// The folder of the domain's TPM, and what comes into it.
    pub(super) tpm: Option<(PathBuf, TpmFrom)>,
    /// The old machine's variables.
    pub(super) old: Option<KeptVariables>,
    /// What its owner must know.
    pub(super) notes: Vec<String>,
}

/// A backup that takes the place of a domain.
pub(super) struct FromBackup<'a> {
    pub(super) manifest: &'a Manifest,
    /// The definition in the backup.
    pub(super) stored: &'a Definition,
    /// The persistent definition of the domain, if it exists.
    pub(super) present: Option<&'a Definition>,
    /// The definition that the new machine gets, but for its files.
    pub(super) base: &'a Definition,
    pub(super) domain: &'a DomainRef,
    pub(super) job: JobId,
    pub(super) backup: PathBuf,
    pub(super) outside: bool,
    /// Where its first disk goes, and whether that is a folder of the domain's own.
    pub(super) folder: PathBuf,
    pub(super) own: bool,
    pub(super) with_memory: bool,
    /// All disks of the backup are restored.
    pub(super) whole: bool,
}

fn refuse(domain: &DomainRef, cause: impl Into<String>) -> Fault {
    let code = codes::FIRMWARE_STATE_UNSUPPORTED;
    Fault::permanent(code, DOING, domain.name.clone(), cause.into())
        .remedy("Restore beside the original: `--as NAME`")
}

/// Whether what a machine has of it can be exchanged at all.
pub(super) fn within_reach(domain: &DomainRef, definition: &Definition) -> Result<(), Fault> {
    if let Some(NvramDef { elsewhere: Some(place), .. }) = &definition.devices.nvram {
        return Err(refuse(domain, format!("its firmware variables are not in a file, but in {place}")));
    }
    if let Some(TpmDef { kind: TpmKind::Other(kind), .. }) = &definition.devices.tpm {
        return Err(refuse(domain, format!("its TPM is of the kind {kind}, whose state is not libvirt's")));
    }
    Ok(())
}

/// Where libvirt keeps such things; asked only where somebody has them.
pub(super) async fn folders(
    world: &World,
    domain: &DomainRef,
    definitions: &[Option<&Definition>],
) -> Result<Option<OwnFolders>, Fault> {
    let has = |d: &&Definition| d.devices.nvram.is_some() || d.devices.tpm.is_some();
    if !definitions.iter().flatten().any(has) {
        return Ok(None);
    }
    let own = world.hypervisor.own_folders().await;
    own.map(Some).map_err(|e| e.fault(codes::FIRMWARE_STATE_UNSUPPORTED, DOING, &domain.name))
}

/// The variables of a machine that is about to be set aside. `new`: the file of the one that takes its place.
pub(super) fn variables_of(
    definition: &Definition,
    domain: &DomainRef,
    own: Option<&OwnFolders>,
    new: Option<&Path>,
) -> Result<Option<KeptVariables>, Fault> {
    let Some((own, nvram)) = own.zip(definition.devices.nvram.as_ref()) else { return Ok(None) };
    let path = own.variables(nvram, &domain.name);
    // A machine that never ran has none yet.
    let Some(identity) = there(&path)? else { return Ok(None) };
    let replaced = new.is_some_and(|new| new != path);
    Ok(Some(KeptVariables { path, identity, replaced }))
}

impl FromBackup<'_> {
    pub(super) async fn state(&self, world: &World) -> Result<State, Fault> {
        let (stored, base) = (&self.stored.devices, &self.base.devices);
        for definition in [Some(self.stored), self.present].into_iter().flatten() {
            within_reach(self.domain, definition)?;
        }
        let other =
            |what: &str| format!("its memory was saved with {what}, and the present definition is without");
        for (what, then, now) in [
            ("UEFI variables", stored.nvram.is_some(), base.nvram.is_some()),
            ("a TPM", stored.tpm.is_some(), base.tpm.is_some()),
        ] {
            if self.with_memory && then && !now {
                return Err(refuse(self.domain, other(what)).remedy(
                    "Restore the definition as well (`--definition`), or leave the memory out (`--cold`)",
                ));
            }
        }
        let mut state = State::default();
        let Some(own) =
            folders(world, self.domain, &[Some(self.stored), Some(self.base), self.present]).await?
        else {
            return Ok(state);
        };
        if let (Some(_), Some(now)) = (&stored.nvram, &base.nvram) {
            if self.whole {
                self.variables(now, &own, &mut state)?;
            } else {
                state.notes.push("Its firmware's variables stay as they are now.".to_owned());
            }
        } else if stored.nvram.is_some() {
            state
                .notes
                .push("The firmware's variables in the backup are left out: it has none now.".to_owned());
        }
        if stored.tpm.is_some() && base.tpm.is_some() {
            if self.whole {
                self.tpm(&own, &mut state)?;
            } else {
                state.notes.push("Its TPM's state stays as it is now.".to_owned());
            }
        } else if stored.tpm.is_some() {
            state.notes.push("The TPM's state in the backup is left out: it has no TPM now.".to_owned());
        }
        let new = state.nvram.as_deref();
        state.old = match self.present {
            Some(present) => variables_of(present, self.domain, Some(&own), new)?,
            None => None,
        };
        Ok(state)
    }

    fn wanted(&self, name: &Component) -> Option<Wanted> {
        let entry = self.manifest.file(name)?;
        Some(Wanted {
            backup: self.backup.clone(),
            outside: self.outside,
            name: entry.name.clone(),
            size: entry.size,
            blake3: entry.blake3,
        })
    }

    fn variables(&self, now: &NvramDef, own: &OwnFolders, state: &mut State) -> Result<(), Fault> {
        let old = own.variables(now, &self.domain.name);
        let name =
            Component::literal(new_name(&old, self.job, if now.format == "qcow2" { "qcow2" } else { "fd" }));
        state.nvram = Some(self.folder.join(name.as_str()));
        let Some(nvram) = &self.manifest.nvram else {
            // There were none yet when it was backed up: libvirt makes them of the template, at the first start.
            return Ok(());
        };
        if nvram.format != now.format {
            let cause = format!(
                "the firmware's variables in the backup are {}, now they are {}",
                nvram.format, now.format
            );
            return Err(refuse(self.domain, cause).remedy("Restore the definition as well: `--definition`"));
        }
        if !nvram.at_instant {
            state.notes.push(format!("Its firmware's variables are as of {}.", nvram.written));
        }
        state.variables = self.wanted(&nvram.file).map(|wanted| VariablesInput {
            wanted,
            folder: self.folder.clone(),
            own: self.own,
            name,
            rights: Wish::default(),
        });
        Ok(())
    }

    fn tpm(&self, own: &OwnFolders, state: &mut State) -> Result<(), Fault> {
        let folder = own.tpm(&self.domain.id);
        if self.present.is_none() && folder.symlink_metadata().is_ok() {
            let cause = format!(
                "libvirt still has the state of a TPM of that UUID in {}, which nothing would keep",
                folder.display()
            );
            return Err(refuse(self.domain, cause).remedy(format!("Move {} away", folder.display())));
        }
        let mut files = Vec::new();
        if let Some(tpm) = &self.manifest.tpm {
            for file in &tpm.files {
                let Some(((below, name), wanted)) = file.place().zip(self.wanted(&file.file)) else {
                    continue;
                };
                files.push((wanted, below.to_owned(), name.to_owned()));
            }
            if !tpm.at_instant {
                state.notes.push(format!("Its TPM's state is as of {}.", tpm.written));
            }
        }
        state.tpm = Some((folder, TpmFrom::Backup { files }));
        Ok(())
    }
}

//! What a machine keeps outside its disks: firmware variables, in a file that its definition names, and the state of a TPM, in
//! a folder of libvirt's by UUID.
//!
//! Both say which boots the machine has been through, and so does a page of its first disk: a guest that boots adds itself to
//! all three. Whoever starts with variables, a TPM and a disk that do not say the same is a mixture of two machines. libvirt
//! makes both where there are none, a memory image holds both and loading it writes them back (E22), and the end of a
//! definition is the end of the TPM.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{Def, Domain, Fake, Inner, disk};
use crate::hypervisor::{DomainId, FileId, Layer};

/// The boots that a machine has been through.
pub(super) type Boots = Vec<u32>;

/// What a machine's variables and its disk know of, and what its TPM does: the same, unless others have mixed two machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    machine: Boots,
    tpm: Boots,
}

/// The page of the first disk that names them.
const PAGE: u64 = 5;
/// Bytes of a file of variables.
const SIZE: usize = 4096;

/// A machine with firmware variables and a TPM, as its definition tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The file of its variables; nothing: it is left to libvirt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<PathBuf>,
}

/// Both, as a QEMU has them open.
#[derive(Clone, Debug)]
pub(super) struct Outside {
    file: PathBuf,
    id: FileId,
    tpm: PathBuf,
    pub(super) knows: Known,
    /// It has run: nothing is written before.
    booted: bool,
    /// It comes with its memory, and has booted long ago.
    warm: bool,
}

fn read(bytes: &[u8]) -> io::Result<Boots> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    if end == 0 {
        return Ok(Boots::new());
    }
    serde_json::from_slice(&bytes[..end]).map_err(io::Error::other)
}

fn written(boots: &Boots, size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(boots)?;
    bytes.resize(size, 0);
    Ok(bytes)
}

/// As firmware does it: in place.
fn write_variables(file: &Path, boots: &Boots) -> io::Result<()> {
    let mut open = OpenOptions::new().write(true).open(file)?;
    open.write_all(&written(boots, SIZE)?)?;
    // The kernel's own stamp may be some milliseconds behind.
    open.set_modified(SystemTime::now())
}

/// As `swtpm` does it: aside, and renamed.
fn write_tpm(folder: &Path, boots: &Boots) -> io::Result<()> {
    let state = folder.join("tpm2");
    std::fs::create_dir_all(&state)?;
    let (aside, file) = (state.join("TMP2-00.permall"), state.join("tpm2-00.permall"));
    std::fs::write(&aside, serde_json::to_vec(boots)?)?;
    OpenOptions::new().write(true).open(&aside)?.set_modified(SystemTime::now())?;
    std::fs::rename(aside, file)
}

impl Fake {
    /// A domain that is off gets firmware variables and a TPM.
    pub fn gets_sealed(&self, id: &DomainId) {
        let mut inner = self.inner();
        let file = inner.domains.get(id).map(|domain| inner.default_variables(&domain.name));
        if let Ok(domain) = inner.domain(id) {
            let both = [&mut domain.persistent, &mut domain.durable];
            both.into_iter().flatten().for_each(|def| def.sealed = Some(Sealed { variables: file.clone() }));
        }
    }

    /// Which boots firmware variables, or a file of a TPM's state, know of.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn boots_in(file: &Path) -> io::Result<Vec<u32>> {
        read(&std::fs::read(file)?)
    }

    /// Which boots a machine's first disk knows of; a chain from the top down.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn boots_on(chain: &[Layer]) -> io::Result<Vec<u32>> {
        read(&disk::read(chain, PAGE)?)
    }

    /// Somebody else has started this domain with a TPM that is not its own.
    #[must_use]
    pub fn mixed(&self, id: &DomainId) -> bool {
        self.inner().domains.get(id).is_some_and(|domain| domain.mixed)
    }
}

impl Inner {
    fn default_variables(&self, name: &str) -> PathBuf {
        self.folder.join(format!("libvirt/nvram/{name}_VARS.fd"))
    }

    pub(super) fn tpm_of(&self, id: &DomainId) -> PathBuf {
        self.folder.join(format!("libvirt/tpm/{id}"))
    }

    /// A QEMU and a `swtpm` begin on what is there; both are made if there is none.
    pub(super) fn outside_of(
        &mut self,
        id: &DomainId,
        live: &mut Def,
        first: Option<&[Layer]>,
        memory: Option<Known>,
    ) -> io::Result<Option<Outside>> {
        let default = self.default_variables(&live.name);
        let Some(sealed) = &mut live.sealed else { return Ok(None) };
        let file = sealed.variables.get_or_insert(default).clone();
        if !file.exists() {
            std::fs::write(&file, written(&Boots::new(), SIZE)?)?;
        }
        let (variables, by) = (Fake::boots_in(&file)?, FileId::of(&std::fs::metadata(&file)?));
        let tpm = self.tpm_of(id);
        if std::fs::read_dir(&tpm).map_or(true, |mut entries| entries.next().is_none()) {
            write_tpm(&tpm, &Boots::new())?;
        }
        let outside = |knows, warm| Outside { file, id: by, tpm: tpm.clone(), knows, booted: false, warm };
        if let Some(knows) = memory {
            write_tpm(&tpm, &knows.tpm)?;
            return Ok(Some(outside(knows, true)));
        }
        let state = Fake::boots_in(&tpm.join("tpm2/tpm2-00.permall"))?;
        let disk = first.map_or_else(|| Ok(variables.clone()), Fake::boots_on)?;
        if variables != disk {
            let name = &live.name;
            self.wrong
                .push(format!("{name} starts with variables that know {variables:?}, and its disk {disk:?}"));
        }
        if state != disk {
            let by_others = self.by_others;
            let mixed = self.domains.get_mut(id).is_some_and(|domain| {
                domain.mixed |= by_others;
                domain.mixed
            });
            if !mixed {
                let name = &live.name;
                self.wrong
                    .push(format!("{name} starts with a TPM that knows {state:?}, and its disk {disk:?}"));
            }
        }
        Ok(Some(outside(Known { machine: disk, tpm: state }, false)))
    }

    /// A guest begins to run: its firmware writes down that it does.
    pub(super) fn boots(&mut self, id: &DomainId, when: SystemTime) -> io::Result<()> {
        let Some(process) = self.domains.get_mut(id).and_then(|domain| domain.process.as_mut()) else {
            return Ok(());
        };
        let (number, first) = (process.number, process.disks.first().cloned());
        let Some(outside) = process.outside.as_mut().filter(|outside| !outside.booted) else { return Ok(()) };
        outside.booted = true;
        if !outside.warm {
            outside.knows.machine.push(number);
            outside.knows.tpm.push(number);
        }
        let Outside { file, id: is, tpm, knows, warm, .. } = outside.clone();
        let there = std::fs::metadata(&file).map(|data| FileId::of(&data));
        if there.ok() != Some(is) {
            let path = file.display();
            self.wrong.push(format!("{path} has been removed or replaced while QEMU has it open"));
            return Ok(());
        }
        write_variables(&file, &knows.machine)?;
        if warm {
            return Ok(());
        }
        write_tpm(&tpm, &knows.tpm)?;
        match first {
            Some(open) => self.guest_overwrites(id, &open, PAGE, &written(&knows.machine, SIZE)?, when),
            None => Ok(()),
        }
    }

    /// A domain that libvirt knows no more, with its TPM.
    pub(super) fn forgotten(&mut self, id: &DomainId) -> Option<Domain> {
        let _ = std::fs::remove_dir_all(self.tpm_of(id));
        self.domains.remove(id)
    }
}

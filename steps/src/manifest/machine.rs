//! What a machine keeps outside its disks and its memory, as a manifest tells it.

use std::collections::HashSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::model::{Manifest, Role, Unknown};
use crate::image::root::Component;

/// Firmware variables (UEFI).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Nvram {
    /// Their file.
    pub file: Component,
    /// The file's format: `raw`, `qcow2`.
    pub format: String,
    /// What the original was made from. For people: no program reads from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// When it was last written, at the time it was copied.
    pub written: Timestamp,
    /// Whether it is what it was at the point in time of the disks. If not, it is as of shortly after.
    pub at_instant: bool,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// The state of an emulated TPM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tpm {
    /// Its version, if the definition says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Whether it is encrypted with a secret of libvirt's, which is not in the backup.
    #[serde(default)]
    pub encrypted: bool,
    /// Its files.
    pub files: Vec<TpmFile>,
    /// When the newest was last written, at the time it was copied.
    pub written: Timestamp,
    /// Whether all are what they were at the point in time of the disks. If not, they are as of shortly after.
    pub at_instant: bool,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A file of a TPM's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmFile {
    /// The file in the backup.
    pub file: Component,
    /// Where it belongs in the folder of the domain's TPM: `tpm2/tpm2-00.permall`.
    pub path: String,
}

/// The folders that `swtpm` keeps its state in, below that of the domain.
pub const TPM_FOLDERS: &[&str] = &["tpm2", "tpm1.2"];

/// Whether a file of that name is a TPM's state, and not a lock or one that is being written.
#[must_use]
pub fn is_tpm_file(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    name.starts_with("tpm") && name.bytes().all(plain)
}

impl TpmFile {
    /// The folder and the name, if the path leads to nothing else than a TPM's state.
    #[must_use]
    pub fn place(&self) -> Option<(&str, &str)> {
        tpm_place(&self.path)
    }
}

/// The folder and the name of a TPM's file in the folder of its domain, if it can be one.
#[must_use]
pub fn tpm_place(path: &str) -> Option<(&str, &str)> {
    let (folder, name) = path.split_once('/')?;
    (TPM_FOLDERS.contains(&folder) && is_tpm_file(name)).then_some((folder, name))
}

/// The oldest reader that understands a manifest with, or without, such state: an older one would take it for a file of
/// nobody's, and the machine that it restores would not boot, or would have lost its keys.
#[must_use]
pub fn needed_reader(nvram: Option<&Nvram>, tpm: Option<&Tpm>) -> u32 {
    if nvram.is_some() || tpm.is_some() { 2 } else { super::model::MIN_READER }
}

/// Whether all this agrees with the list of files.
pub(super) fn check(m: &Manifest) -> Result<(), String> {
    let has = |name: &Component, role: Role| match m.file(name) {
        Some(file) if file.role == role => Ok(()),
        _ => Err(format!("{name} is not among the files")),
    };
    if let Some(nvram) = &m.nvram {
        has(&nvram.file, Role::Nvram)?;
    }
    let mut paths = HashSet::new();
    for file in m.tpm.iter().flat_map(|tpm| &tpm.files) {
        has(&file.file, Role::Tpm)?;
        if file.place().is_none() || !paths.insert(file.path.as_str()) {
            return Err(format!("the place of {}", file.file));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tpms_file_never_leads_out_of_its_folder() {
        let file = |path: &str| TpmFile { file: Component::new("x").unwrap(), path: path.to_owned() };
        assert_eq!(file("tpm2/tpm2-00.permall").place(), Some(("tpm2", "tpm2-00.permall")));
        for path in
            ["tpm2", "tpm2/", "tpm2/../x", "../tpm2/tpm2-00.permall", "/etc/x", "tpm2/tpm/x", "x/tpm2"]
        {
            assert_eq!(file(path).place(), None, "{path}");
        }
    }
}

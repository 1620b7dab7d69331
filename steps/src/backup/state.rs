//! What a machine keeps outside its disks, for the vault: firmware variables and a TPM's state, a stream each.

use std::fs::File;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::{Code, Fault};

use crate::codes;
use crate::snapshot::machine::{KeepNvram, KeepTpm};
use crate::tpm::{self, read_still};

const DOING: &str = "read the machine's firmware and TPM state";

/// The stream of the firmware's variables.
pub const NVRAM: &str = "nvram";
/// How the streams of a TPM's files begin; what follows is the file's path below the TPM's folder.
pub const TPM: &str = "tpm/";

/// Where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateInput {
    /// The firmware's variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<KeepNvram>,
    /// The TPM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<KeepTpm>,
}

/// A stream's name and bytes.
pub(super) type StateStream = (String, Vec<u8>);

/// Reads all that there is, and says what its owner should know.
pub(super) async fn read(
    input: StateInput,
    planned: Timestamp,
) -> Result<(Vec<StateStream>, Vec<String>), Fault> {
    crate::blocking::run(move || read_now(&input, planned))
        .await
        .unwrap_or_else(|e| Err(Fault::permanent(Code::UNDEFINED, DOING, "", e)))
}

fn read_now(input: &StateInput, planned: Timestamp) -> Result<(Vec<StateStream>, Vec<String>), Fault> {
    let (mut streams, mut warnings) = (Vec::new(), Vec::new());
    let unreadable = |path: &std::path::Path, e: &dyn std::fmt::Display| {
        Fault::permanent(codes::FIRMWARE_STATE_UNSUPPORTED, DOING, path.display().to_string(), e)
            .remedy("Let the user that vmkeepd runs as read that file")
    };
    let mut late = |what: &str, written: Timestamp| {
        if written >= planned {
            warnings.push(format!("{what} as of {written}, not of the disks' instant"));
        }
    };
    if let Some(nvram) = &input.nvram {
        match read_still(&|| File::open(&nvram.file)) {
            // The firmware has not run yet.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(unreadable(&nvram.file, &e)),
            Ok((bytes, written)) => {
                late("the firmware's variables are", written);
                streams.push((NVRAM.to_owned(), bytes));
            }
        }
    }
    if let Some(tpm) = &input.tpm {
        for file in tpm::read(&tpm.folder).map_err(|e| unreadable(&tpm.folder, &e))? {
            late("the TPM's state is", file.written);
            streams.push((format!("{TPM}{}/{}", file.below, file.name), file.bytes));
        }
        if tpm.encrypted {
            let text = "its TPM's state is encrypted with a secret of libvirt's, which is not in the backup";
            warnings.push(text.to_owned());
        }
    }
    Ok((streams, warnings))
}

//! The streams of a backup that are files of a TPM's state.

use vmkeep_vault::manifest::{Manifest, Stream};
use vmkeep_workflow::Fault;

use super::mismatch;
use crate::backup::state;
use crate::manifest::{TPM_FOLDERS, is_tpm_file};

/// Each with its folder in the TPM's and its name there: no other place may be named.
pub(super) fn tpm_files(manifest: &Manifest) -> Result<Vec<(String, String, &Stream)>, Fault> {
    let mut files = Vec::new();
    for stream in &manifest.streams {
        let Some(path) = stream.name.strip_prefix(state::TPM) else { continue };
        let (below, name) = path
            .split_once('/')
            .filter(|(below, name)| TPM_FOLDERS.contains(below) && is_tpm_file(name))
            .ok_or_else(|| mismatch(manifest, format!("{path} is no place of a TPM's state")))?;
        files.push((below.to_owned(), name.to_owned(), stream));
    }
    Ok(files)
}

//! The manifest: the JSON file that makes a folder of images a backup.
//!
//! `MANIFEST.md` beside this crate's `Cargo.toml` is its specification. In one sentence: a folder *is* a backup if and
//! only if it holds a file `manifest.json` that can be read, and everything that there is to know about the backup is
//! in it; no database, journal or file name is needed.
//!
//! | module | what |
//! |---|---|
//! | [`model`] | the fields |
//! | [`file`](mod@file) | reading (with every suspicion) and publishing (by one durable act) |
//! | [`folder`] | where backups lie, and what a folder without a manifest is |
//! | [`machine`] | firmware variables and TPM state |
//! | [`verify`](mod@verify) | whether files and manifest agree |
//! | [`protection`] | the note that a backup must not be deleted |
//! | [`catalogue`] | which backups there are |
//!
//! A manifest may come from anywhere: a stolen disk, a shared folder, another host. What it says is checked before it is
//! used: names are plain names in the same folder, never paths; chains end; sizes and hashes are compared with what is
//! there; and an image's own header is read by us, and must name exactly the neighbour that the manifest names, before
//! QEMU may open it.

pub mod catalogue;
pub mod file;
pub mod folder;
pub mod machine;
pub mod model;
pub mod protection;
pub mod verify;

#[cfg(test)]
#[path = "tests/samples.rs"]
pub(crate) mod samples;

pub use file::{ManifestError, Stored, publish, read, read_withdrawn};
pub use folder::MANIFEST as FILE_NAME;
pub use machine::{Nvram, TPM_FOLDERS, Tpm, TpmFile, is_tpm_file, needed_reader, tpm_place};
pub use model::*;
pub use protection::Protection;
pub use verify::{Depth, Finding, Problem, verify};

//! The power goes while a journal or a backup is written: every acknowledged event is there afterwards, in its place, and
//! the store goes on; a backup is there and whole, or not there; a restore becomes whole or nothing; a vault opens, with whole backups; an overlay that a guest
//! was told of is there.
//!
//! The same under a full disk and I/O errors, at every call that changes a file.
//!
//! `VMKEEP_SEED` repeats the choices of a failed run, `VMKEEP_IMAGES` sets how many disks are built of each recording, `VMKEEP_FAULTS` how many faults are
//! tried (`all`: each).

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod backups;
mod faults;
mod fetches;
mod journals;
mod overlays;
mod restores;
mod stores;
mod vaults;
mod workload;

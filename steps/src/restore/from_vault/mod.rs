//! `restore-vault`: a backup in a vault becomes a new domain, beside whatever there is.
//!
//! As `restore` from a folder, and with its steps for all but the files: new name, new UUID, new addresses, new files, and
//! nothing that exists is overwritten. The rows of these steps stand in `STEPS.md`.
//!
//! ```text
//! lease ── folder/N ─┬─ image/FILE … ─┬─ release ── define ── [start ── [resume]] ── settle
//!                    ├─ [variables] ──┤                                   ║
//!                    └─ [tpm] ────────┘                          point of no return
//! ```
//!
//! What reaches a file is proven: every chunk is computed to the id that its node names, every node to that of its parent,
//! and the topmost one with the size to the root that the plan has taken from the manifest. So the facts of a plan are the
//! vault's id and those roots, and no hash of a file is needed.
//!
//! The definition goes into the plan, as that of a backup goes into the plan of whoever makes it: it is small, it is what the
//! new domain is made of, and nothing is asked of the vault any more once the disks are there.
//!
//! **The lease** is put before the facts are looked at once more, so what is found then stays until it is ended, though it be
//! pruned meanwhile: collections wait for it. It is resumed by whatever process goes on. Where none can be put, as on media
//! that can only be read, the fetcher's second list is enough unless the backup is pruned meanwhile. One that was given up
//! for dead by another host costs nothing but that certainty. It is *ended* also for a process that died: all that a reader
//! ever puts are marks of damage and signs of life, for which nobody has to wait.
//!
//! | module | what |
//! |---|---|
//! | [`options`], [`workflow`], `check` | what is asked for, and the plan |
//! | [`reader`] | the vault as the steps of a job share it; the lease |
//! | [`fetch`], [`image`] | one file: proven, never in anybody's way |
//! | [`tpm`] | a TPM's state |
//! | [`apart`] | what a restore without a daemon has in common with this |

pub mod apart;
mod check;
pub mod fetch;
pub mod image;
mod machine_state;
pub mod options;
pub mod reader;
pub mod tpm;
pub mod workflow;

pub use options::VaultRestoreOptions;
pub use workflow::VaultRestore;

use check::mismatch;

#[cfg(test)]
mod tests;

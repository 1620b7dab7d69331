//! `delete` and `prune`: backups are removed, and never the wrong ones.
//!
//! ```text
//! delete:  withdraw/ID … ── remove
//! prune:   [read/ID …] ── withdraw/ID … ── remove
//! ```
//!
//! `remove` is the point of no return. Up to there nothing is lost: a withdrawn manifest is put back by one rename.
//! The rows of these steps stand in `STEPS.md`. What they keep:
//!
//! - **A half-deleted backup never looks whole.** Its manifest goes first, durably. What is left then is a folder that no
//!   reader takes for a backup, with a file that still says what belonged to it.
//! - **Only what the manifest names is removed.** Anything else in the folder stays and is named (46).
//! - **No race with those who need the backup.** A restore is durable before it reads the manifest; a deletion looks for
//!   unfinished jobs *after* the manifest is gone. So at least one of the two sees the other, whoever is faster, and a
//!   deletion that sees somebody puts the manifest back. The same holds for a protection.
//! - **Retention trusts nothing that it has not read.** A backup counts as kept only if all its files are there; the
//!   newest that stays is read from the medium and compared with its hashes before an older one is touched.
//!
//! | module | what |
//! |---|---|
//! | [`options`], [`workflow`] | what is asked for, and the plans |
//! | [`shelf`] | the backups of a domain as they are now, from the folders themselves |
//! | [`rule`] | which of them stay: a pure function |
//! | [`users`] | which unfinished job needs a backup |
//! | [`read_again`], [`withdraw`], [`remove`] | the steps |

pub mod options;
pub mod read_again;
pub mod remove;
pub mod rule;
pub mod shelf;
pub mod users;
pub mod withdraw;
pub mod workflow;

pub use options::{DeleteOptions, Doomed, PruneOptions};
pub use users::{OpenJobs, Users};
pub use workflow::Deletion;

#[cfg(test)]
mod tests;

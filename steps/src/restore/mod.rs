//! `restore`: a backup becomes a new domain, beside whatever there is.
//!
//! Nothing of the original is touched, and nothing that exists is overwritten: new name, new UUID, new addresses, new
//! files. Original and restored domain may run at once. The rows of these steps stand in `STEPS.md`.
//!
//! ```text
//! folder/N ─┬─ image/FILE … ─┬─ define ── [start ── [resume]] ── settle
//!           └─ [memory] ─────┘                        ║
//!                                            point of no return
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`options`], [`workflow`], `layout`, `check` | what is asked for, and the plan |
//! | [`fetch`], `place` | one file: checked, resumable, never in anybody's way |
//! | [`folder`], [`image`], [`memory`], [`define`], [`start`], [`resume`], [`settle`] | the steps |
//! | `watch` | what the last step of any restore does |
//! | [`identity`] | who the new domain is |
//! | [`rights`] | whose its files become |
//! | [`from_vault`] | the same from a backup in a vault |
//!
//! **With memory** the guest goes on where it was, and still believes in its old identity: host name, addresses,
//! machine id. That is why its cables are out unless the original is gone or the caller says otherwise.

pub(crate) mod check;
pub mod define;
mod ending;
pub mod fetch;
pub mod folder;
pub mod from_vault;
pub mod identity;
pub mod image;
pub(crate) mod layout;
pub mod machine;
pub mod memory;
pub mod options;
pub(crate) mod place;
pub mod resume;
pub mod rights;
pub mod settle;
pub mod start;
pub(crate) mod watch;
pub mod workflow;

pub use options::{RestoreOptions, RestoreSettings, Then};
pub use rights::RightsSettings;
pub use settle::Report;
pub use workflow::Restore;

#[cfg(test)]
mod tests;

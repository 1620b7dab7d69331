//! Backup steps and workflows, written against the `Hypervisor` trait.

#[cfg(test)]
mod apparmor;
pub mod backup;
mod blocking;
pub mod codes;
pub mod deletion;
pub mod hypervisor;
pub mod image;
pub mod inplace;
pub mod manifest;
#[cfg(test)]
mod mortal;
mod recipe;
pub mod reconcile;
pub mod restore;
pub mod save;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod snapshot;
pub mod text;
pub(crate) mod tpm;
pub mod vaults;
pub mod workflows;

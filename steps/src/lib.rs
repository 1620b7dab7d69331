//! Backup steps and workflows, written against the `Hypervisor` trait.

pub mod codes;
pub mod hypervisor;
pub mod image;
pub mod inplace;
pub mod manifest;
pub mod restore;
pub mod snapshot;
pub mod text;
pub mod workflows;

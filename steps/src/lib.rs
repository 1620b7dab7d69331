//! Backup steps and workflows, written against the `Hypervisor` trait.

pub mod image;

//! Definitions and descriptions: XML read, edited and built with a real XML library.
//!
//! Invariant: what this crate does not understand survives; nothing is ever spliced into XML as text.
//! [`tree`] says which library, and why.

mod build;
mod device;
mod disk;
mod domain;
mod edit;
mod parse;
pub mod tree;
mod units;

pub use build::{
    BackupDisk, BackupMode, BackupPart, BackupXml, CheckpointXml, SnapshotDisk, SnapshotMemory, SnapshotXml,
};
pub use device::{CharDevice, CharRole, Filesystem, Graphics, Hostdev, Interface, Loader, Nvram, Os, Tpm};
pub use disk::{Backing, BackingLayer, Disk, DiskDevice, DiskSource, Mirror, MirrorReady, SourceKind};
pub use domain::DomainXml;
pub use edit::{BackingEdit, LinkState};
pub use tree::{Document, Element, Node, XmlError};

#[cfg(test)]
mod tests;

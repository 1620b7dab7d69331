//! QEMU's own answer: which images it has open, which jobs run, which process it is.
//!
//! libvirt's XML is libvirt's memory of what it asked QEMU for. When libvirtd dies at the wrong moment
//! the two differ: QEMU writes to overlays while both definitions name the base. Whoever is about to
//! delete, rename or commit an image asks QEMU.

mod graph;
mod process;
mod wire;

pub use graph::{BlockDisk, BlockGraph, BlockJob, BlockJobPhase, DirtyBitmap, ImageNode};
pub use process::{OpenFile, open_files};
pub use wire::{MigrationStatus, RunStatus};

#[cfg(test)]
mod tests;

//! Disk images as files: naming, safe places to put them, copying, hashing, `qemu-img`.
//!
//! Everything here blocks and knows nothing of the engine: the steps call it on blocking threads. Invariants that the
//! modules keep together:
//!
//! - nothing is written outside a [`root::TargetRoot`], whatever the names in a definition or a manifest say;
//! - nothing goes through a shell, and no file name is ever taken for an option or for one of QEMU's protocols;
//! - a [`copy::ResumeToken`] exists only for bytes that are already durable in the copy;
//! - every hash is plain BLAKE3 over the whole logical content of a published file, as `b3sum FILE` prints it.

pub mod accounts;
pub mod chain;
pub mod copy;
pub mod device;
pub mod name;
pub mod open;
pub mod qcow2;
pub mod qemu_img;
pub mod rights;
pub mod root;
pub mod space;

//! `backup`: a backup of a running domain into a vault, without moving it onto overlays (`BACKUP.md`).
//!
//! The guest stays on its images. A *pull* shows its disks as they were at one instant; what has changed since the parent's
//! checkpoint is read from it and put into the vault. The manifest is the commit; the checkpoint that was made with the pull
//! becomes a parent only by it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`disk`] | a disk of a backup, and what it is read from |
//! | [`lease`], [`left`] | taking a lease in the vault; on what each disk is based; ending it, and those that ended jobs have left |
//! | [`begin`] | the point in time |
//! | [`from`] | what disks are read from, and whether it still stands |
//! | [`read`], `reading`, `notes`, [`state`], `meter` | the disks, and what a machine keeps besides, into the vault |
//! | [`guard`], [`end`] | ending the pull, in its place or at once for the guest's sake |
//! | [`commit`] | the manifest |
//! | [`forget`], [`bound`] | which checkpoints stay |
//! | [`choose`], [`plan`], [`workflow`] | the recipe |

pub mod begin;
pub mod bound;
mod choose;
pub mod commit;
pub mod disk;
pub mod end;
pub mod forget;
pub mod from;
pub mod guard;
mod held;
pub mod lease;
pub mod left;
mod meter;
mod notes;
pub mod options;
mod plan;
pub mod read;
mod reading;
pub mod state;
pub mod workflow;

pub use options::{Asked, BackupOptions, BackupSettings};
pub use workflow::{Backup, NAME, VERSION};

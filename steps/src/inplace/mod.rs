//! A backup takes the place of the domain that it is of; and the way back.
//!
//! Both are one act, an *exchange of machines*: the machine that is there comes to rest and is set aside with all that it
//! is, and by one change of the persistent definition another one stands in its place. Nothing of the old machine is
//! renamed, overwritten or removed; whatever fails before the new guest's first instruction brings the old one back as
//! it was. The rows of these steps stand in `STEPS.md`.
//!
//! ```text
//! mark ── keep ─┬─ image/FILE … ─┬─ rest ── aside ── swap ── [tpm] ── [back] ── begin ── resume ── seen ── [forget] ── unmark
//!               └─ [memory] ─────┘                                              ║
//!                                                                      point of no return
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`options`], [`workflow`], [`undo`], `check`, `plan` | what is asked for, and the plan |
//! | [`kept`] | a machine that is kept aside |
//! | `state` | what machines keep outside their disks |
//! | [`keep`], [`rest`], [`aside`], [`swap`], [`tpm`], [`begin`], [`seen`] | the steps, with those of [`crate::restore`] |
//! | [`discard`] | the end of a machine that is kept |
//!
//! **The copy comes first.** The images are restored while the old guest still runs: nobody reads or writes them, and a
//! copy that fails, for want of room or a damaged backup, then costs the guest nothing. It is down only from `rest` to
//! `resume`.

pub mod aside;
pub mod begin;
mod check;
pub mod discard;
pub mod keep;
pub mod kept;
pub mod options;
mod plan;
pub mod rest;
pub mod seen;
mod state;
pub mod swap;
pub mod tpm;
pub mod undo;
pub mod workflow;

pub use kept::{Kept, KeptMachine};
pub use options::{DiscardOptions, InPlaceOptions, InPlaceSettings, UndoOptions};
pub use rest::Rest;
pub use seen::Exchanged;
pub use workflow::RestoreInPlace;

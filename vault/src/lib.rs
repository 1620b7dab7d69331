//! The backup repository: where the data of backups lies, and the client that reads it from a guest's disks.
//!
//! `FORMAT.md` beside this crate is its specification: what every object holds, what each crash and each corruption
//! leaves, and how writers and collectors that do not know each other share one vault.
//!
//! From the bottom: [`ids`] and [`names`]; the [`envelope`] of every object; [`keys`]; [`blob`], [`node`] and [`pack`];
//! [`tree`]s; the [`header`] and the [`vault`] itself; the [`index`]; [`lease`]s, [`manifest`]s and [`backups`]; and what
//! is done with all of that: [`mod@write`], [`read`], [`mod@check`], [`mod@settle`], [`mod@collect`], [`repair`],
//! [`mod@copy`]; [`retention`] says which backups are to stay. Beside them, what a backup is read from: [`source`], over [`nbd`].

pub mod backend;
pub mod backups;
pub mod blob;
pub mod check;
pub mod codec;
pub mod collect;
pub mod copy;
pub mod envelope;
pub mod error;
pub mod features;
pub mod fetch;
pub mod header;
pub mod ids;
pub mod index;
pub mod keys;
pub mod lease;
mod leaves;
pub mod manifest;
pub mod marks;
mod mutation;
pub mod names;
pub mod nbd;
pub mod node;
pub mod pack;
pub mod read;
pub mod repair;
pub mod retention;
pub mod secrets;
pub mod settle;
pub mod source;
pub mod stats;
mod tasks;
pub mod tree;
pub mod vault;
mod walk;
pub mod watch;
pub mod write;

#[cfg(feature = "simulation")]
pub use tasks::simulated;

#[cfg(test)]
mod testing;

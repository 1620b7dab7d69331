//! The note that a running job leaves in its domain.
//!
//! It answers three questions that nobody else can answer after a crash: *Is another vmkeep at work here?* (two daemons
//! with two stores on one libvirt), *whose overlays are these?*, and above all *did we stop this guest, or did its
//! operator?* A guest that is paused, or frozen, looks the same in both cases; ours is set free, theirs is not touched.
//! Therefore the hold is written *before* the guest is stopped and taken away after it runs again.

use serde::{Deserialize, Serialize};

/// The XML namespace of the marker in a domain's metadata.
pub const NAMESPACE: &str = "urn:vmkeep:job:1";

/// What we have done to the guest that must be taken back whatever happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hold {
    /// Its processors are, or are about to be, stopped by us.
    Suspended,
    /// Its file systems are, or are about to be, frozen by us.
    Frozen,
    /// Its QEMU was started by us and stands before the first instruction that is new to it. Not to be taken back by
    /// anybody but the job that started it: only the job knows whether this guest is to run at all.
    Begun,
    /// It was loaded from its saved state by us and has not run since. Only in the live definition of the process that
    /// was loaded, where it comes with the state itself.
    Reloaded,
    /// No hold but its end: the saved state was let run, or is about to be, and is never loaded again. Only in the
    /// persistent definition, durably, written before the guest's first instruction.
    Resumed,
}

/// The note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// The store whose daemon works here.
    pub store: String,
    /// The job.
    pub job: String,
    /// What must be taken back; only in the live definition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,
}

//! Deliberate faults, each of which some test must catch.
//!
//! The feature `mutation` compiles them in; then `VMKEEP_MUTATION` names the one that is committed. Without the feature, in every
//! build that anybody uses, [`on`] is a constant and none of it is there. `replay-tests/tests/mutation.rs` commits each of them
//! against the tests that must catch it.

/// Whether this fault is to be committed.
#[cfg(feature = "mutation")]
#[must_use]
pub fn on(fault: &str) -> bool {
    std::env::var_os("VMKEEP_MUTATION").is_some_and(|wanted| wanted == fault)
}

/// Whether this fault is to be committed: never.
#[cfg(not(feature = "mutation"))]
#[must_use]
#[inline(always)]
pub const fn on(_fault: &str) -> bool {
    false
}

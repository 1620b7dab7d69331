//! Deliberate faults, each of which some test must catch: the corrections of the protocol that `FORMAT.md`, §9, names.
//!
//! Only in the crate's own tests is there anything to be switched; in every build that anybody uses, [`on`] is a constant.
//! A fault is switched on for the thread that a test runs on, so tests that run beside it are not touched.

/// Whether this fault is to be committed: never.
#[cfg(not(test))]
#[must_use]
#[inline(always)]
pub(crate) const fn on(_fault: &str) -> bool {
    false
}

#[cfg(test)]
thread_local! {
    static COMMITTED: std::cell::Cell<&'static str> = const { std::cell::Cell::new("") };
}

/// Whether this fault is to be committed.
#[cfg(test)]
pub(crate) fn on(fault: &str) -> bool {
    COMMITTED.get() == fault
}

/// Commits a fault on this thread from now on; an empty one is none.
#[cfg(test)]
pub(crate) fn commit(fault: &'static str) {
    COMMITTED.set(fault);
}

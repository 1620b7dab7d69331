//! Work that keeps a processor busy (codes, hashes) or waits for a file, away from the threads that serve everything else.
//!
//! In a simulation (feature `simulation`) it is a task of the runtime's own thread instead: which of two pieces of work is done
//! first then depends on nothing but who began first, and a run can be repeated.

use tokio::task::JoinHandle;

/// Begins a piece of work.
pub(crate) fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    #[cfg(feature = "simulation")]
    if simulated::is_here() {
        return tokio::spawn(async move { work() });
    }
    tokio::task::spawn_blocking(work)
}

/// Who asks for it.
#[cfg(feature = "simulation")]
pub mod simulated {
    use std::cell::Cell;

    thread_local! {
        static HERE: Cell<bool> = const { Cell::new(false) };
    }

    /// Whatever is begun on this thread from now on is a simulation's, or is none. In a simulation what is random follows
    /// from this number, which no two processes of a run have in common: they would give two objects one name.
    pub fn here(seed: Option<u64>) {
        HERE.set(seed.is_some());
        crate::ids::seeded::from(seed);
    }

    pub(super) fn is_here() -> bool {
        HERE.get()
    }
}

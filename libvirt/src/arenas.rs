//! What is given back to the allocator, and stays resident.
//!
//! glibc gives a thread that allocates at the same time as others a heap of its own, an *arena*, up to eight for each
//! core. libvirt's calls and copies are made on threads that come and go, so that a daemon ends up with an arena for
//! every one of them, each with its own rest of what was freed there. A few serve as well: small pieces are kept by each
//! thread apart from the arenas, and nothing here allocates in a hot loop.

/// Lets the threads of this process share so many arenas at most. To be called before the first thread is started:
/// arenas that exist stay. A C library other than glibc has none.
pub fn few_arenas() {
    /// Two workers of the runtime and as many calls that block, without one waiting for the other.
    #[cfg(target_env = "gnu")]
    const ARENAS: libc::c_int = 4;
    // SAFETY: `mallopt` takes two numbers. It changes the allocator's settings under the allocator's own lock. That it was
    // refused changes how much memory is used, and nothing else.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

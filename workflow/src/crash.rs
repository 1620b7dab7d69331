//! Places at which a test can end the process, as kill -9 would.
//!
//! With the feature `crash-points` the environment variable `VMKEEP_CRASH_AT` names one place; whoever reaches it first
//! is killed by the kernel, so that no destructor, no flush and no handler runs. Without the feature there is nothing
//! here: release builds cannot be crashed this way.

/// Reaches the place of that name.
#[cfg(feature = "crash-points")]
pub fn point(name: &str) {
    if std::env::var("VMKEEP_CRASH_AT").is_ok_and(|wanted| wanted == name) {
        // A line on the standard error lets a test see that the place was reached; nothing else is written.
        eprintln!("crash point {name}");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// Reaches the place of that name: nothing happens.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub fn point(_name: &str) {}

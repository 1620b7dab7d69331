//! The engine's view of time and of the world that it runs in.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;

use crate::event::Subject;
use crate::ids::JobId;

/// Time. A job's instants begin with the wall clock's and go on as time passes, that while the host is suspended included;
/// the wall clock may be set at any moment.
#[async_trait]
pub trait Clock: Send + Sync + 'static {
    /// The wall clock.
    fn now(&self) -> Timestamp;
    /// How much time has passed since some moment before this process began, the host's suspended time included. It never
    /// goes back or jumps, unlike the wall clock; a clock that nobody sets needs no other.
    fn passed(&self) -> Duration {
        Duration::try_from(self.now().duration_since(Timestamp::UNIX_EPOCH)).unwrap_or(Duration::ZERO)
    }
    /// Waits for that long, the host's suspended time included.
    async fn sleep(&self, wait: Duration);
}

/// The host's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

/// A wait is checked against the boot-time clock this often, since the runtime's timer stands still in suspend.
const SLICE: Duration = Duration::from_secs(20);

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn passed(&self) -> Duration {
        boot_time()
    }

    async fn sleep(&self, wait: Duration) {
        let end = boot_time().saturating_add(wait);
        loop {
            let left = end.saturating_sub(boot_time());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(SLICE)).await;
        }
    }
}

fn boot_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// What the world is at this moment: boot id, instances of the hypervisor and of guests. Recorded with the events that
/// may be followed by a crash, so that a probe can tell whether what it looks at is still the same world.
pub trait Environment: Send + Sync + 'static {
    /// The facts, by name. Must not block.
    fn facts(&self) -> BTreeMap<String, String>;

    /// An event of a job on this subject finds no room, not even in the store's reserve, and no attempt of the job is under
    /// way. Whoever is held for the job must be set free without an event: nothing of it can be begun before there is room
    /// again. Called as long as that lasts, about once in a second. Must not block.
    fn no_room(&self, _job: JobId, _subject: &Subject) {}
}

/// No facts at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEnvironment;

impl Environment for NoEnvironment {
    fn facts(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
}

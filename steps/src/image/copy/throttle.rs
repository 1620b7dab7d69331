//! A bandwidth limit that several copies may share.
//!
//! Kept as one instant: when the bytes granted so far would have been through at the given rate. A grant moves it on
//! by `bytes / rate`; the asker waits until the instant as it stood before its grant, less a small allowance for
//! bursts. Nothing drifts, because nothing is counted per interval, and an idle time is not saved up beyond the
//! allowance.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Time as a copy sees it: since any fixed start, and a way to let it pass.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> Duration;
    /// Lets about so much time pass.
    fn sleep(&self, time: Duration);
}

/// The monotonic clock of the process.
#[derive(Debug)]
pub struct SystemClock(std::time::Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(std::time::Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// The longest nap while waiting for bandwidth: so long a request to stop may go unheard.
const NAP: Duration = Duration::from_millis(100);

/// A bandwidth limit. Clones share it.
#[derive(Clone, Debug)]
pub struct Throttle {
    /// Bytes per second; never 0.
    rate: u64,
    burst: Duration,
    through: Arc<Mutex<Option<Duration>>>,
}

impl Throttle {
    /// A limit in bytes per second; 0 means none.
    pub fn new(bytes_per_second: u64) -> Option<Self> {
        (bytes_per_second > 0).then(|| Self {
            rate: bytes_per_second,
            burst: Duration::from_millis(200),
            through: Arc::default(),
        })
    }

    /// Takes note of `bytes` and tells how long to wait before moving them.
    pub fn grant(&self, now: Duration, bytes: u64) -> Duration {
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate);
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        let mut through = self.through.lock().unwrap_or_else(PoisonError::into_inner);
        let floor = now.saturating_sub(self.burst);
        let start = through.map_or(floor, |t| t.max(floor));
        *through = Some(start.saturating_add(cost));
        start.saturating_sub(now)
    }

    /// Waits for the right to move `bytes`. Returns early, without the right, when `stop` says so.
    pub fn take(&self, clock: &dyn Clock, bytes: u64, stop: &mut dyn FnMut() -> bool) {
        let now = clock.now();
        let until = now + self.grant(now, bytes);
        loop {
            let left = until.saturating_sub(clock.now());
            if left.is_zero() || stop() {
                return;
            }
            clock.sleep(left.min(NAP));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Time passes only by sleeping.
    #[derive(Default)]
    pub(crate) struct ManualClock(Mutex<Duration>);

    impl ManualClock {
        pub(crate) fn pass(&self, time: Duration) {
            *self.0.lock().unwrap() += time;
        }
    }

    impl Clock for ManualClock {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }
        fn sleep(&self, time: Duration) {
            self.pass(time);
        }
    }

    proptest! {
        #[test]
        fn never_more_than_rate_times_time_plus_one_burst_and_never_slower(
            rate in 1_000u64..10_000_000_000,
            steps in prop::collection::vec((1u64..4_000_000, 0u64..500), 1..60),
        ) {
            let throttle = Throttle::new(rate).unwrap();
            let clock = ManualClock::default();
            clock.pass(Duration::from_secs(5));
            let start = clock.now();
            let (mut moved, mut last, mut idle) = (0u64, 0, Duration::ZERO);
            for (bytes, pause) in steps {
                throttle.take(&clock, bytes, &mut || false);
                moved += bytes;
                last = bytes;
                let pause = Duration::from_millis(pause);
                idle += pause;
                clock.pass(pause);
                // The grant just given is moved after the wait, so it is not yet paid for.
                let spent = (clock.now() - start - pause).as_secs_f64();
                let allowed = (spent + 0.2) * rate as f64 + last as f64 + 1.0;
                prop_assert!(moved as f64 <= allowed, "{} > {}", moved, allowed);
            }
            let spent = (clock.now() - start).as_secs_f64();
            let needed = moved as f64 / rate as f64 + idle.as_secs_f64();
            prop_assert!(spent <= needed + 1e-3, "waited {} for {}", spent, needed);
            let _ = last;
        }
    }

    #[test]
    fn clones_share_the_rate() {
        let a = Throttle::new(1000).unwrap();
        let b = a.clone();
        let clock = ManualClock::default();
        clock.pass(Duration::from_secs(10));
        let start = clock.now();
        for _ in 0..10 {
            a.take(&clock, 500, &mut || false);
            b.take(&clock, 500, &mut || false);
        }
        let spent = clock.now() - start;
        assert!(spent >= Duration::from_millis(9300) && spent <= Duration::from_secs(10), "{spent:?}");
    }

    #[test]
    fn a_request_to_stop_ends_the_wait() {
        let throttle = Throttle::new(1).unwrap();
        let clock = ManualClock::default();
        throttle.take(&clock, 1_000_000, &mut || false);
        let mut asked = 0;
        throttle.take(&clock, 1, &mut || {
            asked += 1;
            asked == 3
        });
        assert_eq!(clock.now(), 2 * NAP);
    }

    #[test]
    fn no_rate_no_throttle() {
        assert!(Throttle::new(0).is_none());
    }
}

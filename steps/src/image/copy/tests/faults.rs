//! What disks do only when they break, and what cannot be timed on a real one.

use super::super::files::{Extent, Source, Target};
use super::super::pump::Job;
use super::super::throttle::tests::ManualClock;
use super::*;
use rustix::io::Errno;
use std::io::{Error, Result as IoResult};
use std::time::Duration;

/// A source in memory.
struct Memory {
    data: Vec<u8>,
    /// Reads at or after this offset fail.
    bad_from: u64,
    /// At most so many bytes come back at once, and every other read is interrupted.
    at_once: usize,
    reads: AtomicU64,
}

impl Memory {
    fn new(size: u64) -> Self {
        let data = (0..size).map(|i| (i * 7 + (i >> 10)) as u8).collect();
        Self { data, bad_from: u64::MAX, at_once: usize::MAX, reads: AtomicU64::new(0) }
    }
}

impl Source for Memory {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> IoResult<usize> {
        if offset >= self.bad_from {
            return Err(Error::from(Errno::IO));
        }
        if self.at_once != usize::MAX && self.reads.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) {
            return Err(Error::from(Errno::INTR));
        }
        let rest = &self.data[offset as usize..];
        let n = buffer.len().min(rest.len()).min(self.at_once);
        buffer[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
    fn extent(&self, _: u64) -> IoResult<Extent> {
        Ok(Extent::Data { end: self.size() })
    }
    fn file(&self) -> Option<&File> {
        None
    }
    fn identity(&self) -> Identity {
        Identity { dev: 1, ino: 2, size: self.size(), mtime: 3, mtime_nsec: 4 }
    }
}

/// A target in memory that remembers what a power cut would leave.
#[derive(Default)]
struct Disk {
    state: Mutex<State>,
    /// Writes at or after this offset fail with this.
    full_from: Option<(u64, Errno)>,
    /// The n-th sync fails (from 1); what was written since the one before is gone, as on Linux.
    bad_sync: Option<u64>,
    at_once: Option<usize>,
}

#[derive(Default)]
struct State {
    cache: Vec<u8>,
    durable: Vec<u8>,
    syncs: u64,
    writes: u64,
}

impl Disk {
    fn sync(&self) -> IoResult<()> {
        let mut s = self.state.lock().unwrap();
        s.syncs += 1;
        if self.bad_sync == Some(s.syncs) {
            return Err(Error::from(Errno::IO));
        }
        s.durable = s.cache.clone();
        Ok(())
    }
}

impl Target for Disk {
    fn clone_from(&self, _: &File) -> IoResult<()> {
        Err(Error::from(Errno::OPNOTSUPP))
    }
    fn copy_from(&self, _: &File, _: u64, _: usize) -> IoResult<usize> {
        Err(Error::from(Errno::XDEV))
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> IoResult<usize> {
        let mut s = self.state.lock().unwrap();
        s.writes += 1;
        let mut n = bytes.len().min(self.at_once.unwrap_or(usize::MAX));
        if self.at_once.is_some() && s.writes.is_multiple_of(3) {
            return Err(Error::from(Errno::INTR));
        }
        if let Some((from, errno)) = self.full_from {
            if offset >= from {
                return Err(Error::from(errno));
            }
            n = n.min((from - offset) as usize);
        }
        let end = offset as usize + n;
        if s.cache.len() < end {
            s.cache.resize(end, 0);
        }
        s.cache[offset as usize..end].copy_from_slice(&bytes[..n]);
        Ok(n)
    }
    fn set_len(&self, len: u64) -> IoResult<()> {
        self.state.lock().unwrap().cache.resize(len as usize, 0);
        Ok(())
    }
    fn sync_data(&self) -> IoResult<()> {
        self.sync()
    }
    fn sync_all(&self) -> IoResult<()> {
        self.sync()
    }
    fn forget(&self, _: u64, _: u64) {}
    fn place(&self) -> IoResult<(u64, u64)> {
        Ok((5, 6))
    }
}

fn run(
    source: &Memory,
    disk: &Disk,
    options: &Options,
    observer: &dyn Observer,
    clock: &ManualClock,
) -> Result<blake3::Hash, CopyError> {
    Job { source, target: disk, options, observer, clock }.run(None).map(|moved| moved.hash)
}

#[test]
fn short_and_interrupted_reads_and_writes_are_continued() {
    let source = Memory { at_once: 70_001, ..Memory::new(3 * MIB + 5) };
    let disk = Disk { at_once: Some(50_001), ..Disk::default() };
    let hash = run(&source, &disk, &eager(), &(), &ManualClock::default()).unwrap();
    assert_eq!(hash, blake3::hash(&source.data));
    assert!(disk.state.lock().unwrap().durable == source.data);
}

#[test]
fn a_bad_sector_is_reported_with_its_place() {
    let source = Memory { bad_from: 2 * MIB, ..Memory::new(5 * MIB) };
    let got = run(&source, &Disk::default(), &eager(), &(), &ManualClock::default());
    assert!(matches!(got, Err(CopyError::Read { offset, ref source })
        if offset == 2 * MIB && source.raw_os_error() == Some(Errno::IO.raw_os_error())));
}

#[test]
fn full_quota_and_limit_are_told_apart_from_other_failures() {
    for (errno, expected) in
        [(Errno::NOSPC, "space"), (Errno::DQUOT, "space"), (Errno::FBIG, "large"), (Errno::IO, "write")]
    {
        let disk = Disk { full_from: Some((MIB + 100, errno)), ..Disk::default() };
        let got = run(&Memory::new(5 * MIB), &disk, &eager(), &(), &ManualClock::default());
        let seen = match got {
            Err(CopyError::NoSpace { offset }) if offset == MIB + 100 => "space",
            Err(CopyError::TooLarge { offset, size }) if offset == MIB + 100 && size == 5 * MIB => "large",
            Err(CopyError::Write { offset, .. }) if offset == MIB + 100 => "write",
            _ => "other",
        };
        assert_eq!(seen, expected, "{errno:?}");
    }
}

#[test]
fn a_failed_sync_ends_the_copy_and_hands_out_no_token_for_it() {
    // The first sync is that of the first token, the last one the final sync of all.
    for bad in [1, 2] {
        let watcher = Watcher::new(u64::MAX, Control::Continue);
        let disk = Disk { bad_sync: Some(bad), ..Disk::default() };
        let options = Options { checkpoint_bytes: if bad == 1 { MIB } else { 3 * MIB }, ..eager() };
        let got = run(&Memory::new(5 * MIB), &disk, &options, &watcher, &ManualClock::default());
        assert!(matches!(got, Err(CopyError::Sync { .. })), "{got:?}");
        assert!(watcher.tokens.lock().unwrap().len() < bad as usize);
    }
}

#[test]
fn a_sync_that_fails_after_a_request_to_stop_is_not_hidden_by_it() {
    let watcher = Watcher::new(4, Control::Stop);
    let disk = Disk { bad_sync: Some(1), ..Disk::default() };
    let options = Options { checkpoint_bytes: 100 * MIB, ..eager() };
    let got = run(&Memory::new(5 * MIB), &disk, &options, &watcher, &ManualClock::default());
    assert!(matches!(got, Err(CopyError::Sync { .. })), "{got:?}");
    assert!(watcher.last().is_none());
}

/// Compares every token with what a power cut at that moment would leave.
struct PowerCut<'a>(&'a Disk, &'a Memory, AtomicU64);

impl Observer for PowerCut<'_> {
    fn durable(&self, token: &ResumeToken) {
        let state = self.0.state.lock().unwrap();
        let n = token.offset as usize;
        assert!(state.durable.len() >= n && state.durable[..n] == self.1.data[..n]);
        self.2.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_token_speaks_only_for_durable_bytes() {
    let (source, disk) = (Memory::new(40 * MIB), Disk::default());
    let observer = PowerCut(&disk, &source, AtomicU64::new(0));
    run(&source, &disk, &eager(), &observer, &ManualClock::default()).unwrap();
    assert!(observer.2.load(Ordering::SeqCst) > 0);
}

#[test]
fn tokens_come_by_time_as_well_as_by_bytes() {
    // 1 MiB takes a second here, so every third segment is later than the interval.
    let options = Options {
        throttle: Throttle::new(MIB),
        checkpoint_bytes: u64::MAX,
        checkpoint_time: Duration::from_secs(3),
        ..eager()
    };
    let watcher = Watcher::new(u64::MAX, Control::Continue);
    run(&Memory::new(20 * MIB), &Disk::default(), &options, &watcher, &ManualClock::default()).unwrap();
    assert!(watcher.last().is_some());
}

#[test]
fn the_limit_is_kept_to_the_byte_and_the_second() {
    let clock = ManualClock::default();
    clock.pass(Duration::from_secs(100));
    let options = Options { throttle: Throttle::new(4 * MIB), ..eager() };
    run(&Memory::new(32 * MIB), &Disk::default(), &options, &(), &clock).unwrap();
    let spent = super::throttle::Clock::now(&clock) - Duration::from_secs(100);
    // 32 MiB at 4 MiB/s, less the burst of 0.2 s and the last segment, which is moved after its wait.
    let least = Duration::from_secs(8) - Duration::from_millis(200) - Duration::from_millis(250);
    assert!(spent >= least && spent <= Duration::from_secs(8), "{spent:?}");
}

#[test]
fn a_request_to_stop_is_heard_while_waiting_for_bandwidth() {
    let clock = ManualClock::default();
    let options = Options { throttle: Throttle::new(1), ..eager() };
    let watcher = Watcher::new(10, Control::Stop);
    let got = run(&Memory::new(5 * MIB), &Disk::default(), &options, &watcher, &clock);
    assert!(matches!(got, Err(CopyError::Stopped { offset }) if offset == 2 * MIB), "{got:?}");
    // Waiting for the second MiB alone would have taken a million seconds.
    assert!(super::throttle::Clock::now(&clock) < Duration::from_secs(2));
}

//! The guest's serial file, read as it grows.
//!
//! The guest prints each tick once it is durable on all disks. Each line is stamped on arrival with the host's
//! clock, because the guest's own stands still while it is paused or saved (seen: two seconds of `virsh suspend`
//! between ticks that the guest dates 52 ms apart). So a pause is measured here, not there.

use super::error::{Error, IoContext, Result};
use rustix::fs::inotify;
use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// A tick as the guest printed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TickLine {
    /// Its number; goes on over boots.
    pub number: u64,
    /// Identity of the boot, known to the guest's memory only.
    pub boot: u64,
    /// Ticks since that boot, likewise.
    pub ram: u64,
    /// Time since that boot, without the time that the guest was paused.
    pub uptime: Duration,
    /// When the line arrived, unless it was there before this reader.
    pub seen: Option<Instant>,
}

/// A time between two ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// On the host's clock, pauses of the guest included; zero when it was not watched.
    pub host: Duration,
    /// On the guest's clock.
    pub guest: Duration,
    /// The tick that ended it.
    pub tick: u64,
}

#[derive(Debug, Default)]
struct Shared {
    ticks: Vec<TickLine>,
    /// All other lines: "up …", "refused …", "error …", and what the kernel says.
    other: Vec<String>,
    end: bool,
}

#[derive(Debug, Default)]
struct Board {
    shared: Mutex<Shared>,
    changed: Condvar,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reader of one serial file, with a thread of its own that dates the lines as they arrive. Whoever asks sees all that is
/// in the file at that moment, also what the thread has not come to yet.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    board: Arc<Board>,
    tail: Arc<Mutex<Tail>>,
    watch: Option<(Arc<OwnedFd>, i32, JoinHandle<()>)>,
}

impl Console {
    /// Begins to read. The file need not exist yet, its folder must.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC).map_err(Into::into).doing("watch", folder)?;
        let fd = Arc::new(fd);
        let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        let wd = inotify::add_watch(&*fd, folder, flags).map_err(Into::into).doing("watch", folder)?;
        let board = Arc::new(Board::default());
        let mut tail = Tail::new(path);
        tail.read(&board, None); // what is there already is not dated
        let tail = Arc::new(Mutex::new(tail));
        let thread = {
            let (fd, board, tail) = (Arc::clone(&fd), Arc::clone(&board), Arc::clone(&tail));
            std::thread::Builder::new().name("console".into()).spawn(move || follow(&fd, &board, &tail))
        };
        let thread = thread.doing("watch", path)?;
        Ok(Self { path: path.to_owned(), board, tail, watch: Some((fd, wd, thread)) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is known, after a look at the file.
    fn now(&self) -> MutexGuard<'_, Shared> {
        read(&self.tail, &self.board);
        self.board.lock()
    }

    /// All ticks so far, in the order in which they were printed.
    pub fn ticks(&self) -> Vec<TickLine> {
        self.now().ticks.clone()
    }

    /// All lines that are not ticks.
    pub fn other_lines(&self) -> Vec<String> {
        self.now().other.clone()
    }

    /// The last tick printed.
    pub fn last(&self) -> Option<TickLine> {
        self.now().ticks.last().copied()
    }

    /// Waits until `condition` gives a value; it is asked after every change. It sees ticks and other lines.
    pub fn wait<T>(
        &self,
        within: Duration,
        what: &str,
        mut condition: impl FnMut(&[TickLine], &[String]) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + within;
        let mut shared = self.board.lock();
        loop {
            if let Some(value) = condition(&shared.ticks, &shared.other) {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let from = shared.other.len().saturating_sub(5);
                let seen =
                    format!("{:?}, tick {:?}", &shared.other[from..], shared.ticks.last().map(|t| t.number));
                return Err(Error::Timeout {
                    what: format!("{what} in {}", self.path.display()),
                    after: within,
                    seen,
                });
            }
            shared = self.board.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The longest time between two ticks of one boot that both lie in `from..=to`. `None` if there are not two.
    pub fn longest_gap(&self, from: u64, to: u64) -> Option<Gap> {
        longest_gap(&self.now().ticks, from, to)
    }

    /// Ticks that were printed, and printed again later by another boot: the guest had lost what it had flushed.
    /// Empty for a host that keeps its promises.
    pub fn lost(&self) -> Vec<u64> {
        self.lost_since(0)
    }

    /// The same of the ticks after the first so many: what was there before was another machine.
    pub fn lost_since(&self, first: usize) -> Vec<u64> {
        lost(&self.now().ticks[first..])
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some((fd, wd, thread)) = self.watch.take() {
            self.board.lock().end = true;
            // The kernel reports the removal of a watch as an event: that wakes the thread.
            if inotify::remove_watch(&*fd, wd).is_ok() {
                let _ = thread.join();
            }
        }
    }
}

fn read(tail: &Mutex<Tail>, board: &Board) {
    tail.lock().unwrap_or_else(PoisonError::into_inner).read(board, Some(Instant::now()));
}

fn follow(fd: &OwnedFd, board: &Board, tail: &Mutex<Tail>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(fd, &mut buffer);
    loop {
        // Read before the first event too: the file may have grown since it was opened.
        read(tail, board);
        match events.next() {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        if board.lock().end {
            return;
        }
    }
}

#[derive(Debug)]
struct Tail {
    path: PathBuf,
    file: Option<fs::File>,
    at: u64,
    rest: Vec<u8>,
}

impl Tail {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), file: None, at: 0, rest: Vec::new() }
    }

    fn read(&mut self, board: &Board, seen: Option<Instant>) {
        if self.file.is_none() {
            self.file = fs::File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return };
        if file.metadata().is_ok_and(|meta| meta.len() < self.at) {
            self.at = 0; // somebody began the file anew
            self.rest.clear();
        }
        let Ok(_) = file.seek(SeekFrom::Start(self.at)) else { return };
        let before = self.rest.len();
        let Ok(_) = file.read_to_end(&mut self.rest) else { return };
        self.at += (self.rest.len() - before) as u64;
        let Some(end) = self.rest.iter().rposition(|b| *b == b'\n') else { return };
        let lines: Vec<u8> = self.rest.drain(..=end).collect();
        let mut shared = board.lock();
        for line in String::from_utf8_lossy(&lines).lines().map(str::trim).filter(|l| !l.is_empty()) {
            match parse(line, seen) {
                Some(tick) => shared.ticks.push(tick),
                None => shared.other.push(line.to_owned()),
            }
        }
        drop(shared);
        board.changed.notify_all();
    }
}

fn parse(line: &str, seen: Option<Instant>) -> Option<TickLine> {
    let words: Vec<&str> = line.split(' ').collect();
    let ["tick", number, "boot", boot, "ram", ram, "up", up] = words[..] else { return None };
    let (seconds, micros) = up.split_once('.')?;
    Some(TickLine {
        number: number.parse().ok()?,
        boot: u64::from_str_radix(boot, 16).ok()?,
        ram: ram.parse().ok()?,
        uptime: Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?),
        seen,
    })
}

fn longest_gap(ticks: &[TickLine], from: u64, to: u64) -> Option<Gap> {
    let inside = |tick: &TickLine| (from..=to).contains(&tick.number);
    ticks
        .windows(2)
        .filter_map(|pair| match pair {
            [a, b] if inside(a) && inside(b) && a.boot == b.boot => Some(Gap {
                host: b.seen.zip(a.seen).map_or(Duration::ZERO, |(b, a)| b.saturating_duration_since(a)),
                guest: b.uptime.saturating_sub(a.uptime),
                tick: b.number,
            }),
            _ => None,
        })
        .max_by_key(|gap| (gap.host, gap.guest))
}

fn lost(ticks: &[TickLine]) -> Vec<u64> {
    let mut highest = 0;
    let mut lost = Vec::new();
    for tick in ticks {
        if tick.number <= highest {
            lost.push(tick.number);
        }
        highest = highest.max(tick.number);
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: u64, boot: u64, ms: u64, seen: Option<Instant>) -> TickLine {
        TickLine { number, boot, ram: number, uptime: Duration::from_millis(ms), seen }
    }

    #[test]
    fn a_tick_line_is_read_and_anything_else_is_not_one() {
        let tick = parse("tick 17 boot 00000000000000ff ram 3 up 12.000450", None).unwrap();
        assert_eq!((tick.number, tick.boot, tick.ram), (17, 255, 3));
        assert_eq!(tick.uptime, Duration::from_micros(12_000_450));
        for other in
            ["tick 17", "tick x boot ff ram 3 up 1.0", "up boot ff tick 17", "tick 17 boot ff ram 3 up 1"]
        {
            assert_eq!(parse(other, None), None, "{other}");
        }
    }

    #[test]
    fn the_longest_gap_counts_the_hosts_clock_and_no_time_between_boots() {
        let start = Instant::now();
        let at = |ms| Some(start + Duration::from_millis(ms));
        let ticks = [
            line(1, 7, 50, at(0)),
            line(2, 7, 100, at(900)),
            line(3, 7, 200, at(950)),
            line(4, 8, 10, at(9000)),
        ];
        let gap = longest_gap(&ticks, 1, 9).unwrap();
        assert_eq!((gap.host, gap.tick), (Duration::from_millis(900), 2));
        assert_eq!(longest_gap(&ticks, 2, 9).unwrap().host, Duration::from_millis(50));
        assert_eq!(longest_gap(&ticks, 4, 9), None);
    }

    #[test]
    fn a_tick_that_is_printed_a_second_time_was_lost() {
        let good = [line(1, 7, 1, None), line(2, 7, 2, None), line(3, 8, 1, None)];
        assert_eq!(lost(&good), [0; 0]);
        let bad = [line(1, 7, 1, None), line(2, 7, 2, None), line(3, 7, 3, None), line(3, 8, 1, None)];
        assert_eq!(lost(&bad), [3]);
    }

    #[test]
    fn lines_are_seen_as_they_are_written_and_whole() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let console = Console::open(&path).unwrap();
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(b"up boot\r\ntick 1 boot 0a ram 1 u").unwrap();
        let second = Duration::from_secs(10);
        console.wait(second, "a line", |_, other| (other == ["up boot"]).then_some(())).unwrap();
        assert_eq!(console.last(), None);
        file.write_all(b"p 1.000001\n").unwrap();
        let tick = console.wait(second, "a tick", |ticks, _| ticks.last().copied()).unwrap();
        assert_eq!((tick.number, tick.seen.is_some()), (1, true));
        let again = Console::open(&path).unwrap();
        assert_eq!(again.last().unwrap().seen, None, "a line from before has no known time");
    }
}

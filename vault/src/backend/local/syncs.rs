//! Syncing folders: once for all that wait for the same one, and not again what is known to be durable.
//!
//! A sync counts for whoever came before it *began*. Who comes while one is under way waits for the next, and all who came
//! meanwhile share it.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

/// Folders that are remembered as durable. There are some hundreds, and one for each lease that was put to.
const REMEMBERED: usize = 1 << 16;

/// A folder, whatever its name. With the time of its birth: the number of one that was removed is soon another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
}

impl Identity {
    /// Of an open folder.
    pub(super) fn of(folder: &OwnedFd) -> Result<Self, Errno> {
        let wanted = StatxFlags::INO | StatxFlags::BTIME;
        let stat = rustix::fs::statx(folder, "", AtFlags::EMPTY_PATH, wanted)?;
        Ok(Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            born: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
        })
    }
}

/// What is known of the folders of one vault.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    queues: Mutex<HashMap<Identity, Arc<Queue>>>,
    linked: Mutex<HashMap<String, Identity>>,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    turn: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Syncs that have begun.
    begun: u64,
    /// The last that has ended.
    ended: u64,
    /// The last that failed, and how. The kernel tells a failure once: a later success is none for those who waited.
    failed: Option<(u64, Errno)>,
    /// Those who sleep until the one that is under way has ended.
    asleep: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Syncs {
    /// Returns after a sync of the folder that began after this call.
    pub(super) fn sync(&self, folder: &OwnedFd) -> Result<(), Errno> {
        let identity = Identity::of(folder)?;
        let queue = lock(&self.queues).entry(identity).or_default().clone();
        let outcome = queue.wait(|| rustix::fs::fsync(folder.as_fd()));
        let mut queues = lock(&self.queues);
        // This one and the map's: nobody else waits.
        if Arc::strong_count(&queue) == 2 {
            queues.remove(&identity);
        }
        outcome
    }

    /// Whether the name of this folder is known to be durable.
    pub(super) fn is_linked(&self, path: &str, identity: Identity) -> bool {
        lock(&self.linked).get(path) == Some(&identity)
    }

    /// The name of this folder is durable.
    pub(super) fn linked(&self, path: &str, identity: Identity) {
        let mut linked = lock(&self.linked);
        if linked.len() >= REMEMBERED {
            linked.clear();
        }
        linked.insert(path.to_owned(), identity);
    }

    /// The folder was removed.
    pub(super) fn forget(&self, path: &str) {
        lock(&self.linked).remove(path);
    }
}

impl Queue {
    fn wait(&self, sync: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        let needed = state.begun + 1;
        loop {
            if let Some((failed, errno)) = state.failed
                && failed >= needed
            {
                return Err(errno);
            }
            if state.ended >= needed {
                return Ok(());
            }
            if state.begun == state.ended {
                break;
            }
            state.asleep += 1;
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.asleep -= 1;
        }
        state.begun += 1;
        let number = state.begun;
        drop(state);
        let outcome = sync();
        let mut state = lock(&self.state);
        state.ended = number;
        if let Err(errno) = outcome {
            state.failed = Some((number, errno));
        }
        self.turn.notify_all();
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    type Outcome = Result<(), Errno>;

    /// Eight come while a sync is under way: what they got, and how many syncs they made.
    fn latecomers(first: Outcome, second: Outcome) -> (Vec<Outcome>, u32) {
        let queue = Arc::new(Queue::default());
        let made = Arc::new(AtomicU32::new(0));
        let (begun, has_begun) = mpsc::channel();
        let (end, has_ended) = mpsc::channel();
        let held = queue.clone();
        let held = std::thread::spawn(move || {
            held.wait(|| {
                begun.send(()).unwrap();
                has_ended.recv().unwrap();
                first
            })
        });
        has_begun.recv().unwrap();
        let late = |_| {
            let (queue, made) = (queue.clone(), made.clone());
            std::thread::spawn(move || {
                queue.wait(|| {
                    made.fetch_add(1, Ordering::Relaxed);
                    second
                })
            })
        };
        let threads: Vec<_> = (0..8).map(late).collect();
        while lock(&queue.state).asleep < 8 {
            assert!(!threads.iter().any(std::thread::JoinHandle::is_finished), "somebody did not wait");
            std::thread::yield_now();
        }
        end.send(()).unwrap();
        assert_eq!(held.join().unwrap(), first);
        let outcomes = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        (outcomes, made.load(Ordering::Relaxed))
    }

    #[test]
    fn a_sync_does_not_count_for_who_came_after_its_beginning_and_the_next_is_shared_by_them() {
        assert_eq!(latecomers(Ok(()), Ok(())), (vec![Ok(()); 8], 1));
        assert_eq!(latecomers(Err(Errno::IO), Ok(())), (vec![Ok(()); 8], 1));
    }

    #[test]
    fn a_failed_sync_is_the_error_of_all_who_waited_for_it() {
        assert_eq!(latecomers(Ok(()), Err(Errno::IO)), (vec![Err(Errno::IO); 8], 1));
    }

    #[test]
    fn a_failed_sync_is_not_the_error_of_who_came_after_it() {
        let queue = Queue::default();
        assert_eq!(queue.wait(|| Err(Errno::IO)), Err(Errno::IO));
        assert_eq!(queue.wait(|| Ok(())), Ok(()));
    }
}

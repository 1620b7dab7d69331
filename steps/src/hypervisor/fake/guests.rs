//! What guests do: they write, and read back what they wrote.
//!
//! Every tick is a write of its number to the beginning of a disk, in turn; on a disk that is larger than usual, of a page
//! full of the number besides, in the first half of the disk. So what a disk holds at an instant follows from its last tick
//! ([`Fake::content_at`]), and what lies in the second half never changes.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{DISK_SIZE, DomainId, Fake, Inner, Open, disk, home};
use crate::hypervisor::{FileId, Layer, RunState};

const PAGE: usize = disk::CLUSTER as usize;

/// The pages of a disk that nobody ever writes to, and that hold its pattern.
pub(super) fn patterns(size: u64) -> Vec<u64> {
    let first = [3];
    let second = (size > DISK_SIZE).then(|| size / disk::CLUSTER / 2 + 8);
    first.into_iter().chain(second).collect()
}

/// What tells a disk from all others.
pub(super) fn pattern(name: &str, letter: char) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    page[..32].copy_from_slice(blake3::hash(format!("{name} {letter}").as_bytes()).as_bytes());
    page
}

/// The page that a tick writes besides, on a disk of this size.
fn besides(tick: u64, size: u64) -> Option<u64> {
    let half = size / disk::CLUSTER / 2;
    let page = 1 + tick * 7 % (half.max(2) - 1);
    (size > DISK_SIZE && page != 3).then_some(page)
}

fn full_of(tick: u64) -> Vec<u8> {
    tick.to_be_bytes().repeat(PAGE / 8)
}

pub(super) fn tick(chain: &[Layer]) -> std::io::Result<u64> {
    Ok(tick_of(&disk::read(chain, 0)?))
}

/// The tick that a disk's first page tells.
fn tick_of(page: &[u8]) -> u64 {
    u64::from_be_bytes([page[0], page[1], page[2], page[3], page[4], page[5], page[6], page[7]])
}

impl Fake {
    /// What a disk of a domain of this name holds after a tick, if nobody but its guest has written to it; `place` is its
    /// number among so many.
    #[must_use]
    pub fn content_at(name: &str, (place, of): (usize, usize), size: u64, tick: u64) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
        let letter = ('a'..='z').nth(place).unwrap_or('a');
        let mut put = |page: u64, bytes: &[u8]| {
            let at = usize::try_from(page).unwrap_or(0) * PAGE;
            content[at..at + bytes.len()].copy_from_slice(bytes);
        };
        patterns(size).into_iter().for_each(|at| put(at, &pattern(name, letter)));
        let turns = (1..=tick).filter(|n| usize::try_from(*n).is_ok_and(|n| n % of == place));
        for n in turns {
            if let Some(page) = besides(n, size) {
                put(page, &full_of(n));
            }
            put(0, &n.to_be_bytes());
        }
        content
    }

    /// All that a disk holds, read through its chain.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn content(chain: &[Layer], size: u64) -> std::io::Result<Vec<u8>> {
        let files: Vec<_> = chain.iter().map(|layer| File::open(&layer.path)).collect::<Result<_, _>>()?;
        let mut content = Vec::new();
        for page in 0..size.div_ceil(disk::CLUSTER) {
            content.extend(disk::read_open(chain, &files, page)?);
        }
        content.truncate(usize::try_from(size).unwrap_or(0));
        Ok(content)
    }
}

impl Inner {
    /// Time has passed: what was due happens, and guests that run write.
    pub(super) fn pass(&mut self) {
        let now = self.now();
        while let Some(at) = self.late.iter().position(|late| late.due <= now) {
            let late = self.late.remove(at);
            let held = late.domain.filter(|id| self.locked.insert(*id));
            for part in late.parts {
                if part(self).is_err() {
                    break;
                }
                self.guests();
            }
            if let Some(id) = held {
                self.locked.remove(&id);
            }
        }
        self.guests();
    }

    fn guests(&mut self) {
        let now = self.now();
        let ids: Vec<DomainId> = self.domains.keys().copied().collect();
        for id in ids {
            if let Err(e) = self.guest(&id, now) {
                self.wrong.push(format!("a guest cannot use its disk: {e}"));
            }
        }
    }

    /// A guest writes one tick, if it runs.
    fn guest(&mut self, id: &DomainId, now: Duration) -> std::io::Result<()> {
        let when = self.stamp();
        let Some(domain) = self.domains.get_mut(id) else { return Ok(()) };
        if domain.process.as_ref().is_some_and(|p| p.obeys_at.is_some_and(|at| at <= now)) {
            self.ended(id, false, false);
            return Ok(());
        }
        let Some(process) = &mut domain.process else { return Ok(()) };
        let waits = |late: &super::Late| late.domain == Some(*id);
        process.pull_goes_on(now, self.locked.contains(id) || self.late.iter().any(waits));
        let mut caught_up = Vec::new();
        for (target, job) in process.jobs.iter_mut().filter(|(_, job)| !job.ready && job.ready_at <= now) {
            job.ready = true;
            let Some(open) = process.disks.iter().find(|open| open.target == *target) else { continue };
            if let [top, base, ..] = open.chain.as_slice() {
                caught_up.push((top.path.clone(), base.clone()));
            }
        }
        for (top, base) in caught_up {
            self.committed(&top, &base, when)?;
        }
        let Some(domain) = self.domains.get_mut(id) else { return Ok(()) };
        let Some(process) = &mut domain.process else { return Ok(()) };
        if process.run != RunState::Running || process.frozen {
            return Ok(());
        }
        self.boots(id, when)?;
        let Some(domain) = self.domains.get_mut(id) else { return Ok(()) };
        let Some(process) = &mut domain.process else { return Ok(()) };
        let next = process.memory.values().max().copied().unwrap_or(0) + 1;
        let turn = usize::try_from(next).unwrap_or(0) % process.disks.len().max(1);
        let Some(open) = process.disks.get(turn) else { return Ok(()) };
        for (layer, was) in open.chain.iter().zip(&open.ids) {
            let is = std::fs::metadata(&layer.path).map(|data| FileId::of(&data));
            if is.ok() != Some(*was) {
                let path = layer.path.display();
                self.wrong.push(format!("{path} has been removed or replaced while QEMU has it open"));
                domain.process = None;
                return Ok(());
            }
        }
        let mut first = open.read(0)?;
        let found = tick_of(&first);
        let known = process.memory.get(&open.target).copied().unwrap_or(0);
        if found != known {
            self.wrong.push(format!(
                "the guest of {} wrote {known} to {} and reads {found} ({})",
                domain.name,
                open.target,
                open.chain[0].path.display()
            ));
        }
        let open = open.clone();
        if let Some(page) = besides(next, open.size) {
            self.guest_overwrites(id, &open, page, &full_of(next), when)?;
        }
        first[..8].copy_from_slice(&next.to_be_bytes());
        self.guest_overwrites(id, &open, 0, &first, when)?;
        if let Some(process) = self.domains.get_mut(id).and_then(|domain| domain.process.as_mut()) {
            process.memory.insert(open.target.clone(), next);
        }
        if let Some(home) = home(&open.chain) {
            self.flushed.insert(home.to_owned(), next);
        }
        Ok(())
    }

    /// A guest writes a page: whoever keeps what was there keeps it first, and whoever records what changes does.
    pub(super) fn guest_overwrites(
        &mut self,
        id: &DomainId,
        open: &Open,
        page: u64,
        bytes: &[u8],
        when: SystemTime,
    ) -> std::io::Result<()> {
        if let Some(process) = self.domains.get_mut(id).and_then(|domain| domain.process.as_mut()) {
            process.keep(&open.target, page)?;
        }
        disk::put(&open.files[0], &open.chain[0].format, page, bytes, when)?;
        self.bitmaps.record(&open.chain[0].path, page);
        Ok(())
    }

    /// What an overlay holds goes into its base.
    pub(super) fn committed(
        &mut self,
        overlay: &Path,
        base: &Layer,
        when: SystemTime,
    ) -> std::io::Result<()> {
        for page in disk::commit(overlay, base, when)? {
            self.bitmaps.record(&base.path, page);
        }
        Ok(())
    }
}

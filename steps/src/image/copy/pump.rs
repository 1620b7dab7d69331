//! The loop that moves a file: one thread reads and writes, some hash, one flushes.
//!
//! Memory: one buffer of a segment per hashing thread and two more. A hole that covers a whole segment takes no
//! buffer. The queue to the hashing threads is bounded, so reading never runs away from hashing. Where no more than one
//! segment is left there is nothing to do at once: one thread does all of it, with one buffer.

use super::files::{Extent, Source, Target};
use super::throttle::Clock;
use super::token::{ResumeToken, Resumed};
use super::tree::{Collector, Content, SEGMENT, Tree, Trees, hash_segment, segments};
use super::{Control, CopyError, Method, Observer, Options};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

pub(super) struct Job<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) target: &'a dyn Target,
    pub(super) options: &'a Options,
    pub(super) observer: &'a dyn Observer,
    pub(super) clock: &'a dyn Clock,
}

#[derive(Debug)]
pub(super) struct Moved {
    pub(super) size: u64,
    pub(super) moved: u64,
    pub(super) source_hash: blake3::Hash,
    pub(super) hash: blake3::Hash,
    pub(super) method: Method,
}

/// A segment for a hashing thread.
struct Piece {
    index: u64,
    len: u64,
    /// `None`: all zeroes.
    buffer: Option<Buffer>,
}

/// A page-aligned buffer of one segment, or of a file that is smaller.
struct Buffer {
    bytes: Vec<u8>,
    skip: usize,
}

const PAGE: usize = 4096;

/// Zeroes of this length become a hole in the copy of a source that does not know its holes.
const GRAIN: usize = 64 << 10;

impl Buffer {
    fn new(len: u64) -> Self {
        let bytes = vec![0; len as usize + PAGE];
        let skip = match bytes.as_ptr().align_offset(PAGE) {
            skip if skip < PAGE => skip,
            _ => 0,
        };
        Self { bytes, skip }
    }

    fn first(&self, len: u64) -> &[u8] {
        &self.bytes[self.skip..self.skip + len as usize]
    }

    fn part(&mut self, from: u64, to: u64) -> &mut [u8] {
        &mut self.bytes[self.skip + from as usize..self.skip + to as usize]
    }
}

/// What the flushing thread is told: sync, then speak for so many bytes.
struct Flush {
    offset: u64,
    since: u64,
}

/// The first failure of another thread.
#[derive(Default)]
struct Trouble(Mutex<Option<CopyError>>, AtomicBool);

impl Trouble {
    fn set(&self, error: CopyError) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.1.store(true, Ordering::Release);
    }

    fn raised(&self) -> bool {
        self.1.load(Ordering::Acquire)
    }

    fn into_result(self) -> Result<(), CopyError> {
        match self.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// What the reading thread keeps.
struct Reading {
    at: u64,
    /// End of what was really written; a trailing hole is not.
    written: u64,
    moved: u64,
    method: Method,
    extent: Option<Extent>,
    flushed: u64,
    flushed_time: Duration,
}

struct Lanes {
    pieces: SyncSender<Piece>,
    buffers: Receiver<Buffer>,
    flushes: SyncSender<Flush>,
}

impl Job<'_> {
    pub(super) fn run(&self, resume: Option<Resumed>) -> Result<Moved, CopyError> {
        let size = self.source.size();
        let header = &self.options.header;
        if header.len() as u64 > size.min(SEGMENT) {
            return Err(CopyError::Header { len: header.len() });
        }
        let fresh = Trees { source: Tree::new(size), target: (!header.is_empty()).then(|| Tree::new(size)) };
        let (offset, mut cloned, trees) = match resume {
            Some(r) => (r.offset, r.cloned, r.trees),
            None => (0, false, fresh),
        };
        let method = if cloned {
            Method::Clone
        } else if offset == 0 {
            cloned = self.try_clone(size)?;
            if cloned { Method::Clone } else { self.next_method() }
        } else {
            // What an interrupted attempt wrote after its last token may be a hole in the source.
            self.target.set_len(offset).map_err(|e| CopyError::write(offset, size, e))?;
            self.next_method()
        };

        let collector = Collector::new(trees);
        let trouble = Trouble::default();
        let busy = AtomicBool::new(false);
        // Nothing is flushed on the way either: there is no place between here and the end to speak for.
        let alone = segments(size) <= offset / SEGMENT + 1;
        let hashers = match self.options.hashers {
            _ if alone => 0,
            0 => thread::available_parallelism().map_or(1, |n| n.get().min(4)),
            n => n.min(64),
        };
        let mut reading = Reading {
            at: offset,
            written: if cloned { size } else { offset },
            moved: 0,
            method,
            extent: None,
            flushed: offset,
            flushed_time: self.clock.now(),
        };
        let (pieces, queue) = sync_channel::<Piece>(16 * hashers.max(1));
        let (give_back, buffers) = channel();
        for _ in 0..if alone { 1 } else { hashers + 2 } {
            let _ = give_back.send(Buffer::new(size.min(SEGMENT)));
        }
        let queue = Mutex::new(queue);
        let (flushes, flush_queue) = sync_channel::<Flush>(1);
        let lanes = Lanes { pieces, buffers, flushes };
        let outcome = if alone {
            let outcome = self.read_all(&mut reading, &lanes, &collector, &busy, &trouble);
            drop(lanes);
            hash_pieces(size, &queue, &collector, &give_back);
            outcome
        } else {
            thread::scope(|scope| {
                for _ in 0..hashers {
                    let give_back = give_back.clone();
                    let (queue, collector) = (&queue, &collector);
                    scope.spawn(move || hash_pieces(size, queue, collector, &give_back));
                }
                drop(give_back);
                let (collector, busy, trouble) = (&collector, &busy, &trouble);
                scope.spawn(move || self.flush(&flush_queue, cloned, collector, busy, trouble));
                let outcome = self.read_all(&mut reading, &lanes, collector, busy, trouble);
                if matches!(outcome, Err(CopyError::Stopped { .. })) {
                    self.flush_to(&mut reading, &lanes, collector)?;
                }
                // The threads end when their lanes do.
                drop(lanes);
                outcome
            })
        };
        // A failed sync weighs more than whatever else happened: the file must not be resumed.
        trouble.into_result()?;
        outcome?;
        self.finish(&reading, collector)
    }

    /// Length, durability, and the hash.
    fn finish(&self, reading: &Reading, collector: Collector) -> Result<Moved, CopyError> {
        let size = self.source.size();
        self.target.set_len(size).map_err(|e| CopyError::write(size, size, e))?;
        self.target.sync_all().map_err(|source| CopyError::Sync { source, discarded: false })?;
        let trees = collector.into_trees();
        let Some(source_hash) = trees.source.finished() else {
            return Err(CopyError::Internal { what: "the hash of a finished copy is not complete" });
        };
        let hash = trees.target.as_ref().map_or(Some(source_hash), Tree::finished);
        let Some(hash) = hash else {
            return Err(CopyError::Internal { what: "the hash of a finished copy is not complete" });
        };
        self.target.forget(0, size);
        Ok(Moved { size, moved: reading.moved, source_hash, hash, method: reading.method })
    }

    fn try_clone(&self, size: u64) -> Result<bool, CopyError> {
        let wanted = matches!(self.options.method, Method::Auto | Method::Clone);
        let (true, Some(file)) = (wanted && size > 0, self.source.file()) else { return Ok(false) };
        if self.target.clone_from(file).is_err() {
            // Not that kind of file system, two file systems, or no room for the metadata: the copy will tell.
            return Ok(false);
        }
        if !self.options.header.is_empty() {
            self.write(&self.options.header, 0)?;
        }
        Ok(true)
    }

    fn next_method(&self) -> Method {
        let Some(file) = self.source.file() else { return Method::ReadWrite };
        match self.options.method {
            Method::ReadWrite => Method::ReadWrite,
            Method::CopyRange => Method::CopyRange,
            Method::Auto | Method::Clone if copies_at_the_server(file) => Method::CopyRange,
            Method::Auto | Method::Clone => Method::ReadWrite,
        }
    }

    fn control(&self, at: u64) -> Result<(), CopyError> {
        match self.observer.control() {
            Control::Continue => Ok(()),
            Control::Stop => Err(CopyError::Stopped { offset: at }),
            Control::GiveUp(why) => Err(CopyError::GaveUp { offset: at, why }),
        }
    }

    fn read_all(
        &self,
        r: &mut Reading,
        lanes: &Lanes,
        collector: &Collector,
        busy: &AtomicBool,
        trouble: &Trouble,
    ) -> Result<(), CopyError> {
        let size = self.source.size();
        self.observer.progress(r.at, size);
        loop {
            if trouble.raised() {
                // The caller knows the real reason.
                return Err(CopyError::Internal { what: "the flushing thread failed" });
            }
            self.control(r.at)?;
            self.segment(r, lanes, collector)?;
            self.observer.progress(r.at, size);
            if r.at >= size {
                return Ok(());
            }
            let late = self.clock.now().saturating_sub(r.flushed_time) >= self.options.checkpoint_time;
            let far = r.at - r.flushed >= self.options.checkpoint_bytes;
            if (late || far) && !self.target.discards() && !busy.swap(true, Ordering::AcqRel) {
                self.flush_to(r, lanes, collector)?;
            }
        }
    }

    /// Has everything up to here made durable, and a token handed out. Nothing to say at the very beginning and end.
    fn flush_to(&self, r: &mut Reading, lanes: &Lanes, collector: &Collector) -> Result<(), CopyError> {
        let size = self.source.size();
        if r.at <= r.flushed || r.at >= size || self.target.discards() {
            return Ok(());
        }
        // The copy must be as long as the token says, also when its end so far is a hole.
        if r.written < r.at {
            self.target.set_len(r.at).map_err(|e| CopyError::write(r.at, size, e))?;
            r.written = r.at;
        }
        // Here, before the next segment is handed out, and not on the flushing thread, which may come to it late.
        collector.mark(r.at / SEGMENT);
        let flush = Flush { offset: r.at, since: r.flushed };
        if lanes.flushes.send(flush).is_err() {
            return Err(CopyError::Internal { what: "the flushing thread is gone" });
        }
        r.flushed = r.at;
        r.flushed_time = self.clock.now();
        Ok(())
    }

    /// Moves one segment and hands it to be hashed.
    fn segment(&self, r: &mut Reading, lanes: &Lanes, collector: &Collector) -> Result<(), CopyError> {
        let size = self.source.size();
        let (index, start) = (r.at / SEGMENT, r.at);
        let end = ((index + 1) * SEGMENT).min(size);
        let len = end - start;
        let header = if index == 0 { self.options.header.as_slice() } else { &[] };
        if header.is_empty() && self.hole_until(r, start)? >= end {
            r.at = end;
            return send(&lanes.pieces, Piece { index, len, buffer: None });
        }
        let Ok(mut buffer) = lanes.buffers.recv() else {
            return Err(CopyError::Internal { what: "the hashing threads are gone" });
        };
        let mut at = start;
        while at < end {
            let hole = self.hole_until(r, at)?.min(end);
            if hole > at {
                buffer.part(at - start, hole - start).fill(0);
                at = hole;
                continue;
            }
            let data = self.data_until(r, at)?.min(end);
            self.pay(data - at)?;
            self.read_full(buffer.part(at - start, data - start), at)?;
            if header.is_empty() {
                self.put_data(r, buffer.part(at - start, data - start), at)?;
            }
            r.moved += data - at;
            at = data;
        }
        r.at = end;
        if header.is_empty() {
            return send(&lanes.pieces, Piece { index, len, buffer: Some(buffer) });
        }
        self.first_segment(r, &buffer, len, header, collector)
    }

    /// The segment whose beginning is replaced: two hashes, so it is done here and now.
    fn first_segment(
        &self,
        r: &mut Reading,
        buffer: &Buffer,
        len: u64,
        header: &[u8],
        collector: &Collector,
    ) -> Result<(), CopyError> {
        let size = self.source.size();
        let read = buffer.first(len);
        let mut write = read.to_vec();
        write[..header.len()].copy_from_slice(header);
        if r.method != Method::Clone {
            self.write(&write, 0)?;
            r.written = r.written.max(len);
        }
        let of_source = hash_segment(size, 0, Content::Data(read));
        let of_target = hash_segment(size, 0, Content::Data(&write));
        collector.put(0, of_source, of_target);
        Ok(())
    }

    fn extent(&self, r: &mut Reading, at: u64) -> Result<Extent, CopyError> {
        if let Some(known @ (Extent::Data { end } | Extent::Hole { end })) = r.extent
            && at < end
        {
            return Ok(known);
        }
        let found = self.source.extent(at).map_err(|source| CopyError::Read { offset: at, source })?;
        r.extent = Some(found);
        Ok(found)
    }

    /// Where the hole at `at` ends; `at` itself if there is none.
    fn hole_until(&self, r: &mut Reading, at: u64) -> Result<u64, CopyError> {
        Ok(match self.extent(r, at)? {
            Extent::Hole { end } => end,
            Extent::Data { .. } => at,
        })
    }

    fn data_until(&self, r: &mut Reading, at: u64) -> Result<u64, CopyError> {
        Ok(match self.extent(r, at)? {
            Extent::Data { end } => end,
            Extent::Hole { .. } => at,
        })
    }

    fn pay(&self, bytes: u64) -> Result<(), CopyError> {
        if let Some(throttle) = &self.options.throttle {
            throttle.take(self.clock, bytes, &mut || self.observer.control() != Control::Continue);
        }
        Ok(())
    }

    fn read_full(&self, buffer: &mut [u8], offset: u64) -> Result<(), CopyError> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            match self.source.read_at(&mut buffer[done..], at) {
                Ok(0) => return Err(CopyError::SourceShrunk { offset: at, size: self.source.size() }),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(CopyError::Read { offset: at, source }),
            }
        }
        Ok(())
    }

    /// Brings data to the copy: all of it, or what is not zero of a source that does not know its holes.
    fn put_data(&self, r: &mut Reading, bytes: &[u8], offset: u64) -> Result<(), CopyError> {
        if self.source.knows_holes() {
            return self.put(r, bytes, offset);
        }
        let mut at = offset;
        for part in bytes.chunks(GRAIN) {
            if part.iter().any(|byte| *byte != 0) {
                self.put(r, part, at)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Brings the bytes, just read from `offset`, to the copy by whatever way is in use.
    fn put(&self, r: &mut Reading, bytes: &[u8], offset: u64) -> Result<(), CopyError> {
        let mut done = 0;
        if r.method == Method::CopyRange
            && let Some(file) = self.source.file()
        {
            while done < bytes.len() {
                match self.target.copy_from(file, offset + done as u64, bytes.len() - done) {
                    Ok(n) if n > 0 => done += n,
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) if e.kind() == ErrorKind::StorageFull => {
                        return Err(CopyError::write(offset + done as u64, self.source.size(), e));
                    }
                    // Not between these two files, or it does nothing: write what is left, and all that follows.
                    Ok(_) | Err(_) => {
                        r.method = Method::ReadWrite;
                        break;
                    }
                }
            }
        }
        if r.method != Method::Clone {
            self.write(&bytes[done..], offset + done as u64)?;
            r.written = r.written.max(offset + bytes.len() as u64);
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), CopyError> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            match self.target.write_at(&bytes[done..], at) {
                Ok(0) => return Err(CopyError::Write { offset: at, source: ErrorKind::WriteZero.into() }),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(CopyError::write(at, self.source.size(), e)),
            }
        }
        Ok(())
    }

    /// The flushing thread.
    fn flush(
        &self,
        queue: &Receiver<Flush>,
        cloned: bool,
        collector: &Collector,
        busy: &AtomicBool,
        trouble: &Trouble,
    ) {
        for Flush { offset, since } in queue {
            if let Err(source) = self.target.sync_data() {
                trouble.set(CopyError::Sync { source, discarded: false });
                // What follows would be synced without an error, and mean nothing.
                return;
            }
            let token = collector.wait_for_mark(offset / SEGMENT).and_then(|trees| {
                let place = self.target.place().map_err(|e| CopyError::Write { offset, source: e })?;
                let header = &self.options.header;
                Ok(ResumeToken::new(self.source.identity(), place, offset, cloned, header, &trees))
            });
            match token {
                Ok(token) => self.observer.durable(&token),
                Err(error) => return trouble.set(error),
            }
            self.target.forget(since, offset - since);
            busy.store(false, Ordering::Release);
        }
    }
}

fn send(lane: &SyncSender<Piece>, piece: Piece) -> Result<(), CopyError> {
    lane.send(piece).map_err(|_| CopyError::Internal { what: "the hashing threads are gone" })
}

/// A hashing thread.
fn hash_pieces(size: u64, queue: &Mutex<Receiver<Piece>>, collector: &Collector, give_back: &Sender<Buffer>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Piece { index, len, buffer }) = next else { return };
        let content = match &buffer {
            Some(buffer) => Content::Data(buffer.first(len)),
            None => Content::Zeroes(len),
        };
        debug_assert!(index < segments(size));
        let value = hash_segment(size, index, content);
        collector.put(index, value, value);
        if let Some(buffer) = buffer {
            let _ = give_back.send(buffer);
        }
    }
}

/// Whether the file lies on a file system whose `copy_file_range` saves a way over the network. On local file systems
/// it goes through the page cache like a read and a write (or clones, which was tried before), only in smaller steps.
fn copies_at_the_server(file: &std::fs::File) -> bool {
    const NFS: u32 = 0x6969;
    const CIFS: u32 = 0xFF53_4D42;
    const SMB2: u32 = 0xFE53_4D42;
    const CEPH: u32 = 0x00C3_6400;
    rustix::fs::fstatfs(file).is_ok_and(|fs| [NFS, CIFS, SMB2, CEPH].contains(&(fs.f_type as u32)))
}

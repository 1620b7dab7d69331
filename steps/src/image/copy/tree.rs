//! BLAKE3 of a file that is hashed in pieces: by several threads, out of order, across interruptions.
//!
//! BLAKE3 is a binary tree over chunks of 1024 bytes. A *segment* of 1 MiB, aligned, is always a whole subtree, so its
//! chaining value depends on nothing but its bytes and its offset, and may be computed by any thread at any time.
//! What a hasher knows after `k` whole segments is the stack of chaining values of the maximal whole subtrees among
//! them: one for each bit that is set in `k`, at most 44 for any file there can be. That stack *is* the resume state:
//! 32 bytes per entry, no re-reading of what is already copied, and the final hash is plain BLAKE3, the one that
//! `b3sum` prints.
//!
//! Rejected: a hash tree of our own (hash of segment hashes). It would hash the holes of a sparse file for nothing,
//! because all empty segments would share one hash, whereas BLAKE3 mixes the offset into every chunk and so must run
//! over each zero. But then no common tool could check a backup, and that weighs more: hashing zeroes costs no
//! reading, runs beside the copying of data, and on several threads. Rejected too: hashing the copied part again on
//! every resume, which costs hours exactly when there were hours of work to save.
//!
//! The subtle rule is laziness at the root: two subtrees may be merged as *non-root* only if more input follows, since
//! the last merge of all is done in root mode. The size is known from the start, so the last segment is simply never
//! put on the stack.

use super::CopyError;
use blake3::hazmat::{ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};
use blake3::{Hash, Hasher};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes in a segment. A power of two and a multiple of BLAKE3's chunk.
///
/// 1 MiB stays in the second-level cache between read, hash and write. Tokens hold offsets in bytes and stay valid if
/// a later version picks a smaller power of two.
pub(crate) const SEGMENT: u64 = 1 << 20;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What a segment holds.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    Data(&'a [u8]),
    /// So many zeroes.
    Zeroes(u64),
}

/// The segments of a file of `size` bytes; an empty file has one, empty.
pub(crate) fn segments(size: u64) -> u64 {
    size.div_ceil(SEGMENT).max(1)
}

/// The chaining value of one segment; for a file of one segment the hash itself.
pub(crate) fn hash_segment(size: u64, index: u64, content: Content<'_>) -> [u8; 32] {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(index * SEGMENT);
    match content {
        Content::Data(bytes) => {
            hasher.update(bytes);
        }
        Content::Zeroes(mut left) => {
            while left > 0 {
                let part = left.min(ZEROES.len() as u64);
                hasher.update(&ZEROES[..part as usize]);
                left -= part;
            }
        }
    }
    if segments(size) == 1 { *hasher.finalize().as_bytes() } else { hasher.finalize_non_root() }
}

/// The tree so far: the segments before `next`, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tree {
    size: u64,
    next: u64,
    stack: Vec<ChainingValue>,
    done: Option<Hash>,
}

impl Tree {
    pub(crate) fn new(size: u64) -> Self {
        Self { size, next: 0, stack: Vec::new(), done: None }
    }

    /// Goes on after `offset` bytes, a multiple of [`SEGMENT`] short of the end. `None` if that cannot be.
    pub(crate) fn resume(size: u64, offset: u64, stack: Vec<ChainingValue>) -> Option<Self> {
        let next = offset / SEGMENT;
        let fits = offset.is_multiple_of(SEGMENT)
            && next < segments(size)
            && stack.len() as u64 == u64::from(next.count_ones());
        fits.then_some(Self { size, next, stack, done: None })
    }

    pub(crate) fn stack(&self) -> &[ChainingValue] {
        &self.stack
    }

    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    pub(crate) fn finished(&self) -> Option<Hash> {
        self.done
    }

    /// Takes the value of segment number [`Self::next`].
    pub(crate) fn push(&mut self, value: [u8; 32]) {
        let last = self.next + 1 == segments(self.size);
        let mut value = value;
        if last && self.next == 0 {
            self.done = Some(Hash::from_bytes(value));
        } else if last {
            while let Some(left) = self.stack.pop() {
                if self.stack.is_empty() {
                    self.done = Some(merge_subtrees_root(&left, &value, Mode::Hash));
                } else {
                    value = merge_subtrees_non_root(&left, &value, Mode::Hash);
                }
            }
        } else {
            // One merge for each trailing zero bit of the new count: those subtrees are complete now.
            for _ in 0..(self.next + 1).trailing_zeros() {
                if let Some(left) = self.stack.pop() {
                    value = merge_subtrees_non_root(&left, &value, Mode::Hash);
                }
            }
            self.stack.push(value);
        }
        self.next += 1;
    }
}

/// Both trees of a copy: of what was read, and of what was written. They differ only in the first segment, when a
/// header is rewritten on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trees {
    pub(crate) source: Tree,
    pub(crate) target: Option<Tree>,
}

impl Trees {
    fn push(&mut self, source: [u8; 32], target: [u8; 32]) {
        self.source.push(source);
        if let Some(tree) = &mut self.target {
            tree.push(target);
        }
    }
}

/// Puts the values of segments in order as threads deliver them, and keeps the state at offsets of interest.
pub(crate) struct Collector {
    inner: Mutex<Collected>,
    moved: Condvar,
}

struct Collected {
    trees: Trees,
    early: BTreeMap<u64, ([u8; 32], [u8; 32])>,
    /// Counts of segments whose state is wanted, and the state once it is there.
    marks: BTreeMap<u64, Option<Trees>>,
}

impl Collector {
    pub(crate) fn new(trees: Trees) -> Self {
        let inner = Collected { trees, early: BTreeMap::new(), marks: BTreeMap::new() };
        Self { inner: Mutex::new(inner), moved: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn put(&self, index: u64, source: [u8; 32], target: [u8; 32]) {
        let mut c = self.lock();
        c.early.insert(index, (source, target));
        loop {
            let next = c.trees.source.next();
            let Some((source, target)) = c.early.remove(&next) else { break };
            c.trees.push(source, target);
            c.capture();
        }
        self.moved.notify_all();
    }

    /// Asks for the state after `segments` whole segments. To be called when all of those were handed out to be
    /// hashed, and before any later one is: the state is passed only once.
    pub(crate) fn mark(&self, segments: u64) {
        let mut c = self.lock();
        c.marks.insert(segments, None);
        c.capture();
    }

    /// Waits for the state that [`Self::mark`] asked for.
    pub(crate) fn wait_for_mark(&self, segments: u64) -> Result<Trees, CopyError> {
        let mut c = self.lock();
        loop {
            let passed = c.trees.source.next() > segments;
            match c.marks.remove(&segments) {
                Some(Some(trees)) => return Ok(trees),
                Some(None) if !passed => {
                    c.marks.insert(segments, None);
                }
                _ => return Err(CopyError::Internal { what: "a hash state was asked for that nobody kept" }),
            }
            c = self.moved.wait(c).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn into_trees(self) -> Trees {
        self.inner.into_inner().unwrap_or_else(PoisonError::into_inner).trees
    }
}

impl Collected {
    fn capture(&mut self) {
        if let Some(mark) = self.marks.get_mut(&self.trees.source.next()) {
            mark.get_or_insert_with(|| self.trees.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(size: u64) -> Vec<u8> {
        (0..size).map(|i| (i * 131 + (i >> 13)) as u8).collect()
    }

    fn whole(data: &[u8], mut tree: Tree) -> Hash {
        let size = data.len() as u64;
        for index in tree.next()..segments(size) {
            let from = (index * SEGMENT) as usize;
            let to = (from + SEGMENT as usize).min(data.len());
            tree.push(hash_segment(size, index, Content::Data(&data[from..to])));
        }
        tree.finished().unwrap()
    }

    #[test]
    fn hash_is_plain_blake3_at_every_awkward_size() {
        let s = SEGMENT;
        for size in
            [0, 1, 1023, 1024, 1025, s - 1, s, s + 1, 2 * s, 2 * s + 1, 3 * s, 4 * s, 5 * s + 77, 8 * s]
        {
            let data = bytes(size);
            assert_eq!(whole(&data, Tree::new(size)), blake3::hash(&data), "{size}");
        }
    }

    #[test]
    fn zeroes_hash_like_zeroes() {
        for size in [1, SEGMENT, 3 * SEGMENT + 5] {
            let mut tree = Tree::new(size);
            for index in 0..segments(size) {
                let len = (size - index * SEGMENT).min(SEGMENT);
                tree.push(hash_segment(size, index, Content::Zeroes(len)));
            }
            assert_eq!(tree.finished(), Some(blake3::hash(&vec![0; size as usize])), "{size}");
        }
    }

    #[test]
    fn resumed_at_any_segment_the_hash_is_the_same() {
        let size = 13 * SEGMENT + 4321;
        let data = bytes(size);
        let mut tree = Tree::new(size);
        for index in 0..13 {
            let offset = index * SEGMENT;
            let again = Tree::resume(size, offset, tree.stack().to_vec()).unwrap();
            assert_eq!(whole(&data, again), blake3::hash(&data), "{index}");
            let segment = &data[offset as usize..(offset + SEGMENT) as usize];
            tree.push(hash_segment(size, index, Content::Data(segment)));
        }
    }

    #[test]
    fn an_impossible_state_is_refused() {
        let cv = [0; 32];
        assert!(Tree::resume(3 * SEGMENT, SEGMENT, vec![]).is_none());
        assert!(Tree::resume(3 * SEGMENT, SEGMENT + 1, vec![cv]).is_none());
        assert!(Tree::resume(3 * SEGMENT, 3 * SEGMENT, vec![cv, cv]).is_none());
        assert!(Tree::resume(3 * SEGMENT, 2 * SEGMENT, vec![cv]).is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn values_delivered_in_any_order_give_the_same_hash(
            order in Just((0..9u64).collect::<Vec<_>>()).prop_shuffle(),
            mark in 0..9u64,
        ) {
            let size = 8 * SEGMENT + 99;
            let data = bytes(size);
            let trees = Trees { source: Tree::new(size), target: None };
            let collector = Collector::new(trees);
            collector.mark(mark);
            for index in order {
                let from = (index * SEGMENT) as usize;
                let to = (from + SEGMENT as usize).min(data.len());
                let value = hash_segment(size, index, Content::Data(&data[from..to]));
                collector.put(index, value, value);
            }
            let kept = collector.wait_for_mark(mark).unwrap().source;
            prop_assert_eq!(kept.next(), mark);
            let resumed = Tree::resume(size, mark * SEGMENT, kept.stack().to_vec()).unwrap();
            prop_assert_eq!(whole(&data, resumed), blake3::hash(&data));
            prop_assert_eq!(collector.into_trees().source.finished(), Some(blake3::hash(&data)));
        }
    }
}

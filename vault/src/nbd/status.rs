//! What a server says of the parts of an export: the reply to a question for block status.

/// In [`super::BASE_ALLOCATION`]: nothing is allocated for it.
pub const HOLE: u32 = 1;
/// In [`super::BASE_ALLOCATION`]: it reads as zeroes.
pub const ZERO: u32 = 2;

/// What one context says of a part of an export, from its beginning to its end: lengths in bytes, and flags. Neighbours
/// differ in their flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extents(Vec<(u64, u32)>);

impl Extents {
    /// Adds the next.
    pub fn push(&mut self, length: u64, flags: u32) {
        match self.0.last_mut() {
            Some((last, same)) if *same == flags => *last += length,
            _ => self.0.push((length, flags)),
        }
    }

    /// All of them: length and flags.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        self.0.iter().copied()
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.iter().map(|(length, _)| length).sum()
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds what follows.
    pub(super) fn append(&mut self, other: &Self) {
        other.iter().for_each(|(length, flags)| self.push(length, flags));
    }

    /// Leaves out so many bytes at the beginning.
    pub(super) fn skip(&mut self, mut bytes: u64) {
        self.0.retain_mut(|(length, _)| {
            let less = bytes.min(*length);
            bytes -= less;
            *length -= less;
            *length > 0
        });
    }

    /// Leaves out what lies beyond so many bytes.
    pub(super) fn cut(&mut self, mut most: u64) {
        self.0.retain_mut(|(length, _)| {
            *length = (*length).min(most);
            most -= *length;
            *length > 0
        });
    }
}

/// The most bytes of what one context says in one reply. (nbdkit says at most 2^20 extents, QEMU 2^17.)
const MOST_BYTES: u32 = 16 << 20;

/// What has come of a question.
#[derive(Debug)]
pub(super) struct Statuses {
    pub(super) offset: u64,
    pub(super) length: u32,
    /// For each context that was granted: its number, and what it says.
    said: Vec<(u32, Option<Extents>)>,
}

impl Statuses {
    pub(super) fn new(offset: u64, length: u32, contexts: &[(u32, usize)]) -> Self {
        Self { offset, length, said: contexts.iter().map(|(id, _)| (*id, None)).collect() }
    }

    pub(super) fn most_chunks(&self) -> usize {
        self.said.len() + 16
    }

    /// How many extents a chunk of so many bytes holds, with its context.
    ///
    /// # Errors
    /// If there is no such chunk.
    pub(super) fn extents_in(length: u32) -> Result<u32, String> {
        match length.checked_sub(4) {
            Some(rest) if rest > 0 && rest % 8 == 0 && rest <= MOST_BYTES => Ok(rest / 8),
            _ => Err(format!("a block status of {length} bytes")),
        }
    }

    /// Begins to take in what a context says.
    ///
    /// # Errors
    /// If it was not granted, or has spoken already.
    pub(super) fn begin(&self, context: u32) -> Result<Extents, String> {
        match self.said.iter().find(|(id, _)| *id == context) {
            Some((_, None)) => Ok(Extents::default()),
            Some(_) => Err("two block statuses of one meta context".into()),
            None => Err("a block status of a meta context that was not granted".into()),
        }
    }

    /// Takes in an extent. The last one may reach beyond what was asked for.
    ///
    /// # Errors
    /// If it is empty, or begins beyond what was asked for.
    pub(super) fn extent(
        &self,
        into: &mut Extents,
        so_far: &mut u64,
        length: u32,
        flags: u32,
    ) -> Result<(), String> {
        if length == 0 {
            return Err("an extent of no bytes".into());
        }
        if *so_far >= u64::from(self.length) {
            return Err("extents beyond what was asked for".into());
        }
        let counts = u64::from(length).min(u64::from(self.length) - *so_far);
        *so_far += counts;
        into.push(counts, flags);
        Ok(())
    }

    pub(super) fn end(&mut self, context: u32, extents: Extents) {
        if let Some((_, said)) = self.said.iter_mut().find(|(id, _)| *id == context) {
            *said = Some(extents);
        }
    }

    /// What all contexts say, in the order in which they were granted, as far as all of them say something: one byte at
    /// least.
    ///
    /// # Errors
    /// If one says nothing.
    pub(super) fn finish(self) -> Result<Vec<Extents>, String> {
        let all: Option<Vec<Extents>> = self.said.into_iter().map(|(_, said)| said).collect();
        let Some(mut all) = all else {
            return Err("a meta context about which a block status says nothing".into());
        };
        let common = all.iter().map(Extents::len).min().unwrap_or(0);
        all.iter_mut().for_each(|extents| extents.cut(common));
        Ok(all)
    }
}

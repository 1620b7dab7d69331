//! What several contexts say of a disk, brought together in chunks.

use crate::header::CHUNK;
use crate::nbd::{Extents, HOLE, ZERO};

const CHUNK_BYTES: u64 = CHUNK as u64;

/// Chunks of which the same is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Bytes: whole chunks, but for the last of the disk.
    pub length: u64,
    /// Whether any of it has changed since the bitmap began; true if there is none.
    pub dirty: bool,
    /// Whether all of it reads as zero.
    pub zero: bool,
    /// Whether any of it takes room.
    pub allocated: bool,
}

/// What is said of a part; where nothing is said, everything has changed and may be anything.
#[derive(Clone, Debug, Default)]
pub(super) struct Sayings {
    pub(super) allocation: Option<Extents>,
    pub(super) dirty: Option<Extents>,
    pub(super) depth: Option<Extents>,
}

/// Brings together what is said of a part that begins between two chunks.
pub(super) fn merge(length: u64, said: &Sayings) -> Vec<Region> {
    let mut allocation = Cursor::new(said.allocation.as_ref());
    let mut dirty = Cursor::new(said.dirty.as_ref());
    let mut depth = Cursor::new(said.depth.as_ref());
    let mut regions = Regions::default();
    let mut left = length;
    while left > 0 {
        let run = [allocation.left(), dirty.left(), depth.left()].into_iter().flatten().fold(left, u64::min);
        let base = allocation.flags();
        regions.add(Region {
            length: run,
            dirty: dirty.flags().is_none_or(|flags| flags & 1 != 0),
            zero: base.is_some_and(|flags| flags & ZERO != 0),
            allocated: match depth.flags() {
                Some(depth) => depth > 0,
                None => base.is_none_or(|flags| flags & HOLE == 0),
            },
        });
        [&mut allocation, &mut dirty, &mut depth].into_iter().for_each(|cursor| cursor.advance(run));
        left -= run;
    }
    regions.finish()
}

/// A place in what a context says. One that has said nothing, or no more, says nothing.
struct Cursor<'a> {
    rest: Box<dyn Iterator<Item = (u64, u32)> + Send + 'a>,
    now: Option<(u64, u32)>,
}

impl<'a> Cursor<'a> {
    fn new(extents: Option<&'a Extents>) -> Self {
        let mut rest: Box<dyn Iterator<Item = (u64, u32)> + Send + 'a> = match extents {
            Some(extents) => Box::new(extents.iter()),
            None => Box::new(std::iter::empty()),
        };
        let now = rest.next();
        Self { rest, now }
    }

    fn left(&self) -> Option<u64> {
        self.now.map(|(left, _)| left)
    }

    fn flags(&self) -> Option<u32> {
        self.now.map(|(_, flags)| flags)
    }

    fn advance(&mut self, by: u64) {
        if let Some((left, _)) = &mut self.now {
            *left -= by;
            if *left == 0 {
                self.now = self.rest.next();
            }
        }
    }
}

/// Collects runs of any length into chunks.
#[derive(Default)]
struct Regions {
    done: Vec<Region>,
    /// A chunk that is not yet full.
    partly: Option<Region>,
}

impl Regions {
    fn add(&mut self, mut run: Region) {
        if let Some(mut partly) = self.partly.take() {
            let here = run.length.min(CHUNK_BYTES - partly.length);
            partly = Region {
                length: partly.length + here,
                dirty: partly.dirty || run.dirty,
                zero: partly.zero && run.zero,
                allocated: partly.allocated || run.allocated,
            };
            run.length -= here;
            if partly.length < CHUNK_BYTES {
                self.partly = Some(partly);
                return;
            }
            self.push(partly);
        }
        let rest = run.length % CHUNK_BYTES;
        self.push(Region { length: run.length - rest, ..run });
        self.partly = Some(Region { length: rest, ..run }).filter(|partly| partly.length > 0);
    }

    fn push(&mut self, region: Region) {
        match self.done.last_mut() {
            _ if region.length == 0 => {}
            Some(last) if (Region { length: last.length, ..region }) == *last => last.length += region.length,
            _ => self.done.push(region),
        }
    }

    fn finish(mut self) -> Vec<Region> {
        if let Some(partly) = self.partly.take() {
            self.push(partly);
        }
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rng: &mut fastrand::Rng, length: u64, flags: u32) -> Extents {
        let mut extents = Extents::default();
        while extents.len() < length {
            let scale = *rng.choice(&[512, 4096, CHUNK_BYTES, 10 * CHUNK_BYTES]).unwrap();
            extents.push((rng.u64(1..4) * scale).min(length - extents.len()), rng.u32(0..=flags));
        }
        extents
    }

    fn sectors(extents: Option<&Extents>, length: u64) -> Vec<Option<u32>> {
        let flags = |extents: &Extents| {
            extents
                .iter()
                .flat_map(|(length, flags)| std::iter::repeat_n(Some(flags), (length / 512) as usize))
                .collect()
        };
        extents.map_or_else(|| vec![None; (length / 512) as usize], flags)
    }

    /// The rules of the module, sector by sector, beside what the merger makes.
    #[test]
    fn a_chunk_is_dirty_if_a_part_of_it_is_and_zero_only_if_all_of_it_is() {
        let mut rng = fastrand::Rng::with_seed(11);
        for _ in 0..300 {
            let length = rng.u64(1..3000) * 512;
            let mut said = Sayings::default();
            for (at, slot) in [&mut said.allocation, &mut said.dirty, &mut said.depth].into_iter().enumerate()
            {
                *slot = (rng.u8(0..4) > 0).then(|| random(&mut rng, length, [3, 1, 2][at]));
            }
            let base = sectors(said.allocation.as_ref(), length);
            let dirty = sectors(said.dirty.as_ref(), length);
            let depth = sectors(said.depth.as_ref(), length);
            let merged = merge(length, &said);
            assert!(merged.windows(2).all(|two| Region { length: two[0].length, ..two[1] } != two[0]));
            let mut at = 0;
            for region in &merged {
                assert!(at % 128 == 0 && region.length > 0);
                let end = at + (region.length / 512) as usize;
                for chunk in (at..end).step_by(128) {
                    let sectors = chunk..(chunk + 128).min(end);
                    assert_eq!(region.dirty, sectors.clone().any(|s| dirty[s] != Some(0)));
                    assert_eq!(region.zero, sectors.clone().all(|s| base[s].is_some_and(|f| f & ZERO != 0)));
                    let takes_room = |s: usize| match (depth[s], base[s]) {
                        (Some(depth), _) => depth > 0,
                        (None, Some(flags)) => flags & HOLE == 0,
                        (None, None) => true,
                    };
                    assert_eq!(region.allocated, sectors.clone().any(takes_room));
                }
                at = end;
            }
            assert_eq!(at as u64 * 512, length);
        }
    }

    #[test]
    fn what_a_context_does_not_speak_of_is_dirty_and_not_zero() {
        let mut short = Extents::default();
        short.push(CHUNK_BYTES, 0);
        let said = Sayings { dirty: Some(short), ..Sayings::default() };
        let unknown = Region { length: CHUNK_BYTES, dirty: true, zero: false, allocated: true };
        assert_eq!(merge(2 * CHUNK_BYTES, &said), [Region { dirty: false, ..unknown }, unknown]);
    }
}

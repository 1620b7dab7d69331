//! Looking whether what a source calls unchanged is what the parent has.
//!
//! A bitmap that says too little loses data in silence, for ever after. So some chunks that it calls clean are read and
//! compared with the parent's leaves: at random, each preferably where the parent has data; and always the last one of the
//! parent's that is not zero and is called clean, since shrinking a disk drops its bitmap's tail, growing it gives the tail back
//! clean, and whatever was cut off then, that chunk is in it.

use std::collections::BTreeSet;
use std::ops::Range;

use super::Session;
use crate::blob::BlobType;
use crate::error::VaultError;
use crate::header::CHUNK;
use crate::leaves::leaves;
use crate::source::DiskSource;
use crate::tree::{Tree, unchanged_to};

const CHUNK_BYTES: u64 = CHUNK as u64;
/// The part of a disk that is asked about at once.
const WINDOW: u64 = 4 << 30;
/// Chunks below one node of the lowest level: as many leaves as one look gives.
const NODE: u64 = 64;
/// Clean ranges that are searched for the parent's last chunk, from the end.
const SEARCHED: usize = 1024;

impl Session {
    /// The place, in bytes, of a chunk that the source calls unchanged and that the parent has otherwise; none if all of
    /// at most so many that were looked at are alike. A node of the parent's that cannot be read tells nothing.
    ///
    /// # Errors
    /// What the source or the backend could not do.
    pub async fn differs(
        &self,
        disk: &dyn DiskSource,
        parent: Tree,
        most: usize,
    ) -> Result<Option<u64>, VaultError> {
        let clean = clean(disk, parent).await?;
        let mut chosen = BTreeSet::new();
        if let Some(last) = self.last(parent, &clean).await? {
            chosen.insert(last);
        }
        let total: u64 = clean.iter().map(|range| range.end - range.start).sum();
        for _ in 0..most {
            if total == 0 {
                break;
            }
            let mut number = [0; 8];
            crate::ids::random(&mut number)?;
            let chunk = nth(&clean, u64::from_le_bytes(number) % total);
            chosen.insert(self.with_data(parent, &clean, chunk).await?);
        }
        for chunk in chosen {
            let found = leaves(&self.fetcher, parent, chunk..chunk + 1).await?;
            if !found.lost.is_empty() {
                continue;
            }
            let leaf = found.chunks.first().map(|(_, id)| *id);
            let begin = chunk * CHUNK_BYTES;
            let read = disk.read(begin..(begin + CHUNK_BYTES).min(disk.size())).await;
            let mut bytes = read.map_err(std::io::Error::from)?.to_vec();
            bytes.resize(CHUNK as usize, 0);
            let zero = bytes.iter().all(|byte| *byte == 0);
            let now = (!zero).then(|| self.ids.id(BlobType::Data, &bytes));
            if now != leaf {
                return Ok(Some(begin));
            }
        }
        Ok(None)
    }

    /// The chunk itself, or a clean one near it where the parent has data.
    async fn with_data(&self, parent: Tree, clean: &[Range<u64>], chunk: u64) -> Result<u64, VaultError> {
        let node = chunk / NODE * NODE;
        let near = leaves(&self.fetcher, parent, node..node + NODE).await?;
        let is_clean = |chunk: u64| clean.iter().any(|range| range.contains(&chunk));
        let after = near.chunks.iter().map(|(at, _)| *at).filter(|at| *at >= chunk);
        let before = near.chunks.iter().map(|(at, _)| *at).filter(|at| *at < chunk);
        Ok(after.chain(before).find(|at| is_clean(*at)).unwrap_or(chunk))
    }

    /// The parent's last chunk that is not zero and is called clean.
    async fn last(&self, parent: Tree, clean: &[Range<u64>]) -> Result<Option<u64>, VaultError> {
        for range in clean.iter().rev().take(SEARCHED) {
            // From the end, in windows that grow: what is zero costs no look.
            let (mut end, mut width) = (range.end, NODE);
            while end > range.start {
                let begin = end.saturating_sub(width).max(range.start);
                if let Some((last, _)) = leaves(&self.fetcher, parent, begin..end).await?.chunks.last() {
                    return Ok(Some(*last));
                }
                (end, width) = (begin, width.saturating_mul(8).min(1 << 20));
            }
        }
        Ok(None)
    }
}

/// Ranges of chunks that are called unchanged, and may be.
async fn clean(disk: &dyn DiskSource, parent: Tree) -> Result<Vec<Range<u64>>, VaultError> {
    let size = disk.size();
    let limit = unchanged_to(parent, size);
    let mut clean: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < size {
        let window = at..size.min(at + WINDOW);
        at = window.end;
        let mut begin = window.start;
        for region in disk.regions(window).await.map_err(std::io::Error::from)? {
            let end = begin + region.length;
            let chunks = begin / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES).min(limit);
            begin = end;
            if region.dirty || chunks.is_empty() {
                continue;
            }
            match clean.last_mut() {
                Some(last) if last.end == chunks.start => last.end = chunks.end,
                _ => clean.push(chunks),
            }
        }
    }
    Ok(clean)
}

/// The chunk at a place among those of these ranges.
fn nth(ranges: &[Range<u64>], mut place: u64) -> u64 {
    for range in ranges {
        let length = range.end - range.start;
        if place < length {
            return range.start + place;
        }
        place -= length;
    }
    0
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use async_trait::async_trait;
    use bytes::Bytes;

    use super::*;
    use crate::source::{Region, SourceError};
    use crate::testing::{Bench, C, noise};

    /// A disk that claims that nothing has changed, but in these ranges of chunks.
    #[derive(Debug)]
    struct Claims(Vec<u8>, Vec<Range<usize>>);

    #[async_trait]
    impl DiskSource for Claims {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }

        fn knows_changes(&self) -> bool {
            true
        }

        async fn regions(&self, part: Range<u64>) -> Result<Vec<Region>, SourceError> {
            let (begin, end) = (part.start as usize / C, (part.end as usize).div_ceil(C));
            let region = |chunk: usize| Region {
                length: (C as u64).min(part.end - (chunk * C) as u64),
                dirty: self.1.iter().any(|range| range.contains(&chunk)),
                zero: false,
                allocated: true,
            };
            Ok((begin..end).map(region).collect())
        }

        async fn read(&self, part: Range<u64>) -> Result<Bytes, SourceError> {
            Ok(self.0[part.start as usize..part.end as usize].to_vec().into())
        }

        fn received(&self) -> u64 {
            0
        }
    }

    #[tokio::test]
    async fn a_bitmap_that_says_too_little_is_found_out_and_an_honest_one_is_not() {
        let bench = Bench::new(false).await;
        let image = noise(1, 40 * C + 100);
        let parent = bench.full(&image).await.1.image.tree();
        let session = bench.session().await;
        let differs = async |disk: &Claims, most| session.differs(disk, parent, most).await.unwrap();
        assert_eq!(differs(&Claims(image.clone(), vec![]), 64).await, None);
        let mut changed = image.clone();
        changed[5 * C + 7] ^= 1;
        assert_eq!(
            differs(&Claims(changed.clone(), vec![5..6, 9..12]), 64).await,
            None,
            "it says what it knows"
        );
        for at in 0..20 {
            changed[(2 * at + 1) * C] ^= 1;
        }
        let found = differs(&Claims(changed, vec![]), 64).await.unwrap();
        assert!(found % (C as u64) == 0 && found < 40 * C as u64, "{found}");
    }

    #[tokio::test]
    async fn what_was_cut_off_by_shrinking_is_found_out_by_the_last_chunk_alone() {
        let bench = Bench::new(false).await;
        let mut image = noise(1, 300 * C);
        image[200 * C..].fill(0);
        image[250 * C..251 * C].copy_from_slice(&noise(2, C));
        let parent = bench.full(&image).await.1.image.tree();
        let session = bench.session().await;
        // Shrunk to 240 chunks and grown again: what lay behind is zero, and called clean.
        image[240 * C..].fill(0);
        let disk = Claims(image.clone(), vec![]);
        assert_eq!(session.differs(&disk, parent, 0).await.unwrap(), Some(250 * C as u64));
        let told = Claims(image, std::iter::once(240..300).collect());
        assert_eq!(session.differs(&told, parent, 0).await.unwrap(), None);
    }
}

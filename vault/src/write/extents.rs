//! What a source of an image says, cut into chunks.

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use crate::error::VaultError;
use crate::header::CHUNK;

const CHUNK_BYTES: u64 = CHUNK as u64;

/// A part of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// These bytes.
    Data(Bytes),
    /// So many zeroes.
    Zero(u64),
    /// So many bytes that are what the parent has there. Begins and ends between chunks, or at the image's end.
    Unchanged(u64),
}

impl Extent {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zero(length) | Self::Unchanged(length) => *length,
        }
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where an image is read from: from its beginning to its end, without gaps.
#[async_trait]
pub trait Source: Send {
    /// The next part with its offset; nothing at the end.
    async fn next(&mut self) -> std::io::Result<Option<(u64, Extent)>>;
}

/// A source made of a list: for small things.
#[derive(Debug)]
pub struct Parts(std::vec::IntoIter<Extent>, u64);

impl Parts {
    /// One after the other.
    #[must_use]
    pub fn new(parts: Vec<Extent>) -> Self {
        Self(parts.into_iter(), 0)
    }
}

#[async_trait]
impl Source for Parts {
    async fn next(&mut self) -> std::io::Result<Option<(u64, Extent)>> {
        Ok(self.0.next().map(|extent| {
            let at = self.1;
            self.1 += extent.len();
            (at, extent)
        }))
    }
}

/// What is known of chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A whole chunk, padded with zeroes at the image's end.
    Chunk(u64, Bytes),
    /// Chunks that are zero.
    Zero(u64, u64),
    /// Chunks that the parent has.
    Unchanged(u64, u64),
}

/// Cuts extents into chunks.
pub(super) struct Cutter<'a> {
    source: &'a mut dyn Source,
    size: u64,
    /// Up to where the source has spoken.
    at: u64,
    rest: Option<Extent>,
}

impl<'a> Cutter<'a> {
    pub(super) fn new(source: &'a mut dyn Source, size: u64) -> Self {
        Self { source, size, at: 0, rest: None }
    }

    /// Items of about so many chunks of data; empty at the end.
    pub(super) async fn batch(&mut self, most: usize) -> Result<Vec<Item>, VaultError> {
        let mut items = Vec::new();
        let mut data = 0;
        while data < most && items.len() < most * 4 {
            let Some(item) = self.item().await? else { break };
            data += usize::from(matches!(item, Item::Chunk(..)));
            items.push(item);
        }
        Ok(items)
    }

    async fn item(&mut self) -> Result<Option<Item>, VaultError> {
        let Some(extent) = self.extent().await? else { return Ok(None) };
        let chunk = self.at / CHUNK_BYTES;
        let whole = extent.len() / CHUNK_BYTES;
        let to_the_end = self.at + extent.len() == self.size;
        match extent {
            Extent::Unchanged(length) if length % CHUNK_BYTES == 0 || to_the_end => {
                self.at += length;
                Ok(Some(Item::Unchanged(chunk, length.div_ceil(CHUNK_BYTES))))
            }
            Extent::Unchanged(_) => Err(self.wrong("an unchanged extent ends within a chunk")),
            Extent::Zero(length) if to_the_end => {
                self.at += length;
                Ok(Some(Item::Zero(chunk, length.div_ceil(CHUNK_BYTES))))
            }
            Extent::Zero(length) if whole > 0 => {
                self.at += whole * CHUNK_BYTES;
                self.keep_rest(Extent::Zero(length - whole * CHUNK_BYTES));
                Ok(Some(Item::Zero(chunk, whole)))
            }
            Extent::Data(mut bytes) if whole > 0 => {
                let first = bytes.split_to(CHUNK as usize);
                self.at += CHUNK_BYTES;
                self.keep_rest(Extent::Data(bytes));
                Ok(Some(Item::Chunk(chunk, first)))
            }
            part => self.mixed(chunk, part).await.map(Some),
        }
    }

    /// A chunk that several extents say something of, or that the image ends in.
    async fn mixed(&mut self, chunk: u64, first: Extent) -> Result<Item, VaultError> {
        let mut bytes = BytesMut::with_capacity(CHUNK as usize);
        let mut part = Some(first);
        while let Some(extent) = part {
            let room = CHUNK as usize - bytes.len();
            match extent {
                Extent::Data(mut data) => {
                    let here = data.split_to(room.min(data.len()));
                    self.at += here.len() as u64;
                    bytes.extend_from_slice(&here);
                    self.keep_rest(Extent::Data(data));
                }
                Extent::Zero(length) => {
                    let here = length.min(room as u64);
                    self.at += here;
                    bytes.resize(bytes.len() + here as usize, 0);
                    self.keep_rest(Extent::Zero(length - here));
                }
                Extent::Unchanged(_) => return Err(self.wrong("an unchanged extent begins within a chunk")),
            }
            part = if bytes.len() < CHUNK as usize { self.extent().await? } else { None };
        }
        bytes.resize(CHUNK as usize, 0);
        Ok(Item::Chunk(chunk, bytes.freeze()))
    }

    fn keep_rest(&mut self, rest: Extent) {
        self.rest = Some(rest).filter(|rest| !rest.is_empty());
    }

    /// What comes next, at [`Self::at`].
    async fn extent(&mut self) -> Result<Option<Extent>, VaultError> {
        if let Some(rest) = self.rest.take() {
            return Ok(Some(rest));
        }
        loop {
            match self.source.next().await? {
                None if self.at == self.size => return Ok(None),
                None => return Err(self.wrong("the source ended before the image")),
                Some((_, extent)) if extent.is_empty() => {}
                Some((offset, _)) if offset != self.at => {
                    return Err(self.wrong(&format!("the source goes on at {offset}")));
                }
                Some((_, extent)) if extent.len() > self.size - self.at => {
                    return Err(self.wrong("the source goes beyond the image"));
                }
                Some((_, extent)) => return Ok(Some(extent)),
            }
        }
    }

    fn wrong(&self, what: &str) -> VaultError {
        VaultError::Contract(format!("{what}, at {} of {}", self.at, self.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = CHUNK_BYTES;

    fn data(length: u64, seed: u8) -> Extent {
        Extent::Data(vec![seed; length as usize].into())
    }

    async fn cut(size: u64, parts: Vec<Extent>) -> Result<Vec<Item>, VaultError> {
        let mut source = Parts::new(parts);
        let mut cutter = Cutter::new(&mut source, size);
        let mut all = Vec::new();
        loop {
            let items = cutter.batch(2).await?;
            if items.is_empty() {
                return Ok(all);
            }
            all.extend(items);
        }
    }

    #[tokio::test]
    async fn any_cut_of_data_and_zeroes_gives_the_same_chunks() {
        let image: Vec<u8> =
            (0..5 * C + 100).map(|at| if at / 3000 % 3 == 0 { 0 } else { (at % 251) as u8 }).collect();
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..50 {
            let mut parts = Vec::new();
            let mut at = 0;
            while at < image.len() {
                let end = (at + rng.usize(1..100_000)).min(image.len());
                let piece = &image[at..end];
                let zeroes = piece.iter().take_while(|byte| **byte == 0).count();
                let (extent, next) = match zeroes {
                    0 => (Extent::Data(piece.to_vec().into()), end),
                    many => (Extent::Zero(many as u64), at + many),
                };
                parts.push(extent);
                at = next;
            }
            let mut again = vec![0; 6 * C as usize];
            for item in cut(image.len() as u64, parts).await.unwrap() {
                if let Item::Chunk(chunk, bytes) = item {
                    assert_eq!(bytes.len() as u64, C);
                    again[(chunk * C) as usize..][..C as usize].copy_from_slice(&bytes);
                }
            }
            assert!(again[..image.len()] == image && again[image.len()..].iter().all(|byte| *byte == 0));
        }
    }

    #[tokio::test]
    async fn long_extents_stay_whole_and_the_end_may_lie_within_a_chunk() {
        let parts = vec![Extent::Zero(C * 1000), Extent::Unchanged(C * 7), data(C, 1), Extent::Zero(C + 5)];
        let items = cut(C * 1009 + 5, parts).await.unwrap();
        let chunk = Item::Chunk(1007, vec![1; C as usize].into());
        assert_eq!(items, [Item::Zero(0, 1000), Item::Unchanged(1000, 7), chunk, Item::Zero(1008, 2)]);
        assert_eq!(cut(0, vec![]).await.unwrap(), []);
        assert_eq!(cut(C + 9, vec![Extent::Unchanged(C + 9)]).await.unwrap(), [Item::Unchanged(0, 2)]);
    }

    #[tokio::test]
    async fn a_source_that_breaks_its_contract_is_told_so() {
        for (size, parts) in [
            (C, vec![]),
            (C, vec![data(C - 1, 1)]),
            (C, vec![data(C + 1, 1)]),
            (2 * C, vec![Extent::Unchanged(5), data(2 * C - 5, 1)]),
            (2 * C, vec![data(5, 1), Extent::Unchanged(2 * C - 5)]),
        ] {
            assert!(
                matches!(cut(size, parts.clone()).await, Err(VaultError::Contract(_))),
                "{size} {parts:?}"
            );
        }
    }
}

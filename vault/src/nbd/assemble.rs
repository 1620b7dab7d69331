//! The reply to a read, put together from chunks that come in any order.

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// What has come of a read.
#[derive(Debug)]
pub(super) struct Assembly {
    offset: u64,
    length: usize,
    /// Up to the end of the farthest chunk; what no chunk has said yet is zero in it, and not in `covered`.
    bytes: BytesMut,
    /// Disjoint, not adjoining, in order.
    covered: Vec<(usize, usize)>,
}

impl Assembly {
    pub(super) fn new(offset: u64, length: u32) -> Self {
        Self { offset, length: length as usize, bytes: BytesMut::new(), covered: Vec::new() }
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The most chunks that a reply may consist of: more are no reply, but an attack on memory.
    pub(super) fn most_chunks(&self) -> usize {
        self.length / 512 + 16
    }

    /// Where a chunk lies in the request; checked, and noted as said.
    fn claim(&mut self, offset: u64, length: usize) -> Result<(usize, usize), String> {
        let place = offset.checked_sub(self.offset).and_then(|from| usize::try_from(from).ok());
        let from = place.filter(|from| length <= self.length && *from <= self.length - length);
        let Some(from) = from else {
            return Err(format!("a chunk of {length} bytes at {offset}, outside of the request"));
        };
        if length == 0 {
            return Err(format!("an empty chunk at {offset}"));
        }
        let to = from + length;
        let next = self.covered.partition_point(|(_, end)| *end < from);
        // At most the one before and the one after touch it.
        let left = self.covered.get(next).copied().filter(|(_, end)| *end == from);
        let after = next + usize::from(left.is_some());
        let right = self.covered.get(after).copied();
        if right.is_some_and(|(start, _)| start < to) {
            return Err(format!("chunks that overlap at {offset}"));
        }
        let joined = right.filter(|(start, _)| *start == to);
        let merged = (left.map_or(from, |(start, _)| start), joined.map_or(to, |(_, end)| end));
        self.covered.splice(next..after + usize::from(joined.is_some()), [merged]);
        if self.bytes.capacity() == 0 {
            self.bytes.reserve(self.length);
        }
        if self.bytes.len() < from {
            self.bytes.resize(from, 0);
        }
        Ok((from, to))
    }

    /// Takes in a chunk of data from where the replies come.
    ///
    /// # Errors
    /// In the first place if the connection failed, in the second if the chunk does not belong there.
    pub(super) async fn data(
        &mut self,
        offset: u64,
        length: usize,
        from: &mut (impl AsyncRead + Unpin),
    ) -> std::io::Result<Result<(), String>> {
        let (start, end) = match self.claim(offset, length) {
            Ok(place) => place,
            Err(lie) => return Ok(Err(lie)),
        };
        if start < self.bytes.len() {
            // A gap between chunks that came before: it does not reach to the end, which is a chunk's.
            if let Some(gap) = self.bytes.get_mut(start..end) {
                from.read_exact(gap).await?;
            }
            return Ok(Ok(()));
        }
        while self.bytes.len() < end {
            let left = (end - self.bytes.len()) as u64;
            if (&mut *from).take(left).read_buf(&mut self.bytes).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Ok(()))
    }

    /// Takes in a chunk of zeroes.
    ///
    /// # Errors
    /// If it does not belong there.
    pub(super) fn hole(&mut self, offset: u64, length: usize) -> Result<(), String> {
        let (_, end) = self.claim(offset, length)?;
        // What lies in a gap is zero already.
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        Ok(())
    }

    /// All of it.
    ///
    /// # Errors
    /// If something was not said.
    pub(super) fn finish(self) -> Result<Bytes, String> {
        if self.covered == [(0, self.length)] {
            return Ok(self.bytes.freeze());
        }
        Err(format!("a reply that leaves out a part of {} bytes at {}", self.length, self.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn chunks_in_any_order_give_the_bytes_and_what_overlaps_or_lacks_is_told() {
        let image: Vec<u8> = (0..4000_u32).map(|at| (at % 251) as u8 + 1).collect();
        let mut rng = fastrand::Rng::with_seed(7);
        for round in 0..300 {
            let mut cuts: Vec<usize> = (0..rng.usize(0..12)).map(|_| rng.usize(1..image.len())).collect();
            cuts.extend([0, image.len()]);
            cuts.sort_unstable();
            cuts.dedup();
            let mut pieces: Vec<(usize, usize, bool)> =
                cuts.windows(2).map(|cut| (cut[0], cut[1], rng.bool())).collect();
            rng.shuffle(&mut pieces);
            let left_out = (round % 3 == 0).then(|| pieces.pop()).flatten();
            let mut assembly = Assembly::new(1 << 40, 4000);
            let mut expected = image.clone();
            for (from, to, data) in &pieces {
                let at = (1 << 40) + *from as u64;
                if *data {
                    assembly.data(at, to - from, &mut &image[*from..*to]).await.unwrap().unwrap();
                } else {
                    assembly.hole(at, to - from).unwrap();
                    expected[*from..*to].fill(0);
                }
            }
            if let Some((from, to, _)) = pieces.first() {
                let at = (1 << 40) + rng.usize(*from..*to) as u64;
                assembly.hole(at, 1).unwrap_err();
            }
            match left_out {
                None => assert!(assembly.finish().unwrap() == expected),
                Some(_) => drop(assembly.finish().unwrap_err()),
            }
        }
    }

    #[tokio::test]
    async fn a_chunk_outside_of_the_request_is_told_before_anything_is_allocated() {
        for (offset, length) in [(99, 1), (200, 1), (150, 51), (0, 1), (u64::MAX, 2), (100, 101), (120, 0)] {
            let mut assembly = Assembly::new(100, 100);
            assembly.hole(offset, length).unwrap_err();
            assembly.data(offset, length, &mut tokio::io::empty()).await.unwrap().unwrap_err();
            assert_eq!(assembly.bytes.capacity(), 0);
        }
        let mut assembly = Assembly::new(100, 100);
        assembly.hole(100, usize::MAX).unwrap_err();
    }
}

//! A sink over something that has content: what the image says is zero is made zero, whatever was there.
//!
//! Zeroes are asked for in the way that costs least and is *certain* to read as zeroes afterwards. A hole in a file does; on a
//! device it is the kernel that answers for it: it discards only where the device promises zeroes for that, and else writes
//! them (`FALLOC_FL_PUNCH_HOLE`, `FALLOC_FL_ZERO_RANGE`). What can do neither is written to.

use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vmkeep_vault::read::Sink;

use crate::blocking;

/// Bytes of zeroes that are written at once.
const PIECE: u64 = 1 << 20;
/// Bytes that are made zero in one call, which nobody can interrupt.
const AT_ONCE: u64 = 1 << 30;

/// A file or block device that is open for writing, and at least as long as the image.
#[derive(Clone, Debug)]
pub struct Onto(Arc<File>);

impl Onto {
    /// Over this one.
    #[must_use]
    pub fn new(file: Arc<File>) -> Self {
        Self(file)
    }
}

#[async_trait]
impl Sink for Onto {
    async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<()> {
        let file = Arc::clone(&self.0);
        blocking::io(move || file.write_all_at(&bytes, offset)).await
    }

    async fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        let end = offset.checked_add(length).ok_or_else(|| Error::other("it ends beyond all numbers"))?;
        let mut at = offset;
        while at < end {
            let (file, here) = (Arc::clone(&self.0), AT_ONCE.min(end - at));
            blocking::io(move || make_zero(&file, at, here)).await?;
            at += here;
        }
        Ok(())
    }
}

fn make_zero(file: &File, offset: u64, length: u64) -> Result<()> {
    for how in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
        match rustix::fs::fallocate(file, how | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => return Ok(()),
            // It cannot be done here, or not for a range like that.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    write_zeroes(file, offset, length)
}

fn write_zeroes(file: &File, offset: u64, length: u64) -> Result<()> {
    let zeroes = vec![0; usize::try_from(PIECE.min(length)).map_err(Error::other)?];
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let here = usize::try_from(PIECE.min(end - at)).map_err(Error::other)?;
        file.write_all_at(zeroes.get(..here).unwrap_or(&zeroes), at)?;
        at += here as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_there_is_gone_where_the_image_is_zero_and_nothing_else_is() {
        let old = vec![7_u8; 3 << 20];
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&old, 0).unwrap();
        let file = Arc::new(file);
        let mut sink = Onto::new(Arc::clone(&file));
        // Not at the edges of anything.
        sink.zero(1000, (2 << 20) + 1).await.unwrap();
        sink.write(1500, Bytes::from_static(b"new")).await.unwrap();
        write_zeroes(&file, (2 << 20) + 5000, 10).unwrap();
        let mut expected = old;
        expected[1000..1000 + (2 << 20) + 1].fill(0);
        expected[1500..1503].copy_from_slice(b"new");
        expected[(2 << 20) + 5000..(2 << 20) + 5010].fill(0);
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
        assert_eq!(file.metadata().unwrap().len(), expected.len() as u64);
    }
}

//! A disk as a stream of extents, read ahead.
//!
//! What is known of the disk is asked for a window ahead of what is read, and reads run ahead of what is taken, up to a number of
//! bytes that are in memory at once. What comes out is in the order of the disk all the same.

use std::collections::VecDeque;
use std::future::ready;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;

use super::{DiskSource, Region, SourceError};
use crate::header::CHUNK;
use crate::write::{Extent, Source};

const CHUNK_BYTES: u64 = CHUNK as u64;
/// The part that is asked about at once.
const WINDOW: u64 = 4 << 30;
/// The most bytes of a read.
const PIECE: u64 = 512 << 10;
/// The most bytes that are being read, or have been and are not yet taken.
const AHEAD: u64 = 16 << 20;

/// What has been told so far, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// As data, which was read.
    pub data: u64,
    /// As zero, which was not.
    pub zero: u64,
    /// As what the parent has.
    pub unchanged: u64,
}

impl Told {
    /// All of it: the place up to which the disk has been told.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.data + self.zero + self.unchanged
    }
}

type Next = BoxFuture<'static, Result<Extent, SourceError>>;
type Asked = BoxFuture<'static, Result<Vec<Region>, SourceError>>;

/// Reads a disk from its beginning to its end.
pub struct DiskReader {
    disk: Arc<dyn DiskSource>,
    /// Up to where a chunk may be what the parent has.
    unchanged_to: u64,
    /// What is known and not yet begun, from `begun` on.
    known: VecDeque<Region>,
    begun: u64,
    /// The question about what follows, from `asked` on.
    asking: Option<Asked>,
    asked: u64,
    ahead: FuturesOrdered<Next>,
    bytes_ahead: u64,
    told: Told,
    /// After a failure there is nothing more: what follows would come out at another place.
    failed: Option<SourceError>,
}

impl std::fmt::Debug for DiskReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskReader")
            .field("disk", &self.disk)
            .field("told", &self.told)
            .finish_non_exhaustive()
    }
}

impl DiskReader {
    /// Of everything, or, with the size of the parent's disk (the one that the source's bitmap began with), of what has changed
    /// since. Where sizes differ, what lies beyond the last whole chunk of both is read, whatever the bitmap says: shrinking
    /// drops a bitmap's tail, and growing gives it back clean.
    #[must_use]
    pub fn new(disk: Arc<dyn DiskSource>, parent: Option<u64>) -> Self {
        let size = disk.size();
        let unchanged_to = match parent {
            None => 0,
            Some(parent) if parent == size => size,
            Some(parent) => parent.min(size) / CHUNK_BYTES * CHUNK_BYTES,
        };
        Self {
            disk,
            unchanged_to,
            known: VecDeque::new(),
            begun: 0,
            asking: None,
            asked: 0,
            ahead: FuturesOrdered::new(),
            bytes_ahead: 0,
            told: Told::default(),
            failed: None,
        }
    }

    /// What has been told so far.
    #[must_use]
    pub fn told(&self) -> Told {
        self.told
    }

    fn ask(&mut self) {
        let size = self.disk.size();
        if self.asking.is_some() || !self.known.is_empty() || self.asked == size {
            return;
        }
        let part = self.asked..size.min(self.asked + WINDOW);
        self.asked = part.end;
        let disk = self.disk.clone();
        self.asking = Some(Box::pin(async move { disk.regions(part).await }));
    }

    /// Begins the next read, or whatever is known without one.
    fn begin(&mut self) -> bool {
        let Some(region) = self.known.front_mut() else { return false };
        let unchanged = !region.dirty && self.begun < self.unchanged_to;
        let most = match (unchanged, region.zero) {
            (true, _) => self.unchanged_to - self.begun,
            (false, true) => u64::MAX,
            (false, false) => PIECE,
        };
        let length = region.length.min(most);
        region.length -= length;
        if region.length == 0 {
            self.known.pop_front();
        }
        let part = self.begun..self.begun + length;
        let zero = most == u64::MAX;
        self.begun = part.end;
        self.ahead.push_back(match (unchanged, zero) {
            (true, _) => Box::pin(ready(Ok(Extent::Unchanged(length)))),
            (false, true) => Box::pin(ready(Ok(Extent::Zero(length)))),
            (false, false) => {
                self.bytes_ahead += length;
                Box::pin(read(self.disk.clone(), part))
            }
        });
        true
    }

    fn tell(&mut self, extent: Extent) -> (u64, Extent) {
        let at = self.told.total();
        match &extent {
            Extent::Data(bytes) => {
                self.told.data += bytes.len() as u64;
                self.bytes_ahead -= bytes.len() as u64;
            }
            Extent::Zero(length) => self.told.zero += length,
            Extent::Unchanged(length) => self.told.unchanged += length,
        }
        (at, extent)
    }
}

async fn read(disk: Arc<dyn DiskSource>, part: Range<u64>) -> Result<Extent, SourceError> {
    disk.read(part).await.map(Extent::Data)
}

impl DiskReader {
    async fn advance(&mut self) -> Result<Option<Extent>, SourceError> {
        loop {
            while self.bytes_ahead < AHEAD && self.begin() {}
            self.ask();
            let Some(asking) = &mut self.asking else { return self.ahead.next().await.transpose() };
            // Both are kept if this future is dropped.
            tokio::select! {
                biased;
                Some(extent) = self.ahead.next() => return extent.map(Some),
                regions = asking => {
                    self.asking = None;
                    self.known.extend(regions?);
                }
            }
        }
    }
}

#[async_trait]
impl Source for DiskReader {
    async fn next(&mut self) -> std::io::Result<Option<(u64, Extent)>> {
        if let Some(error) = &self.failed {
            return Err(error.clone().into());
        }
        match self.advance().await {
            Ok(extent) => Ok(extent.map(|extent| self.tell(extent))),
            Err(error) => Err(self.failed.insert(error).clone().into()),
        }
    }
}

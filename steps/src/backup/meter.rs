//! A source of an image that is counted, and held back to a bandwidth.

use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;
use vmkeep_vault::source::{DiskReader, Told};
use vmkeep_vault::write::{Extent, Source};
use vmkeep_workflow::progress::Progress;

/// Reads a disk, tells how far it is, and reads no faster than it may.
pub(super) struct Meter {
    reader: DiskReader,
    progress: Progress,
    /// Bytes of the disks before this one, and of all.
    before: u64,
    total: u64,
    /// Bytes per second; 0 for no limit.
    bandwidth: u64,
    begun: Instant,
}

impl Meter {
    pub(super) fn new(
        reader: DiskReader,
        progress: Progress,
        (before, total): (u64, u64),
        bandwidth: u64,
    ) -> Self {
        Self { reader, progress, before, total, bandwidth, begun: Instant::now() }
    }

    pub(super) fn told(&self) -> Told {
        self.reader.told()
    }

    /// How long to wait until what was read is no more than may have been.
    fn ahead(&self) -> Option<Duration> {
        let due = (self.reader.told().data as f64) / (self.bandwidth as f64);
        (self.bandwidth > 0).then(|| Duration::from_secs_f64(due).saturating_sub(self.begun.elapsed()))
    }
}

#[async_trait]
impl Source for Meter {
    async fn next(&mut self) -> std::io::Result<Option<(u64, Extent)>> {
        if let Some(wait) = self.ahead().filter(|wait| !wait.is_zero()) {
            tokio::time::sleep(wait).await;
        }
        let next = self.reader.next().await?;
        self.progress.report(self.before + self.reader.told().total(), self.total, "bytes");
        Ok(next)
    }
}

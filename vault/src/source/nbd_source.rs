//! A disk that somebody shows over NBD.

use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::Instant;

use super::regions::{Region, Sayings, merge};
use super::{DiskSource, SourceError};
use crate::nbd::{ALLOCATION_DEPTH, Address, BASE_ALLOCATION, Client, Options, dirty_bitmap};

const ALLOCATION: usize = 0;
const DEPTH: usize = 1;
const DIRTY: usize = 2;

/// How to read an export.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// The dirty bitmap that tells what has changed, by the name that the *export* shows it under.
    pub bitmap: Option<String>,
    /// Connections, at most.
    pub connections: usize,
    /// Requests in flight on each.
    pub in_flight: usize,
    /// How long one request may take; for ever if nothing is said.
    pub patience: Option<Duration>,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self { bitmap: None, connections: 4, in_flight: 16, patience: None }
    }
}

/// A disk that somebody shows over NBD, and goes on showing as it was until this is closed.
#[derive(Debug)]
pub struct NbdSource {
    client: Client,
    patience: Option<Duration>,
}

impl NbdSource {
    /// Connects.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn open(address: &Address, options: &NbdOptions) -> Result<Self, SourceError> {
        let mut contexts = vec![BASE_ALLOCATION.to_owned(), ALLOCATION_DEPTH.to_owned()];
        contexts.extend(options.bitmap.as_deref().map(dirty_bitmap));
        let (connections, in_flight, patience) = (options.connections, options.in_flight, options.patience);
        let client_options = Options { contexts, connections, in_flight };
        let client = Client::connect(address, &client_options, deadline(patience)).await?;
        Ok(Self { client, patience })
    }

    /// The client: what the server said of the export, and who it is.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Takes leave of the server.
    pub async fn close(self) {
        self.client.close().await;
    }
}

fn deadline(patience: Option<Duration>) -> Option<Instant> {
    patience.and_then(|patience| Instant::now().checked_add(patience))
}

#[async_trait]
impl DiskSource for NbdSource {
    fn size(&self) -> u64 {
        self.client.export().size
    }

    fn knows_changes(&self) -> bool {
        self.client.granted(DIRTY)
    }

    async fn regions(&self, part: Range<u64>) -> Result<Vec<Region>, SourceError> {
        let length = part.end.saturating_sub(part.start);
        let mut said = self.client.status(part, || deadline(self.patience)).await?;
        let mut take = |place: usize| said.get_mut(place).and_then(Option::take);
        let said = Sayings { allocation: take(ALLOCATION), depth: take(DEPTH), dirty: take(DIRTY) };
        Ok(merge(length, &said))
    }

    async fn read(&self, part: Range<u64>) -> Result<Bytes, SourceError> {
        Ok(self.client.read(part, deadline(self.patience)).await?)
    }

    fn received(&self) -> u64 {
        self.client.received()
    }
}

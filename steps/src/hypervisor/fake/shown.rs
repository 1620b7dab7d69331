//! Disks that are read beside their guests: whoever reads goes chunk by chunk, and guests go on in between.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use vmkeep_vault::source::{DiskSource, Region, SourceError};

use super::acts::qemu;
use super::events::opened;
use super::pulls::Export;
use super::{Client, Fake, Inner, disk, no};
use crate::hypervisor::{DomainId, HvResult, Layer, Shown, Storage as _, Target, Trouble};
use crate::simulation::{Hands, MOMENT, Order, Place, Side, Witness};

/// The unit in which a vault is told what a disk holds.
const CHUNK: u64 = 64 << 10;

/// What is seen of a disk in the world, as long as it can be.
pub(super) trait View: Send + Sync {
    /// The bytes of a cluster.
    fn cluster(&self, inner: &Inner, number: u64) -> HvResult<Vec<u8>>;
    /// Whether a cluster has changed since the checkpoint; nothing if there is none.
    fn changed(&self, inner: &Inner, number: u64) -> HvResult<Option<bool>>;
    /// Nobody reads it any more.
    fn closed(&self, _inner: &mut Inner) {}
}

/// A disk that is shown.
pub(super) struct Source<V: View> {
    pub(super) world: Fake,
    pub(super) witness: Arc<dyn Witness>,
    pub(super) what: &'static str,
    pub(super) size: u64,
    pub(super) knows_changes: bool,
    pub(super) view: V,
}

impl<V: View> fmt::Debug for Source<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

impl<V: View> Drop for Source<V> {
    fn drop(&mut self) {
        self.view.closed(&mut self.world.inner());
    }
}

/// Why it is not shown (any more).
pub(super) fn ended(what: &str, cause: impl fmt::Display) -> SourceError {
    SourceError::Ended {
        program: what.to_owned(),
        image: "a disk".to_owned(),
        status: "lost".to_owned(),
        complaint: cause.to_string(),
    }
}

impl<V: View> Source<V> {
    /// A place of the run: somebody asks for a part.
    async fn ask(&self) -> Result<(), SourceError> {
        let place = Place { what: self.what, domain: None, side: Side::Before, hands: Hands::Helper };
        tokio::time::sleep(MOMENT).await;
        match self.witness.at(&place) {
            Order::Go => Ok(()),
            Order::Linger(so_long) => {
                tokio::time::sleep(so_long).await;
                Ok(())
            }
            Order::Die | Order::DieAndLeave(_) => std::future::pending().await,
            Order::Fail(e) | Order::Lose(e) | Order::LoseAndLeave(_, e) => Err(ended(self.what, e)),
        }
    }

    async fn chunk(&self, clusters: Range<u64>) -> Result<(Vec<u8>, bool), SourceError> {
        tokio::time::sleep(MOMENT).await;
        let mut inner = self.world.inner();
        inner.pass();
        let (mut bytes, mut dirty) = (Vec::new(), false);
        for number in clusters {
            let looked = (self.view.cluster(&inner, number), self.view.changed(&inner, number));
            bytes.extend(looked.0.map_err(|e| ended(self.what, e))?);
            dirty |= looked.1.map_err(|e| ended(self.what, e))?.unwrap_or(true);
        }
        Ok((bytes, dirty))
    }

    /// The chunks of a part.
    fn chunks(part: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<V> {
        let end = part.end;
        (part.start..end).step_by(CHUNK as usize).map(move |at| at..end.min(at + CHUNK))
    }
}

fn clusters(part: &Range<u64>) -> Range<u64> {
    part.start / disk::CLUSTER..part.end.div_ceil(disk::CLUSTER)
}

#[async_trait]
impl<V: View> DiskSource for Source<V> {
    fn size(&self) -> u64 {
        self.size
    }

    fn knows_changes(&self) -> bool {
        self.knows_changes
    }

    async fn regions(&self, part: Range<u64>) -> Result<Vec<Region>, SourceError> {
        self.ask().await?;
        let mut regions: Vec<Region> = Vec::new();
        for chunk in Self::chunks(&part) {
            let (bytes, dirty) = self.chunk(clusters(&chunk)).await?;
            let zero = bytes.iter().all(|byte| *byte == 0);
            let dirty = dirty || !self.knows_changes;
            let region = Region { length: chunk.end - chunk.start, dirty, zero, allocated: !zero };
            match regions.last_mut() {
                Some(last) if Region { length: region.length, ..*last } == region => {
                    last.length += region.length;
                }
                _ => regions.push(region),
            }
        }
        Ok(regions)
    }

    async fn read(&self, part: Range<u64>) -> Result<Bytes, SourceError> {
        self.ask().await?;
        let mut read = Vec::new();
        for chunk in Self::chunks(&part) {
            read.extend(self.chunk(clusters(&chunk)).await?.0);
        }
        read.truncate(usize::try_from(part.end - part.start).unwrap_or(0));
        Ok(read.into())
    }

    fn received(&self) -> u64 {
        0
    }
}

/// Images at rest, as a helper of this process shows them: nobody writes to them meanwhile.
pub(super) struct AtRest {
    pub(super) chain: Vec<Layer>,
}

impl AtRest {
    /// Opens them for reading, unless somebody has the topmost open for writing.
    pub(super) fn open(inner: &mut Inner, chain: Vec<Layer>) -> Result<Self, String> {
        let Some(top) = chain.first().map(|layer| layer.path.clone()) else {
            return Err("there is no image".to_owned());
        };
        let writes = |p: &super::Process| p.disks.iter().any(|open| open.chain[0].path == top);
        let written = inner.domains.values().filter_map(|domain| domain.process.as_ref()).any(writes);
        if written || inner.helpers.contains(&top) {
            return Err("Failed to get shared \"write\" lock".to_owned());
        }
        inner.readers.extend(chain.iter().map(|layer| layer.path.clone()));
        Ok(Self { chain })
    }
}

impl View for AtRest {
    fn cluster(&self, _: &Inner, number: u64) -> HvResult<Vec<u8>> {
        disk::read(&self.chain, number).map_err(super::io)
    }

    fn changed(&self, _: &Inner, _: u64) -> HvResult<Option<bool>> {
        Ok(None)
    }

    fn closed(&self, inner: &mut Inner) {
        for layer in &self.chain {
            release(&mut inner.readers, &layer.path);
        }
    }
}

/// One of those who read it is gone.
fn release(readers: &mut Vec<PathBuf>, path: &PathBuf) {
    if let Some(at) = readers.iter().position(|held| held == path) {
        readers.swap_remove(at);
    }
}

/// What this QEMU shows of a disk.
pub(super) async fn export(
    client: &Client,
    id: &DomainId,
    instance: &str,
    disk: &Target,
    changes: bool,
) -> Result<Shown, SourceError> {
    const WHAT: &str = "read-export";
    let opened = client.look(|inner| {
        let boot = inner.boot;
        if qemu(inner.process(id)?, boot).instance != instance {
            return no(Trouble::NotRunning, "another QEMU");
        }
        Export::open(inner, id, disk)
    });
    let (view, size, knows) = opened.await.map_err(|e| ended(WHAT, e))?;
    let (world, witness) = (client.world.clone(), client.witness.clone());
    Ok(Arc::new(Source { world, witness, what: WHAT, size, knows_changes: knows && changes, view }))
}

/// What an image holds that nobody writes to.
pub(super) async fn image(client: &Client, image: &Layer) -> Result<Shown, SourceError> {
    const WHAT: &str = "read-image";
    let refused = |e: &dyn fmt::Display| ended(WHAT, e);
    let size = client.inspect(image).await.map_err(|e| refused(&e))?;
    let size = size.ok_or_else(|| refused(&"there is none"))?.virtual_size;
    let view = client.look(|inner| Ok(AtRest::open(inner, opened(image)?))).await;
    let view = view.map_err(|e| refused(&e))?.map_err(|e| refused(&e))?;
    let (world, witness) = (client.world.clone(), client.witness.clone());
    Ok(Arc::new(Source { world, witness, what: WHAT, size, knows_changes: false, view }))
}

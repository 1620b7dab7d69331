//! Reading an image back (`FORMAT.md`, §6): in the order of packs, 64 GiB of the image at a time.
//!
//! Every chunk is computed to the id that its node names, every node to that of its parent, the top and the size to the
//! root: what reached the sink has the root's content, byte for byte. A chunk that is bad or missing in every place ends the
//! reading; or, where that was asked for, is told by its range and left out.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;

use crate::blob::{BlobError, BlobType, Encoded};
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::BlobId;
use crate::index::run::Place;
use crate::keys::IdKeys;
use crate::leaves::leaves;
pub use crate::leaves::most;
use crate::manifest::Image;
use crate::tree::chunks;
use crate::vault::Vault;

/// Chunks that are put into the order of packs at once.
const WINDOW: u64 = 1 << 20;
/// The most bytes of a pack that are fetched at once.
const FETCH: u64 = 4 << 20;
/// Bytes between two blobs that are fetched along rather than asked for apart.
const GAP: u64 = 64 << 10;
/// Fetches in flight.
const IN_FLIGHT: usize = 4;
const LOOK_UPS: usize = 32;
/// Lost ranges that an error names.
const SHOWN: usize = 8;

/// Where an image is written to.
#[async_trait]
pub trait Sink: Send {
    /// Writes bytes at a place. Places come in any order, each once.
    async fn write(&mut self, offset: u64, bytes: Bytes) -> std::io::Result<()>;

    /// Makes a range zero; what was never written there may not be relied upon.
    async fn zero(&mut self, offset: u64, length: u64) -> std::io::Result<()>;
}

/// What a reading did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadReport {
    /// Bytes that were written.
    pub written: u64,
    /// Bytes that were made zero.
    pub zeroes: u64,
    /// Ranges that could not be written, in order; the sink still holds what it held.
    pub lost: Vec<Range<u64>>,
}

/// Chunks of one pack that are fetched together.
struct Piece {
    place: Place,
    range: Range<u64>,
    blobs: Vec<(Place, BlobId, Vec<u64>)>,
}

/// Reads an image into a sink. With `partial`, what is lost is told and left out; otherwise it is an error, after which the
/// sink holds a part.
///
/// # Errors
/// [`VaultError::Lost`], what the sink or the backend could not do.
pub async fn read_image(
    vault: &Vault,
    ids: &IdKeys,
    fetcher: &Fetcher,
    leaf_kind: BlobType,
    image: &Image,
    sink: &mut dyn Sink,
    partial: bool,
) -> Result<ReadReport, VaultError> {
    if !image.is_sound(ids, leaf_kind) {
        return Err(VaultError::damaged(image.root, "the root does not fit its image"));
    }
    let mut report = ReadReport::default();
    let total = chunks(image.size);
    let bytes_of = |range: Range<u64>| bytes_of(image.size, range);
    for start in (0..total).step_by(WINDOW as usize) {
        let window = start..(start + WINDOW).min(total);
        let leaves = leaves(fetcher, image.tree(), window.clone()).await?;
        let mut next = window.start;
        let mut filled: Vec<Range<u64>> = leaves.chunks.iter().map(|(at, _)| *at..at + 1).collect();
        filled.extend(leaves.lost.iter().cloned());
        filled.sort_by_key(|range| range.start);
        filled.push(window.end..window.end);
        for range in filled {
            if next < range.start {
                let zeroes = bytes_of(next..range.start);
                sink.zero(zeroes.start, zeroes.end - zeroes.start).await?;
                report.zeroes += zeroes.end - zeroes.start;
            }
            next = next.max(range.end);
        }
        report.lost.extend(leaves.lost.into_iter().map(bytes_of));
        read_chunks(vault, ids, fetcher, leaf_kind, image.size, leaves.chunks, sink, &mut report).await?;
        if !partial && !report.lost.is_empty() {
            let chunks = |range: &Range<u64>| (range.end - range.start).div_ceil(u64::from(CHUNK));
            let lost = report.lost.iter().map(chunks).sum();
            report.join();
            return Err(VaultError::Lost { lost, first: words(&report.lost) });
        }
    }
    report.join();
    Ok(report)
}

impl ReadReport {
    /// Puts what is lost into order, and neighbours together.
    fn join(&mut self) {
        self.lost.sort_by_key(|range| range.start);
        self.lost.dedup_by(|next, last| {
            let touches = last.end == next.start;
            if touches {
                last.end = next.end;
            }
            touches
        });
    }
}

/// Ranges of bytes, for people: the first of them, and how many more there are.
fn words(ranges: &[Range<u64>]) -> String {
    let shown = ranges.iter().take(SHOWN).map(|range| format!("{}..{}", range.start, range.end));
    let shown = shown.collect::<Vec<_>>().join(", ");
    match ranges.len().saturating_sub(SHOWN) {
        0 => format!("bytes {shown}"),
        more => format!("bytes {shown}, and {more} ranges more"),
    }
}

/// Reads chunks of an image of this size into a sink, in the order of packs. Those that are lost are told in the report.
///
/// # Errors
/// What the sink or the backend could not do.
#[expect(clippy::too_many_arguments, reason = "what is read, of what, and where it goes")]
pub(crate) async fn read_chunks(
    vault: &Vault,
    ids: &IdKeys,
    fetcher: &Fetcher,
    leaf_kind: BlobType,
    size: u64,
    chunks: Vec<(u64, BlobId)>,
    sink: &mut dyn Sink,
    report: &mut ReadReport,
) -> Result<(), VaultError> {
    let (pieces, mut alone) = plan(fetcher, leaf_kind, chunks).await?;
    let mut reading = futures_util::stream::iter(pieces)
        .map(|piece| fetch(vault, ids, leaf_kind, piece))
        .buffer_unordered(IN_FLIGHT);
    while let Some(read) = reading.next().await {
        for (id, at, plain) in read? {
            match plain {
                Ok(plain) => write(sink, report, size, plain, &at).await?,
                Err(_) => alone.push((id, at)),
            }
        }
    }
    drop(reading);
    // What is bad at its first place has all its places tried.
    for (id, at) in alone {
        match fetcher.chunk(leaf_kind, id).await {
            Ok(plain) => write(sink, report, size, plain.into(), &at).await?,
            Err(VaultError::Lost { .. }) => {
                report.lost.extend(at.iter().map(|at| bytes_of(size, *at..at + 1)));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The bytes of chunks, up to the image's size.
pub(crate) fn bytes_of(size: u64, chunks: Range<u64>) -> Range<u64> {
    let edge = |chunk: u64| chunk.saturating_mul(u64::from(CHUNK)).min(size);
    edge(chunks.start)..edge(chunks.end)
}

async fn write(
    sink: &mut dyn Sink,
    report: &mut ReadReport,
    size: u64,
    plain: Bytes,
    at: &[u64],
) -> Result<(), VaultError> {
    for chunk in at {
        let offset = chunk * u64::from(CHUNK);
        let length = (size - offset).min(plain.len() as u64);
        sink.write(offset, plain.slice(..length as usize)).await?;
        report.written += length;
    }
    Ok(())
}

/// Chunks without a place, with where they belong.
type Alone = Vec<(BlobId, Vec<u64>)>;

/// Puts chunks into the order of packs, those that lie near each other together.
async fn plan(
    fetcher: &Fetcher,
    kind: BlobType,
    mut chunks: Vec<(u64, BlobId)>,
) -> Result<(Vec<Piece>, Alone), VaultError> {
    chunks.sort_by_key(|(at, id)| (*id, *at));
    let mut wanted: Alone = Vec::new();
    for (at, id) in chunks {
        match wanted.last_mut() {
            Some((last, places)) if *last == id => places.push(at),
            _ => wanted.push((id, vec![at])),
        }
    }
    let wanted = wanted
        .into_iter()
        .map(|(id, at)| async move { Ok::<_, VaultError>((fetcher.index().find(kind, id).await?, id, at)) });
    let mut looked_up = futures_util::stream::iter(wanted).buffer_unordered(LOOK_UPS);
    let (mut found, mut alone) = (Vec::new(), Vec::new());
    while let Some(one) = looked_up.next().await {
        let (places, id, at) = one?;
        match places.first() {
            Some(first) => found.push((first.place, id, at)),
            None => alone.push((id, at)),
        }
    }
    found.sort_by_key(|(place, ..)| (place.pack, place.offset));
    let mut pieces: Vec<Piece> = Vec::new();
    for (place, id, at) in found {
        let range = place.range();
        match pieces.last_mut() {
            Some(last)
                if last.place.pack == place.pack
                    && range.start <= last.range.end + GAP
                    && range.end - last.range.start <= FETCH =>
            {
                last.range.end = last.range.end.max(range.end);
                last.blobs.push((place, id, at));
            }
            _ => pieces.push(Piece { place, range, blobs: vec![(place, id, at)] }),
        }
    }
    Ok((pieces, alone))
}

type Read = Vec<(BlobId, Vec<u64>, Result<Bytes, BlobError>)>;

async fn fetch(vault: &Vault, ids: &IdKeys, kind: BlobType, piece: Piece) -> Result<Read, VaultError> {
    let bytes = vault.backend().get(&piece.place.object().to_string(), Some(piece.range.clone())).await?;
    let (keys, ids) = (vault.keys().clone(), Arc::new(ids.clone()));
    let open = move || {
        let open = |(place, id, at): (Place, BlobId, Vec<u64>)| {
            let plain = bytes
                .as_ref()
                .and_then(|bytes| bytes.get((u64::from(place.offset) - piece.range.start) as usize..))
                .ok_or(BlobError::Header)
                .and_then(|bytes| Encoded::parse(&keys, place.pack, place.offset, bytes))
                .and_then(|blob| blob.open_checked(&keys, &ids, kind, id))
                .map(Bytes::from);
            (id, at, plain)
        };
        piece.blobs.into_iter().map(open).collect()
    };
    Ok(crate::tasks::blocking(open).await?)
}

//! The chunks of an image, window by window; and which of them another image has too.
//!
//! Equal ids are equal content, so a subtree that both have is never read. Two trees may differ in height: what stands at a
//! place of one is looked for at the same place of the other, below a top that would be higher, or above one that is lower.

use std::ops::Range;
use std::sync::Arc;

use futures_util::StreamExt;

use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::ids::BlobId;
use crate::manifest::Image;
use crate::node::{Node, SLOTS};
use crate::read::bytes_of;
use crate::tree::{Tree, chunks, span, top_level, unchanged_to};

/// Nodes that are read at once.
const AT_ONCE: usize = 32;

/// The ids of chunks in a range of an image, and subtrees that could not be read. What is in none of them is zero.
#[derive(Debug, Default)]
pub(crate) struct Leaves {
    /// Chunks that are not zero, ascending.
    pub(crate) chunks: Vec<(u64, BlobId)>,
    /// Ranges of chunks whose node is lost, ascending.
    pub(crate) lost: Vec<Range<u64>>,
    /// Ranges of chunks that the other image has as well, ascending; zeroes may be among them.
    pub(crate) same: Vec<Range<u64>>,
}

/// Another image of the same vault, to compare with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside<'a> {
    /// Its tree.
    pub(crate) tree: Tree,
    /// Ranges of chunks that are told as if it did not have them, ascending.
    pub(crate) but: &'a [Range<u64>],
}

/// What the other image has at a place.
#[derive(Clone, Copy)]
enum Other {
    /// Nobody knows.
    Unknown,
    /// This node or chunk.
    Is(BlobId),
    /// Its top, some levels below in the first slots, and zeroes beside it.
    Below,
}

/// The chunks of an image within a range of chunks.
///
/// # Errors
/// What the backend could not do.
pub(crate) async fn leaves(fetcher: &Fetcher, tree: Tree, window: Range<u64>) -> Result<Leaves, VaultError> {
    leaves_beside(fetcher, tree, None, window).await
}

/// The chunks of an image within a range of chunks, without those that another image has at the same place.
///
/// A node of the other that cannot be read makes what is below it unknown, which costs reading it.
///
/// # Errors
/// What the backend could not do.
pub(crate) async fn leaves_beside(
    fetcher: &Fetcher,
    tree: Tree,
    beside: Option<Beside<'_>>,
    window: Range<u64>,
) -> Result<Leaves, VaultError> {
    let mut found = Leaves::default();
    let end = window.end.min(chunks(tree.size));
    let top = top_level(tree.size);
    let (limit, but) = match beside {
        None => (0, &[][..]),
        Some(beside) => (unchanged_to(beside.tree, tree.size), beside.but),
    };
    let other_level = beside.map_or(0, |beside| top_level(beside.tree.size));
    let other = match beside {
        None => Other::Unknown,
        Some(beside) => at_level(fetcher, beside.tree, top).await?,
    };
    // Depth first, from the last slot, so that the first is taken next.
    let mut todo = vec![(top, 0_u64, tree.top, other)];
    while let Some((level, first, id, other)) = todo.pop() {
        let covers = first..first.saturating_add(span(level).saturating_mul(SLOTS as u64));
        if covers.end <= window.start || covers.start >= end {
            continue;
        }
        let shown = covers.start.max(window.start)..covers.end.min(end);
        if matches!(other, Other::Is(other) if other == id) && is_same(&shown, limit, but) {
            extend(&mut found.same, shown);
            continue;
        }
        if id.is_zero() {
            continue;
        }
        let Some(node) = read(fetcher, level, id).await? else {
            found.lost.push(shown);
            continue;
        };
        let others = match other {
            Other::Is(other) if !other.is_zero() => match read(fetcher, level, other).await? {
                Some(node) => Slots::Are(node),
                None => Slots::Unknown,
            },
            Other::Is(_) => Slots::Zero,
            Other::Below => Slots::Below,
            Other::Unknown => Slots::Unknown,
        };
        let other_at = |at: usize| match &others {
            Slots::Are(node) => Other::Is(node.slots[at]),
            Slots::Zero => Other::Is(BlobId::ZERO),
            Slots::Unknown => Other::Unknown,
            Slots::Below if at > 0 => Other::Is(BlobId::ZERO),
            Slots::Below if level == other_level + 1 => {
                beside.map_or(Other::Unknown, |beside| Other::Is(beside.tree.top))
            }
            Slots::Below => Other::Below,
        };
        if level > 0 {
            for (at, slot) in node.slots.iter().enumerate().rev() {
                todo.push((level - 1, first + at as u64 * span(level), *slot, other_at(at)));
            }
            continue;
        }
        for (at, slot) in node.slots.iter().enumerate() {
            let place = first + at as u64;
            if !shown.contains(&place) {
                continue;
            }
            let both = matches!(other_at(at), Other::Is(other) if other == *slot);
            if both && is_same(&(place..place + 1), limit, but) {
                extend(&mut found.same, place..place + 1);
            } else if !slot.is_zero() {
                found.chunks.push((place, *slot));
            }
        }
    }
    Ok(found)
}

/// At most how many bytes of an image are not zero. Told by the nodes above the lowest ones alone, so it is cheap, and counts
/// whole what a lowest node covers: 4 MiB. What cannot be read counts whole as well.
///
/// # Errors
/// What the backend could not do.
pub async fn most(fetcher: &Fetcher, image: &Image) -> Result<u64, VaultError> {
    let tree = image.tree();
    let mut level = top_level(tree.size);
    let covered = |level: u8, first: u64| {
        let below = span(level).saturating_mul(SLOTS as u64);
        let bytes = bytes_of(tree.size, first..first.saturating_add(below));
        bytes.end - bytes.start
    };
    let mut most = 0;
    let mut places = if tree.top.is_zero() { Vec::new() } else { vec![(0_u64, tree.top)] };
    while level > 0 && !places.is_empty() {
        let nodes = places
            .into_iter()
            .map(|(first, id)| async move { Ok::<_, VaultError>((first, read(fetcher, level, id).await?)) });
        let mut nodes = futures_util::stream::iter(nodes).buffer_unordered(AT_ONCE);
        let mut below = Vec::new();
        while let Some(one) = nodes.next().await {
            match one? {
                (first, Some(node)) => {
                    let slots = node.slots.iter().enumerate().filter(|(_, slot)| !slot.is_zero());
                    below.extend(slots.map(|(at, slot)| (first + at as u64 * span(level), *slot)));
                }
                (first, None) => most += covered(level, first),
            }
        }
        drop(nodes);
        places = below;
        level -= 1;
    }
    Ok(most + places.iter().map(|(first, _)| covered(0, *first)).sum::<u64>())
}

/// The other's slots beside a node's.
enum Slots {
    Unknown,
    Zero,
    Below,
    Are(Arc<Node>),
}

/// What stands where the other tree would have its top if it were of this height.
async fn at_level(fetcher: &Fetcher, tree: Tree, level: u8) -> Result<Other, VaultError> {
    let own = top_level(tree.size);
    if own < level {
        return Ok(Other::Below);
    }
    let mut id = tree.top;
    for level in (level + 1..=own).rev() {
        if id.is_zero() {
            break;
        }
        let Some(node) = read(fetcher, level, id).await? else { return Ok(Other::Unknown) };
        id = node.slots[0];
    }
    Ok(Other::Is(id))
}

async fn read(fetcher: &Fetcher, level: u8, id: BlobId) -> Result<Option<Arc<Node>>, VaultError> {
    match fetcher.stored_node(level, id).await {
        Ok(stored) => Ok(Some(stored.node)),
        Err(VaultError::Lost { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether equal ids may be told as the same for all these chunks.
fn is_same(range: &Range<u64>, limit: u64, but: &[Range<u64>]) -> bool {
    let next = but.partition_point(|one| one.end <= range.start);
    range.end <= limit && but.get(next).is_none_or(|one| one.start >= range.end)
}

fn extend(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::CHUNK;
    use crate::testing::{Bench, C, noise};
    use crate::write::Extent;

    #[tokio::test]
    async fn what_an_image_takes_at_most_is_told_to_4_mib_and_never_too_low() {
        let bench = Bench::new(true).await;
        let low = 64 * u64::from(CHUNK);
        let far = 300 << 30;
        let chunk = || Extent::Data(noise(1, C).into());
        for (parts, wanted) in [
            (vec![Extent::Zero(far)], 0),
            (vec![chunk()], u64::from(CHUNK)),
            // The last node covers what there is left of the image: a chunk of zeroes, and that one.
            (vec![chunk(), Extent::Zero(far), chunk()], low + 2 * u64::from(CHUNK)),
            (vec![Extent::Zero(far), chunk(), Extent::Zero(far)], low),
        ] {
            let size: u64 = parts.iter().map(Extent::len).sum();
            let (backup, _) = Box::pin(bench.backup(size as usize, parts, None)).await;
            let image = bench.manifest(backup).await.disks[0].image;
            assert_eq!(most(&bench.fetcher().await, &image).await.unwrap(), wanted);
        }
    }
}

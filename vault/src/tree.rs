//! The tree of an image or stream: its form, and how a new one is made from a parent's (`FORMAT.md`, §3 and §5.5).
//!
//! The form depends on the size alone: the fewest levels that hold it, and nothing beyond it. So the same content has the
//! same root, however the image grew or shrank, and a node of a level and place stands for the same chunks in every tree.
//!
//! A [`TreeWriter`] is told, in ascending order, what differs from the parent. It holds the nodes between the top and the
//! place that it is at, and nothing else: time and memory go with what differs. A node is finished when the place has left
//! it, so finished nodes come bottom up. What was never spoken of stays what the parent has there; with no parent, zero.

use std::sync::Arc;

use async_trait::async_trait;

use crate::blob::BlobType;
use crate::error::VaultError;
use crate::header::CHUNK;
use crate::ids::BlobId;
use crate::keys::IdKeys;
use crate::node::{Node, SLOTS};

/// Chunks of an image of this size.
#[must_use]
pub fn chunks(size: u64) -> u64 {
    size.div_ceil(u64::from(CHUNK))
}

/// Chunks below a slot of a node of this level.
#[must_use]
pub fn span(level: u8) -> u64 {
    1 << (6 * u32::from(level))
}

/// The level of the topmost node.
#[must_use]
pub fn top_level(size: u64) -> u8 {
    let chunks = chunks(size);
    (0..BlobType::MAX_LEVEL).find(|level| span(level + 1) >= chunks).unwrap_or(BlobType::MAX_LEVEL)
}

/// The first chunk of an image of this size that can not be said to be what a parent has there: sizes that differ leave the
/// chunk that the smaller one ends in to be read.
#[must_use]
pub fn unchanged_to(parent: Tree, size: u64) -> u64 {
    if parent.size == size { chunks(size) } else { parent.size.min(size) / u64::from(CHUNK) }
}

/// A tree that is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Bytes of the image or stream.
    pub size: u64,
    /// The topmost node; zero if everything is.
    pub top: BlobId,
}

/// A node that was read, and how it is stored.
#[derive(Clone, Debug)]
pub struct StoredNode {
    /// Its id.
    pub id: BlobId,
    /// The node.
    pub node: Arc<Node>,
    /// The full node that it is stored as a patch of; none if it is stored full.
    pub base: Option<(BlobId, Arc<Node>)>,
}

impl StoredNode {
    /// The full node that a patch of this one, or of its base, is made of.
    #[must_use]
    pub fn full(&self) -> (BlobId, &Arc<Node>) {
        self.base.as_ref().map_or((self.id, &self.node), |(id, node)| (*id, node))
    }
}

/// Where stored nodes are read.
#[async_trait]
pub trait NodeSource: Send + Sync {
    /// A node, checked against its id.
    async fn node(&self, level: u8, id: BlobId) -> Result<StoredNode, VaultError>;
}

/// A node that is finished, and differs from the parent's at its place.
#[derive(Debug)]
pub struct Finished {
    /// Its id.
    pub id: BlobId,
    /// The node.
    pub node: Node,
    /// The parent's node at the same place.
    pub before: Option<StoredNode>,
}

struct Open {
    index: u64,
    node: Node,
    before: Option<StoredNode>,
}

/// Makes a tree from a parent's and what differs.
pub struct TreeWriter<'a> {
    ids: IdKeys,
    source: &'a dyn NodeSource,
    size: u64,
    top_level: u8,
    parent: Option<Tree>,
    path: Vec<Option<Open>>,
    at: u64,
    top: Option<BlobId>,
    finished: Vec<Finished>,
}

impl<'a> TreeWriter<'a> {
    /// A tree of this size that is, so far, what the parent's is up to that size.
    #[must_use]
    pub fn new(ids: IdKeys, source: &'a dyn NodeSource, size: u64, parent: Option<Tree>) -> Self {
        let top_level = top_level(size);
        let path = (0..=top_level).map(|_| None).collect();
        Self { ids, source, size, top_level, parent, path, at: 0, top: None, finished: Vec::new() }
    }

    /// What is at a chunk's place now.
    ///
    /// # Errors
    /// If a node of the parent's cannot be read, or the place lies before one that was spoken of.
    pub async fn leaf(&mut self, chunk: u64) -> Result<BlobId, VaultError> {
        self.advance(chunk, 1)?;
        let node = self.open(0, chunk / SLOTS as u64).await?;
        Ok(node.slots[(chunk % SLOTS as u64) as usize])
    }

    /// Puts a chunk at its place; zero if it is.
    ///
    /// # Errors
    /// As [`Self::leaf`].
    pub async fn set(&mut self, chunk: u64, id: BlobId) -> Result<(), VaultError> {
        self.advance(chunk, 1)?;
        let node = self.open(0, chunk / SLOTS as u64).await?;
        node.slots[(chunk % SLOTS as u64) as usize] = id;
        self.at = chunk + 1;
        Ok(())
    }

    /// Makes chunks zero: whole subtrees at once.
    ///
    /// # Errors
    /// As [`Self::leaf`].
    pub async fn zero(&mut self, chunk: u64, count: u64) -> Result<(), VaultError> {
        self.advance(chunk, count)?;
        self.at = chunk + count;
        self.fill_zero(chunk, chunk + count).await
    }

    async fn fill_zero(&mut self, mut from: u64, to: u64) -> Result<(), VaultError> {
        while from < to {
            let fits = |level: &u8| from.is_multiple_of(span(*level)) && from + span(*level) <= to;
            let level = (0..=self.top_level).rev().find(fits).unwrap_or(0);
            let slot = (from / span(level)) % SLOTS as u64;
            let node = self.open(level, from / span(level) / SLOTS as u64).await?;
            node.slots[slot as usize] = BlobId::ZERO;
            from += span(level);
        }
        Ok(())
    }

    /// Nodes that were finished since the last call, bottom up.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        std::mem::take(&mut self.finished)
    }

    /// The tree. The last finished nodes are to be taken after it.
    ///
    /// # Errors
    /// If a node of the parent's cannot be read.
    pub async fn finish(&mut self) -> Result<Tree, VaultError> {
        if let Some(parent) = self.parent {
            if parent.size > self.size {
                // Nothing stays beyond the size, also not in the node that the size ends in.
                self.fill_zero(chunks(self.size), span(self.top_level) * SLOTS as u64).await?;
            }
            if top_level(parent.size) != self.top_level {
                self.open(self.top_level, 0).await?;
            } else if self.path.iter().all(Option::is_none) {
                return Ok(Tree { size: self.size, top: parent.top });
            }
        }
        (0..=self.top_level).for_each(|level| self.close(level));
        Ok(Tree { size: self.size, top: self.top.unwrap_or(BlobId::ZERO) })
    }

    fn advance(&mut self, chunk: u64, count: u64) -> Result<(), VaultError> {
        let end = chunk.checked_add(count).filter(|end| *end <= chunks(self.size));
        match end {
            Some(_) if chunk >= self.at => {
                self.at = chunk;
                Ok(())
            }
            _ => Err(VaultError::Contract(format!(
                "chunk {chunk} comes out of order, or lies beyond the size"
            ))),
        }
    }

    /// The node of a level and place, with all above it; those that are left are finished.
    async fn open(&mut self, level: u8, index: u64) -> Result<&mut Node, VaultError> {
        let index_at = |above: u8| index >> (6 * u32::from(above - level));
        let stays =
            |at: &u8| self.path[usize::from(*at)].as_ref().is_some_and(|open| open.index == index_at(*at));
        // From the top down, the first that is another one.
        let first = (level..=self.top_level).rev().find(|at| !stays(at));
        if let Some(first) = first {
            (0..=first).for_each(|at| self.close(at));
            for at in (level..=first).rev() {
                let open = self.load(at, index_at(at)).await?;
                self.path[usize::from(at)] = Some(open);
            }
        } else {
            // What lies below stays open: the same place is spoken of again only further on.
            (0..level).for_each(|at| self.close(at));
        }
        match &mut self.path[usize::from(level)] {
            Some(open) => Ok(&mut open.node),
            None => Err(VaultError::Contract("a node that was opened is not open".into())),
        }
    }

    async fn load(&self, level: u8, index: u64) -> Result<Open, VaultError> {
        let empty = || Open { index, node: Node::empty(level), before: None };
        let id = if level == self.top_level {
            let Some(parent) = self.parent else { return Ok(empty()) };
            match self.top_of(parent).await? {
                Top::Stored(id) => id,
                Top::Grown(below) => {
                    let mut open = empty();
                    open.node.slots[0] = below;
                    return Ok(open);
                }
            }
        } else {
            let above = self.path[usize::from(level) + 1].as_ref();
            above.map_or(BlobId::ZERO, |open| open.node.slots[(index % SLOTS as u64) as usize])
        };
        if id.is_zero() {
            return Ok(empty());
        }
        if let Some(below) = self.grown(level, id) {
            let mut open = empty();
            open.node.slots[0] = below;
            return Ok(open);
        }
        let stored = self.source.node(level, id).await?;
        Ok(Open { index, node: Node::clone(&stored.node), before: Some(stored) })
    }

    /// What the parent has at the place of the new top.
    async fn top_of(&self, parent: Tree) -> Result<Top, VaultError> {
        let parent_level = top_level(parent.size);
        if parent_level < self.top_level {
            // Every level between is a node whose first slot leads to the parent's top; the id of a level that was never
            // stored is not known before it is closed, so the parent's top stands for it on the way down.
            return Ok(Top::Grown(parent.top));
        }
        let mut id = parent.top;
        for level in (self.top_level + 1..=parent_level).rev() {
            if id.is_zero() {
                break;
            }
            id = self.source.node(level, id).await?.node.slots[0];
        }
        Ok(Top::Stored(id))
    }

    /// Whether this id, at this level, is the parent's top standing for a level above it that never was.
    fn grown(&self, level: u8, id: BlobId) -> Option<BlobId> {
        let parent = self.parent?;
        (level > top_level(parent.size) && id == parent.top).then_some(id)
    }

    fn close(&mut self, level: u8) {
        let Some(mut open) = self.path[usize::from(level)].take() else { return };
        self.settle_grown(&mut open);
        let id = if open.node.is_zero() { BlobId::ZERO } else { open.node.id(&self.ids) };
        let before = open.before.as_ref().map_or(BlobId::ZERO, |stored| stored.id);
        if id != before && !id.is_zero() {
            self.finished.push(Finished { id, node: open.node, before: open.before });
        }
        match self.path.get_mut(usize::from(level) + 1) {
            Some(Some(above)) => above.node.slots[(open.index % SLOTS as u64) as usize] = id,
            _ => self.top = Some(id),
        }
    }

    /// A node above the parent's top whose way down was never opened: makes the levels between.
    fn settle_grown(&mut self, open: &mut Open) {
        let Some(parent) = self.parent else { return };
        let parent_level = top_level(parent.size);
        let first = open.node.slots[0];
        let level = open.node.level;
        if open.index != 0 || level <= parent_level + 1 || first != parent.top || first.is_zero() {
            return;
        }
        let mut below = first;
        for between in parent_level + 1..level {
            let mut node = Node::empty(between);
            node.slots[0] = below;
            below = node.id(&self.ids);
            self.finished.push(Finished { id: below, node, before: None });
        }
        open.node.slots[0] = below;
    }
}

enum Top {
    Stored(BlobId),
    Grown(BlobId),
}

#[cfg(test)]
pub(crate) mod tests;

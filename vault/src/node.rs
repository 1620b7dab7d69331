//! A tree node, stored full or as a patch of another (`FORMAT.md`, §3).
//!
//! Full: its level, then 64 slots of 32 bytes; all zero means that everything below is zero. A patch: the id of a node that
//! is stored full, and 1 to 16 pairs of slot and id, in the order of slots. Either has the id of the node that results.

use crate::blob::{BlobError, BlobType};
use crate::envelope::fixed;
use crate::ids::BlobId;
use crate::keys::IdKeys;

/// Slots of a node.
pub const SLOTS: usize = 64;
/// Bytes of a full one.
pub const SIZE: usize = 1 + SLOTS * 32;
/// The most pairs of a patch.
pub const MOST_PAIRS: usize = 16;
const PAIR: usize = 33;

/// A node.
#[derive(Clone, PartialEq, Eq)]
pub struct Node {
    /// Its level: 0 is just above the chunks.
    pub level: u8,
    /// What is below.
    pub slots: Box<[BlobId; SLOTS]>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let used = self.slots.iter().filter(|slot| !slot.is_zero()).count();
        write!(f, "Node(level {}, {used} used)", self.level)
    }
}

/// What differs from a full node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The full node.
    pub base: BlobId,
    /// Slots, and what is in them instead.
    pub pairs: Vec<(u8, BlobId)>,
}

impl Node {
    /// One that is all zero.
    #[must_use]
    pub fn empty(level: u8) -> Self {
        Self { level, slots: Box::new([BlobId::ZERO; SLOTS]) }
    }

    /// Whether everything below is zero: such a node is never stored.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.slots.iter().all(BlobId::is_zero)
    }

    /// Its plain bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SIZE);
        bytes.push(self.level);
        self.slots.iter().for_each(|slot| bytes.extend_from_slice(slot.bytes()));
        bytes
    }

    /// From its plain bytes.
    ///
    /// # Errors
    /// If they are no node of this level, or one of zeroes, which is never stored.
    pub fn decode(level: u8, bytes: &[u8]) -> Result<Self, BlobError> {
        if bytes.len() != SIZE || bytes[0] != level || level > BlobType::MAX_LEVEL {
            return Err(BlobError::Node);
        }
        let mut node = Self::empty(level);
        for (slot, bytes) in node.slots.iter_mut().zip(bytes[1..].chunks_exact(32)) {
            *slot = BlobId::new(fixed(bytes));
        }
        if node.is_zero() { Err(BlobError::Node) } else { Ok(node) }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self, ids: &IdKeys) -> BlobId {
        ids.id(BlobType::Node(self.level), &self.encode())
    }

    /// The patch that makes this of a full node, if it is a small one.
    #[must_use]
    pub fn patch_of(&self, base_id: BlobId, base: &Self) -> Option<Patch> {
        let differs =
            |(at, (new, old)): (usize, (&BlobId, &BlobId))| (new != old).then_some((at as u8, *new));
        let pairs: Vec<_> =
            self.slots.iter().zip(base.slots.iter()).enumerate().filter_map(differs).collect();
        let fits = self.level == base.level && !pairs.is_empty() && pairs.len() <= MOST_PAIRS;
        fits.then_some(Patch { base: base_id, pairs })
    }
}

impl Patch {
    /// Its plain bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32 + self.pairs.len() * PAIR);
        bytes.extend_from_slice(self.base.bytes());
        for (slot, id) in &self.pairs {
            bytes.push(*slot);
            bytes.extend_from_slice(id.bytes());
        }
        bytes
    }

    /// From its plain bytes.
    ///
    /// # Errors
    /// If they are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, BlobError> {
        let (base, rest) = bytes.split_first_chunk::<32>().ok_or(BlobError::Node)?;
        let pairs: Vec<(u8, BlobId)> =
            rest.chunks_exact(PAIR).map(|pair| (pair[0], BlobId::new(fixed(&pair[1..])))).collect();
        let sorted = pairs.windows(2).all(|two| two[0].0 < two[1].0);
        let inside = pairs.last().is_some_and(|(slot, _)| usize::from(*slot) < SLOTS);
        if rest.len() % PAIR != 0 || pairs.len() > MOST_PAIRS || !sorted || !inside {
            return Err(BlobError::Node);
        }
        Ok(Self { base: BlobId::new(*base), pairs })
    }

    /// The node that results.
    #[must_use]
    pub fn apply(&self, base: &Node) -> Node {
        let mut node = base.clone();
        for (slot, id) in &self.pairs {
            node.slots[usize::from(*slot) % SLOTS] = *id;
        }
        node
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(level: u8, seed: u8) -> Node {
        Node { level, slots: Box::new(std::array::from_fn(|at| BlobId::new([seed ^ at as u8; 32]))) }
    }

    #[test]
    fn nodes_and_patches_come_back() {
        let base = node(3, 0x80);
        assert_eq!(Node::decode(3, &base.encode()).unwrap(), base);
        let mut next = base.clone();
        for at in 0..MOST_PAIRS {
            next.slots[at * 4] = if at == 0 { BlobId::ZERO } else { BlobId::new([at as u8; 32]) };
        }
        let patch = next.patch_of(BlobId::new([1; 32]), &base).unwrap();
        assert_eq!(patch.pairs.len(), MOST_PAIRS);
        assert_eq!(Patch::decode(&patch.encode()).unwrap(), patch);
        assert_eq!(patch.apply(&base), next);
        next.slots[1] = BlobId::ZERO;
        assert_eq!(next.patch_of(BlobId::new([1; 32]), &base), None, "17 pairs are too many");
        assert_eq!(base.patch_of(BlobId::new([1; 32]), &base), None, "the same node is no patch");
        assert_eq!(node(2, 1).patch_of(BlobId::new([1; 32]), &node(3, 1)), None);
    }

    #[test]
    fn what_is_no_node_or_patch_is_refused() {
        let bytes = node(3, 0x80).encode();
        (0..SIZE).for_each(|at| assert!(Node::decode(3, &bytes[..at]).is_err()));
        assert!(Node::decode(2, &bytes).is_err());
        assert!(Node::decode(3, &Node::empty(3).encode()).is_err());
        let pairs = |slots: &[u8]| Patch {
            base: BlobId::new([1; 32]),
            pairs: slots.iter().map(|slot| (*slot, BlobId::new([2; 32]))).collect(),
        };
        let whole = pairs(&[1, 5, 63]).encode();
        for at in 0..whole.len() {
            let whole_pairs = at > 32 && (at - 32) % PAIR == 0;
            assert_eq!(Patch::decode(&whole[..at]).is_ok(), whole_pairs, "cut at {at}");
        }
        for wrong in [&[][..], &[64], &[5, 5], &[6, 5], &std::array::from_fn::<u8, 17, _>(|at| at as u8)] {
            assert!(Patch::decode(&pairs(wrong).encode()).is_err(), "{wrong:?}");
        }
    }
}

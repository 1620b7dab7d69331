//! A filter in memory that knows most ids that a run does not have: a Bloom filter. Ids are hashes already, so its places
//! are taken from them as they are.

use crate::envelope::fixed;
use crate::ids::BlobId;

/// Bytes that all filters together may take.
pub const BUDGET: u64 = 64 << 20;
const MOST_BITS: u64 = 10;

/// What a run may have.
#[derive(Debug)]
pub struct Filter {
    words: Vec<u64>,
    hashes: u32,
}

/// Bits for each id, so that all ids of an index fit into the budget.
#[must_use]
pub fn bits_per_id(ids_of_the_index: u64) -> u64 {
    (BUDGET * 8 / ids_of_the_index.max(1)).clamp(1, MOST_BITS)
}

impl Filter {
    /// For this many ids.
    #[must_use]
    pub fn new(ids: u64, bits_per_id: u64) -> Self {
        let words = (ids * bits_per_id).div_ceil(64).max(1);
        // The best number of hashes is ln 2 of the bits for each id.
        let hashes = (bits_per_id as f64 * std::f64::consts::LN_2).round().max(1.0) as u32;
        Self { words: vec![0; words as usize], hashes }
    }

    fn places(&self, id: &BlobId) -> impl Iterator<Item = (usize, u64)> + use<> {
        let (first, step) =
            (u64::from_le_bytes(fixed(&id.bytes()[8..16])), u64::from_le_bytes(fixed(&id.bytes()[16..24])));
        let bits = self.words.len() as u64 * 64;
        (0..u64::from(self.hashes)).map(move |n| {
            let bit = first.wrapping_add(n.wrapping_mul(step | 1)) % bits;
            ((bit / 64) as usize, 1 << (bit % 64))
        })
    }

    /// Takes an id in.
    pub fn insert(&mut self, id: &BlobId) {
        for (word, bit) in self.places(id) {
            self.words[word] |= bit;
        }
    }

    /// Whether it may have been taken in; never wrong when it says no.
    #[must_use]
    pub fn may_have(&self, id: &BlobId) -> bool {
        self.places(id).all(|(word, bit)| self.words[word] & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(seed: u64) -> BlobId {
        BlobId::new(*blake3::hash(&seed.to_le_bytes()).as_bytes())
    }

    #[test]
    fn it_never_denies_what_it_took_in_and_passes_few_others() {
        for (bits, most) in [(10, 20), (6, 80)] {
            let mut filter = Filter::new(20_000, bits);
            (0..20_000).for_each(|seed| filter.insert(&id(seed)));
            assert!((0..20_000).all(|seed| filter.may_have(&id(seed))));
            let wrong = (20_000..40_000).filter(|seed| filter.may_have(&id(*seed))).count();
            assert!(wrong < 20 * most, "{wrong} of 20000 with {bits} bits");
        }
    }

    #[test]
    fn eighty_million_ids_fit_into_the_budget() {
        assert_eq!(bits_per_id(80_000_000), 6);
        assert_eq!(bits_per_id(0), MOST_BITS);
        assert!(80_000_000 * bits_per_id(80_000_000) / 8 <= BUDGET);
    }
}

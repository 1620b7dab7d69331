use std::collections::HashMap;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::ids::VaultId;
use crate::keys::{Keys, Root};

/// Nodes in memory, and how many were read.
#[derive(Default)]
pub(crate) struct Shelf {
    nodes: Mutex<HashMap<(u8, BlobId), Arc<Node>>>,
    reads: Mutex<usize>,
}

impl Shelf {
    fn keep(&self, finished: Vec<Finished>) -> usize {
        let mut nodes = self.nodes.lock().unwrap();
        let count = finished.len();
        for one in finished {
            assert!(!one.node.is_zero());
            for slot in one.node.slots.iter().filter(|slot| !slot.is_zero()) {
                let known = one.node.level == 0 || nodes.contains_key(&(one.node.level - 1, *slot));
                assert!(known, "children are finished before their parents");
            }
            nodes.insert((one.node.level, one.id), Arc::new(one.node));
        }
        count
    }

    fn leaves(&self, tree: Tree) -> HashMap<u64, BlobId> {
        let mut found = HashMap::new();
        let mut todo = vec![(top_level(tree.size), 0, tree.top)];
        while let Some((level, index, id)) = todo.pop() {
            if id.is_zero() {
                continue;
            }
            let node = self.nodes.lock().unwrap()[&(level, id)].clone();
            for (at, slot) in node.slots.iter().enumerate().filter(|(_, slot)| !slot.is_zero()) {
                let place = index * 64 + at as u64;
                match level {
                    0 => {
                        found.insert(place, *slot);
                    }
                    _ => todo.push((level - 1, place, *slot)),
                }
            }
        }
        found
    }
}

#[async_trait]
impl NodeSource for Shelf {
    async fn node(&self, level: u8, id: BlobId) -> Result<StoredNode, VaultError> {
        *self.reads.lock().unwrap() += 1;
        let node = self.nodes.lock().unwrap().get(&(level, id)).cloned();
        let node =
            node.ok_or_else(|| VaultError::Missing { object: format!("node {id} of level {level}") })?;
        Ok(StoredNode { id, node, base: None })
    }
}

fn ids() -> IdKeys {
    Keys::new(VaultId::new([1; 16]), Root::None).ids(None)
}

fn id(seed: u64) -> BlobId {
    BlobId::new(*blake3::hash(&seed.to_le_bytes()).as_bytes())
}

async fn full(shelf: &Shelf, size: u64, leaves: &HashMap<u64, BlobId>) -> Tree {
    let mut writer = TreeWriter::new(ids(), shelf, size, None);
    let mut places: Vec<_> = leaves.iter().collect();
    places.sort();
    for (place, leaf) in places {
        writer.set(*place, *leaf).await.unwrap();
    }
    let tree = writer.finish().await.unwrap();
    shelf.keep(writer.take_finished());
    tree
}

#[test]
fn a_tree_has_the_fewest_levels_that_hold_the_size() {
    let chunk = u64::from(CHUNK);
    let cases =
        [(0, 0), (1, 0), (64 * chunk, 0), (64 * chunk + 1, 1), (4096 * chunk, 1), (4096 * chunk + 1, 2)];
    for (size, level) in cases {
        assert_eq!(top_level(size), level, "{size}");
    }
    assert_eq!(top_level(u64::MAX), BlobType::MAX_LEVEL);
    assert!(span(BlobType::MAX_LEVEL) as u128 * 64 * chunk as u128 > u64::MAX as u128);
}

#[tokio::test]
async fn zeroes_have_no_nodes_and_a_change_touches_one_node_of_each_level() {
    let (shelf, size) = (Shelf::default(), 1 << 40);
    let empty = full(&shelf, size, &HashMap::new()).await;
    assert!(empty.top.is_zero());
    let leaves: HashMap<u64, BlobId> = (0..5000).map(|at| (at * 3000, id(at))).collect();
    let tree = full(&shelf, size, &leaves).await;
    let before = *shelf.reads.lock().unwrap();
    let mut writer = TreeWriter::new(ids(), &shelf, size, Some(tree));
    writer.set(3000 * 77, id(9)).await.unwrap();
    writer.finish().await.unwrap();
    assert_eq!(shelf.keep(writer.take_finished()), 4);
    assert_eq!(*shelf.reads.lock().unwrap() - before, 4, "time goes with what differs");
    let mut writer = TreeWriter::new(ids(), &shelf, size, Some(tree));
    writer.zero(0, chunks(size)).await.unwrap();
    assert_eq!(writer.finish().await.unwrap().top, BlobId::ZERO);
    assert!(writer.take_finished().is_empty());
}

#[tokio::test]
async fn an_image_that_grows_or_shrinks_by_several_levels_has_the_root_of_its_content() {
    let sizes = [3, 65, 4097, 262_145, 20_000_000].map(|count| count * u64::from(CHUNK));
    for old in sizes {
        for new in sizes {
            // Nothing else changes; something does beside the old content, or far from it.
            for touched in [None, Some(1), Some(2), Some(64), Some(4100), Some(300_000)] {
                let shelf = Shelf::default();
                let mut leaves: HashMap<u64, BlobId> = (0..3).map(|at| (at, id(at))).collect();
                let parent = full(&shelf, old, &leaves).await;
                let mut writer = TreeWriter::new(ids(), &shelf, new, Some(parent));
                if let Some(at) = touched.filter(|at| *at < chunks(new)) {
                    writer.set(at, id(99)).await.unwrap();
                    leaves.insert(at, id(99));
                }
                let tree = writer.finish().await.unwrap();
                shelf.keep(writer.take_finished());
                assert_eq!(shelf.leaves(tree), leaves, "{old} {new} {touched:?}");
                assert_eq!(tree.top, full(&Shelf::default(), new, &leaves).await.top);
            }
        }
    }
}

#[tokio::test]
async fn what_comes_out_of_order_or_lies_beyond_the_size_is_refused() {
    let shelf = Shelf::default();
    let mut writer = TreeWriter::new(ids(), &shelf, 10 * u64::from(CHUNK), None);
    writer.set(5, id(1)).await.unwrap();
    assert!(writer.set(4, id(1)).await.is_err());
    assert!(writer.set(10, id(1)).await.is_err());
    assert!(writer.zero(9, 2).await.is_err());
    assert!(writer.zero(9, u64::MAX).await.is_err());
}

#[derive(Clone, Debug)]
enum Act {
    Set(u64, u8),
    Zero(u64, u64),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        (0..20_000_u64, any::<u8>()).prop_map(|(at, seed)| Act::Set(at, seed)),
        (0..20_000_u64, 1..9000_u64).prop_map(|(at, count)| Act::Zero(at, count)),
    ];
    prop::collection::vec(act, 0..12)
}

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(1_u64),
        Just(63),
        Just(64),
        Just(65),
        Just(4096),
        Just(4097),
        Just(262_145),
        1..20_000_u64
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_made_from_a_parent_by_any_changes_and_any_resize_equals_the_one_made_at_once(
        first in acts(), rounds in prop::collection::vec((sizes(), acts()), 1..5), start in sizes(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let shelf = Shelf::default();
            let mut leaves: HashMap<u64, BlobId> = HashMap::new();
            let mut parent = None;
            for (count, acts) in std::iter::once((start, first)).chain(rounds) {
                let size = count * u64::from(CHUNK);
                leaves.retain(|place, _| *place < count);
                let mut writer = TreeWriter::new(ids(), &shelf, size, parent);
                // In ascending order and apart, as a source gives them.
                let mut acts: Vec<Act> = acts;
                acts.sort_by_key(|act| match act { Act::Set(at, _) | Act::Zero(at, _) => *at });
                let mut next = 0;
                for act in acts {
                    match act {
                        Act::Set(at, seed) if at >= next && at < count => {
                            let leaf = id(u64::from(seed));
                            assert_eq!(
                                writer.leaf(at).await.unwrap(),
                                leaves.get(&at).copied().unwrap_or(BlobId::ZERO)
                            );
                            writer.set(at, leaf).await.unwrap();
                            leaves.insert(at, leaf);
                            next = at + 1;
                        }
                        Act::Zero(at, many) if at >= next && at < count => {
                            let many = many.min(count - at);
                            writer.zero(at, many).await.unwrap();
                            leaves.retain(|place, _| *place < at || *place >= at + many);
                            next = at + many;
                        }
                        _ => {}
                    }
                }
                let tree = writer.finish().await.unwrap();
                shelf.keep(writer.take_finished());
                assert_eq!(shelf.leaves(tree), leaves);
                let at_once = full(&Shelf::default(), size, &leaves).await;
                assert_eq!(tree.top, at_once.top, "the same content has the same root");
                parent = Some(tree);
            }
        });
    }
}

//! The root of something that lies elsewhere: what proves that it is what a manifest says, without asking a vault.
//!
//! A restore computes the root of what it *sends*; whether that is what can be *read* afterwards, from a file that was converted
//! or from a device that somebody else had, only this tells.

use std::collections::VecDeque;

use async_trait::async_trait;
use tokio::task::JoinHandle;

use super::extents::{Cutter, Item, Source};
use super::image::{AT_ONCE, BATCH, Hashed, hash};
use crate::blob::BlobType;
use crate::error::VaultError;
use crate::ids::BlobId;
use crate::keys::IdKeys;
use crate::manifest::Image;
use crate::tree::{NodeSource, StoredNode, TreeWriter};

/// A tree that is made of nothing asks for no node.
struct NoNodes;

#[async_trait]
impl NodeSource for NoNodes {
    async fn node(&self, level: u8, id: BlobId) -> Result<StoredNode, VaultError> {
        Err(VaultError::Contract(format!("a new tree has asked for the node {id} of level {level}")))
    }
}

/// Reads a source of so many bytes to its end and computes the tree that a vault with these keys would have of it. Nothing is
/// stored. Takes some MiB of memory, whatever the size.
///
/// # Errors
/// What the source could not do, or if it calls something unchanged.
pub async fn proof_of(
    ids: &IdKeys,
    kind: BlobType,
    size: u64,
    source: &mut dyn Source,
) -> Result<Image, VaultError> {
    let mut tree = TreeWriter::new(ids.clone(), &NoNodes, size, None);
    let mut cutter = Cutter::new(source, size);
    let mut hashing: VecDeque<JoinHandle<Hashed>> = VecDeque::new();
    let mut ended = false;
    loop {
        while !ended && hashing.len() < AT_ONCE {
            let items = cutter.batch(BATCH).await?;
            ended = items.is_empty();
            let ids = ids.clone();
            hashing.push_back(crate::tasks::blocking(move || hash(&ids, kind, items)));
        }
        let Some(next) = hashing.pop_front() else { break };
        for (item, id) in next.await? {
            match item {
                Item::Chunk(chunk, _) => tree.set(chunk, id).await?,
                Item::Zero(chunk, count) => tree.zero(chunk, count).await?,
                Item::Unchanged(..) => {
                    return Err(VaultError::Contract("what is proven has no parent".into()));
                }
            }
        }
        // Only the top counts.
        drop(tree.take_finished());
    }
    Ok(Image::new(ids, kind, tree.finish().await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::CHUNK;
    use crate::testing::{Bench, C, DOMAIN, noise};
    use crate::write::{Extent, Parts};

    /// The image, in pieces that are no chunks, with its zeroes told as such or as bytes.
    fn parts(image: &[u8], piece: usize, tell_zeroes: bool) -> Parts {
        let part = |part: &[u8]| match tell_zeroes && part.iter().all(|byte| *byte == 0) {
            true => Extent::Zero(part.len() as u64),
            false => Extent::Data(part.to_vec().into()),
        };
        Parts::new(image.chunks(piece).map(part).collect())
    }

    #[tokio::test]
    async fn what_lies_elsewhere_has_the_root_that_the_vault_has_of_it_and_no_other_content_does() {
        for encrypted in [false, true] {
            let bench = Bench::new(encrypted).await;
            let ids = bench.vault.ids(DOMAIN);
            let mut image = [noise(1, 70 * C), vec![0; 200 * C], noise(2, 12_345)].concat();
            let written = bench.full(&image).await.1.image;
            let size = image.len() as u64;
            for (piece, tell) in [(C, true), (3 * C + 17, true), (C / 2, false), (image.len(), false)] {
                let proof = proof_of(&ids, BlobType::Data, size, &mut parts(&image, piece, tell)).await;
                assert_eq!(proof.unwrap(), written, "in pieces of {piece}");
            }
            let as_stream = proof_of(&ids, BlobType::Stream, size, &mut parts(&image, C, true)).await;
            assert_ne!(as_stream.unwrap().root, written.root);
            let longer = [image.clone(), vec![0; CHUNK as usize]].concat();
            let more =
                proof_of(&ids, BlobType::Data, longer.len() as u64, &mut parts(&longer, C, true)).await;
            assert_ne!(more.unwrap().root, written.root, "a longer disk");
            *image.last_mut().unwrap() ^= 1;
            let other = proof_of(&ids, BlobType::Data, size, &mut parts(&image, C, true)).await;
            assert_ne!(other.unwrap().root, written.root, "its last byte is another");
            let short = proof_of(&ids, BlobType::Data, size, &mut parts(&image[..C], C, true)).await;
            assert!(short.is_err(), "a source that ends early was taken for whole");
        }
    }
}

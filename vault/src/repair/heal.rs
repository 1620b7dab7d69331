//! Walking the trees of backups, and putting again what has no good place.
//!
//! A chunk is named by its node, so it can be looked for in any image that may have it at its position. A node that is lost
//! names nothing below it: it is made again from the plain bytes of all that it covers, and counts if it has the id that its
//! parent, or the manifest, says. What is below it is then walked like the rest.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::Healing;
use super::donor::{Donor, Plain, Wanted};
use crate::blob::{self, BlobType, Encoded};
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::header::CHUNK;
use crate::ids::BlobId;
use crate::keys::IdKeys;
use crate::manifest::Manifest;
use crate::node::Node;
use crate::tree::{chunks, span, top_level};
use crate::vault::Vault;
use crate::walk::{REMEMBERED, Walk, half};
use crate::write::store::Store;

pub(super) struct Healer<'a> {
    vault: &'a Vault,
    ids: IdKeys,
    fetcher: &'a Fetcher,
    walk: &'a Walk<'a>,
    donors: &'a [&'a dyn Donor],
    store: &'a mut Store,
    report: &'a mut Healing,
    /// Subtrees that are whole.
    whole: HashSet<[u8; 16]>,
    /// What was put. Memory goes with the damage.
    chunks: HashSet<BlobId>,
    nodes: HashMap<BlobId, Arc<Node>>,
}

/// An image that is being healed.
struct Image {
    wanted: Wanted,
    total: u64,
    /// Those that may have its bytes, with the donor's name; looked for when the first are needed.
    others: Option<Vec<(String, Arc<dyn Plain>)>>,
}

impl<'a> Healer<'a> {
    pub(super) fn new(
        vault: &'a Vault,
        ids: IdKeys,
        fetcher: &'a Fetcher,
        walk: &'a Walk<'a>,
        donors: &'a [&'a dyn Donor],
        store: &'a mut Store,
        report: &'a mut Healing,
    ) -> Self {
        let (whole, chunks, nodes) = (HashSet::new(), HashSet::new(), HashMap::new());
        Self { vault, ids, fetcher, walk, donors, store, report, whole, chunks, nodes }
    }

    /// Heals a backup as far as that goes.
    ///
    /// # Errors
    /// What the backend could not do.
    pub(super) async fn backup(&mut self, manifest: &Manifest) -> Result<(), VaultError> {
        for (name, kind, image) in manifest.images() {
            let wanted = Wanted {
                domain: manifest.domain,
                backup: manifest.backup,
                taken: manifest.taken,
                image: name.to_owned(),
                kind,
                size: image.size,
            };
            let of = &mut Image { wanted, total: chunks(image.size), others: None };
            Box::pin(self.subtree(of, top_level(image.size), 0, image.top)).await?;
        }
        Ok(())
    }

    /// Whether everything in a subtree is there now.
    async fn subtree(
        &mut self,
        of: &mut Image,
        level: u8,
        first: u64,
        id: BlobId,
    ) -> Result<bool, VaultError> {
        if id.is_zero() || self.whole.contains(&half(id)) {
            return Ok(true);
        }
        let Some(node) = self.node(of, level, first, id).await? else { return Ok(false) };
        let mut whole = true;
        for (at, slot) in node.slots.iter().enumerate().filter(|(_, slot)| !slot.is_zero()) {
            let place = first + at as u64 * span(level);
            whole &= match level {
                0 => self.leaf(of, place, *slot).await?,
                _ => Box::pin(self.subtree(of, level - 1, place, *slot)).await?,
            };
        }
        if whole {
            if self.whole.len() >= REMEMBERED {
                self.whole.clear();
            }
            self.whole.insert(half(id));
        }
        Ok(whole)
    }

    /// A node, which has a good place from now on; nothing if nobody has it.
    async fn node(
        &mut self,
        of: &mut Image,
        level: u8,
        first: u64,
        id: BlobId,
    ) -> Result<Option<Arc<Node>>, VaultError> {
        if let Some(node) = self.nodes.get(&id) {
            return Ok(Some(node.clone()));
        }
        let good = self.walk.is_good(BlobType::Node(level), id).await?;
        let node = match self.fetcher.stored_node(level, id).await {
            Ok(stored) if good => return Ok(Some(stored.node)),
            Ok(stored) => {
                self.report.moved += 1;
                stored.node
            }
            Err(VaultError::Lost { .. }) => {
                let Some(node) = self.made_again(of, level, first, id).await? else { return Ok(None) };
                self.report.given += 1;
                Arc::new(node)
            }
            Err(error) => return Err(error),
        };
        // Full, also where it was a patch: its base may be what is bad.
        let (keys, plain) = (self.vault.keys().clone(), node.encode());
        let blob = blob::encode(&keys, BlobType::Node(level), false, id, &plain)?;
        self.put(&blob).await?;
        self.nodes.insert(id, node.clone());
        Ok(Some(node))
    }

    /// Whether a chunk is there now.
    async fn leaf(&mut self, of: &mut Image, at: u64, id: BlobId) -> Result<bool, VaultError> {
        let kind = of.wanted.kind;
        if self.chunks.contains(&id) || self.walk.is_good(kind, id).await? {
            return Ok(true);
        }
        for found in self.fetcher.index().find(kind, id).await? {
            if let Some(blob) = self.fetcher.proven(id, found.place).await? {
                self.put(&blob).await?;
                self.report.moved += 1;
                self.chunks.insert(id);
                return Ok(true);
            }
        }
        for (donor, plain) in self.others(of).await {
            let Some(bytes) = self.ask(&donor, &plain, at).await else { continue };
            let (ids, keys) = (self.ids.clone(), self.vault.keys().clone());
            let code = move || {
                (ids.id(kind, &bytes) == id).then(|| blob::encode(&keys, kind, false, id, &bytes)).transpose()
            };
            if let Some(blob) = crate::tasks::blocking(code).await?? {
                self.put(&blob).await?;
                self.report.given += 1;
                self.chunks.insert(id);
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn put(&mut self, blob: &Encoded) -> Result<(), VaultError> {
        self.store.claim(blob.id);
        self.store.add(blob).await
    }

    /// A node made of the bytes that somebody has where it stands. All that it covers is read for that.
    async fn made_again(
        &mut self,
        of: &mut Image,
        level: u8,
        first: u64,
        id: BlobId,
    ) -> Result<Option<Node>, VaultError> {
        for (donor, plain) in self.others(of).await {
            let made = Box::pin(self.made_of(of, &donor, &plain, level, first)).await;
            if let Some(node) = made.filter(|node| !node.is_zero() && node.id(&self.ids) == id) {
                return Ok(Some(node));
            }
        }
        Ok(None)
    }

    /// Nothing below is kept: what is found to be lacking there is made again in its turn, so memory goes with the levels.
    async fn made_of(
        &mut self,
        of: &Image,
        donor: &str,
        plain: &Arc<dyn Plain>,
        level: u8,
        first: u64,
    ) -> Option<Node> {
        let mut node = Node::empty(level);
        for (at, slot) in node.slots.iter_mut().enumerate() {
            let place = first + at as u64 * span(level);
            if place >= of.total {
                break;
            }
            *slot = if level == 0 {
                let bytes = self.ask(donor, plain, place).await?;
                let (ids, kind) = (self.ids.clone(), of.wanted.kind);
                let is_zero = bytes.iter().all(|byte| *byte == 0);
                if is_zero { BlobId::ZERO } else { ids.id(kind, &bytes) }
            } else {
                let below = Box::pin(self.made_of(of, donor, plain, level - 1, place)).await?;
                if below.is_zero() { BlobId::ZERO } else { below.id(&self.ids) }
            };
        }
        Some(node)
    }

    async fn others(&mut self, of: &mut Image) -> Vec<(String, Arc<dyn Plain>)> {
        if let Some(others) = &of.others {
            return others.clone();
        }
        let mut others = Vec::new();
        for donor in self.donors {
            match donor.images(&of.wanted).await {
                Ok(images) => others.extend(images.into_iter().map(|image| (donor.name(), image))),
                Err(error) => self.failed(&donor.name(), &error),
            }
        }
        of.others.insert(others).clone()
    }

    /// A whole chunk, as somebody has it: padded with zeroes where the image ends.
    async fn ask(&mut self, donor: &str, plain: &Arc<dyn Plain>, at: u64) -> Option<Bytes> {
        match plain.chunk(at).await {
            Ok(Some(bytes)) if bytes.len() < CHUNK as usize => {
                let mut padded = BytesMut::from(&bytes[..]);
                padded.resize(CHUNK as usize, 0);
                Some(padded.freeze())
            }
            Ok(bytes) => bytes.filter(|bytes| bytes.len() == CHUNK as usize),
            Err(error) => {
                self.failed(donor, &error);
                None
            }
        }
    }

    fn failed(&mut self, donor: &str, error: &VaultError) {
        if self.report.failures.iter().all(|(name, _)| name != donor) {
            tracing::warn!(donor, %error, "could not be asked for what the vault has lost");
            self.report.failures.push((donor.to_owned(), error.to_string()));
        }
    }
}

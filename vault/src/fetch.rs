//! Finding the bytes of a blob, wherever a good place of it is (`FORMAT.md`, §6).
//!
//! Places are tried in turn, usable ones first. If none is good, everything is listed once more, for a collector may have
//! moved the blob; what is then bad or missing in every place is damage: each place is reported, so that writers treat it as
//! absent from then on. A backend that does not answer is no proof of anything, and ends the search with its error.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use crate::blob::{BlobError, BlobType, Encoded};
use crate::error::VaultError;
use crate::ids::BlobId;
use crate::index::Index;
use crate::index::run::Place;
use crate::index::tidings::{BadPlace, report_damage};
use crate::keys::IdKeys;
use crate::node::{Node, Patch};
use crate::tree::{NodeSource, StoredNode};
use crate::vault::Vault;

/// Nodes that are kept in memory: 2 KiB each.
const KEPT_NODES: usize = 4096;
/// How soon the index is listed again for the next blob without a good place.
const LIST_AGAIN: Duration = Duration::from_secs(60);

/// Reads blobs of one domain.
pub struct Fetcher {
    vault: Vault,
    ids: IdKeys,
    folder: Option<PathBuf>,
    index: RwLock<Arc<Index>>,
    listed_again: Mutex<Option<Instant>>,
    nodes: Mutex<HashMap<(u8, BlobId), StoredNode>>,
    report: bool,
}

/// Why a place is no good.
type Bad = BlobError;

enum Opened {
    Chunk(Vec<u8>),
    Node(StoredNode),
}

impl Fetcher {
    /// With an index that was listed. With `report`, places that are found bad are reported to the vault.
    #[must_use]
    pub fn new(vault: &Vault, ids: IdKeys, index: Arc<Index>, folder: Option<PathBuf>, report: bool) -> Self {
        Self {
            vault: vault.clone(),
            ids,
            folder,
            index: RwLock::new(index),
            listed_again: Mutex::new(None),
            nodes: Mutex::default(),
            report,
        }
    }

    /// The index as it was listed last.
    #[must_use]
    pub fn index(&self) -> Arc<Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The plain bytes of a chunk.
    ///
    /// # Errors
    /// [`VaultError::Lost`] if it is bad or missing in every place, or what the backend could not do.
    pub async fn chunk(&self, kind: BlobType, id: BlobId) -> Result<Vec<u8>, VaultError> {
        match self.search(kind, id).await? {
            Opened::Chunk(plain) => Ok(plain),
            Opened::Node(_) => Err(VaultError::Contract("a node is no chunk".into())),
        }
    }

    /// A node, and how it is stored.
    ///
    /// # Errors
    /// As [`Self::chunk`].
    pub async fn stored_node(&self, level: u8, id: BlobId) -> Result<StoredNode, VaultError> {
        if let Some(node) = self.nodes.lock().unwrap_or_else(PoisonError::into_inner).get(&(level, id)) {
            return Ok(node.clone());
        }
        let kind = BlobType::Node(level);
        let Opened::Node(node) = self.search(kind, id).await? else {
            return Err(VaultError::Contract("a chunk is no node".into()));
        };
        let mut kept = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_NODES {
            kept.clear();
        }
        kept.insert((level, id), node.clone());
        Ok(node)
    }

    /// What stands at a place; nothing if its pack is not there.
    async fn stored(&self, id: BlobId, place: Place) -> Result<Result<Encoded, Bad>, VaultError> {
        let bytes = self.vault.backend().get(&place.object().to_string(), Some(place.range())).await?;
        let Some(bytes) = bytes else { return Ok(Err(BlobError::Header)) };
        Ok(match Encoded::parse(self.vault.keys(), place.pack, place.offset, &bytes) {
            Ok(blob) if blob.id == id && blob.kind == place.kind && blob.coding == place.coding => Ok(blob),
            Ok(_) => Err(BlobError::Other),
            Err(error) => Err(error),
        })
    }

    async fn open_chunk(
        &self,
        kind: BlobType,
        id: BlobId,
        place: Place,
    ) -> Result<Result<Vec<u8>, Bad>, VaultError> {
        let blob = match self.stored(id, place).await? {
            Ok(blob) => blob,
            Err(bad) => return Ok(Err(bad)),
        };
        let (keys, ids) = (self.vault.keys().clone(), self.ids.clone());
        Ok(crate::tasks::blocking(move || blob.open_checked(&keys, &ids, kind, id)).await?)
    }

    async fn open_node(
        &self,
        level: u8,
        id: BlobId,
        place: Place,
    ) -> Result<Result<StoredNode, Bad>, VaultError> {
        let blob = match self.stored(id, place).await? {
            Ok(blob) => blob,
            Err(bad) => return Ok(Err(bad)),
        };
        let keys = self.vault.keys();
        if !place.coding.is_patch() {
            let node = blob
                .open_checked(keys, &self.ids, BlobType::Node(level), id)
                .and_then(|plain| Node::decode(level, &plain));
            return Ok(node.map(|node| StoredNode { id, node: Arc::new(node), base: None }));
        }
        let patch = match blob.open(keys).and_then(|plain| Patch::decode(&plain)) {
            Ok(patch) => patch,
            Err(bad) => return Ok(Err(bad)),
        };
        let Some(base) = self.full_node(level, patch.base).await? else { return Ok(Err(BlobError::Node)) };
        let node = patch.apply(&base);
        if node.is_zero() || node.id(&self.ids) != id {
            return Ok(Err(BlobError::Id));
        }
        Ok(Ok(StoredNode { id, node: Arc::new(node), base: Some((patch.base, base)) }))
    }

    /// A node from a place where it is stored full; nothing if there is no good one.
    async fn full_node(&self, level: u8, id: BlobId) -> Result<Option<Arc<Node>>, VaultError> {
        for found in self.index().find(BlobType::Node(level), id).await? {
            if found.place.coding.is_patch() {
                continue;
            }
            let blob = self.stored(id, found.place).await?;
            let node = blob
                .and_then(|blob| blob.open_checked(self.vault.keys(), &self.ids, BlobType::Node(level), id))
                .and_then(|plain| Node::decode(level, &plain));
            match node {
                Ok(node) => return Ok(Some(Arc::new(node))),
                Err(cause) => self.bad(id, found.place, &cause).await?,
            }
        }
        Ok(None)
    }

    /// The base of a node that is stored as a patch at this place; nothing if the place is no good.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn base_of(&self, id: BlobId, place: Place) -> Result<Option<BlobId>, VaultError> {
        let blob = self.stored(id, place).await?;
        let patch = blob.and_then(|blob| Patch::decode(&blob.open(self.vault.keys())?));
        Ok(patch.ok().map(|patch| patch.base))
    }

    async fn open(
        &self,
        kind: BlobType,
        id: BlobId,
        place: Place,
    ) -> Result<Result<Opened, Bad>, VaultError> {
        Ok(match kind {
            BlobType::Node(level) => self.open_node(level, id, place).await?.map(Opened::Node),
            _ => self.open_chunk(kind, id, place).await?.map(Opened::Chunk),
        })
    }

    /// What stands at a place, once it is proven to be what its id says: to be moved as it is. Nothing if it is no good.
    ///
    /// # Errors
    /// What the backend could not do: that proves nothing.
    pub(crate) async fn proven(&self, id: BlobId, place: Place) -> Result<Option<Encoded>, VaultError> {
        let Ok(blob) = self.stored(id, place).await? else { return Ok(None) };
        let BlobType::Node(level) = place.kind else {
            let (keys, ids) = (self.vault.keys().clone(), self.ids.clone());
            let prove = move || blob.open_checked(&keys, &ids, place.kind, id).is_ok().then_some(blob);
            return Ok(crate::tasks::blocking(prove).await?);
        };
        if !place.coding.is_patch() {
            let plain = blob.open_checked(self.vault.keys(), &self.ids, place.kind, id);
            let good = plain.and_then(|plain| Node::decode(level, &plain)).is_ok();
            return Ok(good.then_some(blob));
        }
        let Ok(patch) = blob.open(self.vault.keys()).and_then(|plain| Patch::decode(&plain)) else {
            return Ok(None);
        };
        let Some(base) = self.full_node(level, patch.base).await? else { return Ok(None) };
        let node = patch.apply(&base);
        Ok((!node.is_zero() && node.id(&self.ids) == id).then_some(blob))
    }

    async fn search(&self, kind: BlobType, id: BlobId) -> Result<Opened, VaultError> {
        let mut bad: Vec<(Place, Bad)> = Vec::new();
        for again in [false, true] {
            if again && !Box::pin(self.list_again()).await? {
                break;
            }
            bad.clear();
            for found in self.index().find(kind, id).await? {
                match Box::pin(self.open(kind, id, found.place)).await? {
                    Ok(value) => return Ok(value),
                    Err(cause) => bad.push((found.place, cause)),
                }
            }
        }
        for (place, cause) in &bad {
            self.bad(id, *place, cause).await?;
        }
        Err(VaultError::Lost { lost: 1, first: format!("{kind:?} {id}") })
    }

    async fn bad(&self, id: BlobId, place: Place, cause: &Bad) -> Result<(), VaultError> {
        tracing::warn!(%id, object = %place.object(), offset = place.offset, %cause, "a bad place in the vault");
        let known = self.index().is_damaged(id, &place);
        if !self.report || known {
            return Ok(());
        }
        report_damage(&self.vault, vec![BadPlace { pack: place.pack, offset: place.offset, id }]).await?;
        self.index().note_damage(id, &place);
        Ok(())
    }

    /// Lists everything once more, unless that was just done.
    async fn list_again(&self) -> Result<bool, VaultError> {
        {
            let mut last = self.listed_again.lock().unwrap_or_else(PoisonError::into_inner);
            if last.is_some_and(|last| last.elapsed() < LIST_AGAIN) {
                // What was listed then is what there is to look in.
                return Ok(false);
            }
            *last = Some(Instant::now());
        }
        let index = Arc::new(Index::load(&self.vault, self.folder.as_deref()).await?);
        index.note_places(self.index().noted_places());
        *self.index.write().unwrap_or_else(PoisonError::into_inner) = index;
        Ok(true)
    }
}

#[async_trait]
impl NodeSource for Fetcher {
    async fn node(&self, level: u8, id: BlobId) -> Result<StoredNode, VaultError> {
        self.stored_node(level, id).await
    }
}

//! Everything that a vault keeps secret or proves with a key (`FORMAT.md`, §4).
//!
//! ```text
//! master ──┬── work ──┬── ids of each type (or of each domain, where domains share nothing)
//!          │          ├── blobs, boxes of each kind, masks, the header's hash
//!          │          └── (in a vault without encryption all of these come from the vault's id)
//!          └── the seed for signatures
//! ```
//!
//! A key of role *writer* holds the work key alone: it can do everything but sign.
//!
//! A *box* is a nonce, what was encrypted, and a tag. In a vault without encryption it is the bytes and 16 bytes of a keyed
//! hash over associated data and bytes: that shows damage, and proves nothing. So whatever is read in parts (a block of an
//! index) is checked in either sort of vault.

pub mod recovery;
pub mod wrap;

use chacha20poly1305::{AeadInOut, KeyInit, XChaCha20Poly1305};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use zeroize::Zeroizing;

use crate::blob::BlobType;
use crate::envelope::fixed;
use crate::ids::{BlobId, DomainId, PackId, VaultId, random};
use crate::names::{Kind, ObjectName};

/// Bytes that a nonce takes.
const NONCE: usize = 24;
/// Bytes that a tag takes.
const TAG: usize = 16;
/// The version of what is encrypted and how; part of all associated data.
const FORMAT: u16 = 1;

/// 32 bytes that are wiped when they are dropped.
pub type Secret32 = Zeroizing<[u8; 32]>;

/// What is wrong with a key, or with what it should open.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A box does not open: damaged, exchanged, or of another vault.
    #[error("it does not open: damaged, exchanged, or made with another key")]
    NotGenuine,
    /// There is no signature, or one of somebody else.
    #[error("it is not signed by whoever holds the vault's full key")]
    NotSigned,
    /// This key may not sign.
    #[error("this key is of role writer: it may not prune, collect or end a protection")]
    MayNotSign,
    /// A passphrase or key file that does not fit this wrapped key.
    #[error("it does not fit this key")]
    Wrong,
    /// A wrapped key with parameters outside of the limits.
    #[error("{0}")]
    Refused(&'static str),
    /// The 24 words have a typing error.
    #[error("{0}")]
    Words(String),
    /// The kernel gave no random bytes, or there was no memory for the derivation.
    #[error("{0}")]
    System(String),
}

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Full,
    /// Everything but to sign: no prune, no collection.
    Writer,
}

/// Where all keys come from.
#[derive(Clone)]
pub enum Root {
    /// The vault is not encrypted.
    None,
    /// The master key.
    Master(Secret32),
    /// The work key alone.
    Work(Secret32),
}

/// The keys of a vault.
pub struct Keys {
    vault: VaultId,
    root: Root,
    ids: IdKeys,
    header: Secret32,
    mask: Secret32,
    boxes: Vec<Secret32>,
    blob_cipher: XChaCha20Poly1305,
    signer: Option<SigningKey>,
    verifier: Option<VerifyingKey>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.vault)
    }
}

/// The keys that make ids of blobs.
#[derive(Clone)]
pub struct IdKeys {
    data: Secret32,
    stream: Secret32,
    table: Secret32,
    nodes: Vec<Secret32>,
    image: Secret32,
    stream_root: Secret32,
}

fn derive(context: &str, from: &[u8]) -> Secret32 {
    Zeroizing::new(blake3::derive_key(context, from))
}

impl IdKeys {
    fn new(base: &[u8; 32]) -> Self {
        let node = |level: u8| {
            let input = Zeroizing::new([&base[..], &[level]].concat());
            derive("vmkeep vault 1 id of a node", &input)
        };
        Self {
            data: derive("vmkeep vault 1 id of data", base),
            stream: derive("vmkeep vault 1 id of a stream's chunk", base),
            table: derive("vmkeep vault 1 id of a pack's table", base),
            nodes: (0..=BlobType::MAX_LEVEL).map(node).collect(),
            image: derive("vmkeep vault 1 root of an image", base),
            stream_root: derive("vmkeep vault 1 root of a stream", base),
        }
    }

    /// The id of a blob.
    #[must_use]
    pub fn id(&self, kind: BlobType, plain: &[u8]) -> BlobId {
        let key = match kind {
            BlobType::Data => &self.data,
            BlobType::Stream => &self.stream,
            BlobType::Table => &self.table,
            BlobType::Node(level) => &self.nodes[usize::from(level.min(BlobType::MAX_LEVEL))],
        };
        BlobId::new(*blake3::keyed_hash(key, plain).as_bytes())
    }

    /// The root of an image, or of a stream: what proves that a restored one is whole.
    #[must_use]
    pub fn root(&self, leaves: BlobType, size: u64, chunk: u32, top: BlobId) -> BlobId {
        let key = if leaves == BlobType::Data { &self.image } else { &self.stream_root };
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(&size.to_le_bytes()).update(&chunk.to_le_bytes()).update(top.bytes());
        BlobId::new(*hasher.finalize().as_bytes())
    }
}

impl Keys {
    /// All keys that follow from the root.
    #[must_use]
    pub fn new(vault: VaultId, root: Root) -> Self {
        let (work, seed) = match &root {
            Root::None => (derive("vmkeep vault 1 without encryption", vault.bytes()), None),
            Root::Master(master) => {
                (work_key(master), Some(derive("vmkeep vault 1 signatures", &master[..])))
            }
            Root::Work(work) => (work.clone(), None),
        };
        let of_kind = |kind: &Kind| {
            let input = Zeroizing::new([&work[..], &[*kind as u8]].concat());
            derive("vmkeep vault 1 boxes of a kind", &input)
        };
        let signer = seed.map(|seed| SigningKey::from_bytes(&seed));
        let blob = derive("vmkeep vault 1 blobs", &work[..]);
        Self {
            vault,
            ids: IdKeys::new(&derive("vmkeep vault 1 ids", &work[..])),
            header: derive("vmkeep vault 1 header", &work[..]),
            mask: derive("vmkeep vault 1 masks", &work[..]),
            boxes: Kind::ALL.iter().map(of_kind).collect(),
            blob_cipher: XChaCha20Poly1305::new((&*blob).into()),
            verifier: signer.as_ref().map(SigningKey::verifying_key),
            signer,
            root,
        }
    }

    /// With the public key from the header, for a key that cannot sign.
    #[must_use]
    pub fn with_verifier(mut self, public: Option<[u8; 32]>) -> Self {
        if self.verifier.is_none() {
            self.verifier = public.and_then(|public| VerifyingKey::from_bytes(&public).ok());
        }
        self
    }

    /// Whether blobs and boxes are encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        !matches!(self.root, Root::None)
    }

    /// What this key may be used for. Without encryption the storage's credentials decide, and everything is allowed here.
    #[must_use]
    pub fn role(&self) -> Role {
        if matches!(self.root, Root::Work(_)) { Role::Writer } else { Role::Full }
    }

    /// Where they come from.
    #[must_use]
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The vault that they are of.
    #[must_use]
    pub fn vault(&self) -> VaultId {
        self.vault
    }

    /// The keys of ids: those of the vault, or of one domain where domains share nothing.
    #[must_use]
    pub fn ids(&self, separate: Option<DomainId>) -> IdKeys {
        match separate {
            None => self.ids.clone(),
            Some(domain) => {
                let input = Zeroizing::new([&self.ids.data[..], domain.bytes()].concat());
                IdKeys::new(&derive("vmkeep vault 1 ids of a domain", &input))
            }
        }
    }

    /// The public key for signatures, if this key can tell.
    #[must_use]
    pub fn public(&self) -> Option<[u8; 32]> {
        self.verifier.map(|key| key.to_bytes())
    }

    /// The keyed hash over the header.
    #[must_use]
    pub fn header_hash(&self, header: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.header, header)
    }

    /// An id as it stands in the header of a blob at this place of a pack; and back.
    #[must_use]
    pub fn mask(&self, id: BlobId, pack: PackId, offset: u32) -> BlobId {
        if !self.is_encrypted() {
            return id;
        }
        let mut hasher = blake3::Hasher::new_keyed(&self.mask);
        hasher.update(pack.bytes()).update(&offset.to_le_bytes());
        let stream = hasher.finalize();
        let mut masked = *id.bytes();
        masked.iter_mut().zip(stream.as_bytes()).for_each(|(byte, key)| *byte ^= key);
        BlobId::new(masked)
    }

    /// Closes what is stored of a blob. Nothing is added in a vault without encryption: the id proves the bytes.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn seal_blob(&self, associated: &[u8], bytes: Vec<u8>) -> Result<Vec<u8>, KeyError> {
        if self.is_encrypted() {
            seal(&self.blob_cipher, &self.blob_aad(associated), &bytes)
        } else {
            Ok(bytes)
        }
    }

    /// Opens what [`Self::seal_blob`] closed.
    ///
    /// # Errors
    /// If it is not genuine.
    pub fn open_blob(&self, associated: &[u8], stored: &[u8]) -> Result<Vec<u8>, KeyError> {
        if self.is_encrypted() {
            open(&self.blob_cipher, &self.blob_aad(associated), stored)
        } else {
            Ok(stored.to_vec())
        }
    }

    fn blob_aad(&self, associated: &[u8]) -> Vec<u8> {
        [b"blob", &self.vault.bytes()[..], &FORMAT.to_le_bytes(), associated].concat()
    }

    /// Bytes that a box has more than its content.
    #[must_use]
    pub fn overhead(&self) -> usize {
        if self.is_encrypted() { NONCE + TAG } else { TAG }
    }

    /// A box for an object, or for a block of one.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn seal_box(&self, name: &ObjectName, block: u64, plain: &[u8]) -> Result<Vec<u8>, KeyError> {
        let (key, associated) = self.box_key(name, block);
        if self.is_encrypted() {
            return seal(&XChaCha20Poly1305::new((&**key).into()), &associated, plain);
        }
        let mut sealed = plain.to_vec();
        sealed.extend_from_slice(&checksum(key, &associated, plain));
        Ok(sealed)
    }

    /// What is in a box.
    ///
    /// # Errors
    /// If it is not genuine; in a vault without encryption, if it is damaged.
    pub fn open_box(&self, name: &ObjectName, block: u64, sealed: &[u8]) -> Result<Vec<u8>, KeyError> {
        let (key, associated) = self.box_key(name, block);
        if self.is_encrypted() {
            return open(&XChaCha20Poly1305::new((&**key).into()), &associated, sealed);
        }
        let (plain, sum) = sealed.split_last_chunk::<TAG>().ok_or(KeyError::NotGenuine)?;
        if checksum(key, &associated, plain) == *sum { Ok(plain.to_vec()) } else { Err(KeyError::NotGenuine) }
    }

    fn box_key(&self, name: &ObjectName, block: u64) -> (&Secret32, Vec<u8>) {
        let kind = name.kind().map_or(0, |kind| kind as u8);
        let key = &self.boxes[usize::from(kind.saturating_sub(1))];
        let name = name.to_string();
        let associated = [
            b"box ",
            &self.vault.bytes()[..],
            &FORMAT.to_le_bytes(),
            &[kind],
            &block.to_le_bytes(),
            name.as_bytes(),
        ];
        (key, associated.concat())
    }

    /// Signs what is put under a name; nothing in a vault without encryption.
    ///
    /// # Errors
    /// If this key may not.
    pub fn sign(&self, name: &ObjectName, plain: &[u8]) -> Result<Vec<u8>, KeyError> {
        if !self.is_encrypted() {
            return Ok(Vec::new());
        }
        let signer = self.signer.as_ref().ok_or(KeyError::MayNotSign)?;
        Ok(signer.sign(&self.signed(name, plain)).to_bytes().to_vec())
    }

    /// What was signed, without its signature.
    ///
    /// # Errors
    /// If it is not signed by whoever holds the full key.
    pub fn verify<'a>(&self, name: &ObjectName, signed: &'a [u8]) -> Result<&'a [u8], KeyError> {
        if !self.is_encrypted() {
            return Ok(signed);
        }
        let (plain, signature) = signed.split_last_chunk::<64>().ok_or(KeyError::NotSigned)?;
        let verifier = self.verifier.as_ref().ok_or(KeyError::NotSigned)?;
        let message = self.signed(name, plain);
        verifier
            .verify_strict(&message, &Signature::from_bytes(signature))
            .map_err(|_| KeyError::NotSigned)?;
        Ok(plain)
    }

    fn signed(&self, name: &ObjectName, plain: &[u8]) -> Vec<u8> {
        let name = name.to_string();
        let length = (name.len() as u64).to_le_bytes();
        [b"vmkeep vault 1 signed", &self.vault.bytes()[..], &length, name.as_bytes(), plain].concat()
    }
}

/// The key that all others but that for signatures come from.
fn work_key(master: &Secret32) -> Secret32 {
    derive("vmkeep vault 1 work", &master[..])
}

fn checksum(key: &Secret32, associated: &[u8], plain: &[u8]) -> [u8; TAG] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&(associated.len() as u64).to_le_bytes()).update(associated).update(plain);
    fixed(&hasher.finalize().as_bytes()[..TAG])
}

fn seal(cipher: &XChaCha20Poly1305, associated: &[u8], plain: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut sealed = vec![0; NONCE + plain.len() + TAG];
    let (nonce, rest) = sealed.split_at_mut(NONCE);
    random(nonce).map_err(|error| KeyError::System(error.to_string()))?;
    let (text, tag) = rest.split_at_mut(plain.len());
    text.copy_from_slice(plain);
    let nonce: [u8; NONCE] = fixed(nonce);
    let made = cipher
        .encrypt_inout_detached(&nonce.into(), associated, text.into())
        .map_err(|_| KeyError::System("too much for one box".into()))?;
    tag.copy_from_slice(&made);
    Ok(sealed)
}

fn open(cipher: &XChaCha20Poly1305, associated: &[u8], sealed: &[u8]) -> Result<Vec<u8>, KeyError> {
    if sealed.len() < NONCE + TAG {
        return Err(KeyError::NotGenuine);
    }
    let (nonce, rest) = sealed.split_at(NONCE);
    let (text, tag) = rest.split_at(rest.len() - TAG);
    let (nonce, tag): ([u8; NONCE], [u8; TAG]) = (fixed(nonce), fixed(tag));
    let mut plain = text.to_vec();
    cipher
        .decrypt_inout_detached(&nonce.into(), associated, plain.as_mut_slice().into(), &tag.into())
        .map_err(|_| KeyError::NotGenuine)?;
    Ok(plain)
}

#[cfg(test)]
mod tests;

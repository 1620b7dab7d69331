//! A blob: the smallest thing that is stored (`FORMAT.md`, §3).
//!
//! ```text
//! "VKbl"  type u8  coding u8  raw length u32  stored length u32  id 32 (masked)  |  stored bytes
//! ```
//!
//! A blob is bound to its id and not to its place: collectors move its stored bytes as they are. In an encrypted vault
//! type, coding, raw length and id are associated data; in any vault the id is computed again from what was read.

use std::cell::RefCell;
use std::io;

use crate::envelope::fixed;
use crate::header::CHUNK;
use crate::ids::{BlobId, PackId};
use crate::keys::{IdKeys, KeyError, Keys};

/// Bytes before what is stored.
pub const HEADER: usize = 46;
const MAGIC: &[u8; 4] = b"VKbl";
/// Fast, and still smaller than what the classic tools make of the same disk.
const LEVEL: i32 = 1;
/// Blobs up to this length are compressed without a sample.
const SMALL: usize = 8 << 10;

const ZSTD: u8 = 1;
const ENCRYPTED: u8 = 16;
const PATCH: u8 = 32;

/// What a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlobType {
    /// A chunk of a disk.
    Data,
    /// A chunk of a stream.
    Stream,
    /// A tree node of a level.
    Node(u8),
    /// The table of a pack.
    Table,
}

impl BlobType {
    /// The highest level that a node can have: eight levels of 64 slots hold more than an image can be long.
    pub const MAX_LEVEL: u8 = 7;

    /// As it is stored.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Stream => 2,
            Self::Node(level) => 16 + level,
            Self::Table => 255,
        }
    }

    /// From how it is stored.
    #[must_use]
    pub fn parse(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Data),
            2 => Some(Self::Stream),
            16..=23 => Some(Self::Node(code - 16)),
            255 => Some(Self::Table),
            _ => None,
        }
    }

    /// Whether it is a node.
    #[must_use]
    pub fn is_node(self) -> bool {
        matches!(self, Self::Node(_))
    }

    /// The most bytes that one may have.
    #[must_use]
    pub fn limit(self) -> usize {
        match self {
            Self::Data | Self::Stream => CHUNK as usize,
            Self::Node(_) => crate::node::SIZE,
            Self::Table => 1 << 20,
        }
    }
}

/// How the stored bytes become plain ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Coding(u8);

impl Coding {
    /// As it is stored.
    #[must_use]
    pub fn code(self) -> u8 {
        self.0
    }

    /// From how it is stored.
    #[must_use]
    pub fn parse(code: u8) -> Option<Self> {
        (code & !(ZSTD | ENCRYPTED | PATCH) == 0).then_some(Self(code))
    }

    /// Whether it is a patch of another node.
    #[must_use]
    pub fn is_patch(self) -> bool {
        self.0 & PATCH != 0
    }
}

/// A blob, as it will be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Its type.
    pub kind: BlobType,
    /// How it is coded.
    pub coding: Coding,
    /// Plain bytes.
    pub raw: u32,
    /// Its id.
    pub id: BlobId,
    /// The stored bytes.
    pub stored: Vec<u8>,
}

/// Why a blob could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// It is cut off, or no blob.
    #[error("it is no blob, or cut off")]
    Header,
    /// It is another blob.
    #[error("it is another blob than was looked for")]
    Other,
    /// It has been changed.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// It does not unpack into its length.
    #[error("it does not unpack into its length")]
    Length,
    /// Its bytes have another id.
    #[error("its bytes have another id")]
    Id,
    /// A node, or a patch of one, that cannot be.
    #[error("it is a node that cannot be")]
    Node,
}

/// Codes a blob: compressed if that saves a sixteenth, then encrypted if the vault is. For blocking threads.
///
/// # Errors
/// If it is longer than its type allows, or the kernel has no random bytes.
pub fn encode(
    keys: &Keys,
    kind: BlobType,
    patch: bool,
    id: BlobId,
    plain: &[u8],
) -> Result<Encoded, KeyError> {
    let raw = u32::try_from(plain.len()).ok().filter(|_| plain.len() <= kind.limit());
    let raw = raw.ok_or(KeyError::Refused("a blob that is longer than its type allows"))?;
    let mut coding = Coding(if patch { PATCH } else { 0 });
    if keys.is_encrypted() {
        coding.0 |= ENCRYPTED;
    }
    let stored = match worth_it(plain).then(|| compress(plain)).transpose() {
        Ok(Some(packed)) if packed.len() <= plain.len() - plain.len() / 16 => {
            coding.0 |= ZSTD;
            packed
        }
        Ok(_) => plain.to_vec(),
        Err(error) => return Err(KeyError::System(error.to_string())),
    };
    let stored = keys.seal_blob(&associated(kind, coding, raw, id), stored)?;
    Ok(Encoded { kind, coding, raw, id, stored })
}

fn associated(kind: BlobType, coding: Coding, raw: u32, id: BlobId) -> [u8; 38] {
    let mut bytes = [0; 38];
    bytes[0] = kind.code();
    bytes[1] = coding.0;
    bytes[2..6].copy_from_slice(&raw.to_le_bytes());
    bytes[6..].copy_from_slice(id.bytes());
    bytes
}

impl Encoded {
    /// The header of the blob at a place.
    #[must_use]
    pub fn header(&self, keys: &Keys, pack: PackId, offset: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = self.kind.code();
        bytes[5] = self.coding.0;
        bytes[6..10].copy_from_slice(&self.raw.to_le_bytes());
        // Bounded by `encode`: a limit, and what encryption adds.
        bytes[10..14].copy_from_slice(&(self.stored.len() as u32).to_le_bytes());
        bytes[14..].copy_from_slice(keys.mask(self.id, pack, offset).bytes());
        bytes
    }

    /// The blob whose header and stored bytes begin here; what comes after it is ignored. Only its form is checked.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(keys: &Keys, pack: PackId, offset: u32, bytes: &[u8]) -> Result<Self, BlobError> {
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(BlobError::Header)?;
        let number = |at: usize| u32::from_le_bytes(fixed(&header[at..at + 4]));
        if &header[..4] != MAGIC {
            return Err(BlobError::Header);
        }
        let kind = BlobType::parse(header[4]).ok_or(BlobError::Header)?;
        let coding = Coding::parse(header[5]).ok_or(BlobError::Header)?;
        let (raw, stored) = (number(6), number(10) as usize);
        // Nothing is stored that is longer than what it becomes, but for nonce and tag.
        let fits = raw as usize <= kind.limit() && stored <= raw as usize + 40;
        if !fits
            || (coding.0 & ENCRYPTED != 0) != keys.is_encrypted()
            || (coding.is_patch() && !kind.is_node())
        {
            return Err(BlobError::Header);
        }
        let stored = bytes.get(HEADER..HEADER + stored).ok_or(BlobError::Header)?.to_vec();
        let id = keys.mask(BlobId::new(fixed(&header[14..])), pack, offset);
        Ok(Self { kind, coding, raw, id, stored })
    }

    /// The plain bytes, of exactly the raw length. In an encrypted vault they are genuine; the id is not computed. For
    /// blocking threads.
    ///
    /// # Errors
    /// If it was changed.
    pub fn open(&self, keys: &Keys) -> Result<Vec<u8>, BlobError> {
        let packed = keys.open_blob(&associated(self.kind, self.coding, self.raw, self.id), &self.stored)?;
        let raw = self.raw as usize;
        let plain = if self.coding.0 & ZSTD != 0 {
            decompress(&packed, raw).map_err(|_| BlobError::Length)?
        } else {
            packed
        };
        if plain.len() == raw { Ok(plain) } else { Err(BlobError::Length) }
    }

    /// The plain bytes, once they have the id that was looked for. Not for patches: theirs is the id of what results.
    ///
    /// # Errors
    /// If it was changed, or is another.
    pub fn open_checked(
        &self,
        keys: &Keys,
        ids: &IdKeys,
        kind: BlobType,
        id: BlobId,
    ) -> Result<Vec<u8>, BlobError> {
        if self.kind != kind || self.id != id || self.coding.is_patch() {
            return Err(BlobError::Other);
        }
        let plain = self.open(keys)?;
        if ids.id(kind, &plain) == id { Ok(plain) } else { Err(BlobError::Id) }
    }
}

thread_local! {
    // Making one takes longer than using it for a chunk.
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

fn compress(plain: &[u8]) -> io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|slot| match slot {
        Some(compressor) => compressor.compress(plain),
        None => slot.insert(zstd::bulk::Compressor::new(LEVEL)?).compress(plain),
    })
}

fn decompress(packed: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|slot| match slot {
        Some(decompressor) => decompressor.decompress(packed, limit),
        None => slot.insert(zstd::bulk::Decompressor::new()?).decompress(packed, limit),
    })
}

/// Whether a sample says that compressing pays: four pieces of 1 KiB, spread over the blob.
fn worth_it(plain: &[u8]) -> bool {
    if plain.len() <= SMALL {
        return !plain.is_empty();
    }
    let quarter = plain.len() / 4;
    let mut sample = Vec::with_capacity(4 << 10);
    for piece in plain.chunks_exact(quarter).take(4) {
        sample.extend_from_slice(&piece[..1 << 10]);
    }
    compress(&sample).is_ok_and(|packed| packed.len() <= sample.len() - sample.len() / 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::VaultId;
    use crate::keys::Root;
    use zeroize::Zeroizing;

    fn both_sorts() -> [Keys; 2] {
        let vault = VaultId::new([1; 16]);
        [Keys::new(vault, Root::None), Keys::new(vault, Root::Master(Zeroizing::new([2; 32])))]
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(1);
        (0..length).map(|_| rng.u8(..)).collect()
    }

    const PACK: PackId = PackId::new([3; 24]);

    #[test]
    fn a_blob_comes_back_and_what_does_not_shrink_is_stored_plain() {
        for keys in both_sorts() {
            let ids = keys.ids(None);
            let text = b"the quick brown fox ".repeat(3276);
            for (plain, shrinks) in [
                (vec![], false),
                (vec![7], false),
                (noise(65536), false),
                (text, true),
                (vec![1; 9000], true),
            ] {
                let id = ids.id(BlobType::Data, &plain);
                let blob = encode(&keys, BlobType::Data, false, id, &plain).unwrap();
                assert_eq!(blob.stored.len() < plain.len(), shrinks);
                let bytes = [&blob.header(&keys, PACK, 77)[..], &blob.stored, b"whatever follows"].concat();
                let again = Encoded::parse(&keys, PACK, 77, &bytes).unwrap();
                assert_eq!(again, blob);
                assert_eq!(again.open_checked(&keys, &ids, BlobType::Data, id).unwrap(), plain);
            }
        }
    }

    #[test]
    fn a_flip_of_any_byte_and_a_cut_anywhere_are_seen() {
        for keys in both_sorts() {
            let ids = keys.ids(None);
            let plain = b"some text of some length, some text of some length".repeat(3);
            let id = ids.id(BlobType::Data, &plain);
            let blob = encode(&keys, BlobType::Data, false, id, &plain).unwrap();
            let bytes = [&blob.header(&keys, PACK, 77)[..], &blob.stored].concat();
            let read = |bytes: &[u8], pack, offset| {
                Encoded::parse(&keys, pack, offset, bytes)?.open_checked(&keys, &ids, BlobType::Data, id)
            };
            assert_eq!(read(&bytes, PACK, 77).unwrap(), plain);
            for at in 0..bytes.len() {
                for bit in 0..8 {
                    let mut flipped = bytes.clone();
                    flipped[at] ^= 1 << bit;
                    // zstd has a bit that means nothing; whatever passes are the bytes that were put.
                    let unused = !keys.is_encrypted() && at >= HEADER;
                    let passed = read(&flipped, PACK, 77).ok();
                    assert!(
                        passed.is_none() || (unused && passed.as_ref() == Some(&plain)),
                        "bit {bit} of byte {at}"
                    );
                }
                assert!(read(&bytes[..at], PACK, 77).is_err(), "cut at {at}");
            }
            if keys.is_encrypted() {
                assert!(read(&bytes, PACK, 78).is_err() && read(&bytes, PackId::new([4; 24]), 77).is_err());
            }
        }
    }

    #[test]
    fn nothing_is_longer_than_its_type_allows() {
        for keys in both_sorts() {
            let ids = keys.ids(None);
            let bomb = vec![0; CHUNK as usize + 1];
            let id = ids.id(BlobType::Data, &bomb);
            assert!(encode(&keys, BlobType::Data, false, id, &bomb).is_err());
            // Made by somebody else: unpacks into more than its header says.
            let packed = compress(&vec![0; 1 << 20]).unwrap();
            let coding = Coding(ZSTD | if keys.is_encrypted() { ENCRYPTED } else { 0 });
            let stored = keys.seal_blob(&associated(BlobType::Data, coding, 65536, id), packed).unwrap();
            let forged = Encoded { kind: BlobType::Data, coding, raw: 65536, id, stored };
            assert!(matches!(forged.open(&keys), Err(BlobError::Length)));
        }
    }

    #[test]
    fn a_blob_of_another_type_or_key_is_refused() {
        let [plain_keys, keys] = both_sorts();
        let ids = keys.ids(None);
        let id = ids.id(BlobType::Data, b"x");
        let blob = encode(&keys, BlobType::Data, false, id, b"x").unwrap();
        assert!(matches!(blob.open_checked(&keys, &ids, BlobType::Stream, id), Err(BlobError::Other)));
        let bytes = [&blob.header(&keys, PACK, 1)[..], &blob.stored].concat();
        assert!(Encoded::parse(&plain_keys, PACK, 1, &bytes).is_err());
        let stranger = Keys::new(keys.vault(), Root::Master(Zeroizing::new([9; 32])));
        assert!(blob.open(&stranger).is_err());
    }
}

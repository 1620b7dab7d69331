//! A pack: blobs one after the other, and a table of them as its last (`FORMAT.md`, §3).
//!
//! It is built in memory and put whole: a pack whose put returned is durable progress, any other is nothing. With its table
//! destroyed the blobs are found by their headers; with all indexes destroyed those are rebuilt from tables.

use bytes::Bytes;

use crate::blob::{self, BlobType, Coding, Encoded};
use crate::envelope::{self, Envelope, HEAD, TAIL, fixed};
use crate::error::VaultError;
use crate::ids::{BlobId, LeaseId, PackId};
use crate::keys::Keys;
use crate::names::{Area, ObjectName};

/// Bytes of a pack of chunks, about.
pub const DATA_SIZE: usize = 16 << 20;
/// Bytes of a pack of nodes, about.
pub const TREE_SIZE: usize = 4 << 20;
/// The most blobs of a pack of chunks.
pub const DATA_BLOBS: usize = 4096;
/// The most blobs of a pack of nodes.
pub const TREE_BLOBS: usize = 16384;
/// The last bytes of an object that tell where its table is, with the envelope's end.
pub const FOOT: usize = 16 + TAIL;
const ENTRY: usize = 46;

/// A blob of a pack, as its table tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its id.
    pub id: BlobId,
    /// Its type.
    pub kind: BlobType,
    /// How it is coded.
    pub coding: Coding,
    /// Where its header begins, from the beginning of the object.
    pub offset: u32,
    /// Plain bytes.
    pub raw: u32,
    /// Stored bytes, without the header.
    pub stored: u32,
}

/// A pack that is being filled.
pub struct Builder {
    id: PackId,
    area: Area,
    envelope: Envelope,
    entries: Vec<Entry>,
}

/// A pack that is ready to be put.
#[derive(Clone, Debug)]
pub struct Pack {
    /// Its id.
    pub id: PackId,
    /// Where it belongs.
    pub area: Area,
    /// Its blobs, without the table.
    pub entries: Vec<Entry>,
    /// The whole object.
    pub object: Bytes,
}

impl Pack {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> ObjectName {
        ObjectName::Pack(self.area, self.id)
    }
}

impl Builder {
    /// An empty pack.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn new(keys: &Keys, area: Area, lease: LeaseId) -> Result<Self, VaultError> {
        let id = PackId::random(lease)?;
        let room = if area == Area::Data { DATA_SIZE + (1 << 18) } else { TREE_SIZE + (1 << 20) };
        let envelope = Envelope::begin(&ObjectName::Pack(area, id), keys.is_encrypted(), room);
        Ok(Self { id, area, envelope, entries: Vec::new() })
    }

    /// Appends a blob.
    pub fn add(&mut self, keys: &Keys, blob: &Encoded) -> Entry {
        // A pack is finished when it is full, long before an offset could outgrow its field.
        let offset = self.envelope.len() as u32;
        self.envelope.append(&blob.header(keys, self.id, offset));
        self.envelope.append(&blob.stored);
        let entry = Entry {
            id: blob.id,
            kind: blob.kind,
            coding: blob.coding,
            offset,
            raw: blob.raw,
            stored: blob.stored.len() as u32,
        };
        self.entries.push(entry);
        entry
    }

    /// Whether nothing more should be added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let (size, blobs) = match self.area {
            Area::Data => (DATA_SIZE, DATA_BLOBS),
            Area::Tree => (TREE_SIZE, TREE_BLOBS),
        };
        self.envelope.len() >= size || self.entries.len() >= blobs
    }

    /// Whether nothing was added.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> PackId {
        self.id
    }

    /// The object, with its table. For blocking threads.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn finish(mut self, keys: &Keys) -> Result<Pack, VaultError> {
        let mut plain = Vec::with_capacity(self.entries.len() * ENTRY);
        for entry in &self.entries {
            plain.extend_from_slice(entry.id.bytes());
            plain.extend_from_slice(&[entry.kind.code(), entry.coding.code()]);
            for number in [entry.offset, entry.raw, entry.stored] {
                plain.extend_from_slice(&number.to_le_bytes());
            }
        }
        let id = keys.ids(None).id(BlobType::Table, &plain);
        let table = blob::encode(keys, BlobType::Table, false, id, &plain)?;
        let offset = self.envelope.len();
        self.envelope.append(&table.header(keys, self.id, offset as u32));
        self.envelope.append(&table.stored);
        let length = self.envelope.len() - offset;
        self.envelope.append(&(offset as u64).to_le_bytes());
        self.envelope.append(&(length as u64).to_le_bytes());
        Ok(Pack { id: self.id, area: self.area, entries: self.entries, object: self.envelope.finish() })
    }
}

/// Where the table is, from the last [`FOOT`] bytes of an object of this length.
///
/// # Errors
/// If they are not those of a whole pack.
pub fn table_range(name: &ObjectName, length: u64, foot: &[u8]) -> Result<std::ops::Range<u64>, VaultError> {
    let (place, tail) =
        foot.split_first_chunk::<16>().ok_or_else(|| VaultError::damaged(name, "it is cut off"))?;
    envelope::check_tail(length, tail).map_err(|error| crate::codec::wrong(name, error))?;
    let number = |at: usize| u64::from_le_bytes(fixed(&place[at..at + 8]));
    let (offset, size) = (number(0), number(8));
    let end = offset.checked_add(size).filter(|end| *end + FOOT as u64 == length && offset >= HEAD as u64);
    Ok(offset..end.ok_or_else(|| VaultError::damaged(name, "its table is not where it should be"))?)
}

/// The blobs that a table names.
///
/// # Errors
/// If it is damaged, or names what cannot be.
pub fn read_table(
    keys: &Keys,
    area: Area,
    pack: PackId,
    offset: u64,
    bytes: &[u8],
) -> Result<Vec<Entry>, VaultError> {
    let name = ObjectName::Pack(area, pack);
    let wrong = |cause: &dyn std::fmt::Display| VaultError::damaged(&name, format!("its table: {cause}"));
    let at = u32::try_from(offset).map_err(|error| wrong(&error))?;
    let table = Encoded::parse(keys, pack, at, bytes).map_err(|error| wrong(&error))?;
    let plain = table
        .open_checked(keys, &keys.ids(None), BlobType::Table, table.id)
        .map_err(|error| wrong(&error))?;
    let entry = |bytes: &[u8]| {
        let number = |at: usize| u32::from_le_bytes(fixed(&bytes[at..at + 4]));
        let entry = Entry {
            id: BlobId::new(fixed(&bytes[..32])),
            kind: BlobType::parse(bytes[32])?,
            coding: Coding::parse(bytes[33])?,
            offset: number(34),
            raw: number(38),
            stored: number(42),
        };
        let end = u64::from(entry.offset) + blob::HEADER as u64 + u64::from(entry.stored);
        (end <= offset && entry.offset as usize >= HEAD).then_some(entry)
    };
    let entries: Option<Vec<Entry>> = plain.chunks_exact(ENTRY).map(entry).collect();
    match entries {
        Some(entries) if plain.len() % ENTRY == 0 => Ok(entries),
        _ => Err(wrong(&"it names what cannot be")),
    }
}

/// The blobs of a pack by their headers, with the table destroyed or the pack cut off: each that still opens. For blocking
/// threads.
///
/// In a vault without encryption a blob that opens may still have other bytes than its id says; whoever reads it finds that.
#[must_use]
pub fn scan(keys: &Keys, pack: PackId, bytes: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = HEAD;
    while at + blob::HEADER <= bytes.len() {
        let found = u32::try_from(at).ok().and_then(|offset| {
            let blob = Encoded::parse(keys, pack, offset, &bytes[at..]).ok()?;
            blob.open(keys).ok()?;
            Some((offset, blob))
        });
        // After damage the next header is looked for byte by byte.
        let Some((offset, blob)) = found else {
            at += 1;
            continue;
        };
        at += blob::HEADER + blob.stored.len();
        if blob.kind != BlobType::Table {
            let Encoded { kind, coding, raw, id, stored } = blob;
            entries.push(Entry { id, kind, coding, offset, raw, stored: stored.len() as u32 });
        }
    }
    entries
}

/// The blobs of a whole pack: by its table, or by their headers if that is destroyed.
#[must_use]
pub fn entries(keys: &Keys, area: Area, pack: PackId, object: &[u8]) -> Vec<Entry> {
    let name = ObjectName::Pack(area, pack);
    let by_table = || {
        let foot = &object[object.len().checked_sub(FOOT)?..];
        let range = table_range(&name, object.len() as u64, foot).ok()?;
        let bytes = object.get(range.start as usize..range.end as usize)?;
        read_table(keys, area, pack, range.start, bytes).ok()
    };
    by_table().unwrap_or_else(|| scan(keys, pack, object))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::VaultId;
    use crate::keys::Root;
    use zeroize::Zeroizing;

    fn built(keys: &Keys) -> (Pack, Vec<Vec<u8>>) {
        let ids = keys.ids(None);
        let mut rng = fastrand::Rng::with_seed(2);
        let plains: Vec<Vec<u8>> =
            [10, 100, 300].map(|length| (0..length).map(|_| rng.u8(..)).collect()).into();
        let mut builder = Builder::new(keys, Area::Data, LeaseId::new([1; 16])).unwrap();
        for plain in &plains {
            let id = ids.id(BlobType::Data, plain);
            builder.add(keys, &blob::encode(keys, BlobType::Data, false, id, plain).unwrap());
        }
        (builder.finish(keys).unwrap(), plains)
    }

    fn both_sorts() -> [Keys; 2] {
        let vault = VaultId::new([1; 16]);
        [Keys::new(vault, Root::None), Keys::new(vault, Root::Master(Zeroizing::new([2; 32])))]
    }

    #[test]
    fn each_blob_is_found_by_the_table_and_by_the_headers_alike() {
        for keys in both_sorts() {
            let (pack, plains) = built(&keys);
            assert!(envelope::scrub(&pack.name(), &pack.object).is_ok());
            assert_eq!(entries(&keys, pack.area, pack.id, &pack.object), pack.entries);
            assert_eq!(scan(&keys, pack.id, &pack.object), pack.entries);
            for (entry, plain) in pack.entries.iter().zip(&plains) {
                let blob =
                    Encoded::parse(&keys, pack.id, entry.offset, &pack.object[entry.offset as usize..])
                        .unwrap();
                let read = blob.open_checked(&keys, &keys.ids(None), BlobType::Data, entry.id).unwrap();
                assert_eq!(read, *plain);
            }
        }
    }

    #[test]
    fn with_any_byte_flipped_all_other_blobs_are_still_found() {
        for keys in both_sorts() {
            let (pack, _) = built(&keys);
            for at in 0..pack.object.len() {
                let mut bytes = pack.object.to_vec();
                bytes[at] ^= 0x20;
                let hit = |entry: &Entry| {
                    let begin = entry.offset as usize;
                    (begin..begin + blob::HEADER + entry.stored as usize).contains(&at)
                };
                let whole: Vec<Entry> = pack.entries.iter().filter(|entry| !hit(entry)).copied().collect();
                for found in [entries(&keys, pack.area, pack.id, &bytes), scan(&keys, pack.id, &bytes)] {
                    assert!(whole.iter().all(|entry| found.contains(entry)), "byte {at}");
                }
            }
        }
    }

    #[test]
    fn a_pack_cut_anywhere_gives_the_blobs_before_the_cut() {
        for keys in both_sorts() {
            let (pack, _) = built(&keys);
            for at in 0..pack.object.len() {
                let whole =
                    |entry: &&Entry| entry.offset as usize + blob::HEADER + entry.stored as usize <= at;
                let expected: Vec<Entry> = pack.entries.iter().filter(whole).copied().collect();
                assert_eq!(entries(&keys, pack.area, pack.id, &pack.object[..at]), expected, "cut at {at}");
            }
        }
    }

    #[test]
    fn a_pack_is_full_by_its_size_and_by_its_blobs() {
        let [keys, _] = both_sorts();
        let tiny = blob::encode(&keys, BlobType::Data, false, BlobId::new([1; 32]), b"x").unwrap();
        let mut builder = Builder::new(&keys, Area::Data, LeaseId::new([1; 16])).unwrap();
        let mut count = 0;
        while !builder.is_full() {
            builder.add(&keys, &tiny);
            count += 1;
        }
        assert_eq!(count, DATA_BLOBS);
        let pack = builder.finish(&keys).unwrap();
        assert_eq!(entries(&keys, pack.area, pack.id, &pack.object).len(), DATA_BLOBS);
    }
}

//! The header, `vault.ID.json`: what must be known before anything else can be read (`FORMAT.md`, §3).
//!
//! Two lines. The first is a JSON object; the second is, as a JSON string, the hash of the first line's bytes: keyed in an
//! encrypted vault, so that a key is known to be wrong before anything is read, and a header to be forged. The hash is over
//! bytes, so a field that only a later version knows is covered as well.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::VaultError;
use crate::ids::{VaultId, hex, unhex};
use crate::keys::Keys;
use crate::names::ObjectName;

/// The version of the format.
pub const FORMAT: u32 = 1;
/// Bytes of a chunk.
pub const CHUNK: u32 = 64 << 10;
/// Slots of a node.
pub const FAN_OUT: u32 = 64;

/// How blobs and boxes are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cipher {
    /// Not at all.
    #[serde(rename = "none")]
    None,
    /// XChaCha20-Poly1305.
    #[serde(rename = "xchacha20-poly1305")]
    XChaCha20Poly1305,
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Always `vmkeep vault`.
    pub magic: String,
    /// The format that it was made with.
    pub format: u32,
    /// The oldest format whose readers can read it.
    pub min_reader: u32,
    /// The oldest format whose writers do no harm.
    pub min_writer: u32,
    /// The vault.
    pub id: VaultId,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Slots of a node.
    pub fan_out: u32,
    /// How blobs are compressed.
    pub compression: String,
    /// How they are encrypted.
    pub cipher: Cipher,
    /// Whether domains share nothing.
    pub separate: bool,
    /// The public key for signatures, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<String>,
}

/// What every version must understand of a header.
#[derive(Deserialize)]
struct Preamble {
    magic: String,
    min_reader: u32,
}

impl Header {
    /// That of a new vault.
    #[must_use]
    pub fn new(keys: &Keys, separate: bool) -> Self {
        Self {
            magic: "vmkeep vault".into(),
            format: FORMAT,
            min_reader: FORMAT,
            min_writer: FORMAT,
            id: keys.vault(),
            chunk_size: CHUNK,
            fan_out: FAN_OUT,
            compression: "zstd".into(),
            cipher: if keys.is_encrypted() { Cipher::XChaCha20Poly1305 } else { Cipher::None },
            separate,
            signed_by: if keys.is_encrypted() { keys.public().map(|key| hex(&key)) } else { None },
        }
    }

    /// The bytes of the object.
    ///
    /// # Errors
    /// Never, for what is in it.
    pub fn encode(&self, keys: &Keys) -> Result<Bytes, VaultError> {
        let mut line =
            serde_json::to_string(self).map_err(|error| VaultError::Contract(error.to_string()))?;
        let hash = keys.header_hash(line.as_bytes());
        line.push_str(&format!("\n\"{}\"\n", hash.to_hex()));
        Ok(line.into())
    }

    /// What the object says, its hash not looked at: the keys are not known yet.
    ///
    /// # Errors
    /// If it is damaged, or newer than this program can read.
    pub fn decode(name: &ObjectName, object: &[u8]) -> Result<Self, VaultError> {
        let (line, _) = split(name, object)?;
        let wrong = |error: serde_json::Error| VaultError::damaged(name, error);
        let preamble: Preamble = serde_json::from_slice(line).map_err(wrong)?;
        if preamble.magic != "vmkeep vault" {
            return Err(VaultError::damaged(name, "it is not the header of a vault"));
        }
        if preamble.min_reader > FORMAT {
            let object = name.to_string();
            return Err(VaultError::Newer { object, found: preamble.min_reader, known: FORMAT });
        }
        let header: Self = serde_json::from_slice(line).map_err(wrong)?;
        if *name != ObjectName::Header(header.id) {
            return Err(VaultError::damaged(name, "it is the header of another vault"));
        }
        if header.chunk_size != CHUNK || header.fan_out != FAN_OUT || header.compression != "zstd" {
            return Err(VaultError::damaged(
                name,
                "chunks, nodes or compression are not those of its format",
            ));
        }
        Ok(header)
    }

    /// Whether the hash fits the keys.
    ///
    /// # Errors
    /// In an encrypted vault [`VaultError::WrongKey`], otherwise damage.
    pub fn check(&self, object: &[u8], keys: &Keys) -> Result<(), VaultError> {
        let name = ObjectName::Header(self.id);
        let (line, hash) = split(&name, object)?;
        // Hashes compare in constant time.
        if keys.header_hash(line) == hash {
            return Ok(());
        }
        match self.cipher {
            Cipher::None => Err(VaultError::damaged(name, "its hash does not fit")),
            Cipher::XChaCha20Poly1305 => Err(VaultError::WrongKey { vault: self.id }),
        }
    }

    /// The public key for signatures.
    #[must_use]
    pub fn public(&self) -> Option<[u8; 32]> {
        unhex(self.signed_by.as_deref()?)
    }
}

fn split<'a>(name: &ObjectName, object: &'a [u8]) -> Result<(&'a [u8], blake3::Hash), VaultError> {
    let parts = || {
        let end = object.iter().position(|byte| *byte == b'\n')?;
        let second = object[end + 1..].strip_prefix(b"\"")?.strip_suffix(b"\"\n")?;
        let hash: [u8; 32] = unhex(std::str::from_utf8(second).ok()?)?;
        Some((&object[..end], blake3::Hash::from_bytes(hash)))
    };
    parts().ok_or_else(|| VaultError::damaged(name, "it is not two lines, the second of them a hash"))
}

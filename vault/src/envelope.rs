//! What is around every object but the header (`FORMAT.md`, §3): who it is, how long, and a seal.
//!
//! ```text
//! magic "VKv1"  kind u8  flags u8  version u16  object id 24  |  body  |  length of all u64  seal 32  "VKen"
//! ```
//!
//! The seal is BLAKE3 of everything before it, so a scrub needs no key. It proves nothing about who wrote the object. An
//! object that does not open is *damaged*; nothing here ever says that it is absent.

use bytes::Bytes;

use crate::names::ObjectName;

/// Bytes before the body.
pub const HEAD: usize = 32;
/// Bytes after the body.
pub const TAIL: usize = 44;
/// The newest version of any object that is known.
pub const VERSION: u16 = 1;

const MAGIC: &[u8; 4] = b"VKv1";
const END: &[u8; 4] = b"VKen";
const ENCRYPTED: u8 = 1;

/// What does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// It is cut off.
    #[error("it is too short")]
    Short,
    /// It does not begin or end as an object does.
    #[error("it does not begin or end as an object of a vault does")]
    Magic,
    /// It is another object.
    #[error("it is another object than its name says")]
    Other,
    /// It is of a later version.
    #[error("it is of version {0}, known is {VERSION}")]
    Version(u16),
    /// It says that it is encrypted and the vault is not, or the other way round.
    #[error("it is encrypted and the vault is not, or the other way round")]
    Encryption,
    /// Its length is not the one that it was put with.
    #[error("its length is not the one that it was put with")]
    Length,
    /// Its bytes are not those that were put.
    #[error("its bytes do not fit its seal")]
    Seal,
}

/// An object that is being written.
pub struct Envelope {
    bytes: Vec<u8>,
    hasher: blake3::Hasher,
    hashed: usize,
}

impl Envelope {
    /// Begins an object.
    #[must_use]
    pub fn begin(name: &ObjectName, encrypted: bool, room: usize) -> Self {
        let mut bytes = Vec::with_capacity(HEAD + room + TAIL);
        bytes.extend_from_slice(MAGIC);
        bytes.push(name.kind().map_or(0, |kind| kind as u8));
        bytes.push(if encrypted { ENCRYPTED } else { 0 });
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&name.object_id());
        Self { bytes, hasher: blake3::Hasher::new(), hashed: 0 }
    }

    /// Appends to the body, and says at which place of the object.
    pub fn append(&mut self, bytes: &[u8]) -> usize {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        // In large pieces: BLAKE3 is several times as fast on those.
        if self.bytes.len() - self.hashed >= 1 << 18 {
            self.hash_up();
        }
        at
    }

    /// Bytes so far, with the head.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the body is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == HEAD
    }

    /// The object.
    #[must_use]
    pub fn finish(mut self) -> Bytes {
        let length = (self.bytes.len() + TAIL) as u64;
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.hash_up();
        self.bytes.extend_from_slice(self.hasher.finalize().as_bytes());
        self.bytes.extend_from_slice(END);
        self.bytes.into()
    }

    fn hash_up(&mut self) {
        self.hasher.update(&self.bytes[self.hashed..]);
        self.hashed = self.bytes.len();
    }
}

/// A whole object around a body.
#[must_use]
pub fn wrap(name: &ObjectName, encrypted: bool, body: &[u8]) -> Bytes {
    let mut envelope = Envelope::begin(name, encrypted, body.len());
    envelope.append(body);
    envelope.finish()
}

/// The body of a whole object, once everything about it fits.
///
/// # Errors
/// What does not fit.
pub fn unwrap(name: &ObjectName, encrypted: bool, object: &Bytes) -> Result<Bytes, EnvelopeError> {
    check_head(name, encrypted, object)?;
    let body_end = object.len().checked_sub(TAIL).filter(|end| *end >= HEAD).ok_or(EnvelopeError::Short)?;
    check_tail(object.len() as u64, &object[body_end..])?;
    let sealed = body_end + 8;
    // Compared in constant time, which costs nothing here.
    if blake3::hash(&object[..sealed]) != blake3::Hash::from_bytes(fixed(&object[sealed..sealed + 32])) {
        return Err(EnvelopeError::Seal);
    }
    Ok(object.slice(HEAD..body_end))
}

/// Whether the first bytes are those of this object.
///
/// # Errors
/// What does not fit.
pub fn check_head(name: &ObjectName, encrypted: bool, head: &[u8]) -> Result<(), EnvelopeError> {
    let head = head.get(..HEAD).ok_or(EnvelopeError::Short)?;
    if &head[..4] != MAGIC {
        return Err(EnvelopeError::Magic);
    }
    if name.kind().map(|kind| kind as u8) != Some(head[4]) || head[8..] != name.object_id() {
        return Err(EnvelopeError::Other);
    }
    match u16::from_le_bytes([head[6], head[7]]) {
        VERSION => {}
        version => return Err(EnvelopeError::Version(version)),
    }
    if head[5] != u8::from(encrypted) {
        return Err(EnvelopeError::Encryption);
    }
    Ok(())
}

/// Whether the last [`TAIL`] bytes are those of a whole object of this length. The seal is not looked at.
///
/// # Errors
/// What does not fit.
pub fn check_tail(length: u64, tail: &[u8]) -> Result<(), EnvelopeError> {
    if tail.len() != TAIL {
        return Err(EnvelopeError::Short);
    }
    if &tail[40..] != END {
        return Err(EnvelopeError::Magic);
    }
    if u64::from_le_bytes(fixed(&tail[..8])) != length {
        return Err(EnvelopeError::Length);
    }
    Ok(())
}

/// Whether an object is what was put, by its seal alone: no key is needed.
///
/// # Errors
/// What does not fit.
pub fn scrub(name: &ObjectName, object: &Bytes) -> Result<(), EnvelopeError> {
    let encrypted = object.get(5).is_some_and(|flags| *flags & ENCRYPTED != 0);
    unwrap(name, encrypted, object).map(drop)
}

/// A slice of a length that was checked before.
pub(crate) fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(bytes);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{LeaseId, PackId};
    use crate::names::Area;

    fn name() -> ObjectName {
        ObjectName::Pack(Area::Data, PackId::random(LeaseId::new([1; 16])).unwrap())
    }

    #[test]
    fn a_body_comes_back_however_it_was_appended() {
        let name = name();
        for body in [vec![], vec![7; 1], vec![8; 700_000]] {
            let whole = wrap(&name, true, &body);
            let mut pieces = Envelope::begin(&name, true, 0);
            for piece in body.chunks(100_000) {
                pieces.append(piece);
            }
            assert_eq!(pieces.finish(), whole);
            assert_eq!(unwrap(&name, true, &whole).unwrap(), body);
            assert_eq!(scrub(&name, &whole), Ok(()));
        }
    }

    #[test]
    fn a_flip_of_any_bit_and_a_cut_at_any_byte_are_seen() {
        let name = name();
        let whole = wrap(&name, true, b"a body");
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.to_vec();
                bytes[at] ^= 1 << bit;
                let bytes = Bytes::from(bytes);
                assert!(unwrap(&name, true, &bytes).is_err(), "bit {bit} of byte {at}");
                assert!(scrub(&name, &bytes).is_err(), "bit {bit} of byte {at}");
            }
            assert!(unwrap(&name, true, &whole.slice(..at)).is_err(), "cut at {at}");
            assert!(unwrap(&name, true, &whole.slice(at + 1..)).is_err(), "begun after {at}");
        }
        let longer: Bytes = [&whole[..], b"x"].concat().into();
        assert!(unwrap(&name, true, &longer).is_err());
    }

    #[test]
    fn an_object_under_another_name_or_of_another_sort_of_vault_is_refused() {
        let (one, other) = (name(), name());
        let whole = wrap(&one, true, b"a body");
        assert_eq!(unwrap(&other, true, &whole), Err(EnvelopeError::Other));
        assert_eq!(unwrap(&one, false, &whole), Err(EnvelopeError::Encryption));
        let mut newer = whole.to_vec();
        newer[6] = 2;
        assert_eq!(unwrap(&one, true, &newer.into()), Err(EnvelopeError::Version(2)));
    }
}

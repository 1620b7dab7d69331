//! Small objects: JSON, compressed, signed where it must be, in a box, in an envelope.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::envelope::{self, EnvelopeError};
use crate::error::VaultError;
use crate::keys::Keys;
use crate::names::ObjectName;

/// The most that the JSON of one object may have, bytes.
pub const LARGEST: usize = 256 << 20;

/// The object that holds a value.
///
/// # Errors
/// If this key may not sign it, or the kernel has no random bytes.
pub fn encode<T: Serialize>(keys: &Keys, name: &ObjectName, value: &T) -> Result<Bytes, VaultError> {
    let json = serde_json::to_vec(value).map_err(|error| VaultError::Contract(error.to_string()))?;
    let mut plain = zstd::bulk::compress(&json, 3)?;
    if name.is_signed() {
        let signature = keys.sign(name, &plain)?;
        plain.extend_from_slice(&signature);
    }
    Ok(envelope::wrap(name, keys.is_encrypted(), &keys.seal_box(name, 0, &plain)?))
}

/// The value of an object.
///
/// # Errors
/// If anything about it does not fit.
pub fn decode<T: DeserializeOwned>(keys: &Keys, name: &ObjectName, object: &Bytes) -> Result<T, VaultError> {
    let body = unwrap(keys, name, object)?;
    let plain = keys.open_box(name, 0, &body).map_err(|error| VaultError::damaged(name, error))?;
    let plain = match name.is_signed() {
        true => keys.verify(name, &plain).map_err(|error| VaultError::damaged(name, error))?,
        false => &plain,
    };
    let json = expand(plain, LARGEST).map_err(|error| VaultError::damaged(name, error))?;
    serde_json::from_slice(&json).map_err(|error| VaultError::damaged(name, error))
}

/// The body of an object.
///
/// # Errors
/// If its envelope does not fit.
pub fn unwrap(keys: &Keys, name: &ObjectName, object: &Bytes) -> Result<Bytes, VaultError> {
    envelope::unwrap(name, keys.is_encrypted(), object).map_err(|error| wrong(name, error))
}

/// What does not fit an envelope, as an error of the vault.
pub(crate) fn wrong(name: &ObjectName, error: EnvelopeError) -> VaultError {
    match error {
        EnvelopeError::Version(found) => VaultError::Newer {
            object: name.to_string(),
            found: u32::from(found),
            known: u32::from(envelope::VERSION),
        },
        other => VaultError::damaged(name, other),
    }
}

/// Expands a stream of unknown length, up to a limit.
fn expand(compressed: &[u8], limit: usize) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut plain = Vec::new();
    zstd::Decoder::new(compressed)?.take(limit as u64 + 1).read_to_end(&mut plain)?;
    if plain.len() > limit {
        return Err(std::io::Error::other("it grows beyond its limit"));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{LeaseId, MarkId, VaultId};
    use crate::keys::Root;
    use zeroize::Zeroizing;

    #[test]
    fn a_value_comes_back_and_no_flip_of_any_byte_passes() {
        for root in [Root::None, Root::Master(Zeroizing::new([1; 32]))] {
            let keys = Keys::new(VaultId::new([1; 16]), root);
            for name in
                [ObjectName::Damage(MarkId::new([2; 16])), ObjectName::Condemned(LeaseId::new([3; 16]))]
            {
                let value = vec!["one".to_owned(), "two".to_owned()];
                let object = encode(&keys, &name, &value).unwrap();
                assert_eq!(decode::<Vec<String>>(&keys, &name, &object).unwrap(), value);
                for at in 0..object.len() {
                    let mut bytes = object.to_vec();
                    bytes[at] ^= 2;
                    assert!(
                        decode::<Vec<String>>(&keys, &name, &bytes.into()).is_err(),
                        "byte {at} of {name}"
                    );
                    let cut = object.slice(..at);
                    assert!(decode::<Vec<String>>(&keys, &name, &cut).is_err(), "{name} cut at {at}");
                }
            }
        }
    }

    #[test]
    fn what_must_be_signed_is_refused_from_a_writer() {
        let full = Keys::new(VaultId::new([1; 16]), Root::Master(Zeroizing::new([1; 32])));
        let name = ObjectName::Condemned(LeaseId::new([3; 16]));
        // Somebody with the work key makes a box as a writer would, signed with a key of his own.
        let forger = Keys::new(VaultId::new([1; 16]), Root::Master(Zeroizing::new([9; 32])));
        let json = zstd::bulk::compress(b"[]", 3).unwrap();
        let signed = [&json[..], &forger.sign(&name, &json).unwrap()].concat();
        let forged = envelope::wrap(&name, true, &full.seal_box(&name, 0, &signed).unwrap());
        assert!(matches!(decode::<Vec<String>>(&full, &name, &forged), Err(VaultError::Damaged { .. })));
        let bare = envelope::wrap(&name, true, &full.seal_box(&name, 0, &json).unwrap());
        assert!(matches!(decode::<Vec<String>>(&full, &name, &bare), Err(VaultError::Damaged { .. })));
    }

    #[test]
    fn nothing_is_expanded_beyond_the_limit() {
        let bomb = zstd::bulk::compress(&vec![0; 1 << 20], 3).unwrap();
        assert!(expand(&bomb, (1 << 20) - 1).is_err());
        assert_eq!(expand(&bomb, 1 << 20).unwrap().len(), 1 << 20);
    }
}

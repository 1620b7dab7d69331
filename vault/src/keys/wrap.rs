//! Wrapped keys, `keys/KEY`: the master key, or a writer's work key, behind a passphrase or a key file.
//!
//! ```text
//! means u8  role u8  memory KiB u32  passes u32  lanes u32  salt 16  label length u8, label  |  commitment 32  |  nonce 24  key 32  tag 16
//! ```
//!
//! Everything before the commitment is associated data of the box. The cipher does not commit to its key (one box can be
//! made that opens under two), so a second output of the derivation stands beside it and is compared first.

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305};
use zeroize::Zeroizing;

use super::{KeyError, Keys, Role, Root, Secret32, derive, open, recovery, seal, work_key};
use crate::envelope::fixed;
use crate::ids::{VaultId, random};
use crate::names::ObjectName;

/// The least memory of argon2id, KiB.
pub const LEAST_MEMORY: u32 = 64 << 10;
/// The most, KiB: a key must not be able to take a host's memory away.
pub const MOST_MEMORY: u32 = 4 << 20;
/// The fewest passes.
pub const FEWEST_PASSES: u32 = 3;
const MOST_PASSES: u32 = 64;
const MOST_LANES: u32 = 64;
/// The shortest key file, bytes.
pub const SHORTEST_FILE: usize = 32;
/// The longest, bytes.
pub const LONGEST_FILE: usize = 1 << 20;
const PASSPHRASE: u8 = 1;
const KEY_FILE: u8 = 2;
const FIXED: usize = 1 + 1 + 4 + 4 + 4 + 16 + 1;

/// What somebody has to open a vault.
#[derive(Clone)]
pub enum Credential {
    /// A passphrase.
    Passphrase(Zeroizing<String>),
    /// The bytes of a key file.
    KeyFile(Zeroizing<Vec<u8>>),
    /// The 24 words.
    Recovery(Zeroizing<String>),
}

impl Credential {
    /// A passphrase.
    #[must_use]
    pub fn passphrase(text: &str) -> Self {
        Self::Passphrase(Zeroizing::new(text.to_owned()))
    }

    /// A key file.
    #[must_use]
    pub fn key_file(bytes: &[u8]) -> Self {
        Self::KeyFile(Zeroizing::new(bytes.to_vec()))
    }

    /// The 24 words.
    #[must_use]
    pub fn recovery(text: &str) -> Self {
        Self::Recovery(Zeroizing::new(text.to_owned()))
    }
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Passphrase(_) => "Passphrase",
            Self::KeyFile(_) => "KeyFile",
            Self::Recovery(_) => "Recovery",
        })
    }
}

/// How hard a passphrase is made to guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// KiB.
    pub memory: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for Cost {
    fn default() -> Self {
        Self { memory: 256 << 10, passes: 3, lanes: 4 }
    }
}

impl Cost {
    fn check(self) -> Result<Self, KeyError> {
        match self {
            Self { memory, .. } if memory < LEAST_MEMORY => {
                Err(KeyError::Refused("less than 64 MiB for argon2id"))
            }
            Self { memory, .. } if memory > MOST_MEMORY => {
                Err(KeyError::Refused("more than 4 GiB for argon2id"))
            }
            Self { passes, .. } if passes < FEWEST_PASSES => {
                Err(KeyError::Refused("fewer than 3 passes of argon2id"))
            }
            Self { passes, .. } if passes > MOST_PASSES => {
                Err(KeyError::Refused("more than 64 passes of argon2id"))
            }
            Self { lanes, .. } if lanes == 0 || lanes > MOST_LANES => {
                Err(KeyError::Refused("no lanes or more than 64 for argon2id"))
            }
            fits => Ok(fits),
        }
    }
}

/// Wraps a key. Slow for a passphrase, which is its purpose: call it where blocking is allowed.
///
/// # Errors
/// If the vault is not encrypted, a writer's key should be wrapped as a full one, or a limit is not kept.
pub fn wrap(
    keys: &Keys,
    name: &ObjectName,
    by: &Credential,
    role: Role,
    cost: Cost,
    label: &str,
) -> Result<Vec<u8>, KeyError> {
    let inner: Secret32 = match (keys.root(), role) {
        (Root::Master(master), Role::Full) => master.clone(),
        (Root::Master(master), Role::Writer) => work_key(master),
        (Root::Work(work), Role::Writer) => work.clone(),
        (Root::Work(_), Role::Full) => return Err(KeyError::MayNotSign),
        (Root::None, _) => return Err(KeyError::Refused("a vault without encryption has no keys")),
    };
    let (means, cost) = match by {
        Credential::Passphrase(text) if text.is_empty() => {
            return Err(KeyError::Refused("an empty passphrase"));
        }
        Credential::Passphrase(_) => (PASSPHRASE, cost.check()?),
        Credential::KeyFile(_) => (KEY_FILE, Cost { memory: 0, passes: 0, lanes: 0 }),
        Credential::Recovery(_) => return Err(KeyError::Refused("the recovery key is the key itself")),
    };
    let label_length =
        u8::try_from(label.len()).map_err(|_| KeyError::Refused("a label of more than 255 bytes"))?;
    let mut salt = [0; 16];
    random(&mut salt).map_err(|error| KeyError::System(error.to_string()))?;
    let mut body = vec![means, if role == Role::Full { 1 } else { 2 }];
    for number in [cost.memory, cost.passes, cost.lanes] {
        body.extend_from_slice(&number.to_le_bytes());
    }
    body.extend_from_slice(&salt);
    body.push(label_length);
    body.extend_from_slice(label.as_bytes());
    let derived = stretch(by, cost, &salt)?;
    let sealed = seal(&cipher(&derived), &associated(keys.vault(), name, &body), &inner[..])?;
    body.extend_from_slice(&commitment(&derived)[..]);
    body.extend_from_slice(&sealed);
    Ok(body)
}

/// What a wrapped key says of itself to anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Whether a passphrase opens it; else a key file does.
    pub passphrase: bool,
    /// What it may be used for.
    pub role: Role,
    /// Who it is for.
    pub label: String,
}

/// What a wrapped key says of itself. Not authenticated before it has been opened.
///
/// # Errors
/// If it is not a wrapped key.
pub fn label(body: &[u8]) -> Result<Label, KeyError> {
    let (open, _) = split(body)?;
    Ok(Label {
        passphrase: open[0] == PASSPHRASE,
        role: role(open[1])?,
        label: String::from_utf8_lossy(&open[FIXED..]).into_owned(),
    })
}

/// Opens a wrapped key. Slow for a passphrase.
///
/// # Errors
/// [`KeyError::Wrong`] if it is for another passphrase or key file; anything else is damage, or parameters that nobody
/// should be made to compute.
pub fn unwrap(vault: VaultId, name: &ObjectName, body: &[u8], by: &Credential) -> Result<Root, KeyError> {
    if let Credential::Recovery(words) = by {
        return Ok(Root::Master(recovery::master(words)?));
    }
    let (clear, closed) = split(body)?;
    let number = |at: usize| u32::from_le_bytes(fixed(&clear[at..at + 4]));
    let cost = Cost { memory: number(2), passes: number(6), lanes: number(10) };
    let role = role(clear[1])?;
    match (clear[0], by) {
        (PASSPHRASE, Credential::Passphrase(_)) => {
            cost.check()?;
        }
        (KEY_FILE, Credential::KeyFile(_)) => {}
        (PASSPHRASE | KEY_FILE, _) => return Err(KeyError::Wrong),
        _ => return Err(KeyError::NotGenuine),
    }
    let derived = stretch(by, cost, &clear[14..30])?;
    let (expected, sealed) = closed.split_at(32);
    // Hashes compare in constant time.
    if blake3::Hash::from_bytes(*commitment(&derived)) != blake3::Hash::from_bytes(fixed(expected)) {
        return Err(KeyError::Wrong);
    }
    let inner = Zeroizing::new(open(&cipher(&derived), &associated(vault, name, clear), sealed)?);
    let key = Zeroizing::new(inner.as_slice().try_into().map_err(|_| KeyError::NotGenuine)?);
    Ok(match role {
        Role::Full => Root::Master(key),
        Role::Writer => Root::Work(key),
    })
}

fn role(byte: u8) -> Result<Role, KeyError> {
    match byte {
        1 => Ok(Role::Full),
        2 => Ok(Role::Writer),
        _ => Err(KeyError::NotGenuine),
    }
}

fn split(body: &[u8]) -> Result<(&[u8], &[u8]), KeyError> {
    let label = *body.get(FIXED - 1).ok_or(KeyError::NotGenuine)?;
    let clear = FIXED + usize::from(label);
    if body.len() != clear + 32 + 24 + 32 + 16 {
        return Err(KeyError::NotGenuine);
    }
    Ok(body.split_at(clear))
}

fn associated(vault: VaultId, name: &ObjectName, clear: &[u8]) -> Vec<u8> {
    let name = name.to_string();
    [b"key ", &vault.bytes()[..], &(name.len() as u64).to_le_bytes(), name.as_bytes(), clear].concat()
}

fn stretch(by: &Credential, cost: Cost, salt: &[u8]) -> Result<Secret32, KeyError> {
    match by {
        Credential::Passphrase(text) => {
            let system = |error: argon2::Error| KeyError::System(error.to_string());
            let params = Params::new(cost.memory, cost.passes, cost.lanes, Some(32)).map_err(system)?;
            let mut out = Zeroizing::new([0; 32]);
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_into(text.as_bytes(), salt, &mut out[..])
                .map_err(system)?;
            Ok(out)
        }
        Credential::KeyFile(bytes) if bytes.len() < SHORTEST_FILE => {
            Err(KeyError::Refused("a key file of less than 32 bytes"))
        }
        Credential::KeyFile(bytes) if bytes.len() > LONGEST_FILE => {
            Err(KeyError::Refused("a key file of more than 1 MiB"))
        }
        Credential::KeyFile(bytes) => {
            let file = derive("vmkeep vault 1 key file", bytes);
            Ok(Zeroizing::new(*blake3::keyed_hash(&file, salt).as_bytes()))
        }
        Credential::Recovery(_) => Err(KeyError::Refused("the recovery key is the key itself")),
    }
}

fn cipher(derived: &Secret32) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new((&*derive("vmkeep vault 1 key of a key", &derived[..])).into())
}

fn commitment(derived: &Secret32) -> Secret32 {
    derive("vmkeep vault 1 commitment to a key", &derived[..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::KeyId;

    const CHEAP: Cost = Cost { memory: LEAST_MEMORY, passes: FEWEST_PASSES, lanes: 1 };

    fn keys() -> Keys {
        Keys::new(VaultId::new([1; 16]), Root::Master(Zeroizing::new([2; 32])))
    }

    fn name() -> ObjectName {
        ObjectName::Key(KeyId::new([3; 16]))
    }

    fn inner(root: &Root) -> [u8; 32] {
        match root {
            Root::Master(key) | Root::Work(key) => **key,
            Root::None => panic!("no key"),
        }
    }

    #[test]
    fn a_passphrase_opens_what_it_closed_and_no_other_does() {
        let keys = keys();
        let right = Credential::passphrase("correct horse");
        let body = wrap(&keys, &name(), &right, Role::Full, CHEAP, "the safe").unwrap();
        assert_eq!(inner(&unwrap(keys.vault(), &name(), &body, &right).unwrap()), [2; 32]);
        let said = label(&body).unwrap();
        assert_eq!((said.passphrase, said.role, said.label.as_str()), (true, Role::Full, "the safe"));
        for wrong in [Credential::passphrase("correct horse "), Credential::key_file(&[0; 32])] {
            assert!(matches!(unwrap(keys.vault(), &name(), &body, &wrong), Err(KeyError::Wrong)));
        }
    }

    #[test]
    fn a_writers_key_has_no_way_back_to_the_master_key() {
        let keys = keys();
        let by = Credential::key_file(&[7; 64]);
        let body = wrap(&keys, &name(), &by, Role::Writer, CHEAP, "").unwrap();
        let root = unwrap(keys.vault(), &name(), &body, &by).unwrap();
        assert!(matches!(root, Root::Work(_)));
        let writer = Keys::new(keys.vault(), root);
        assert_eq!(writer.header_hash(b"h"), keys.header_hash(b"h"));
        assert!(wrap(&writer, &name(), &by, Role::Full, CHEAP, "").is_err());
        assert!(wrap(&writer, &name(), &by, Role::Writer, CHEAP, "").is_ok());
    }

    #[test]
    fn a_flip_of_any_byte_and_a_cut_anywhere_leave_a_key_that_does_not_open() {
        let keys = keys();
        let by = Credential::key_file(&[7; 64]);
        let body = wrap(&keys, &name(), &by, Role::Full, CHEAP, "host").unwrap();
        for at in 0..body.len() {
            let mut flipped = body.clone();
            flipped[at] ^= 0x40;
            assert!(unwrap(keys.vault(), &name(), &flipped, &by).is_err(), "byte {at}");
            assert!(unwrap(keys.vault(), &name(), &body[..at], &by).is_err(), "cut at {at}");
        }
        assert!(unwrap(VaultId::new([9; 16]), &name(), &body, &by).is_err(), "another vault");
        assert!(
            unwrap(keys.vault(), &ObjectName::Key(KeyId::new([4; 16])), &body, &by).is_err(),
            "another name"
        );
    }

    #[test]
    fn weak_and_absurd_parameters_are_refused_on_both_sides() {
        let keys = keys();
        let by = Credential::passphrase("x");
        let body = wrap(&keys, &name(), &by, Role::Full, CHEAP, "").unwrap();
        for cost in [
            Cost { memory: LEAST_MEMORY - 1, ..CHEAP },
            Cost { memory: MOST_MEMORY + 1, ..CHEAP },
            Cost { passes: FEWEST_PASSES - 1, ..CHEAP },
            Cost { passes: u32::MAX, ..CHEAP },
            Cost { lanes: 0, ..CHEAP },
            Cost { lanes: 1 << 20, ..CHEAP },
        ] {
            assert!(matches!(wrap(&keys, &name(), &by, Role::Full, cost, ""), Err(KeyError::Refused(_))));
            let mut forged = body.clone();
            forged[2..6].copy_from_slice(&cost.memory.to_le_bytes());
            forged[6..10].copy_from_slice(&cost.passes.to_le_bytes());
            forged[10..14].copy_from_slice(&cost.lanes.to_le_bytes());
            assert!(
                matches!(unwrap(keys.vault(), &name(), &forged, &by), Err(KeyError::Refused(_))),
                "{cost:?}"
            );
        }
        for short in [Credential::key_file(&[1; 31]), Credential::passphrase("")] {
            assert!(matches!(wrap(&keys, &name(), &short, Role::Full, CHEAP, ""), Err(KeyError::Refused(_))));
        }
    }
}

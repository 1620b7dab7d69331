//! Ids: 16 random bytes for most things, 24 for packs and runs, 32 for what a hash names (`FORMAT.md`, §2).

use std::fmt;
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Fills with random bytes of the kernel's.
///
/// # Errors
/// If the kernel has none, which on Linux only a very old one or a filter on system calls brings about.
pub(crate) fn random(mut out: &mut [u8]) -> std::io::Result<()> {
    #[cfg(any(test, feature = "simulation"))]
    if seeded::fill(out) {
        return Ok(());
    }
    while !out.is_empty() {
        match getrandom(&mut *out, GetRandomFlags::empty()) {
            Ok(filled) => out = &mut out[filled..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Ids that a seed decides, for tests that must be repeated exactly: on the thread that asked for it, nowhere else.
#[cfg(any(test, feature = "simulation"))]
pub(crate) mod seeded {
    use std::cell::RefCell;

    thread_local! {
        static RNG: RefCell<Option<fastrand::Rng>> = const { RefCell::new(None) };
    }

    pub(crate) fn from(seed: Option<u64>) {
        RNG.set(seed.map(fastrand::Rng::with_seed));
    }

    pub(super) fn fill(out: &mut [u8]) -> bool {
        RNG.with_borrow_mut(|rng| rng.as_mut().map(|rng| rng.fill(out)).is_some())
    }
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of lower-case hex of exactly this length. Upper case is refused: an object has one name.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Not an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an id")]
pub struct NotAnId;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $len]);

        impl $name {
            /// From its bytes.
            #[must_use]
            pub const fn new(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// Its bytes.
            #[must_use]
            pub const fn bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

macro_rules! plain_text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex(&self.0))
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;

            fn from_str(text: &str) -> Result<Self, NotAnId> {
                unhex(text).map(Self).ok_or(NotAnId)
            }
        }
    };
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        id!($(#[$doc])* $name, 16);
        plain_text!($name);

        impl $name {
            /// A new one.
            ///
            /// # Errors
            /// If the kernel has no random bytes.
            pub fn random() -> std::io::Result<Self> {
                let mut bytes = [0; 16];
                random(&mut bytes)?;
                Ok(Self(bytes))
            }
        }
    };
}

random_id!(
    /// A vault.
    VaultId
);
random_id!(
    /// A wrapped key.
    KeyId
);
random_id!(
    /// Somebody who uses the vault, for a time.
    LeaseId
);
random_id!(
    /// A mark, or a report of damage.
    MarkId
);
random_id!(
    /// A domain: libvirt's UUID.
    DomainId
);
random_id!(
    /// A backup: a UUID that begins with a time, which nothing relies upon.
    BackupId
);

impl BackupId {
    /// A new one, of now.
    #[must_use]
    pub fn now() -> Self {
        Self(*uuid::Uuid::now_v7().as_bytes())
    }
}

id!(
    /// A blob: what a keyed hash says of its plain bytes. All zero is none: it stands for a chunk, or everything below a
    /// node, that is zero.
    BlobId,
    32
);
plain_text!(BlobId);

impl BlobId {
    /// What stands for zeroes.
    pub const ZERO: Self = Self([0; 32]);

    /// Whether it stands for zeroes.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// Its first eight bytes, which tell almost any two apart. Their order is that of the ids.
    #[must_use]
    pub fn prefix(&self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        u64::from_be_bytes(first)
    }
}

macro_rules! leased_id {
    ($(#[$doc:meta])* $name:ident) => {
        id!($(#[$doc])* $name, 24);

        impl $name {
            /// A new one, under a lease.
            ///
            /// # Errors
            /// If the kernel has no random bytes.
            pub fn random(lease: LeaseId) -> std::io::Result<Self> {
                let mut bytes = [0; 24];
                bytes[..16].copy_from_slice(&lease.0);
                random(&mut bytes[16..])?;
                Ok(Self(bytes))
            }

            /// The lease under which it was put.
            #[must_use]
            pub fn lease(&self) -> LeaseId {
                let mut lease = [0; 16];
                lease.copy_from_slice(&self.0[..16]);
                LeaseId(lease)
            }

            /// The first byte of what is random in it.
            #[must_use]
            pub fn shelf(&self) -> u8 {
                self.0[16]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}.{}", hex(&self.0[..16]), hex(&self.0[16..]))
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;

            fn from_str(text: &str) -> Result<Self, NotAnId> {
                let (lease, random) = text.split_once('.').ok_or(NotAnId)?;
                let mut bytes = [0; 24];
                bytes[..16].copy_from_slice(&unhex::<16>(lease).ok_or(NotAnId)?);
                bytes[16..].copy_from_slice(&unhex::<8>(random).ok_or(NotAnId)?);
                Ok(Self(bytes))
            }
        }
    };
}

leased_id!(
    /// A pack: `LEASE.RANDOM`.
    PackId
);
leased_id!(
    /// A run of the index: `LEASE.RANDOM`.
    RunId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_back_and_have_one_spelling() {
        let lease = LeaseId::random().unwrap();
        let pack = PackId::random(lease).unwrap();
        assert_eq!(pack.to_string().parse(), Ok(pack));
        assert_eq!(pack.lease(), lease);
        assert_eq!(lease.to_string().parse(), Ok(lease));
        let all_letters = LeaseId::new([0xab; 16]).to_string();
        assert_eq!(all_letters.to_uppercase().parse::<LeaseId>(), Err(NotAnId));
        for wrong in ["", "00", &all_letters[1..], &format!("{all_letters}0"), "é".repeat(16).as_str()] {
            assert_eq!(wrong.parse::<LeaseId>(), Err(NotAnId), "{wrong}");
        }
        let json = serde_json::to_string(&pack).unwrap();
        assert_eq!(serde_json::from_str::<PackId>(&json).unwrap(), pack);
    }
}

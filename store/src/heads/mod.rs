//! Signed heads: what finds a journal that was rewritten as a whole, or whose end was cut off.
//!
//! The chains of a journal have no key ([`crate::chain`]). Whoever can write the store can compute all of them anew, or leave
//! out its end, and what is left fits. A *head* is the number and the link of a commit; the link covers every record up to
//! there. Signed, and kept where that somebody cannot write, it is a promise about the past that no later journal can get
//! around: the journal must still have that commit, with that link.
//!
//! **What is signed**: the store's id, the commit's number and link, the instant, the public key, after a string that says what
//! this is and in which version, so that the signature can never be taken for one of something else. All of fixed length.
//! Ed25519, verified strictly (no small-order keys, no malleable signatures). A line is accepted only as this module writes
//! it, to the byte, so nothing in it is outside of the signature.
//!
//! **What it is worth.** The key lies on the host. Whoever is root there can sign any head *from then on*; what he cannot do
//! is take back those that have left the host before. So heads go where they leave it: the log, and from there wherever logs
//! go. A file of heads that lies beside the store proves less: it finds a store that was replaced, cut or restored by itself,
//! not one that was replaced together with the file. What came after the last head that was kept elsewhere is not vouched
//! for; a check says how many commits that are.
//!
//! | to learn about | read |
//! |---|---|
//! | keys, lines, signatures | this module |
//! | the key and the file of heads on disk, and what a crash leaves | [`Notary`] |
//! | checking heads, and a journal against them | [`Heads`] |
//!
//! **A new key** is vouched for by the old one, and names it as its predecessor: a line of its own, signed by both. Who trusts the
//! old key therefore trusts those that follow on it, and who trusts the new one those before it. (Not both at once: a successor
//! of a predecessor may be somebody's who stole the predecessor.) When a key was lost nobody can vouch for the next one: heads
//! under it are refused until somebody says that he trusts it.
//!
//! Pruning ([`crate::burial`]) and moving a journal to another engine ([`crate::migrate`]) keep numbers and links, so heads
//! that were signed before hold after. An import makes commits of its own, in a store with an id of its own: heads of the
//! first store say nothing about it.
//!
//! Rejected: a signature in each commit (it costs on the path of every append, and says nothing about the end), a keyed hash
//! (whoever checks could forge), a counter in a TPM (not every host has one; the log reaches farther).

mod check;
mod notary;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::chain::{self, hex, unhex};

pub use self::check::{Contradiction, Heads, HeadsError, Trust, Vouched};
pub use self::notary::{KeyOrigin, Notary, log_path, public_key};

/// The version of the lines that this release writes, and the newest that it reads.
pub const VERSION: u32 = 1;

/// What the signatures are about. The versions in here are those of what is signed.
const HEAD: &[u8] = b"vmkeep head of a journal, version 1\0";
const KEY: &[u8] = b"vmkeep successor of a key, version 1\0";

/// The longest line.
pub(crate) const MAX_LINE: u64 = 4096;

/// A public key. Its text is 64 hexadecimal digits, and also its name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey(Bytes);

/// 32 bytes that are a point of the curve, as it is written, and of no small order.
type Bytes = [u8; 32];

impl PublicKey {
    fn of(key: &SigningKey) -> Self {
        Self(key.verifying_key().to_bytes())
    }

    fn bytes(&self) -> &Bytes {
        &self.0
    }

    fn signed(&self, message: &[u8], signature: &Signature) -> bool {
        VerifyingKey::from_bytes(&self.0).is_ok_and(|key| key.verify_strict(message, signature).is_ok())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(self.bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// The text is no public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no public key: 64 hexadecimal digits, as `vmkeep audit key` prints them")]
pub struct NoKey;

impl FromStr for PublicKey {
    type Err = NoKey;

    fn from_str(text: &str) -> Result<Self, NoKey> {
        let bytes = unhex(text).filter(|bytes| hex(bytes) == text).ok_or(NoKey)?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| NoKey)?;
        if key.is_weak() || key.as_bytes() != &bytes {
            return Err(NoKey);
        }
        Ok(Self(bytes))
    }
}

/// Where a journal ended at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The store.
    pub store: Uuid,
    /// The last commit; from 1.
    pub commit: u64,
    /// Its link.
    pub link: chain::Hash,
    /// When, by the clock of the host.
    pub at: Timestamp,
}

impl Head {
    fn message(&self, key: &PublicKey) -> Vec<u8> {
        let at = self.at.as_nanosecond().to_le_bytes();
        [HEAD, self.store.as_bytes(), &self.commit.to_le_bytes(), &self.link, &at, key.bytes()].concat()
    }
}

/// A head with a signature that fits it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedHead {
    /// The head.
    pub head: Head,
    /// The key that signed it.
    pub key: PublicKey,
    signature: Signature,
}

impl SignedHead {
    fn new(head: Head, key: &SigningKey) -> Self {
        let public = PublicKey::of(key);
        Self { head, key: public, signature: key.sign(&head.message(&public)) }
    }
}

/// A new key, signed by the old one and by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Succession {
    /// The store.
    pub store: Uuid,
    /// When, by the clock of the host.
    pub at: Timestamp,
    /// The key that was in use.
    pub old: PublicKey,
    /// The one that is from now on.
    pub new: PublicKey,
    by_old: Signature,
    by_new: Signature,
}

impl Succession {
    fn message(store: Uuid, at: Timestamp, old: &PublicKey, new: &PublicKey) -> Vec<u8> {
        let at = at.as_nanosecond().to_le_bytes();
        [KEY, store.as_bytes(), &at, old.bytes(), new.bytes()].concat()
    }

    fn new(store: Uuid, at: Timestamp, old: &SigningKey, new: &SigningKey) -> Self {
        let (one, other) = (PublicKey::of(old), PublicKey::of(new));
        let message = Self::message(store, at, &one, &other);
        Self { store, at, old: one, new: other, by_old: old.sign(&message), by_new: new.sign(&message) }
    }
}

/// A line of a file of heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// A head.
    Head(SignedHead),
    /// A new key.
    Key(Box<Succession>),
}

/// Why a line is none of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// It is something else, or it was changed.
    #[error("this is no line of a file of heads: {0}")]
    NotALine(String),
    /// A newer release wrote it.
    #[error("it has version {found}, and this release reads up to {known}")]
    TooNew {
        /// Its version.
        found: u32,
        /// The newest version known.
        known: u32,
    },
    /// The signature does not fit what is signed.
    #[error("its signature does not fit: it was changed, or was not signed with the key that it names")]
    Signature,
}

/// What a line of any version has.
#[derive(Deserialize)]
struct AnyLine {
    vmkeep: String,
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadLine {
    vmkeep: String,
    version: u32,
    store: Uuid,
    commit: u64,
    link: String,
    at: Timestamp,
    key: String,
    signature: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyLine {
    vmkeep: String,
    version: u32,
    store: Uuid,
    at: Timestamp,
    old: String,
    new: String,
    by_old: String,
    by_new: String,
}

fn signature_text(signature: &Signature) -> String {
    let bytes = signature.to_bytes();
    let (one, other) = bytes.split_at(32);
    let half = |half: &[u8]| half.try_into().map(|half: Bytes| hex(&half)).unwrap_or_default();
    half(one) + &half(other)
}

fn signature(text: &str) -> Result<Signature, LineError> {
    let wrong = || LineError::NotALine("a signature is 128 hexadecimal digits".to_owned());
    let (one, other) = text.split_at_checked(64).ok_or_else(wrong)?;
    let (one, other) = (unhex(one).ok_or_else(wrong)?, unhex(other).ok_or_else(wrong)?);
    Ok(Signature::from_components(one, other))
}

fn understood<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, LineError> {
    serde_json::from_str(text).map_err(|e| LineError::NotALine(e.to_string()))
}

fn key(text: &str) -> Result<PublicKey, LineError> {
    text.parse().map_err(|e: NoKey| LineError::NotALine(e.to_string()))
}

impl Line {
    /// The line as text, without its end.
    #[must_use]
    pub fn render(&self) -> String {
        let json = match self {
            Self::Head(SignedHead { head, key, signature }) => serde_json::to_string(&HeadLine {
                vmkeep: "head".to_owned(),
                version: VERSION,
                store: head.store,
                commit: head.commit,
                link: hex(&head.link),
                at: head.at,
                key: key.to_string(),
                signature: signature_text(signature),
            }),
            Self::Key(succession) => serde_json::to_string(&KeyLine {
                vmkeep: "key".to_owned(),
                version: VERSION,
                store: succession.store,
                at: succession.at,
                old: succession.old.to_string(),
                new: succession.new.to_string(),
                by_old: signature_text(&succession.by_old),
                by_new: signature_text(&succession.by_new),
            }),
        };
        // Of texts and numbers: it cannot fail.
        json.unwrap_or_default()
    }

    /// Reads a line, and checks its signatures against the keys that it names. Whether those are trusted is another question.
    ///
    /// # Errors
    /// See [`LineError`].
    pub fn parse(text: &str) -> Result<Self, LineError> {
        let line = Self::understand(text)?;
        line.verify()?;
        Ok(line)
    }

    /// Reads a line without checking its signatures.
    fn understand(text: &str) -> Result<Self, LineError> {
        if text.len() as u64 >= MAX_LINE {
            return Err(LineError::NotALine("it is too long".to_owned()));
        }
        // The version first: the rest may have changed its meaning.
        let any: AnyLine = understood(text)?;
        let line = match any.vmkeep.as_str() {
            "head" | "key" if any.version > VERSION => {
                return Err(LineError::TooNew { found: any.version, known: VERSION });
            }
            "head" => Self::head(&understood(text)?)?,
            "key" => Self::succession(&understood(text)?)?,
            _ => return Err(LineError::NotALine("it says that it is something else".to_owned())),
        };
        if line.render() != text {
            return Err(LineError::NotALine("it is not written as vmkeep writes it".to_owned()));
        }
        Ok(line)
    }

    fn head(line: &HeadLine) -> Result<Self, LineError> {
        let link = unhex(&line.link).ok_or_else(|| LineError::NotALine("the link is no hash".to_owned()))?;
        if line.commit == 0 {
            return Err(LineError::NotALine("there is no commit 0".to_owned()));
        }
        let head = Head { store: line.store, commit: line.commit, link, at: line.at };
        Ok(Self::Head(SignedHead { head, key: key(&line.key)?, signature: signature(&line.signature)? }))
    }

    fn succession(line: &KeyLine) -> Result<Self, LineError> {
        let (old, new) = (key(&line.old)?, key(&line.new)?);
        if old == new {
            return Err(LineError::NotALine("no key follows on itself".to_owned()));
        }
        let (by_old, by_new) = (signature(&line.by_old)?, signature(&line.by_new)?);
        Ok(Self::Key(Box::new(Succession { store: line.store, at: line.at, old, new, by_old, by_new })))
    }

    fn verify(&self) -> Result<(), LineError> {
        let fits = match self {
            Self::Head(SignedHead { head, key, signature }) => key.signed(&head.message(key), signature),
            Self::Key(s) => {
                let message = Succession::message(s.store, s.at, &s.old, &s.new);
                s.old.signed(&message, &s.by_old) && s.new.signed(&message, &s.by_new)
            }
        };
        if fits { Ok(()) } else { Err(LineError::Signature) }
    }
}

//! The names of objects (`FORMAT.md`, §2). One object has one name: what is parsed and printed is the same, and whatever
//! does not parse is not of the vault, is ignored and never deleted.

use std::fmt;
use std::str::FromStr;

use crate::ids::{BackupId, DomainId, KeyId, LeaseId, MarkId, PackId, RunId, VaultId, hex};

/// What kind of object it is, as its envelope says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A wrapped key.
    Key = 1,
    /// A pack of chunks.
    Data = 2,
    /// A pack of tree nodes.
    Tree = 3,
    /// A run of the index.
    Run = 4,
    /// A manifest.
    Manifest = 5,
    /// A mark on a backup.
    Mark = 6,
    /// A report of damage.
    Damage = 7,
    /// A part of a lease.
    Lease = 8,
    /// A condemnation.
    Condemned = 9,
    /// A feature that came later.
    Feature = 10,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 10] = [
        Self::Key,
        Self::Data,
        Self::Tree,
        Self::Run,
        Self::Manifest,
        Self::Mark,
        Self::Damage,
        Self::Lease,
        Self::Condemned,
        Self::Feature,
    ];
}

/// What is in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Area {
    /// Chunks.
    Data,
    /// Nodes.
    Tree,
}

impl Area {
    /// The folder.
    #[must_use]
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Tree => "tree",
        }
    }
}

/// What a mark says of its backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MarkKind {
    /// Its lease stood when its manifest was there: collections will keep what it needs.
    Checked,
    /// Everything was read and found good.
    Verified,
    /// Something is bad or missing.
    Hurt,
    /// It must not be pruned.
    Protect,
    /// A protection has ended.
    Unprotect,
    /// It is to go.
    Prune,
    /// Somebody without the right asks that it goes.
    Ask,
}

impl MarkKind {
    const ALL: [(Self, &str); 7] = [
        (Self::Checked, "checked"),
        (Self::Verified, "verified"),
        (Self::Hurt, "hurt"),
        (Self::Protect, "protect"),
        (Self::Unprotect, "unprotect"),
        (Self::Prune, "prune"),
        (Self::Ask, "ask"),
    ];

    /// As it stands in a name.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, word)| word)
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, word)| *word == text).map(|(kind, _)| *kind)
    }
}

/// A part of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LeasePart {
    /// It began.
    Begun,
    /// It is alive.
    Beat(u64),
    /// Its holder has nothing in flight any more.
    Ended,
    /// Nobody waits for it any more.
    Revoked,
}

/// The name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectName {
    /// The header.
    Header(VaultId),
    /// A feature that came later.
    Feature(String),
    /// A wrapped key.
    Key(KeyId),
    /// A pack.
    Pack(Area, PackId),
    /// A run of the index.
    Run(RunId),
    /// A manifest.
    Manifest(DomainId, BackupId, LeaseId),
    /// A mark on a backup.
    Mark(BackupId, MarkKind, MarkId),
    /// A report of damage.
    Damage(MarkId),
    /// A part of a lease.
    Lease(LeaseId, LeasePart),
    /// A condemnation, by the lease of its collection.
    Condemned(LeaseId),
}

impl ObjectName {
    /// Its kind; the header has none, for it has no envelope.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        Some(match self {
            Self::Header(_) => return None,
            Self::Feature(_) => Kind::Feature,
            Self::Key(_) => Kind::Key,
            Self::Pack(Area::Data, _) => Kind::Data,
            Self::Pack(Area::Tree, _) => Kind::Tree,
            Self::Run(_) => Kind::Run,
            Self::Manifest(..) => Kind::Manifest,
            Self::Mark(..) => Kind::Mark,
            Self::Damage(_) => Kind::Damage,
            Self::Lease(..) => Kind::Lease,
            Self::Condemned(_) => Kind::Condemned,
        })
    }

    /// The id in its envelope: a pack's or run's own, else the beginning of BLAKE3 of the name.
    #[must_use]
    pub fn object_id(&self) -> [u8; 24] {
        match self {
            Self::Pack(_, id) => *id.bytes(),
            Self::Run(id) => *id.bytes(),
            other => {
                let mut id = [0; 24];
                id.copy_from_slice(&blake3::hash(other.to_string().as_bytes()).as_bytes()[..24]);
                id
            }
        }
    }

    /// Whether whoever puts it must sign it, in an encrypted vault.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        match self {
            Self::Mark(_, kind, _) => matches!(kind, MarkKind::Prune | MarkKind::Unprotect),
            Self::Condemned(_) | Self::Feature(_) => true,
            _ => false,
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(vault) => write!(f, "vault.{vault}.json"),
            Self::Feature(name) => write!(f, "features/{name}"),
            Self::Key(key) => write!(f, "keys/{key}"),
            Self::Pack(area, pack) => write!(f, "{}/{}/{pack}", area.folder(), hex(&[pack.shelf()])),
            Self::Run(run) => write!(f, "index/{run}"),
            Self::Manifest(domain, backup, lease) => write!(f, "backups/{domain}/{backup}.{lease}"),
            Self::Mark(backup, kind, mark) => write!(f, "marks/{backup}/{}.{mark}", kind.word()),
            Self::Damage(mark) => write!(f, "damage/{mark}"),
            Self::Lease(lease, LeasePart::Begun) => write!(f, "leases/{lease}/begun"),
            Self::Lease(lease, LeasePart::Beat(n)) => write!(f, "leases/{lease}/{n}"),
            Self::Lease(lease, LeasePart::Ended) => write!(f, "leases/{lease}/ended"),
            Self::Lease(lease, LeasePart::Revoked) => write!(f, "leases/{lease}/revoked"),
            Self::Condemned(lease) => write!(f, "condemned/{lease}"),
        }
    }
}

/// Not the name of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the name of an object")]
pub struct NotAName;

impl FromStr for ObjectName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let name = parse(text).ok_or(NotAName)?;
        // A number with leading zeroes, a pack on the wrong shelf: other spellings are other objects, not of ours.
        if name.to_string() == text { Ok(name) } else { Err(NotAName) }
    }
}

fn parse(text: &str) -> Option<ObjectName> {
    if let Some(vault) = text.strip_prefix("vault.") {
        return Some(ObjectName::Header(vault.strip_suffix(".json")?.parse().ok()?));
    }
    let (folder, rest) = text.split_once('/')?;
    Some(match folder {
        "features" => {
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            (!rest.is_empty() && rest.len() <= 64 && rest.bytes().all(plain))
                .then(|| ObjectName::Feature(rest.to_owned()))?
        }
        "keys" => ObjectName::Key(rest.parse().ok()?),
        "data" => ObjectName::Pack(Area::Data, rest.split_once('/')?.1.parse().ok()?),
        "tree" => ObjectName::Pack(Area::Tree, rest.split_once('/')?.1.parse().ok()?),
        "index" => ObjectName::Run(rest.parse().ok()?),
        "backups" => {
            let (domain, rest) = rest.split_once('/')?;
            let (backup, lease) = rest.split_once('.')?;
            ObjectName::Manifest(domain.parse().ok()?, backup.parse().ok()?, lease.parse().ok()?)
        }
        "marks" => {
            let (backup, rest) = rest.split_once('/')?;
            let (kind, mark) = rest.split_once('.')?;
            ObjectName::Mark(backup.parse().ok()?, MarkKind::parse(kind)?, mark.parse().ok()?)
        }
        "damage" => ObjectName::Damage(rest.parse().ok()?),
        "leases" => {
            let (lease, part) = rest.split_once('/')?;
            let part = match part {
                "begun" => LeasePart::Begun,
                "ended" => LeasePart::Ended,
                "revoked" => LeasePart::Revoked,
                number => LeasePart::Beat(number.parse().ok()?),
            };
            ObjectName::Lease(lease.parse().ok()?, part)
        }
        "condemned" => ObjectName::Condemned(rest.parse().ok()?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each() -> Vec<ObjectName> {
        let lease = LeaseId::new([1; 16]);
        let pack = |byte| PackId::new([byte; 24]);
        let mut names = vec![
            ObjectName::Header(VaultId::new([2; 16])),
            ObjectName::Feature("erasure-codes2".into()),
            ObjectName::Key(KeyId::new([3; 16])),
            ObjectName::Pack(Area::Data, pack(4)),
            ObjectName::Pack(Area::Tree, pack(0xfe)),
            ObjectName::Run(RunId::new([6; 24])),
            ObjectName::Manifest(DomainId::new([7; 16]), BackupId::now(), lease),
            ObjectName::Damage(MarkId::new([8; 16])),
            ObjectName::Lease(lease, LeasePart::Begun),
            ObjectName::Lease(lease, LeasePart::Beat(0)),
            ObjectName::Lease(lease, LeasePart::Beat(u64::MAX)),
            ObjectName::Lease(lease, LeasePart::Ended),
            ObjectName::Lease(lease, LeasePart::Revoked),
            ObjectName::Condemned(lease),
        ];
        for (kind, _) in MarkKind::ALL {
            names.push(ObjectName::Mark(BackupId::now(), kind, MarkId::new([9; 16])));
        }
        names
    }

    #[test]
    fn each_name_is_read_back() {
        for name in one_of_each() {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
    }

    #[test]
    fn a_name_that_is_spelt_otherwise_is_not_of_the_vault() {
        for name in one_of_each() {
            let text = name.to_string();
            for at in 0..text.len() {
                let cut = &text[..at];
                // A shorter number, or a shorter name of a feature, is another name.
                assert!(cut.parse::<ObjectName>().map_or(true, |other| other.to_string() == cut), "{cut}");
                if matches!(name, ObjectName::Pack(..) | ObjectName::Key(_) | ObjectName::Mark(..)) {
                    assert_eq!(cut.parse::<ObjectName>(), Err(NotAName), "{cut}");
                }
            }
            for wrong in [text.to_uppercase(), format!("{text}/"), format!("/{text}"), format!("{text}.tmp")]
            {
                assert_eq!(wrong.parse::<ObjectName>(), Err(NotAName), "{wrong}");
            }
        }
        for wrong in ["leases/01010101010101010101010101010101/007", "features/", "features/a/b", "tmp/x", ""]
        {
            assert_eq!(wrong.parse::<ObjectName>(), Err(NotAName), "{wrong}");
        }
        let misplaced =
            ObjectName::Pack(Area::Data, PackId::new([4; 24])).to_string().replace("/04/", "/05/");
        assert_eq!(misplaced.parse::<ObjectName>(), Err(NotAName));
    }
}

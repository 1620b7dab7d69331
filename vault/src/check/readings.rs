//! What has been read of a vault, and when: by this a backup is verified although no run reads all of it.
//!
//! A run reads packs: all, those of one backup, or one share of M, which the pack's own random number decides, so every pack
//! is in one share and stays there. Runs are counted. Kept is, of each pack, the last run that read it, and of each backup,
//! the first run that began when it was there. *A backup is verified when everything that it needs has a good place in a
//! pack that was read by that run or a later one*: so all of it was read since it was put, whoever wrote it and however old its
//! chunks are. A pack is never changed, so nothing else needs to be known of it; what a collection has moved lies in a pack
//! that was not there, and is read with the share of that. With the backup verified its count begins again.
//!
//! This is the memory of one host, for the host to keep. When it is lost, or another host reads, everything is read once
//! more; nothing is taken for verified by mistake.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ids::{BackupId, PackId};
use crate::walk::Packs;

/// The most shares: one for each day of three years.
const MOST: u64 = 1096;

/// One of so many shares of a vault's packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    part: u64,
    of: u64,
}

impl Share {
    /// All packs.
    pub const ALL: Self = Self { part: 1, of: 1 };

    /// Whether a pack is in it.
    #[must_use]
    pub fn contains(self, pack: PackId) -> bool {
        number(pack) % self.of == self.part - 1
    }

    /// Whether it is all there is.
    #[must_use]
    pub fn is_all(self) -> bool {
        self.of == 1
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.part, self.of)
    }
}

/// Not a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a share is N/M, as 3/7: the third of seven; M is 1096 at most")]
pub struct NotAShare;

impl FromStr for Share {
    type Err = NotAShare;

    fn from_str(text: &str) -> Result<Self, NotAShare> {
        let (part, of) = text.split_once('/').ok_or(NotAShare)?;
        let number = |text: &str| text.parse().map_err(|_| NotAShare);
        let (part, of): (u64, u64) = (number(part)?, number(of)?);
        if (1..=MOST).contains(&of) && (1..=of).contains(&part) {
            Ok(Self { part, of })
        } else {
            Err(NotAShare)
        }
    }
}

/// The random half of a pack's id. Two packs that have it in common would be one in 2^64.
fn number(pack: PackId) -> u64 {
    let [.., a, b, c, d, e, f, g, h] = *pack.bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// Since when a backup waits for being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Since {
    run: u64,
    at: Timestamp,
}

/// What one host has read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readings {
    /// Runs that began.
    run: u64,
    packs: BTreeMap<u64, u64>,
    backups: BTreeMap<BackupId, Since>,
}

impl Readings {
    /// A run begins: with the backups that were listed before anything is read, and the packs that are there.
    pub(super) fn begin(&mut self, backups: &BTreeSet<BackupId>, packs: &Packs, now: Timestamp) {
        self.run += 1;
        let packs: HashSet<u64> = packs.keys().map(|pack| number(*pack)).collect();
        self.packs.retain(|pack, _| packs.contains(pack));
        self.backups.retain(|backup, _| backups.contains(backup));
        for backup in backups {
            self.backups.entry(*backup).or_insert(Since { run: self.run, at: now });
        }
    }

    /// A pack was read to its end. What is bad in it was reported: it has no good place there.
    pub(super) fn read(&mut self, pack: PackId) {
        self.packs.insert(number(pack), self.run);
    }

    /// The last run that read a pack; 0 if none did.
    pub(crate) fn last(&self, pack: PackId) -> u64 {
        self.packs.get(&number(pack)).copied().unwrap_or(0)
    }

    /// Since when a backup has been read, if everything that it needs was read in this run or since.
    pub(super) fn covers(&self, backup: BackupId, oldest: u64) -> Option<Timestamp> {
        self.backups.get(&backup).filter(|since| oldest >= since.run).map(|since| since.at)
    }

    /// It is verified, and is to be read again from the next run on.
    pub(super) fn restart(&mut self, backup: BackupId) {
        self.backups.remove(&backup);
    }
}

#[cfg(test)]
mod tests;

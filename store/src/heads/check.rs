//! Checking heads against keys that are trusted, and a journal against heads. Neither a store nor the private key is needed.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::{BufRead, Read};

use jiff::Timestamp;
use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use super::{Head, Line, LineError, MAX_LINE, PublicKey, Succession};
use crate::Store;
use crate::chain::Hash;

/// Why heads cannot be relied on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeadsError {
    /// Reading failed.
    #[error("could not read the heads: {0}")]
    Read(#[from] std::io::Error),
    /// A line is none of ours, or does not fit its signature.
    #[error("line {line} of the heads: {error}")]
    Line {
        /// From 1.
        line: u64,
        /// What is wrong with it.
        error: LineError,
    },
    /// A head was signed with a key that nobody vouches for.
    #[error("line {line} of the heads: it was signed with the key {key}, for which no trusted key vouches")]
    Untrusted {
        /// From 1.
        line: u64,
        /// The key.
        key: PublicKey,
    },
    /// There is no head in it.
    #[error("there is no head in it")]
    Empty,
}

/// What a journal has that a head says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Contradiction {
    /// The head is of another store.
    #[error(
        "the head of {at} is of the store {found}, and this is {store}: another journal was put in its place"
    )]
    OtherStore {
        /// When the head was signed.
        at: Timestamp,
        /// The store of the head.
        found: Uuid,
        /// The store that is checked.
        store: Uuid,
    },
    /// The journal ends before the head.
    #[error(
        "the journal ends at commit {last}, and the head of {at} says that it had {commit}: its end was cut off, or an older copy was put in its place"
    )]
    Beyond {
        /// When the head was signed.
        at: Timestamp,
        /// The commit that it had.
        commit: u64,
        /// The commit at which it ends.
        last: u64,
    },
    /// The journal has another commit there.
    #[error(
        "commit {commit} is not the one that the head of {at} was signed for: the journal was rewritten, or an older copy of it was put in its place and went another way"
    )]
    Differs {
        /// When the head was signed.
        at: Timestamp,
        /// The commit.
        commit: u64,
    },
}

/// What the heads say of a journal that does not contradict them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vouched {
    /// How many heads were compared.
    pub heads: u64,
    /// The newest.
    pub newest: Head,
    /// How many commits came after it; nobody vouches for those.
    pub after: u64,
}

/// Whose heads are believed.
#[derive(Clone, Copy, Debug)]
pub enum Trust<'a> {
    /// Those under these keys, and under keys that follow on them, or that they follow on, by successions in the same lines.
    Keys(&'a [PublicKey]),
    /// All whose signature fits the key that they name. For the file beside the store: it proves no more than where it lies.
    Named,
}

/// Heads whose signatures fit, under keys that are trusted.
#[derive(Clone, Debug)]
pub struct Heads {
    heads: Vec<Head>,
    cut_off: bool,
}

impl Heads {
    /// Reads lines, and checks all of them. The last line may have been cut off in the middle of being written.
    ///
    /// # Errors
    /// See [`HeadsError`].
    pub fn read(mut input: impl BufRead, trust: Trust<'_>) -> Result<Self, HeadsError> {
        let (mut found, mut keys, mut cut_off) = (Vec::new(), Vec::new(), false);
        let mut number = 0;
        while let Some((text, ended)) = next_line(&mut input)? {
            number += 1;
            match Line::parse(&text) {
                Ok(Line::Head(signed)) => found.push((number, signed.head, signed.key)),
                Ok(Line::Key(succession)) => keys.push(*succession),
                // There can be nothing after it.
                Err(LineError::NotALine(_)) if !ended => cut_off = true,
                Err(error) => return Err(HeadsError::Line { line: number, error }),
            }
        }
        if let Trust::Keys(trusted) = trust {
            let trusted = family(trusted, &keys);
            if let Some((line, _, key)) = found.iter().find(|(_, _, key)| !trusted.contains(key)) {
                return Err(HeadsError::Untrusted { line: *line, key: *key });
            }
        }
        if found.is_empty() {
            return Err(HeadsError::Empty);
        }
        Ok(Self { heads: found.into_iter().map(|(_, head, _)| head).collect(), cut_off })
    }

    /// Whether the last line was cut off, and left out.
    #[must_use]
    pub fn cut_off(&self) -> bool {
        self.cut_off
    }

    /// The numbers of the commits that heads were signed for.
    #[must_use]
    pub fn commits(&self) -> BTreeSet<u64> {
        self.heads.iter().map(|head| head.commit).collect()
    }

    /// Compares a store with the heads, which must have been read before: those that are signed meanwhile would be beyond it.
    ///
    /// # Errors
    /// When the store cannot be read. Inside, everything that the heads say otherwise.
    pub async fn compare_store(
        &self,
        store: &dyn Store,
    ) -> Result<Result<Vouched, Vec<Contradiction>>, StoreError> {
        let last = store.head().await?.map_or(0, |commit| commit.number);
        let mut links = HashMap::new();
        for number in self.commits() {
            let found = store.commits(number - 1, 1).await?;
            let found = found.first().filter(|found| found.number == number);
            links.extend(found.map(|found| (number, found.link)));
        }
        Ok(self.compare(store.id(), last, &links))
    }

    /// Compares a journal with the heads: its store, its last commit, and the links of those of [`Self::commits`] that it has.
    ///
    /// # Errors
    /// Everything that the heads say otherwise.
    pub fn compare(
        &self,
        store: Uuid,
        last: u64,
        links: &HashMap<u64, Hash>,
    ) -> Result<Vouched, Vec<Contradiction>> {
        let contradiction = |head: &Head| {
            let Head { commit, at, .. } = *head;
            if head.store != store {
                Some(Contradiction::OtherStore { at, found: head.store, store })
            } else if commit > last {
                Some(Contradiction::Beyond { at, commit, last })
            } else if links.get(&commit) != Some(&head.link) {
                Some(Contradiction::Differs { at, commit })
            } else {
                None
            }
        };
        let found: Vec<Contradiction> = self.heads.iter().filter_map(contradiction).collect();
        // One is always there: see `read`. The clock may have been set back, so the number decides.
        match self.heads.iter().max_by_key(|head| (head.commit, head.at)) {
            Some(newest) if found.is_empty() => {
                Ok(Vouched { heads: self.heads.len() as u64, newest: *newest, after: last - newest.commit })
            }
            _ => Err(found),
        }
    }
}

/// The keys that can be trusted if some are: those that follow on them, and those that they follow on.
fn family(trusted: &[PublicKey], successions: &[Succession]) -> HashSet<PublicKey> {
    let heirs = reached(trusted, successions.iter().map(|s| (s.old, s.new)));
    let ancestors = reached(trusted, successions.iter().map(|s| (s.new, s.old)));
    heirs.union(&ancestors).copied().collect()
}

fn reached(from: &[PublicKey], steps: impl Iterator<Item = (PublicKey, PublicKey)>) -> HashSet<PublicKey> {
    let mut next: HashMap<PublicKey, Vec<PublicKey>> = HashMap::new();
    for (one, other) in steps {
        next.entry(one).or_default().push(other);
    }
    let mut reached: HashSet<PublicKey> = from.iter().copied().collect();
    let mut open = from.to_vec();
    while let Some(key) = open.pop() {
        open.extend(next.get(&key).into_iter().flatten().filter(|key| reached.insert(**key)));
    }
    reached
}

/// The next line, and whether it was ended; nothing at the end. What is not UTF-8 is still a line, though none of ours.
fn next_line(input: &mut impl BufRead) -> std::io::Result<Option<(String, bool)>> {
    let mut bytes = Vec::new();
    input.take(MAX_LINE).read_until(b'\n', &mut bytes)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let ended = bytes.last() == Some(&b'\n');
    if ended {
        bytes.pop();
    }
    // A line that is longer counts as ended: what follows of it is none either.
    Ok(Some((String::from_utf8_lossy(&bytes).into_owned(), ended || bytes.len() as u64 >= MAX_LINE)))
}

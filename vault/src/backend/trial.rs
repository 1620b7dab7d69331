//! `vault check --backend`: trying each promise of `FORMAT.md`, §1, at a place that people mean to rely upon.
//!
//! Two connections are used, as if by two hosts: what one has put, the other must see at once. A promise that is kept here may
//! still be broken under load, by a cache that fills up, or by a power cut; one that is broken here is not kept.
//!
//! **Nothing of a vault is touched**: all objects are named as parts of a lease that nobody holds and that says from its
//! first moment on that it has ended. Whoever collects takes them away, should this process die or its credentials not suffice
//! for that; and none does so meanwhile, for the trial holds another lease, which collectors wait for.

use std::collections::BTreeSet;
use std::fmt;

use bytes::Bytes;
use futures_util::{StreamExt, stream};

use super::{Backend, BackendError, BackendErrorKind};
use crate::error::VaultError;
use crate::ids::LeaseId;
use crate::lease::{Holder, Lease};
use crate::names::{LeasePart, ObjectName};
use crate::vault::Vault;

/// Puts and deletions that are in flight at once.
const AT_ONCE: usize = 16;
/// Bytes of the largest object: a pack has about as many.
const LARGEST: usize = 16 << 20;

/// What is relied upon, or good to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// What one connection has put, the other reads at once, also if it has just been told that there is no such object.
    PutThenGet,
    /// And finds in the next list.
    PutThenList,
    /// The bytes come back that were put, from none to as many as a pack has.
    Bytes,
    /// Of what is not there it is said that it is not there, and not that something failed.
    Absent,
    /// A part of an object can be read, and is cut at its end.
    Range,
    /// Putting the same bytes again does no harm.
    Repeated,
    /// Many puts at once, by both, are all there.
    AtOnce,
    /// A list has all objects with their sizes, each once, however many there are; by prefix, and not by folder.
    List,
    /// What was deleted is neither read nor listed by anybody; what is not there is deleted already.
    Delete,
}

impl Promise {
    /// All that are tried, in this order.
    pub const ALL: [Self; 9] = [
        Self::PutThenGet,
        Self::PutThenList,
        Self::Bytes,
        Self::Absent,
        Self::Range,
        Self::Repeated,
        Self::AtOnce,
        Self::List,
        Self::Delete,
    ];
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PutThenGet => "what one has put, the other reads at once",
            Self::PutThenList => "what one has put, the other lists at once",
            Self::Bytes => "the bytes that were put come back",
            Self::Absent => "of what is absent it is said with certainty",
            Self::Range => "a part of an object can be read",
            Self::Repeated => "the same bytes may be put again",
            Self::AtOnce => "many puts at once are all there",
            Self::List => "a list is complete",
            Self::Delete => "what was deleted is gone for everybody",
        })
    }
}

/// Whether a promise was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was.
    Kept,
    /// It was not, and how this was seen.
    Broken(String),
    /// It was not tried: these credentials may not do what it is about.
    Denied(String),
}

/// What these credentials can do beyond putting, reading and listing. A host that is meant to be append-only should be able to
/// do neither.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Powers {
    /// Whether they can delete.
    pub deletes: Power,
    /// Whether they can put other bytes under a name that is taken.
    pub overwrites: Power,
}

/// Whether something can be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Power {
    /// It can.
    Yes,
    /// It is refused, or has no effect.
    No,
    /// It failed in a way that tells neither.
    Unknown(String),
}

/// What a trial has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// One line for each promise, in the order of [`Promise::ALL`].
    pub promises: Vec<(Promise, Verdict)>,
    /// What the first connection's credentials can do.
    pub powers: Powers,
    /// Objects that the trial could not take away again. A collection does.
    pub left: usize,
}

impl Report {
    /// Whether all that could be tried was kept, and only deletion could not be.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.promises.iter().all(|(promise, verdict)| match verdict {
            Verdict::Kept => true,
            Verdict::Denied(_) => *promise == Promise::Delete,
            Verdict::Broken(_) => false,
        })
    }

    /// What was found of a promise.
    #[must_use]
    pub fn of(&self, promise: Promise) -> Option<&Verdict> {
        self.promises.iter().find(|(one, _)| *one == promise).map(|(_, verdict)| verdict)
    }
}

/// Tries a vault's place: by the vault's own connection, and by another to the same place. `objects` are put for the list; more
/// than a page of the backend has (1000 with S3) is what shows something.
///
/// # Errors
/// If the vault may only be read, or the lease could not be put. Whatever fails afterwards is in the report.
pub async fn trial(
    vault: &Vault,
    second: &dyn Backend,
    holder: &Holder,
    objects: u64,
) -> Result<Report, VaultError> {
    vault.writable()?;
    let lease = Lease::begin(vault, holder).await?;
    let scope = LeaseId::random()?;
    let ended = ObjectName::Lease(scope, LeasePart::Ended).to_string();
    let trial = Trial { first: &**vault.backend(), second, scope };
    let report = match trial.first.put(&ended, Bytes::from_static(b"a trial")).await {
        Ok(()) => Ok(Box::pin(trial.run(objects)).await),
        Err(error) => Err(error.into()),
    };
    lease.end().await?;
    report
}

/// How a promise was broken; or that it could not be tried.
enum Found {
    Broken(String),
    Denied(String),
}

impl From<BackendError> for Found {
    fn from(error: BackendError) -> Self {
        match error.kind {
            BackendErrorKind::Denied => Self::Denied(error.to_string()),
            _ => Self::Broken(error.to_string()),
        }
    }
}

macro_rules! ensure {
    ($holds:expr, $($how:tt)*) => {
        if !$holds {
            return Err(Found::Broken(format!($($how)*)));
        }
    };
}

struct Trial<'a> {
    first: &'a dyn Backend,
    second: &'a dyn Backend,
    scope: LeaseId,
}

impl Trial<'_> {
    /// The name of an object of ours.
    fn name(&self, number: u64) -> String {
        ObjectName::Lease(self.scope, LeasePart::Beat(number)).to_string()
    }

    fn all(&self) -> String {
        format!("leases/{}/", self.scope)
    }

    async fn run(&self, objects: u64) -> Report {
        let mut promises = Vec::new();
        for promise in Promise::ALL {
            let found = match promise {
                Promise::PutThenGet => Box::pin(self.put_then_get()).await,
                Promise::PutThenList => Box::pin(self.put_then_list()).await,
                Promise::Bytes => Box::pin(self.bytes()).await,
                Promise::Absent => Box::pin(self.absent()).await,
                Promise::Range => Box::pin(self.range()).await,
                Promise::Repeated => Box::pin(self.repeated()).await,
                Promise::AtOnce => Box::pin(self.at_once()).await,
                Promise::List => Box::pin(self.list(objects)).await,
                Promise::Delete => Box::pin(self.delete()).await,
            };
            let verdict = match found {
                Ok(()) => Verdict::Kept,
                Err(Found::Broken(how)) => Verdict::Broken(how),
                Err(Found::Denied(how)) => Verdict::Denied(how),
            };
            promises.push((promise, verdict));
        }
        let powers = Powers { deletes: self.deletes().await, overwrites: self.overwrites().await };
        Report { promises, powers, left: self.clear().await }
    }

    async fn put(&self, number: u64, bytes: &Bytes) -> Result<String, BackendError> {
        let name = self.name(number);
        self.first.put(&name, bytes.clone()).await?;
        Ok(name)
    }

    async fn put_then_get(&self) -> Result<(), Found> {
        for number in 100..108 {
            let (name, bytes) = (self.name(number), content(number, 1000));
            // A "no" that somebody remembers is what breaks this.
            let _ = self.second.get(&name, None).await;
            self.first.put(&name, bytes.clone()).await?;
            match self.second.get(&name, None).await? {
                Some(read) => ensure!(read == bytes, "{name}: the other reads other bytes"),
                None => ensure!(false, "{name}: was put, and the other is told that it is not there"),
            }
            ensure!(
                self.first.get(&name, None).await? == Some(bytes),
                "{name}: who has put it does not read it"
            );
        }
        Ok(())
    }

    async fn put_then_list(&self) -> Result<(), Found> {
        for number in 200..208 {
            let name = self.name(number);
            self.second.list(&self.all()).await?;
            self.put(number, &content(number, 10)).await?;
            for (who, backend) in [("the other", self.second), ("who has put it", self.first)] {
                let listed = backend.list(&self.all()).await?;
                ensure!(
                    listed.iter().any(|one| one.name == name),
                    "{name}: was put, and {who} does not list it"
                );
            }
        }
        Ok(())
    }

    async fn bytes(&self) -> Result<(), Found> {
        for (number, size) in (300..).zip([0, 1, 4095, 65_537, 1 << 20, LARGEST]) {
            let bytes = content(number, size);
            let name = self.put(number, &bytes).await?;
            let read = self.second.get(&name, None).await?;
            let length = read.as_ref().map_or(0, Bytes::len);
            ensure!(read == Some(bytes), "{name}: {size} bytes were put, {length} came back, or others");
        }
        Ok(())
    }

    async fn absent(&self) -> Result<(), Found> {
        for (who, backend) in [("the one", self.first), ("the other", self.second)] {
            for range in [None, Some(0..10)] {
                let name = self.name(400);
                // Also "denied": with some credentials a store hides what is not there, and nobody can tell it from trouble.
                match backend.get(&name, range).await {
                    Ok(None) => {}
                    Ok(Some(_)) => ensure!(false, "{name}: {who} reads something that nobody has put"),
                    Err(error) => ensure!(false, "{who} is not told that an object is absent: {error}"),
                }
            }
            let listed = backend.list(&self.name(400)).await?;
            ensure!(listed.is_empty(), "{who} lists something that nobody has put");
        }
        Ok(())
    }

    async fn range(&self) -> Result<(), Found> {
        let bytes = content(500, 100_000);
        let name = self.put(500, &bytes).await?;
        for range in
            [0..1, 99_999..100_000, 10..90_000, 65_536..65_536 + 4096, 99_990..100_010, 100_000..100_001]
        {
            let end = (range.end as usize).min(bytes.len());
            let expected = bytes.slice((range.start as usize).min(end)..end);
            match self.second.get(&name, Some(range.clone())).await? {
                Some(read) => {
                    ensure!(read == expected, "{name}: bytes {range:?} of it are not those that were put")
                }
                None => ensure!(false, "{name}: is there, and for bytes {range:?} said not to be"),
            }
        }
        Ok(())
    }

    async fn repeated(&self) -> Result<(), Found> {
        let bytes = content(600, 50_000);
        let name = self.put(600, &bytes).await?;
        for backend in [self.first, self.second] {
            backend.put(&name, bytes.clone()).await?;
            ensure!(
                self.second.get(&name, None).await? == Some(bytes.clone()),
                "{name}: put again, it is another"
            );
        }
        let count = self.second.list(&name).await?.iter().filter(|one| one.name == name).count();
        ensure!(count == 1, "{name}: put three times, it is listed {count} times");
        Ok(())
    }

    async fn at_once(&self) -> Result<(), Found> {
        let puts = (700..764).map(|number| {
            let backend = if number % 2 == 0 { self.first } else { self.second };
            let (name, bytes) = (self.name(number), content(number, 20_000));
            async move { backend.put(&name, bytes).await }
        });
        let done: Vec<Result<(), BackendError>> =
            stream::iter(puts).buffer_unordered(AT_ONCE).collect().await;
        done.into_iter().collect::<Result<Vec<()>, _>>()?;
        for number in 700..764 {
            let name = self.name(number);
            let read = self.first.get(&name, None).await?;
            ensure!(read == Some(content(number, 20_000)), "{name}: was put beside others, and is not there");
        }
        Ok(())
    }

    async fn list(&self, objects: u64) -> Result<(), Found> {
        // All of one length, so that a prefix tells them from all others: 10^9 and what follows.
        let numbers = 1_000_000_000..1_000_000_000 + objects;
        let puts = numbers.clone().map(|number| async move { self.put(number, &content(number, 10)).await });
        let done: Vec<Result<String, BackendError>> =
            stream::iter(puts).buffer_unordered(AT_ONCE).collect().await;
        let names = done.into_iter().collect::<Result<BTreeSet<String>, _>>()?;
        let prefix = format!("{}10", self.all());
        let listed = self.second.list(&prefix).await?;
        let ours: BTreeSet<String> =
            listed.iter().map(|one| one.name.clone()).filter(|name| names.contains(name)).collect();
        ensure!(ours.len() == names.len(), "of {} objects {} are listed", names.len(), ours.len());
        let strangers = listed.iter().find(|one| !one.name.starts_with(&prefix));
        ensure!(strangers.is_none(), "a list of {prefix} has {strangers:?}");
        let mut every: Vec<&str> = listed.iter().map(|one| one.name.as_str()).collect();
        every.sort_unstable();
        every.dedup();
        ensure!(every.len() == listed.len(), "{} objects are listed twice", listed.len() - every.len());
        let wrong = listed.iter().find(|one| names.contains(&one.name) && one.size != 10);
        ensure!(wrong.is_none(), "the size of an object is told wrongly: {wrong:?}");
        // As somebody looks for a whole folder, and for one object.
        let whole = self.second.list("leases/").await?;
        let missing = names.iter().find(|name| !whole.iter().any(|one| one.name == **name));
        ensure!(missing.is_none() || names.is_empty(), "a list of all leases lacks {missing:?}");
        Ok(())
    }

    async fn delete(&self) -> Result<(), Found> {
        let name = self.put(800, &content(800, 100)).await?;
        ensure!(self.second.get(&name, None).await?.is_some(), "{name}: was put, and is not there");
        self.first.delete(&name).await?;
        for (who, backend) in [("who has deleted it", self.first), ("the other", self.second)] {
            ensure!(backend.get(&name, None).await?.is_none(), "{name}: was deleted, and {who} reads it");
            ensure!(backend.list(&name).await?.is_empty(), "{name}: was deleted, and {who} lists it");
        }
        self.second.delete(&name).await?;
        Ok(())
    }

    async fn deletes(&self) -> Power {
        let name = match self.put(900, &content(900, 10)).await {
            Ok(name) => name,
            Err(error) => return Power::Unknown(error.to_string()),
        };
        match self.first.delete(&name).await {
            Ok(()) => match self.second.get(&name, None).await {
                Ok(None) => Power::Yes,
                Ok(Some(_)) => Power::No,
                Err(error) => Power::Unknown(error.to_string()),
            },
            Err(error) if error.kind == BackendErrorKind::Denied => Power::No,
            Err(error) => Power::Unknown(error.to_string()),
        }
    }

    async fn overwrites(&self) -> Power {
        let (kept, other) = (content(901, 10), content(902, 10));
        let name = match self.put(901, &kept).await {
            Ok(name) => name,
            Err(error) => return Power::Unknown(error.to_string()),
        };
        // Refused or not: what counts is what is there then.
        let answer = self.first.put(&name, other.clone()).await;
        match (self.second.get(&name, None).await, answer) {
            (Ok(Some(read)), _) if read == kept => Power::No,
            (Ok(Some(read)), _) if read == other => Power::Yes,
            (Ok(_), _) => Power::Unknown(format!("{name}: neither what was there nor what was put")),
            (Err(error), _) => Power::Unknown(error.to_string()),
        }
    }

    /// Takes away what was put, `ended` last, and tells how much is left.
    async fn clear(&self) -> usize {
        let Ok(mut listed) = self.first.list(&self.all()).await else { return 1 };
        listed.sort();
        let ended = ObjectName::Lease(self.scope, LeasePart::Ended).to_string();
        let names = listed.iter().map(|one| one.name.clone()).filter(|name| *name != ended);
        let deletions = names.map(|name| async move { self.first.delete(&name).await.is_ok() });
        let done: Vec<bool> = stream::iter(deletions).buffer_unordered(AT_ONCE).collect().await;
        let mut left = done.iter().filter(|done| !**done).count();
        if left > 0 || self.first.delete(&ended).await.is_err() {
            // It tells a collector that the rest may go.
            left += 1;
        }
        left
    }
}

/// Bytes that tell the object that they are of, of all values.
fn content(number: u64, size: usize) -> Bytes {
    let mut bytes = vec![0; size];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes.into()
}

#[cfg(test)]
mod tests;

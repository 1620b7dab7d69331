use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use super::*;
use crate::backend::local::Local;
use crate::backend::memory::Memory;
use crate::backend::{Listed, Options};
use crate::vault::Confirmed;

/// More than the pages of the backend that has some.
const OBJECTS: u64 = 120;
const PAGE: usize = 100;

/// A place that breaks one promise.
#[derive(Debug, Default)]
struct Breaking {
    memory: Arc<Memory>,
    fault: Fault,
    /// What this connection has been told is not there.
    refused: Mutex<HashSet<String>>,
    /// Names that it has seen.
    listed: Mutex<Option<Vec<Listed>>>,
    puts: Mutex<HashSet<String>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    None,
    RemembersNo,
    ListsFromACache,
    CutsWhatIsLarge,
    FailsForAbsent,
    InventsAbsent,
    IgnoresRanges,
    FailsBeyondTheEnd,
    RefusesRepeats,
    LosesBesideOthers,
    ListsOnePage,
    ListsTwice,
    TellsNoSizes,
    ReadsDeleted,
    ListsDeleted,
    MayNotDelete,
    Overwrites,
}

impl Breaking {
    fn pair(fault: Fault) -> (Arc<Self>, Arc<Self>) {
        let memory = Arc::new(Memory::default());
        let one = || Arc::new(Self { memory: memory.clone(), fault, ..Self::default() });
        (one(), one())
    }

    fn error(name: &str, kind: BackendErrorKind) -> BackendError {
        BackendError::new("breaking", name, kind, "as it was told to")
    }

    fn number(name: &str) -> Option<u64> {
        name.rsplit_once('/')?.1.parse().ok()
    }
}

#[async_trait]
impl Backend for Breaking {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        let there = self.memory.get(name, None).await?;
        let taken = there.is_some();
        if taken && self.fault == Fault::RefusesRepeats {
            return Err(Self::error(name, BackendErrorKind::Broken));
        }
        if there.is_some_and(|there| there != bytes) && self.fault != Fault::Overwrites {
            return Err(Self::error(name, BackendErrorKind::Broken));
        }
        if self.fault == Fault::LosesBesideOthers {
            // Each second that comes while another is under way.
            let beside = {
                let mut puts = self.puts.lock().unwrap();
                puts.insert(name.to_owned());
                puts.len()
            };
            tokio::task::yield_now().await;
            self.puts.lock().unwrap().remove(name);
            if beside % 2 == 0 {
                return Ok(());
            }
        }
        let kept =
            if self.fault == Fault::CutsWhatIsLarge { bytes.len().min(LARGEST - 1) } else { bytes.len() };
        self.memory.put(name, bytes.slice(..kept)).await
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        if self.fault == Fault::RemembersNo && self.refused.lock().unwrap().contains(name) {
            return Ok(None);
        }
        let whole = self.memory.get(name, None).await?;
        if whole.is_none() {
            self.refused.lock().unwrap().insert(name.to_owned());
            match self.fault {
                Fault::FailsForAbsent => return Err(Self::error(name, BackendErrorKind::Denied)),
                Fault::InventsAbsent => return Ok(Some(Bytes::from_static(b"what is this?"))),
                Fault::ReadsDeleted if Self::number(name) == Some(800) => {
                    return Ok(Some(content(800, 100)));
                }
                _ => {}
            }
        }
        match (self.fault, &range) {
            (Fault::IgnoresRanges, _) => Ok(whole),
            (Fault::FailsBeyondTheEnd, Some(range))
                if whole.as_ref().is_some_and(|whole| range.start >= whole.len() as u64) =>
            {
                Err(Self::error(name, BackendErrorKind::Transient))
            }
            _ => self.memory.get(name, range).await,
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        let mut listed = self.memory.list(prefix).await?;
        match self.fault {
            Fault::ListsFromACache if prefix.ends_with('/') => {
                return Ok(self.listed.lock().unwrap().get_or_insert(listed).clone());
            }
            Fault::ListsOnePage => listed.truncate(PAGE),
            Fault::ListsTwice if listed.len() > PAGE => listed.push(listed[0].clone()),
            Fault::TellsNoSizes => listed.iter_mut().for_each(|one| one.size = 0),
            Fault::ListsDeleted if Self::number(prefix) == Some(800) => {
                listed.push(Listed { name: prefix.to_owned(), size: 100 });
            }
            _ => {}
        }
        Ok(listed)
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        match self.fault {
            Fault::MayNotDelete => Err(Self::error(name, BackendErrorKind::Denied)),
            _ => self.memory.delete(name).await,
        }
    }

    fn place(&self) -> &str {
        "breaking"
    }
}

async fn run(first: Arc<dyn Backend>, second: &dyn Backend) -> (Report, Vec<String>) {
    let vault = Confirmed::plain(false).unwrap().put(first, None).await.unwrap();
    let report = trial(&vault, second, &Holder::default(), OBJECTS).await.unwrap();
    let mut left: Vec<String> =
        vault.list("").await.unwrap().iter().map(|(name, _)| name.to_string()).collect();
    left.sort();
    (report, left)
}

async fn broken_by(fault: Fault) -> Vec<Promise> {
    let (first, second) = Breaking::pair(fault);
    let (report, _) = run(first, &*second).await;
    assert_eq!(report.promises.iter().map(|(promise, _)| *promise).collect::<Vec<_>>(), Promise::ALL);
    let broken = report.promises.iter().filter(|(_, verdict)| matches!(verdict, Verdict::Broken(_)));
    let broken: Vec<Promise> = broken.map(|(promise, _)| *promise).collect();
    assert_eq!(report.is_kept(), broken.is_empty());
    broken
}

#[tokio::test]
async fn a_place_that_keeps_its_promises_is_found_to_and_nothing_is_left_there() {
    let folder = tempfile::tempdir().unwrap();
    let open = || async { Arc::new(Local::open(folder.path(), &Options::default()).await.unwrap()) };
    let memory = Arc::new(Memory::default());
    let local: [Arc<dyn Backend>; 2] = [open().await, open().await];
    let memory: [Arc<dyn Backend>; 2] = [memory.clone(), memory];
    for ([first, second], overwrites) in [(local, Power::No), (memory, Power::Yes)] {
        let (report, left) = run(first, &*second).await;
        assert!(report.is_kept(), "{report:?}");
        assert!(report.promises.iter().all(|(_, verdict)| *verdict == Verdict::Kept));
        assert_eq!(report.powers, Powers { deletes: Power::Yes, overwrites });
        assert_eq!(report.left, 0);
        // The header, and the lease that it was done under.
        let [begun, ended, header] = &left[..] else { panic!("{left:?}") };
        assert!(begun.ends_with("/begun") && ended.ends_with("/ended") && header.starts_with("vault."));
    }
}

#[tokio::test]
async fn each_promise_that_is_broken_is_named() {
    use Promise::{Absent, AtOnce, Bytes, Delete, List, PutThenGet, PutThenList, Range, Repeated};
    for (fault, promises) in [
        (Fault::None, &[][..]),
        (Fault::RemembersNo, &[PutThenGet]),
        (Fault::ListsFromACache, &[PutThenList, List]),
        (Fault::CutsWhatIsLarge, &[Bytes]),
        (Fault::FailsForAbsent, &[Absent]),
        (Fault::InventsAbsent, &[Absent, Delete]),
        (Fault::IgnoresRanges, &[Range]),
        (Fault::FailsBeyondTheEnd, &[Range]),
        (Fault::RefusesRepeats, &[Repeated]),
        (Fault::ListsOnePage, &[List]),
        (Fault::ListsTwice, &[List]),
        (Fault::TellsNoSizes, &[List]),
        (Fault::ReadsDeleted, &[Delete]),
        (Fault::ListsDeleted, &[Delete]),
        (Fault::Overwrites, &[]),
    ] {
        let broken = broken_by(fault).await;
        assert_eq!(broken, promises, "{fault:?}");
    }
    assert!(broken_by(Fault::LosesBesideOthers).await.contains(&AtOnce));
}

#[tokio::test]
async fn an_append_only_credential_is_told_from_one_that_deletes_or_overwrites() {
    for (fault, deletes, overwrites) in [
        (Fault::None, Power::Yes, Power::No),
        (Fault::MayNotDelete, Power::No, Power::No),
        (Fault::Overwrites, Power::Yes, Power::Yes),
    ] {
        let (first, second) = Breaking::pair(fault);
        let (report, left) = run(first.clone(), &*second).await;
        assert_eq!(report.powers, Powers { deletes: deletes.clone(), overwrites }, "{fault:?}");
        assert!(report.is_kept(), "{report:?}");
        let denied = matches!(report.of(Promise::Delete), Some(Verdict::Denied(_)));
        assert_eq!(denied, deletes == Power::No);
        // What could not be taken away belongs to a lease that has ended: a collection does.
        assert_eq!(report.left, left.len() - 3, "{left:?}");
        if report.left > 0 {
            let vault = crate::vault::Vault::attach(first.memory.clone(), None, None).await.unwrap();
            let leases = crate::lease::all(&vault).await.unwrap();
            assert!(leases.len() == 2 && leases.values().all(|standing| standing.ended));
        }
    }
}

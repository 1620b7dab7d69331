//! A stage on which several actors use one vault, and a director decides whose call is next.
//!
//! Every call of a backend is a yield point: it waits until it is granted. Only the director grants, one call at a time, and
//! only when everything else has come to rest: so a seed decides everything. A list is two calls, for it is no snapshot: of
//! what changed in between, chance decides what it shows. A put or delete of an actor that died, and a put that failed, may
//! take effect later, or never.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::backend::memory::Memory;
use crate::backend::{Backend, BackendError, BackendErrorKind, Listed};
use crate::watch::Clock;

/// What an actor waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Put(String, Bytes),
    Get(String),
    ListBegin(String),
    ListEnd(String),
    Delete(String),
    Pause,
}

impl Call {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Put(name, _) | Self::Get(name) | Self::ListBegin(name) => name,
            Self::ListEnd(name) | Self::Delete(name) => name,
            Self::Pause => "",
        }
    }
}

/// What the director says to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Go,
    Fail,
}

pub(super) struct Parked {
    pub(super) actor: usize,
    pub(super) call: Call,
    pub(super) go: oneshot::Sender<Verdict>,
}

/// What the actors are known to hold, from what they put and listed.
#[derive(Default)]
pub(super) struct Holding {
    pub(super) lease: Option<String>,
    pub(super) runs: BTreeSet<String>,
    pub(super) last_run: Option<String>,
}

#[derive(Default)]
pub(super) struct Stage {
    pub(super) memory: Arc<Memory>,
    pub(super) parked: Mutex<Vec<Parked>>,
    pub(super) holding: Mutex<BTreeMap<usize, Holding>>,
    pub(super) rng: Mutex<fastrand::Rng>,
    pub(super) now: Mutex<u64>,
}

/// An actor's way to the vault, and its clock.
#[derive(Clone)]
pub(super) struct Seat {
    pub(super) stage: Arc<Stage>,
    pub(super) actor: usize,
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Seat({})", self.actor)
    }
}

impl Seat {
    async fn wait(&self, call: Call) -> Result<(), BackendError> {
        let (go, granted) = oneshot::channel();
        let name = call.name().to_owned();
        self.stage.parked.lock().unwrap().push(Parked { actor: self.actor, call, go });
        match granted.await {
            Ok(Verdict::Go) => Ok(()),
            _ => Err(BackendError {
                place: "stage".into(),
                name,
                kind: BackendErrorKind::Transient,
                cause: "no answer".into(),
            }),
        }
    }

    fn holding<T>(&self, f: impl FnOnce(&mut Holding) -> T) -> T {
        f(self.stage.holding.lock().unwrap().entry(self.actor).or_default())
    }
}

#[async_trait]
impl Backend for Seat {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        self.wait(Call::Put(name.to_owned(), bytes.clone())).await?;
        if let Some(rest) = name.strip_prefix("leases/") {
            let (lease, part) = rest.split_once('/').unwrap();
            match part {
                "begun" => self.holding(|held| {
                    *held = Holding { lease: Some(lease.to_owned()), ..Holding::default() };
                }),
                "ended" => self.holding(|held| *held = Holding::default()),
                _ => {}
            }
        }
        if name.starts_with("index/") {
            self.holding(|held| held.last_run = Some(name.to_owned()));
        }
        self.stage.memory.put(name, bytes).await
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        self.wait(Call::Get(name.to_owned())).await?;
        self.stage.memory.get(name, range).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        self.wait(Call::ListBegin(prefix.to_owned())).await?;
        let before: BTreeSet<Listed> = self.stage.memory.list(prefix).await?.into_iter().collect();
        self.wait(Call::ListEnd(prefix.to_owned())).await?;
        let after: BTreeSet<Listed> = self.stage.memory.list(prefix).await?.into_iter().collect();
        let mut rng = self.stage.rng.lock().unwrap();
        let shown = |one: &&Listed| (before.contains(*one) && after.contains(*one)) || rng.bool();
        let listed: Vec<Listed> = before.union(&after).filter(shown).cloned().collect();
        if prefix == "index/" {
            self.holding(|held| held.runs = listed.iter().map(|one| one.name.clone()).collect());
        }
        Ok(listed)
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        self.wait(Call::Delete(name.to_owned())).await?;
        self.stage.memory.delete(name).await
    }

    fn place(&self) -> &str {
        "stage"
    }
}

#[async_trait]
impl Clock for Seat {
    fn now(&self) -> Duration {
        Duration::from_secs(*self.stage.now.lock().unwrap())
    }

    async fn pause(&self, _: Duration) {
        drop(self.wait(Call::Pause).await);
    }
}

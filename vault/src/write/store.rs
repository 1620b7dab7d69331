//! Putting blobs into packs, packs into the vault, and what is durable into runs of the index (`FORMAT.md`, §5.4).
//!
//! At most a few packs are in flight; whoever adds to a full one waits for a place. A blob counts as there, for the rest of
//! the backup, once it was claimed: if the put of its pack fails, the backup fails. A run names packs whose put returned, and
//! nothing else.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::task::JoinSet;

use crate::blob::Encoded;
use crate::error::VaultError;
use crate::ids::{BlobId, LeaseId, PackId, RunId};
use crate::index::Index;
use crate::index::filter::{Filter, bits_per_id};
use crate::index::run::{MOST_ENTRIES, RunDraft};
use crate::names::{Area, ObjectName};
use crate::pack::{self, Builder};
use crate::vault::Vault;

/// Packs that are put at once: with those that are being filled, 64 MiB and a few.
const IN_FLIGHT: usize = 3;
/// Packs that a run waits for.
const PACKS_OF_A_RUN: usize = 64;
/// How often a put that fails for a reason that may pass is tried.
const TRIES: u32 = 3;

/// Who writes down what must be known before it is put, so that a process that comes after can go on.
#[async_trait]
pub trait Log: Send + Sync {
    /// A run will be put under this name. If the writer dies before it says otherwise, the run is lost.
    async fn run_named(&self, run: RunId) -> std::io::Result<()>;
    /// The put of a run has returned.
    async fn run_put(&self, run: RunId) -> std::io::Result<()>;
}

/// Nobody: a writer that will not be resumed.
#[derive(Debug, Default)]
pub struct NoLog;

#[async_trait]
impl Log for NoLog {
    async fn run_named(&self, _: RunId) -> std::io::Result<()> {
        Ok(())
    }

    async fn run_put(&self, _: RunId) -> std::io::Result<()> {
        Ok(())
    }
}

/// What was put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// Blobs.
    pub blobs: u64,
    /// Bytes of packs that were sealed.
    pub bytes: u64,
    /// Packs.
    pub packs: u64,
    /// Runs.
    pub runs: u64,
}

type Put = (Area, PackId, Vec<pack::Entry>, u64);

/// Where blobs go.
pub(crate) struct Store {
    vault: Vault,
    index: Arc<Index>,
    lease: LeaseId,
    log: Arc<dyn Log>,
    data: Option<Builder>,
    tree: Option<Builder>,
    in_flight: JoinSet<Result<Put, VaultError>>,
    claimed: HashSet<BlobId>,
    draft: RunDraft,
    draft_packs: usize,
    lost: Vec<RunId>,
    own: Vec<(RunId, usize)>,
    unnamed: bool,
    stored: Stored,
}

impl Store {
    /// Puts under a lease. `lost` are runs of the same job that were in flight when its process died.
    #[must_use]
    pub(crate) fn new(
        vault: &Vault,
        index: Arc<Index>,
        lease: LeaseId,
        log: Arc<dyn Log>,
        lost: Vec<RunId>,
    ) -> Self {
        let unnamed = !lost.is_empty();
        Self {
            vault: vault.clone(),
            index,
            lease,
            log,
            data: None,
            tree: None,
            in_flight: JoinSet::new(),
            claimed: HashSet::new(),
            draft: RunDraft::new(Vec::new(), lost.clone()),
            draft_packs: 0,
            lost,
            own: Vec::new(),
            unnamed,
            stored: Stored::default(),
        }
    }

    /// See [`super::Session::log_to`].
    pub(crate) fn log_to(&mut self, log: Arc<dyn Log>) {
        self.log = log;
    }

    /// Takes on that a blob will be added; no if it was, and is not yet in a run.
    pub(crate) fn claim(&mut self, id: BlobId) -> bool {
        self.claimed.insert(id)
    }

    /// Whether a blob was claimed, and is not yet in a run.
    #[must_use]
    pub(crate) fn has(&self, id: BlobId) -> bool {
        self.claimed.contains(&id)
    }

    /// What was put so far.
    #[must_use]
    pub(crate) fn stored(&self) -> Stored {
        self.stored
    }

    /// Adds a blob that was claimed. Waits while too many packs are in flight.
    ///
    /// # Errors
    /// What the backend could not do, of this pack or one before.
    pub(crate) async fn add(&mut self, blob: &Encoded) -> Result<(), VaultError> {
        let area = if blob.kind.is_node() { Area::Tree } else { Area::Data };
        let keys = self.vault.keys().clone();
        let slot = if area == Area::Tree { &mut self.tree } else { &mut self.data };
        let builder = match slot {
            Some(builder) => builder,
            None => slot.insert(Builder::new(&keys, area, self.lease)?),
        };
        builder.add(&keys, blob);
        self.stored.blobs += 1;
        if builder.is_full()
            && let Some(full) = slot.take()
        {
            self.put_pack(full).await?;
        }
        Ok(())
    }

    /// Takes in a pack of the same lease that is there already.
    ///
    /// # Errors
    /// What the backend could not do.
    pub(crate) async fn take_up(
        &mut self,
        area: Area,
        pack: PackId,
        entries: &[pack::Entry],
    ) -> Result<(), VaultError> {
        self.claimed.extend(entries.iter().map(|entry| entry.id));
        self.took(Ok((area, pack, entries.to_vec(), 0))).await
    }

    /// Whether a run may still arrive that nobody has named as lost.
    #[must_use]
    pub(crate) fn leaves_a_run(&self) -> bool {
        self.unnamed
    }

    /// Waits until nothing is in flight any more, however it ends.
    pub(crate) async fn rest(&mut self) {
        while self.in_flight.join_next().await.is_some() {}
    }

    /// Puts everything that was added, and a run of it. When it has returned, all of it is durable.
    ///
    /// # Errors
    /// What the backend could not do.
    pub(crate) async fn flush(&mut self) -> Result<(), VaultError> {
        for builder in [self.data.take(), self.tree.take()].into_iter().flatten() {
            self.put_pack(builder).await?;
        }
        while let Some(put) = self.in_flight.join_next().await {
            self.took(put?).await?;
        }
        self.put_run().await
    }

    async fn put_pack(&mut self, builder: Builder) -> Result<(), VaultError> {
        while self.in_flight.len() >= IN_FLIGHT {
            let Some(put) = self.in_flight.join_next().await else { break };
            self.took(put?).await?;
        }
        let vault = self.vault.clone();
        self.in_flight.spawn(async move {
            let keys = vault.keys().clone();
            let pack = crate::tasks::blocking(move || builder.finish(&keys)).await??;
            let size = pack.object.len() as u64;
            let mut tries = 1;
            // A repeated put of the same bytes under the same name is harmless.
            while let Err(error) = vault.put(&pack.name(), pack.object.clone()).await {
                if tries == TRIES || !may_pass(&error) {
                    return Err(error);
                }
                tries += 1;
            }
            Ok((pack.area, pack.id, pack.entries, size))
        });
        Ok(())
    }

    async fn took(&mut self, put: Result<Put, VaultError>) -> Result<(), VaultError> {
        let (area, pack, entries, size) = put?;
        if self.draft.len() + entries.len() > MOST_ENTRIES {
            self.put_run().await?;
        }
        self.draft.add_pack(area, pack, &entries);
        self.draft_packs += 1;
        self.stored.packs += 1;
        self.stored.bytes += size;
        if self.draft_packs >= PACKS_OF_A_RUN { self.put_run().await } else { Ok(()) }
    }

    /// Puts a run of the packs whose put has returned.
    async fn put_run(&mut self) -> Result<(), VaultError> {
        if self.draft.is_empty() {
            return Ok(());
        }
        self.draft_packs = 0;
        let draft = std::mem::take(&mut self.draft);
        let count = draft.len();
        let run = Box::pin(self.put_draft(draft)).await?;
        self.own.push((run, count));
        Ok(())
    }

    /// Puts one run that takes the place of all that this session has put, unless they are too much for one: then a
    /// collector merges them.
    ///
    /// # Errors
    /// What the backend could not do.
    pub(crate) async fn merge(&mut self) -> Result<(), VaultError> {
        let total: usize = self.own.iter().map(|(_, count)| count).sum();
        if self.own.len() < 2 || total > MOST_ENTRIES {
            return Ok(());
        }
        let replaces: Vec<RunId> = self.own.iter().map(|(run, _)| *run).collect();
        let mut draft = RunDraft::new(replaces, self.lost.clone());
        let mut numbers = HashMap::new();
        for (run, _) in &self.own {
            draft.add_places(&self.index.places_of(*run).await?, &mut numbers);
        }
        let run = Box::pin(self.put_draft(draft)).await?;
        self.own = vec![(run, total)];
        Ok(())
    }

    /// Puts a run of what was found by others, unless there is nothing to say.
    ///
    /// # Errors
    /// What the backend could not do.
    pub(crate) async fn put_other(&mut self, mut draft: RunDraft) -> Result<Option<RunId>, VaultError> {
        draft.lost.extend(self.lost.iter().copied());
        if draft.is_empty() {
            return Ok(None);
        }
        Ok(Some(Box::pin(self.put_draft(draft)).await?))
    }

    /// The runs that it has put, and that none of its own takes the place of.
    #[must_use]
    pub(crate) fn own_runs(&self) -> Vec<RunId> {
        self.own.iter().map(|(run, _)| *run).collect()
    }

    /// Puts a run. One whose put is not answered is put again under another name, which names it as lost.
    async fn put_draft(&mut self, mut draft: RunDraft) -> Result<RunId, VaultError> {
        let mut tries = 1;
        loop {
            let run = RunId::random(self.lease)?;
            let keys = self.vault.keys().clone();
            let encode = move || (draft.encode(&keys, run), draft);
            let (object, back) = crate::tasks::blocking(encode).await?;
            let object = object?;
            draft = back;
            self.log.run_named(run).await?;
            // Until a later one that has been put names it as lost.
            self.unnamed = true;
            match self.vault.put(&ObjectName::Run(run), object.clone()).await {
                Ok(()) => {
                    self.log.run_put(run).await?;
                    let bits = bits_per_id(self.index.entries() + draft.len() as u64);
                    let mut filter = Filter::new(draft.len() as u64, bits);
                    draft.ids().for_each(|id| filter.insert(id));
                    self.index.adopt(run, object, filter).await?;
                    // From here on the index knows them.
                    for id in draft.ids() {
                        self.claimed.remove(id);
                    }
                    self.stored.runs += 1;
                    self.unnamed = false;
                    return Ok(run);
                }
                Err(error) if tries == TRIES || !may_pass(&error) => return Err(error),
                Err(_) => {
                    self.lost.push(run);
                    draft.lost.push(run);
                    tries += 1;
                }
            }
        }
    }
}

fn may_pass(error: &VaultError) -> bool {
    use crate::backend::BackendErrorKind::Transient;
    matches!(error, VaultError::Backend(error) if error.kind == Transient)
}

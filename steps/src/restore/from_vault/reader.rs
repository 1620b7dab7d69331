//! `take-reading-lease`, `end-reading-lease`, and the vault as the steps between them share it.
//!
//! An index is large, so all steps of a job that are at work at once have one; with it goes the lease, which is resumed by the
//! first of them and shows that it is alive as long as one is at work. Nothing of that is needed: whoever finds none opens the
//! vault anew.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::features;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::ids::{DomainId, LeaseId, VaultId};
use vmkeep_vault::index::Index;
use vmkeep_vault::keys::IdKeys;
use vmkeep_vault::lease::Lease;
use vmkeep_vault::vault::Vault;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, JobId, Step, StepContext, StepName, Verdict};

use crate::codes;
use crate::vaults::files::reading_lease;
use crate::vaults::{Opened, Vaults, fault};

const TAKE: &str = "take a lease in the vault";
const END: &str = "end the lease in the vault";
const OPEN: &str = "read the vault's index";
/// What the vault is used for.
const PURPOSE: &str = "restore";
/// How long the end of a lease is tried. Nobody who waits for a machine is to wait for that.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the content of a restore comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The vault's name.
    pub vault: String,
    /// Which vault that is.
    pub id: VaultId,
    /// The domain that the backup is of.
    pub domain: DomainId,
    /// The step that has taken the lease.
    pub lease: StepName,
}

/// A vault that is being read.
pub(super) struct Reader {
    pub(super) vault: Vault,
    pub(super) ids: IdKeys,
    pub(super) fetcher: Fetcher,
    /// Shows that it is alive as long as this is there.
    _lease: Option<Lease>,
}

type Slot = Arc<tokio::sync::Mutex<Weak<Reader>>>;

/// The vaults that jobs of this process are reading, and who opens them.
#[derive(Clone)]
pub(super) struct Readers {
    pub(super) vaults: Arc<dyn Vaults>,
    open: Arc<Mutex<HashMap<JobId, Slot>>>,
}

impl std::fmt::Debug for Readers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Readers")
    }
}

/// Opens the vault that a plan was made for.
pub(super) async fn open(vaults: &dyn Vaults, name: &str, id: VaultId) -> Result<Opened, Fault> {
    let opened = vaults.open(name).await?;
    if opened.vault.id() != id {
        let cause = format!("it is {}; the job began with {id}", opened.vault.id());
        return Err(Fault::permanent(codes::VAULT_EXCHANGED, "open the vault", name, cause));
    }
    Ok(opened)
}

impl Readers {
    pub(super) fn new(vaults: Arc<dyn Vaults>) -> Self {
        Self { vaults, open: Arc::default() }
    }

    fn slot(&self, job: JobId) -> Slot {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).entry(job).or_default().clone()
    }

    fn forget(&self, job: JobId) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&job);
    }

    /// The vault of this job: as another of its steps has it open, or anew.
    pub(super) async fn of(&self, cx: &StepContext, source: &Source) -> Result<Arc<Reader>, Fault> {
        let slot = self.slot(cx.job);
        let mut held = slot.lock().await;
        if let Some(reader) = held.upgrade() {
            return Ok(reader);
        }
        let reader = Arc::new(self.begin(cx, source).await?);
        *held = Arc::downgrade(&reader);
        Ok(reader)
    }

    async fn begin(&self, cx: &StepContext, source: &Source) -> Result<Reader, Fault> {
        let opened = open(&*self.vaults, &source.vault, source.id).await?;
        let failed = |error: VaultError| fault(OPEN, &source.vault, &error);
        let taken = cx.outputs.of::<TakeReading>(&source.lease)?.and_then(|taken| taken.lease);
        let lease = match taken {
            None => None,
            Some(id) => match Lease::resume(&opened.vault, id).await {
                Ok(lease) => Some(lease),
                Err(VaultError::Revoked { .. }) => {
                    tracing::warn!(lease = %id, "the lease was given up for dead; reading without one");
                    None
                }
                Err(error) => return Err(failed(error)),
            },
        };
        features::check_reader(&opened.vault).await.map_err(failed)?;
        let index = Box::pin(Index::load(&opened.vault, opened.cache.as_deref())).await.map_err(failed)?;
        let ids = opened.vault.ids(source.domain);
        let report = lease.is_some();
        let fetcher = Fetcher::new(&opened.vault, ids.clone(), Arc::new(index), opened.cache, report);
        Ok(Reader { vault: opened.vault, ids, fetcher, _lease: lease })
    }
}

/// Takes a lease.
#[derive(Debug)]
pub struct TakeReading(pub(super) Readers);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadingInput {
    /// The vault's name.
    pub vault: String,
    /// Which vault that is.
    pub id: VaultId,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadingOutput {
    /// The lease; nothing where none can be put.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseId>,
}

#[async_trait]
impl Step for TakeReading {
    const KIND: StepKind = StepKind::new("take-reading-lease", 1);
    type Input = ReadingInput;
    type Output = ReadingOutput;

    async fn run(&self, _: &StepContext, input: ReadingInput) -> Result<ReadingOutput, Fault> {
        let opened = open(&*self.0.vaults, &input.vault, input.id).await?;
        let lease = reading_lease(&opened.vault, &opened.holder(PURPOSE)).await;
        let lease = lease.map_err(|error| fault(TAKE, &input.vault, &error))?;
        Ok(ReadingOutput { lease: lease.map(|lease| lease.id()) })
    }

    /// A lease of an attempt that was cut off is nobody's: a collector gives it up. Another is taken.
    async fn probe(&self, cx: &StepContext, _: ReadingInput) -> Verdict<ReadingOutput> {
        cx.may_repeat()
    }
}

/// Ends it, if that can be done: one that cannot be ended is given up by a collector, after a day.
#[derive(Debug)]
pub struct EndReading(pub(super) Readers);

/// What is needed to end a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndReadingInput {
    /// The vault's name.
    pub vault: String,
    /// Which vault that is.
    pub id: VaultId,
    /// The step that has taken it.
    pub lease: StepName,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndReadingOutput {
    /// Why it was not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<String>,
}

impl EndReading {
    async fn end(&self, input: &EndReadingInput, lease: LeaseId) -> Result<(), Fault> {
        let opened = open(&*self.0.vaults, &input.vault, input.id).await?;
        let ended = match Lease::resume(&opened.vault, lease).await {
            Ok(lease) => lease.end().await,
            // It is over.
            Err(VaultError::Revoked { .. }) => Ok(()),
            Err(error) => Err(error),
        };
        ended.map_err(|error| fault(END, &input.vault, &error))
    }
}

#[async_trait]
impl Step for EndReading {
    const KIND: StepKind = StepKind::new("end-reading-lease", 1);
    type Input = EndReadingInput;
    type Output = EndReadingOutput;

    async fn run(&self, cx: &StepContext, input: EndReadingInput) -> Result<EndReadingOutput, Fault> {
        self.0.forget(cx.job);
        let taken = cx.outputs.of::<TakeReading>(&input.lease)?.and_then(|taken| taken.lease);
        let Some(lease) = taken else { return Ok(EndReadingOutput { left: None }) };
        let left = match tokio::time::timeout(PATIENCE, self.end(&input, lease)).await {
            Ok(Ok(())) => None,
            Ok(Err(fault)) => Some(fault.to_string()),
            Err(_) => Some("the vault does not answer".to_owned()),
        };
        if let Some(why) = &left {
            tracing::warn!(%lease, why, "the vault was not told that nobody reads any more");
        }
        Ok(EndReadingOutput { left })
    }

    /// Ending what has ended is harmless.
    async fn probe(&self, cx: &StepContext, _: EndReadingInput) -> Verdict<EndReadingOutput> {
        cx.may_repeat()
    }
}

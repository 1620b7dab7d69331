//! Copying backups into another vault (`FORMAT.md`, §8): read as by a restore, written as by a backup.
//!
//! Ids are keyed differently in every vault, so what the other has cannot be told by comparing ids: each chunk that is sent
//! was read, opened, and hashed anew. What saves that is a backup that both have. What is equal between it and the next one
//! *here* is equal *there* as well: it is taken over from the tree that was copied before, without being read. So backups go
//! oldest first, each beside its parent, or else beside the one that is nearest in time.
//!
//! Each backup has a session, and so a lease, of its own in the other vault: collections there wait for one backup and not
//! for all of them. A copy that is cut off leaves what any writer leaves, and is begun again: backups that are there are passed
//! over, an unchecked one is settled, and of the one that was under way what was put is reused. It never prunes: an id that
//! is pruned there could not be copied any more.
//!
//! What is damaged here ends that backup's copy, not the others'. A vault that does not answer ends all.

mod one;
mod original;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;

use crate::backend::BackendErrorKind;
use crate::backups::{Backup, Backups};
use crate::error::VaultError;
use crate::features;
use crate::fetch::Fetcher;
use crate::header::Cipher;
use crate::ids::{BackupId, DomainId, LeaseId};
use crate::index::Index;
use crate::lease::{self, Holder, Lease};
use crate::names::{LeasePart, MarkKind};
use crate::vault::Vault;
use crate::write::{Log, NoLog, Resume, Written};
use one::Copier;

/// What is to be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// All backups that are there.
    All,
    /// Those of a domain.
    Domain(DomainId),
    /// These.
    Backups(Vec<BackupId>),
}

/// Who is told how far it is.
#[async_trait]
pub trait Progress: Send + Sync {
    /// A session in the other vault has begun for a backup, under this lease. Who wants to go on after a crash, rather than
    /// begin again, writes it down.
    async fn begun(&self, backup: BackupId, lease: LeaseId) -> std::io::Result<()>;
    /// A disk or stream of it was written.
    async fn written(&self, backup: BackupId, image: &str, written: &Written) -> std::io::Result<()>;
    /// What became of a backup.
    async fn done(&self, backup: BackupId, fate: &Fate) -> std::io::Result<()>;
}

/// Nobody.
#[derive(Debug, Default)]
pub struct NoProgress;

#[async_trait]
impl Progress for NoProgress {
    async fn begun(&self, _: BackupId, _: LeaseId) -> std::io::Result<()> {
        Ok(())
    }

    async fn written(&self, _: BackupId, _: &str, _: &Written) -> std::io::Result<()> {
        Ok(())
    }

    async fn done(&self, _: BackupId, _: &Fate) -> std::io::Result<()> {
        Ok(())
    }
}

/// How a copy is to be made.
#[derive(Clone)]
pub struct Options {
    /// Who it is, for people.
    pub holder: Holder,
    /// A folder for copies of the index that is read from.
    pub from_folder: Option<PathBuf>,
    /// One for copies of the index of the other vault: not the same.
    pub to_folder: Option<PathBuf>,
    /// Whether what lies in an encrypted vault may be put into one without encryption. Secrets never are (see
    /// [`Refusal::Secret`]).
    pub allow_plain: bool,
    /// Who writes down the runs of the index that are to be put.
    pub log: Arc<dyn Log>,
    /// Who is told how far it is.
    pub progress: Arc<dyn Progress>,
    /// The session of a process that died, to go on with: the first backup that is copied takes up its packs.
    pub resume: Option<Resume>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            holder: Holder::default(),
            from_folder: None,
            to_folder: None,
            allow_plain: false,
            log: Arc::new(NoLog),
            progress: Arc::new(NoProgress),
            resume: None,
        }
    }
}

/// What a copy of a backup took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Bytes that were read of chunks here: zeroes and what both have are not.
    pub read: u64,
    /// Bytes of chunks that the other vault did not have.
    pub new: u64,
    /// Bytes that were put for them there, compressed, with headers and nodes.
    pub stored: u64,
}

/// Why a backup was not copied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no such backup.
    #[error("it is not in the vault")]
    Absent,
    /// Its manifest is damaged, or newer than this program.
    #[error("its manifest cannot be read: {0}")]
    Unreadable(String),
    /// It was committed, and nobody has settled whether it is whole.
    #[error("it was never checked")]
    Unchecked,
    /// Somebody wants it gone, and nothing protects it.
    #[error("it is to be pruned")]
    Pruned,
    /// It is pruned in the other vault, which stands for ever.
    #[error("it is pruned in the other vault")]
    PrunedThere,
    /// It makes use of what this program does not know.
    #[error("it uses the feature `{0}`, which this version of vmkeep does not know")]
    Feature(String),
    /// What must not lie in a vault without encryption.
    #[error("the other vault has no encryption, and {0}")]
    Secret(&'static str),
    /// It lacks something here.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// What became of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is in the other vault now, and checked.
    Copied(Amount),
    /// It was there already.
    Already,
    /// It was not copied.
    Refused(Refusal),
}

/// What a copy did, in the order in which it did it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// What became of each backup.
    pub fates: Vec<(BackupId, Fate)>,
}

impl CopyReport {
    /// Those that are not in the other vault, and why.
    pub fn refused(&self) -> impl Iterator<Item = (BackupId, &Refusal)> {
        self.fates.iter().filter_map(|(backup, fate)| match fate {
            Fate::Refused(refusal) => Some((*backup, refusal)),
            _ => None,
        })
    }
}

/// Copies backups from one vault into another.
///
/// # Errors
/// If both are the same vault, or the other has no encryption and this has, and that was not allowed; or what one of the
/// backends could not do: what was copied stays, and what was put is reused by the next copy.
pub async fn copy(
    from: &Vault,
    to: &Vault,
    choice: &Choice,
    options: Options,
) -> Result<CopyReport, VaultError> {
    to.writable()?;
    if from.id() == to.id() {
        return Err(VaultError::CopyRefused { cause: "both are the same vault" });
    }
    if is_into_the_open(from, to) && !options.allow_plain {
        return Err(VaultError::CopyRefused { cause: "the other vault has no encryption, and this one has" });
    }
    let lease = reading_lease(from, &options.holder).await?;
    let copied = Box::pin(under(from, to, choice, options, lease.is_some())).await;
    if let Some(lease) = lease
        && let Err(error) = lease.end().await
    {
        tracing::warn!(%error, "the vault that was read from was not told that nobody reads any more");
    }
    copied
}

fn is_into_the_open(from: &Vault, to: &Vault) -> bool {
    from.header().cipher != Cipher::None && to.header().cipher == Cipher::None
}

/// A lease, where one can be put: what is read then stays, though it is pruned meanwhile.
async fn reading_lease(from: &Vault, holder: &Holder) -> Result<Option<Lease>, VaultError> {
    if let Err(error) = from.writable() {
        tracing::warn!(%error, "reading without a lease");
        return Ok(None);
    }
    match Lease::begin(from, holder).await {
        Ok(lease) => Ok(Some(lease)),
        Err(VaultError::Backend(error))
            if matches!(error.kind, BackendErrorKind::Denied | BackendErrorKind::Full) =>
        {
            tracing::warn!(%error, "reading without a lease");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn under(
    from: &Vault,
    to: &Vault,
    choice: &Choice,
    mut options: Options,
    report: bool,
) -> Result<CopyReport, VaultError> {
    features::check_reader(from).await?;
    let index = Arc::new(Index::load(from, options.from_folder.as_deref()).await?);
    let here = Backups::load(from, None).await?;
    let there = Backups::load(to, None).await?;
    let whole = there.iter().map(|(id, _)| id).filter(|id| Standing::of(&there, *id) == Standing::Whole);
    let mut copier = Copier {
        to,
        whole: whole.collect(),
        into_the_open: is_into_the_open(from, to),
        resume: options.resume.take(),
        from: Origin { vault: from, index, report, fetchers: BTreeMap::new() },
        here,
        there,
        options,
    };
    let mut report = CopyReport::default();
    for backup in order(&copier.here, &chosen(&copier.here, choice)) {
        let fate = Box::pin(copier.backup(backup)).await?;
        copier.options.progress.done(backup, &fate).await?;
        report.fates.push((backup, fate));
    }
    if let Some(resume) = copier.resume {
        abandon(to, resume.lease, &copier.options.holder).await?;
    }
    Ok(report)
}

/// Revokes the lease of a process that died, and that nothing was left to do for.
async fn abandon(to: &Vault, lease: LeaseId, holder: &Holder) -> Result<(), VaultError> {
    let parts = lease::parts(to, lease).await?;
    if parts.contains(&LeasePart::Ended) || parts.contains(&LeasePart::Revoked) {
        return Ok(());
    }
    lease::revoke(to, lease, holder).await
}

/// Where is read from.
struct Origin<'a> {
    vault: &'a Vault,
    index: Arc<Index>,
    /// Whether damage can be reported.
    report: bool,
    fetchers: BTreeMap<DomainId, Arc<Fetcher>>,
}

impl Origin<'_> {
    /// Reads blobs of a domain: with one node cache for all of its backups.
    fn fetcher(&mut self, domain: DomainId, folder: Option<&PathBuf>) -> Arc<Fetcher> {
        let (vault, index) = (self.vault, &self.index);
        let new = || {
            let ids = vault.ids(domain);
            Arc::new(Fetcher::new(vault, ids, index.clone(), folder.cloned(), self.report))
        };
        self.fetchers.entry(domain).or_insert_with(new).clone()
    }
}

/// How a backup stands in the other vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It is not there, or nobody can read its manifest: another one heals it.
    Absent,
    Unchecked,
    Whole,
    Pruned,
}

impl Standing {
    fn of(all: &Backups, backup: BackupId) -> Self {
        // By name, whether the mark can be read or not: it is said rather once too often.
        if all.has(backup, MarkKind::Prune) {
            return Self::Pruned;
        }
        match all.get(backup) {
            Some(Backup { manifest: Ok(_), .. }) if all.has(backup, MarkKind::Checked) => Self::Whole,
            Some(Backup { manifest: Ok(_), .. }) => Self::Unchecked,
            _ => Self::Absent,
        }
    }
}

fn chosen(here: &Backups, choice: &Choice) -> BTreeSet<BackupId> {
    match choice {
        // One whose manifest is lost is not passed over in silence.
        Choice::All => here.iter().map(|(id, _)| id).chain(here.missing()).collect(),
        Choice::Domain(domain) => {
            here.iter().filter(|(_, backup)| backup.domain == *domain).map(|(id, _)| id).collect()
        }
        Choice::Backups(backups) => backups.iter().copied().collect(),
    }
}

/// Domain by domain, the oldest first; a parent before its children also where a clock went back between them.
fn order(here: &Backups, chosen: &BTreeSet<BackupId>) -> Vec<BackupId> {
    let read = |id: BackupId| here.get(id).and_then(|backup| backup.manifest.as_ref().ok());
    let mut sorted: Vec<BackupId> = chosen.iter().copied().collect();
    sorted.sort_by_key(|id| {
        let domain = here.get(*id).map(|backup| backup.domain);
        (domain, read(*id).map_or(Timestamp::MIN, |manifest| manifest.taken), *id)
    });
    let (mut order, mut seen) = (Vec::with_capacity(sorted.len()), HashSet::new());
    for id in sorted {
        let mut line = Vec::new();
        let mut next = Some(id);
        while let Some(one) = next.filter(|one| chosen.contains(one) && seen.insert(*one)) {
            line.push(one);
            next = read(one).and_then(|manifest| manifest.parent);
        }
        order.extend(line.into_iter().rev());
    }
    order
}

#[cfg(test)]
mod tests;

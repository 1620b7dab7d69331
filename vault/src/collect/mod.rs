//! Collecting: deleting what no backup needs, beside writers that nobody can stop (`FORMAT.md`, §7).
//!
//! Deleting is condemning first. A collection looks ([`survey`]), finds out what the backups that stay need ([`mark`]), chooses
//! packs to give up ([`choose`]), moves what is needed of them ([`carry`]), and puts its condemnation: from then on whoever
//! begins treats all of that as absent. It waits until whoever began before is over, looks at what those have committed, and
//! moves that too. It puts the run of the index that takes the place of the condemned ones ([`runs`]), waits once more, and only
//! then deletes ([`delete`]).
//!
//! Cut off anywhere, it leaves its condemnation, and nothing else that matters: the next collection takes it over and does all
//! of it itself. Nothing is remembered from one collection to the next but which leases were watched and which prunes were
//! known, and both only make it more careful.

mod carry;
mod choose;
mod delete;
mod doom;
mod mark;
mod runs;
pub(crate) mod survey;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

pub use doom::Known;

use crate::backups::Backups;
use crate::error::VaultError;
use crate::features;
use crate::fetch::Fetcher;
use crate::ids::{BackupId, DomainId, LeaseId, PackId, RunId};
use crate::index::Index;
use crate::index::tidings::Condemnation;
use crate::keys::{KeyError, Role};
use crate::lease::{self, Holder, Lease};
use crate::mutation;
use crate::names::ObjectName;
use crate::vault::Vault;
use crate::watch::{Waited, Watch};
use crate::write::NoLog;
use crate::write::store::Store;
use survey::Survey;

/// What a collection may do, and how far it goes.
#[derive(Clone, Debug)]
pub struct Policy {
    /// A pack of which less than this is needed, in hundredths of its bytes, is given up and the rest moved.
    pub worth: u64,
    /// How long leases are waited for before the rest is left to the next collection; for ever, if nothing is said.
    pub wait: Option<Duration>,
    /// Of an append-only vault: how long a prune must have been known before it is obeyed. The newest verified backup of a
    /// domain then stays, whoever ordered what.
    pub prune_delay: Option<Duration>,
    /// More backups than this to go at once are told as alarming.
    pub expected: Option<usize>,
    /// End before anything is moved or condemned: only find out what would go.
    pub dry_run: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self { worth: 60, wait: None, prune_delay: None, expected: None, dry_run: false }
    }
}

/// Whoever collects: what outlives a single collection.
#[derive(Debug)]
pub struct Collector {
    /// Who it is.
    pub holder: Holder,
    /// A folder for copies of the index.
    pub folder: Option<PathBuf>,
    /// What it may do.
    pub policy: Policy,
    /// The leases that it watches.
    pub watch: Watch,
    /// Since when it has known of which prune. To be kept by the host.
    pub known: Known,
}

impl Collector {
    /// One that knows nothing yet.
    #[must_use]
    pub fn new(mut holder: Holder, folder: Option<PathBuf>, policy: Policy, watch: Watch) -> Self {
        holder.collects = true;
        Self { holder, folder, policy, watch, known: Known::default() }
    }
}

/// How a collection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All that was condemned is gone, but for what [`Report::kept`] names.
    Done,
    /// There was nothing to do.
    Nothing,
    /// Others collect: to be tried again, after a time that chance decides.
    Others(BTreeSet<LeaseId>),
    /// What these backups need is not known: their manifests, or nodes of theirs, are missing or cannot be read. Nothing is
    /// deleted before they are healed, or pruned by name.
    Blocked(Vec<(Option<BackupId>, String)>),
    /// These leases are not over yet. The condemnation stays; the next collection goes on.
    Waiting(BTreeSet<LeaseId>),
    /// Its own lease was revoked. The condemnation stays; the next collection goes on.
    Revoked,
    /// Of a dry run: there is something to do, and nothing was done.
    Planned(Frees),
}

/// What a collection would free, by what it would look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frees {
    /// Bytes of the packs that it would give up.
    pub given_up: u64,
    /// Stored bytes in them that are still needed, and that it would move. What moves needs a table and nodes' packs of its own, so
    /// about this much comes back.
    pub moved: u64,
}

/// What a collection did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How it ended.
    pub ended: Ended,
    /// Backups that were condemned.
    pub doomed: BTreeSet<BackupId>,
    /// Backups that are to be pruned, and stay for now: protected, or the prune is not known for long enough.
    pub spared: BTreeSet<BackupId>,
    /// Whether more are to go than was expected.
    pub alarming: bool,
    /// Packs that were given up.
    pub given_up: usize,
    /// Blobs that were moved, and their stored bytes.
    pub moved: (u64, u64),
    /// Packs of which something that is needed could not be read: they stay.
    pub kept: BTreeSet<PackId>,
    /// Objects that were deleted.
    pub deleted: u64,
}

impl Report {
    fn new() -> Self {
        Self {
            ended: Ended::Nothing,
            doomed: BTreeSet::new(),
            spared: BTreeSet::new(),
            alarming: false,
            given_up: 0,
            moved: (0, 0),
            kept: BTreeSet::new(),
            deleted: 0,
        }
    }
}

/// A way out of the middle of a collection: an end that is none of its errors.
enum Halt {
    Ended(Ended),
    Failed(VaultError),
}

impl From<VaultError> for Halt {
    fn from(error: VaultError) -> Self {
        Self::Failed(error)
    }
}

/// Collects once, at a time of the host's clock that is only asked how long prunes have been known.
///
/// # Errors
/// If this key may not, a condemnation cannot be read, or what the backend could not do. Whatever was put stays, and the next
/// collection goes on.
pub async fn collect(vault: &Vault, collector: &mut Collector, now: Timestamp) -> Result<Report, VaultError> {
    vault.writable()?;
    if vault.keys().is_encrypted() && vault.keys().role() != Role::Full {
        return Err(KeyError::MayNotSign.into());
    }
    let lease = Lease::begin(vault, &collector.holder).await?;
    let (mut report, mut leaves_a_run) = (Report::new(), false);
    let ended = Box::pin(under(vault, &lease, collector, now, &mut report, &mut leaves_a_run)).await;
    if leaves_a_run {
        // It may still arrive, and nobody has named it as lost: so it is void.
        lease::revoke(vault, lease.id(), &collector.holder).await?;
    } else {
        lease.end().await?;
    }
    match ended {
        Ok(()) => Ok(report),
        Err(Halt::Ended(ended)) => {
            report.ended = ended;
            Ok(report)
        }
        Err(Halt::Failed(error)) => Err(error),
    }
}

async fn under(
    vault: &Vault,
    lease: &Lease,
    collector: &mut Collector,
    now: Timestamp,
    report: &mut Report,
    leaves_a_run: &mut bool,
) -> Result<(), Halt> {
    alone(vault, lease, collector).await?;
    features::check_writer(vault).await?;
    let survey = Box::pin(Survey::take(vault, collector.folder.as_deref())).await?;
    let backups = Backups::load(vault, None).await?;
    let doom = doom::decide(vault, &survey, &backups, &collector.policy, &mut collector.known, now).await?;
    report.spared = doom.spared.clone();
    report.doomed = doom.backups.clone();
    report.alarming = collector.policy.expected.is_some_and(|most| doom.backups.len() > most);
    let fetchers = Fetchers::new(vault, &backups, &survey.index, collector.folder.as_deref());
    let mut needed = Box::pin(mark::mark(&fetchers, &backups, &doom.backups)).await?;
    let choice = choose::choose(&survey, &mut needed, &doom, collector.policy.worth).await?;
    report.given_up = choice.give_up.len();
    if choice.is_nothing(&survey) {
        return Ok(());
    }
    if collector.policy.dry_run {
        let frees = choose::frees(&survey, &mut needed, &choice).await?;
        return Err(Halt::Ended(Ended::Planned(frees)));
    }

    survey.index.condemn(choice.give_up.keys().copied());
    let mut store = Store::new(vault, survey.index.clone(), lease.id(), Arc::new(NoLog), Vec::new());
    let mut work = Work { vault, lease, survey: &survey, choice: &choice, store: &mut store, report };
    let ended = Box::pin(work.carry_out(collector, &fetchers, &backups, &needed, doom.backups)).await;
    store.rest().await;
    *leaves_a_run = store.leaves_a_run();
    ended
}

/// Ends, while another collector is not over. One that shows no sign of life is revoked after a day of watching: on a later
/// visit, and then this one goes on.
async fn alone(vault: &Vault, lease: &Lease, collector: &mut Collector) -> Result<(), Halt> {
    let leases = lease::all(vault).await?;
    let still = collector.watch.look(vault, &leases, lease.id(), &collector.holder).await?;
    let mut others = BTreeSet::new();
    for other in still {
        if lease::collects(vault, other).await? {
            others.insert(other);
        }
    }
    if others.is_empty() { Ok(()) } else { Err(Halt::Ended(Ended::Others(others))) }
}

/// Other collectors whose leases are not over.
///
/// # Errors
/// What the backend could not do.
pub(crate) async fn others(vault: &Vault, own: LeaseId) -> Result<BTreeSet<LeaseId>, VaultError> {
    let mut others = BTreeSet::new();
    for (other, standing) in lease::all(vault).await? {
        if other != own && !standing.is_over() && lease::collects(vault, other).await? {
            others.insert(other);
        }
    }
    Ok(others)
}

/// From what was chosen to the end.
struct Work<'a> {
    vault: &'a Vault,
    lease: &'a Lease,
    survey: &'a Survey,
    choice: &'a choose::Choice,
    store: &'a mut Store,
    report: &'a mut Report,
}

impl Work<'_> {
    async fn carry_out(
        &mut self,
        collector: &mut Collector,
        fetchers: &Fetchers,
        backups: &Backups,
        needed: &mark::Needed,
        doomed: BTreeSet<BackupId>,
    ) -> Result<(), Halt> {
        // 4.
        Box::pin(self.move_needed(fetchers, needed)).await?;
        // 5. From here on whoever begins treats all of it as absent.
        let condemnation = self.choice.condemnation(backups, &doomed);
        let name = ObjectName::Condemned(self.lease.id());
        let object = crate::codec::encode(self.vault.keys(), &name, &condemnation)?;
        self.vault.put(&name, object).await?;
        // 6.
        self.wait(collector).await?;
        // 7.
        if !mutation::on("step_7") {
            Box::pin(self.move_for_new(collector.folder.as_deref(), backups, &doomed)).await?;
        }
        // 8.
        Box::pin(self.put_runs()).await?;
        // 9.
        if mutation::on("wait_before_runs") {
            self.delete_runs(&condemnation.runs).await?;
        }
        self.wait(collector).await?;
        // 10.
        Box::pin(self.delete(&condemnation)).await?;
        self.report.ended = Ended::Done;
        Ok(())
    }

    async fn wait(&mut self, collector: &mut Collector) -> Result<(), Halt> {
        let limit = collector.policy.wait;
        match collector.watch.wait(self.vault, self.lease, &collector.holder, limit).await? {
            Waited::Over => Ok(()),
            Waited::Still(leases) => Err(Halt::Ended(Ended::Waiting(leases))),
            Waited::Revoked => Err(Halt::Ended(Ended::Revoked)),
        }
    }
}

/// What reads blobs: one for all, or one for each domain where they share nothing.
struct Fetchers {
    separate: bool,
    by_domain: BTreeMap<Option<DomainId>, Fetcher>,
}

impl Fetchers {
    fn new(vault: &Vault, backups: &Backups, index: &Arc<Index>, folder: Option<&Path>) -> Self {
        let separate = vault.header().separate;
        let domains: BTreeSet<Option<DomainId>> = match separate {
            true => backups.iter().map(|(_, backup)| Some(backup.domain)).collect(),
            false => std::iter::once(None).collect(),
        };
        let fetcher = |domain: Option<DomainId>| {
            Fetcher::new(vault, vault.keys().ids(domain), index.clone(), folder.map(Path::to_owned), true)
        };
        Self { separate, by_domain: domains.into_iter().map(|domain| (domain, fetcher(domain))).collect() }
    }
}

/// What a condemnation names, as it will be put.
impl choose::Choice {
    fn condemnation(&self, backups: &Backups, doomed: &BTreeSet<BackupId>) -> Condemnation {
        let mut manifests: BTreeSet<(DomainId, BackupId, LeaseId)> = backups
            .all_manifests()
            .filter(|(id, _)| doomed.contains(id))
            .map(|(id, backup)| (backup.domain, id, backup.lease))
            .collect();
        manifests.extend(self.older_manifests.iter().copied());
        let runs: Vec<RunId> = self.runs.iter().copied().collect();
        Condemnation {
            backups: manifests.into_iter().collect(),
            packs: self.give_up.iter().map(|(pack, area)| ((*area).into(), *pack)).collect(),
            runs,
            takes_over: self.takes_over.clone(),
        }
    }
}

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;

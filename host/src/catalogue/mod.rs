//! The catalogue: which backups there are, and which there were.
//!
//! **The manifests are the truth.** A backup is listed because its manifest is there now, under a durable name; what is
//! stored here is a memory of it, for two purposes:
//! - *Quick looks.* A manifest whose file is the same as when it was read
//!   ([`Stamp`](vmkeep_steps::manifest::catalogue::Stamp)) is not opened again: a look costs
//!   one `stat` per backup, and after a restart as well.
//! - *Nothing is forgotten in silence.* A backup that was seen once and whose folder is gone is shown as missing, until
//!   a deletion of ours explains it, its folder comes back, or somebody says that it may be forgotten.
//!
//! Of vaults, which may be far away, it remembers what this host's jobs have put there ([`mod@vaulted`]); what is there *now* only the
//! vault itself tells.
//!
//! The memory is the stream `catalogue` of the store: what was seen, protected, deleted, forgotten, with who and why. It
//! is only appended to, in the store's hash chain, and never pruned. It decides nothing: what is restored or deleted is
//! read anew from the folders. So it may lag, be empty on a new host, or be full of a world that has moved on; the next
//! look puts it right, and [`Catalogue::rebuild`] reads everything again.
//!
//! Rejected: *a table beside the journal* (a second thing to keep consistent, without a history); *events written by the
//! jobs themselves* (a second commit after publishing, and folders that were copied in by hand would need another
//! way in); *a cache file keyed by time alone* (a look within the same second would be wrong).

mod checks;
mod cursor;
mod event;
mod look;
mod shelf;
mod vaulted;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::Mutex;
use vmkeep_steps::image::root::{RootError, TargetRoot};
use vmkeep_steps::manifest::protection::{self, Protection};
use vmkeep_steps::manifest::{self, BackupId, ManifestError};
use vmkeep_workflow::journal::{Append, AppendError, Record};
use vmkeep_workflow::{Actor, EventStore, Fault, JobId, Seq, StreamId};

pub use checks::Check;
pub use event::{Body, Event, Place};
pub use look::{Counts, Report};
pub use shelf::{Listed, Missing};
pub use vaulted::Vaulted;

use crate::codes;
use cursor::Cursor;
use event::encode;
use look::{Known, Look};
use shelf::Shelf;

/// The name of the stream.
pub const STREAM: &str = "catalogue";
/// Records of one append.
const BATCH: usize = 200;
/// How often an append is tried whose stream ended elsewhere than expected.
const TRIES: usize = 3;

/// The catalogue of a host. All calls are one after the other.
pub struct Catalogue {
    store: Arc<dyn EventStore>,
    roots: Vec<PathBuf>,
    on_fatal: Arc<dyn Fn(&str) + Send + Sync>,
    memory: Mutex<Memory>,
}

impl std::fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalogue").field("roots", &self.roots).finish_non_exhaustive()
    }
}

/// What is known of the stream.
#[derive(Default)]
struct Memory {
    /// Where the stream ends; nothing before it was read.
    last: Option<Seq>,
    shelf: Shelf,
    /// Of backups that are not where they were: how many deletions had ended when they were last asked for it.
    asked: HashMap<(BackupId, PathBuf), usize>,
    /// Up to where the journals of readings have been taken over.
    checks: Cursor,
    /// Up to where the journals of backups into vaults have been.
    vaulting: Cursor,
}

/// What there is now.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The backups, newest first.
    pub backups: Vec<Listed>,
    /// Those that were seen once and are not there.
    pub missing: Vec<Missing>,
    /// What could not be looked at, what is there twice, and what is half done.
    pub warnings: Vec<String>,
    /// Whether there may be backups that could not be seen.
    pub partial: bool,
}

impl Catalogue {
    /// The catalogue of these roots, remembered in that store. `on_fatal` must end the process.
    #[must_use]
    pub fn new(
        store: Arc<dyn EventStore>,
        roots: Vec<PathBuf>,
        on_fatal: Arc<dyn Fn(&str) + Send + Sync>,
    ) -> Self {
        Self { store, roots, on_fatal, memory: Mutex::default() }
    }

    /// The configured roots.
    #[must_use]
    pub fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    /// What there is now.
    ///
    /// # Errors
    /// When no root can be read.
    pub async fn view(&self) -> Result<View, Fault> {
        let mut memory = self.memory.lock().await;
        let mut warnings = self.recall(&mut memory).await;
        let known = memory.shelf.stamps();
        let look = self.look(self.roots.clone(), known).await?;
        warnings.extend(self.note(&mut memory, &look).await);
        Ok(memory.shelf.view(&look, warnings))
    }

    /// The last backup of each domain that a job of this host has put into each vault, and why that may not be all. No vault is
    /// opened.
    pub async fn vaulted(&self) -> (Vec<Vaulted>, Vec<String>) {
        let mut held = self.memory.lock().await;
        let memory = &mut *held;
        let mut warnings = self.recall(memory).await;
        let shelf = &memory.shelf;
        let known = |job: &str| shelf.knows_vaulted(job);
        match memory.vaulting.news(&*self.store, vaulted::WORKFLOWS, known, vaulted::of).await {
            Ok(news) => {
                let bodies = news.into_iter().map(|one| Body::Vaulted(Box::new(one))).collect();
                warnings.extend(self.write_down(memory, bodies).await);
            }
            Err(error) => {
                warnings.push(format!("what was put into vaults of late could not be seen: {error}"));
            }
        }
        (memory.shelf.vaulted(), warnings)
    }

    /// Reads every manifest below the roots, or below another folder, anew and says how that differs from what was known.
    /// A `dry_run` writes nothing down.
    ///
    /// # Errors
    /// When nothing can be read, or the store does not take what was found.
    pub async fn rebuild(&self, from: Option<PathBuf>, dry_run: bool, by: Actor) -> Result<Report, Fault> {
        let mut held = self.memory.lock().await;
        // The memory as well: what another process or a repaired store says now.
        let mut memory = Memory::default();
        let mut warnings = self.recall(&mut memory).await;
        if dry_run {
            // Of a stream without a known end nothing is written down.
            memory.last = None;
        } else {
            *held = Memory::default();
        }
        let roots = from.map_or_else(|| self.roots.clone(), |from| vec![from]);
        let known = memory.shelf.stamps();
        let look = self.look(roots.clone(), Known::new()).await?;
        let judged = look::judge(&look).await;
        // Everything else that is known is looked at too: what vanished must be told whatever was walked.
        let all = self.look(self.roots.clone(), known).await.unwrap_or_default();
        let before = memory.shelf.clone();
        warnings.extend(self.note(&mut memory, &look).await);
        warnings.extend(self.note(&mut memory, &all).await);
        let view = memory.shelf.view(&all.with(&look), Vec::new());
        let report = look::report(&roots, &before, &look, &view, judged, warnings);
        if !dry_run {
            self.append(&mut memory, &[Body::Rebuilt { by, report: report.counts() }]).await?;
            *held = memory;
        }
        Ok(report)
    }

    /// Protects a backup from deletion: the note beside its manifest, then the event.
    ///
    /// # Errors
    /// When its folder cannot be written, or its deletion has begun.
    pub async fn protect(
        &self,
        path: &Path,
        backup: BackupId,
        by: Actor,
        until: Option<Timestamp>,
    ) -> Result<(), Fault> {
        let note = Protection::new(by.who.clone(), Timestamp::now(), until, by.why.clone());
        let doing = "protect the backup";
        on_folder(path, doing, move |folder| {
            check(folder, backup)?;
            let before = protection::read(folder)?;
            protection::write(folder, &note)?;
            // A deletion looks for the note after it has withdrawn the manifest: one of the two sees the other.
            match check(folder, backup) {
                Ok(()) => Ok(()),
                Err(gone) => {
                    match before {
                        Some(before) => protection::write(folder, &before)?,
                        None => drop(protection::remove(folder)?),
                    }
                    Err(gone)
                }
            }
        })
        .await?;
        let mut memory = self.memory.lock().await;
        self.recall(&mut memory).await;
        self.append(&mut memory, &[Body::Protected { backup, by, until }]).await
    }

    /// Ends a protection: the event, then the note is removed. Whether there was one.
    ///
    /// # Errors
    /// When its folder cannot be written.
    pub async fn unprotect(&self, path: &Path, backup: BackupId, by: Actor) -> Result<bool, Fault> {
        {
            let mut memory = self.memory.lock().await;
            self.recall(&mut memory).await;
            self.append(&mut memory, &[Body::Unprotected { backup, by }]).await?;
        }
        on_folder(path, "end the protection", move |folder| {
            check(folder, backup)?;
            Ok(protection::remove(folder)?)
        })
        .await
    }

    /// Forgets a backup that is missing; a `dry_run` only says whether it would.
    ///
    /// # Errors
    /// When it is not missing, or the store does not take it.
    pub async fn forget(&self, backup: BackupId, dry_run: bool, by: Actor) -> Result<(), Fault> {
        let missing = self.view().await?.missing;
        if missing.iter().all(|one| one.place.backup != backup) {
            return Err(Fault::permanent(
                codes::INVALID_STATE,
                "forget the backup",
                backup.to_string(),
                "it is not missing",
            )
            .remedy("To remove one that is there: vmkeep delete"));
        }
        if dry_run {
            return Ok(());
        }
        let mut memory = self.memory.lock().await;
        self.append(&mut memory, &[Body::Forgotten { backup, by }]).await
    }

    /// The records of the stream.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn history(&self) -> Result<Vec<Record>, Fault> {
        let read = self.store.read(&StreamId::from(STREAM), Seq(1), 0).await;
        read.map_err(|e| {
            Fault::permanent(codes::STORE_UNAVAILABLE, "read the catalogue's history", STREAM, e)
                .remedy("`vmkeep audit verify` says whether it is damaged; otherwise see to the state folder's file system")
        })
    }

    /// Folds the stream if that has not been done. One that cannot be read is no obstacle: the folders are the truth.
    async fn recall(&self, memory: &mut Memory) -> Vec<String> {
        if memory.last.is_some() {
            return Vec::new();
        }
        match self.store.read(&StreamId::from(STREAM), Seq(1), 0).await {
            Ok(records) => {
                let mut shelf = Shelf::default();
                let strange = records.iter().filter(|record| !shelf.fold(&record.bytes)).count();
                memory.last = Some(records.last().map_or(Seq(0), |record| record.seq));
                memory.shelf = shelf;
                // What was found and could not be written down is looked for again.
                (memory.checks, memory.vaulting) = (Cursor::default(), Cursor::default());
                match strange {
                    0 => Vec::new(),
                    n => vec![format!(
                        "{n} records of the catalogue are of a kind that this release does not know"
                    )],
                }
            }
            Err(error) => vec![format!(
                "what is known of earlier backups cannot be read, so missing ones do not show: {error}"
            )],
        }
    }

    async fn look(&self, roots: Vec<PathBuf>, known: Known) -> Result<Look, Fault> {
        tokio::task::spawn_blocking(move || look::look(&roots, &known))
            .await
            .unwrap_or_else(|e| Err(Fault::permanent(codes::UNDEFINED_ERROR, "look for backups", "", e)))
    }

    /// Writes down what a look found that is not known, and deletions that explain what is missing.
    async fn note(&self, memory: &mut Memory, look: &Look) -> Vec<String> {
        let mut bodies: Vec<Body> =
            look.read.iter().filter(|place| !memory.shelf.knows(place)).cloned().map(Body::seen).collect();
        let mut ended = HashMap::new();
        for place in memory.shelf.vanished(look) {
            match self.deleted_by(memory, &mut ended, &place).await {
                Ok(Some(job)) => {
                    bodies.push(Body::Deleted { backup: place.backup, folder: place.folder, job });
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "whether a job deleted a backup could not be found out"),
            }
        }
        let shelf = &memory.shelf;
        let known = |job: &str| shelf.knows_check(job);
        match memory.checks.news(&*self.store, checks::WORKFLOWS, known, checks::of).await {
            Ok(mut checks) => {
                checks.sort_by_key(|check| check.at);
                bodies.extend(checks.into_iter().map(|check| Body::Checked(Box::new(check))));
            }
            Err(error) => tracing::warn!(%error, "what readings of backups have found could not be seen"),
        }
        self.write_down(memory, bodies).await
    }

    /// Appends what was found, and takes it over in any case. Why it could not be written, if so.
    async fn write_down(&self, memory: &mut Memory, bodies: Vec<Body>) -> Vec<String> {
        if bodies.is_empty() || memory.last.is_none() {
            bodies.into_iter().for_each(|body| memory.shelf.apply(&body));
            return Vec::new();
        }
        match self.append(memory, &bodies).await {
            Ok(()) => Vec::new(),
            Err(fault) => {
                // Shown all the same; the next look writes it down.
                memory.last = None;
                bodies.iter().for_each(|body| memory.shelf.apply(body));
                vec![format!("what was found could not be written into the catalogue: {}", fault.cause)]
            }
        }
    }

    /// The job of ours that deleted a backup. Journals are read only if a deletion has ended since the last time.
    async fn deleted_by(
        &self,
        memory: &mut Memory,
        ended: &mut HashMap<String, Vec<JobId>>,
        place: &Place,
    ) -> Result<Option<String>, String> {
        if !ended.contains_key(&place.domain_uuid) {
            let found = look::deletions(&*self.store, &place.domain_uuid).await?;
            ended.insert(place.domain_uuid.clone(), found);
        }
        let ended = ended.get(&place.domain_uuid).map(Vec::as_slice).unwrap_or_default();
        let asked = memory.asked.insert((place.backup, place.folder.clone()), ended.len());
        if asked == Some(ended.len()) {
            return Ok(None);
        }
        look::deleted_by(&*self.store, ended, place).await
    }

    async fn append(&self, memory: &mut Memory, bodies: &[Body]) -> Result<(), Fault> {
        let refused = |e: &dyn std::fmt::Display| {
            Fault::transient(codes::STORE_UNAVAILABLE, "write into the catalogue", STREAM, e)
                .remedy("See to the state folder's file system, then ask again")
        };
        let mut tries = 0;
        let mut left = bodies;
        while !left.is_empty() {
            let (now, later) = left.split_at(left.len().min(BATCH));
            let records: Result<Vec<_>, _> = now.iter().map(encode).collect();
            let append = Append {
                stream: StreamId::from(STREAM),
                expected: match memory.last {
                    Some(last) => last,
                    None => self.store.last(&StreamId::from(STREAM)).await.map_err(|e| refused(&e))?,
                },
                records: records.map_err(|e| refused(&e))?,
                summary: None,
                key: None,
            };
            match self.store.append(append).await {
                Ok(appended) => {
                    memory.last = memory.last.map(|_| appended.last);
                    now.iter().for_each(|body| memory.shelf.apply(body));
                    left = later;
                }
                Err(AppendError::Conflict { .. }) if tries < TRIES => {
                    tries += 1;
                    memory.last = None;
                    self.recall(memory).await;
                }
                Err(AppendError::Fatal(why)) => {
                    (self.on_fatal)(&why);
                    return Err(refused(&why));
                }
                Err(error) => {
                    // Read again before anything else is appended.
                    memory.last = None;
                    return Err(refused(&error));
                }
            }
        }
        Ok(())
    }
}

/// Why a note could not be changed.
enum Trouble {
    Place(RootError),
    /// The folder is not, or not any more, that backup.
    Gone(String),
}

impl From<RootError> for Trouble {
    fn from(error: RootError) -> Self {
        Self::Place(error)
    }
}

/// The folder is that backup.
fn check(folder: &vmkeep_steps::image::root::Folder, backup: BackupId) -> Result<(), Trouble> {
    match manifest::read(folder) {
        Ok(stored) if stored.manifest.backup == backup => Ok(()),
        Ok(_) => Err(Trouble::Gone("another backup lies there now".to_owned())),
        Err(ManifestError::Place(RootError::Missing { .. })) => {
            Err(Trouble::Gone("its deletion has begun".to_owned()))
        }
        Err(error) => Err(Trouble::Gone(error.to_string())),
    }
}

async fn on_folder<T: Send + 'static>(
    path: &Path,
    doing: &'static str,
    work: impl FnOnce(&vmkeep_steps::image::root::Folder) -> Result<T, Trouble> + Send + 'static,
) -> Result<T, Fault> {
    let object = path.display().to_string();
    let path = path.to_owned();
    let done = tokio::task::spawn_blocking(move || {
        let folder = TargetRoot::open(&path)?;
        work(folder.folder())
    });
    match done.await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(Trouble::Gone(why))) => {
            Err(Fault::permanent(codes::NO_SUCH_BACKUP, doing, object, why).remedy("See: vmkeep list"))
        }
        Ok(Err(Trouble::Place(error))) => {
            let code = match &error {
                RootError::NoSpace { .. } => codes::NOT_ENOUGH_DISK_SPACE,
                RootError::Missing { .. } => codes::NO_SUCH_BACKUP,
                _ => codes::CANNOT_WRITE_TO_BACKUP_LOCATION,
            };
            Err(Fault::permanent(code, doing, object, error)
                .remedy("See whether the file system is mounted, writable and healthy"))
        }
        Err(error) => Err(Fault::permanent(codes::UNDEFINED_ERROR, doing, object, error)),
    }
}

#[cfg(test)]
mod tests;

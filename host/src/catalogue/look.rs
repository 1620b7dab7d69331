//! A look at the folders.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_steps::deletion::remove::{Gone, RemoveBackups, Removed};
use vmkeep_steps::deletion::rule::Standing;
use vmkeep_steps::deletion::shelf::standing;
use vmkeep_steps::deletion::workflow::{DELETE, PRUNE};
use vmkeep_steps::image::root::TargetRoot;
use vmkeep_steps::manifest::catalogue::{Entry, Met, Stamp, stamp_at, walk};
use vmkeep_steps::manifest::{self, BackupId, protection};
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{Body, Event, EventStore, Fault, JobId, Seq, Step, StreamId};

use super::View;
use super::event::Place;
use super::shelf::Shelf;
use crate::codes;

/// What a look found.
#[derive(Clone, Debug, Default)]
pub(super) struct Look {
    /// Folders whose backup is one that was known, with the stamp that says so.
    pub(super) known: BTreeMap<PathBuf, Stamp>,
    /// Backups that were read.
    pub(super) read: Vec<Place>,
    /// Folders whose manifest cannot be read, with why.
    pub(super) unreadable: Vec<(PathBuf, String)>,
    /// Backups whose deletion was begun and not finished.
    halfway: Vec<(PathBuf, Option<BackupId>)>,
    /// Roots that could not be read.
    absent: Vec<PathBuf>,
    /// Folders that could not be looked into, with why.
    barred: Vec<(PathBuf, String)>,
    /// What somebody should know.
    pub(super) warnings: Vec<String>,
}

impl Look {
    /// Whether a known backup was found where it was.
    pub(super) fn has(&self, place: &Place) -> bool {
        self.known.get(&place.folder) == Some(&place.stamp)
    }

    pub(super) fn halfway(&self, backup: BackupId) -> bool {
        self.halfway.iter().any(|(_, id)| *id == Some(backup))
    }

    pub(super) fn why_missing(&self, folder: &Path) -> String {
        if let Some(root) = self.absent.iter().find(|root| folder.starts_with(root)) {
            return format!("the root {} cannot be read: its file system may not be mounted", root.display());
        }
        if let Some((barred, why)) = self.barred.iter().find(|(barred, _)| folder.starts_with(barred)) {
            return format!("{} cannot be looked into: {why}", barred.display());
        }
        if let Some((_, why)) = self.unreadable.iter().find(|(path, _)| path == folder) {
            return format!("its manifest cannot be read: {why}");
        }
        if folder.is_dir() { "its manifest is gone" } else { "its folder is gone" }.to_owned()
    }

    /// Whether there may be backups that it has not seen.
    pub(super) fn partial(&self) -> bool {
        !(self.absent.is_empty() && self.barred.is_empty() && self.unreadable.is_empty())
    }

    /// Both looks.
    pub(super) fn with(mut self, other: &Self) -> Self {
        for place in &other.read {
            if !self.known.contains_key(&place.folder)
                && self.read.iter().all(|one| one.folder != place.folder)
            {
                self.read.push(place.clone());
            }
        }
        self
    }
}

/// The stamps of known backups by their folders: one that took the place of another has two.
pub(super) type Known = HashMap<PathBuf, Vec<Stamp>>;

/// Looks below all roots, and where known backups lie that are below none of them. Blocks.
pub(super) fn look(roots: &[PathBuf], known: &Known) -> Result<Look, Fault> {
    let mut look = Look::default();
    let same = |path: &Path, stamp: &Stamp| known.get(path).is_some_and(|stamps| stamps.contains(stamp));
    let mut resolved = Vec::new();
    for root in roots {
        let met = TargetRoot::open(root).and_then(|opened| {
            resolved.push(opened.folder().path().to_owned());
            walk(opened.folder(), &same)
        });
        match met {
            Ok(met) => met.into_iter().for_each(|met| take(&mut look, met)),
            Err(error) => {
                look.absent.push(root.clone());
                look.warnings.push(format!("{}: {error}", root.display()));
            }
        }
    }
    if look.absent.len() == roots.len() {
        let fault = Fault::permanent(
            codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST,
            "look for backups",
            roots.first().map(|root| root.display().to_string()).unwrap_or_default(),
            look.warnings.join("; "),
        );
        return Err(fault.remedy("Mount or make the folder, or configure another root"));
    }
    // Somebody named their folder once, with `catalogue rebuild --from`.
    for path in known.keys().filter(|path| !resolved.iter().any(|root| path.starts_with(root))) {
        if let Some(stamp) = stamp_at(path).filter(|stamp| same(path, stamp)) {
            look.known.insert(path.clone(), stamp);
        } else if let Ok(root) = TargetRoot::open(path)
            && let Ok(met) = walk(root.folder(), &same)
        {
            met.into_iter().for_each(|met| take(&mut look, met));
        }
    }
    Ok(look)
}

fn take(look: &mut Look, met: Met) {
    match met {
        Met::Known(path, stamp) => drop(look.known.insert(path, stamp)),
        Met::Read(stored, path, stamp) => match durable(&path) {
            Ok(note) => look.read.push(Place::new(&stored, path, stamp, note)),
            Err(why) => unreadable(look, path, why),
        },
        Met::Other(Entry::Unreadable { path, error }) => unreadable(look, path, error.to_string()),
        Met::Other(Entry::Barred { path, error }) => {
            look.warnings.push(format!(
                "{} cannot be looked into, so backups in it are not seen: {error}. Let the user of vmkeepd in",
                path.display()
            ));
            look.barred.push((path, error.to_string()));
        }
        Met::Other(Entry::Withdrawn { path, stored }) => {
            look.warnings.push(format!(
                "the deletion of the backup in {} is under way or was given up; to finish it: vmkeep delete {}",
                path.display(),
                path.display()
            ));
            look.halfway.push((path, stored.map(|stored| stored.manifest.backup)));
        }
        Met::Other(_) => {}
    }
}

fn unreadable(look: &mut Look, path: PathBuf, why: String) {
    look.warnings.push(format!("the backup in {} cannot be read: {why}", path.display()));
    look.unreadable.push((path, why));
}

/// Makes the name of a manifest durable before anybody is told of it (the job that published it may be right before
/// doing so), and reads the note beside it.
fn durable(path: &Path) -> Result<Option<protection::Protection>, String> {
    let root = TargetRoot::open(path).map_err(|e| e.to_string())?;
    if let Err(error) = root.folder().sync()
        && !read_only(path)
    {
        return Err(error.to_string());
    }
    protection::read(root.folder()).map_err(|e| e.to_string())
}

/// On a file system that is mounted read-only nothing is about to become durable.
fn read_only(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|fs| fs.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Backups of a look whose files are not all there, each with what is wrong.
pub(super) async fn judge(look: &Look) -> Vec<String> {
    let folders: Vec<PathBuf> = look.read.iter().map(|place| place.folder.clone()).collect();
    let judged = tokio::task::spawn_blocking(move || {
        let now = Timestamp::now();
        let judge = |path: PathBuf| {
            let root = TargetRoot::open(&path).ok()?;
            let stored = manifest::read(root.folder()).ok()?;
            match standing(root.folder(), &stored, now) {
                Standing::Damaged(why) => Some(format!("{}: {why}", path.display())),
                Standing::Whole | Standing::Protected(_) => None,
            }
        };
        folders.into_iter().filter_map(judge).collect()
    });
    judged.await.unwrap_or_default()
}

/// What a rebuild found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Where was looked.
    pub roots: Vec<PathBuf>,
    /// How many backups there are.
    pub found: u64,
    /// Folders of backups that were not known.
    pub added: Vec<PathBuf>,
    /// Folders of backups that were known and are gone, with why.
    pub missing: Vec<String>,
    /// Folders whose manifest cannot be read, with why.
    pub unreadable: Vec<String>,
    /// Backups whose files are not all there, with what is wrong.
    pub damaged: Vec<String>,
    /// What else somebody should know.
    pub warnings: Vec<String>,
}

/// A report in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Backups that are there.
    pub found: u64,
    /// Backups that were not known.
    pub added: u64,
    /// Backups that are gone.
    pub missing: u64,
    /// Manifests that cannot be read.
    pub unreadable: u64,
    /// Backups that are not whole.
    pub damaged: u64,
}

impl Report {
    pub(super) fn counts(&self) -> Counts {
        Counts {
            found: self.found,
            added: self.added.len() as u64,
            missing: self.missing.len() as u64,
            unreadable: self.unreadable.len() as u64,
            damaged: self.damaged.len() as u64,
        }
    }
}

pub(super) fn report(
    roots: &[PathBuf],
    before: &Shelf,
    look: &Look,
    view: &View,
    damaged: Vec<String>,
    mut warnings: Vec<String>,
) -> Report {
    let new = |place: &&Place| !before.has(place.backup) || before.at(&place.folder).is_none();
    warnings.extend(look.warnings.iter().cloned());
    Report {
        roots: roots.to_vec(),
        found: look.read.len() as u64,
        added: look.read.iter().filter(new).map(|place| place.folder.clone()).collect(),
        missing: view
            .missing
            .iter()
            .map(|one| format!("{}: {}", one.place.folder.display(), one.why))
            .collect(),
        unreadable: look.unreadable.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect(),
        damaged,
        warnings,
    }
}

/// The deletions of a domain's backups that have ended.
pub(super) async fn deletions(store: &dyn EventStore, domain: &str) -> Result<Vec<JobId>, String> {
    let mut ended = Vec::new();
    for workflow in [DELETE, PRUNE] {
        let filter = JobFilter {
            subject: Some(domain.to_owned()),
            workflow: Some(workflow.to_owned()),
            ..JobFilter::default()
        };
        let jobs = store.jobs(&filter).await.map_err(|e| e.to_string())?;
        ended.extend(jobs.into_iter().filter(|job| job.status.ended()).map(|job| job.job));
    }
    Ok(ended)
}

/// Which of these jobs removed a backup from its folder.
pub(super) async fn deleted_by(
    store: &dyn EventStore,
    jobs: &[JobId],
    place: &Place,
) -> Result<Option<String>, String> {
    for job in jobs {
        let records = store.read(&StreamId::job(*job), Seq(1), 0).await.map_err(|e| e.to_string())?;
        let mut kinds = HashMap::new();
        for record in records {
            let Ok(event) = serde_json::from_slice::<Event>(&record.bytes) else { continue };
            if let Body::JobPlanned(plan) = event.body {
                kinds = plan.steps.into_iter().map(|step| (step.name, step.kind)).collect();
            } else if let Some((step, output)) = event.body.output()
                && kinds.get(step) == Some(&RemoveBackups::KIND)
            {
                let removed = Removed::deserialize(output).map_err(|e| e.to_string())?;
                let this = |gone: &Gone| gone.backup == place.backup && gone.folder == place.folder;
                if removed.backups.iter().any(this) {
                    return Ok(Some(job.to_string()));
                }
            }
        }
    }
    Ok(None)
}

//! What restores leave: files under way, and files that have their name.
//!
//! A restore writes each file under a hidden name that holds the job's id, wherever the file goes. Such a name is ours, and
//! what bears it is a copy of what a backup holds: once its job is over nobody can miss it. The name that it gets in the end
//! says nothing; only the plan of the job does. A file of that name may be anybody's by now, so it is told of and stays.

use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use vmkeep_workflow::{Body, Event, EventStore, JobStatus, JobSummary, Plan, Seq, Step, StreamId};

use super::uses::{Uses, open_by};
use super::{Leftover, Owner, What};
use crate::hypervisor::FileId;
use crate::image::root::{Component, Folder, RelPath, RootError, TargetRoot};
use crate::manifest::folder::job_of;
use crate::restore::from_vault::image::FetchImage;
use crate::restore::image::RestoreImage;
use crate::restore::machine::RestoreVariables;
use crate::restore::place::aside_job;
use crate::snapshot::Places;

/// So many folders deep files are looked for below a root.
const DEEPEST: usize = 8;

/// A file that a job was to make under its final name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The job's id.
    pub job: String,
    /// Where.
    pub path: PathBuf,
}

/// The final names of files that unfinished jobs, and those that were given up, were to restore. A job whose journal cannot be
/// read tells of none.
pub async fn placed(store: &dyn EventStore, jobs: &[JobSummary]) -> Vec<Placed> {
    let restores = |job: &&JobSummary| {
        job.workflow.as_str().starts_with("restore")
            && (!job.status.ended() || job.status == JobStatus::Abandoned)
    };
    let mut found = Vec::new();
    for job in jobs.iter().filter(restores) {
        let Ok(records) = store.read(&StreamId::job(job.job), Seq(1), 0).await else { continue };
        for record in records {
            if let Ok(Event { body: Body::JobPlanned(plan), .. }) = serde_json::from_slice(&record.bytes) {
                found.extend(names(&plan).map(|path| Placed { job: job.job.to_string(), path }));
            }
        }
    }
    found
}

/// The final names in a plan.
fn names(plan: &Plan) -> impl Iterator<Item = PathBuf> {
    let kinds = [RestoreImage::KIND, RestoreVariables::KIND, FetchImage::KIND];
    plan.steps.iter().filter(move |step| kinds.contains(&step.kind)).filter_map(|step| {
        let text = |field: &str| step.input.get(field)?.as_str();
        Some(Path::new(text("folder")?).join(text("name")?))
    })
}

/// Files under way in these folders (not below them), and below these roots. Blocks.
pub(super) fn under_way(folders: Vec<PathBuf>, roots: &[PathBuf]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for folder in folders {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        found.extend(entries.map(|entry| entry.path()).filter(|path| aside_job(path).is_some()));
    }
    for root in roots {
        if let Ok(root) = TargetRoot::open(root) {
            descend(root.folder(), DEEPEST, &mut found);
        }
    }
    found.sort();
    found.dedup();
    found
}

/// What cannot be looked into is told by whoever looks at the roots. No restore goes into a backup.
fn descend(folder: &Folder, levels: usize, found: &mut Vec<PathBuf>) {
    for (name, kind) in folder.entries().unwrap_or_default() {
        let path = folder.path_of(&name);
        if kind == FileType::RegularFile && aside_job(&path).is_some() {
            found.push(path);
        } else if kind == FileType::Directory
            && levels > 0
            && job_of(&name).is_none()
            && let Ok(below) = folder.open_folder(&RelPath::from(name))
        {
            descend(&below, levels - 1, found);
        }
    }
}

/// The files under way that are there, each with its owner.
pub(super) fn halves(paths: Vec<PathBuf>, uses: &Uses, jobs: &[JobSummary]) -> Vec<Leftover> {
    let half = |path: PathBuf| {
        let data = path.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
        let owner = Owner::of(aside_job(&path)?, jobs);
        let users = uses.users(&path);
        Some(Leftover { what: What::Half { path, id: FileId::of(&data) }, owner, users })
    };
    paths.into_iter().filter_map(half).collect()
}

/// The files with their final names that are there. What a domain uses is no leftover of a job that is over.
pub(super) fn named(placed: &[Placed], uses: &Uses, jobs: &[JobSummary]) -> Vec<Leftover> {
    let one = |placed: &Placed| {
        placed.path.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
        let (owner, users) = (Owner::of(&placed.job, jobs), uses.users(&placed.path));
        let left = matches!(owner, Owner::Open(_)) || users.is_empty();
        left.then(|| Leftover { what: What::Restored(placed.path.clone()), owner, users })
    };
    placed.iter().filter_map(one).collect()
}

/// Removes a file under way of a job that is over, if it is still that file and no process has it open. Why it stays, if it
/// does; nothing if it is gone.
pub(super) fn remove(places: &Places, path: &Path, id: FileId) -> Result<Removed, RootError> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(Removed::Gone);
    };
    let name = Component::new(name)?;
    let folder = match places.open(above, false) {
        // A restore in place writes beside the domain's own images, which may lie below no root.
        Err(RootError::Outside { .. }) => places.open(above, true),
        folder => folder,
    };
    let folder = match folder {
        Err(RootError::Missing { .. }) => return Ok(Removed::Gone),
        folder => folder?,
    };
    match folder.stat(&name)? {
        Some(stat) if (FileId { dev: stat.st_dev, ino: stat.st_ino }) == id => {}
        _ => return Ok(Removed::Gone),
    }
    if let Some(process) = open_by(id).first() {
        return Ok(Removed::Stays(format!("{process} has it open")));
    }
    folder.remove_file(&name)?;
    folder.sync()?;
    Ok(Removed::Done)
}

/// What became of a file.
pub(super) enum Removed {
    Done,
    Gone,
    Stays(String),
}

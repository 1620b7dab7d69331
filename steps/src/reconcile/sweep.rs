//! `sweep-leftover`: one thing is taken away that a job which is over has left behind.
//!
//! The domain's lock is held. All that made the thing safe to take away is looked at again, right before; if anything of
//! it is not so any more, it stays, and the output says why. Nothing of this is undone: what goes holds nothing that is
//! not elsewhere.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{
    Code, Event, EventStore, Fault, JobId, JobSummary, Seq, Step, StepContext, StreamId, Verdict,
};

use super::look::{domains, is_read, notes};
use super::restores::{self, Removed};
use super::uses::{Uses, open_by};
use super::{Owner, Sweep};
use crate::backup::end::end;
use crate::codes;
use crate::hypervisor::{DomainRef, FileId, Layer, Marker, Observation};
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::manifest::folder::{
    DEFINITION, LIVE_DEFINITION, MANIFEST, NEW, NVRAM, TPM_PREFIX, WITHDRAWN, job_of,
};
use crate::restore::place::aside_job;
use crate::snapshot::disk::scratch_job;
use crate::snapshot::safety::{Release, release};
use crate::snapshot::{Places, World, not_looked};

/// What the journals know.
#[async_trait]
pub trait Jobs: Send + Sync {
    /// All jobs, whatever has become of them.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn all(&self) -> Result<Vec<JobSummary>, Fault>;

    /// What a job's journal tells; of a history that was pruned nothing.
    ///
    /// # Errors
    /// When the store cannot be read.
    async fn history(&self, job: JobId) -> Result<Vec<Event>, Fault>;
}

/// The journals of a store.
pub struct Journals(pub Arc<dyn EventStore>);

#[async_trait]
impl Jobs for Journals {
    async fn all(&self) -> Result<Vec<JobSummary>, Fault> {
        self.0.jobs(&JobFilter::default()).await.map_err(|e| e.fault("see which jobs are over", ""))
    }

    async fn history(&self, job: JobId) -> Result<Vec<Event>, Fault> {
        let read = self.0.read(&StreamId::job(job), Seq(1), 0).await;
        let records = read.map_err(|e| e.fault("see what a job has done", job.to_string()))?;
        Ok(records.iter().filter_map(|record| serde_json::from_slice(&record.bytes).ok()).collect())
    }
}

/// Takes one thing away.
pub struct SweepLeftover {
    /// The world.
    pub world: World,
    /// The roots.
    pub places: Places,
    /// The journals.
    pub jobs: Arc<dyn Jobs>,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SweepInput {
    /// The domain whose lock is held.
    pub domain: DomainRef,
    /// The store of this daemon.
    pub store: String,
    /// The job that has left it.
    pub of: JobId,
    /// What.
    pub sweep: Sweep,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SweepOutput {
    /// It was taken away; false also if it was gone already.
    pub done: bool,
    /// Why it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stays: Option<String>,
}

const DONE: SweepOutput = SweepOutput { done: true, stays: None };
const GONE: SweepOutput = SweepOutput { done: false, stays: None };
const DOING: &str = "take away what a job has left";

fn stays(why: impl Into<String>) -> SweepOutput {
    SweepOutput { done: false, stays: Some(why.into()) }
}

#[async_trait]
impl Step for SweepLeftover {
    const KIND: StepKind = StepKind::new("sweep-leftover", 1);
    type Input = SweepInput;
    type Output = SweepOutput;

    async fn run(&self, _: &StepContext, input: SweepInput) -> Result<SweepOutput, Fault> {
        let jobs = self.jobs.all().await?;
        match Owner::of(&input.of.short(), &jobs) {
            Owner::Over { .. } => {}
            Owner::Unknown(_) if input.sweep.is_of_pull() => {
                if let Some(why) = self.may_be_missed(&input, &jobs).await? {
                    return Ok(stays(why));
                }
            }
            owner => return Ok(stays(format!("it is {} now", owner.words()))),
        }
        match &input.sweep {
            Sweep::Free => self.free(&input).await,
            Sweep::Unmark => self.unmark(&input).await,
            Sweep::Overlay { path, id } => self.overlay(&input, path, *id).await,
            Sweep::Scratch { path, id } => self.scratch(&input, path, *id).await,
            Sweep::Pull(path) => self.pull(&input, path).await,
            Sweep::Folder(path) => self.folder(&input, path).await,
            Sweep::Half { path, id } => self.half(&input, path, *id).await,
        }
    }

    /// All of it is looked at again before it acts, so acting again does no harm.
    async fn probe(&self, cx: &StepContext, _: SweepInput) -> Verdict<SweepOutput> {
        cx.may_repeat()
    }
}

impl SweepLeftover {
    /// The domain's note, if it is that of the job and of this store.
    async fn note(&self, input: &SweepInput) -> Result<Option<(Observation, Marker)>, Fault> {
        let seen = self.world.hypervisor.observe_from_outside(&input.domain.id).await;
        let seen = seen.map_err(|e| not_looked(e, codes::CANNOT_LOCK_MACHINE, DOING, &input.domain.name))?;
        let ours = |marker: &Marker| marker.store == input.store && marker.job == input.of.to_string();
        let marker = seen.marker.clone().or_else(|| seen.persistent_marker.clone()).filter(ours);
        Ok(marker.map(|marker| (seen, marker)))
    }

    /// Why somebody may go on with the pull of a job that the journal does not know.
    async fn may_be_missed(&self, input: &SweepInput, jobs: &[JobSummary]) -> Result<Option<String>, Fault> {
        let look = |e| not_looked(e, codes::CANNOT_END_PULL, DOING, &input.domain.name);
        let seen = self.world.hypervisor.observe_from_outside(&input.domain.id).await.map_err(look)?;
        let of = input.of.short();
        match Owner::of_pull(&of, jobs, &seen, &input.store) {
            Owner::Lost { .. } => {}
            owner => return Ok(Some(format!("it is {} now", owner.words()))),
        }
        match &input.sweep {
            Sweep::Pull(path) if is_read(&self.world, &input.domain, path).await.map_err(look)? => {
                Ok(Some("somebody is connected to it".to_owned()))
            }
            // A file alone does not tell whose it is.
            Sweep::Scratch { .. } if !notes(&seen, &of, &input.store) => {
                Ok(Some("the domain does not bear the note of its job any more".to_owned()))
            }
            _ => Ok(None),
        }
    }

    async fn free(&self, input: &SweepInput) -> Result<SweepOutput, Fault> {
        if self.note(input).await?.is_none() {
            return Ok(GONE);
        }
        let freed = release(&self.world, &input.store, &input.domain.id).await;
        match freed
            .map_err(|e| e.fault(codes::CANNOT_LOCK_MACHINE, "set the guest free", &input.domain.name))?
        {
            Release::NotHeld => Ok(GONE),
            Release::Waiting => Ok(stays("libvirt's own job on the domain is not over")),
            Release::Thawed | Release::Resumed { .. } => Ok(DONE),
        }
    }

    async fn unmark(&self, input: &SweepInput) -> Result<SweepOutput, Fault> {
        let Some((seen, marker)) = self.note(input).await? else { return Ok(GONE) };
        if crate::snapshot::safety::holds(&marker)
            && matches!(seen.state, crate::hypervisor::RunState::Paused(_))
        {
            return Ok(stays("the guest is still held"));
        }
        let cleared = self.world.hypervisor.clear_marker(&input.domain.id).await;
        cleared.map_err(|e| e.fault(codes::CANNOT_LOCK_MACHINE, "remove the note", &input.domain.name))?;
        Ok(DONE)
    }

    /// What was overwritten is of no use to anybody once the point in time is gone.
    async fn scratch(&self, input: &SweepInput, path: &Path, id: FileId) -> Result<SweepOutput, Fault> {
        let object = path.display().to_string();
        if scratch_job(path) != Some(input.of.short().as_str()) {
            return Ok(stays("its name is not that of a scratch file of the job"));
        }
        let open = crate::blocking::run(move || open_by(id)).await;
        let open = open.map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &object, e))?;
        if let Some(process) = open.first() {
            return Ok(stays(format!("{process} has it open")));
        }
        let removed = self.world.storage.remove(path, id).await;
        let removed = removed.map_err(|e| e.fault(codes::CANNOT_REMOVE_FILE, DOING, &object))?;
        Ok(if removed { DONE } else { GONE })
    }

    async fn pull(&self, input: &SweepInput, path: &Path) -> Result<SweepOutput, Fault> {
        if scratch_job(path) != Some(input.of.short().as_str()) {
            return Ok(stays("its name is not that of a scratch file of the job"));
        }
        let ended = end(&self.world, &input.domain.id, &[path.to_owned()]).await;
        ended.map_err(|e| e.fault(codes::CANNOT_END_PULL, DOING, &input.domain.name))?;
        Ok(DONE)
    }

    async fn overlay(&self, input: &SweepInput, path: &Path, id: FileId) -> Result<SweepOutput, Fault> {
        let object = path.display().to_string();
        let look = |e| not_looked(e, codes::CANNOT_REMOVE_FILE, DOING, &object);
        if crate::snapshot::disk::overlay_job(path) != Some(input.of.short().as_str()) {
            return Ok(stays("its name is not that of an overlay of the job"));
        }
        let layer = Layer { path: path.to_owned(), format: "qcow2".to_owned() };
        let image = match self.world.storage.inspect(&layer).await.map_err(look)? {
            Some(image) if image.id == id => image,
            // Gone, or another file of that name.
            _ => return Ok(GONE),
        };
        if !image.empty {
            return Ok(stays("it holds data"));
        }
        let (seen, unseen) = domains(&self.world).await.map_err(look)?;
        if let Some((name, e)) = unseen.first() {
            return Ok(stays(format!("whether {name} needs it is not known: {e}")));
        }
        let uses = Uses::of(&self.world, &seen).await.map_err(look)?;
        if let Some(user) = uses.users(path).first() {
            return Ok(stays(format!("in use: {user}")));
        }
        if let Some(why) = self.memory_may_need_it(&seen, image.backing.as_ref()).await.map_err(look)? {
            return Ok(stays(why));
        }
        let open = crate::blocking::run(move || open_by(id)).await;
        let open = open.map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &object, e))?;
        if let Some(process) = open.first() {
            return Ok(stays(format!("{process} has it open")));
        }
        let removed = self.world.storage.remove(path, id).await;
        removed.map_err(|e| e.fault(codes::CANNOT_REMOVE_FILE, DOING, &object))?;
        Ok(DONE)
    }

    /// A guest that was saved on its overlays comes back on them, whatever the definition says; even an empty one belongs to
    /// that memory. So whoever has the image below must run, or be known not to have been saved.
    async fn memory_may_need_it(
        &self,
        seen: &[Observation],
        below: Option<&Layer>,
    ) -> Result<Option<String>, crate::hypervisor::HvError> {
        let Some(below) = below else { return Ok(Some("no image is below it".to_owned())) };
        let mut whose = 0;
        for domain in seen {
            if !Uses::of(&self.world, std::slice::from_ref(domain)).await?.knows(&below.path) {
                continue;
            }
            whose += 1;
            let name = &domain.domain.name;
            if domain.managed_save || !domain.state.is_active() && domain.saved != Some(false) {
                return Ok(Some(format!(
                    "{name} is off, and its memory may have been saved on it: start it, then ask again"
                )));
            }
        }
        Ok((whose == 0)
            .then(|| format!("no domain has {} any more, on which it stands", below.path.display())))
    }

    /// A copy of what a backup holds, which never got a name that anybody knows.
    async fn half(&self, input: &SweepInput, path: &Path, id: FileId) -> Result<SweepOutput, Fault> {
        let object = path.display().to_string();
        if aside_job(path) != Some(input.of.short().as_str()) {
            return Ok(stays("its name is not that of a file which the job was writing"));
        }
        let look = |e| not_looked(e, codes::CANNOT_REMOVE_FILE, DOING, &object);
        let (seen, _) = domains(&self.world).await.map_err(look)?;
        let uses = Uses::of(&self.world, &seen).await.map_err(look)?;
        if let Some(user) = uses.users(path).first() {
            return Ok(stays(format!("in use: {user}")));
        }
        let (places, at) = (self.places.clone(), path.to_owned());
        let removed = crate::blocking::run(move || restores::remove(&places, &at, id)).await;
        let removed = removed.map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &object, e))?;
        let removed = removed
            .map_err(|e| crate::snapshot::copy::place_fault(&e, codes::CANNOT_REMOVE_FILE, DOING, &object))?;
        Ok(match removed {
            Removed::Done => DONE,
            Removed::Gone => GONE,
            Removed::Stays(why) => stays(why),
        })
    }

    async fn folder(&self, input: &SweepInput, path: &Path) -> Result<SweepOutput, Fault> {
        let (places, at, of) = (self.places.clone(), path.to_owned(), input.of.short());
        let object = path.display().to_string();
        let done = crate::blocking::run(move || clear_out(&places, &at, &of)).await;
        done.map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &object, e))?
            .map_err(|e| crate::snapshot::copy::place_fault(&e, codes::CANNOT_REMOVE_FILE, DOING, &object))
    }
}

/// Whether a file of that name is a copy of something, and nothing else. (A memory image is the only one of its kind.)
fn is_copy(name: &str) -> bool {
    let name = name.strip_suffix(NEW).unwrap_or(name);
    [DEFINITION, LIVE_DEFINITION, MANIFEST, NVRAM].contains(&name)
        || name.starts_with(TPM_PREFIX)
        || name.ends_with(".qcow2")
        || name.ends_with(".raw")
}

/// Removes a folder that never became a backup.
fn clear_out(places: &Places, path: &Path, of: &str) -> Result<SweepOutput, RootError> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(stays("it has no name"));
    };
    let name = Component::new(name)?;
    if job_of(&name) != Some(of) {
        return Ok(stays("its name is not that of a folder of the job"));
    }
    let parent = match places.roots.open_folder(above) {
        Err(RootError::Missing { .. }) => return Ok(GONE),
        parent => parent?,
    };
    let folder: Folder = match parent.open_folder(&RelPath::from(name.clone())) {
        Err(RootError::Missing { .. }) => return Ok(GONE),
        folder => folder?,
    };
    for manifest in [MANIFEST, WITHDRAWN] {
        if folder.stat(&crate::manifest::folder::fixed(manifest))?.is_some() {
            return Ok(stays(format!("it holds {manifest}: it is, or was, a backup")));
        }
    }
    let entries = folder.entries()?;
    for (entry, kind) in &entries {
        if *kind != rustix::fs::FileType::RegularFile || !is_copy(entry.as_str()) {
            return Ok(stays(format!("it holds {}, which may be the only one of its kind", entry.as_str())));
        }
        if let Some(stat) = folder.stat(entry)?
            && let Some(process) = open_by(FileId { dev: stat.st_dev, ino: stat.st_ino }).first()
        {
            return Ok(stays(format!("{process} has {} open", entry.as_str())));
        }
    }
    for (entry, _) in &entries {
        folder.remove_file(entry)?;
    }
    parent.remove_folder(&name)?;
    parent.sync()?;
    Ok(DONE)
}

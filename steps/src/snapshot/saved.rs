//! `take-saved`: the instant of a domain that is off with its memory saved by libvirt (managed save).
//!
//! Disks and memory belong together as they lie, and nothing writes to either until somebody starts the domain. No
//! overlay may be put under it: the saved image holds a definition of its own, which names the bases, and that is what
//! the next start uses; the persistent definition would lead to overlays that nobody writes to. So nothing is changed
//! at all. The files are copied as they are, and each copy proves that its file is still the one that was seen here: a
//! start in between is not in anybody's way, and makes at most the backup fail, never be of two points in time.

use std::path::PathBuf;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, Verdict};

use super::World;
use super::disk::JobDisk;
use super::switch::{Names, names, persistent};
use super::take::TakeOutput;
use crate::codes;
use crate::hypervisor::{DomainRef, RunState};
use crate::image::copy::Identity;

/// Sees which files are the saved machine.
#[derive(Debug)]
pub struct TakeSaved(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedInput {
    /// The domain.
    pub domain: DomainRef,
    /// Its disks.
    pub disks: Vec<JobDisk>,
    /// libvirt's image of its memory.
    pub image: PathBuf,
    /// Where that is copied to; nothing for the disks alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<PathBuf>,
}

const DOING: &str = "see that the saved domain stands still";

#[async_trait]
impl Step for TakeSaved {
    const KIND: StepKind = StepKind::new("take-saved", 1);
    type Input = SavedInput;
    type Output = TakeOutput;

    async fn run(&self, _: &StepContext, input: SavedInput) -> Result<TakeOutput, Fault> {
        self.is_at_rest(&input).await?;
        let mut files: Vec<PathBuf> = input.disks.iter().map(|disk| disk.base.path.clone()).collect();
        files.push(input.image.clone());
        let cannot =
            |cause: String| Fault::transient(codes::CANNOT_TAKE_SNAPSHOT, DOING, &input.domain.name, cause);
        let looked = crate::blocking::run(move || {
            files.into_iter().map(|path| Identity::at(&path).map(|is| (path, is))).collect()
        });
        let frozen: std::io::Result<Vec<_>> = looked.await.map_err(|e| cannot(e.to_string()))?;
        let frozen = frozen.map_err(|e| cannot(e.to_string()))?;
        // Still so: then all of them were seen while nobody wrote.
        self.is_at_rest(&input).await?;
        let saved = frozen.iter().find(|(path, _)| *path == input.image).map(|(_, identity)| *identity);
        let at = saved
            .and_then(|is| Timestamp::new(is.mtime, i32::try_from(is.mtime_nsec).unwrap_or_default()).ok());
        Ok(TakeOutput {
            at: at.unwrap_or_else(Timestamp::now),
            memory: input.memory,
            without_memory: None,
            frozen,
            paused_ms: 0,
            off: false,
            thawed: None,
        })
    }

    /// It only looks.
    async fn probe(&self, cx: &StepContext, _: SavedInput) -> Verdict<TakeOutput> {
        cx.may_repeat()
    }
}

impl TakeSaved {
    async fn is_at_rest(&self, input: &SavedInput) -> Result<(), Fault> {
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_TAKE_SNAPSHOT).await?;
        let same = names(persistent(&seen, &input.domain)?, &input.disks) == Names::Bases;
        if seen.state == RunState::Off && seen.managed_save && same {
            return Ok(());
        }
        let cause = "the domain was started, or changed, since the job was planned";
        Err(Fault::permanent(Code::FACTS_CHANGED, DOING, input.domain.name.clone(), cause)
            .remedy("Start the job again; it plans anew"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::context;
    use crate::snapshot::tests::fake::{Fake, domain};

    #[tokio::test]
    async fn a_saved_domain_is_taken_as_it_lies_and_one_that_was_started_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let fake = Fake::new();
        fake.state().die();
        let mut disks = fake.disks();
        for disk in &mut disks {
            let real = folder.path().join(disk.base.path.file_name().unwrap());
            std::fs::write(&real, b"base").unwrap();
            let mut state = fake.state();
            let file = state.files.remove(&disk.base.path).unwrap();
            state.files.insert(real.clone(), file);
            state.persistent.insert(disk.target.clone(), real.clone());
            disk.base.path = real;
        }
        {
            let mut state = fake.state();
            state.durable = state.persistent.clone();
        }
        let image = folder.path().join("web.save");
        std::fs::write(&image, b"LibvirtQemudSave").unwrap();
        let memory = Some(folder.path().join("memory.save"));
        let input = SavedInput { domain: domain(), disks, image: image.clone(), memory };
        let step = TakeSaved(fake.world());
        let fault = step.run(&context(1), input.clone()).await.unwrap_err();
        assert_eq!(fault.code, Code::FACTS_CHANGED, "nothing is saved");
        fake.state().managed_save = true;
        let taken = step.run(&context(1), input.clone()).await.unwrap();
        assert_eq!(taken.frozen.len(), 3);
        assert_eq!(taken.memory, input.memory);
        let written = std::fs::metadata(&image).unwrap().modified().unwrap();
        assert_eq!(taken.at, Timestamp::try_from(written).unwrap(), "the instant at which it was saved");
        fake.state().start();
        let fault = step.run(&context(1), input).await.unwrap_err();
        assert_eq!(fault.code, Code::FACTS_CHANGED);
    }
}

//! `prepare-folder`: the folder that becomes the backup.
//!
//! It is a backup only once it holds a manifest. Until then it is this job's to remove, with everything in it; from
//! then on nothing here removes it.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, Verdict};

use super::Places;
use super::copy::place_fault;
use crate::codes;
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::manifest::folder::MANIFEST;

/// Makes the folder.
#[derive(Debug)]
pub struct PrepareFolder(pub Places);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderInput {
    /// The folder above; made if it is missing, below a root.
    pub parent: PathBuf,
    /// Its name; unique by the job's id.
    pub name: String,
}

impl FolderInput {
    /// The whole path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.parent.join(&self.name)
    }
}

#[async_trait]
impl Step for PrepareFolder {
    const KIND: StepKind = StepKind::new("prepare-folder", 1);
    type Input = FolderInput;
    type Output = ();

    async fn run(&self, cx: &StepContext, input: FolderInput) -> Result<(), Fault> {
        let again = cx.attempt > 1;
        self.blocking(input, "make the backup's folder", move |places, input| {
            let parent = places.roots.make_folder(&input.parent)?;
            let name = Component::new(&input.name)?;
            match parent.create_folder(&name) {
                // Of an attempt that was cut off; the name is this job's.
                Err(RootError::Exists { .. }) if again => parent.sync(),
                made => made.map(|_| ()),
            }
        })
        .await
    }

    async fn probe(&self, cx: &StepContext, _: FolderInput) -> Verdict<()> {
        cx.may_repeat()
    }

    async fn undo(&self, _: &StepContext, input: FolderInput, _: Option<()>) -> Result<(), Fault> {
        self.blocking(input, "remove the backup's folder", |places, input| {
            let parent = match places.roots.open_folder(&input.parent) {
                Err(RootError::Missing { .. }) => return Ok(()),
                parent => parent?,
            };
            remove(&parent, &Component::new(&input.name)?)
        })
        .await
    }
}

/// Removes a folder of files that never became a backup.
fn remove(parent: &Folder, name: &Component) -> Result<(), RootError> {
    let folder = match parent.open_folder(&RelPath::from(name.clone())) {
        Err(RootError::Missing { .. }) => return Ok(()),
        folder => folder?,
    };
    let entries = folder.entries()?;
    if entries.iter().any(|(entry, _)| entry.as_str() == MANIFEST) {
        return Err(RootError::Exists { path: folder.path().join(MANIFEST) });
    }
    for (entry, _) in entries {
        folder.remove_file(&entry)?;
    }
    parent.remove_folder(name)?;
    parent.sync()
}

impl PrepareFolder {
    async fn blocking(
        &self,
        input: FolderInput,
        doing: &'static str,
        work: impl FnOnce(&Places, &FolderInput) -> Result<(), RootError> + Send + 'static,
    ) -> Result<(), Fault> {
        let places = self.0.clone();
        let object = input.path().display().to_string();
        match crate::blocking::run(move || work(&places, &input)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(place_fault(&e, codes::CANNOT_CREATE_DIRECTORY, doing, &object)),
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, object, e)),
        }
    }
}

/// Whether a path can be a target at all, before anything is planned.
///
/// # Errors
/// With its code when it lies outside the roots, climbs, or does not exist.
pub fn check_target(places: &Places, target: &Path) -> Result<(), Fault> {
    let doing = "use the target";
    let object = target.display().to_string();
    match places.roots.locate(target) {
        Ok(_) => Ok(()),
        Err(e) => Err(place_fault(&e, codes::CANNOT_WRITE_TO_BACKUP_LOCATION, doing, &object)
            .remedy("Choose a folder below one of the configured roots")),
    }
}

//! `restore-folder`: the folders that the new domain's images go to.
//!
//! Which of them are missing was seen when the plan was made, so undo knows without any note which it may remove, if
//! they are empty. Unlike a backup's folder these can be traversed by others (0711, unless configured otherwise): the
//! hypervisor runs guests as another user, who must reach the images. The images themselves stay private; libvirt gives
//! them to that user. A folder that is there already is its owner's business and stays as it is.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use crate::codes;
use crate::image::rights::{FileMode, Kind, Wish};
use crate::image::root::{Component, RootError};
use crate::snapshot::Places;
use crate::snapshot::copy::place_fault;

/// Makes folders.
#[derive(Debug)]
pub struct RestoreFolder(pub Places);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceInput {
    /// The folder.
    pub folder: PathBuf,
    /// Those on the way to it, and itself, that do not exist yet; from the top down.
    pub missing: Vec<PathBuf>,
    /// What those are given.
    #[serde(default, skip_serializing_if = "Wish::is_empty")]
    pub rights: Wish,
}

const MAKING: &str = "make the folder";

/// The folders from the top down: each is durable, with its rights, before anything lies in it.
fn make(places: &Places, input: &PlaceInput) -> Result<(), Fault> {
    let object = input.folder.display().to_string();
    let fault = |e: RootError| place_fault(&e, codes::CANNOT_CREATE_DIRECTORY, MAKING, &object);
    let mode = input.rights.mode.unwrap_or(FileMode(0o711));
    let rights = Wish { mode: Some(mode), ..input.rights };
    for path in &input.missing {
        let folder = places.roots.make_folder(path).map_err(fault)?;
        let object = path.display().to_string();
        rights.give(&folder).map_err(|e| e.fault(Kind::Folder, MAKING, &object))?;
        folder.sync().map_err(fault)?;
    }
    places.roots.make_folder(&input.folder).map_err(fault)?;
    Ok(())
}

const REMOVING: &str = "remove the folder";

/// Those that were missing, from the bottom up, if they are empty.
fn remove(places: &Places, input: &PlaceInput) -> Result<(), RootError> {
    for path in input.missing.iter().rev() {
        let (Some(above), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
            continue;
        };
        let above = match places.roots.open_folder(above) {
            Err(RootError::Missing { .. }) => continue,
            above => above?,
        };
        match above.remove_folder(&Component::new(name)?) {
            // Somebody has put something there meanwhile: it is theirs now.
            Err(RootError::Exists { .. }) => break,
            removed => removed?,
        };
        above.sync()?;
    }
    Ok(())
}

impl RestoreFolder {
    async fn blocking(
        &self,
        input: PlaceInput,
        doing: &'static str,
        work: impl FnOnce(&Places, &PlaceInput) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(), Fault> {
        let places = self.0.clone();
        let object = input.folder.display().to_string();
        match crate::blocking::run(move || work(&places, &input)).await {
            Ok(done) => done,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, object, e)),
        }
    }
}

#[async_trait]
impl Step for RestoreFolder {
    const KIND: StepKind = StepKind::new("restore-folder", 1);
    type Input = PlaceInput;
    type Output = ();

    async fn run(&self, _: &StepContext, input: PlaceInput) -> Result<(), Fault> {
        self.blocking(input, MAKING, make).await
    }

    /// Making what is there already does no harm, so it is simply done again.
    async fn probe(&self, cx: &StepContext, _: PlaceInput) -> Verdict<()> {
        cx.may_repeat()
    }

    async fn undo(&self, _: &StepContext, input: PlaceInput, _: Option<()>) -> Result<(), Fault> {
        let undone = self.blocking(input, REMOVING, |places, input| {
            remove(places, input).map_err(|e| {
                let object = input.folder.display().to_string();
                place_fault(&e, codes::CANNOT_REMOVE_FILE, REMOVING, &object)
            })
        });
        undone.await.map_err(|fault| fault.class(Class::Transient))
    }
}

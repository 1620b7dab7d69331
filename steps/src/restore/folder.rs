//! `restore-folder`: the folders that the new domain's images go to.
//!
//! Which of them are missing was seen when the plan was made, so undo knows without any note which it may remove, if
//! they are empty. Unlike a backup's folder these can be traversed by others (0711): the hypervisor runs guests as
//! another user, who must reach the images. The images themselves stay private; libvirt gives them to that user.

use std::path::PathBuf;

use async_trait::async_trait;
use rustix::fs::Mode;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use crate::codes;
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
}

impl RestoreFolder {
    async fn blocking(
        &self,
        input: PlaceInput,
        code: Code,
        doing: &'static str,
        work: impl FnOnce(&Places, &PlaceInput) -> Result<(), RootError> + Send + 'static,
    ) -> Result<(), Fault> {
        let places = self.0.clone();
        let object = input.folder.display().to_string();
        match tokio::task::spawn_blocking(move || work(&places, &input)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(place_fault(&e, code, doing, &object)),
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
        self.blocking(input, codes::CANNOT_CREATE_DIRECTORY, "make the folder", |places, input| {
            places.roots.make_folder(&input.folder)?;
            for path in &input.missing {
                let folder = places.roots.open_folder(path)?;
                let mode = Mode::RWXU | Mode::XGRP | Mode::XOTH;
                rustix::fs::fchmod(&folder, mode)
                    .map_err(|e| RootError::from_errno("open up", path.clone(), e))?;
                folder.sync()?;
            }
            Ok(())
        })
        .await
    }

    /// Making what is there already does no harm, so it is simply done again.
    async fn probe(&self, cx: &StepContext, _: PlaceInput) -> Verdict<()> {
        if cx.still_running { Verdict::InFlight("it has not returned".to_owned()) } else { Verdict::NotDone }
    }

    async fn undo(&self, _: &StepContext, input: PlaceInput, _: Option<()>) -> Result<(), Fault> {
        let undone = self.blocking(input, codes::CANNOT_REMOVE_FILE, "remove the folder", |places, input| {
            for path in input.missing.iter().rev() {
                let (Some(above), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str()))
                else {
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
        });
        undone.await.map_err(|fault| fault.class(Class::Transient))
    }
}

//! `restore-image`: one image file of the backup becomes one of the new domain.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, Verdict};

use super::fetch::{Fetch, Head, Restored, Wanted};
use super::place::Place;
use crate::image::chain::Neighbour;
use crate::image::qcow2::Format;
use crate::image::rights::Wish;
use crate::image::root::Component;
use crate::snapshot::Places;

/// Restores an image.
#[derive(Debug)]
pub struct RestoreImage(pub Places);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInput {
    /// The file of the backup.
    pub wanted: Wanted,
    /// Its format.
    pub format: Format,
    /// Size of the disk that it shows, in bytes.
    pub virtual_size: u64,
    /// The folder that it goes to.
    pub folder: PathBuf,
    /// That is the folder of an image of the domain's own; it need not lie below a root.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
    /// Its name there.
    pub name: Component,
    /// The image in the same folder that it is to stand on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Neighbour>,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
    /// What it is given before it gets its name.
    #[serde(default, skip_serializing_if = "Wish::is_empty")]
    pub rights: Wish,
}

impl ImageInput {
    /// Where it goes.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join(self.name.as_str())
    }
}

impl RestoreImage {
    fn fetch(&self, input: ImageInput) -> Fetch {
        let ImageInput { wanted, format, virtual_size, folder, own, name, backing, bandwidth, rights } =
            input;
        let head = Head::Image { format, virtual_size, backing };
        let (places, source) = (self.0.clone(), wanted.name.clone());
        let place = Place { places, folder, own, name: Some(name), source, rights };
        Fetch { wanted, place, head, bandwidth }
    }
}

#[async_trait]
impl Step for RestoreImage {
    const KIND: StepKind = StepKind::new("restore-image", 1);
    type Input = ImageInput;
    type Output = Restored;

    async fn run(&self, cx: &StepContext, input: ImageInput) -> Result<Restored, Fault> {
        self.fetch(input).run(cx).await
    }

    async fn probe(&self, cx: &StepContext, input: ImageInput) -> Verdict<Restored> {
        self.fetch(input).probe(cx).await
    }

    async fn undo(&self, cx: &StepContext, input: ImageInput, output: Option<Restored>) -> Result<(), Fault> {
        self.fetch(input).undo(cx, output).await
    }
}

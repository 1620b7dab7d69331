//! `fetch-image`: one disk of the backup becomes an image of the new domain; or its firmware variables, which are a stream,
//! become the file beside it.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, Verdict};

use super::fetch::{Fetch, Fetched, Wanted};
use super::reader::Readers;
use crate::image::qcow2::Format;
use crate::image::rights::Wish;
use crate::image::root::Component;
use crate::restore::place::Place;
use crate::snapshot::Places;

/// Fetches a disk, or a stream that becomes a file.
#[derive(Debug)]
pub struct FetchImage {
    pub(super) places: Places,
    pub(super) readers: Readers,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchInput {
    /// What is fetched.
    pub wanted: Wanted,
    /// The folder that it goes to.
    pub folder: PathBuf,
    /// Its name there.
    pub name: Component,
    /// The format of the file. What is no disk is written as it is, which is called raw.
    pub format: Format,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
    /// What it is given before it gets its name.
    #[serde(default, skip_serializing_if = "Wish::is_empty")]
    pub rights: Wish,
}

impl FetchInput {
    /// Where it goes.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join(self.name.as_str())
    }
}

impl FetchImage {
    fn fetch(&self, input: FetchInput) -> Fetch {
        let FetchInput { wanted, folder, name, format, bandwidth, rights } = input;
        let places = self.places.clone();
        let place = Place { places, folder, own: false, name: Some(name.clone()), source: name, rights };
        Fetch { wanted, place, format, bandwidth }
    }
}

#[async_trait]
impl Step for FetchImage {
    const KIND: StepKind = StepKind::new("fetch-image", 1);
    type Input = FetchInput;
    type Output = Fetched;

    async fn run(&self, cx: &StepContext, input: FetchInput) -> Result<Fetched, Fault> {
        self.fetch(input).run(cx, &self.readers).await
    }

    async fn probe(&self, cx: &StepContext, input: FetchInput) -> Verdict<Fetched> {
        self.fetch(input).probe(cx).await
    }

    async fn undo(&self, cx: &StepContext, input: FetchInput, output: Option<Fetched>) -> Result<(), Fault> {
        self.fetch(input).undo(cx, output).await
    }
}

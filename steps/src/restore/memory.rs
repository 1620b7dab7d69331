//! `restore-memory`: the memory image, copied under the new identity.
//!
//! libvirt refuses to restore a state under another name or UUID. It takes both from the definition that stands in the
//! image's header, so the header of the *copy* is another one; the stream behind it is copied unchanged. The backup's
//! own image is never written to.
//!
//! The copy lives only until the guest has its memory back: it is worth nothing afterwards, and dangerous, because the
//! disks have moved on. It keeps the name that marks it as this job's.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, Verdict};

use super::fetch::{Fetch, Head, Restored, Wanted};
use super::identity::{NewDomain, rewrite};
use super::place::Place;
use crate::codes;
use crate::hypervisor::Trouble;
use crate::image::rights::Wish;
use crate::snapshot::copy::place_fault;
use crate::snapshot::{Places, World};

/// Restores a memory image.
#[derive(Debug)]
pub struct RestoreMemory {
    /// The world.
    pub world: World,
    /// Where may be read and written.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryImageInput {
    /// The file of the backup.
    pub wanted: Wanted,
    /// The folder that the copy goes to.
    pub folder: PathBuf,
    /// That is the folder of an image of the domain's own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
    /// The new domain.
    pub new: NewDomain,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// What a restore with memory says when memory cannot be used.
pub(crate) const GO_COLD: &str = "Restore with `--cold`: the disks are complete without the memory";

impl RestoreMemory {
    fn fetch(&self, input: &MemoryImageInput, head: Vec<u8>) -> Fetch {
        let place = Place {
            places: self.places.clone(),
            folder: input.folder.clone(),
            own: input.own,
            name: None,
            source: input.wanted.name.clone(),
            rights: Wish::default(),
        };
        let (wanted, bandwidth) = (input.wanted.clone(), input.bandwidth);
        Fetch { wanted, place, head: Head::Bytes(head), bandwidth }
    }

    /// The beginning of the copy.
    async fn head(&self, input: &MemoryImageInput) -> Result<Vec<u8>, Fault> {
        let doing = "read the memory image";
        let object = input.wanted.backup.join(input.wanted.name.as_str());
        let shown = object.display().to_string();
        // The hypervisor takes a path; opening the folder resolves it and refuses one that leads elsewhere.
        let backup = self.places.open(&input.wanted.backup, input.wanted.outside);
        let backup = backup.map_err(|e| place_fault(&e, codes::CANNOT_READ_STATE_FILE, doing, &shown))?;
        let path = backup.path_of(&input.wanted.name);
        let hypervisor = &self.world.hypervisor;
        let fault = |e: crate::hypervisor::HvError| {
            let code = if e.trouble == Trouble::Unsupported {
                codes::MEMORY_FORMAT_UNKNOWN
            } else {
                codes::CANNOT_READ_STATE_FILE
            };
            let mut fault = e.fault(code, doing, shown.clone()).remedy(GO_COLD);
            fault.code = code;
            fault
        };
        let stored = hypervisor.memory_image_definition(&path).await.map_err(fault)?;
        let (xml, _) = rewrite(&*self.world.hypervisor, &stored, &input.new)?;
        hypervisor.memory_image_head(&path, &xml).await.map_err(fault)
    }
}

#[async_trait]
impl Step for RestoreMemory {
    const KIND: StepKind = StepKind::new("restore-memory", 1);
    type Input = MemoryImageInput;
    type Output = Restored;

    async fn run(&self, cx: &StepContext, input: MemoryImageInput) -> Result<Restored, Fault> {
        let head = self.head(&input).await?;
        self.fetch(&input, head).run(cx).await
    }

    async fn probe(&self, cx: &StepContext, input: MemoryImageInput) -> Verdict<Restored> {
        self.fetch(&input, Vec::new()).probe(cx).await
    }

    async fn undo(
        &self,
        cx: &StepContext,
        input: MemoryImageInput,
        output: Option<Restored>,
    ) -> Result<(), Fault> {
        self.fetch(&input, Vec::new()).undo(cx, output).await
    }
}

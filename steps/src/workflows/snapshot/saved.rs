//! The plan's part for a domain that is off with its memory saved by libvirt.

use vmkeep_workflow::{Code, Fault, Millis, StepSpec};

use super::check::Choice;
use super::plan::{Builder, Common, TAKE};
use crate::codes;
use crate::image::chain::{self, FileToCopy};
use crate::image::qcow2::Format;
use crate::manifest::folder;
use crate::recipe::step;
use crate::snapshot::saved::{SavedInput, TakeSaved};

impl Builder<'_> {
    /// Nothing is put under a saved domain; see the step.
    pub(super) fn take_saved(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let Some(image) = &common.saved else { return Ok(()) };
        let of = SavedInput {
            domain: common.domain.clone(),
            disks: common.disks.clone(),
            image: image.source.clone(),
            memory: common.with_saved.then(|| common.folder.path().join(folder::MEMORY)),
        };
        steps.push(
            step::<TakeSaved>(TAKE, "see that the saved domain stands still", &of)?
                .after("prepare")
                .deadline(Millis::secs(300)),
        );
        Ok(())
    }

    /// libvirt's image of the memory as a file to copy.
    pub(super) async fn saved(&self, choice: &Choice) -> Result<Option<FileToCopy>, Fault> {
        let Some(path) = choice.saved.clone() else { return Ok(None) };
        let object = path.display().to_string();
        let read = crate::blocking::run(move || chain::Element::read(&path, Format::Raw)).await;
        let doing = "look at libvirt's image of the memory";
        let element = read
            .map_err(|e| Fault::permanent(Code::UNDEFINED, doing, object.clone(), e))?
            .map_err(|e| Fault::permanent(codes::CANNOT_READ_STATE_FILE, doing, object, e))?;
        Ok(Some(FileToCopy {
            source: element.path,
            format: element.format,
            identity: element.identity,
            name: folder::fixed(folder::MEMORY),
            backing: None,
            virtual_size: element.virtual_size,
            data_bytes: element.data_bytes,
            rights: None,
        }))
    }
}

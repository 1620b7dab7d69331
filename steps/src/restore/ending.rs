//! What any restore to a new domain has: the folders before its files, the domain after them, and what its owner is told.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{Fault, Millis, StepName, StepSpec};

use super::define::{DefineDomain, DefineInput};
use super::folder::{PlaceInput, RestoreFolder};
use super::identity::{NewDomain, Original};
use super::options::Then;
use super::resume::{ResumeDomain, ResumeInput};
use super::settle::{SettleDomain, SettleInput};
use super::start::{StartDomain, StartInput};
use crate::image::root::Component;
use crate::recipe::{PATIENT_LOOK, PATIENTLY, patient, step};

/// What is said of a guest whose file systems were not frozen.
pub(super) const POWER_CUT: &str = "The guest boots as after a power cut.";

pub(super) const NO_VARIABLES: &str =
    "Its firmware's variables are not in the backup: it begins with those of the template.";
pub(super) const NO_TPM: &str = "Its TPM's state is not in the backup: it gets a new, empty TPM.";
pub(super) const SAME_TPM: &str = "Its TPM holds the same keys as the original's: whoever must be able to tell them apart has to clear one.";

pub(super) fn whose_disks(old: &str, at: Timestamp) -> String {
    format!(
        "The disks are those of {old} at {at}: host name, fixed addresses, machine id and keys are the original's."
    )
}

/// What is said of cables that are out.
pub(super) fn links(new: &NewDomain, network_cards: usize) -> Option<String> {
    (new.links_down && network_cards > 0).then(|| {
        format!(
            "Its network links are down, because the original is still defined here. To put a cable in: \
             virsh domif-setlink {} ADDRESS up",
            new.domain.id
        )
    })
}

/// What is said of an original that starts with its host.
pub(super) fn autostart(original: bool, asked: bool, new: &NewDomain) -> Option<String> {
    let id = new.domain.id;
    (original && !asked)
        .then(|| format!("The original starts with the host, this one does not: virsh autostart {id}"))
}

/// The step of a folder.
pub(super) fn folder(places: &[PlaceInput], folder: &Path) -> Option<StepName> {
    let at = places.iter().position(|place| place.folder == folder)?;
    Some(format!("folder/{at}").into())
}

/// A step for each folder. The facts are asserted once, before the first is touched.
pub(super) fn folders(places: &[PlaceInput], after: Option<&StepName>) -> Result<Vec<StepSpec>, Fault> {
    let mut steps = Vec::new();
    for (at, place) in places.iter().enumerate() {
        let title = format!("make sure of {}", place.folder.display());
        let name: StepName = format!("folder/{at}").into();
        let made = step::<RestoreFolder>(name, title, place)?.undoable().deadline(Millis::secs(60));
        steps.push(match at {
            0 => made.after_all(after.cloned()).check_facts(),
            _ => made.after("folder/0"),
        });
    }
    Ok(steps)
}

/// The new domain, once its files are there.
pub(super) struct Ending<'a> {
    pub(super) definition: Original,
    pub(super) new: &'a NewDomain,
    /// The steps that restored its images from files.
    pub(super) images: Vec<StepName>,
    /// Files that its QEMU may have and that no such step has restored.
    pub(super) others: Vec<PathBuf>,
    /// All files that its QEMU may have.
    pub(super) files: Vec<PathBuf>,
    /// The copy of the memory image: its folder, and the name of the file in the backup.
    pub(super) memory: Option<(PathBuf, Component)>,
    pub(super) then: Then,
    pub(super) autostart: bool,
    pub(super) notes: &'a [String],
    pub(super) watch_ms: u64,
}

impl Ending<'_> {
    /// Adds the steps, after all that there are; says which is the point of no return, if there is one.
    pub(super) fn add(self, steps: &mut Vec<StepSpec>) -> Result<Option<StepName>, Fault> {
        let (new, name) = (self.new, self.new.domain.name.as_str());
        let with_memory = self.memory.is_some();
        let runs = self.then == Then::Running;
        let before: Vec<StepName> = steps.iter().map(|step| step.name.clone()).collect();
        let define = DefineInput { definition: self.definition, new: new.clone() };
        steps.push(
            step::<DefineDomain>("define", format!("define {name}"), &define)?
                .after_all(before)
                .undo(patient())
                .deadline(Millis::secs(180)),
        );
        let mut last: StepName = "define".into();
        if self.then != Then::Default {
            let start = StartInput {
                new: new.clone(),
                images: self.images,
                files: self.others,
                memory: with_memory.then(|| "memory".into()),
            };
            let title = match with_memory {
                true => format!("give {name} its memory, paused"),
                false => format!("start {name}, paused"),
            };
            steps.push(
                step::<StartDomain>("start", title, &start)?
                    .after(last)
                    .undo(patient())
                    .retry(Retry { attempts: 2, ..Retry::default() })
                    .probing(PATIENT_LOOK),
            );
            last = "start".into();
        }
        if runs {
            let resume = ResumeInput { new: new.clone(), images: self.files, with_memory };
            steps.push(
                step::<ResumeDomain>("resume", format!("let {name} run"), &resume)?
                    .after(last)
                    .probing(PATIENT_LOOK)
                    .deadline(Millis::secs(180)),
            );
            last = "resume".into();
        }
        let settle = SettleInput {
            new: new.clone(),
            memory: self.memory,
            defined: "define".into(),
            resumed: runs.then(|| "resume".into()),
            autostart: self.autostart,
            notes: self.notes.to_vec(),
            watch_ms: self.watch_ms,
        };
        steps.push(
            step::<SettleDomain>("settle", format!("see whether {name} stands"), &settle)?
                .after(last)
                .retry(PATIENTLY),
        );
        Ok(runs.then(|| "resume".into()))
    }
}

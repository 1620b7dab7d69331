//! What the last step of any restore does with a guest that was let run: it is watched for some seconds, and the copy of
//! its memory image is removed, which together with disks that have moved on would be dangerous.

use std::path::PathBuf;
use std::time::Duration;

use vmkeep_workflow::{Class, Code, Fault, StepContext};

use super::place::aside;
use crate::codes;
use crate::hypervisor::{DomainRef, Hypervisor, PauseReason, RunState};
use crate::image::root::{Component, RootError};
use crate::snapshot::Places;
use crate::snapshot::copy::place_fault;

/// How often a running guest is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Watches it for so long; its state in the end, and whether its agent, if it has one, has answered.
pub(crate) async fn watch(
    hypervisor: &dyn Hypervisor,
    cx: &StepContext,
    domain: &DomainRef,
    agent: bool,
    mut left: Duration,
) -> Result<(RunState, bool), Fault> {
    let (id, name) = (&domain.id, domain.name.as_str());
    let mut answered = false;
    loop {
        let state = hypervisor.state(id).await;
        let state = state.map_err(|e| e.fault(codes::CANNOT_START_MACHINE, "look at the domain", name))?;
        if state == RunState::Paused(PauseReason::IoError) {
            let cause = "QEMU has stopped it because a disk could not be written";
            return Err(Fault::permanent(codes::NOT_ENOUGH_DISK_SPACE, "let the guest run", name, cause)
                .remedy(format!("Make room beside its images, `virsh resume {name}`, then settle the job")));
        }
        if left.is_zero() || cx.stopping() || state == RunState::Off {
            return Ok((state, answered));
        }
        if agent && !answered && state == RunState::Running {
            let ping = hypervisor.freeze_state(id);
            answered = tokio::time::timeout(left, ping).await.is_ok_and(|answer| answer.is_ok());
        }
        tokio::time::sleep(LOOK).await;
        cx.progress.alive();
        left = left.saturating_sub(LOOK);
    }
}

/// Removes the copy of a memory image from its folder, which may be one of the domain's own. `name` is the file's name in
/// the backup.
pub(crate) async fn remove_memory(
    places: &Places,
    cx: &StepContext,
    folder: PathBuf,
    own: bool,
    name: Component,
) -> Result<(), Fault> {
    let (places, job) = (places.clone(), cx.job);
    let object = folder.display().to_string();
    let doing = "remove the copy of the memory image";
    let gone = crate::blocking::run(move || {
        let folder = match places.open(&folder, own) {
            Err(RootError::Missing { .. }) => return Ok(()),
            folder => folder?,
        };
        folder.remove_file(&aside(job, name.as_str()))?;
        folder.sync()
    });
    match gone.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => Err(place_fault(&e, codes::CANNOT_REMOVE_FILE, doing, &object).class(Class::Transient)),
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, object, e)),
    }
}

/// What the owner of a guest that was let run must know.
pub(crate) fn since(state: RunState, cold: bool) -> Vec<String> {
    let mut notes = Vec::new();
    if cold {
        notes.push(
            "Its QEMU ended right after it had been let go; it was started again without its memory, as after a \
             power cut."
                .to_owned(),
        );
    }
    if state == RunState::Off {
        notes.push("It has shut down or crashed since.".to_owned());
    }
    notes
}

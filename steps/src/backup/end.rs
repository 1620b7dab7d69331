//! `end-pull`: the guest writes to its images alone again.
//!
//! A guest-safety act: as long as a pull lasts, a scratch file that cannot grow stops the guest, and nobody can save or migrate
//! it. Whose pull it is that is seen tell the names of the scratch files; somebody else's is never ended. libvirt's call ends
//! libvirt's job. What is left in QEMU then, after libvirtd died in the middle, is ended through the monitor. Last go the files,
//! when no QEMU has them open, and a guest that QEMU has stopped meanwhile is let run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, Verdict};

use crate::codes;
use crate::hypervisor::{
    DomainId, DomainRef, HvError, HvResult, InHand, Layer, PauseReason, Qemu, RunState, Trouble,
};
use crate::snapshot::disk::scratch_job;
use crate::snapshot::{World, cannot_look, fence, on_the_way_back};

/// Ends a pull.
#[derive(Debug)]
pub struct EndPull(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndInput {
    /// The domain.
    pub domain: DomainRef,
    /// The scratch files.
    pub scratch: Vec<PathBuf>,
}

/// What it leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndOutput {
    /// The guest had been stopped by QEMU, and was let run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resumed: bool,
}

const DOING: &str = "end the backup job";
/// How long libvirt may take to end a job that was aborted, and how often it is looked.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(50);

/// How long a greeting by QEMU may keep the end of a pull: it is a matter of milliseconds, or QEMU does not answer.
const GREETING: Duration = Duration::from_secs(10);

/// Keeps the domain's exports from greeting anybody of this process as long as this is held.
async fn nobody_is_greeted(world: &World, domain: &DomainId) -> HvResult<Option<InHand>> {
    let Some(greetings) = world.hypervisor.greetings() else { return Ok(None) };
    match tokio::time::timeout(GREETING, greetings.take(domain)).await {
        Ok(hand) => Ok(Some(hand)),
        Err(_) => {
            let what = "QEMU greets a client of its export, and would not survive the end of the backup job meanwhile";
            Err(HvError::new(Trouble::TimedOut, what))
        }
    }
}

/// Ends the pull with these scratch files, if it is there; whether the guest had to be let run.
///
/// # Errors
/// When the hypervisor did not do it, or did not answer. To be repeated.
pub async fn end(world: &World, domain: &DomainId, scratch: &[PathBuf]) -> HvResult<bool> {
    let hypervisor = &world.hypervisor;
    let left_at_first = left(world, domain, scratch).await?;
    // Until it is gone: libvirt stops QEMU's server in its own time.
    let _nobody = match left_at_first {
        Left::Nothing => None,
        Left::Job | Left::InQemu => nobody_is_greeted(world, domain).await?,
    };
    match left_at_first {
        Left::Nothing => {}
        Left::Job => {
            hypervisor.abort_domain_job(domain).await?;
            // libvirt ends it in its own time. Only what it has lost, or does not end, is ended in QEMU: by then somebody else may
            // have begun a backup.
            let end = Instant::now() + ENDS_WITHIN;
            loop {
                match left(world, domain, scratch).await? {
                    Left::Nothing => break,
                    Left::Job if Instant::now() < end => tokio::time::sleep(LOOK).await,
                    Left::Job | Left::InQemu => {
                        hypervisor.pull_clean(domain, scratch).await?;
                        break;
                    }
                }
            }
        }
        Left::InQemu => hypervisor.pull_clean(domain, scratch).await?,
    }
    let qemu = match hypervisor.qemu(domain).await {
        Err(e) if e.trouble == Trouble::NoSuchDomain => None,
        qemu => qemu?,
    };
    for file in scratch {
        if qemu.as_ref().is_some_and(|qemu| has_open(qemu, file)) {
            let what = format!("QEMU still has {} open", file.display());
            return Err(HvError::new(Trouble::Locked, what));
        }
        remove(world, file).await?;
    }
    let stopped = RunState::Paused(PauseReason::IoError);
    if qemu.is_none() || hypervisor.state(domain).await? != stopped {
        return Ok(false);
    }
    let _alone = world.in_hand(domain).await;
    if hypervisor.state(domain).await? != stopped {
        return Ok(false);
    }
    // Whose error it was cannot be told: the write that fails is the guest's own. If it is its disk's it stops again.
    hypervisor.resume(domain).await?;
    Ok(true)
}

/// Ends a pull of this program's on a guest that QEMU has stopped for an error of a disk, whoever's job it is of, and lets the
/// guest run; whether there was one.
///
/// # Errors
/// As [`end`].
pub async fn rescue(world: &World, domain: &DomainId) -> HvResult<bool> {
    if world.hypervisor.state(domain).await? != RunState::Paused(PauseReason::IoError) {
        return Ok(false);
    }
    let pulling = match world.hypervisor.pulling(domain).await {
        // A hypervisor without pulls.
        Err(e) if e.trouble == Trouble::Unsupported => return Ok(false),
        pulling => pulling?,
    };
    // libvirt may have lost the job, and QEMU goes on with it.
    let open = world.hypervisor.qemu(domain).await?.map(|qemu| qemu.open);
    let mut scratch: Vec<PathBuf> = pulling.scratch.into_iter().chain(open).flatten().collect();
    scratch.retain(|file| scratch_job(file).is_some());
    scratch.sort_unstable();
    scratch.dedup();
    if scratch.is_empty() { Ok(false) } else { end(world, domain, &scratch).await }
}

/// Whether nothing is left of the pull with these scratch files but the files.
///
/// # Errors
/// When the hypervisor did not answer.
pub(super) async fn is_gone(world: &World, domain: &DomainId, scratch: &[PathBuf]) -> HvResult<bool> {
    Ok(matches!(left(world, domain, scratch).await?, Left::Nothing))
}

/// What is left of a pull.
enum Left {
    Nothing,
    /// libvirt's job.
    Job,
    /// Something in QEMU that libvirt knows nothing of.
    InQemu,
}

fn has_open(qemu: &Qemu, file: &Path) -> bool {
    qemu.open.iter().any(|open| open == file)
}

async fn left(world: &World, domain: &DomainId, scratch: &[PathBuf]) -> HvResult<Left> {
    let hypervisor = &world.hypervisor;
    let pulling = match hypervisor.pulling(domain).await {
        Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(Left::Nothing),
        pulling => pulling?,
    };
    if pulling.is_of(scratch.iter()) {
        return Ok(Left::Job);
    }
    let Some(qemu) = hypervisor.qemu(domain).await? else { return Ok(Left::Nothing) };
    let ours = scratch.iter().any(|file| has_open(&qemu, file));
    Ok(if ours && pulling.scratch.is_none() { Left::InQemu } else { Left::Nothing })
}

/// Removes a scratch file, if it is there.
async fn remove(world: &World, file: &Path) -> HvResult<()> {
    let layer = Layer { path: file.to_owned(), format: "qcow2".to_owned() };
    match world.storage.inspect(&layer).await {
        Ok(Some(image)) => world.storage.remove(file, image.id).await.map(drop),
        Ok(None) => Ok(()),
        // It was never finished: libvirt makes it empty first.
        Err(e) if e.trouble != Trouble::Io => {
            let path = file.to_owned();
            let removed = crate::blocking::remove(path).await;
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(HvError::new(Trouble::Io, format!("cannot remove {}: {error}", file.display())))
                }
                _ => Ok(()),
            }
        }
        Err(e) => Err(e),
    }
}

#[async_trait]
impl Step for EndPull {
    const KIND: StepKind = StepKind::new("end-pull", 1);
    type Input = EndInput;
    type Output = EndOutput;

    async fn run(&self, _: &StepContext, input: EndInput) -> Result<EndOutput, Fault> {
        match end(&self.0, &input.domain.id, &input.scratch).await {
            Ok(resumed) => Ok(EndOutput { resumed }),
            Err(e) if e.trouble == Trouble::NoSuchDomain => Ok(EndOutput::default()),
            Err(e) => Err(on_the_way_back(e, codes::CANNOT_END_PULL, DOING, &input.domain.name)),
        }
    }

    /// An abort of a client that is gone would end the job of whoever comes next: so nothing of ours, *and* fenced.
    async fn probe(&self, cx: &StepContext, input: EndInput) -> Verdict<EndOutput> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        let stopped = RunState::Paused(PauseReason::IoError);
        match left(&self.0, &input.domain.id, &input.scratch).await {
            Ok(Left::Nothing) => {}
            Ok(Left::Job | Left::InQemu) => return Verdict::NotDone,
            Err(e) => return cannot_look(&e),
        }
        match self.0.hypervisor.state(&input.domain.id).await {
            Ok(state) if state == stopped => return Verdict::NotDone,
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Verdict::Done(EndOutput::default()),
            Err(e) => return cannot_look(&e),
            Ok(_) => {}
        }
        if input.scratch.iter().any(|file| file.symlink_metadata().is_ok()) {
            return Verdict::NotDone;
        }
        match fence::fence(&*self.0.hypervisor, &input.domain.id).await {
            Ok(fence::Fence::Closed) => Verdict::Done(EndOutput::default()),
            Ok(fence::Fence::Open(what)) => Verdict::InFlight(what),
            Err(e) => cannot_look(&e),
        }
    }
}

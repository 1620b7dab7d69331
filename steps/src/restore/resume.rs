//! `resume-domain`: the new guest's first instruction. The point of no return.
//!
//! From the moment at which this is *started* the memory image is never again combined with these disks. A note is
//! stored right before the call. Without it the guest has never run, and a QEMU that is gone means that it could not
//! live with this memory: the job goes back. With it, a QEMU that is gone means that the guest ran, for however
//! short a time: the disks are the truth, and it is started cold.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::identity::NewDomain;
use super::memory::GO_COLD;
use super::start::{pull_links, strange_files};
use crate::codes;
use crate::hypervisor::{HvError, RunState, Trouble};
use crate::snapshot::{World, cannot_look, fence};

/// Lets the guest run.
#[derive(Debug)]
pub struct ResumeDomain(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeInput {
    /// The new domain.
    pub new: NewDomain,
    /// All files that its QEMU may have.
    pub images: Vec<std::path::PathBuf>,
    /// Whether it has its memory.
    pub with_memory: bool,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeOutput {
    /// Its QEMU ended after it had been let go, and it was started without its memory.
    pub cold: bool,
}

const DOING: &str = "let the guest run";

/// The step of an exchange that starts the machine, and says if somebody else has (see [`crate::inplace::begin`]).
const BEGIN: &str = "begin";

impl ResumeDomain {
    /// It has run: the note says so, or somebody else had started it already when an exchange was about to.
    fn noted(cx: &StepContext) -> bool {
        let begun = cx.outputs.get(&BEGIN.into());
        let by_others = begun.is_some_and(|begun| begun.get("by_others") == Some(&json!(true)));
        by_others || cx.resume.is_some() || cx.progress.saved().is_some()
    }

    async fn go(&self, cx: &StepContext, input: &ResumeInput) -> Result<(), Fault> {
        let (id, name) = (&input.new.domain.id, input.new.domain.name.as_str());
        let seen = self.0.observe(id, codes::CANNOT_START_MACHINE).await?;
        if let Some(what) = seen.qemu.as_ref().and_then(|q| strange_files(q, &input.new, &input.images)) {
            let fault = Fault::permanent(Code::EFFECT_DIVERGED, DOING, name, what);
            return Err(fault.class(Class::Fatal));
        }
        pull_links(&self.0, &input.new, input.with_memory).await?;
        cx.progress.save(&json!({ "resumed": true })).await?;
        self.0
            .hypervisor
            .resume(id)
            .await
            .map_err(|e| e.fault(codes::CANNOT_START_MACHINE, DOING, name).in_doubt())
    }

    async fn cold(&self, input: &ResumeInput) -> Result<(), Fault> {
        let (id, name) = (&input.new.domain.id, input.new.domain.name.as_str());
        let fault =
            |e: HvError| e.fault(codes::CANNOT_START_MACHINE, "start the guest without its memory", name);
        self.0.hypervisor.start(id, false).await.map_err(fault)
    }
}

#[async_trait]
impl Step for ResumeDomain {
    const KIND: StepKind = StepKind::new("resume-domain", 1);
    type Input = ResumeInput;
    type Output = ResumeOutput;

    async fn run(&self, cx: &StepContext, input: ResumeInput) -> Result<ResumeOutput, Fault> {
        let (id, name) = (&input.new.domain.id, input.new.domain.name.as_str());
        let state = self.0.hypervisor.state(id).await;
        let state = state.map_err(|e| e.fault(codes::CANNOT_START_MACHINE, DOING, name))?;
        match state {
            RunState::Running => Ok(ResumeOutput { cold: false }),
            RunState::Off if Self::noted(cx) => {
                self.cold(&input).await?;
                Ok(ResumeOutput { cold: true })
            }
            RunState::Off => {
                let (code, remedy) = if input.with_memory {
                    (codes::CANNOT_RESTORE_MACHINE, GO_COLD)
                } else {
                    (codes::CANNOT_START_MACHINE, "See the domain's log of QEMU")
                };
                let cause = "its QEMU ended before it was let go";
                Err(Fault::permanent(code, DOING, name, cause).remedy(remedy))
            }
            RunState::Paused(_) | RunState::Other => {
                self.go(cx, &input).await?;
                Ok(ResumeOutput { cold: false })
            }
        }
    }

    async fn probe(&self, cx: &StepContext, input: ResumeInput) -> Verdict<ResumeOutput> {
        let id = &input.new.domain.id;
        if cx.still_running {
            return Verdict::InFlight("the call has not returned".to_owned());
        }
        let noted = Self::noted(cx);
        match self.0.hypervisor.state(id).await {
            Ok(RunState::Running) => Verdict::Done(ResumeOutput { cold: false }),
            // It ran, for however short a time: on, and without the memory.
            Ok(RunState::Off) if noted => Verdict::Partial(json!({ "cold": true })),
            Ok(RunState::Paused(_) | RunState::Other) if noted => {
                // Paused by now is not proof that it never ran.
                match fence::fence(&*self.0.hypervisor, id).await {
                    Ok(fence::Fence::Closed) => Verdict::Partial(json!({ "again": true })),
                    Ok(fence::Fence::Open(what)) => Verdict::InFlight(what),
                    Err(e) => cannot_look(&e),
                }
            }
            Ok(_) => fence::not_done(&*self.0.hypervisor, id, false).await,
            Err(e) if e.trouble == Trouble::NoSuchDomain => {
                Verdict::Diverged("somebody has removed the domain".to_owned())
            }
            Err(e) => cannot_look(&e),
        }
    }
}

//! `rest-domain`: the guest comes to rest, and its QEMU ends.
//!
//! By its own doing (it is asked to shut down, and has a deadline), by a save of its memory, or, only if the caller
//! allowed it, by pulling the plug. What the domain did before is noted before anything is asked of it, because undo has
//! to bring it back to that: running if it ran, on its own images, from its saved memory if that still fits them.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, Verdict};

use super::kept::{MEMORY, Was, is_whole, moved_on};
use crate::codes;
use crate::hypervisor::{DomainRef, HvError, RunState, Trouble};
use crate::snapshot::{World, cannot_look, fence, on_the_way_back};

/// Brings a guest to rest.
#[derive(Debug)]
pub struct RestDomain(pub World);

/// How a guest may be brought to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rest {
    /// How many seconds a guest has that was asked to shut down.
    pub seconds: u64,
    /// Whether the plug may be pulled then; also of a guest that is paused and cannot obey.
    #[serde(default)]
    pub destroy: bool,
    /// Its memory is saved instead, and kept aside with it.
    #[serde(default)]
    pub save: bool,
}

impl Default for Rest {
    fn default() -> Self {
        Self { seconds: 180, destroy: false, save: false }
    }
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestInput {
    /// The domain.
    pub domain: DomainRef,
    /// How.
    pub how: Rest,
    /// The folder in which the machine is kept.
    pub kept: PathBuf,
    /// The images of its disks.
    pub disks: Vec<PathBuf>,
    /// What it did when the plan was made. Undo goes by this if the step did not come to an end.
    pub was: Was,
}

/// What it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestOutput {
    /// What the domain did before.
    pub was: Was,
    /// Its memory was saved.
    pub memory: bool,
}

/// The note before anything is asked of the guest.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Note {
    was: Was,
}

const DOING: &str = "bring the domain to rest";
/// How often the domain is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How long undo waits for a guest that was asked to shut down and has not.
const LATE: Duration = Duration::from_secs(5);

fn noted(cx: &StepContext) -> Option<Was> {
    cx.progress.saved().and_then(|note| Note::deserialize(&note).ok()).map(|note| note.was)
}

impl RestInput {
    fn memory(&self) -> PathBuf {
        self.kept.join(MEMORY)
    }

    fn output(&self, was: Was) -> RestOutput {
        RestOutput { was, memory: self.how.save && was != Was::Off && is_whole(&self.memory()) }
    }

    fn refused(&self, cause: &str) -> Fault {
        Fault::permanent(codes::CANNOT_BRING_TO_REST, DOING, &self.domain.name, cause).remedy(
            "Shut it down from within, or allow `--destroy` (as pulling the plug) or `--save-old` (its memory is kept)",
        )
    }
}

impl RestDomain {
    async fn state(&self, input: &RestInput) -> Result<RunState, Fault> {
        let state = self.0.hypervisor.state(&input.domain.id).await;
        state.map_err(|e| e.fault(codes::CANNOT_BRING_TO_REST, DOING, &input.domain.name))
    }

    /// Waits until it is off; whether it is.
    async fn goes_off(&self, cx: &StepContext, input: &RestInput, within: Duration) -> Result<bool, Fault> {
        let end = Instant::now() + within;
        loop {
            if self.state(input).await? == RunState::Off {
                return Ok(true);
            }
            if Instant::now() >= end || cx.stopping() {
                return Ok(false);
            }
            cx.progress.alive();
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn save(&self, input: &RestInput) -> Result<(), Fault> {
        let path = input.memory();
        let (doing, name) = ("save the memory of the old machine", input.domain.name.as_str());
        match crate::blocking::remove(path.clone()).await {
            // Of an attempt that was cut off: the guest runs, so it fits nothing.
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Fault::transient(codes::CANNOT_SAVE_MACHINE_STATE, doing, name, e)),
        }
        let saved = self.0.hypervisor.save_memory(&input.domain.id, &path).await;
        saved.map_err(|e| e.fault(codes::CANNOT_SAVE_MACHINE_STATE, doing, name))
    }

    async fn shut_down(&self, cx: &StepContext, input: &RestInput, was: Was) -> Result<(), Fault> {
        let (id, name) = (&input.domain.id, input.domain.name.as_str());
        let fault = |e: HvError| e.fault(codes::CANNOT_BRING_TO_REST, DOING, name);
        if was == Was::Paused {
            if !input.how.destroy {
                return Err(input.refused("it is paused, and so cannot shut down"));
            }
        } else {
            self.0.hypervisor.shutdown(id).await.map_err(fault)?;
            if self.goes_off(cx, input, Duration::from_secs(input.how.seconds)).await? {
                return Ok(());
            }
            if cx.stopping() {
                return Err(Fault::stopped(DOING, name));
            }
            if !input.how.destroy {
                return Err(input.refused("it was asked to shut down, and did not in time"));
            }
        }
        self.0.hypervisor.destroy(id).await.map_err(fault)
    }
}

#[async_trait]
impl Step for RestDomain {
    const KIND: StepKind = StepKind::new("rest-domain", 1);
    type Input = RestInput;
    type Output = RestOutput;

    async fn run(&self, cx: &StepContext, input: RestInput) -> Result<RestOutput, Fault> {
        let state = self.state(&input).await?;
        let was = noted(cx).unwrap_or_else(|| Was::of(state));
        if state != RunState::Off {
            cx.progress.save(&Note { was }).await?;
            if input.how.save {
                self.save(&input).await?;
            } else {
                self.shut_down(cx, &input, was).await?;
            }
            if self.state(&input).await.map_err(Fault::in_doubt)? != RunState::Off {
                let cause = "it is on again: somebody has started it";
                return Err(Fault::permanent(Code::FACTS_CHANGED, DOING, &input.domain.name, cause));
            }
        }
        Ok(input.output(was))
    }

    async fn probe(&self, cx: &StepContext, input: RestInput) -> Verdict<RestOutput> {
        let id = &input.domain.id;
        if let Some(verdict) = fence::under_way(&*self.0.hypervisor, id, cx.still_running).await {
            return verdict;
        }
        match self.0.hypervisor.state(id).await {
            Ok(RunState::Off) => match noted(cx) {
                Some(was) => Verdict::Done(input.output(was)),
                // Nothing was asked of it yet: it was off, or went off by itself.
                None => Verdict::NotDone,
            },
            Ok(_) => fence::not_done(&*self.0.hypervisor, id, false).await,
            Err(e) => cannot_look(&e),
        }
    }

    async fn undo(
        &self,
        cx: &StepContext,
        input: RestInput,
        output: Option<RestOutput>,
    ) -> Result<(), Fault> {
        let was = output.map_or(input.was, |output| output.was);
        if was == Was::Off {
            return Ok(());
        }
        let (id, name) = (&input.domain.id, input.domain.name.as_str());
        let doing = "start the old machine again";
        let fault = |e: HvError| on_the_way_back(e, codes::CANNOT_START_MACHINE, doing, name);
        match self.0.hypervisor.state(id).await {
            // It may yet obey: a guest that was asked to shut down may need a moment longer than it was given.
            Ok(state) if state != RunState::Off => {
                if input.how.save || !self.goes_off(cx, &input, LATE).await? {
                    return Ok(());
                }
            }
            Ok(_) => {}
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(()),
            Err(e) => return Err(fault(e)),
        }
        let (memory, disks) = (input.memory(), input.disks.clone());
        let usable = input.how.save && is_whole(&memory) && moved_on(&memory, &disks).is_none();
        if usable {
            let hypervisor = &self.0.hypervisor;
            let xml = hypervisor.memory_image_definition(&memory).await.map_err(fault)?;
            match hypervisor.start_from_memory(&memory, &xml, was == Was::Paused).await {
                Ok(()) => return Ok(()),
                Err(e) if e.in_doubt || e.is_transient() => return Err(fault(e)),
                // Better up without its memory than not at all.
                Err(e) => tracing::warn!(domain = name, error = %e, "the saved memory could not be loaded"),
            }
        }
        self.0.hypervisor.start(id, was == Was::Paused).await.map_err(fault)
    }

    async fn probe_undo(&self, cx: &StepContext, input: RestInput, _: Option<RestOutput>) -> Verdict<()> {
        // Starting what runs does nothing, so it may be repeated as soon as nothing is under way any more.
        fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await
    }
}

//! `take-snapshot`: disks, and memory if asked for, at one instant.
//!
//! libvirt does it in one call: memory is written while the guest runs; QEMU stops when the rest is small, the disks
//! move in one transaction, and the guest goes on. What this step adds:
//! - it looks first: an overlay that QEMU is already on is the effect of an earlier attempt if it is the same QEMU
//!   process, because within one process only that transaction moves it there. In another process the guest was
//!   started on the overlays, and no instant can be named for which memory and disks agree;
//! - it bounds memory in bytes and time, as the caller chose;
//! - it asks QEMU afterwards, and reads the memory file's header.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::disk::JobDisk;
use super::memory::{self, IfSlow, MemoryFile, MemoryLimits};
use super::stand::Stand;
use super::{World, cannot_look, fence, freeze, safety};
use crate::codes;
use crate::hypervisor::{
    DomainRef, Hold, HvError, Marker, Observation, PauseReason, RunState, Take, Trouble,
};
use crate::image::copy::Identity;

/// How often the progress of the memory is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Takes the snapshot.
#[derive(Debug)]
pub struct TakeSnapshot(pub World);

/// Memory that is to be part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryInput {
    /// Where it goes.
    pub file: PathBuf,
    /// How much it may take.
    pub limits: MemoryLimits,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeInput {
    /// The domain.
    pub domain: DomainRef,
    /// The store of this daemon.
    pub store: String,
    /// The QEMU process that the plan was made for.
    pub instance: String,
    /// The disks.
    pub disks: Vec<JobDisk>,
    /// The memory; nothing for disks only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryInput>,
    /// Why there is none although it was asked for: known when the job was planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_memory: Option<String>,
    /// The step that has frozen the guest's file systems for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<StepName>,
    /// No snapshot unless they are frozen at its instant.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub must_be_frozen: bool,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOutput {
    /// When it was seen to be done; the instant itself lies shortly before.
    pub at: Timestamp,
    /// The memory file, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<PathBuf>,
    /// Why there is none although one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_memory: Option<String>,
    /// The images that stand still from now on, as they are; nothing below them was ever written to.
    #[serde(default)]
    pub frozen: Vec<(PathBuf, Identity)>,
    /// Milliseconds for which this step stopped the guest on purpose.
    #[serde(default)]
    pub paused_ms: u64,
    /// The domain was off: nobody was writing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub off: bool,
    /// Why the file systems that were frozen for this may have been thawed by the instant itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thawed: Option<String>,
}

/// Where all disks of the job are.
pub(super) enum Where {
    Bases,
    Overlays,
    Off,
    Neither(String),
}

pub(super) fn whereabouts(seen: &Observation, disks: &[JobDisk]) -> Where {
    let (mut bases, mut overlays) = (0, 0);
    for disk in disks {
        match Stand::of(seen, disk) {
            Stand::Off => return Where::Off,
            Stand::OnBase { .. } => bases += 1,
            Stand::OnOverlay { .. } => overlays += 1,
            // All others tell: the snapshot takes every disk of the job, or none.
            Stand::Unplugged => {}
            Stand::Elsewhere(what) => return Where::Neither(format!("disk {}: {what}", disk.target)),
        }
    }
    match (bases, overlays) {
        (_, 0) => Where::Bases,
        (0, _) => Where::Overlays,
        _ => Where::Neither("QEMU writes some disks to their overlay and some to their base".to_owned()),
    }
}

/// Whether the guest stands still because this step made it.
fn held(seen: &Observation, input: &TakeInput) -> bool {
    matches!(seen.state, RunState::Paused(_))
        && seen.marker.as_ref().is_some_and(|m| m.store == input.store && m.hold == Some(Hold::Suspended))
}

fn same_process(seen: &Observation, input: &TakeInput) -> bool {
    seen.qemu.as_ref().is_some_and(|qemu| qemu.instance == input.instance)
}

#[async_trait]
impl Step for TakeSnapshot {
    const KIND: StepKind = StepKind::new("take-snapshot", 1);
    type Input = TakeInput;
    type Output = TakeOutput;

    async fn run(&self, cx: &StepContext, input: TakeInput) -> Result<TakeOutput, Fault> {
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_TAKE_SNAPSHOT).await?;
        if !same_process(&seen, &input) {
            return Err(restarted(&input));
        }
        if held(&seen, &input) {
            // Since an attempt that was cut off.
            safety::release(&self.0, &input.store, &input.domain.id)
                .await
                .map_err(|e| e.fault(codes::CANNOT_TAKE_SNAPSHOT, "resume the guest", &input.domain.name))?;
        }
        match whereabouts(&seen, &input.disks) {
            Where::Bases => {}
            Where::Overlays => {
                let output = self.taken(&input, 0, None).await?;
                return still_frozen(cx, &input, output, Some(CUT_OFF.to_owned()));
            }
            Where::Off => return Err(restarted(&input)),
            Where::Neither(what) => {
                return Err(Fault::permanent(
                    Code::EFFECT_DIVERGED,
                    "take the snapshot",
                    input.domain.name,
                    what,
                )
                .class(Class::Fatal));
            }
        }
        let Some(wanted) = &input.memory else {
            let output = self.disks_only(&input, None).await?;
            let thawed =
                freeze::thawed(&self.0, cx, &input.domain.id, &input.store, input.frozen.as_ref()).await;
            return still_frozen(cx, &input, output, thawed);
        };
        remove_torn(wanted).await?;
        // Looked at anew: a guest that was held by an earlier attempt is free by now.
        let state = self.0.hypervisor.state(&input.domain.id).await;
        let state = state.map_err(|e| call_fault(e, &input))?;
        if matches!(state, RunState::Paused(_)) {
            return self.without_memory_of_a_paused_guest(&input, wanted).await;
        }
        match self.with_memory(cx, &input, wanted).await {
            Ok(paused_ms) => self.taken(&input, paused_ms, None).await,
            Err(Failed::TooSlow(why)) => match wanted.limits.if_slow {
                IfSlow::DiskOnly => self.disks_only(&input, Some(why)).await,
                IfSlow::Pause | IfSlow::Fail => Err(Fault::permanent(
                    codes::MEMORY_TOO_SLOW,
                    "save the guest's memory",
                    input.domain.name,
                    why,
                )
                .remedy("Let the guest be paused meanwhile, or back up its disks only")),
            },
            Err(Failed::Stopped) => Err(Fault::stopped("take the snapshot", input.domain.name)),
            Err(Failed::Call(e)) => Err(call_fault(e, &input)),
        }
    }

    async fn probe(&self, cx: &StepContext, input: TakeInput) -> Verdict<TakeOutput> {
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => seen,
            Err(e) => return cannot_look(&e),
        };
        match whereabouts(&seen, &input.disks) {
            // A guest that still stands still for us is set free by the next attempt, which then finds it taken.
            Where::Overlays if same_process(&seen, &input) && !held(&seen, &input) => {
                self.probe_taken(cx, &input).await
            }
            Where::Neither(what) => Verdict::Diverged(what),
            Where::Overlays | Where::Bases | Where::Off => {
                fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await
            }
        }
    }
}

/// Why memory was not saved.
enum Failed {
    TooSlow(String),
    Stopped,
    Call(HvError),
}

impl TakeSnapshot {
    /// The disks have moved. Done once libvirt has let go of the guest and the memory file is what it must be.
    async fn probe_taken(&self, cx: &StepContext, input: &TakeInput) -> Verdict<TakeOutput> {
        if cx.still_running {
            return Verdict::InFlight("the call has not returned".to_owned());
        }
        match fence::busy(&*self.0.hypervisor, &input.domain.id).await {
            Ok(None) => match self
                .taken(input, 0, None)
                .await
                .and_then(|output| still_frozen(cx, input, output, Some(CUT_OFF.to_owned())))
            {
                Ok(output) => Verdict::Done(output),
                // The step is repeated, finds the same and fails with its reason.
                Err(fault) if fault.class == Class::Permanent => Verdict::NotDone,
                Err(fault) => Verdict::Unknown(fault.to_string()),
            },
            Ok(Some(what)) => Verdict::InFlight(what),
            Err(e) => cannot_look(&e),
        }
    }

    async fn disks_only(&self, input: &TakeInput, why: Option<String>) -> Result<TakeOutput, Fault> {
        let take = Take { disks: pairs(&input.disks), memory: None };
        self.0.hypervisor.take(&input.domain.id, &take).await.map_err(|e| call_fault(e, input))?;
        self.taken(input, 0, why).await
    }

    /// QEMU closes a guest's disks when its memory is written and opens them again when it runs. A guest that was stopped
    /// by its operator stays so: nothing could be committed until *they* resume it.
    async fn without_memory_of_a_paused_guest(
        &self,
        input: &TakeInput,
        wanted: &MemoryInput,
    ) -> Result<TakeOutput, Fault> {
        let why = "the guest is paused, and saving the memory of a paused guest would close its disks until it is \
                   resumed";
        if wanted.limits.if_slow == IfSlow::Fail {
            let name = input.domain.name.clone();
            return Err(Fault::permanent(codes::MEMORY_UNSAVEABLE, "save the guest's memory", name, why)
                .remedy(format!("virsh resume {}, or back up its disks only", input.domain.id)));
        }
        self.disks_only(input, Some(why.to_owned())).await
    }

    /// Saves memory and moves the disks, within the limits; says for how long the guest was stopped on purpose.
    async fn with_memory(
        &self,
        cx: &StepContext,
        input: &TakeInput,
        wanted: &MemoryInput,
    ) -> Result<u64, Failed> {
        let hypervisor = &self.0.hypervisor;
        // libvirt stops the guest for the last of its memory; should it die then, nobody else would resume it.
        self.note_hold(cx, input).await.map_err(Failed::Call)?;
        let take = Take { disks: pairs(&input.disks), memory: Some(wanted.file.clone()) };
        let call = hypervisor.take(&input.domain.id, &take);
        tokio::pin!(call);
        let begun = Instant::now();
        let limit = Duration::from_secs(wanted.limits.seconds);
        let mut given_up: Option<Failed> = None;
        let mut paused: Option<Instant> = None;
        let mut begun_to_write = false;
        let outcome = loop {
            let look = async {
                tokio::time::sleep(LOOK).await;
                begun_to_write || is_there(&wanted.file).await
            };
            begun_to_write = tokio::select! {
                outcome = &mut call => break outcome,
                there = look => there,
            };
            // Until libvirt has made the file it lets nobody ask about its job, end it, or stop the guest: that would wait
            // until all is over, and come too late.
            if !begun_to_write {
                continue;
            }
            // Looking can take as long as the medium needs for what was written; the limit does not wait for that.
            let written = tokio::select! {
                biased;
                () = tokio::time::sleep(limit.saturating_sub(begun.elapsed())), if given_up.is_none() && paused.is_none() => 0,
                written = self.look_at_memory(cx, input, wanted) => written,
            };
            if paused.is_some() {
                continue;
            }
            let why = if given_up.is_some() {
                given_up.take()
            } else if cx.stopping() {
                Some(Failed::Stopped)
            } else {
                too_slow(begun.elapsed(), written, &wanted.limits).map(Failed::TooSlow)
            };
            match why {
                None => {}
                Some(Failed::TooSlow(why)) if wanted.limits.if_slow == IfSlow::Pause => {
                    tracing::info!(%why, "the guest is stopped until its memory is written");
                    if self.hold(input).await {
                        paused = Some(Instant::now());
                    }
                }
                // The call itself then says that it was cancelled; until it has, nothing is over. It is asked for until
                // then: an abort that comes before QEMU has begun to write is accepted, and stops nothing.
                Some(why) => {
                    if let Err(e) = hypervisor.abort_domain_job(&input.domain.id).await {
                        tracing::debug!(error = %e, "the memory is not given up yet");
                    }
                    given_up = Some(why);
                }
            }
        };
        let paused_ms =
            paused.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX));
        if outcome.is_ok() && paused.is_none() && self.is_free(input).await {
            self.forget_hold(cx, input).await;
        } else {
            self.let_go(input).await;
        }
        match (outcome, given_up) {
            (Ok(()), _) => Ok(paused_ms),
            (Err(e), Some(why)) if e.trouble == Trouble::Cancelled => Err(why),
            (Err(e), _) => Err(Failed::Call(e)),
        }
    }

    /// Reports how far the memory is; returns the size of its file.
    async fn look_at_memory(&self, cx: &StepContext, input: &TakeInput, wanted: &MemoryInput) -> u64 {
        self.0.storage.flush(&wanted.file).await;
        if let Ok(Some(job)) = self.0.hypervisor.domain_job(&input.domain.id).await {
            cx.progress.report(job.done, job.done.saturating_add(job.remaining), "bytes");
        }
        {
            let file = wanted.file.clone();
            crate::blocking::io(move || std::fs::metadata(file)).await.map_or(0, |data| data.len())
        }
    }

    fn marker(cx: &StepContext, input: &TakeInput, hold: Option<Hold>) -> Marker {
        Marker { store: input.store.clone(), job: cx.job.to_string(), hold }
    }

    /// Notes that the guest is about to be stopped for us, unless it stands still already.
    async fn note_hold(&self, cx: &StepContext, input: &TakeInput) -> Result<(), HvError> {
        let hypervisor = &self.0.hypervisor;
        if hypervisor.state(&input.domain.id).await? != RunState::Running {
            return Ok(());
        }
        hypervisor.set_hold(&input.domain.id, &Self::marker(cx, input, Some(Hold::Suspended))).await
    }

    /// Whether the guest runs, or stands still because somebody asked for that in the meantime.
    async fn is_free(&self, input: &TakeInput) -> bool {
        let state = self.0.hypervisor.state(&input.domain.id).await;
        matches!(state, Ok(RunState::Running | RunState::Paused(PauseReason::Asked)))
    }

    async fn forget_hold(&self, cx: &StepContext, input: &TakeInput) {
        // A note that stays does no harm: it is read only when the guest stands still.
        if let Err(e) = self.0.hypervisor.set_hold(&input.domain.id, &Self::marker(cx, input, None)).await {
            tracing::debug!(error = %e, "the note of the hold stays");
        }
    }

    /// Stops the guest, if it runs. The note of it is there already.
    async fn hold(&self, input: &TakeInput) -> bool {
        let hypervisor = &self.0.hypervisor;
        let domain = &input.domain.id;
        if !matches!(hypervisor.state(domain).await, Ok(RunState::Running)) {
            return false;
        }
        match hypervisor.suspend(domain).await {
            Ok(()) => true,
            Err(e) => {
                tracing::warn!(error = %e, "the guest could not be stopped");
                e.in_doubt
            }
        }
    }

    /// Sets the guest free. If that fails the marker stays, and the guest-safety pass repeats it.
    async fn let_go(&self, input: &TakeInput) {
        if let Err(e) = safety::release(&self.0, &input.store, &input.domain.id).await {
            tracing::error!(error = %e, "the guest could not be resumed yet");
        }
    }

    /// Checks that everything is as it must be after the snapshot.
    async fn taken(
        &self,
        input: &TakeInput,
        paused_ms: u64,
        without_memory: Option<String>,
    ) -> Result<TakeOutput, Fault> {
        let seen =
            self.0.observe(&input.domain.id, codes::CANNOT_TAKE_SNAPSHOT).await.map_err(Fault::in_doubt)?;
        match whereabouts(&seen, &input.disks) {
            Where::Overlays if same_process(&seen, input) => {}
            _ => return Err(restarted(input).in_doubt()),
        }
        let at = Timestamp::now();
        let (bases, file) = (input.disks.iter().map(|disk| disk.base.path.clone()), input.memory.clone());
        let bases: Vec<PathBuf> = bases.collect();
        let looked = crate::blocking::run(move || {
            let frozen: std::io::Result<Vec<_>> =
                bases.into_iter().map(|path| Identity::at(&path).map(|is| (path, is))).collect();
            (frozen, file.map(|file| memory::settle(&file.file)))
        })
        .await;
        let cannot = |cause: String| {
            let object = input.domain.name.clone();
            Fault::transient(codes::CANNOT_TAKE_SNAPSHOT, "look at what was taken", object, cause).in_doubt()
        };
        let (frozen, file) = looked.map_err(|e| cannot(e.to_string()))?;
        let frozen = frozen.map_err(|e| cannot(e.to_string()))?;
        let without_memory = without_memory.or_else(|| input.without_memory.clone());
        let mut output =
            TakeOutput { at, memory: None, without_memory, frozen, paused_ms, off: false, thawed: None };
        let (Some(wanted), Some(file)) = (&input.memory, file) else { return Ok(output) };
        match (file, wanted.limits.if_slow) {
            (Ok(MemoryFile::Whole), _) if output.without_memory.is_none() => {
                output.memory = Some(wanted.file.clone());
                Ok(output)
            }
            (_, IfSlow::DiskOnly) => {
                output.without_memory.get_or_insert_with(|| "the memory file is not complete".to_owned());
                Ok(output)
            }
            _ => Err(Fault::permanent(
                codes::MEMORY_LOST,
                "save the guest's memory",
                wanted.file.display().to_string(),
                "the file is not complete",
            )
            .remedy("Start the backup again")),
        }
    }
}

/// An attempt that was cut off leaves its guest to the guest-safety pass, which thaws it.
const CUT_OFF: &str = "the snapshot was cut off, and whether they still were at its instant is not known";

/// A snapshot of a guest that should have been frozen at its instant and perhaps was not.
fn still_frozen(
    cx: &StepContext,
    input: &TakeInput,
    output: TakeOutput,
    thawed: Option<String>,
) -> Result<TakeOutput, Fault> {
    match thawed.filter(|_| freeze::was_frozen(cx, input.frozen.as_ref())) {
        Some(why) if input.must_be_frozen => Err(Fault::permanent(
            codes::CANNOT_FREEZE,
            "take the snapshot of a frozen guest",
            &input.domain.name,
            why,
        )
        .remedy("Start the backup again; see what held the snapshot up, or allow backups without freezing")),
        thawed => Ok(TakeOutput { thawed, ..output }),
    }
}

/// Whether libvirt has made the file.
async fn is_there(file: &Path) -> bool {
    let file = file.to_owned();
    let seen = crate::blocking::io(move || std::fs::metadata(file)).await;
    !seen.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

fn too_slow(elapsed: Duration, written: u64, limits: &MemoryLimits) -> Option<String> {
    if written > limits.bytes {
        return Some(format!(
            "{written} bytes are written, {} are allowed: the guest changes its memory faster than it can be saved",
            limits.bytes
        ));
    }
    (elapsed > Duration::from_secs(limits.seconds)).then(|| format!("it took more than {} s", limits.seconds))
}

fn pairs(disks: &[JobDisk]) -> Vec<(crate::hypervisor::Target, PathBuf)> {
    disks.iter().map(|disk| (disk.target.clone(), disk.overlay.clone())).collect()
}

async fn remove_torn(wanted: &MemoryInput) -> Result<(), Fault> {
    let file = wanted.file.clone();
    match crate::blocking::remove(file).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Fault::permanent(
            codes::CANNOT_REMOVE_FILE,
            "remove the memory file of an attempt that was cut off",
            wanted.file.display().to_string(),
            e,
        )),
        _ => Ok(()),
    }
}

fn restarted(input: &TakeInput) -> Fault {
    Fault::permanent(
        Code::FACTS_CHANGED,
        "take the snapshot",
        input.domain.name.clone(),
        "the domain ended, or was started anew, while the job was about to take it",
    )
    .remedy("Start the job again; it plans anew")
}

fn call_fault(e: HvError, input: &TakeInput) -> Fault {
    let (code, doing) = match input.memory {
        Some(_) if e.trouble == Trouble::NoSpace => (codes::NOT_ENOUGH_DISK_SPACE, "save the guest's memory"),
        _ => (codes::CANNOT_TAKE_SNAPSHOT, "take the snapshot"),
    };
    e.fault(code, doing, input.domain.name.clone())
}

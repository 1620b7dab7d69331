//! What happened to a job, in plain words: the engine's tale, and what it comes to.
//!
//! The engine tells what it knows: requests, plans, attempts, retries, rollbacks. What the steps measured (how long the
//! guest stood still, whether its file systems were frozen, which backup came of it) stands in their outputs, and only
//! this crate knows which kind of step left which output.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmkeep_steps::backup::bound::GaveWay;
use vmkeep_steps::backup::commit::{CommitBackup, CommitOutput};
use vmkeep_steps::backup::forget::{ForgetCheckpoints, ForgetOutput};
use vmkeep_steps::backup::lease::{LeaseOutput, ReleaseLease, ReleaseOutput, TakeLease};
use vmkeep_steps::deletion::read_again::{ReadAgain, Reread};
use vmkeep_steps::deletion::remove::{RemoveBackups, Removed};
use vmkeep_steps::hypervisor::RunState;
use vmkeep_steps::inplace::discard::{Discard, Discarded};
use vmkeep_steps::inplace::seen::{Exchanged, SeeRunning};
use vmkeep_steps::restore::from_vault::reader::{EndReading, EndReadingOutput};
use vmkeep_steps::restore::resume::{ResumeDomain, ResumeOutput};
use vmkeep_steps::restore::settle::{Report, SettleDomain};
use vmkeep_steps::save::resume::Back;
use vmkeep_steps::save::{self, ResumeGuest};
use vmkeep_steps::snapshot::copy::{CopyImage, CopyOutput};
use vmkeep_steps::snapshot::freeze::{FreezeGuest, FreezeOutput, ThawGuest};
use vmkeep_steps::snapshot::pivot::{Pivot, PivotOutput};
use vmkeep_steps::snapshot::publish::{Publish, PublishOutput};
use vmkeep_steps::snapshot::rest::TakeAtRest;
use vmkeep_steps::snapshot::take::{TakeOutput, TakeSnapshot};
use vmkeep_workflow::engine::JobView;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Body, Event, JobId, Phase, Seq, Step, StepName, Verdict};

use crate::api::types::Explanation;
use crate::codes;
use crate::text::{bytes, span};
use crate::verify::{Verified, VerifyBackup};

/// Tells a history.
#[must_use]
pub fn story(history: &[(Seq, Event)]) -> Explanation {
    let facts = Gathered::from(history);
    let mut summary = facts.outputs.iter().flat_map(|(kind, output)| told(kind, output)).collect::<Vec<_>>();
    summary.extend(facts.frozen_for());
    summary.extend(facts.phases());
    if !facts.undone.is_empty() {
        summary.push(format!("What was undone: {}", facts.undone.join("; ")));
    }
    if facts.recoveries > 0 {
        let times =
            if facts.recoveries == 1 { "once".to_owned() } else { format!("{} times", facts.recoveries) };
        summary.push(format!("vmkeepd ended {times} in the middle; the job went on each time it was back"));
    }
    Explanation { lines: vmkeep_workflow::explain::explain(history), summary }
}

/// What a job has come to so far, in words.
#[must_use]
pub fn results(view: &JobView) -> Vec<String> {
    view.steps
        .iter()
        .filter_map(|step| Some(told(&StepKind::try_from(step.kind.clone()).ok()?, step.output.as_ref()?)))
        .flatten()
        .collect()
}

/// Why a pause that is asked for does not take effect yet, and when it does; nothing if it does at once.
#[must_use]
pub fn pause_waits(safe_after: &[String]) -> Option<String> {
    let last = safe_after.last()?;
    Some(format!(
        "it takes effect after \"{last}\", because until then the guest's disks or the guest itself stand in between: \
         on overlays, which grow with all that the guest writes, or frozen, or stopped"
    ))
}

/// What there is to say about what a step left.
fn told(kind: &StepKind, output: &Value) -> Vec<String> {
    if *kind == SeeRunning::KIND {
        return read::<Exchanged>(output).map(|report| exchanged(&report)).unwrap_or_default();
    }
    if *kind == Discard::KIND {
        return read::<Discarded>(output).map(|report| discarded(&report)).unwrap_or_default();
    }
    if *kind == SettleDomain::KIND {
        return read::<Report>(output).map(|report| restored(&report)).unwrap_or_default();
    }
    if *kind == ReadAgain::KIND {
        let read: Reread = match read(output) {
            Some(read) => read,
            None => return Vec::new(),
        };
        let short = JobId::from(read.backup.0).short();
        return vec![format!("Backup {short} was read again and is whole: {}", bytes(read.bytes))];
    }
    if *kind == ForgetCheckpoints::KIND {
        return read::<ForgetOutput>(output).map(|forgot| gave_way(&forgot)).unwrap_or_default();
    }
    if *kind == RemoveBackups::KIND {
        return read::<Removed>(output).map(|removed| deleted(&removed)).unwrap_or_default();
    }
    one(kind, output).into_iter().collect()
}

/// Which vaults a bound on checkpoints has cost some.
fn gave_way(forgot: &ForgetOutput) -> Vec<String> {
    let line = |vault: &GaveWay| {
        let which = vault.name.clone().unwrap_or_else(|| format!("whose id begins with {}", vault.vault));
        let count = vault.checkpoints.len();
        let lost = format!(
            "The domain has no room for more checkpoints (backup.checkpoints): {count} of the vault {which} went",
        );
        if vault.in_full {
            format!("{lost}; the next backup into it reads all disks in full")
        } else {
            format!("{lost}; the next differential backup into it may read disks in full")
        }
    };
    forgot.gave_way.iter().map(line).collect()
}

/// What a deletion came to.
fn deleted(removed: &Removed) -> Vec<String> {
    let mut lines = Vec::new();
    for gone in &removed.backups {
        let short = JobId::from(gone.backup.0).short();
        lines.push(format!("Backup {short} was deleted: {} files, {}", gone.files, bytes(gone.bytes)));
        if !gone.left.is_empty() {
            lines.push(format!(
                "Left in {} because it did not belong to the backup (code {} {}): {}",
                gone.folder.display(),
                codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION,
                codes::name(codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION),
                gone.left.join(", ")
            ));
        }
    }
    if removed.backups.is_empty() {
        lines.push("No backup had to go".to_owned());
    }
    lines.extend(removed.notes.iter().cloned());
    lines
}

/// What a restore came to.
fn exchanged(report: &Exchanged) -> Vec<String> {
    let state = match report.state {
        RunState::Off => "is shut off",
        RunState::Running => "runs",
        RunState::Paused(_) => "is paused",
        RunState::Other => "is neither running nor off",
    };
    let with = if report.with_memory { ", with its memory" } else { "" };
    let mut lines = vec![format!("{} {state}{with}", report.domain.name)];
    lines.extend(report.disks.iter().map(|(disk, path)| format!("Its disk {disk} is {}", path.display())));
    if let Some(job) = report.kept {
        lines.push(format!(
            "What it was is kept aside. To bring that back: vmkeep restore --undo {0}; to give it up: vmkeep restore \
             --discard {0}",
            job.short()
        ));
    }
    lines.extend(report.notes.iter().cloned());
    lines
}

fn discarded(report: &Discarded) -> Vec<String> {
    let removed = report.removed.iter().map(|path| format!("{} was removed", path.display()));
    let stay = report.stay.iter().map(|path| format!("{} stays: it may be others' as well", path.display()));
    removed.chain(stay).collect()
}

fn restored(report: &Report) -> Vec<String> {
    let state = match report.state {
        RunState::Off => "is defined and off",
        RunState::Running => "runs",
        RunState::Paused(_) => "is paused",
        RunState::Other => "is neither running nor off",
    };
    let with = if report.with_memory { ", with its memory" } else { "" };
    let mut lines = vec![format!("The new domain {} {state}{with}", report.domain.name)];
    lines
        .extend(report.disks.iter().map(|(target, path)| format!("Its disk {target} is {}", path.display())));
    lines.extend(report.changes.iter().map(|change| format!("Other than the original: {change}")));
    lines.extend(report.notes.iter().cloned());
    lines
}

/// One sentence about what a step left, if it is worth one.
fn one(kind: &StepKind, output: &Value) -> Option<String> {
    if *kind == ResumeDomain::KIND {
        let resumed: ResumeOutput = read(output)?;
        return resumed.cold.then(|| {
            "The guest's QEMU ended after it had been let go; it was started without its memory".to_owned()
        });
    }
    if *kind == TakeSnapshot::KIND {
        let taken: TakeOutput = read(output)?;
        let pause = match taken.paused_ms {
            0 => String::new(),
            ms => {
                format!("; the guest was stopped for {} to save its memory", span(Duration::from_millis(ms)))
            }
        };
        return Some(match (&taken.memory, &taken.without_memory) {
            (Some(_), _) => format!("Memory and disks were taken at one instant{pause}"),
            (None, Some(why)) => format!("Only the disks were taken: {why}{pause}"),
            (None, None) => format!("The disks were taken at one instant{pause}"),
        });
    }
    if *kind == TakeAtRest::KIND {
        let taken: TakeOutput = read(output)?;
        return Some(if taken.off {
            "The domain was off: its disks were taken as they lay, and there was no memory to take".to_owned()
        } else {
            "The domain was started in that moment: its disks were taken at one instant, without memory"
                .to_owned()
        });
    }
    if *kind == ResumeGuest::KIND {
        let resumed: save::resume::ResumeOutput = read(output)?;
        return came_back(&resumed);
    }
    if *kind == FreezeGuest::KIND {
        let frozen: FreezeOutput = read(output)?;
        return Some(match frozen.why_not {
            None => format!("The guest's {} file systems were frozen for the instant", frozen.file_systems),
            Some(why) => format!("The guest's file systems were not frozen: {why}"),
        });
    }
    if *kind == CopyImage::KIND {
        let copied: CopyOutput = read(output)?;
        return Some(format!("{} was copied: {}", copied.name, bytes(copied.size)));
    }
    if *kind == Publish::KIND {
        let published: PublishOutput = read(output)?;
        let short = JobId::from(published.backup.0).short();
        return Some(format!(
            "Backup {short} was published; bring it back: vmkeep restore {short} --as NAME"
        ));
    }
    if *kind == CommitBackup::KIND {
        let committed: CommitOutput = read(output)?;
        let short = JobId::from(uuid::Uuid::from_bytes(*committed.backup.bytes())).short();
        return Some(format!(
            "Backup {short} was committed; bring it back: vmkeep restore {short} --vault VAULT --as NAME"
        ));
    }
    if *kind == TakeLease::KIND {
        let tidied = read::<LeaseOutput>(output)?.tidied;
        let jobs: Vec<String> = tidied.iter().map(|job| job.short()).collect();
        return (!jobs.is_empty()).then(|| {
            format!("Leases in the vault that these jobs had left were ended: {}", jobs.join(", "))
        });
    }
    if *kind == ReleaseLease::KIND {
        let why = read::<ReleaseOutput>(output)?.left?;
        return Some(format!(
            "The lease in the vault could not be ended: {why}. The next backup into it ends it, or the next start of vmkeepd; \
             until then collections wait for it, for a day at most. To give it up at once: vmkeep vault leases VAULT"
        ));
    }
    if *kind == EndReading::KIND {
        let why = read::<EndReadingOutput>(output)?.left?;
        return Some(format!(
            "The vault was not told that nobody reads any more: {why}. The next backup into it tells it, or the next start of \
             vmkeepd; until then collections wait, for a day at most. To give the lease up at once: vmkeep vault leases VAULT"
        ));
    }
    if *kind == Pivot::KIND {
        let pivoted: PivotOutput = read(output)?;
        let mut text = match pivoted.paused_us {
            Some(us) => {
                format!("The guest stood still for {} while it went back to its own files", short_span(us))
            }
            None => "The guest is back on its own files".to_owned(),
        };
        for note in &pivoted.notes {
            text.push_str(&format!("; {note}"));
        }
        return Some(text);
    }
    if *kind == VerifyBackup::KIND {
        let verified: Verified = read(output)?;
        let mut text = crate::verify::words(&verified);
        for note in &verified.notes {
            text.push_str(&format!("; {note}"));
        }
        return Some(text);
    }
    None
}

/// How a guest that was saved came back.
fn came_back(resumed: &save::resume::ResumeOutput) -> Option<String> {
    let down = match resumed.downtime_ms {
        Some(ms) => format!("it was down for {}", short_span(ms.saturating_mul(1000))),
        None => "for how long it was down is not known, because vmkeepd ended meanwhile".to_owned(),
    };
    let why = resumed.why.as_deref().unwrap_or("its state could not be used");
    Some(match resumed.back {
        Back::Resumed => format!("The guest was saved and runs again; {down}"),
        Back::Cold => format!("The guest was saved, and was started without its memory: {why}; {down}"),
        Back::ByOthers => {
            "Somebody else started the guest while it was saved; its saved state is stale for it".to_owned()
        }
        Back::Paused => "The guest was saved and loaded again, and stands still as before".to_owned(),
        Back::Off => format!("The guest is off: {why}"),
        Back::NeverGone => return None,
    })
}

fn read<T: DeserializeOwned>(output: &Value) -> Option<T> {
    T::deserialize(output).ok()
}

/// Microseconds as people say them: these are short.
fn short_span(us: u64) -> String {
    if us < 10_000_000 {
        #[allow(clippy::cast_precision_loss)]
        return format!("{:.2} s", us as f64 / 1e6);
    }
    span(Duration::from_micros(us))
}

/// What a history holds beyond what the engine tells.
#[derive(Default)]
struct Gathered {
    outputs: Vec<(StepKind, Value)>,
    undone: Vec<String>,
    recoveries: u32,
    frozen: Option<Timestamp>,
    thawed: Option<Timestamp>,
    froze_any: bool,
    /// The job's phases in their order, each with its first step's beginning and its last one's end.
    stages: Vec<(String, Option<Timestamp>, Option<Timestamp>)>,
}

impl From<&[(Seq, Event)]> for Gathered {
    fn from(history: &[(Seq, Event)]) -> Self {
        let mut this = Self::default();
        let mut steps: HashMap<StepName, (StepKind, String)> = HashMap::new();
        let mut stage_of: HashMap<StepName, usize> = HashMap::new();
        let mut undone = HashSet::new();
        for (_, event) in history {
            match &event.body {
                Body::JobPlanned(plan) => {
                    let of =
                        |s: &vmkeep_workflow::StepSpec| (s.name.clone(), (s.kind.clone(), s.title.clone()));
                    steps = plan.steps.iter().map(of).collect();
                    this.stages.clear();
                    for step in &plan.steps {
                        let Some(stage) = &step.stage else { continue };
                        let known = this.stages.iter().position(|(name, ..)| name == stage);
                        let at = known.unwrap_or(this.stages.len());
                        if known.is_none() {
                            this.stages.push((stage.clone(), None, None));
                        }
                        stage_of.insert(step.name.clone(), at);
                    }
                }
                Body::JobRecovered => this.recoveries += 1,
                Body::StepStarted { step, phase: Phase::Forward, .. } => {
                    if let Some(stage) = stage_of.get(step).and_then(|at| this.stages.get_mut(*at)) {
                        stage.1.get_or_insert(event.at);
                    }
                }
                Body::StepSucceeded { step, phase: Phase::Forward, output, .. }
                | Body::StepProbed { step, phase: Phase::Forward, verdict: Verdict::Done(output), .. } => {
                    if let Some(stage) = stage_of.get(step).and_then(|at| this.stages.get_mut(*at)) {
                        stage.2 = Some(event.at);
                    }
                    if let Some((kind, _)) = steps.get(step) {
                        this.note(kind, output, event.at);
                    }
                }
                Body::StepSucceeded { step, phase: Phase::Undo, .. }
                | Body::StepProbed { step, phase: Phase::Undo, verdict: Verdict::Done(_), .. } => {
                    if let Some((_, title)) = steps.get(step)
                        && undone.insert(step.clone())
                    {
                        this.undone.push(format!("\"{title}\""));
                    }
                }
                _ => {}
            }
        }
        this
    }
}

impl Gathered {
    fn note(&mut self, kind: &StepKind, output: &Value, at: Timestamp) {
        if *kind == FreezeGuest::KIND {
            self.frozen = Some(at);
            self.froze_any = read::<FreezeOutput>(output).is_some_and(|frozen| frozen.file_systems > 0);
        } else if *kind == ThawGuest::KIND {
            self.thawed = Some(at);
        }
        self.outputs.push((kind.clone(), output.clone()));
    }

    /// How long each phase took.
    fn phases(&self) -> Option<String> {
        let took = |(name, began, ended): &(String, Option<Timestamp>, Option<Timestamp>)| {
            let took = Duration::try_from((*ended)?.duration_since((*began)?)).ok()?;
            Some(format!("{name} {}", span(took)))
        };
        let all: Vec<String> = self.stages.iter().filter_map(took).collect();
        (!all.is_empty()).then(|| format!("Its phases took: {}", all.join(", ")))
    }

    fn frozen_for(&self) -> Option<String> {
        let (from, to) = self.frozen.zip(self.thawed).filter(|_| self.froze_any)?;
        let held = Duration::try_from(to.duration_since(from)).ok()?;
        Some(format!("The guest's file systems were frozen for {}", span(held)))
    }
}

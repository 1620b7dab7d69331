//! What must hold after a run, whatever was done to it.

use std::path::Path;

use vmkeep_steps::hypervisor::fake::Fake;
use vmkeep_steps::hypervisor::{Layer, PauseReason, RunState};
use vmkeep_steps::image::root::{Roots, TargetRoot};
use vmkeep_steps::manifest::{self, catalogue};
use vmkeep_steps::snapshot::disk::overlay_job;
use vmkeep_workflow::{Body, Event, JobStatus, JobSummary};

use super::director::{Act, LOOKS, Trouble_};
use super::outside;
use super::run::{Acts, Before, copy, kept};
use super::scenario::{Purpose, Scenario, Stage, files};

/// How it ended, and what is wrong with that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub status: Option<JobStatus>,
    /// Of a job that needs attention: the steps and their codes.
    pub attention: String,
    /// Why it failed, if it did.
    pub fault: String,
    pub wrong: Vec<String>,
}

/// Whether a job may ask for an operator. It may when somebody acted on the domain or a call fails for ever, and when libvirt lost
/// its notes of what it does; not because libvirt is wrong about QEMU's disks, which QEMU itself can be asked about. After all
/// other acts it has to find its way by itself.
fn may_need_attention(scenario: &Scenario, acts: &Acts, attention: &[String]) -> bool {
    let any = |which: fn(&Act) -> bool| acts.values().any(which);
    let theirs = any(|act| {
        matches!(
            act,
            Act::Start
                | Act::Destroy
                | Act::Pause
                | Act::Resume
                | Act::QemuAndStart
                | Act::FailForEver
                | Act::Full
                | Act::Fail(Trouble_::Permanent | Trouble_::NoSpace)
        )
    });
    let libvirtd = any(|act| matches!(act, Act::Libvirtd | Act::KilledWithLibvirtd));
    // A machine that starts with the host while its exchange goes back is somebody's.
    let started = scenario.purpose == Purpose::Exchange
        && any(|act| matches!(act, Act::Cancel))
        && any(|act| matches!(act, Act::Host { autostart: true }));
    theirs || started || (libvirtd && attention.iter().all(|item| item.split(' ').nth(1) != Some(DIVERGED)))
}

/// The code of a step that finds the world neither as before it nor as after it.
const DIVERGED: &str = "73";

pub fn judge(
    scenario: &Scenario,
    stage: &Stage,
    was: &Before,
    (ended, history, over): (Option<JobSummary>, &[Event], bool),
    acts: &Acts,
    faults: Vec<String>,
) -> Verdict {
    let mut wrong = faults;
    let status = ended.as_ref().map(|summary| summary.status);
    let items = ended.iter().flat_map(|summary| &summary.items);
    let attention: Vec<String> =
        items.map(|item| format!("{} {} {}", item.step, item.fault.code, item.fault.cause)).collect();
    let fault = ended.as_ref().and_then(|s| s.fault.as_ref()).map(ToString::to_string).unwrap_or_default();
    match status {
        None => wrong.push("the job does not end".to_owned()),
        Some(JobStatus::NeedsAttention) if !may_need_attention(scenario, acts, &attention) => {
            wrong.push(format!("the job needs attention: {}", attention.join("; ")));
        }
        Some(JobStatus::Succeeded) => {}
        Some(_) if acts.is_empty() => wrong.push(format!("undisturbed, it ended otherwise: {fault}")),
        Some(_) => {}
    }
    let succeeded = status == Some(JobStatus::Succeeded);
    // What was to be taken away may stay, and then the job says so: with its failure, or with a reason.
    let stays = history.iter().any(|event| match &event.body {
        Body::StepSucceeded { output, .. } => output.get("stays").is_some(),
        _ => false,
    });
    if stays && acts.is_empty() {
        wrong.push("undisturbed, something stays".to_owned());
    }
    let left = scenario.purpose == Purpose::Tidy && (!succeeded || stays);
    let attended = status == Some(JobStatus::NeedsAttention) || status.is_none();
    // Whether somebody had ended the guest before the job knew of it.
    let ran = history.iter().any(|event| match &event.body {
        Body::JobPlanned(plan) => scenario.purpose != Purpose::Backup || plan.facts["running"] == true,
        _ => false,
    });
    let end = End { attended, left, succeeded, ran, over };
    guest(scenario, stage, was, acts, end, &mut wrong);
    if !attended && !left {
        leftovers(scenario, stage, was, succeeded, &mut wrong);
    }
    if scenario.of_vault() {
        in_vault(scenario, stage, was, end, &mut wrong);
    }
    outside::judge(scenario, stage, was, end, &mut wrong);
    let mixed = stage.world.mixed(&stage.domain.id);
    last_cut(stage, &mut wrong);
    if stage.world.mixed(&stage.domain.id) && !mixed && !attended {
        wrong.push("after a last power cut the domain has a TPM that is not its own".to_owned());
    }
    // What was said to be a backup is one still.
    backups(scenario, stage, was, acts, end, &mut wrong);
    wrong.extend(stage.world.wrong());
    Verdict { status, attention: attention.join("; "), fault, wrong }
}

/// What is expected of what the job leaves.
#[derive(Clone, Copy)]
pub(super) struct End {
    /// It has not ended: it waits for an operator.
    pub(super) attended: bool,
    /// What was there to be taken away may still be there.
    left: bool,
    pub(super) succeeded: bool,
    /// The guest ran when the job was planned.
    ran: bool,
    /// The job had ended before somebody died: what became of the guest then is not for it to mend.
    over: bool,
}

fn guest(
    scenario: &Scenario,
    stage: &Stage,
    was: &Before,
    acts: &Acts,
    End { attended, left, succeeded, ran, over }: End,
    wrong: &mut Vec<String>,
) {
    let now = stage.world.picture(&stage.domain.id);
    let any = |which: fn(&Act) -> bool| acts.values().any(which);
    let paused_by_them = any(|act| matches!(act, Act::Pause));
    // Whom an operator has stopped between freeze and thaw nobody can ask to thaw: the operator is told.
    let theirs_to_thaw = paused_by_them && attended && matches!(now.run, RunState::Paused(_));
    if now.frozen && !theirs_to_thaw {
        wrong.push("the guest is frozen".to_owned());
    }
    // A machine with memory that takes the place of one that is off stands still.
    let ended = any(|act| {
        matches!(act, Act::KilledWithQemu | Act::Host { .. } | Act::Qemu | Act::QemuAndStart | Act::Destroy)
    });
    let may_stand = paused_by_them || attended || (scenario.purpose == Purpose::Exchange && ended);
    if matches!(now.run, RunState::Paused(_)) && !may_stand && was.picture.run == RunState::Running {
        wrong.push("the guest stands still".to_owned());
    }
    if now.busy && matches!(now.run, RunState::Paused(PauseReason::Job)) {
        wrong.push("libvirt's own job is still on".to_owned());
    }
    let host = any(|act| matches!(act, Act::Host { .. }));
    let started_again = if scenario.purpose == Purpose::Backup && !(host && over) { ran } else { !host };
    if was.picture.run == RunState::Running
        && now.run == RunState::Off
        && !now.theirs
        && !attended
        && started_again
    {
        wrong.push("the guest ran, and is off".to_owned());
    }
    if attended {
        return;
    }
    if now.jobs > 0 {
        wrong.push("a block job is left".to_owned());
    }
    if !left && (now.marker.is_some() || now.noted.is_some()) {
        wrong.push(format!("a mark is left: {:?} {:?}", now.marker, now.noted));
    }
    if now.persistent != now.durable {
        wrong.push("the definition is not durable".to_owned());
    }
    for (who, named) in
        [("QEMU", &now.qemu), ("the live definition", &now.live), ("the definition", &now.persistent)]
    {
        if let Some(path) = named.iter().find(|path| overlay_job(path).is_some()) {
            wrong.push(format!("{who} names {}", path.display()));
        }
        if !named.is_empty() && *named != now.persistent {
            wrong.push(format!("{who} names {named:?}, and the definition {:?}", now.persistent));
        }
    }
    let same = now.persistent == was.picture.persistent;
    if same == (scenario.purpose == Purpose::Exchange && succeeded) {
        wrong.push(format!("the disks are {:?}, and were {:?}", now.persistent, was.picture.persistent));
    }
}

fn leftovers(scenario: &Scenario, stage: &Stage, was: &Before, succeeded: bool, wrong: &mut Vec<String>) {
    let images = stage.images();
    let new: Vec<_> = images.difference(&was.images).collect();
    let gone: Vec<_> = was.images.difference(&images).collect();
    let expected_new =
        if scenario.purpose == Purpose::Exchange && succeeded && scenario.workflow != "restore-undo" {
            scenario.files()
        } else {
            0
        };
    let expected_gone = if scenario.purpose == Purpose::Discard && succeeded { scenario.files() } else { 0 };
    if new.len() != expected_new || gone.len() != expected_gone {
        wrong.push(format!("beside the images: new {new:?}, gone {gone:?}"));
    }
    let ram = files(&stage.at("ram"));
    if !ram.is_empty() {
        wrong.push(format!("left on the RAM disk: {ram:?}"));
    }
    let kept_now = kept(&stage.at("restored"));
    let expected = match (scenario.purpose, succeeded) {
        (Purpose::Exchange, true) if scenario.workflow == "restore-in-place" => was.kept + 1,
        (Purpose::Discard, true) => was.kept - 1,
        _ => was.kept,
    };
    if kept_now != expected {
        wrong.push(format!("{kept_now} machines are kept aside, and not {expected}"));
    }
    if scenario.purpose == Purpose::Another {
        let there = stage.world.picture(&copy());
        let left = files(&stage.at("restored/copy"));
        if there.there != succeeded {
            wrong.push(format!("the new domain is there: {}", there.there));
        }
        if !succeeded && !left.is_empty() {
            wrong.push(format!("left of the new domain: {left:?}"));
        }
        if succeeded && left.len() != scenario.files() {
            wrong.push(format!("files of the new domain: {left:?}"));
        }
    }
}

fn backups(
    scenario: &Scenario,
    stage: &Stage,
    was: &Before,
    acts: &Acts,
    End { attended, left, succeeded, .. }: End,
    wrong: &mut Vec<String>,
) {
    let root = TargetRoot::open(&stage.at("backups")).unwrap();
    let roots = Roots::open([stage.at("backups")]).unwrap();
    let mut whole = 0;
    for entry in catalogue::scan(&root).unwrap() {
        match entry {
            catalogue::Entry::Backup { stored, path } => {
                whole += 1;
                wrong.extend(backup(stage, &stored.manifest, &path, &roots));
            }
            _ if attended || left => {}
            other => wrong.push(format!("no backup, and left: {other:?}")),
        }
    }
    let expected = match (scenario.purpose, succeeded) {
        (Purpose::Backup, true) => was.backups + 1,
        (Purpose::Fewer(n), true) => was.backups - n,
        _ => was.backups,
    };
    // Retention leaves what it cannot read.
    let unread = scenario.workflow == "prune" && acts.keys().any(|at| *at > LOOKS);
    if whole != expected && !attended && !(unread && whole > expected) {
        wrong.push(format!("{whole} backups, and not {expected}"));
    }
}

/// A backup is of one instant, and its memory of the same.
fn backup(stage: &Stage, manifest: &manifest::Manifest, folder: &Path, roots: &Roots) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut ticks = Vec::new();
    for file in &manifest.files {
        let there = roots.open_folder(folder).unwrap().stat(&file.name).unwrap();
        if there.is_none_or(|stat| u64::try_from(stat.st_size).ok() != Some(file.size)) {
            wrong.push(format!("{} of a backup is not there, or not whole", file.name.as_str()));
        }
    }
    for disk in &manifest.disks {
        let layer = |name| {
            let format =
                manifest.file(name).and_then(|file| file.format).map_or("raw", |format| format.as_str());
            Layer { path: folder.join(name.as_str()), format: format.to_owned() }
        };
        let chain: Vec<Layer> = disk.chain.iter().map(layer).collect();
        match Fake::ticks(&[chain]) {
            Ok(tick) => ticks.extend(tick),
            Err(e) => wrong.push(format!("a disk of a backup cannot be read: {e}")),
        }
    }
    let (least, most) = (ticks.iter().min(), ticks.iter().max());
    if least.zip(most).is_some_and(|(least, most)| most - least >= ticks.len().max(2) as u64) {
        wrong.push(format!("a backup of {} is of several instants: {ticks:?}", stage.domain.name));
    }
    wrong.extend(outside::backup(manifest, folder));
    if let Some(saved) = manifest.memory.saved() {
        match Fake::memory_in(&folder.join(saved.file.as_str())) {
            Ok(memory) if memory.values().copied().collect::<Vec<_>>() == ticks => {}
            Ok(memory) => wrong.push(format!("a backup's memory knows {memory:?}, its disks hold {ticks:?}")),
            Err(e) => wrong.push(format!("a backup's memory cannot be read: {e}")),
        }
    }
    wrong
}

/// A backup in the vault is what the disks held at one instant, byte for byte; so is the domain that was made of it. A
/// checkpoint is that of a backup.
fn in_vault(
    scenario: &Scenario,
    stage: &Stage,
    was: &Before,
    End { attended, succeeded, .. }: End,
    wrong: &mut Vec<String>,
) {
    let kept = stage.kept();
    let checked = kept.iter().filter(|kept| kept.checked).count();
    let expected = was.in_vault + usize::from(scenario.purpose == Purpose::IntoVault && succeeded);
    // What was committed counts, though the job went wrong afterwards.
    if checked != expected && !(checked == expected + 1 && scenario.purpose == Purpose::IntoVault) {
        wrong.push(format!("{checked} backups in the vault, and not {expected}"));
    }
    for kept in kept.iter().filter(|kept| kept.checked) {
        match &kept.disks {
            Ok(disks) => one_instant("a backup in the vault", disks, scenario, wrong),
            Err(e) => wrong.push(format!("a backup in the vault cannot be read: {e}")),
        }
    }
    let now = stage.world.picture(&stage.domain.id);
    let named = |name: &String| {
        kept.iter().any(|kept| kept.checked && kept.manifest.checkpoint.as_ref() == Some(name))
    };
    // Of a domain that is off none can be deleted.
    if let Some(orphan) = now.checkpoints.iter().find(|name| !named(name))
        && !attended
        && now.run != RunState::Off
    {
        wrong.push(format!("the checkpoint {orphan} is of no backup"));
    }
    if now.pulled && !attended {
        wrong.push("QEMU still copies for a backup".to_owned());
    }
    if scenario.purpose == Purpose::Another && succeeded {
        let chains = stage.world.picture(&copy()).persistent.into_iter().map(|path| {
            let layer = Layer { path, format: "raw".to_owned() };
            Fake::content(&[layer], scenario.disk_size()).unwrap()
        });
        one_instant("the new domain", &chains.collect::<Vec<_>>(), scenario, wrong);
    }
}

/// These disks hold what the guest had written at one instant.
fn one_instant(whose: &str, disks: &[Vec<u8>], scenario: &Scenario, wrong: &mut Vec<String>) {
    let of = scenario.formats.len();
    let ticks: Vec<u64> =
        disks.iter().map(|disk| u64::from_be_bytes(disk[..8].try_into().unwrap())).collect();
    let last = ticks.iter().max().copied().unwrap_or(0);
    for (place, disk) in disks.iter().enumerate() {
        // Its last turn until then.
        let turn = (0..=last).rev().find(|n| *n as usize % of == place).unwrap_or(0);
        if ticks[place] != turn {
            wrong.push(format!("{whose} is of several instants: {ticks:?}"));
            return;
        }
        let expected = Fake::content_at("web", (place, of), scenario.disk_size(), turn);
        if let Some(at) = disk
            .iter()
            .zip(&expected)
            .position(|(is, was)| is != was)
            .or((disk.len() != expected.len()).then_some(expected.len()))
        {
            wrong.push(format!("{whose} has something else at byte {at} of disk {place}, at tick {turn}"));
        }
    }
}

/// The host goes down once more, and the guest is started by whoever comes first: it finds all that it wrote.
fn last_cut(stage: &Stage, wrong: &mut Vec<String>) {
    stage.world.power_cut(true);
    stage.world.operator_starts(&stage.domain.id);
    stage.world.operator_pauses(&stage.domain.id, false);
    for _ in 0..4 {
        stage.world.pass();
    }
    if stage.world.picture(&stage.domain.id).run != RunState::Running {
        wrong.push("after a last power cut the domain does not start".to_owned());
    }
}

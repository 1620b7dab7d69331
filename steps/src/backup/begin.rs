//! `begin-pull`: the point in time.
//!
//! One call begins it for all disks, with the checkpoint of the same instant. What this step adds: it asks *QEMU* for each
//! parent's bitmap before, and for each block job and export after; and it never begins a point twice. What an error, or the
//! end of libvirtd in the middle of the call, leaves behind is for its closers to clean up ([`super::end`],
//! [`super::forget`]); the job then fails, and the next one begins another point under names of its own.

use std::path::PathBuf;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, StepName, Verdict};

use super::disk::BackupDisk;
use super::lease::{LeaseOutput, TakeLease};
use crate::codes;
use crate::hypervisor::{Control, DomainRef, Observation, Pull, PullDisk, Pulling, Target, Trouble};
use crate::snapshot::{World, cannot_look, fence, freeze};

const DOING: &str = "begin the backup job";
/// The longest path of a Unix socket, in bytes.
const LONGEST: usize = 107;

/// The name of the socket of a job's pull, by the job's short id.
#[must_use]
pub fn socket_name(job: &str) -> String {
    format!("vmkeep-{job}.nbd")
}

/// Begins a pull.
#[derive(Debug)]
pub struct BeginPull(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginInput {
    /// The domain.
    pub domain: DomainRef,
    /// The store of this daemon.
    pub store: String,
    /// The QEMU process that the plan was made for.
    pub instance: String,
    /// The disks.
    pub disks: Vec<BackupDisk>,
    /// The checkpoint that is made, if any disk can have a bitmap.
    pub checkpoint: String,
    /// The step that says on what each disk is based.
    pub lease: StepName,
    /// The step that has frozen the guest's file systems for this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<StepName>,
    /// No backup unless they are frozen at its instant.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub must_be_frozen: bool,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginOutput {
    /// When it was seen to be begun; the instant itself lies shortly before.
    pub at: Timestamp,
    /// Where QEMU shows the disks.
    pub socket: PathBuf,
    /// The disks.
    pub disks: Vec<Begun>,
    /// The checkpoint, if one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// The guest's file systems were frozen at the instant.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub frozen: bool,
    /// Why the file systems that were frozen for this may have been thawed by the instant itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thawed: Option<String>,
}

/// A disk of a pull that has begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// Which.
    pub target: Target,
    /// The checkpoint since which changes are shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Why all is to be read although something else was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_because: Option<String>,
}

/// What is there of this job's pull.
enum There {
    /// All of it.
    All,
    /// Nothing of it, and nothing of anybody's.
    Nothing,
    /// A part, or somebody else's.
    Other(String),
}

impl BeginInput {
    fn scratch(&self) -> impl Iterator<Item = &PathBuf> {
        self.disks.iter().map(|disk| &disk.scratch)
    }

    fn there(&self, seen: &Observation, pulling: &Pulling) -> There {
        if seen.qemu.as_ref().is_none_or(|qemu| qemu.instance != self.instance) {
            return There::Other("the domain ended, or was started anew".to_owned());
        }
        if pulling.is_nothing() && !seen.checkpoints.contains(&self.checkpoint) {
            return There::Nothing;
        }
        if !pulling.is_of(self.scratch()) {
            let what = match &pulling.scratch {
                Some(_) => "another backup job is going on",
                None if pulling.is_nothing() => "its checkpoint is there, and no job",
                None => "QEMU copies or shows disks for a backup that libvirt knows nothing of",
            };
            return There::Other(what.to_owned());
        }
        if pulling.jobs.len() < self.disks.len() || pulling.exports.len() < self.disks.len() {
            return There::Other(format!(
                "of {} disks QEMU copies {} and shows {}",
                self.disks.len(),
                pulling.jobs.len(),
                pulling.exports.len()
            ));
        }
        There::All
    }

    fn refused(&self, code: Code, cause: impl std::fmt::Display) -> Fault {
        Fault::permanent(code, DOING, &self.domain.name, cause)
    }
}

impl BeginPull {
    async fn look(&self, input: &BeginInput) -> crate::hypervisor::HvResult<There> {
        let seen = self.0.hypervisor.observe(&input.domain.id).await?;
        let pulling = self.0.hypervisor.pulling(&input.domain.id).await?;
        Ok(input.there(&seen, &pulling))
    }

    async fn socket(&self, cx: &StepContext, input: &BeginInput) -> Result<PathBuf, Fault> {
        let folder = self.0.hypervisor.socket_folder(&input.domain.id).await;
        let folder = folder.map_err(|e| e.fault(codes::CANNOT_BEGIN_PULL, DOING, &input.domain.name))?;
        let socket = folder.join(socket_name(&cx.job.short()));
        if socket.as_os_str().len() > LONGEST {
            let cause = format!("the path of a socket there would be too long: {}", socket.display());
            return Err(input.refused(codes::CANNOT_BEGIN_PULL, cause));
        }
        Ok(socket)
    }

    /// What each disk is shown by: the changes since its checkpoint only if QEMU itself has that bitmap in the image that the
    /// guest writes to.
    async fn modes(&self, input: &BeginInput, leased: &LeaseOutput) -> Result<Vec<Begun>, Fault> {
        let mut modes = Vec::with_capacity(input.disks.len());
        for disk in &input.disks {
            let based = leased.disks.iter().find(|based| based.target == disk.target);
            let mut mode = Begun {
                target: disk.target.clone(),
                since: based.and_then(|based| based.since.clone()),
                whole_because: based.and_then(|based| based.whole_because.clone()),
            };
            if let (Some(since), Some(top)) = (&mode.since, disk.top()) {
                let bitmaps = self.0.hypervisor.bitmaps(&input.domain.id, &top.path).await;
                let bitmaps =
                    bitmaps.map_err(|e| e.fault(codes::CANNOT_BEGIN_PULL, "ask QEMU", &input.domain.name))?;
                if bitmaps.iter().all(|bitmap| bitmap.name != *since) {
                    mode.whole_because =
                        Some(format!("QEMU has no usable bitmap {since} in {}", top.path.display()));
                    mode.since = None;
                }
            }
            modes.push(mode);
        }
        Ok(modes)
    }

    async fn begin(
        &self,
        input: &BeginInput,
        socket: &std::path::Path,
        mut modes: Vec<Begun>,
    ) -> Result<Vec<Begun>, Fault> {
        loop {
            let disks = input.disks.iter().zip(&modes).map(|(disk, mode)| PullDisk {
                target: disk.target.clone(),
                scratch: disk.scratch.clone(),
                since: mode.since.clone(),
                bitmap: disk.no_bitmap.is_none(),
            });
            let pull = Pull {
                socket: socket.to_owned(),
                checkpoint: input.makes_checkpoint().then(|| input.checkpoint.clone()),
                disks: disks.collect(),
            };
            match self.0.hypervisor.pull_begin(&input.domain.id, &pull).await {
                Ok(()) => return Ok(modes),
                // Nothing was begun; without bitmaps there is nothing to refuse.
                Err(e)
                    if e.trouble == Trouble::BitmapUnusable
                        && modes.iter().any(|mode| mode.since.is_some()) =>
                {
                    for mode in modes.iter_mut().filter(|mode| mode.since.is_some()) {
                        mode.since = None;
                        mode.whole_because = Some(e.to_string());
                    }
                }
                Err(e) => return Err(e.fault(codes::CANNOT_BEGIN_PULL, DOING, &input.domain.name)),
            }
        }
    }
}

impl BeginInput {
    fn makes_checkpoint(&self) -> bool {
        self.disks.iter().any(|disk| disk.no_bitmap.is_none())
    }

    fn output(
        &self,
        socket: PathBuf,
        disks: Vec<Begun>,
        frozen: bool,
        thawed: Option<String>,
    ) -> BeginOutput {
        BeginOutput {
            at: Timestamp::now(),
            socket,
            disks,
            checkpoint: self.makes_checkpoint().then(|| self.checkpoint.clone()),
            frozen: frozen && thawed.is_none(),
            thawed,
        }
    }
}

#[async_trait]
impl Step for BeginPull {
    const KIND: StepKind = StepKind::new("begin-pull", 1);
    type Input = BeginInput;
    type Output = BeginOutput;

    async fn run(&self, cx: &StepContext, input: BeginInput) -> Result<BeginOutput, Fault> {
        let Some(leased) = cx.outputs.of::<TakeLease>(&input.lease)? else {
            return Err(input.refused(Code::UNDEFINED, "there is no lease"));
        };
        let look = self.look(&input).await;
        let look =
            look.map_err(|e| e.fault(codes::CANNOT_BEGIN_PULL, "look at the domain", &input.domain.name))?;
        match look {
            There::Nothing => {}
            // A point is never begun twice, and of one that was begun by an attempt that was cut off it is not known which
            // bitmaps it shows.
            There::All => {
                let cause = "it was begun by an attempt that was cut off";
                return Err(input.refused(codes::CANNOT_BEGIN_PULL, cause));
            }
            There::Other(what) => return Err(input.refused(codes::CANNOT_BEGIN_PULL, what)),
        }
        let socket = self.socket(cx, &input).await?;
        let modes = self.modes(&input, &leased).await?;
        let modes = self.begin(&input, &socket, modes).await?;
        let thawed = freeze::thawed(&self.0, cx, &input.domain.id, &input.store, input.frozen.as_ref()).await;
        let frozen = freeze::was_frozen(cx, input.frozen.as_ref());
        if let (true, Some(why)) = (input.must_be_frozen, &thawed) {
            return Err(input.refused(codes::CANNOT_FREEZE, why).remedy(
                "Start the backup again; see what held its begin up, or allow backups without freezing",
            ));
        }
        let look = self.look(&input).await;
        match look.map_err(|e| e.fault(codes::CANNOT_BEGIN_PULL, "see what was begun", &input.domain.name))? {
            There::All => Ok(input.output(socket, modes, frozen, thawed)),
            There::Nothing => Err(input
                .refused(codes::CANNOT_BEGIN_PULL, "libvirt says that it has begun, and there is nothing")),
            There::Other(what) => Err(input.refused(codes::CANNOT_BEGIN_PULL, what)),
        }
    }

    /// An attempt without an outcome is never taken for done: which bitmaps it shows stands only in its output. Whatever it
    /// has begun is found by the next attempt, which fails, and is ended by the closers.
    async fn probe(&self, cx: &StepContext, input: BeginInput) -> Verdict<BeginOutput> {
        let look = match self.look(&input).await {
            Ok(look) => look,
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Verdict::NotDone,
            Err(e) => return cannot_look(&e),
        };
        match look {
            There::Nothing => fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await,
            There::All | There::Other(_) if cx.still_running => {
                Verdict::InFlight("the call has not returned".to_owned())
            }
            // libvirt is still at it.
            There::All | There::Other(_) => match self.0.hypervisor.control(&input.domain.id).await {
                Ok(Control::Busy { .. }) => Verdict::InFlight("libvirt is busy with the domain".to_owned()),
                Err(e) if e.is_transient() => cannot_look(&e),
                _ => Verdict::NotDone,
            },
        }
    }
}

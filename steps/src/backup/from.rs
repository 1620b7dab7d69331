//! What disks are read from: a pull of a domain that runs, or the images of one that is off.
//!
//! Either holds still at one point in time, and either can lose it: the pull with its QEMU or libvirt's job, an image when
//! somebody writes to it. Which is asked before the first byte is read, and after a failure, so that the failure is told as what it
//! is. Of images it is asked after the last byte of each as well, since nothing else would tell.

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use vmkeep_vault::source::SourceError;
use vmkeep_workflow::{Class, Code, Fault, StepContext, StepName};

use super::begin::{BeginOutput, BeginPull, Begun};
use super::disk::BackupDisk;
use super::read::{DOING, ReadInput};
use super::{end, guard};
use crate::codes;
use crate::hypervisor::{NotShown, Shown};
use crate::image::copy::Identity;
use crate::snapshot::disk::JobDisk;
use crate::snapshot::growth::Watch;
use crate::snapshot::rest::TakeAtRest;
use crate::snapshot::{World, not_looked};

/// For how long a pull must be able to go on with nobody looking after it.
const ALONE: Duration = Duration::from_secs(600);
/// How long a libvirtd that is gone when something was read is waited for, and how often it is asked.
const LIBVIRT_BACK: Duration = Duration::from_secs(600);
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How often a watch is asked.
const LOOK: Duration = Duration::from_millis(100);

/// Where the disks of a job are to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", content = "of", rename_all = "snake_case")]
pub enum ReadFrom {
    /// A pull.
    Pull {
        /// The step that has begun it.
        begin: StepName,
        /// The QEMU process that the plan was made for.
        instance: String,
    },
    /// Images that stand still while the domain is on overlays, if it is started at all.
    AtRest {
        /// The step that has seen to it.
        take: StepName,
        /// The disks, with their overlays.
        disks: Vec<JobDisk>,
    },
}

/// The point in time that a job has.
pub(super) struct Point<'a> {
    world: &'a World,
    input: &'a ReadInput,
    /// What is known of it.
    pub(super) begun: BeginOutput,
    /// Of images at rest: as they were.
    frozen: Vec<(PathBuf, Identity)>,
    /// What may be said of the guest's file systems.
    pub(super) consistency: &'static str,
}

impl<'a> Point<'a> {
    /// The one that the steps before have brought about.
    pub(super) fn of(cx: &StepContext, world: &'a World, input: &'a ReadInput) -> Result<Self, Fault> {
        let missing =
            || Fault::permanent(Code::UNDEFINED, DOING, &input.domain.name, "there is no point in time");
        match &input.from {
            ReadFrom::Pull { begin, .. } => {
                let begun = cx.outputs.of::<BeginPull>(begin)?.ok_or_else(missing)?;
                let consistency = if begun.frozen { "quiesced" } else { "crash" };
                Ok(Self { world, input, begun, frozen: Vec::new(), consistency })
            }
            ReadFrom::AtRest { take, .. } => {
                let taken = cx.outputs.of::<TakeAtRest>(take)?.ok_or_else(missing)?;
                let disks = input.disks.iter().map(|disk| Begun {
                    target: disk.target.clone(),
                    since: None,
                    whole_because: disk.no_bitmap.clone(),
                });
                let begun = BeginOutput {
                    at: taken.at,
                    socket: PathBuf::new(),
                    disks: disks.collect(),
                    checkpoint: None,
                    frozen: false,
                    thawed: None,
                };
                let consistency = if taken.off { "off" } else { "crash" };
                Ok(Self { world, input, begun, frozen: taken.frozen, consistency })
            }
        }
    }

    fn lost(&self, cause: impl std::fmt::Display) -> Fault {
        Fault::permanent(codes::POINT_IN_TIME_LOST, DOING, &self.input.domain.name, cause)
    }

    /// Fails if it has not stood to the end of what was read. A disk whose block job has ended is shown as it is *now*, and no read
    /// tells of that: what was read counts only because the jobs are there after the last of it. A libvirtd that is being
    /// restarted is waited for.
    pub(super) async fn stood(&self) -> Result<(), Fault> {
        let end = Instant::now() + LIBVIRT_BACK;
        loop {
            match self.stands().await {
                Err(fault) if fault.class == Class::Transient && Instant::now() < end => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                seen => return seen,
            }
        }
    }

    /// Fails if it does not stand any more.
    pub(super) async fn stands(&self) -> Result<(), Fault> {
        match &self.input.from {
            ReadFrom::Pull { instance, .. } => self.is_pulled(instance).await,
            ReadFrom::AtRest { .. } => self.is_still().await,
        }
    }

    async fn is_pulled(&self, instance: &str) -> Result<(), Fault> {
        let (hypervisor, domain) = (&self.world.hypervisor, &self.input.domain.id);
        let looked = async { Ok((hypervisor.qemu(domain).await?, hypervisor.pulling(domain).await?)) };
        let looked = looked.await;
        let (qemu, pulling) =
            looked.map_err(|e| not_looked(e, codes::POINT_IN_TIME_LOST, DOING, &self.input.domain.name))?;
        if qemu.is_none_or(|qemu| qemu.instance != *instance) {
            return Err(self.lost("the guest was shut down, or its QEMU has ended"));
        }
        let all = self.input.disks.len();
        if !pulling.is_of(self.input.scratch().iter()) || pulling.exports.len() < all {
            return Err(self.lost("libvirt's backup job has ended"));
        }
        if pulling.jobs.len() < all {
            return Err(
                self.lost("QEMU no longer keeps what the guest overwrites: its block jobs have ended")
            );
        }
        Ok(())
    }

    async fn is_still(&self) -> Result<(), Fault> {
        let frozen = self.frozen.clone();
        let looked = crate::blocking::run(move || {
            frozen.into_iter().find_map(|(path, was)| match Identity::at(&path) {
                Ok(is) if is == was => None,
                Ok(_) => Some((path, "somebody wrote to it, or put another file in its place".to_owned())),
                Err(e) => Some((path, e.to_string())),
            })
        })
        .await;
        match looked.map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &self.input.domain.name, e))? {
            None => Ok(()),
            Some((path, why)) => {
                Err(Fault::permanent(codes::SOURCE_CHANGED, DOING, path.display().to_string(), why)
                    .remedy("Find out who did, then start the backup again"))
            }
        }
    }

    /// A disk, to be read; with what has changed if that is wanted.
    pub(super) async fn open(&self, disk: &BackupDisk, changes: bool) -> Result<Shown, Opening> {
        match &self.input.from {
            ReadFrom::Pull { instance, .. } => self.open_pull(instance, disk, changes).await,
            ReadFrom::AtRest { .. } => self.open_image(disk).await,
        }
    }

    /// Connects to a disk's export, and sees that it is the QEMU of this domain that shows it.
    async fn open_pull(&self, instance: &str, disk: &BackupDisk, changes: bool) -> Result<Shown, Opening> {
        let export = (self.begun.socket.as_path(), &disk.target);
        let opened =
            self.world.hypervisor.open_export(&self.input.domain.id, instance, export, changes).await;
        opened.map_err(|why| match why {
            NotShown::Source(error) => error.into(),
            NotShown::Stranger(other) => {
                let at = self.begun.socket.display();
                self.lost(format!("process {other} answers at {at}, and not the domain's QEMU")).into()
            }
        })
    }

    async fn open_image(&self, disk: &BackupDisk) -> Result<Shown, Opening> {
        let Some(top) = disk.top() else {
            return Err(self.lost(format!("disk {} has no image", disk.target)).into());
        };
        Ok(self.world.storage.open_image(top).await?)
    }

    /// Ends when the guest needs its room back; the failure that then follows.
    pub(super) async fn alarm(&self) -> Fault {
        let domain = &self.input.domain;
        match &self.input.from {
            ReadFrom::Pull { .. } => {
                let scratch = self.input.scratch();
                let why = guard::alarm(self.world, &domain.id, &scratch, self.input.low_water).await;
                self.give_up(why).await
            }
            ReadFrom::AtRest { disks, .. } => {
                let watch = Watch::start(self.world.clone(), domain.id, disks.clone(), self.input.low_water);
                loop {
                    if let Some(why) = watch.alarm() {
                        return Fault::permanent(codes::OVERLAYS_OUTGREW_SPACE, DOING, &domain.name, why);
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    /// Leaves it to whoever goes on, if it can be left alone for a while.
    pub(super) async fn leave(&self) -> Fault {
        let stopped = Fault::stopped(DOING, self.input.domain.name.clone());
        if matches!(self.input.from, ReadFrom::AtRest { .. }) {
            return stopped;
        }
        // Ended with the host, or by anybody: that is what the job fails for.
        if let Err(fault) = self.stands().await
            && fault.class == Class::Permanent
        {
            return fault;
        }
        let since = Timestamp::now().duration_since(self.begun.at).unsigned_abs();
        if guard::lasts(self.world, &self.input.scratch(), self.input.low_water, since, ALONE).await {
            return stopped;
        }
        let why = "vmkeepd is ending, and the room beside the scratch files would not last until it is back";
        self.give_up(why.to_owned()).await
    }

    /// Ends the pull at once.
    async fn give_up(&self, why: String) -> Fault {
        let domain = &self.input.domain;
        tracing::warn!(domain = %domain.name, why, "the pull is ended for the guest's sake");
        let cause = match end::end(self.world, &domain.id, &self.input.scratch()).await {
            Ok(true) => format!("{why}; the guest runs again"),
            Ok(false) => why,
            // The closer goes on with it.
            Err(e) => format!("{why}; and the backup job could not be ended yet: {e}"),
        };
        Fault::permanent(codes::SCRATCH_RAN_LOW, DOING, &domain.name, cause)
    }
}

/// Why a disk cannot be read.
pub(super) enum Opening {
    Source(SourceError),
    Fault(Fault),
}

impl From<SourceError> for Opening {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<Fault> for Opening {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

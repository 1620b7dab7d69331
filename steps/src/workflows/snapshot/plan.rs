//! The plan itself.

use jiff::Timestamp;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{Code, Fault, JobId, Millis, Plan, StepName, StepSpec};

use super::check::Choice;
use super::facts::Facts;
use super::machine;
use super::options::{Settings, SnapshotOptions};
use super::overlays::{Overlays, SWITCH, TIDY};
use super::rule::transient;
use super::saving::{self, SavePlan};
use super::{NAME, VERSION, phases};
use crate::hypervisor::{DomainRef, Observation, RunState};
use crate::image::chain::FileToCopy;
use crate::manifest::{self, folder};
use crate::recipe::{PATIENT_LOOK, PATIENTLY, patient, step};
use crate::snapshot::copy::{CopyImage, CopyInput};
use crate::snapshot::disk::JobDisk;
use crate::snapshot::folder::{FolderInput, PrepareFolder, check_target};
use crate::snapshot::freeze::{FreezeGuest, FreezeInput, FreezePolicy, ThawGuest};
use crate::snapshot::machine::{KeepInput, KeepState};
use crate::snapshot::mark::{Mark, MarkInput, Unmark};
use crate::snapshot::memory::MemoryLimits;
use crate::snapshot::publish::{Publish, PublishDisk, PublishInput, SealInput, SealMemory};
use crate::snapshot::rest::{RestInput, TakeAtRest};
use crate::snapshot::take::{MemoryInput, TakeInput, TakeSnapshot};
use crate::snapshot::{Places, World};
use crate::text::bytes;

/// The name of the step that takes the snapshot.
pub(super) const TAKE: &str = "take";

pub(super) struct Builder<'a> {
    pub(super) world: &'a World,
    pub(super) places: &'a Places,
    pub(super) settings: &'a Settings,
    pub(super) options: &'a SnapshotOptions,
    pub(super) job: JobId,
}

/// What the steps have in common.
pub(super) struct Common {
    pub(super) domain: DomainRef,
    pub(super) disks: Vec<JobDisk>,
    pub(super) files: Vec<FileToCopy>,
    chains: Vec<Vec<usize>>,
    pub(super) folder: FolderInput,
    /// The QEMU process; nothing if the domain is off.
    instance: Option<String>,
    definition: String,
    pub(super) memory: Option<MemoryInput>,
    /// Why it is left out although it was asked for.
    pub(super) without_memory: Option<String>,
    freeze: bool,
    keep: Option<KeepInput>,
    /// libvirt's image of the memory of a domain that is off, and what is known of it.
    pub(super) saved: Option<FileToCopy>,
    /// It is copied as well.
    pub(super) with_saved: bool,
    pub(super) saving: Option<SavePlan>,
}

impl Common {
    /// The step whose output tells the point in time and the images that stand still.
    fn taken(&self) -> &'static str {
        if self.saving.is_some() { saving::RELOAD } else { TAKE }
    }

    /// The step after which they are copied: a guest that is down comes first.
    fn at_rest(&self) -> &'static str {
        if self.saving.is_some() { saving::RESUME } else { TAKE }
    }
}

fn copy_step(file: &FileToCopy) -> StepName {
    format!("copy/{}", file.name.as_str()).into()
}

impl Builder<'_> {
    pub(super) async fn build(&self, seen: &Observation, choice: &Choice) -> Result<Plan, Fault> {
        check_target(self.places, &self.options.target)?;
        let Some(persistent) = &seen.persistent else {
            return Err(transient(&seen.domain));
        };
        let off = choice.instance.is_none();
        let (disks, files, chains) = self.images(choice).await?;
        let parent = self.options.target.join(folder::of_domain(&seen.domain.name).as_str());
        let name = folder::of_backup(Timestamp::now(), self.job).as_str().to_owned();
        let folder = FolderInput { parent, name };
        let guest_memory = seen.live.as_ref().map_or(persistent.devices.memory, |live| live.devices.memory);
        // Without knowing it nothing is ever taken for the consequence of a reboot.
        let boot = self.world.hypervisor.environment().await.ok().and_then(|env| env.get("boot").cloned());
        let saving = self.save_plan(seen, &disks, folder.path(), guest_memory, boot.as_ref()).await?;
        let memory = if off { None } else { self.memory(guest_memory, &folder) };
        let keep = machine::to_keep(self.world, seen, folder.path()).await?;
        let mut common = Common {
            domain: seen.domain.clone(),
            disks,
            files,
            chains,
            folder,
            instance: choice.instance.clone(),
            definition: persistent.xml.clone(),
            memory,
            without_memory: None,
            freeze: false,
            keep,
            saved: self.saved(choice).await?,
            with_saved: choice.saved.is_some()
                && (self.options.memory.is_some() || self.options.save.is_some()),
            saving,
        };
        self.fit(&mut common, guest_memory).await?;
        common.freeze = common.memory.is_none()
            && common.saving.is_none()
            && !off
            && self.options.freeze != FreezePolicy::Never
            && (persistent.devices.agent || self.options.freeze == FreezePolicy::Required);
        let facts = Facts {
            domain: seen.domain.clone(),
            store: self.settings.store.clone(),
            instance: choice.instance.clone(),
            saved: choice.saved.is_some(),
            definition: persistent.bare.clone(),
            running: seen.state == RunState::Running,
            boot,
            after_reboot: self.options.after_reboot,
            memory: guest_memory,
            disks: common.disks.clone(),
            chains: choice
                .disks
                .iter()
                .map(|disk| disk.chain.iter().map(|layer| layer.path.clone()).collect())
                .collect(),
            left_out: choice.left_out.clone(),
        };
        let mut steps = Vec::new();
        self.reservations(&common, &mut steps)?;
        if common.saved.is_some() {
            self.take_saved(&common, &mut steps)?;
            self.backup(&common, seen, choice, &mut steps).await?;
            self.release("publish", &common, &mut steps)?;
        } else {
            self.preparations(&common, &mut steps)?;
            self.act(&common, &mut steps)?;
            self.backup(&common, seen, choice, &mut steps).await?;
            self.way_back(&common, &mut steps)?;
        }
        phases::arrange(&mut steps, self.options.waits.as_ref())?;
        let title = match (&common.memory, &common.without_memory) {
            _ if common.saved.is_some() => {
                format!("backup of {}, which is off with its memory saved", seen.domain.name)
            }
            _ if off => format!("backup of {}, which is off", seen.domain.name),
            _ if common.saving.is_some() => format!("backup of {} with its saved state", seen.domain.name),
            (Some(_), _) => format!("live backup of {} with memory", seen.domain.name),
            (None, Some(why)) => {
                format!("live backup of {} of its disks, its memory left out: {why}", seen.domain.name)
            }
            (None, None) => format!("live backup of {} of its disks", seen.domain.name),
        };
        let facts = serde_json::to_value(facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the backup", &seen.domain.name, e))?;
        Plan::new(NAME, VERSION, title, steps, Some("publish".into()), facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the backup", &seen.domain.name, e))
    }

    fn memory(&self, guest: u64, folder: &FolderInput) -> Option<MemoryInput> {
        let asked = self.options.memory.as_ref()?;
        let mut limits = MemoryLimits::for_memory(guest, asked.if_slow);
        limits.bytes = asked.bytes.unwrap_or(limits.bytes);
        limits.seconds = asked.seconds.unwrap_or(limits.seconds);
        Some(MemoryInput { file: folder.path().join(folder::MEMORY), limits })
    }

    fn reservations(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let mark = MarkInput { domain: common.domain.clone(), store: self.settings.store.clone() };
        steps.push(
            step::<Mark>("mark", "reserve the domain", &mark)?
                .check_facts()
                .undo(patient())
                .deadline(Millis::secs(180)),
        );
        steps.push(
            step::<PrepareFolder>(
                "prepare",
                format!("make {}", common.folder.path().display()),
                &common.folder,
            )?
            .after("mark")
            .undoable(),
        );
        Ok(())
    }

    fn preparations(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let bitmaps = common.saving.as_ref().map(|plan| plan.bitmaps.as_slice()).unwrap_or_default();
        self.overlays(common).onto("mark", bitmaps, steps)
    }

    /// The overlays of the job, and the way there and back.
    fn overlays(&self, common: &Common) -> Overlays {
        Overlays {
            domain: common.domain.clone(),
            store: self.settings.store.clone(),
            definition: common.definition.clone(),
            disks: common.disks.clone(),
            instance: common.instance.clone(),
            bandwidth: self.options.merge_bandwidth,
        }
    }

    fn act(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let mut before = vec![StepName::from(SWITCH), StepName::from("prepare")];
        if let Some(plan) = &common.saving {
            return self.act_saving(plan, before, steps);
        }
        let Some(instance) = &common.instance else {
            let rest = RestInput { domain: common.domain.clone(), disks: common.disks.clone() };
            steps.push(
                step::<TakeAtRest>(TAKE, "see that the disks stand still", &rest)?
                    .after_all(before)
                    .probing(PATIENT_LOOK)
                    .deadline(Millis::secs(300)),
            );
            return Ok(());
        };
        let freeze = FreezeInput {
            domain: common.domain.clone(),
            store: self.settings.store.clone(),
            policy: self.options.freeze,
        };
        if common.freeze {
            steps.push(
                step::<FreezeGuest>("freeze", "freeze the guest's file systems", &freeze)?
                    .after_all(before.clone())
                    .retry(Retry::NEVER)
                    .deadline(Millis::secs(60))
                    .critical(),
            );
            before.push("freeze".into());
        }
        let take = TakeInput {
            domain: common.domain.clone(),
            store: self.settings.store.clone(),
            instance: instance.clone(),
            disks: common.disks.clone(),
            memory: common.memory.clone(),
            without_memory: common.without_memory.clone(),
            frozen: common.freeze.then(|| "freeze".into()),
            must_be_frozen: common.freeze && self.options.freeze == FreezePolicy::Required,
        };
        let patience = common.memory.as_ref().map_or(300, |memory| memory.limits.seconds * 2 + 600);
        let title = if common.memory.is_some() { "take memory and disks" } else { "take the disks" };
        steps.push(
            step::<TakeSnapshot>(TAKE, title, &take)?
                .after_all(before)
                .check_facts()
                .retry(Retry { attempts: 2, ..Retry::default() })
                .probing(PATIENT_LOOK)
                .deadline(Millis::secs(patience)),
        );
        if common.freeze {
            steps.push(
                step::<ThawGuest>("thaw", "thaw the guest's file systems", &freeze)?
                    .after(TAKE)
                    .closes("freeze")
                    .safety()
                    .retry(PATIENTLY)
                    .probing(PATIENT_LOOK),
            );
        }
        Ok(())
    }

    async fn backup(
        &self,
        common: &Common,
        seen: &Observation,
        choice: &Choice,
        steps: &mut Vec<StepSpec>,
    ) -> Result<(), Fault> {
        let mut before = Vec::new();
        for file in &common.files {
            let of = CopyInput {
                domain: common.domain.clone(),
                disks: common.disks.clone(),
                low_water: self.settings.guests,
                file: file.clone(),
                folder: common.folder.path(),
                bandwidth: self.options.bandwidth,
                taken: common.taken().into(),
            };
            let title = format!("copy {} ({})", file.source.display(), bytes(file.data_bytes));
            steps.push(
                step::<CopyImage>(copy_step(file), title, &of)?
                    .after(common.at_rest())
                    .undoable()
                    .stall(Millis::secs(600)),
            );
            before.push(copy_step(file));
        }
        if let Some(saved) = common.saved.as_ref().filter(|_| common.with_saved) {
            let of = CopyInput {
                domain: common.domain.clone(),
                disks: common.disks.clone(),
                low_water: self.settings.guests,
                file: saved.clone(),
                folder: common.folder.path(),
                bandwidth: self.options.bandwidth,
                taken: TAKE.into(),
            };
            let title = format!("copy the saved memory ({} bytes)", saved.data_bytes);
            steps.push(
                step::<CopyImage>(copy_step(saved), title, &of)?
                    .after(TAKE)
                    .undoable()
                    .stall(Millis::secs(600)),
            );
        }
        if let Some(plan) = &common.saving {
            before.push(self.keep_state(plan, common, steps)?);
        } else if common.memory.is_some() || common.with_saved {
            let of = SealInput { folder: common.folder.path(), taken: TAKE.into() };
            steps.push(
                step::<SealMemory>("memory", "check the memory image", &of)?
                    .after(TAKE)
                    .after_all(common.saved.as_ref().map(copy_step))
                    .stall(Millis::secs(600)),
            );
            before.push("memory".into());
        }
        if let Some(keep) = &common.keep {
            steps.push(
                step::<KeepState>("state", "keep firmware variables and TPM state", keep)?
                    .after(common.at_rest())
                    .deadline(Millis::secs(120)),
            );
            before.push("state".into());
        }
        if common.freeze {
            before.push("thaw".into());
        }
        let publish = self.publish(common, seen, choice).await;
        steps.push(
            step::<Publish>("publish", "publish the backup", &publish)?
                .after_all(before)
                .deadline(Millis::secs(600)),
        );
        Ok(())
    }

    async fn publish(&self, common: &Common, seen: &Observation, choice: &Choice) -> PublishInput {
        // What is not known is left out of the manifest; no backup fails for it.
        let world = self.world.hypervisor.environment().await.unwrap_or_default();
        let uname = rustix::system::uname();
        let live = seen.live.as_ref();
        let devices = live.or(seen.persistent.as_ref()).map(|d| d.devices.clone()).unwrap_or_default();
        PublishInput {
            folder: common.folder.path(),
            tool: self.settings.tool.clone(),
            domain: manifest::Domain {
                uuid: seen.domain.id.0,
                name: seen.domain.name.clone(),
                machine: devices.machine,
                arch: devices.arch,
                memory: Some(devices.memory),
                unknown: manifest::Unknown::new(),
            },
            host: manifest::Host {
                name: uname.nodename().to_str().ok().map(str::to_owned),
                libvirt: world.get("libvirt").cloned(),
                qemu: world.get("qemu").cloned(),
                kernel: uname.release().to_str().ok().map(str::to_owned),
                unknown: manifest::Unknown::new(),
            },
            definition: common.definition.clone(),
            live: live.map(|live| live.xml.clone()),
            disks: common
                .disks
                .iter()
                .zip(&common.chains)
                .map(|(disk, chain)| PublishDisk {
                    target: disk.target.0.clone(),
                    virtual_size: disk.virtual_size,
                    chain: chain.clone(),
                })
                .collect(),
            files: common.files.iter().map(|file| (file.clone(), copy_step(file))).collect(),
            left_out: choice
                .left_out
                .iter()
                .map(|d| manifest::LeftOut { target: d.target.clone(), reason: d.reason.clone() })
                .collect(),
            warnings: choice
                .warnings
                .iter()
                .cloned()
                .chain(common.saving.as_ref().and_then(|plan| plan.warning.clone()))
                .collect(),
            taken: common.taken().into(),
            frozen: common.freeze.then(|| "freeze".into()),
            sealed: (common.memory.is_some() || common.with_saved || common.saving.is_some())
                .then(|| "memory".into()),
            autostart: Some(seen.autostart),
            kept: common.keep.as_ref().map(|_| "state".into()),
            resumed: common.saving.is_some().then(|| saving::RESUME.into()),
        }
    }

    fn way_back(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        self.overlays(common).home("publish", steps)?;
        self.release(TIDY, common, steps)
    }

    fn release(&self, last: &'static str, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let mark = MarkInput { domain: common.domain.clone(), store: self.settings.store.clone() };
        steps.push(
            step::<Unmark>("unmark", "release the domain", &mark)?
                .after(last)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        Ok(())
    }
}

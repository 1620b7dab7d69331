//! The plan itself.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use vmkeep_workflow::plan::{Probing, Retry, Undo};
use vmkeep_workflow::{Code, Fault, JobId, Millis, Plan, Step, StepName, StepSpec};

use super::check::Choice;
use super::facts::Facts;
use super::options::{Settings, SnapshotOptions};
use super::{NAME, VERSION, phases};
use crate::codes;
use crate::hypervisor::{DomainRef, FileId, Observation, RunState};
use crate::image::chain::{self, FileToCopy};
use crate::manifest::{self, folder};
use crate::snapshot::commit::{CommitInput, CommitOverlay};
use crate::snapshot::copy::{CopyImage, CopyInput};
use crate::snapshot::disk::{JobDisk, overlay_path};
use crate::snapshot::folder::{FolderInput, PrepareFolder, check_target};
use crate::snapshot::freeze::{FreezeGuest, FreezeInput, FreezePolicy, ThawGuest};
use crate::snapshot::mark::{Mark, MarkInput, Unmark};
use crate::snapshot::memory::MemoryLimits;
use crate::snapshot::overlay::{CreateOverlay, OverlayInput};
use crate::snapshot::pivot::{Pivot, PivotInput};
use crate::snapshot::publish::{Publish, PublishDisk, PublishInput, SealInput, SealMemory};
use crate::snapshot::switch::{SwitchDefinition, SwitchInput};
use crate::snapshot::take::{MemoryInput, TakeInput, TakeSnapshot};
use crate::snapshot::tidy::{Tidy, TidyInput};
use crate::snapshot::{Places, World};
use crate::text::bytes;

/// The name of the step that takes the snapshot.
pub(super) const TAKE: &str = "take";

/// The name of the step after which a start of the domain uses the overlays. The way back closes it: whoever starts the
/// domain then, it is led home, whether or not a snapshot was ever taken. Until it is home the job is in no safe place.
const SWITCH: &str = "switch";

/// The way back is tried again for as long as it takes to restart a libvirtd, or to make room: more than an hour.
const PATIENTLY: Retry = Retry { attempts: 200, first: Millis(500), most: Millis::secs(30) };

/// And its effect is looked for as long.
const PATIENT_LOOK: Probing =
    Probing { limit: Millis::secs(3600), first: Millis(250), most: Millis::secs(15) };

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
    folder: FolderInput,
    instance: String,
    definition: String,
    pub(super) memory: Option<MemoryInput>,
    freeze: bool,
}

fn input<S: Step>(input: &S::Input) -> Result<Value, Fault>
where
    S::Input: Serialize,
{
    serde_json::to_value(input)
        .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the backup", S::KIND.to_string(), e))
}

fn step<S: Step>(
    name: impl Into<StepName>,
    title: impl Into<String>,
    of: &S::Input,
) -> Result<StepSpec, Fault> {
    Ok(StepSpec::new(name, S::KIND, title, input::<S>(of)?))
}

fn overlay_step(disk: &JobDisk) -> StepName {
    format!("overlay/{}", disk.target).into()
}

fn commit_step(disk: &JobDisk) -> StepName {
    format!("commit/{}", disk.target).into()
}

fn copy_step(file: &FileToCopy) -> StepName {
    format!("copy/{}", file.name.as_str()).into()
}

impl Builder<'_> {
    pub(super) async fn build(&self, seen: &Observation, choice: &Choice) -> Result<Plan, Fault> {
        check_target(self.places, &self.options.target)?;
        let (Some(persistent), Some(qemu)) = (&seen.persistent, &seen.qemu) else {
            return Err(Fault::permanent(
                codes::DOMAIN_NOT_RUNNING,
                "plan the backup",
                &seen.domain.name,
                "it does not run",
            ));
        };
        let (disks, files, chains) = self.images(choice).await?;
        let parent = self.options.target.join(folder::of_domain(&seen.domain.name).as_str());
        let name = folder::of_backup(Timestamp::now(), self.job).as_str().to_owned();
        let folder = FolderInput { parent, name };
        let guest_memory = seen.live.as_ref().map_or(persistent.devices.memory, |live| live.devices.memory);
        let memory = self.memory(guest_memory, &folder);
        let freeze = memory.is_none()
            && self.options.freeze != FreezePolicy::Never
            && (persistent.devices.agent || self.options.freeze == FreezePolicy::Required);
        let common = Common {
            domain: seen.domain.clone(),
            disks,
            files,
            chains,
            folder,
            instance: qemu.instance.clone(),
            definition: persistent.xml.clone(),
            memory,
            freeze,
        };
        self.room(&common, guest_memory).await?;
        let facts = Facts {
            domain: seen.domain.clone(),
            store: self.settings.store.clone(),
            instance: qemu.instance.clone(),
            definition: persistent.bare.clone(),
            running: seen.state == RunState::Running,
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
        self.preparations(&common, &mut steps)?;
        self.act(&common, &mut steps)?;
        self.backup(&common, seen, choice, &mut steps).await?;
        self.way_back(&common, &mut steps)?;
        phases::arrange(&mut steps, self.options.waits.as_ref())?;
        let what = if common.memory.is_some() { "with memory" } else { "of its disks" };
        let facts = serde_json::to_value(facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the backup", &seen.domain.name, e))?;
        Plan::new(
            NAME,
            VERSION,
            format!("live backup of {} {what}", seen.domain.name),
            steps,
            Some("publish".into()),
            facts,
        )
        .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the backup", &seen.domain.name, e))
    }

    /// The disks of the job and the files that make them up.
    async fn images(
        &self,
        choice: &Choice,
    ) -> Result<(Vec<JobDisk>, Vec<FileToCopy>, Vec<Vec<usize>>), Fault> {
        let wanted: Vec<_> =
            choice.disks.iter().map(|disk| (disk.disk.target.clone(), disk.chain.clone())).collect();
        let job = self.job;
        let looked = tokio::task::spawn_blocking(move || {
            let mut disks = Vec::new();
            let mut elements = Vec::new();
            for (target, layers) in &wanted {
                let chain = chain::from_layers(layers.iter().map(|l| (l.path.as_path(), l.format.as_str())))
                    .map_err(|e| (target.to_string(), e.to_string()))?;
                let (Some(base), Some(top)) = (layers.first(), chain.first()) else {
                    return Err((target.to_string(), "it has no image".to_owned()));
                };
                let overlay = overlay_path(&base.path, job, target);
                if overlay.symlink_metadata().is_ok() {
                    return Err((target.to_string(), format!("{} exists already", overlay.display())));
                }
                disks.push(JobDisk {
                    target: target.clone(),
                    base: base.clone(),
                    base_id: FileId { dev: top.identity.dev, ino: top.identity.ino },
                    virtual_size: top.virtual_size,
                    overlay,
                });
                elements.push((target.0.clone(), chain));
            }
            let (files, chains) = chain::lay_out(elements.iter().map(|(t, c)| (t.as_str(), c.as_slice())));
            Ok((disks, files, chains))
        })
        .await;
        match looked {
            Ok(Ok(found)) => Ok(found),
            Ok(Err((target, why))) => {
                Err(Fault::permanent(codes::CHAIN_UNREADABLE, "read the images of the disk", target, why)
                    .remedy("qemu-img info -U --backing-chain IMAGE shows what is there"))
            }
            Err(e) => {
                Err(Fault::permanent(Code::UNDEFINED, "read the images of the domain", String::new(), e))
            }
        }
    }

    fn memory(&self, guest: u64, folder: &FolderInput) -> Option<MemoryInput> {
        let asked = self.options.memory.as_ref()?;
        let mut limits = MemoryLimits::for_memory(guest, asked.if_slow);
        limits.bytes = asked.bytes.unwrap_or(limits.bytes);
        limits.seconds = asked.seconds.unwrap_or(limits.seconds);
        Some(MemoryInput { file: folder.path().join(folder::MEMORY), limits })
    }

    fn preparations(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let mark = MarkInput { domain: common.domain.clone(), store: self.settings.store.clone() };
        steps.push(
            step::<Mark>("mark", "reserve the domain", &mark)?
                .check_facts()
                .undo(Undo { retry: PATIENTLY, deadline: None })
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
        for disk in &common.disks {
            let of = OverlayInput { domain: common.domain.clone(), disk: disk.clone() };
            steps.push(
                step::<CreateOverlay>(
                    overlay_step(disk),
                    format!("create the overlay of {}", disk.target),
                    &of,
                )?
                .after("mark")
                .undo(Undo { retry: PATIENTLY, deadline: None })
                .deadline(Millis::secs(180)),
            );
        }
        let switch = SwitchInput {
            domain: common.domain.clone(),
            definition: common.definition.clone(),
            disks: common.disks.clone(),
        };
        steps.push(
            step::<SwitchDefinition>(SWITCH, "let the definition name the overlays", &switch)?
                .after_all(common.disks.iter().map(overlay_step))
                .critical()
                .undo(Undo { retry: PATIENTLY, deadline: None })
                .deadline(Millis::secs(180)),
        );
        Ok(())
    }

    fn act(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let mut before = vec![StepName::from(SWITCH), StepName::from("prepare")];
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
            instance: common.instance.clone(),
            disks: common.disks.clone(),
            memory: common.memory.clone(),
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
                taken: TAKE.into(),
            };
            let title = format!("copy {} ({})", file.source.display(), bytes(file.data_bytes));
            steps.push(
                step::<CopyImage>(copy_step(file), title, &of)?
                    .after(TAKE)
                    .undoable()
                    .stall(Millis::secs(600)),
            );
            before.push(copy_step(file));
        }
        if common.memory.is_some() {
            let of = SealInput { folder: common.folder.path(), taken: TAKE.into() };
            steps.push(
                step::<SealMemory>("memory", "check the memory image", &of)?
                    .after(TAKE)
                    .stall(Millis::secs(600)),
            );
            before.push("memory".into());
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
            warnings: choice.warnings.clone(),
            taken: TAKE.into(),
            frozen: common.freeze.then(|| "freeze".into()),
            sealed: common.memory.is_some().then(|| "memory".into()),
        }
    }

    fn way_back(&self, common: &Common, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        for disk in &common.disks {
            let of = CommitInput {
                domain: common.domain.clone(),
                disk: disk.clone(),
                instance: common.instance.clone(),
                bandwidth: self.options.merge_bandwidth,
            };
            steps.push(
                step::<CommitOverlay>(
                    commit_step(disk),
                    format!("commit the overlay of {}", disk.target),
                    &of,
                )?
                .after("publish")
                .closes(SWITCH)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK)
                .stall(Millis::secs(900)),
            );
        }
        let pivot = PivotInput {
            domain: common.domain.clone(),
            store: self.settings.store.clone(),
            definition: common.definition.clone(),
            disks: common.disks.clone(),
            instance: common.instance.clone(),
            bandwidth: self.options.merge_bandwidth,
        };
        steps.push(
            step::<Pivot>("pivot", "bring the domain back to its images", &pivot)?
                .after_all(common.disks.iter().map(commit_step))
                .closes(SWITCH)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        let tidy = TidyInput {
            domain: common.domain.clone(),
            disks: common.disks.iter().map(|disk| (disk.clone(), overlay_step(disk))).collect(),
            proof: "pivot".into(),
        };
        steps.push(
            step::<Tidy>("tidy", "remove the overlays", &tidy)?
                .after("pivot")
                .closes(SWITCH)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        let mark = MarkInput { domain: common.domain.clone(), store: self.settings.store.clone() };
        steps.push(
            step::<Unmark>("unmark", "release the domain", &mark)?
                .after("tidy")
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        Ok(())
    }
}

//! The recipe: from a backup and a name to a plan.

use std::path::PathBuf;

use async_trait::async_trait;
use serde_json::Value;
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{
    Code, Fault, Millis, Outputs, Plan, PlanContext, Registry, StepName, StepSpec, Workflow,
};

use super::check::{self, Facts};
use super::define::{DefineDomain, DefineInput};
use super::fetch::Wanted;
use super::folder::{PlaceInput, RestoreFolder};
use super::identity::{NewDomain, StoredDefinition};
use super::image::{ImageInput, RestoreImage};
use super::layout::{Layout, lay_out};
use super::machine::{self, MachineState, RestoreTpm, RestoreVariables, VariablesInput};
use super::memory::{MemoryImageInput, RestoreMemory};
use super::options::{RestoreOptions, RestoreSettings, Then};
use super::resume::{ResumeDomain, ResumeInput};
use super::rights;
use super::settle::{SettleDomain, SettleInput};
use super::start::{StartDomain, StartInput};
use crate::codes;
use crate::hypervisor::{DomainId, DomainRef};
use crate::manifest::{Consistency, Manifest};
use crate::recipe::{self, PATIENT_LOOK, PATIENTLY, patient, step};
use crate::snapshot::{Places, World};
use crate::text::bytes;

/// The name of the workflow.
pub const NAME: &str = "restore";
/// The version of the recipe.
pub const VERSION: u32 = 1;

/// The recipe. The subject of its jobs is the *new* domain: its UUID is made by whoever asks, at random.
#[derive(Debug)]
pub struct Restore {
    world: World,
    places: Places,
    settings: RestoreSettings,
}

impl Restore {
    /// With this world, these places and settings.
    #[must_use]
    pub fn new(world: World, places: Places, settings: RestoreSettings) -> Self {
        Self { world, places, settings }
    }

    /// Makes the workflow and all its steps known.
    #[must_use]
    pub fn register(self, registry: Registry) -> Registry {
        let (world, places) = (self.world.clone(), self.places.clone());
        registry
            .step(RestoreFolder(places.clone()))
            .step(RestoreImage(places.clone()))
            .step(RestoreVariables(places.clone()))
            .step(RestoreTpm { world: world.clone(), places: places.clone() })
            .step(RestoreMemory { world: world.clone(), places: places.clone() })
            .step(DefineDomain { world: world.clone(), places: places.clone() })
            .step(StartDomain(world.clone()))
            .step(ResumeDomain(world.clone()))
            .step(SettleDomain { world, places })
            .workflow(self)
    }
}

pub(crate) fn image_step(image: &ImageInput) -> StepName {
    format!("image/{}", image.name).into()
}

/// Everything that the steps have in common.
struct Build {
    options: RestoreOptions,
    new: NewDomain,
    places: Vec<PlaceInput>,
    images: Vec<ImageInput>,
    definition: StoredDefinition,
    memory: Option<MemoryImageInput>,
    state: MachineState,
    then: Then,
    notes: Vec<String>,
    watch_ms: u64,
}

#[async_trait]
impl Workflow for Restore {
    fn name(&self) -> WorkflowName {
        WorkflowName::from(NAME)
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let options: RestoreOptions = serde_json::from_value(cx.request.options.clone())
            .map_err(|e| Fault::permanent(codes::USAGE, "understand the options of the restore", "", e))?;
        let id = cx.request.subject.id.parse().map(DomainId);
        let id = id.map_err(|e| {
            Fault::permanent(codes::USAGE, "read the new domain's UUID", &cx.request.subject.id, e)
        })?;
        let domain = DomainRef { id, name: options.name.clone() };

        let stored = check::read_backup(&self.places, &options.backup, options.outside).await?;
        let manifest = &stored.manifest;
        let (definition, parsed) = check::definition(&self.world, &self.places, &options, manifest).await?;
        check::harmless(&options, &parsed, manifest)?;
        check::name(&self.world, &domain).await?;
        let saved = manifest.memory.saved().filter(|_| !options.cold);
        if let Some(saved) = saved {
            check::memory(&self.world, &self.places, &options, manifest, saved).await?;
        }
        let original = check::original_exists(&self.world, manifest).await?;
        let (without, mut notes) = check::others(&parsed, manifest).await?;
        let Layout { mut images, disks } = lay_out(manifest, &options)?;
        let links_down = original && !options.connect;
        let beside = disks.first().and_then(|disk| disk.path.parent());
        let mut state = machine::of(manifest, &parsed, &options, &domain, beside)?;
        notes.append(&mut state.notes);
        let trusted = !options.outside || options.trusted;
        let whose =
            rights::choose(self.settings.rights, manifest, trusted, &mut images, state.variables.as_mut());
        notes.extend(whose.await?);
        let new = NewDomain {
            domain,
            disks,
            without,
            links_down,
            same: false,
            nvram: state.variables.as_ref().map(VariablesInput::path),
        };
        let memory = saved.and_then(|saved| memory_input(manifest, saved, &options, &new));
        let memory_room = memory.as_ref().map(|memory| (memory.folder.clone(), false, memory.wanted.size));
        let places = check::room(&self.places, self.settings, &images, memory_room).await?;
        notes.extend(advice(manifest, &new, memory.is_some(), parsed.devices.network_cards));
        if manifest.autostart == Some(true) && !options.autostart {
            let id = new.domain.id;
            notes.push(format!("The original starts with the host, this one does not: virsh autostart {id}"));
        }

        let facts = Facts {
            backup: options.backup.clone(),
            outside: options.outside,
            manifest: stored.hash,
            domain: new.domain.clone(),
            free: images.iter().map(ImageInput::path).chain(new.nvram.clone()).collect(),
        };
        let facts = serde_json::to_value(facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the restore", &options.name, e))?;
        let then = match (options.then, memory.is_some()) {
            (Then::Default, true) => Then::Paused,
            (then, _) => then,
        };
        let watch_ms = self.settings.watch_ms;
        Build { options, new, places, images, definition, memory, state, then, notes, watch_ms }
            .plan(manifest, facts)
    }

    async fn check_facts(&self, plan: &Plan, _: &StepName, _: &Outputs) -> Result<Option<String>, Fault> {
        let facts: Facts = recipe::facts(plan)?;
        facts.differ(&self.world, &self.places).await
    }
}

/// The memory goes beside the first disk.
fn memory_input(
    manifest: &Manifest,
    saved: &crate::manifest::SavedMemory,
    options: &RestoreOptions,
    new: &NewDomain,
) -> Option<MemoryImageInput> {
    let entry = manifest.file(&saved.file)?;
    let folder = new.disks.first().and_then(|disk| disk.path.parent()).map(PathBuf::from)?;
    Some(MemoryImageInput {
        wanted: Wanted {
            backup: options.backup.clone(),
            outside: options.outside,
            name: entry.name.clone(),
            size: entry.size,
            blake3: entry.blake3,
        },
        folder,
        own: false,
        new: new.clone(),
        bandwidth: options.bandwidth,
    })
}

/// What the owner of the new domain must know.
fn advice(manifest: &Manifest, new: &NewDomain, with_memory: bool, network_cards: usize) -> Vec<String> {
    let mut notes = Vec::new();
    let (old, at) = (&manifest.domain.name, manifest.point_in_time);
    if with_memory {
        notes.push(format!(
            "The guest goes on as {old} was at {at}. It still believes in its old identity: host name, addresses \
             (also its network cards' old hardware addresses), machine id, keys, open connections; and its clock \
             stands at that instant until it is set."
        ));
    } else {
        notes.push(format!(
            "The disks are those of {old} at {at}: host name, fixed addresses, machine id and keys are the original's."
        ));
        match (&manifest.memory, manifest.consistency) {
            (crate::manifest::Memory::Saved(_), _) => notes.push(
                "The memory in the backup was left out: the guest boots as after a power cut.".to_owned(),
            ),
            (_, Consistency::Crash | Consistency::MemoryAndDisks) => {
                notes.push("The guest boots as after a power cut.".to_owned());
            }
            (_, Consistency::Quiesced | Consistency::Off) => {}
        }
    }
    if new.links_down && network_cards > 0 {
        notes.push(format!(
            "Its network links are down, because the original is still defined here. To put a cable in: \
             virsh domif-setlink {} ADDRESS up",
            new.domain.id
        ));
    }
    notes.extend(manifest.warnings.iter().map(|warning| format!("From the backup: {warning}")));
    notes
}

impl Build {
    fn plan(&self, manifest: &Manifest, facts: Value) -> Result<Plan, Fault> {
        let mut steps = self.files()?;
        self.domain(&mut steps)?;
        let runs = self.then == Then::Running;
        let what = if self.memory.is_some() { "with its memory" } else { "cold" };
        let title = format!("restore {} as {} {what}", manifest.domain.name, self.options.name);
        Plan::new(NAME, VERSION, title, steps, runs.then(|| "resume".into()), facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the restore", &self.options.name, e))
    }

    fn folder_step(&self, folder: &std::path::Path) -> Option<StepName> {
        let at = self.places.iter().position(|place| place.folder == folder)?;
        Some(format!("folder/{at}").into())
    }

    fn files(&self) -> Result<Vec<StepSpec>, Fault> {
        let mut steps = Vec::new();
        for (at, place) in self.places.iter().enumerate() {
            let title = format!("make sure of {}", place.folder.display());
            let name: StepName = format!("folder/{at}").into();
            let made = step::<RestoreFolder>(name, title, place)?.undoable().deadline(Millis::secs(60));
            // The facts are asserted once, before anything is touched.
            steps.push(if at == 0 { made.check_facts() } else { made.after("folder/0") });
        }
        for image in &self.images {
            let title = format!("restore {} ({})", image.path().display(), bytes(image.wanted.size));
            steps.push(
                step::<RestoreImage>(image_step(image), title, image)?
                    .after_all(self.folder_step(&image.folder))
                    .undo(patient())
                    .stall(Millis::secs(600)),
            );
        }
        if let Some(variables) = &self.state.variables {
            let title = format!("restore {} (firmware variables)", variables.path().display());
            steps.push(
                step::<RestoreVariables>("variables", title, variables)?
                    .after_all(self.folder_step(&variables.folder))
                    .undo(patient())
                    .deadline(Millis::secs(120)),
            );
        }
        if let Some(tpm) = &self.state.tpm {
            steps.push(
                step::<RestoreTpm>("tpm", "restore the TPM's state", tpm)?
                    .after("folder/0")
                    .undo(patient())
                    .deadline(Millis::secs(120)),
            );
        }
        if let Some(memory) = &self.memory {
            let title = format!("restore the memory ({})", bytes(memory.wanted.size));
            steps.push(
                step::<RestoreMemory>("memory", title, memory)?
                    .after_all(self.folder_step(&memory.folder))
                    .undo(patient())
                    .stall(Millis::secs(600)),
            );
        }
        Ok(steps)
    }

    fn domain(&self, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let name = &self.options.name;
        let before: Vec<StepName> = steps.iter().map(|step| step.name.clone()).collect();
        let define = DefineInput { definition: self.definition.clone(), new: self.new.clone() };
        steps.push(
            step::<DefineDomain>("define", format!("define {name}"), &define)?
                .after_all(before)
                .undo(patient())
                .deadline(Millis::secs(180)),
        );
        let mut last: StepName = "define".into();
        if self.then != Then::Default {
            let start = StartInput {
                new: self.new.clone(),
                images: self.images.iter().map(image_step).collect(),
                memory: self.memory.as_ref().map(|_| "memory".into()),
            };
            let title = match &self.memory {
                Some(_) => format!("give {name} its memory, paused"),
                None => format!("start {name}, paused"),
            };
            steps.push(
                step::<StartDomain>("start", title, &start)?
                    .after(last)
                    .undo(patient())
                    .retry(Retry { attempts: 2, ..Retry::default() })
                    .probing(PATIENT_LOOK),
            );
            last = "start".into();
        }
        if self.then == Then::Running {
            let resume = ResumeInput {
                new: self.new.clone(),
                images: self.images.iter().map(ImageInput::path).collect(),
                with_memory: self.memory.is_some(),
            };
            steps.push(
                step::<ResumeDomain>("resume", format!("let {name} run"), &resume)?
                    .after(last)
                    .probing(PATIENT_LOOK)
                    .deadline(Millis::secs(180)),
            );
            last = "resume".into();
        }
        let settle = SettleInput {
            new: self.new.clone(),
            memory: self.memory.as_ref().map(|m| (m.folder.clone(), m.wanted.name.clone())),
            defined: "define".into(),
            resumed: (self.then == Then::Running).then(|| "resume".into()),
            autostart: self.options.autostart,
            notes: self.notes.clone(),
            watch_ms: self.watch_ms,
        };
        steps.push(
            step::<SettleDomain>("settle", format!("see whether {name} stands"), &settle)?
                .after(last)
                .retry(PATIENTLY),
        );
        Ok(())
    }
}

//! The recipe: from a backup and a name to a plan.

use std::path::PathBuf;

use async_trait::async_trait;
use serde_json::Value;
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::{
    Code, Fault, Millis, Outputs, Plan, PlanContext, Registry, StepName, StepSpec, Workflow,
};

use super::check::{self, Facts};
use super::define::DefineDomain;
use super::ending::{self, Ending};
use super::fetch::Wanted;
use super::folder::{PlaceInput, RestoreFolder};
use super::identity::{NewDomain, Original, StoredDefinition};
use super::image::{ImageInput, RestoreImage};
use super::layout::{Layout, lay_out};
use super::machine::{self, MachineState, RestoreTpm, RestoreVariables, VariablesInput};
use super::memory::{MemoryImageInput, RestoreMemory};
use super::options::{RestoreOptions, RestoreSettings, Then};
use super::resume::ResumeDomain;
use super::rights;
use super::settle::SettleDomain;
use super::start::StartDomain;
use crate::codes;
use crate::hypervisor::{DomainId, DomainRef};
use crate::manifest::{Consistency, Manifest};
use crate::recipe::{self, patient, step};
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
        let targets = check::targets(manifest);
        let held = check::holds(manifest, &targets);
        let original = check::original_exists(&self.world, held).await?;
        let (without, mut notes) = check::others(&parsed, held).await?;
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
        notes.extend(ending::autostart(manifest.autostart == Some(true), options.autostart, &new));

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
        notes.push(ending::whose_disks(old, at));
        match (&manifest.memory, manifest.consistency) {
            (crate::manifest::Memory::Saved(_), _) => notes.push(
                "The memory in the backup was left out: the guest boots as after a power cut.".to_owned(),
            ),
            (_, Consistency::Crash | Consistency::MemoryAndDisks) => notes.push(ending::POWER_CUT.to_owned()),
            (_, Consistency::Quiesced | Consistency::Off) => {}
        }
    }
    notes.extend(ending::links(new, network_cards));
    notes.extend(manifest.warnings.iter().map(|warning| format!("From the backup: {warning}")));
    notes
}

impl Build {
    fn plan(&self, manifest: &Manifest, facts: Value) -> Result<Plan, Fault> {
        let mut steps = self.files()?;
        let memory = self.memory.as_ref();
        let ending = Ending {
            definition: Original::Stored(self.definition.clone()),
            new: &self.new,
            images: self.images.iter().map(image_step).collect(),
            others: Vec::new(),
            files: self.images.iter().map(ImageInput::path).collect(),
            memory: memory.map(|memory| (memory.folder.clone(), memory.wanted.name.clone())),
            then: self.then,
            autostart: self.options.autostart,
            notes: &self.notes,
            watch_ms: self.watch_ms,
        };
        let point = ending.add(&mut steps)?;
        let what = if memory.is_some() { "with its memory" } else { "cold" };
        let title = format!("restore {} as {} {what}", manifest.domain.name, self.options.name);
        Plan::new(NAME, VERSION, title, steps, point, facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the restore", &self.options.name, e))
    }

    fn files(&self) -> Result<Vec<StepSpec>, Fault> {
        let mut steps = ending::folders(&self.places, None)?;
        for image in &self.images {
            let title = format!("restore {} ({})", image.path().display(), bytes(image.wanted.size));
            steps.push(
                step::<RestoreImage>(image_step(image), title, image)?
                    .after_all(ending::folder(&self.places, &image.folder))
                    .undo(patient())
                    .stall(Millis::secs(600)),
            );
        }
        if let Some(variables) = &self.state.variables {
            let title = format!("restore {} (firmware variables)", variables.path().display());
            steps.push(
                step::<RestoreVariables>("variables", title, variables)?
                    .after_all(ending::folder(&self.places, &variables.folder))
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
                    .after_all(ending::folder(&self.places, &memory.folder))
                    .undo(patient())
                    .stall(Millis::secs(600)),
            );
        }
        Ok(steps)
    }
}

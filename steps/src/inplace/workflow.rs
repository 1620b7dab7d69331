//! The recipe of a restore in place: from a backup to a plan.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::Deserialize;
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::{Code, Fault, Outputs, Plan, PlanContext, Registry, StepName, Workflow};

use super::begin::{BeginMachine, MemoryFrom};
use super::check::{self, DOING, Facts};
use super::kept::{self, Was};
use super::options::{InPlaceOptions, InPlaceSettings};
use super::plan::{Exchange, Present};
use super::state::FromBackup;
use super::swap::{Machine, SwapDefinition, files};
use super::{aside, keep, rest, seen};
use crate::codes;
use crate::hypervisor::{Definition, DomainRef, Observation};
use crate::manifest::{Consistency, Manifest, Memory};
use crate::recipe;
use crate::restore::check as backup;
use crate::restore::fetch::Wanted;
use crate::restore::identity::{NewDisk, NewDomain, StoredDefinition};
use crate::restore::image::ImageInput;
use crate::restore::layout::lay_out;
use crate::restore::memory::MemoryImageInput;
use crate::restore::rights;
use crate::restore::{RestoreOptions, Then};
use crate::snapshot::{Places, World};

/// The name of the workflow.
pub const NAME: &str = "restore-in-place";
/// The version of the recipe.
pub const VERSION: u32 = 1;

/// The recipe. The subject of its jobs is the domain.
#[derive(Debug)]
pub struct RestoreInPlace {
    pub(super) world: World,
    pub(super) places: Places,
    pub(super) settings: InPlaceSettings,
}

impl RestoreInPlace {
    /// With this world, these places and settings.
    #[must_use]
    pub fn new(world: World, places: Places, settings: InPlaceSettings) -> Self {
        Self { world, places, settings }
    }

    /// Makes the workflows of this folder and all their steps known, but for those that a restore to a new domain has
    /// as well.
    #[must_use]
    pub fn register(self, registry: Registry) -> Registry {
        let (world, places) = (self.world.clone(), self.places.clone());
        let undo = super::undo::RestoreUndo(Self::new(world.clone(), places.clone(), self.settings.clone()));
        let discard =
            super::discard::RestoreDiscard(Self::new(world.clone(), places.clone(), self.settings.clone()));
        let step = super::discard::Discard {
            world: world.clone(),
            places: places.clone(),
            restored: self.settings.restored.clone(),
        };
        registry
            .step(keep::KeepAside(places.clone()))
            .step(keep::ForgetKept(places.clone()))
            .step(rest::RestDomain(world.clone()))
            .step(aside::SetAside { world: world.clone(), places: places.clone() })
            .step(aside::BringBack { world: world.clone(), places: places.clone() })
            .step(SwapDefinition(world.clone()))
            .step(BeginMachine(world.clone()))
            .step(super::tpm::ExchangeTpm { world: world.clone(), places: places.clone() })
            .step(seen::SeeRunning { world, places })
            .step(seen::Arrive)
            .step(step)
            .workflow(undo)
            .workflow(discard)
            .workflow(self)
    }
}

pub(super) fn misread(object: &str, e: impl std::fmt::Display) -> Fault {
    Fault::permanent(codes::USAGE, "understand the options", object, e)
}

pub(super) async fn differ(
    world: &World,
    places: &Places,
    plan: &Plan,
    before: &StepName,
) -> Result<Option<String>, Fault> {
    let facts: Facts = recipe::facts(plan)?;
    let first = plan.steps.first().is_some_and(|step| step.name == *before);
    facts.differ(world, places, !first).await
}

/// Where the new images go, and what of the definition comes along.
struct Chosen {
    /// The backup, with only the disks that are restored.
    manifest: Manifest,
    /// Where each new top image goes, and whether that is a folder of the domain's own.
    tops: BTreeMap<String, PathBuf>,
    own: bool,
}

impl RestoreInPlace {
    fn choose(
        &self,
        cx: &PlanContext,
        options: &InPlaceOptions,
        manifest: &Manifest,
        stored: &Definition,
        present: Option<&Definition>,
        domain: &DomainRef,
    ) -> Result<Chosen, Fault> {
        let mut chosen = manifest.clone();
        for target in &options.disks {
            if manifest.disk(target).is_none() {
                let all: Vec<_> = manifest.disks.iter().map(|disk| disk.target.as_str()).collect();
                let cause = format!("the backup holds {}", all.join(", "));
                return Err(Fault::permanent(codes::NO_SUCH_DISK, DOING, target, cause));
            }
        }
        if !options.disks.is_empty() {
            chosen.disks.retain(|disk| options.disks.contains(&disk.target));
        }
        let mut tops = BTreeMap::new();
        for disk in &chosen.disks {
            let format = disk.chain.first().and_then(|name| manifest.file(name)).and_then(|file| file.format);
            let format = format.map_or("img", crate::image::qcow2::Format::as_str);
            // A disk that only the backup's definition has goes where that says.
            let there =
                present.filter(|d| !options.definition || d.disk(&disk.target.as_str().into()).is_some());
            let path = match there {
                Some(definition) => {
                    let old = check::file_of(definition, &disk.target, domain)?;
                    old.with_file_name(kept::new_name(old, cx.job, format))
                }
                None => check::file_of(stored, &disk.target, domain)?.to_owned(),
            };
            let path = match (&options.folder, path.file_name()) {
                (Some(folder), Some(name)) => folder.join(name),
                _ => path,
            };
            tops.insert(disk.target.clone(), path);
        }
        // A definition that a stranger wrote does not choose where files are made.
        let own = options.folder.is_none() && (present.is_some() && !options.definition || !options.outside);
        Ok(Chosen { manifest: chosen, tops, own })
    }

    /// What the present definition becomes, or the backup's with the same name.
    async fn definition(
        &self,
        options: &InPlaceOptions,
        stored: &StoredDefinition,
        present: Option<&Definition>,
        machine: &NewDomain,
    ) -> Result<Machine, Fault> {
        let name = &machine.domain.name;
        let text = match present {
            Some(definition) if !options.definition => definition.xml.clone(),
            _ => stored.read(&self.places).await?,
        };
        let fault = |e: crate::hypervisor::HvError| {
            e.fault(codes::CANNOT_READ_XML_FILE, "rewrite the definition", name)
        };
        let definition =
            self.world.hypervisor.rewrite_definition(&text, &machine.identity()).map_err(fault)?;
        let parsed = self.world.hypervisor.parse_definition(&definition).map_err(fault)?;
        Ok(Machine { definition, disks: files(&parsed) })
    }

    fn then(options: &InPlaceOptions, seen: Option<&Observation>, memory: bool) -> Then {
        let was = seen.map_or(Was::Off, |seen| Was::of(seen.state));
        match (options.then, was, memory) {
            (Then::Default, Was::Running, _) => Then::Running,
            (Then::Default, Was::Paused, _) | (Then::Default, Was::Off, true) => Then::Paused,
            (then, _, _) => then,
        }
    }
}

/// Where the first disk goes, and what else is a file of the machine.
fn first_folder(disks: &[NewDisk]) -> PathBuf {
    disks.first().and_then(|disk| disk.path.parent()).map(PathBuf::from).unwrap_or_default()
}

/// What the owner of the domain must know.
fn advice(manifest: &Manifest, present: Option<&Definition>, with_memory: bool) -> Vec<String> {
    let at = manifest.point_in_time;
    let mut notes = Vec::new();
    if with_memory {
        notes.push(format!(
            "The guest goes on as it was at {at}; its clock stands at that instant until it is set."
        ));
    } else {
        match (&manifest.memory, manifest.consistency) {
            (Memory::Saved(_), _) => notes.push(
                "The memory in the backup was left out: the guest boots as after a power cut.".to_owned(),
            ),
            (_, Consistency::Crash | Consistency::MemoryAndDisks) => {
                notes.push("The guest boots as after a power cut.".to_owned());
            }
            (_, Consistency::Quiesced | Consistency::Off) => {}
        }
    }
    for (target, _) in present.map(files).unwrap_or_default() {
        if manifest.disk(&target.0).is_none() {
            notes.push(format!("Disk {target} stays as it is now: it was not restored."));
        }
    }
    notes.extend(manifest.warnings.iter().map(|warning| format!("From the backup: {warning}")));
    notes
}

#[async_trait]
impl Workflow for RestoreInPlace {
    fn name(&self) -> WorkflowName {
        WorkflowName::from(NAME)
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let options = InPlaceOptions::deserialize(&cx.request.options).map_err(|e| misread("", e))?;
        let mut domain = check::subject(&cx.request.subject.id, &cx.request.subject.label)?;
        let stored = backup::read_backup(&self.places, &options.backup, options.outside).await?;
        let manifest = &stored.manifest;
        if manifest.domain.uuid != domain.id.0 {
            let cause = format!("it is one of {} ({})", manifest.domain.name, manifest.domain.uuid);
            let object = options.backup.display().to_string();
            return Err(Fault::permanent(
                codes::MANIFEST_MISMATCH,
                "restore the backup in place",
                object,
                cause,
            )
            .remedy("A backup comes back in place of the domain that it is of; elsewhere: `--as`"));
        }
        let seen = check::observe(&self.world, &domain).await?;
        match &seen {
            Some(seen) => domain.name.clone_from(&seen.domain.name),
            None => {
                domain.name.clone_from(&manifest.domain.name);
                backup::name(&self.world, &domain).await?;
            }
        }
        let asked = RestoreOptions {
            outside: options.outside,
            trusted: options.trusted,
            backup: options.backup.clone(),
            name: domain.name.clone(),
            folder: None,
            disks: BTreeMap::new(),
            cold: options.cold,
            then: options.then,
            connect: true,
            autostart: false,
            bandwidth: options.bandwidth,
        };
        let saved = manifest.memory.saved().filter(|_| !options.cold);
        if saved.is_some() && !options.disks.is_empty() && options.disks.len() < manifest.disks.len() {
            let cause = "memory fits only all disks of the same instant";
            return Err(misread("--disks", cause).remedy("Restore single disks with `--cold`"));
        }
        let (definition, parsed) = backup::definition(&self.world, &self.places, &asked, manifest).await?;
        let present = match &seen {
            Some(seen) => Some(check::present(&self.world, &self.settings.store, seen, options.rest).await?),
            None => None,
        };
        if let Some(saved) = saved {
            backup::memory(&self.world, &self.places, &asked, manifest, saved).await?;
        }
        let foreign = present.is_none() || options.definition;
        if foreign {
            backup::harmless(&asked, &parsed, manifest)?;
        }

        let chosen = self.choose(cx, &options, manifest, &parsed, present, &domain)?;
        let asked = RestoreOptions { disks: chosen.tops.clone(), ..asked };
        let mut layout = lay_out(&chosen.manifest, &asked)?;
        let from = FromBackup {
            manifest,
            stored: &parsed,
            present,
            base: present.filter(|_| !options.definition).unwrap_or(&parsed),
            domain: &domain,
            job: cx.job,
            backup: options.backup.clone(),
            outside: options.outside,
            folder: first_folder(&layout.disks),
            own: chosen.own,
            with_memory: saved.is_some(),
            whole: chosen.manifest.disks.len() == manifest.disks.len(),
        };
        let mut outside = from.state(&self.world).await?;
        let whose = rights::choose(
            self.settings.restore.rights,
            manifest,
            !options.outside || options.trusted,
            &mut layout.images,
            outside.variables.as_mut(),
        )
        .await?;
        for image in &mut layout.images {
            image.own = chosen.own;
        }
        let machine = NewDomain {
            domain: domain.clone(),
            disks: layout.disks,
            without: Vec::new(),
            links_down: false,
            same: true,
            nvram: outside.nvram.clone(),
        };
        let memory_image = saved.and_then(|saved| {
            let entry = manifest.file(&saved.file)?;
            let folder = first_folder(&machine.disks);
            Some(MemoryImageInput {
                wanted: Wanted {
                    backup: options.backup.clone(),
                    outside: options.outside,
                    name: entry.name.clone(),
                    size: entry.size,
                    blake3: entry.blake3,
                },
                folder,
                own: chosen.own,
                new: machine.clone(),
                bandwidth: options.bandwidth,
            })
        });
        let memory_room = memory_image.as_ref().map(|m| (m.folder.clone(), m.own, m.wanted.size));
        let places = backup::room(&self.places, self.settings.restore, &layout.images, memory_room).await?;
        let new = self.definition(&options, &definition, present, &machine).await?;

        let mut notes = advice(&chosen.manifest, present, memory_image.is_some());
        notes.extend(outside.notes);
        notes.extend(whose);
        let then = Self::then(&options, seen.as_ref(), memory_image.is_some());
        let setting_aside = match (&seen, present) {
            (Some(seen), Some(definition)) => {
                let kept = kept::folder_of(&self.settings.restored, cx.job);
                check::room_for_memory(&self.world, seen, options.rest, &self.settings.restored).await?;
                let machine = Machine { definition: definition.xml.clone(), disks: files(definition) };
                let (disks, missing) = check::disks(&machine, &new.disks).await?;
                notes.extend(missing);
                let because = format!("restore of backup {} of {}", manifest.backup, manifest.point_in_time);
                let (was, rest, variables) = (Was::of(seen.state), options.rest, outside.old);
                Some(Present { machine, disks, was, rest, kept, because, variables })
            }
            _ => None,
        };
        let facts = Facts {
            domain: domain.clone(),
            backup: Some((options.backup.clone(), options.outside, stored.hash)),
            present: present.map(|definition| (definition.bare.clone(), files(definition))),
            free: layout
                .images
                .iter()
                .map(ImageInput::path)
                .chain(outside.nvram)
                .chain(outside.tpm.iter().filter(|_| present.is_none()).map(|(folder, _)| folder.clone()))
                .collect(),
        };
        let facts = serde_json::to_value(facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &domain.name, e))?;
        let what = if memory_image.is_some() { "with its memory" } else { "cold" };
        Exchange {
            workflow: NAME,
            version: VERSION,
            title: format!("restore {} in place {what}", domain.name),
            domain,
            store: self.settings.store.clone(),
            agent: present.unwrap_or(&parsed).devices.agent,
            present: setting_aside,
            files: layout.images.iter().map(ImageInput::path).collect(),
            places,
            images: layout.images,
            variables: outside.variables,
            tpm: outside.tpm,
            memory: memory_image.as_ref().map(|_| MemoryFrom::Backup { step: "memory".into() }),
            memory_image,
            new,
            machine,
            back: None,
            then,
            notes,
            watch_ms: self.settings.restore.watch_ms,
        }
        .plan(facts)
    }

    async fn check_facts(
        &self,
        plan: &Plan,
        before: &StepName,
        _: &Outputs,
    ) -> Result<Option<String>, Fault> {
        differ(&self.world, &self.places, plan, before).await
    }
}

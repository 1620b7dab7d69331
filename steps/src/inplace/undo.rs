//! The recipe of the way back: a machine that is kept aside takes the place of the one that is there.
//!
//! It is the same exchange as a restore in place, with the images, the memory and the definition of the machine that was
//! kept. The one that is there is set aside in turn, under this job: an undo can be undone.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::Deserialize;
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::{Code, Fault, Outputs, Plan, PlanContext, StepName, Workflow};

use super::aside::BackInput;
use super::begin::{MemoryFrom, misfit};
use super::check::{self, DOING, Facts};
use super::kept::{self, DEFINITION, Kept, MEMORY, Was, blocking, fixed};
use super::options::UndoOptions;
use super::plan::{Exchange, Present};
use super::state;
use super::swap::{Machine, files};
use super::tpm::TpmFrom;
use super::workflow::{RestoreInPlace, differ, misread};
use crate::codes;
use crate::hypervisor::DomainRef;
use crate::image::copy::Identity;
use crate::image::qcow2::Format;
use crate::restore::Then;
use crate::restore::identity::{NewDisk, NewDomain};

/// The name of the workflow.
pub const NAME: &str = "restore-undo";
/// The version of the recipe.
pub const VERSION: u32 = 1;

/// The recipe. The subject of its jobs is the domain.
#[derive(Debug)]
pub struct RestoreUndo(pub RestoreInPlace);

impl RestoreUndo {
    /// The definition of the machine that is kept.
    async fn definition(&self, kept: &Kept, folder: &Path) -> Result<String, Fault> {
        let doing = "read the definition of the machine that is kept";
        let path = folder.to_owned();
        let text = blocking(&self.0.places, codes::CANNOT_READ_XML_FILE, doing, folder, move |places| {
            kept::read(&places.roots.open_folder(&path)?, &fixed(DEFINITION))
        })
        .await?;
        if kept.definition != blake3::hash(text.as_bytes()).into() {
            let cause = "it is not the one that was kept";
            return Err(Fault::permanent(
                codes::MANIFEST_MISMATCH,
                doing,
                folder.display().to_string(),
                cause,
            ));
        }
        Ok(text)
    }
}

/// All images of the machine are still there, and are the same files.
fn all_there(kept: &Kept) -> Result<(), Fault> {
    for disk in &kept.disks {
        if !Identity::at(&disk.path).is_ok_and(|now| now.same_file(&disk.identity)) {
            let cause = "it is gone, or another file bears its name";
            let object = disk.path.display().to_string();
            return Err(Fault::permanent(codes::MISSING_NECESSARY_FILES, DOING, object, cause));
        }
    }
    // Without them libvirt would make new ones of a template, and the guest would not find its boot entries.
    if let Some(variables) = kept.variables.as_ref().filter(|variables| variables.replaced)
        && !Identity::at(&variables.path).is_ok_and(|now| now.same_file(&variables.identity))
    {
        let cause = "the file of its firmware variables is gone, or another file bears its name";
        let object = variables.path.display().to_string();
        return Err(Fault::permanent(codes::MISSING_NECESSARY_FILES, DOING, object, cause));
    }
    Ok(())
}

fn then(options: &UndoOptions, kept: &Kept) -> Then {
    match (options.then, kept.was) {
        (Then::Default, Was::Running) => Then::Running,
        (Then::Default, Was::Paused) => Then::Paused,
        (then, _) => then,
    }
}

#[async_trait]
impl Workflow for RestoreUndo {
    fn name(&self) -> WorkflowName {
        WorkflowName::from(NAME)
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let RestoreInPlace { world, places, settings } = &self.0;
        let options = UndoOptions::deserialize(&cx.request.options).map_err(|e| misread("", e))?;
        let mut domain = check::subject(&cx.request.subject.id, &cx.request.subject.label)?;
        let folder = kept::folder_of(&settings.restored, options.job);
        let kept = kept::find(places, &folder).await?;
        if kept.domain.id != domain.id {
            return Err(misread(&options.job.to_string(), "that machine is of another domain"));
        }
        all_there(&kept)?;
        let text = self.definition(&kept, &folder).await?;
        let fault =
            |e: crate::hypervisor::HvError| e.fault(codes::CANNOT_READ_XML_FILE, DOING, &kept.domain.name);
        let parsed = world.hypervisor.parse_definition(&text).map_err(fault)?;
        let new = Machine { definition: text, disks: files(&parsed) };

        let mut notes = Vec::new();
        let seen = check::observe(world, &domain).await?;
        let mut old = Vec::new();
        let there = seen.as_ref().and_then(|seen| seen.persistent.as_ref());
        let own = state::folders(world, &domain, &[Some(&parsed), there]).await?;
        let back_variables = own
            .as_ref()
            .zip(parsed.devices.nvram.as_ref())
            .map(|(own, nvram)| own.variables(nvram, &domain.name));
        let tpm = own
            .as_ref()
            .zip(kept.tpm.clone())
            .map(|(own, files)| (own.tpm(&domain.id), TpmFrom::Kept { kept: folder.clone(), files }));
        let present = match &seen {
            Some(seen) => {
                domain.name.clone_from(&seen.domain.name);
                let definition = check::present(world, &settings.store, seen, options.rest).await?;
                check::room_for_memory(world, seen, options.rest, &settings.restored).await?;
                old = files(definition);
                let machine = Machine { definition: definition.xml.clone(), disks: old.clone() };
                let (disks, missing) = check::disks(&machine, &new.disks).await?;
                notes.extend(missing);
                let because = format!("undo of job {}", options.job);
                let aside = kept::folder_of(&settings.restored, cx.job);
                let (was, rest) = (Was::of(seen.state), options.rest);
                let variables =
                    state::variables_of(definition, &domain, own.as_ref(), back_variables.as_deref())?;
                Some((definition, Present { machine, disks, was, rest, kept: aside, because, variables }))
            }
            None => None,
        };
        let exchanged = check::exchanged(&old, &new.disks);
        if exchanged.is_empty() {
            return Err(Fault::permanent(
                codes::INVALID_STATE,
                DOING,
                &domain.name,
                "its definition names the disks of that machine already",
            ));
        }
        let memory = kept.memory && !options.cold;
        let memory_path = folder.join(MEMORY);
        let unfit = if memory { misfit(&memory_path, &kept.disks) } else { None };
        if let Some(why) = &unfit {
            notes
                .push(format!("Its memory was left out, because it does not fit its disks any more: {why}."));
        }
        let memory = (memory && unfit.is_none() && then(&options, &kept) != Then::Default)
            .then(|| MemoryFrom::Kept { path: memory_path, disks: kept.disks.clone() });
        let back = BackInput {
            domain: domain.clone(),
            kept: folder,
            disks: kept.disks.iter().map(|disk| disk.path.clone()).collect(),
        };
        let facts = Facts {
            domain: domain.clone(),
            backup: None,
            present: present.as_ref().map(|(definition, _)| (definition.bare.clone(), old)),
            free: Vec::new(),
        };
        let facts = serde_json::to_value(facts)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &domain.name, e))?;
        let chain = |path: &PathBuf| {
            let disk = kept.disks.iter().find(|disk| disk.path == *path);
            disk.map_or_else(|| vec![path.clone()], |disk| disk.chain.clone())
        };
        Exchange {
            workflow: NAME,
            version: VERSION,
            title: format!("bring {} back as it was before job {}", domain.name, options.job.short()),
            store: settings.store.clone(),
            agent: parsed.devices.agent,
            present: present.map(|(_, present)| present),
            places: Vec::new(),
            images: Vec::new(),
            variables: None,
            tpm,
            memory_image: None,
            memory,
            files: exchanged.iter().flat_map(|(_, layer)| chain(&layer.path)).collect(),
            machine: NewDomain {
                domain: DomainRef { id: domain.id, name: domain.name.clone() },
                disks: exchanged
                    .into_iter()
                    .map(|(target, layer)| NewDisk {
                        target,
                        path: layer.path,
                        format: Format::from_name(&layer.format).unwrap_or(Format::Raw),
                    })
                    .collect(),
                without: Vec::new(),
                links_down: false,
                same: true,
                nvram: None,
            },
            domain,
            new,
            back: Some(back),
            then: then(&options, &kept),
            notes,
            watch_ms: settings.restore.watch_ms,
        }
        .plan(facts)
    }

    async fn check_facts(
        &self,
        plan: &Plan,
        before: &StepName,
        _: &Outputs,
    ) -> Result<Option<String>, Fault> {
        differ(&self.0.world, &self.0.places, plan, before).await
    }
}

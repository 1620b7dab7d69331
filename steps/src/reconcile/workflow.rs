//! The recipe `repair`: what jobs that are over have left of one domain is taken away, as far as that is safe.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::{Code, Fault, JobId, Plan, PlanContext, Registry, StepSpec, Workflow};

use super::sweep::{Jobs, SweepInput, SweepLeftover};
use super::{Owner, Sweep};
use crate::codes;
use crate::hypervisor::{DomainId, DomainRef};
use crate::recipe::{PATIENT_LOOK, step};
use crate::snapshot::{Places, World};

/// The workflow's name.
pub const NAME: &str = "repair";
/// Its version.
pub const VERSION: u32 = 1;

/// What is to be taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepairOptions {
    /// Each with the job that has left it.
    pub leftovers: Vec<(JobId, Sweep)>,
}

/// The recipe.
pub struct Repair {
    world: World,
    places: Places,
    jobs: Arc<dyn Jobs>,
    store: String,
}

impl Repair {
    /// In this world, below these roots, by these journals, for this store's jobs.
    #[must_use]
    pub fn new(world: World, places: Places, jobs: Arc<dyn Jobs>, store: String) -> Self {
        Self { world, places, jobs, store }
    }

    /// Makes the workflow and its step known.
    #[must_use]
    pub fn register(self, registry: Registry) -> Registry {
        let (world, places, jobs) = (self.world.clone(), self.places.clone(), self.jobs.clone());
        registry.step(SweepLeftover { world, places, jobs }).workflow(self)
    }
}

#[async_trait]
impl Workflow for Repair {
    fn name(&self) -> WorkflowName {
        NAME.into()
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let usage = |e: &dyn std::fmt::Display| {
            Fault::permanent(codes::USAGE, "understand the options", &cx.request.subject.label, e)
        };
        let mut options = RepairOptions::deserialize(&cx.request.options).map_err(|e| usage(&e))?;
        // The note says whose all of it is; it goes last.
        options.leftovers.sort_by_key(|(_, sweep)| *sweep == Sweep::Unmark);
        let id = cx.request.subject.id.parse().map_err(|e| usage(&e))?;
        let domain = DomainRef { id: DomainId(id), name: cx.request.subject.label.clone() };
        let jobs = self.jobs.all().await?;
        let mut steps: Vec<StepSpec> = Vec::new();
        for (of, sweep) in options.leftovers {
            let owner = Owner::of(&of.short(), &jobs);
            // Of a pull whose job is not known the step asks the domain.
            let lost = matches!(owner, Owner::Unknown(_)) && sweep.is_of_pull();
            if !matches!(owner, Owner::Over { .. }) && !lost {
                let object = format!("{} of {}", of.short(), domain.name);
                return Err(Fault::permanent(
                    codes::INVALID_STATE,
                    "take away what a job has left",
                    object,
                    owner.words(),
                )
                .remedy("vmkeep doctor tells what is there now"));
            }
            let count = steps.len() + 1;
            let (name, title) = match &sweep {
                Sweep::Free => ("free", format!("set the guest of {} free", domain.name)),
                Sweep::Unmark => ("unmark", format!("remove the note of job {}", of.short())),
                Sweep::Overlay { path, .. } => ("overlay", format!("remove {}", path.display())),
                Sweep::Scratch { path, .. } => ("scratch", format!("remove {}", path.display())),
                Sweep::Pull(_) => {
                    ("pull", format!("end the backup job of job {} on {}", of.short(), domain.name))
                }
                Sweep::Folder(path) => ("folder", format!("remove {}", path.display())),
                Sweep::Half { path, .. } => ("half", format!("remove {}", path.display())),
            };
            let input = SweepInput { domain: domain.clone(), store: self.store.clone(), of, sweep };
            let spec = step::<SweepLeftover>(format!("{name}/{count}"), title, &input)?.probing(PATIENT_LOOK);
            let before: Vec<_> = if name == "unmark" {
                steps.iter().map(|step| step.name.clone()).collect()
            } else {
                Vec::new()
            };
            steps.push(spec.after_all(before));
        }
        if steps.is_empty() {
            return Err(usage(&"nothing is to be taken away"));
        }
        let title = format!("take away what jobs have left of {}", domain.name);
        Plan::new(NAME, VERSION, title, steps, None, serde_json::Value::Null)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the repair", &domain.name, e))
    }
}

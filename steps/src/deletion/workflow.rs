//! The recipes: `delete` for what somebody chose, `prune` for what a rule chooses.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{
    Code, Fault, JobId, Millis, Outputs, Plan, PlanContext, Registry, StepName, StepSpec, Workflow,
};

use super::options::{DeleteOptions, Doomed, PruneOptions};
use super::read_again::{ReadAgain, RereadInput};
use super::remove::{RemoveBackups, RemoveInput};
use super::rule::{Candidate, Standing, keep_last};
use super::shelf::{self, Found};
use super::users::Users;
use super::withdraw::{WithdrawBackup, in_use};
use crate::codes;
use crate::manifest::BackupId;
use crate::recipe::{facts, patient, step};
use crate::snapshot::Places;

/// The name of the workflow that deletes what somebody chose.
pub const DELETE: &str = "delete";
/// The name of the workflow that deletes what the rule chooses.
pub const PRUNE: &str = "prune";
/// The version of both recipes.
pub const VERSION: u32 = 1;

/// Both recipes.
pub struct Deletion {
    places: Places,
    users: Arc<dyn Users>,
}

impl Deletion {
    /// At these places, with regard to these users.
    #[must_use]
    pub fn new(places: Places, users: Arc<dyn Users>) -> Self {
        Self { places, users }
    }

    /// Makes the workflows and their steps known.
    #[must_use]
    pub fn register(self, registry: Registry) -> Registry {
        let this = Arc::new(self);
        registry
            .step(ReadAgain(this.places.clone()))
            .step(WithdrawBackup { places: this.places.clone(), users: this.users.clone() })
            .step(RemoveBackups(this.places.clone()))
            .workflow(Delete(this.clone()))
            .workflow(Prune(this))
    }

    async fn looking<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Places) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let places = self.places.clone();
        crate::blocking::run(move || look(&places))
            .await
            .unwrap_or_else(|e| Err(Fault::permanent(Code::UNDEFINED, "look at the backups", "", e)))
    }

    async fn unused(&self, doomed: &Doomed) -> Result<(), Fault> {
        match self.users.of(&doomed.folder, doomed.backup).await? {
            None => Ok(()),
            Some(user) => Err(in_use(&doomed.folder.display().to_string(), &user)),
        }
    }
}

/// What a plan was built on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Facts {
    domain: Uuid,
    /// What goes.
    doomed: Vec<Doomed>,
    /// Folders of whole backups of the domain of which at least one (of a retention: each) must still be there; empty: no
    /// such demand.
    stay: Vec<PathBuf>,
}

/// The recipe `delete`.
struct Delete(Arc<Deletion>);

/// The recipe `prune`.
struct Prune(Arc<Deletion>);

fn options<T: DeserializeOwned>(cx: &PlanContext) -> Result<T, Fault> {
    T::deserialize(&cx.request.options)
        .map_err(|e| Fault::permanent(codes::USAGE, "understand the options", "", e))
}

fn domain(cx: &PlanContext) -> Result<Uuid, Fault> {
    let id = &cx.request.subject.id;
    id.parse().map_err(|e| Fault::permanent(codes::USAGE, "read the domain's UUID", id, e))
}

fn short(backup: BackupId) -> String {
    JobId::from(backup.0).short()
}

#[async_trait]
impl Workflow for Delete {
    fn name(&self) -> WorkflowName {
        DELETE.into()
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let options: DeleteOptions = options(cx)?;
        let (domain, name) = (domain(cx)?, &cx.request.subject.label);
        if options.backups.is_empty() {
            return Err(Fault::permanent(codes::USAGE, "delete backups", name, "none was named"));
        }
        let wanted = options.backups.clone();
        let now = Timestamp::now();
        let (doomed, stay, loses) = self
            .0
            .looking(move |places| {
                let (mut doomed, mut loses) = (Vec::<Doomed>::new(), false);
                for one in &wanted {
                    let (found, whole) = shelf::chosen(places, one, domain, now)?;
                    loses |= whole;
                    if doomed.iter().all(|known| known.folder != found.folder) {
                        doomed.push(found);
                    }
                }
                let (all, _) = shelf::of_domain(places, domain, now);
                let stays = |one: &&Found| {
                    !matches!(one.candidate.standing, Standing::Damaged(_))
                        && doomed.iter().all(|gone| gone.folder != one.folder)
                };
                let stay: Vec<_> = all.iter().filter(stays).map(|one| one.folder.clone()).collect();
                Ok((doomed, stay, loses))
            })
            .await?;
        for one in &doomed {
            self.0.unused(one).await?;
        }
        // Finishing a deletion that was begun takes no backup away.
        let stay = match (loses && stay.is_empty(), options.last_copy) {
            (true, false) => return Err(last(name, "no other whole backup of the domain is left")),
            (true, true) if cx.request.by.why.is_none() => {
                return Err(last(name, "deleting the last backup needs a reason"));
            }
            // What the caller gave leave to lose is not demanded.
            (_, true) => Vec::new(),
            _ if !loses => Vec::new(),
            _ => stay,
        };
        let what = match doomed.as_slice() {
            [one] => format!("backup {} of {name}", short(one.backup)),
            all => format!("{} backups of {name}", all.len()),
        };
        let notes = if options.last_copy {
            vec!["The last backup of a domain was allowed to go".to_owned()]
        } else {
            vec![]
        };
        let mut steps = Vec::new();
        removal(&doomed, &[], notes, &mut steps)?;
        plan(DELETE, &format!("delete {what}"), steps, &Facts { domain, doomed, stay })
    }

    async fn check_facts(&self, plan: &Plan, _: &StepName, _: &Outputs) -> Result<Option<String>, Fault> {
        differ(&self.0, plan).await
    }
}

fn last(name: &str, cause: &str) -> Fault {
    Fault::permanent(codes::INVALID_STATE, "delete the last backup", name, cause)
        .remedy("Make another backup first; or, if it may really go: --last-copy --reason TEXT")
}

#[async_trait]
impl Workflow for Prune {
    fn name(&self) -> WorkflowName {
        PRUNE.into()
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let options: PruneOptions = options(cx)?;
        let (domain, name) = (domain(cx)?, cx.request.subject.label.clone());
        if options.keep == 0 {
            return Err(Fault::permanent(
                codes::USAGE,
                "thin the backups out",
                name,
                "keeping none is not a rule",
            )
            .remedy("Keep at least one; `vmkeep delete --last-copy` deletes the last"));
        }
        let now = Timestamp::now();
        let (all, mut notes) =
            self.0.looking(move |places| Ok(shelf::of_domain(places, domain, now))).await?;
        let candidates: Vec<Candidate> = all.iter().map(|one| one.candidate.clone()).collect();
        if let Some(successor) = options.successor {
            there(&candidates, successor, &name)?;
        }
        notes.extend(candidates.iter().filter_map(note));
        let series = keep_last(&candidates, options.keep, options.successor);
        let find = |at: &usize| all.get(*at);
        let mut steps = Vec::new();
        let (mut doomed, mut stay) = (Vec::new(), Vec::new());
        for series in series.values() {
            let mut goes = Vec::new();
            for found in series.gone.iter().filter_map(find) {
                let one = found.doomed();
                match self.0.unused(&one).await {
                    Ok(()) => goes.push(one),
                    // The next time will do.
                    Err(fault) => notes.push(format!("{} stays: {}", short(one.backup), fault.cause)),
                }
            }
            if let Some(successor) = series.kept.first().and_then(find).filter(|_| !goes.is_empty()) {
                let name = step_name("read", successor.candidate.backup, &steps);
                steps.push(read_again(name, successor, options.bandwidth)?);
                stay.push(successor.folder.clone());
            }
            doomed.extend(goes);
        }
        let read: Vec<_> = steps.iter().map(|step| step.name.clone()).collect();
        removal(&doomed, &read, notes, &mut steps)?;
        let last = match options.keep {
            1 => "backup".to_owned(),
            n => format!("{n} backups"),
        };
        let goes = match doomed.len() {
            0 => "none has to go".to_owned(),
            1 => "1 goes out".to_owned(),
            n => format!("{n} go out"),
        };
        let title = format!("keep the last {last} of {name}: {goes}");
        plan(PRUNE, &title, steps, &Facts { domain, doomed, stay })
    }

    async fn check_facts(&self, plan: &Plan, _: &StepName, _: &Outputs) -> Result<Option<String>, Fault> {
        differ(&self.0, plan).await
    }
}

/// The successor is there and whole, or nothing is done.
fn there(all: &[Candidate], successor: BackupId, name: &str) -> Result<(), Fault> {
    let fail = |cause: String| {
        Fault::permanent(codes::MISSING_NECESSARY_FILES, "find the newest backup", name, cause)
            .remedy("Nothing was deleted. See `vmkeep list`, and make another backup")
    };
    match all.iter().find(|one| one.backup == successor) {
        None => Err(fail(format!("backup {} is not there", short(successor)))),
        Some(Candidate { standing: Standing::Damaged(why), .. }) => {
            Err(fail(format!("backup {} is damaged: {why}", short(successor))))
        }
        Some(_) => Ok(()),
    }
}

fn note(one: &Candidate) -> Option<String> {
    let id = short(one.backup);
    match &one.standing {
        Standing::Whole => None,
        Standing::Protected(why) => Some(format!("Backup {id} stays: {why}")),
        Standing::Damaged(why) => Some(format!("Backup {id} is damaged, is not counted and stays: {why}")),
    }
}

/// A name for a step about a backup. A copy of the same backup gets another one.
fn step_name(what: &str, backup: BackupId, steps: &[StepSpec]) -> StepName {
    let name = |n: usize| match n {
        0 => StepName::from(format!("{what}/{}", short(backup))),
        n => StepName::from(format!("{what}/{}-{}", short(backup), n + 1)),
    };
    let free = |name: &StepName| steps.iter().all(|step| step.name != *name);
    (0..=steps.len()).map(name).find(free).unwrap_or_else(|| name(steps.len()))
}

fn read_again(name: StepName, found: &Found, bandwidth: u64) -> Result<StepSpec, Fault> {
    let id = short(found.candidate.backup);
    let title = format!("read backup {id} again and compare it");
    Ok(step::<ReadAgain>(name, title, &RereadInput { backup: found.doomed(), bandwidth })?
        .retry(Retry { attempts: 3, ..Retry::default() })
        .stall(Millis::secs(600)))
}

/// The steps that remove backups, after those that are named.
fn removal(
    doomed: &[Doomed],
    read: &[StepName],
    notes: Vec<String>,
    steps: &mut Vec<StepSpec>,
) -> Result<(), Fault> {
    let mut before = Vec::new();
    for one in doomed {
        let title = format!("withdraw backup {} ({})", short(one.backup), one.folder.display());
        let name = step_name("withdraw", one.backup, steps);
        steps.push(
            step::<WithdrawBackup>(name.clone(), title, one)?
                .after_all(read.iter().cloned())
                .check_facts()
                .undo(patient()),
        );
        before.push(name);
    }
    let files: u64 = doomed.iter().map(|one| one.files).sum();
    let title = if doomed.is_empty() { "remove nothing".to_owned() } else { format!("remove {files} files") };
    let input = RemoveInput { backups: doomed.to_vec(), notes };
    steps.push(step::<RemoveBackups>("remove", title, &input)?.after_all(before).stall(Millis::secs(3600)));
    Ok(())
}

fn plan(workflow: &'static str, title: &str, steps: Vec<StepSpec>, facts: &Facts) -> Result<Plan, Fault> {
    let undefined =
        |e: &dyn std::fmt::Display| Fault::permanent(Code::UNDEFINED, "plan the deletion", title, e);
    let facts = serde_json::to_value(facts).map_err(|e| undefined(&e))?;
    Plan::new(workflow, VERSION, title, steps, Some("remove".into()), facts).map_err(|e| undefined(&e))
}

/// Right before each manifest is withdrawn: one of those that are to stay is still there and whole. Whether the doomed
/// ones are still what they were, unprotected and unused, the step itself asks.
async fn differ(deletion: &Deletion, plan: &Plan) -> Result<Option<String>, Fault> {
    let facts: Facts = facts(plan)?;
    if facts.stay.is_empty() {
        return Ok(None);
    }
    let every = plan.workflow.as_str() == PRUNE;
    deletion
        .looking(move |places| {
            let (all, _) = shelf::of_domain(places, facts.domain, Timestamp::now());
            let whole = |folder: &PathBuf| {
                let found = all.iter().find(|one| one.folder == *folder);
                found.is_some_and(|one| !matches!(one.candidate.standing, Standing::Damaged(_)))
            };
            // Of a retention each successor; of a deletion any other backup.
            let holds = if every { facts.stay.iter().all(whole) } else { facts.stay.iter().any(whole) };
            Ok((!holds).then(|| "a backup that is to stay is gone or damaged".to_owned()))
        })
        .await
}

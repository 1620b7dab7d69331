//! `swap-definition`: the persistent definition becomes the other machine's, all disks by one act.
//!
//! Before and after it the definition names a complete set of disks: the old machine's or the new one's. The domain must
//! be off: a guest that somebody starts in the very moment of the change runs on the old disks with the new definition,
//! so whether it is off is asked again afterwards, and the definition put back if it is not. A start *after* the change
//! is answered by the next step. The way back is the same with the machines exchanged: a guest that runs on the new disks
//! is somebody's, and never gets a definition that names others.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::aside::must_be_off;
use crate::codes;
use crate::hypervisor::{
    Definition, DiskSource, DomainRef, HvError, Layer, Marker, Observation, Target, Trouble,
};
use crate::snapshot::{World, cannot_look, fence, on_the_way_back, theirs};

/// Exchanges definitions.
#[derive(Debug)]
pub struct SwapDefinition(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwapInput {
    /// The domain.
    pub domain: DomainRef,
    /// This daemon's store, for the marker.
    pub store: String,
    /// The old machine; nothing if the domain does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<Machine>,
    /// The new one.
    pub new: Machine,
}

/// A definition and its disks on files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The persistent definition.
    pub definition: String,
    /// Its disks on files.
    pub disks: Vec<(Target, Layer)>,
}

/// The disks on files that a definition names.
#[must_use]
pub fn files(definition: &Definition) -> Vec<(Target, Layer)> {
    let of = |disk: &crate::hypervisor::DiskDef| match &disk.source {
        DiskSource::File(path) if disk.device == crate::hypervisor::DiskDevice::Disk => {
            let format = disk.format.clone().unwrap_or_else(|| "raw".to_owned());
            Some((disk.target.clone(), Layer { path: path.clone(), format }))
        }
        _ => None,
    };
    definition.disks.iter().filter_map(of).collect()
}

/// Whose disks a definition names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    Old,
    New,
    Other,
}

impl SwapInput {
    fn names(&self, definition: &Definition) -> Names {
        let there = files(definition);
        let same = |wanted: &[(Target, Layer)]| {
            wanted.len() == there.len() && wanted.iter().all(|disk| there.contains(disk))
        };
        if same(&self.new.disks) {
            Names::New
        } else if self.old.as_ref().is_some_and(|old| same(&old.disks)) {
            Names::Old
        } else {
            Names::Other
        }
    }

    /// On whose disks the domain runs. QEMU's own word counts, whatever libvirt said a moment before.
    fn runs_on(&self, seen: &Observation) -> RunsOn {
        let Some(qemu) = &seen.qemu else {
            return if seen.state.is_active() || seen.live.is_some() {
                RunsOn::Unknown
            } else {
                RunsOn::Nothing
            };
        };
        let is_new =
            |(target, layer): &(Target, Layer)| qemu.top(target).is_some_and(|top| top == layer.path);
        if self.new.disks.iter().all(is_new) { RunsOn::New } else { RunsOn::Old }
    }
}

/// On whose disks a domain runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RunsOn {
    /// It is off.
    Nothing,
    /// At least one is not the new machine's.
    Old,
    New,
    /// It is being started, or has just ended.
    Unknown,
}

const DOING: &str = "give the domain its other disks";
const BACK: &str = "give the domain its old definition back";

fn in_between(doing: &str, domain: &DomainRef) -> Fault {
    let cause = "somebody is starting or ending it: on which disks it runs cannot be told yet";
    Fault::transient(codes::CANNOT_DEFINE_MACHINE, doing, &domain.name, cause)
}

fn changed(domain: &DomainRef) -> Fault {
    let cause = "somebody has changed the disks of its definition meanwhile";
    Fault::permanent(Code::FACTS_CHANGED, DOING, &domain.name, cause)
}

impl SwapDefinition {
    async fn look(&self, input: &SwapInput) -> Result<Option<Observation>, Fault> {
        match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => Ok(Some(seen)),
            Err(e) if e.trouble == Trouble::NoSuchDomain => Ok(None),
            Err(e) => {
                Err(e.fault(codes::CANNOT_DEFINE_MACHINE, DOING, &input.domain.name).class(Class::Transient))
            }
        }
    }

    /// The definition of the new machine, with our marker.
    fn new_definition(&self, cx: &StepContext, input: &SwapInput) -> Result<String, HvError> {
        let marker = Marker { store: input.store.clone(), job: cx.job.to_string(), hold: None };
        self.0.hypervisor.with_marker(&input.new.definition, &marker)
    }

    async fn define_new(&self, xml: &str, input: &SwapInput) -> Result<(), Fault> {
        let fault = |e: HvError| match e.trouble {
            Trouble::Exists => Fault::permanent(codes::DOMAIN_EXISTS, DOING, &input.domain.name, &e),
            _ => e.fault(codes::CANNOT_DEFINE_MACHINE, DOING, &input.domain.name),
        };
        self.0.hypervisor.define_new(xml).await.map(drop).map_err(fault)
    }

    async fn back(&self, input: &SwapInput, old: &Machine) -> Result<(), Fault> {
        let back = self.0.hypervisor.redefine(&input.domain.id, &old.definition).await;
        back.map_err(|e| on_the_way_back(e, codes::UNDO_FAILED, BACK, &input.domain.name))
    }

    /// Refuses to go back while somebody runs the new machine, and lets the definition name what it runs on: what it
    /// writes would be lost at its next start otherwise.
    async fn not_somebodys(
        &self,
        cx: &StepContext,
        input: &SwapInput,
        seen: &Observation,
        names: Option<Names>,
    ) -> Result<(), Fault> {
        let name = input.domain.name.as_str();
        match input.runs_on(seen) {
            RunsOn::Nothing | RunsOn::Old => return Ok(()),
            RunsOn::Unknown => return Err(in_between(BACK, &input.domain)),
            RunsOn::New => {}
        }
        if names != Some(Names::New) {
            let fault = |e: HvError| on_the_way_back(e, codes::UNDO_FAILED, BACK, name);
            let xml = self.new_definition(cx, input).map_err(fault)?;
            self.0.hypervisor.redefine(&input.domain.id, &xml).await.map_err(fault)?;
        }
        Err(theirs(BACK, &input.domain, "somebody has started it from its new disks"))
    }
}

#[async_trait]
impl Step for SwapDefinition {
    const KIND: StepKind = StepKind::new("swap-definition", 1);
    type Input = SwapInput;
    type Output = ();

    async fn run(&self, cx: &StepContext, input: SwapInput) -> Result<(), Fault> {
        let hypervisor = &self.0.hypervisor;
        let fault = |e: HvError| e.fault(codes::CANNOT_DEFINE_MACHINE, DOING, &input.domain.name);
        let xml = self.new_definition(cx, &input).map_err(fault)?;
        let Some(seen) = self.look(&input).await? else {
            if input.old.is_some() {
                let cause = "somebody has removed its definition meanwhile";
                return Err(Fault::permanent(
                    codes::CANNOT_WORK_ON_UNDEFINED_OBJECT,
                    DOING,
                    &input.domain.name,
                    cause,
                ));
            }
            return self.define_new(&xml, &input).await;
        };
        let Some(definition) = &seen.persistent else { return Err(changed(&input.domain)) };
        match (input.names(definition), &input.old) {
            (Names::Other, _) => return Err(changed(&input.domain)),
            (Names::New, Some(old)) => match input.runs_on(&seen) {
                RunsOn::Old => {
                    self.back(&input, old).await?;
                    return must_be_off(&self.0, &input.domain, DOING).await;
                }
                RunsOn::Unknown => return Err(in_between(DOING, &input.domain).in_doubt()),
                // The effect of an attempt that was cut off; or somebody has started the new machine already.
                RunsOn::New | RunsOn::Nothing => return hypervisor.sync_definitions().await.map_err(fault),
            },
            (Names::New, None) => return hypervisor.sync_definitions().await.map_err(fault),
            (Names::Old, _) => must_be_off(&self.0, &input.domain, DOING).await?,
        }
        hypervisor.redefine(&input.domain.id, &xml).await.map_err(fault)?;
        let Some(seen) = self.look(&input).await.map_err(Fault::in_doubt)? else {
            return Err(changed(&input.domain).in_doubt());
        };
        match (input.runs_on(&seen), &input.old) {
            (RunsOn::Old, Some(old)) => {
                self.back(&input, old).await.map_err(Fault::in_doubt)?;
                must_be_off(&self.0, &input.domain, DOING).await?;
                Err(changed(&input.domain).in_doubt())
            }
            (RunsOn::Unknown, Some(_)) => Err(in_between(DOING, &input.domain).in_doubt()),
            _ => Ok(()),
        }
    }

    async fn probe(&self, cx: &StepContext, input: SwapInput) -> Verdict<()> {
        let hypervisor = &*self.0.hypervisor;
        let id = &input.domain.id;
        let seen = match hypervisor.observe(id).await {
            Ok(seen) => seen,
            Err(e) if e.trouble == Trouble::NoSuchDomain => {
                return fence::not_done(hypervisor, id, cx.still_running).await;
            }
            Err(e) => return cannot_look(&e),
        };
        let Some(definition) = &seen.persistent else {
            return Verdict::Diverged("the domain has no persistent definition any more".to_owned());
        };
        match input.names(definition) {
            Names::New if input.old.is_some() && input.runs_on(&seen) == RunsOn::Unknown => {
                Verdict::Unknown(in_between(DOING, &input.domain).cause)
            }
            Names::New if input.old.is_some() && input.runs_on(&seen) == RunsOn::Old => {
                fence::not_done(hypervisor, id, cx.still_running).await
            }
            Names::New => match hypervisor.sync_definitions().await {
                Ok(()) => Verdict::Done(()),
                Err(e) => cannot_look(&e),
            },
            Names::Old => fence::not_done(hypervisor, id, cx.still_running).await,
            Names::Other => Verdict::Diverged("somebody has changed the domain's disks".to_owned()),
        }
    }

    async fn undo(&self, cx: &StepContext, input: SwapInput, _: Option<()>) -> Result<(), Fault> {
        let hypervisor = &self.0.hypervisor;
        let name = input.domain.name.as_str();
        let fault = |e: HvError| on_the_way_back(e, codes::UNDO_FAILED, BACK, name);
        let Some(seen) = self.look(&input).await? else { return Ok(()) };
        let names = seen.persistent.as_ref().map(|definition| input.names(definition));
        if names == Some(Names::Other) {
            let cause = "somebody has changed the domain's disks meanwhile";
            let (id, old) = (input.domain.id, "the old definition lies in the folder of what is kept aside");
            let remedy = match input.old {
                Some(_) => format!("See `virsh dumpxml {id}`; {old}. Then settle the job"),
                None => format!("If it is not needed: virsh undefine {id}; then settle the job"),
            };
            return Err(Fault::permanent(Code::EFFECT_DIVERGED, BACK, name, cause).remedy(remedy));
        }
        self.not_somebodys(cx, &input, &seen, names).await?;
        match (names, &input.old) {
            (None, _) => return Ok(()),
            (Some(_), None) => hypervisor.undefine(&input.domain.id).await.map_err(fault)?,
            (Some(Names::New), Some(old)) => self.back(&input, old).await?,
            (Some(_), Some(_)) => hypervisor.sync_definitions().await.map_err(fault)?,
        }
        // Somebody may have started the new machine while its definition was taken away.
        let Some(seen) = self.look(&input).await? else { return Ok(()) };
        self.not_somebodys(cx, &input, &seen, input.old.as_ref().map(|_| Names::Old)).await
    }

    async fn probe_undo(&self, cx: &StepContext, input: SwapInput, _: Option<()>) -> Verdict<()> {
        fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await
    }
}

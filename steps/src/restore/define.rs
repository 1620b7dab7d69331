//! `define-domain`: the new domain gets its definition.
//!
//! Its UUID was made for this job, so a domain that bears it is this job's, and no other mark is needed. An existing
//! definition is never replaced: a name that was taken meanwhile makes the step fail, and the job goes back.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Fault, Step, StepContext, Verdict};

use super::identity::{NewDomain, Original, rewrite};
use crate::codes;
use crate::hypervisor::{DomainRef, HvError, HvResult, Trouble};
use crate::snapshot::{Places, World, cannot_look, fence};

/// Defines the domain.
#[derive(Debug)]
pub struct DefineDomain {
    /// The world.
    pub world: World,
    /// Where the backup may be read.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefineInput {
    /// The definition of the original.
    pub definition: Original,
    /// The new domain.
    pub new: NewDomain,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefineOutput {
    /// What the new definition has otherwise, for people.
    pub changes: Vec<String>,
}

impl DefineDomain {
    async fn rewritten(&self, input: &DefineInput) -> Result<(String, DefineOutput), Fault> {
        let text = input.definition.read(&self.places).await?;
        let (xml, changes) = rewrite(&*self.world.hypervisor, &text, &input.new)?;
        Ok((xml, DefineOutput { changes }))
    }

    /// The domain that bears our UUID.
    async fn there(&self, input: &DefineInput) -> HvResult<Option<DomainRef>> {
        find(&self.world, &input.new.domain).await
    }
}

/// The domain with this UUID, if there is one.
pub(super) async fn find(world: &World, domain: &DomainRef) -> HvResult<Option<DomainRef>> {
    match world.hypervisor.find(&domain.id.to_string()).await {
        Ok(found) if found.id == domain.id => Ok(Some(found)),
        Ok(_) => Ok(None),
        Err(e) if e.trouble == Trouble::NoSuchDomain => Ok(None),
        Err(e) => Err(e),
    }
}

#[async_trait]
impl Step for DefineDomain {
    const KIND: StepKind = StepKind::new("define-domain", 1);
    type Input = DefineInput;
    type Output = DefineOutput;

    async fn run(&self, _: &StepContext, input: DefineInput) -> Result<DefineOutput, Fault> {
        let name = input.new.domain.name.clone();
        let fault = |e: HvError| match e.trouble {
            Trouble::Exists => Fault::permanent(codes::DOMAIN_EXISTS, "define the domain", name.clone(), &e)
                .remedy("Choose another name: an existing domain is never replaced"),
            _ => e.fault(codes::CANNOT_DEFINE_MACHINE, "define the domain", name.clone()),
        };
        let (xml, output) = self.rewritten(&input).await?;
        if self.there(&input).await.map_err(fault)?.is_none() {
            self.world.hypervisor.define_new(&xml).await.map_err(fault)?;
        }
        // Whoever wrote it, libvirt has not made its name durable.
        self.world.hypervisor.sync_definitions().await.map_err(|e| fault(e).in_doubt())?;
        Ok(output)
    }

    async fn probe(&self, cx: &StepContext, input: DefineInput) -> Verdict<DefineOutput> {
        if cx.still_running {
            return Verdict::InFlight("the call has not returned".to_owned());
        }
        match self.there(&input).await {
            Ok(Some(_)) => {}
            Ok(None) => {
                return fence::not_done(&*self.world.hypervisor, &input.new.domain.id, false).await;
            }
            Err(e) => return cannot_look(&e),
        }
        if let Err(e) = self.world.hypervisor.sync_definitions().await {
            return cannot_look(&e);
        }
        match self.rewritten(&input).await {
            Ok((_, output)) => Verdict::Done(output),
            Err(fault) => Verdict::Unknown(fault.to_string()),
        }
    }

    async fn undo(&self, _: &StepContext, input: DefineInput, _: Option<DefineOutput>) -> Result<(), Fault> {
        let domain = &input.new.domain;
        match self.world.hypervisor.undefine(&domain.id).await {
            Ok(()) => Ok(()),
            Err(e) if e.trouble == Trouble::NoSuchDomain => Ok(()),
            Err(e) => {
                let class = if e.is_transient() { Class::Transient } else { Class::Permanent };
                Err(e
                    .fault(codes::UNDO_FAILED, "remove the definition", &domain.name)
                    .class(class)
                    .remedy(format!("When it is not needed any more: virsh undefine {}", domain.id)))
            }
        }
    }
}

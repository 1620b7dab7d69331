//! `switch-definition`: the persistent definition names the overlays before QEMU does.
//!
//! An empty overlay on its base is the same disk as the base, so a start at any moment after this is right, and a
//! start after the snapshot's transaction finds what the guest has flushed. The disks' `<backingStore>` is dropped:
//! an explicit one, kept on the overlay, would open it without its base and the guest would read zeros.
//!
//! In a plan the steps that lead the domain home (`commit`, `pivot`, `tidy`) close this one. Whoever starts the domain
//! from its overlays, and whenever, they bring it back before the switch is undone, so that the undo usually finds
//! nothing to do. It never takes a definition away from an overlay that holds anything.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::disk::JobDisk;
use super::stand::Stand;
use super::{World, cannot_look, fence};
use crate::codes;
use crate::hypervisor::{Definition, DiskChange, DomainRef, Layer, Observation};

/// Switches the persistent definition to the overlays; undone, back.
#[derive(Debug)]
pub struct SwitchDefinition(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchInput {
    /// The domain.
    pub domain: DomainRef,
    /// The persistent definition as it was.
    pub definition: String,
    /// The disks.
    pub disks: Vec<JobDisk>,
}

/// What the persistent definition names for the job's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// Every base.
    Bases,
    /// Every overlay.
    Overlays,
    /// Some of each.
    Both,
    /// Something else.
    Other,
}

/// Reads what a definition names.
pub(crate) fn names(definition: &Definition, disks: &[JobDisk]) -> Names {
    let (mut bases, mut overlays) = (0, 0);
    for disk in disks {
        let Some(file) = definition.file(&disk.target) else { return Names::Other };
        let format = definition.disk(&disk.target).and_then(|d| d.format.as_deref());
        if disk.is_base(file) && format == Some(disk.base.format.as_str()) {
            bases += 1;
        } else if *file == disk.overlay && format == Some("qcow2") {
            overlays += 1;
        } else {
            return Names::Other;
        }
    }
    match (bases, overlays) {
        (_, 0) => Names::Bases,
        (0, _) => Names::Overlays,
        _ => Names::Both,
    }
}

/// The change that makes the disks name the overlays.
pub(crate) fn to_overlays(disks: &[JobDisk]) -> DiskChange {
    DiskChange::Point(disks.iter().map(|disk| (disk.target.clone(), disk.overlay_layer())).collect())
}

/// The change that gives the disks their own elements back, explicit backing stores included.
pub(crate) fn to_bases(definition: &str, disks: &[JobDisk]) -> DiskChange {
    DiskChange::LikeIn {
        xml: definition.to_owned(),
        targets: disks.iter().map(|disk| disk.target.clone()).collect(),
    }
}

/// The change of one disk only.
pub(crate) fn to_layer(disk: &JobDisk, layer: Layer) -> DiskChange {
    DiskChange::Point(vec![(disk.target.clone(), layer)])
}

pub(crate) fn persistent<'a>(seen: &'a Observation, domain: &DomainRef) -> Result<&'a Definition, Fault> {
    seen.persistent.as_ref().ok_or_else(|| {
        Fault::permanent(
            codes::DOMAIN_TRANSIENT,
            "read the persistent definition",
            domain.name.clone(),
            "the domain has none any more",
        )
        .class(Class::Fatal)
        .remedy("Define the domain again (virsh dumpxml, virsh define), then settle the job")
    })
}

#[async_trait]
impl Step for SwitchDefinition {
    const KIND: StepKind = StepKind::new("switch-definition", 1);
    type Input = SwitchInput;
    type Output = ();

    async fn run(&self, _: &StepContext, input: SwitchInput) -> Result<(), Fault> {
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_DEFINE_MACHINE).await?;
        let found = names(persistent(&seen, &input.domain)?, &input.disks);
        if found == Names::Other {
            return Err(Fault::permanent(
                Code::FACTS_CHANGED,
                "switch the definition to the overlays",
                input.domain.name,
                "somebody has changed its disks",
            ));
        }
        if vmkeep_workflow::mutation::on("switched-late") {
            // The snapshot itself lets libvirt switch it, after QEMU has moved.
            return Ok(());
        }
        // Repeated also when it names the overlays already: only the call says that it is durable.
        self.0.hypervisor.redefine_disks(&input.domain.id, &to_overlays(&input.disks)).await.map_err(|e| {
            e.fault(codes::CANNOT_DEFINE_MACHINE, "switch the definition to the overlays", &input.domain.name)
        })
    }

    async fn probe(&self, cx: &StepContext, input: SwitchInput) -> Verdict<()> {
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Ok(seen) => seen,
            Err(e) => return cannot_look(&e),
        };
        let Some(definition) = &seen.persistent else {
            return Verdict::Diverged("the domain has no persistent definition any more".to_owned());
        };
        match names(definition, &input.disks) {
            Names::Overlays => match self.0.hypervisor.sync_definitions().await {
                Ok(()) => Verdict::Done(()),
                Err(e) => cannot_look(&e),
            },
            Names::Bases => fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await,
            Names::Both => Verdict::Diverged(
                "the persistent definition names some overlays and some bases; one define names all or none"
                    .to_owned(),
            ),
            Names::Other => Verdict::Diverged("somebody has changed the domain's disks".to_owned()),
        }
    }

    async fn undo(&self, _: &StepContext, input: SwitchInput, _: Option<()>) -> Result<(), Fault> {
        let doing = "switch the definition back";
        let fault =
            |e: crate::hypervisor::HvError| e.fault(codes::CANNOT_DEFINE_MACHINE, doing, &input.domain.name);
        let seen = self.0.observe(&input.domain.id, codes::CANNOT_DEFINE_MACHINE).await?;
        let definition = persistent(&seen, &input.domain)?;
        // A disk that somebody has pointed elsewhere meanwhile, or taken away, is theirs.
        let switched: Vec<JobDisk> = input
            .disks
            .iter()
            .filter(|disk| definition.file(&disk.target) == Some(&disk.overlay))
            .cloned()
            .collect();
        if switched.is_empty() {
            return self.0.hypervisor.sync_definitions().await.map_err(fault);
        }
        for disk in &switched {
            self.overlay_unused(&input.domain, &seen, disk).await?;
        }
        let back = to_bases(&input.definition, &switched);
        self.0.hypervisor.redefine_disks(&input.domain.id, &back).await.map_err(fault)
    }

    async fn probe_undo(&self, cx: &StepContext, input: SwitchInput, _: Option<()>) -> Verdict<()> {
        // The undo is harmless to repeat, but not beside a call that may still land.
        fence::not_done(&*self.0.hypervisor, &input.domain.id, cx.still_running).await
    }
}

impl SwitchDefinition {
    /// The definition may leave an overlay only if nothing was ever written to it. That is so while QEMU runs on the
    /// base; a domain that is off may have been started from the overlay meanwhile.
    async fn overlay_unused(
        &self,
        domain: &DomainRef,
        seen: &Observation,
        disk: &JobDisk,
    ) -> Result<(), Fault> {
        let refuse = |cause: String| {
            Fault::permanent(
                codes::CANNOT_MERGE_DISK_IMAGES,
                "switch the definition back",
                domain.name.clone(),
                cause,
            )
            .remedy(format!(
                "Start the domain and commit the overlay: virsh blockcommit {} {} --shallow --active --pivot",
                domain.id, disk.target
            ))
        };
        match Stand::of(seen, disk) {
            Stand::OnBase { .. } => Ok(()),
            Stand::OnOverlay { .. } => Err(refuse(format!("QEMU runs on the overlay of {}", disk.target))),
            Stand::Elsewhere(what) => Err(refuse(what)),
            Stand::Off | Stand::Unplugged => match self.0.storage.inspect(&disk.overlay_layer()).await {
                Ok(Some(image)) if !image.empty => {
                    Err(refuse(format!("the overlay of {} holds data", disk.target)))
                }
                Ok(_) => Ok(()),
                Err(e) => Err(e.fault(
                    codes::CANNOT_MERGE_DISK_IMAGES,
                    "look at the overlay",
                    disk.overlay.display().to_string(),
                )),
            },
        }
    }
}

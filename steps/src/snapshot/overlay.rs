//! `create-overlay`, and the rule by which an overlay may be removed.
//!
//! An overlay is removed only if QEMU does not have it open, no definition names it, and it is empty or proved
//! committed. It may hold the only copy of what a guest has written; everything else here is cheaper than that.

use std::path::Path;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, Verdict};

use super::disk::JobDisk;
use super::{World, cannot_look, not_looked, on_the_way_back};
use crate::codes;
use crate::hypervisor::{
    Bitmap, DomainRef, FileId, HvResult, Image, Layer, Observation, OverlaySpec, Trouble,
};

/// Makes an empty overlay of a base.
#[derive(Debug)]
pub struct CreateOverlay(pub World);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayInput {
    /// The domain.
    pub domain: DomainRef,
    /// The disk.
    pub disk: JobDisk,
    /// Bitmaps that it needs because the guest will be started anew on it; none for a guest that is moved while it runs,
    /// whose bitmaps libvirt carries over itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<Bitmap>,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayOutput {
    /// The overlay.
    pub id: FileId,
}

/// Whether an image is the overlay that was asked for, as it was made.
fn as_made(image: &Image, disk: &JobDisk) -> bool {
    let on_base = |below: &Layer| disk.is_base(&below.path) && below.format == disk.base.format;
    image.empty && image.virtual_size == disk.virtual_size && image.backing.as_ref().is_some_and(on_base)
}

#[async_trait]
impl Step for CreateOverlay {
    const KIND: StepKind = StepKind::new("create-overlay", 1);
    type Input = OverlayInput;
    type Output = OverlayOutput;

    async fn run(&self, cx: &StepContext, input: OverlayInput) -> Result<OverlayOutput, Fault> {
        let disk = &input.disk;
        let fault = |e: crate::hypervisor::HvError| {
            e.fault(
                codes::CANNOT_CREATE_EMPTY_DISK_IMAGE,
                "create the overlay",
                disk.overlay.display().to_string(),
            )
        };
        if cx.attempt > 1 {
            // What an attempt that was cut off left: a torn file of our own name that nobody has been told of.
            self.remove_unused(&input).await?;
        }
        let spec = OverlaySpec {
            path: disk.overlay.clone(),
            base: disk.base.clone(),
            virtual_size: disk.virtual_size,
        };
        let image = self.0.storage.create_overlay(&spec).await.map_err(fault)?;
        self.0.storage.add_bitmaps(&disk.overlay, &input.bitmaps).await.map_err(fault)?;
        if !as_made(&image, disk) {
            return Err(Fault::permanent(
                codes::CANNOT_CREATE_EMPTY_DISK_IMAGE,
                "create the overlay",
                disk.overlay.display().to_string(),
                format!("it came out different from what was asked for: {image:?}"),
            ));
        }
        Ok(OverlayOutput { id: image.id })
    }

    /// An overlay that looks whole may still lack its fsync, which only `run` gives; as nobody uses it yet it is
    /// simply made again.
    async fn probe(&self, cx: &StepContext, input: OverlayInput) -> Verdict<OverlayOutput> {
        if cx.still_running {
            return Verdict::InFlight("the overlay is being made".to_owned());
        }
        match self.0.storage.inspect(&input.disk.overlay_layer()).await {
            Ok(Some(image)) if !image.empty => Verdict::Diverged(format!(
                "{} holds data although no guest has been told of it",
                input.disk.overlay.display()
            )),
            Ok(_) => Verdict::NotDone,
            Err(e) if e.trouble == Trouble::Refused => Verdict::NotDone,
            Err(e) => cannot_look(&e),
        }
    }

    async fn undo(
        &self,
        _: &StepContext,
        input: OverlayInput,
        _: Option<OverlayOutput>,
    ) -> Result<(), Fault> {
        self.remove_unused(&input).await
    }
}

impl CreateOverlay {
    /// Removes an overlay that never held anything, whole or torn.
    async fn remove_unused(&self, input: &OverlayInput) -> Result<(), Fault> {
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Err(e) if e.trouble == Trouble::NoSuchDomain => None,
            seen => Some(seen.map_err(|e| {
                let code = codes::CANNOT_REMOVE_OLD_DISK_IMAGE;
                not_looked(e, code, "look at the domain", &input.domain.name)
            })?),
        };
        remove(&self.0, seen.as_ref(), &input.disk, None, Proof::Empty).await.map(|_| ())
    }
}

/// Why an overlay's contents are not needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// It must be found empty.
    Empty,
    /// It has been committed into its base.
    Committed,
}

/// Who uses a file.
pub(crate) fn user_of(seen: &Observation, path: &Path) -> Option<String> {
    if let Some(qemu) = &seen.qemu
        && qemu.open.iter().any(|open| open == path)
    {
        return Some("QEMU has it open".to_owned());
    }
    let names = |definition: &Option<crate::hypervisor::Definition>| {
        definition
            .as_ref()
            .is_some_and(|d| d.disks.iter().any(|disk| d.file(&disk.target).is_some_and(|f| f == path)))
    };
    if names(&seen.persistent) {
        return Some("the persistent definition names it".to_owned());
    }
    if names(&seen.live) {
        return Some("libvirt's live definition names it".to_owned());
    }
    None
}

/// Removes an overlay by the rule of this module; says whether there was one. `id`, if known, is the file that was
/// created; another file of that name stays.
pub(crate) async fn remove(
    world: &World,
    seen: Option<&Observation>,
    disk: &JobDisk,
    id: Option<FileId>,
    proof: Proof,
) -> Result<bool, Fault> {
    let object = disk.overlay.display().to_string();
    let keep = |why: String| {
        Fault::permanent(codes::CANNOT_REMOVE_OLD_DISK_IMAGE, "remove the overlay", object.clone(), why)
            .remedy(format!(
                "Find out what it holds before removing it: qemu-img info -U --backing-chain {object}"
            ))
    };
    if let Some(user) = seen.and_then(|seen| user_of(seen, &disk.overlay)) {
        return Err(keep(user));
    }
    let found: HvResult<Option<Image>> = world.storage.inspect(&disk.overlay_layer()).await;
    let image = match found {
        Ok(None) => return Ok(false),
        Ok(Some(image)) => image,
        Err(e) => {
            return Err(on_the_way_back(
                e,
                codes::CANNOT_REMOVE_OLD_DISK_IMAGE,
                "look at the overlay",
                &object,
            ));
        }
    };
    if id.is_some_and(|id| id != image.id) {
        return Err(keep("it is not the file that this job created".to_owned()));
    }
    if proof == Proof::Empty && !image.empty {
        return Err(keep("it holds data that was never committed".to_owned()));
    }
    world
        .storage
        .remove(&disk.overlay, image.id)
        .await
        .map_err(|e| on_the_way_back(e, codes::CANNOT_REMOVE_OLD_DISK_IMAGE, "remove the overlay", &object))
}

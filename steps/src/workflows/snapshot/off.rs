//! The disks of a domain that is off: which files the next QEMU will open.
//!
//! There is no QEMU to ask. libvirt follows the definition where it lists the images below a disk, and the images'
//! headers where it does not; so does this module. The overlays that a job puts on top are always followed by their
//! headers, so a definition that says otherwise than the headers is refused: started from an overlay, the guest would
//! see another disk.

use std::path::Path;

use vmkeep_workflow::{Code, Fault};

use super::check::Chosen;
use crate::codes;
use crate::hypervisor::{Backing, DiskDef, DomainRef, Layer};
use crate::image::chain;
use crate::image::qcow2::Format;

const DOING: &str = "read the images of the disk";

/// A disk with the chain that it will be opened with.
pub(super) async fn one(domain: &DomainRef, disk: &DiskDef) -> Result<Chosen, Fault> {
    let object = format!("disk {} of {}", disk.target, domain.name);
    let fault = |cause: String| {
        Fault::permanent(codes::CHAIN_UNREADABLE, DOING, object.clone(), cause)
            .remedy("qemu-img info --backing-chain IMAGE shows what is there")
    };
    let Some(path) = disk.source.image() else {
        return Err(fault("it is neither a file nor a block device".to_owned()));
    };
    let name = disk.format.clone().unwrap_or_else(|| "raw".to_owned());
    let format = Format::from_name(&name).ok_or_else(|| fault(format!("its format is {name}")))?;
    let top = path.clone();
    let probed = crate::blocking::run(move || probe(&top, format))
        .await
        .map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, object.clone(), e))?
        .map_err(&fault)?;
    if let Backing::Explicit(layers) = &disk.backing {
        let below: Vec<&Path> = probed.iter().skip(1).map(|layer| layer.path.as_path()).collect();
        if below != layers.iter().map(|layer| layer.path.as_path()).collect::<Vec<_>>() {
            return Err(fault(
                "the definition names other images below it than the images themselves do".to_owned(),
            )
            .remedy(format!("Make both agree: virsh edit {}, or qemu-img rebase -u", domain.id)));
        }
    }
    Ok(Chosen { disk: disk.clone(), chain: probed })
}

fn probe(top: &Path, format: Format) -> Result<Vec<Layer>, String> {
    let chain = chain::probe(top, format).map_err(|e| e.to_string())?;
    Ok(chain.into_iter().map(|e| Layer { path: e.path, format: e.format.as_str().to_owned() }).collect())
}

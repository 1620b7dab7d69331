//! Plain images, as they are to be imported: nothing is known of them but what is said.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_vault::manifest::Host;
use vmkeep_workflow::Fault;

use super::import::{DOING, Import, ImportDisk, chain_of, shown};
use crate::cli::args::{ImportedImage, VaultImport};
use crate::cli::make::whole;
use crate::codes;
use crate::hypervisor::read_definition;

/// No definition is longer.
const LONGEST: u64 = 16 << 20;
const ANOTHER: &str = "Name a definition as `virsh dumpxml --inactive` prints it";

pub(super) async fn plain(args: &VaultImport) -> Result<Import, Fault> {
    let definition = match &args.definition {
        Some(path) => definition(&whole(path)?)?,
        None => String::new(),
    };
    let mut notes = Vec::new();
    let (name, uuid) = if definition.is_empty() {
        notes.push(
            "Without a definition it can be exported, and not restored to a domain: `--definition`"
                .to_owned(),
        );
        (args.name.clone().unwrap_or_default(), args.uuid.unwrap_or_else(uuid::Uuid::new_v4))
    } else {
        let read = read_definition(&definition);
        let read = read.map_err(|error| {
            error.fault(codes::CANNOT_READ_XML_FILE, DOING, "the definition").remedy(ANOTHER)
        })?;
        for image in &args.images {
            if read.disks.iter().all(|disk| disk.target.0 != image.target) {
                let cause = "the definition has no such disk";
                return Err(Fault::permanent(codes::NO_SUCH_DISK, DOING, &image.target, cause)
                    .remedy("Name the disks as the definition does"));
            }
        }
        identity(&definition, args)?
    };
    let mut disks: Vec<ImportDisk> = Vec::new();
    for ImportedImage { target, format, path } in &args.images {
        if disks.iter().any(|disk| disk.target == *target) {
            return Err(Fault::permanent(codes::USAGE, DOING, target, "it is given twice"));
        }
        disks.push(ImportDisk { target: target.clone(), chain: chain_of(whole(path)?, *format).await? });
    }
    let taken = match args.at {
        Some(at) => at,
        None => last_change(&disks).unwrap_or_else(Timestamp::now),
    };
    Ok(Import {
        backup: BackupId::now(),
        domain: DomainId::new(*uuid.as_bytes()),
        name,
        taken,
        consistency: "crash",
        definition,
        autostart: false,
        host: Host::default(),
        disks,
        streams: Vec::new(),
        notes,
    })
}

fn definition(path: &Path) -> Result<String, Fault> {
    use std::io::Read as _;
    let unreadable = |error: std::io::Error| {
        Fault::permanent(codes::CANNOT_READ_XML_FILE, DOING, shown(path), error).remedy(ANOTHER)
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(LONGEST).read_to_string(&mut text).map_err(unreadable)?;
    Ok(text)
}

/// The name and the UUID that a definition says, but for what is said otherwise.
fn identity(definition: &str, args: &VaultImport) -> Result<(String, uuid::Uuid), Fault> {
    let unread = |error: vmkeep_libvirt::xml::XmlError| {
        Fault::permanent(codes::CANNOT_READ_XML_FILE, DOING, "the definition", error).remedy(ANOTHER)
    };
    let parsed = vmkeep_libvirt::xml::DomainXml::parse(definition).map_err(unread)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => parsed.name().map_err(unread)?,
    };
    let uuid = args.uuid.or_else(|| parsed.uuid().ok());
    Ok((name, uuid.unwrap_or_else(uuid::Uuid::new_v4)))
}

/// When any of the files was last written to.
fn last_change(disks: &[ImportDisk]) -> Option<Timestamp> {
    let changes = disks.iter().flat_map(|disk| &disk.chain).filter(|element| !element.identity.is_device());
    let at = |element: &vmkeep_steps::image::chain::Element| {
        let seconds = Timestamp::from_second(element.identity.mtime).ok()?;
        seconds.checked_add(Duration::from_nanos(element.identity.mtime_nsec.into())).ok()
    };
    changes.filter_map(at).max()
}

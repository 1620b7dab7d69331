//! A backup in a folder, as it is to be imported: every byte of it is compared with its manifest before.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use vmkeep_steps::backup::state::{NVRAM, TPM};
use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::qemu_img::QemuImg;
use vmkeep_steps::image::root::{Component, Folder, RelPath, TargetRoot};
use vmkeep_steps::manifest::{self, Consistency, Depth, Manifest, ManifestError};
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_vault::manifest::Host;
use vmkeep_workflow::Fault;

use super::export::place_fault;
use super::import::{DOING, Import, ImportDisk, chain_of, shown};
use crate::cli::make::whole;
use crate::codes;

/// Definitions and the files of a machine's state are small.
const LONGEST: u64 = 64 << 20;

pub(super) async fn classic(folder: &Path) -> Result<Import, Fault> {
    let path = whole(folder)?;
    let at = path.clone();
    let read = tokio::task::spawn_blocking(move || read(&at)).await;
    let read = read.map_err(|error| Fault::permanent(codes::UNDEFINED_ERROR, DOING, shown(&path), error))?;
    let (manifest, mut import) = read?;
    for disk in &manifest.disks {
        let (file, format) = top(&manifest, &disk.target, &path)?;
        let chain = chain_of(path.join(file.as_str()), format).await?;
        // What an image stands on is what the manifest says, in this folder, and nothing else.
        let is_said = chain.len() == disk.chain.len()
            && chain.iter().zip(&disk.chain).all(|(file, name)| file.path == path.join(name.as_str()));
        if !is_said {
            let cause = format!("the images of disk {} stand on others than it says", disk.target);
            return Err(Fault::permanent(codes::MANIFEST_MISMATCH, DOING, shown(&path), cause));
        }
        import.disks.push(ImportDisk { target: disk.target.clone(), chain });
    }
    Ok(import)
}

fn top<'m>(manifest: &'m Manifest, target: &str, path: &Path) -> Result<(&'m Component, Format), Fault> {
    let name = manifest.disk(target).and_then(|disk| disk.chain.first());
    let file = name.and_then(|name| manifest.file(name));
    file.and_then(|file| Some((&file.name, file.format?))).ok_or_else(|| {
        let cause = format!("disk {target} has no image in it");
        Fault::permanent(codes::MANIFEST_MISMATCH, DOING, shown(path), cause)
    })
}

fn read(path: &Path) -> Result<(Manifest, Import), Fault> {
    let root = TargetRoot::open(path)
        .map_err(|error| Fault::permanent(codes::NO_SUCH_BACKUP, DOING, shown(path), error))?;
    let folder = root.folder();
    let stored = manifest::read(folder).map_err(|error| {
        let code = match &error {
            ManifestError::Place(_) => codes::NO_SUCH_BACKUP,
            ManifestError::TooNew { .. } => codes::MANIFEST_TOO_NEW,
            _ => codes::MANIFEST_MISMATCH,
        };
        Fault::permanent(code, DOING, shown(path), error)
    })?;
    let found = manifest::verify(folder, &stored, Depth::Full, &QemuImg::default(), None, &())
        .map_err(|error| Fault::permanent(codes::MANIFEST_MISMATCH, DOING, shown(path), error))?;
    let wrong: Vec<String> =
        found.iter().filter(|finding| finding.problem.serious()).map(ToString::to_string).collect();
    if !wrong.is_empty() {
        return Err(Fault::permanent(codes::MANIFEST_MISMATCH, DOING, shown(path), wrong.join("; ")).remedy(
            "It is not whole. What of its images can still be read is imported as plain ones: `--disk`",
        ));
    }
    let manifest = stored.manifest;
    let mut notes = manifest.warnings.clone();
    if manifest.memory.saved().is_some() {
        notes.push("Its memory was left out: in the vault it is a backup of the disks alone.".to_owned());
    }
    for left in &manifest.left_out {
        notes.push(format!("Disk {} was not in it: {}", left.target, left.reason));
    }
    let definition = small(folder, &manifest.definition.inactive)?;
    let definition = String::from_utf8(definition)
        .map_err(|error| Fault::permanent(codes::CANNOT_READ_XML_FILE, DOING, shown(path), error))?;
    let import = Import {
        backup: BackupId::new(*manifest.backup.0.as_bytes()),
        domain: DomainId::new(*manifest.domain.uuid.as_bytes()),
        name: manifest.domain.name.clone(),
        taken: manifest.point_in_time,
        consistency: match manifest.consistency {
            // Without the memory they are what a power cut would have left.
            Consistency::MemoryAndDisks | Consistency::Crash => "crash",
            Consistency::Quiesced => "quiesced",
            Consistency::Off => "off",
        },
        definition,
        autostart: manifest.autostart.unwrap_or(false),
        host: Host {
            name: manifest.host.name.clone().unwrap_or_default(),
            libvirt: manifest.host.libvirt.clone().unwrap_or_default(),
            qemu: manifest.host.qemu.clone().unwrap_or_default(),
            vmkeep: manifest.tool.clone(),
            ..Host::default()
        },
        disks: Vec::new(),
        streams: streams(folder, &manifest)?,
        notes,
    };
    Ok((manifest, import))
}

/// Firmware variables, and the files of a TPM's state.
fn streams(folder: &Folder, manifest: &Manifest) -> Result<Vec<(String, Vec<u8>)>, Fault> {
    let mut streams = Vec::new();
    if let Some(nvram) = &manifest.nvram {
        streams.push((NVRAM.to_owned(), small(folder, &nvram.file)?));
    }
    for file in manifest.tpm.iter().flat_map(|tpm| &tpm.files) {
        let Some((below, name)) = file.place() else {
            let cause = format!("{} is no place of a TPM's state", file.path);
            return Err(Fault::permanent(codes::MANIFEST_MISMATCH, DOING, shown(folder.path()), cause));
        };
        streams.push((format!("{TPM}{below}/{name}"), small(folder, &file.file)?));
    }
    Ok(streams)
}

fn small(folder: &Folder, name: &Component) -> Result<Vec<u8>, Fault> {
    let path: PathBuf = folder.path_of(name);
    let file = folder.open_file(&RelPath::from(name.clone())).map_err(|error| place_fault(&error))?;
    let mut bytes = Vec::new();
    let read = file.take(LONGEST + 1).read_to_end(&mut bytes);
    let cause = match read {
        Ok(_) if bytes.len() as u64 <= LONGEST => return Ok(bytes),
        Ok(_) => "it is larger than any such file".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(Fault::permanent(codes::MANIFEST_MISMATCH, DOING, shown(&path), cause))
}

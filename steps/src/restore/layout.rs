//! Where the files of a backup go.
//!
//! A disk goes to the path that the caller names, or into the common folder as `NAME-DISK.qcow2`. What it stands on goes
//! beside it, because images name their neighbours relatively; a base that several disks of one folder share is there
//! once.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use vmkeep_workflow::Fault;

use super::fetch::Wanted;
use super::identity::NewDisk;
use super::image::ImageInput;
use super::options::RestoreOptions;
use crate::codes;
use crate::hypervisor::Target;
use crate::image::chain::Neighbour;
use crate::image::name::encode;
use crate::image::rights::Wish;
use crate::image::root::Component;
use crate::manifest::{Disk, FileEntry, Manifest};

/// Where everything goes.
pub(crate) struct Layout {
    pub(crate) images: Vec<ImageInput>,
    pub(crate) disks: Vec<NewDisk>,
}

const DOING: &str = "find a place for the disks";

pub(crate) fn lay_out(manifest: &Manifest, options: &RestoreOptions) -> Result<Layout, Fault> {
    for target in options.disks.keys() {
        if manifest.disk(target).is_none() {
            let cause = format!("the backup holds {}", targets(manifest));
            return Err(Fault::permanent(codes::NO_SUCH_DISK, DOING, target.clone(), cause));
        }
    }
    let mut layout = Layout { images: Vec::new(), disks: Vec::new() };
    for disk in &manifest.disks {
        place(manifest, options, disk, &mut layout)?;
    }
    let mut taken = HashSet::new();
    for image in &layout.images {
        let path = image.path();
        if !taken.insert(path.to_string_lossy().to_lowercase()) {
            let path = path.display().to_string();
            return Err(Fault::permanent(codes::BACKUP_EXISTS, DOING, path, "two images would go there"));
        }
    }
    Ok(layout)
}

fn targets(manifest: &Manifest) -> String {
    manifest.disks.iter().map(|disk| disk.target.as_str()).collect::<Vec<_>>().join(", ")
}

/// The folder and the name of a disk's top image, and how the names of those below it begin.
fn top(
    options: &RestoreOptions,
    disk: &Disk,
    entry: &FileEntry,
) -> Result<(PathBuf, Component, String), Fault> {
    let unsafe_path = |path: &Path, cause: &str| {
        Fault::permanent(codes::UNSAFE_PATH, DOING, path.display().to_string(), cause)
    };
    if let Some(path) = options.disks.get(&disk.target) {
        let name = path.file_name().and_then(|name| name.to_str());
        let (Some(folder), Some(name)) = (path.parent(), name) else {
            return Err(unsafe_path(path, "it is not the path of a file"));
        };
        let name = Component::new(name).map_err(|e| unsafe_path(path, &e.to_string()))?;
        let stem = format!("{name}.");
        return Ok((folder.to_owned(), name, stem));
    }
    let Some(folder) = &options.folder else {
        let cause = "no place was named for it";
        return Err(Fault::permanent(codes::USAGE, DOING, format!("disk {}", disk.target), cause)
            .remedy("Name a folder for all disks, or a path for this one"));
    };
    let stem = format!("{}-", encode(&options.name));
    let format = entry.format.map_or("img", crate::image::qcow2::Format::as_str);
    let name = format!("{stem}{}.{format}", encode(&disk.target));
    let name = Component::new(name).map_err(|e| unsafe_path(folder, &e.to_string()))?;
    Ok((folder.clone(), name, stem))
}

fn place(
    manifest: &Manifest,
    options: &RestoreOptions,
    disk: &Disk,
    layout: &mut Layout,
) -> Result<(), Fault> {
    let damaged = |cause: &str| {
        Fault::permanent(codes::MANIFEST_MISMATCH, DOING, format!("disk {}", disk.target), cause)
    };
    let entries: Vec<&FileEntry> = disk.chain.iter().filter_map(|name| manifest.file(name)).collect();
    let Some(first) = entries.first().filter(|_| entries.len() == disk.chain.len()) else {
        return Err(damaged("a file of its chain is not in the manifest"));
    };
    let (folder, name, stem) = top(options, disk, first)?;
    let mut above: Option<usize> = None;
    for (depth, entry) in entries.iter().enumerate() {
        let (Some(format), Some(virtual_size)) = (entry.format, entry.virtual_size) else {
            return Err(damaged("a file of its chain is not an image"));
        };
        let shared = layout
            .images
            .iter()
            .position(|image| depth > 0 && image.folder == folder && image.wanted.name == entry.name);
        let at = match shared {
            Some(at) => at,
            None => {
                let name = if depth == 0 {
                    name.clone()
                } else {
                    Component::new(format!("{stem}{}", entry.name)).map_err(|e| damaged(&e.to_string()))?
                };
                layout.images.push(ImageInput {
                    wanted: Wanted {
                        backup: options.backup.clone(),
                        outside: options.outside,
                        name: entry.name.clone(),
                        size: entry.size,
                        blake3: entry.blake3,
                    },
                    format,
                    virtual_size,
                    folder: folder.clone(),
                    own: false,
                    name,
                    backing: None,
                    bandwidth: options.bandwidth,
                    rights: Wish::default(),
                });
                layout.images.len() - 1
            }
        };
        if let Some(above) = above {
            // QEMU would take a colon before a slash for a protocol.
            let name = layout.images[at].name.clone();
            if name.as_str().contains(':') {
                let path = layout.images[at].path().display().to_string();
                let cause = "an image that others stand on cannot have a colon in its name";
                return Err(Fault::permanent(codes::UNSAFE_PATH, DOING, path, cause));
            }
            layout.images[above].backing = Some(Neighbour { name, format });
        }
        above = Some(at);
    }
    layout.disks.push(NewDisk {
        target: Target(disk.target.clone()),
        path: folder.join(name.as_str()),
        format: first.format.unwrap_or(crate::image::qcow2::Format::Raw),
    });
    Ok(())
}

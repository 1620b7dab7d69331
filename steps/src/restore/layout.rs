//! Where the files of a backup go.
//!
//! A disk goes to the path that the caller names, or into the common folder as `NAME-DISK.qcow2`. What it stands on goes
//! beside it, because images name their neighbours relatively; a base that several disks of one folder share is there
//! once.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use vmkeep_workflow::Fault;

use super::check::targets;
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
    all_known(&options.disks, &targets(manifest))?;
    let mut layout = Layout { images: Vec::new(), disks: Vec::new() };
    for disk in &manifest.disks {
        place(manifest, options, disk, &mut layout)?;
    }
    all_apart(layout.images.iter().map(ImageInput::path))?;
    Ok(layout)
}

/// Whether the disks that were given a place are in the backup.
pub(super) fn all_known(places: &BTreeMap<String, PathBuf>, held: &[&str]) -> Result<(), Fault> {
    match places.keys().find(|target| !held.contains(&target.as_str())) {
        None => Ok(()),
        Some(target) => {
            let cause = format!("the backup holds {}", held.join(", "));
            Err(Fault::permanent(codes::NO_SUCH_DISK, DOING, target.clone(), cause))
        }
    }
}

/// Whether no two files would go to one place.
pub(super) fn all_apart(paths: impl Iterator<Item = PathBuf>) -> Result<(), Fault> {
    let mut taken = HashSet::new();
    for path in paths {
        if !taken.insert(path.to_string_lossy().to_lowercase()) {
            let path = path.display().to_string();
            return Err(Fault::permanent(codes::BACKUP_EXISTS, DOING, path, "two images would go there"));
        }
    }
    Ok(())
}

/// Where the disks of a new domain are to go.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    /// The new domain's name.
    pub(super) name: &'a str,
    /// Where all go that have no place of their own.
    pub(super) folder: Option<&'a Path>,
    /// Where single disks go.
    pub(super) disks: &'a BTreeMap<String, PathBuf>,
}

/// The folder and the name of a disk's top image, and how the names of those below it begin.
pub(super) fn top(
    asked: Asked<'_>,
    target: &str,
    format: &str,
) -> Result<(PathBuf, Component, String), Fault> {
    let unsafe_path = |path: &Path, cause: &str| {
        Fault::permanent(codes::UNSAFE_PATH, DOING, path.display().to_string(), cause)
    };
    if let Some(path) = asked.disks.get(target) {
        let name = path.file_name().and_then(|name| name.to_str());
        let (Some(folder), Some(name)) = (path.parent(), name) else {
            return Err(unsafe_path(path, "it is not the path of a file"));
        };
        let name = Component::new(name).map_err(|e| unsafe_path(path, &e.to_string()))?;
        let stem = format!("{name}.");
        return Ok((folder.to_owned(), name, stem));
    }
    let Some(folder) = asked.folder else {
        let cause = "no place was named for it";
        return Err(Fault::permanent(codes::USAGE, DOING, format!("disk {target}"), cause)
            .remedy("Name a folder for all disks, or a path for this one"));
    };
    let stem = format!("{}-", encode(asked.name));
    let name = format!("{stem}{}.{format}", encode(target));
    let name = Component::new(name).map_err(|e| unsafe_path(folder, &e.to_string()))?;
    Ok((folder.to_owned(), name, stem))
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
    let asked = Asked { name: &options.name, folder: options.folder.as_deref(), disks: &options.disks };
    let format = first.format.map_or("img", crate::image::qcow2::Format::as_str);
    let (folder, name, stem) = top(asked, &disk.target, format)?;
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

//! Writing one disk of a backup to a file or onto a block device, and reading it back.
//!
//! A file gets its name once it is proven; one that was there stays until then, whole. A device is written in place: what
//! is zero in the disk is made zero there, and what lies beyond the disk's end stays what it is. Whatever ends that in the
//! middle leaves a device that is neither the old nor the new one; it is said so, and the same command with
//! `--overwrite-without-copy` makes it whole.

use std::fs::File;
use std::io::{Error, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::root::{Component, Folder};
use vmkeep_steps::vaults::files::Holes;
use vmkeep_steps::vaults::onto::Onto;
use vmkeep_steps::vaults::read_back::{root_of_image, root_of_raw};
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::ids::BlobId;
use vmkeep_vault::keys::IdKeys;
use vmkeep_vault::manifest::Image;
use vmkeep_vault::read::{Sink, read_image};
use vmkeep_workflow::{Fault, crash};

use super::Opened;
use super::export::{Exported, not_converted, place_fault, root_error, to_qcow2_unless_given_up};
use super::target::{self, Open, Target};
use crate::cli::offline::differs;
use crate::codes;

const DOING: &str = "write the disk";

/// A disk, and where it goes.
pub(super) struct One<'a> {
    pub(super) image: &'a Image,
    pub(super) target: Target,
    pub(super) format: Format,
}

/// How it is read.
pub(super) struct From<'a> {
    pub(super) opened: &'a Opened,
    pub(super) ids: &'a IdKeys,
    pub(super) fetcher: &'a Fetcher,
}

impl One<'_> {
    /// Refuses what must not be written to, before the vault is read.
    pub(super) async fn refuse(&self, overwrite: bool) -> Result<(), Fault> {
        let (open, most) = match &self.target {
            Target::New(_) => return Ok(()),
            // All of it goes.
            Target::File(open) => (open, open.size),
            Target::Device(open) => {
                open.refuse_short(self.image.size)?;
                (open, self.image.size)
            }
        };
        if matches!(self.target, Target::Device(_)) && self.format != Format::Raw {
            let path = open.path.display().to_string();
            return Err(Fault::permanent(codes::USAGE, DOING, path, "a device holds the bytes of a disk")
                .remedy("Write it raw: `--format raw`"));
        }
        if overwrite { Ok(()) } else { open.refuse_content(most).await }
    }

    /// Writes it, and proves what can be read there.
    pub(super) async fn write(&self, from: &From<'_>) -> Result<Exported, Fault> {
        let (path, written) = match &self.target {
            Target::New(path) => (path, Box::pin(self.file(from, path, None)).await?),
            Target::File(old) => (&old.path, Box::pin(self.file(from, &old.path, Some(old))).await?),
            Target::Device(device) => (&device.path, Box::pin(self.device(from, device)).await?),
        };
        let root = Some(self.image.root.to_string());
        Ok(Exported { file: path.clone(), what: "disk", size: self.image.size, written, root })
    }

    async fn device(&self, from: &From<'_>, device: &Open) -> Result<u64, Fault> {
        let mut unfinished = Unfinished { path: &device.path, begun: true };
        let written =
            Box::pin(self.read(from, &device.path, &mut Onto::new(Arc::clone(&device.file)))).await?;
        crash::point("export/written");
        self.prove(from, &device.path, &device.file).await?;
        unfinished.begun = false;
        Ok(written)
    }

    async fn file(&self, from: &From<'_>, path: &Path, old: Option<&Open>) -> Result<u64, Fault> {
        let name = split(path)?.1;
        let above = target::above(path)?;
        let folder = above.folder();
        let placed = |error| place_fault(&error);
        let failed = |error: Error| place_fault(&root_error("write", path.to_owned(), error));
        let mut aside = Aside::make(folder)?;
        let mut sink = Holes::new(Arc::clone(&aside.file), self.image.size).map_err(failed)?;
        let written = Box::pin(self.read(from, path, &mut sink)).await?;
        aside.file.sync_all().map_err(failed)?;
        if self.format == Format::Qcow2 {
            let converted = Aside::make(folder)?;
            let (raw, to) = (folder.path_of(&aside.name), folder.path_of(&converted.name));
            let done = to_qcow2_unless_given_up(raw, to.clone()).await;
            done.map_err(|cause| not_converted(path, &cause))?;
            let found = Box::pin(root_of_image(from.ids, &to, Format::Qcow2, self.image.size)).await;
            self.judge(from, path, found)?;
            aside = converted;
        } else {
            self.prove(from, path, &aside.file).await?;
        }
        match old {
            None => folder.rename(&aside.name, &name).map_err(placed)?,
            Some(old) => {
                like(&aside.file, &old.file).map_err(failed)?;
                folder.replace(&aside.name, &name).map_err(placed)?;
            }
        }
        folder.sync().map_err(placed)?;
        Ok(written)
    }

    async fn read(&self, from: &From<'_>, path: &Path, sink: &mut dyn Sink) -> Result<u64, Fault> {
        let vault = &from.opened.vault;
        let read = read_image(vault, from.ids, from.fetcher, BlobType::Data, self.image, sink, false);
        let report = Box::pin(read).await.map_err(|error| read_fault(from, path, &error))?;
        Ok(report.written)
    }

    async fn prove(&self, from: &From<'_>, path: &Path, file: &Arc<File>) -> Result<(), Fault> {
        let found = Box::pin(root_of_raw(from.ids, BlobType::Data, file, self.image.size)).await;
        self.judge(from, path, found)
    }

    fn judge(&self, from: &From<'_>, path: &Path, found: Result<BlobId, VaultError>) -> Result<(), Fault> {
        let found = found.map_err(|error| read_fault(from, path, &error))?;
        match found == self.image.root {
            true => Ok(()),
            false => Err(differs(path, self.image.root, found)),
        }
    }
}

/// The folder of a file, and its name.
pub(super) fn split(path: &Path) -> Result<(&Path, Component), Fault> {
    let refused = |cause| Fault::permanent(codes::UNSAFE_PATH, DOING, path.display().to_string(), cause);
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(refused("it is not the path of a file"));
    };
    let name = name.to_str().ok_or_else(|| refused("its name is not UTF-8"))?;
    Ok((above, Component::new(name).map_err(|error| place_fault(&error))?))
}

pub(super) fn read_fault(from: &From<'_>, path: &Path, error: &VaultError) -> Fault {
    match error {
        VaultError::Io(error) => {
            let same = Error::new(error.kind(), error.to_string());
            place_fault(&root_error("write or read", path.to_owned(), same))
        }
        error => from.opened.fault(DOING, error),
    }
}

/// Gives a file the owner and the mode of the one whose place it takes.
fn like(new: &File, old: &File) -> std::io::Result<()> {
    let (old, new_meta) = (old.metadata()?, new.metadata()?);
    if (old.uid(), old.gid()) != (new_meta.uid(), new_meta.gid()) {
        std::os::unix::fs::fchown(new, Some(old.uid()), Some(old.gid()))?;
    }
    new.set_permissions(old.permissions())?;
    new.sync_all()
}

/// A file without its name; removed unless it gets one.
pub(super) struct Aside<'a> {
    folder: &'a Folder,
    pub(super) name: Component,
    pub(super) file: Arc<File>,
}

impl<'a> Aside<'a> {
    pub(super) fn make(folder: &'a Folder) -> Result<Self, Fault> {
        let name = Component::encoded(&format!("{}.part", uuid::Uuid::now_v7().simple()));
        let file = folder.create_file(&name).map_err(|error| place_fault(&error))?;
        Ok(Self { folder, name, file: Arc::new(file) })
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        // Without effect once it has its name.
        let _ = self.folder.remove_file(&self.name);
    }
}

/// A device that is being written to: whoever leaves it so says it.
struct Unfinished<'a> {
    path: &'a PathBuf,
    begun: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.begun {
            let _ = writeln!(
                std::io::stderr(),
                "{} is neither what it was nor the disk. To make it whole, do the same with --overwrite-without-copy",
                self.path.display()
            );
        }
    }
}

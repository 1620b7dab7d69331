//! Writing a backup of a vault as files: its disks, its streams, and the domain's definition.
//!
//! Every file is written under another name in the same folder, synced, and gets its own by a rename that replaces nothing;
//! then the folder is synced. So a file that bears its name is whole and durable, and one that was there is never touched. What
//! reached a file was computed, chunk by chunk and up to the root, to be what the backup says; what cannot be is an error,
//! and its file is removed. A crash leaves files that end in `.part`, which nobody takes for anything.

use std::fs::File;
use std::io::{Error, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;
use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::root::{Component, Folder, RelPath, RootError, TargetRoot};
use vmkeep_steps::vaults::files::{Holes, reading_lease, to_qcow2};
use vmkeep_vault::backend::address::Address;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::index::Index;
use vmkeep_vault::keys::IdKeys;
use vmkeep_vault::manifest::{Image, Manifest};
use vmkeep_vault::read::read_image;
use vmkeep_vault::{features, vault::Vault};
use vmkeep_workflow::Fault;

use super::one::{From, One};
use super::tarball::tarball;
use super::target::{Target, refuse_dev};
use super::{Opened, holder, open};
use crate::cli::Out;
use crate::cli::args::{ExportFormat, Global, VaultExport};
use crate::cli::make::whole;
use crate::cli::show::vault as show;
use crate::codes;
use crate::text::bytes as size_of;

const DOING: &str = "write the backup as files";
/// The domain's definition.
const DEFINITION: &str = "domain.xml";

/// A file that was written.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Exported {
    pub(in crate::cli) file: PathBuf,
    /// `disk`, `stream` or `definition`.
    pub(in crate::cli) what: &'static str,
    /// Bytes that it shows.
    pub(in crate::cli) size: u64,
    /// Of those, bytes that are not zero.
    pub(in crate::cli) written: u64,
    /// What proves its content: the root that the manifest holds, and that was computed again.
    pub(in crate::cli) root: Option<String>,
}

/// A file that is to be written.
pub(super) struct Wanted<'a> {
    pub(super) name: Component,
    pub(super) source: Source<'a>,
}

pub(super) enum Source<'a> {
    Image { target: &'a str, kind: BlobType, image: &'a Image, format: Format },
    Definition(&'a str),
}

pub(super) async fn export(global: &Global, out: &Out, args: &VaultExport) -> Result<(), Fault> {
    let opened = open(global, &args.vault).await?;
    refuse_own(&opened, &whole(&args.to)?)?;
    let (all, id) = opened.backup(&args.backup).await?;
    let read = all.get(id).map(|backup| &backup.manifest);
    let manifest = match read {
        Some(Ok(manifest)) => manifest,
        Some(Err(error)) => return Err(opened.fault("read the backup's manifest", error)),
        None => return Err(Fault::permanent(codes::NO_SUCH_BACKUP, DOING, id.to_string(), "it is gone")),
    };
    features::check_reader(&opened.vault).await.map_err(|error| opened.fault(DOING, &error))?;
    if let Some(feature) = manifest.features.first() {
        let cause = format!("it uses the feature `{feature}`, which this version does not know");
        return Err(Fault::permanent(codes::VAULT_TOO_NEW, DOING, id.to_string(), cause));
    }
    let work = match &args.disk {
        Some(disk) => Work::One(one_disk(manifest, args, disk).await?),
        None => all_files(manifest, args)?,
    };
    let lease = reading_lease(&opened.vault, &holder("export")).await;
    let lease = lease.map_err(|error| opened.fault(DOING, &error))?;
    let reported = lease.is_some();
    let exported = Box::pin(carry_out(&opened, manifest, &work, reported, out.json)).await;
    if let Some(lease) = lease
        && let Err(error) = lease.end().await
    {
        tracing::warn!(%error, "the vault was not told that nobody reads any more");
    }
    out.show(&exported?, |files| show::exported(files))
}

/// Refuses the folder of the vault that is read: what is written there may take the place of one of its objects.
fn refuse_own(opened: &Opened, to: &Path) -> Result<(), Fault> {
    let Address::File(vault) = &opened.settings.url else { return Ok(()) };
    let real = to.ancestors().find_map(|above| above.canonicalize().ok());
    let is_below = match (real, vault.canonicalize()) {
        (Some(real), Ok(vault)) => real.starts_with(vault),
        _ => to.starts_with(vault),
    };
    if !is_below {
        return Ok(());
    }
    let cause = "it lies in the folder of the vault that is read";
    Err(Fault::permanent(codes::UNSAFE_PATH, DOING, to.display().to_string(), cause)
        .remedy("Choose a place elsewhere: nothing but the vault's own objects belongs there"))
}

/// What an export writes.
enum Work<'a> {
    One(One<'a>),
    All(Vec<Wanted<'a>>, Folder),
    Tarball(Vec<Wanted<'a>>, PathBuf),
}

/// One disk, at a place that may be written to.
async fn one_disk<'a>(manifest: &'a Manifest, args: &VaultExport, disk: &str) -> Result<One<'a>, Fault> {
    refuse_unknown(manifest, std::slice::from_ref(&disk.to_owned()))?;
    let found = manifest.disks.iter().find(|one| one.target == disk);
    let image = &found.ok_or_else(|| Fault::permanent(codes::NO_SUCH_DISK, DOING, disk, "it is gone"))?.image;
    if args.format == ExportFormat::Tar {
        return Err(Fault::permanent(codes::USAGE, DOING, disk, "one disk is written as it is")
            .remedy("For a tarball: `--disks`"));
    }
    let path = whole(&args.to)?;
    let target = tokio::task::spawn_blocking(move || Target::open(&path)).await;
    let target = target.map_err(|error| Fault::permanent(codes::UNDEFINED_ERROR, DOING, disk, error))??;
    let one = One { image, target, format: format(args.format).0 };
    one.refuse(args.overwrite_without_copy).await?;
    Ok(one)
}

/// Everything, into a folder.
fn all_files<'a>(manifest: &'a Manifest, args: &VaultExport) -> Result<Work<'a>, Fault> {
    let wanted = wanted(manifest, args)?;
    if args.format == ExportFormat::Tar {
        let path = whole(&args.to)?;
        refuse_dev(&path)?;
        if path.symlink_metadata().is_ok() {
            return Err(place_fault(&RootError::Exists { path }));
        }
        return Ok(Work::Tarball(wanted, path));
    }
    let folder = folder(&whole(&args.to)?)?;
    // Before anything is read: nothing is ever written over.
    for one in &wanted {
        if folder.stat(&one.name).map_err(|error| place_fault(&error))?.is_some() {
            return Err(place_fault(&RootError::Exists { path: folder.path_of(&one.name) }));
        }
    }
    Ok(Work::All(wanted, folder))
}

fn refuse_unknown(manifest: &Manifest, disks: &[String]) -> Result<(), Fault> {
    for disk in disks {
        if manifest.disks.iter().all(|one| one.target != *disk) {
            let has: Vec<&str> = manifest.disks.iter().map(|disk| disk.target.as_str()).collect();
            return Err(Fault::permanent(codes::NO_SUCH_DISK, DOING, disk, "the backup has no such disk")
                .remedy(format!("It has {}", has.join(", "))));
        }
    }
    Ok(())
}

/// A disk's format, and how the names of such files end.
fn format(format: ExportFormat) -> (Format, &'static str) {
    match format {
        ExportFormat::Raw | ExportFormat::Tar => (Format::Raw, "raw"),
        ExportFormat::Qcow2 => (Format::Qcow2, "qcow2"),
    }
}

/// What is to be written: nothing of it has a name of another.
fn wanted<'a>(manifest: &'a Manifest, args: &VaultExport) -> Result<Vec<Wanted<'a>>, Fault> {
    refuse_unknown(manifest, &args.disks)?;
    let (format, end) = format(args.format);
    let chosen = |target: &str| args.disks.is_empty() || args.disks.iter().any(|disk| disk == target);
    let mut wanted = Vec::new();
    for disk in manifest.disks.iter().filter(|disk| chosen(&disk.target)) {
        let name = Component::encoded(&format!("{}.{end}", disk.target));
        let source = Source::Image { target: &disk.target, kind: BlobType::Data, image: &disk.image, format };
        wanted.push(Wanted { name, source });
    }
    for stream in &manifest.streams {
        let (target, image, kind) = (stream.name.as_str(), &stream.image, BlobType::Stream);
        let source = Source::Image { target, kind, image, format: Format::Raw };
        wanted.push(Wanted { name: Component::encoded(&stream.name), source });
    }
    if !manifest.definition.is_empty() {
        let source = Source::Definition(&manifest.definition);
        wanted.push(Wanted { name: Component::encoded(DEFINITION), source });
    }
    Ok(wanted)
}

/// The folder, made with what is missing above it.
pub(in crate::cli) fn folder(path: &Path) -> Result<Folder, Fault> {
    refuse_dev(path)?;
    made(path).map_err(|error| place_fault(&error))
}

fn made(path: &Path) -> Result<Folder, RootError> {
    let there = path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    let root = TargetRoot::open(there)?;
    match path.strip_prefix(there).ok().and_then(Path::to_str).filter(|rest| !rest.is_empty()) {
        Some(rest) => root.folder().make_folders(&RelPath::new(rest)?),
        None => root.folder().try_clone(),
    }
}

async fn carry_out(
    opened: &Opened,
    manifest: &Manifest,
    work: &Work<'_>,
    report: bool,
    silent: bool,
) -> Result<Vec<Exported>, Fault> {
    let vault = &opened.vault;
    let index = Box::pin(Index::load(vault, Some(&opened.cache()))).await;
    let index = Arc::new(index.map_err(|error| opened.fault("read the vault's index", &error))?);
    let ids = vault.ids(manifest.domain);
    let fetcher = Fetcher::new(vault, ids.clone(), index, Some(opened.cache()), report);
    match work {
        Work::All(wanted, folder) => Box::pin(all_of(opened, (&ids, &fetcher), wanted, folder, silent)).await,
        Work::Tarball(wanted, path) => {
            let from = From { opened, ids: &ids, fetcher: &fetcher };
            Box::pin(tarball(&from, wanted, path, manifest.taken)).await
        }
        Work::One(one) => {
            if !silent {
                let _ = writeln!(std::io::stderr(), "{}", size_of(one.image.size));
            }
            let from = From { opened, ids: &ids, fetcher: &fetcher };
            Ok(vec![Box::pin(one.write(&from)).await?])
        }
    }
}

async fn all_of(
    opened: &Opened,
    (ids, fetcher): (&IdKeys, &Fetcher),
    wanted: &[Wanted<'_>],
    folder: &Folder,
    silent: bool,
) -> Result<Vec<Exported>, Fault> {
    let vault = &opened.vault;
    let mut exported = Vec::new();
    for one in wanted {
        let part = Part::begin(folder, &one.name)?;
        let file = match one.source {
            Source::Definition(text) => {
                part.file.write_all_at(text.as_bytes(), 0).map_err(|error| part.failed(error))?;
                let size = text.len() as u64;
                part.take_name()?;
                Exported { file: part.path(), what: "definition", size, written: size, root: None }
            }
            Source::Image { target, kind, image, format } => {
                if !silent {
                    let _ =
                        writeln!(std::io::stderr(), "{}  {}", crate::text::safe(target), size_of(image.size));
                }
                let written = Box::pin(fill(vault, ids, fetcher, kind, image, &part)).await;
                let written = written.map_err(|error| sink_fault(opened, &part, &error))?;
                let path =
                    if format == Format::Qcow2 { convert(folder, &part).await? } else { part.take_name()? };
                let what = if kind == BlobType::Data { "disk" } else { "stream" };
                Exported { file: path, what, size: image.size, written, root: Some(image.root.to_string()) }
            }
        };
        exported.push(file);
    }
    Ok(exported)
}

/// Writes an image into a new file. How many bytes are not zero.
async fn fill(
    vault: &Vault,
    ids: &IdKeys,
    fetcher: &Fetcher,
    kind: BlobType,
    image: &Image,
    part: &Part<'_>,
) -> Result<u64, VaultError> {
    let mut sink = Holes::new(Arc::new(part.file.try_clone()?), image.size)?;
    Ok(Box::pin(read_image(vault, ids, fetcher, kind, image, &mut sink, false)).await?.written)
}

/// A file that does not have its name yet; without it, it is removed.
struct Part<'a> {
    folder: &'a Folder,
    name: &'a Component,
    aside: Component,
    file: File,
}

impl<'a> Part<'a> {
    fn begin(folder: &'a Folder, name: &'a Component) -> Result<Self, Fault> {
        let aside = Component::encoded(&format!("{}.part", uuid::Uuid::now_v7().simple()));
        let file = folder.create_file(&aside).map_err(|error| place_fault(&error))?;
        Ok(Self { folder, name, aside, file })
    }

    fn path(&self) -> PathBuf {
        self.folder.path_of(self.name)
    }

    fn failed(&self, error: Error) -> Fault {
        place_fault(&root_error("write", self.path(), error))
    }

    /// Makes the file durable, and gives it its name.
    fn take_name(&self) -> Result<PathBuf, Fault> {
        self.file.sync_all().map_err(|error| self.failed(error))?;
        self.folder
            .rename(&self.aside, self.name)
            .and_then(|()| self.folder.sync())
            .map_err(|error| place_fault(&error))?;
        Ok(self.path())
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        // Without effect once it has its name.
        let _ = self.folder.remove_file(&self.aside);
    }
}

/// Converts a raw file into a qcow2 file that is there and empty. Durable on return; ends when nobody waits for it.
pub(in crate::cli) async fn to_qcow2_unless_given_up(from: PathBuf, to: PathBuf) -> Result<(), String> {
    let wanted = Wanting::default();
    let given_up = Arc::clone(&wanted.0);
    let converting =
        tokio::task::spawn_blocking(move || to_qcow2(&from, &to, &|| given_up.load(Ordering::Relaxed)));
    match converting.await {
        Ok(converted) => converted.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Ends a conversion that nobody waits for any more: the process does not end before it has.
#[derive(Default)]
struct Wanting(Arc<AtomicBool>);

impl Drop for Wanting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Converts what was written into a qcow2 file of the same name.
async fn convert(folder: &Folder, raw: &Part<'_>) -> Result<PathBuf, Fault> {
    // Made here, because `qemu-img` would make it readable for others.
    let qcow2 = Part::begin(folder, raw.name)?;
    let (from, to) = (folder.path_of(&raw.aside), folder.path_of(&qcow2.aside));
    match to_qcow2_unless_given_up(from, to).await {
        Ok(()) => qcow2.take_name(),
        Err(cause) => Err(not_converted(&qcow2.path(), &cause)),
    }
}

pub(in crate::cli) fn not_converted(path: &Path, cause: &str) -> Fault {
    let path = path.display().to_string();
    Fault::permanent(codes::CANNOT_COPY_IMAGE_TO_BACKUP_LOCATION, "convert the disk", path, cause)
        .remedy("Make room there, or write it raw: --format raw")
}

fn sink_fault(opened: &Opened, part: &Part<'_>, error: &VaultError) -> Fault {
    match error {
        VaultError::Io(error) => part.failed(Error::new(error.kind(), error.to_string())),
        error => opened.fault(DOING, error),
    }
}

pub(in crate::cli) fn root_error(act: &'static str, path: PathBuf, source: Error) -> RootError {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            RootError::NoSpace { act, path }
        }
        _ => RootError::Io { act, path, source },
    }
}

pub(in crate::cli) fn place_fault(error: &RootError) -> Fault {
    let (code, path) = match error {
        RootError::Exists { path } => (codes::BACKUP_EXISTS, path.clone()),
        RootError::NoSpace { path, .. } => (codes::NOT_ENOUGH_DISK_SPACE, path.clone()),
        RootError::Escapes { path } | RootError::WrongKind { path, .. } => (codes::UNSAFE_PATH, path.clone()),
        RootError::Io { path, .. } | RootError::Missing { path } => {
            (codes::CANNOT_WRITE_TO_BACKUP_LOCATION, path.clone())
        }
        _ => (codes::UNSAFE_PATH, PathBuf::new()),
    };
    Fault::permanent(code, DOING, path.display().to_string(), error)
}

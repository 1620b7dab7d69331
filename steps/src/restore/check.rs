//! Everything that can be found out before anything is touched.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmkeep_workflow::{Code, Fault};

use super::define::find;
use super::folder::PlaceInput;
use super::identity::StoredDefinition;
use super::image::ImageInput;
use super::memory::GO_COLD;
use super::options::{RestoreOptions, RestoreSettings};
use crate::codes;
use crate::hypervisor::{
    Definition, DiskDef, DiskDevice, DiskSource, DomainId, DomainRef, HvError, Target, Trouble,
};
use crate::image::qemu_img::QemuImg;
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::image::space::{Space, data_bytes};
use crate::manifest::{self, Depth, Manifest, ManifestError, Stored};
use crate::snapshot::copy::place_fault;
use crate::snapshot::{Places, World};
use crate::text;

/// What the plan was built on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    /// The backup's folder.
    pub backup: PathBuf,
    /// Its owner has named that folder himself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside: bool,
    /// The hash of its manifest.
    pub manifest: manifest::Digest,
    /// The new domain: neither its name nor its UUID exist.
    pub domain: DomainRef,
    /// Paths that do not exist.
    pub free: Vec<PathBuf>,
}

/// What a definition is compared with: the domain that a backup is of, and the disks that it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holds<'a> {
    pub(crate) name: &'a str,
    pub(crate) id: DomainId,
    pub(crate) disks: &'a [&'a str],
}

impl Holds<'_> {
    fn has(&self, disk: &DiskDef) -> bool {
        self.disks.contains(&disk.target.0.as_str())
    }
}

/// The disks that a backup in a folder holds.
pub(crate) fn targets(manifest: &Manifest) -> Vec<&str> {
    manifest.disks.iter().map(|disk| disk.target.as_str()).collect()
}

/// What a backup in a folder holds.
pub(crate) fn holds<'a>(manifest: &'a Manifest, disks: &'a [&'a str]) -> Holds<'a> {
    Holds { name: &manifest.domain.name, id: DomainId(manifest.domain.uuid), disks }
}

/// Reads the backup, and looks whether all of it is there.
pub(crate) async fn read_backup(places: &Places, folder: &Path, outside: bool) -> Result<Stored, Fault> {
    let (places, path) = (places.clone(), folder.to_owned());
    let object = folder.display().to_string();
    match crate::blocking::run(move || read_now(&places, &path, outside)).await {
        Ok(read) => read,
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, "read the backup", object, e)),
    }
}

fn read_now(places: &Places, path: &Path, outside: bool) -> Result<Stored, Fault> {
    let doing = "read the backup";
    let object = path.display().to_string();
    let folder =
        places.open(path, outside).map_err(|e| place_fault(&e, codes::NO_SUCH_BACKUP, doing, &object))?;
    let stored = manifest::read(&folder).map_err(|e| {
        let code = match &e {
            ManifestError::Place(RootError::Missing { .. }) => codes::NO_SUCH_BACKUP,
            ManifestError::Place(place) => {
                return place_fault(place, codes::MANIFEST_MISMATCH, doing, &object);
            }
            ManifestError::TooNew { .. } => codes::MANIFEST_TOO_NEW,
            _ => codes::MANIFEST_MISMATCH,
        };
        Fault::permanent(code, doing, &object, e)
    })?;
    let found = manifest::verify(&folder, &stored, Depth::Quick, &QemuImg::default(), None, &())
        .map_err(|e| Fault::permanent(codes::MANIFEST_MISMATCH, doing, &object, e))?;
    let serious: Vec<_> = found.iter().filter(|f| f.problem.serious()).map(ToString::to_string).collect();
    if serious.is_empty() {
        return Ok(stored);
    }
    let missing = found.iter().any(|f| f.problem == manifest::Problem::Missing);
    let code = if missing { codes::MISSING_NECESSARY_FILES } else { codes::MANIFEST_MISMATCH };
    Err(Fault::permanent(code, doing, object, serious.join("; "))
        .remedy("Use another backup, or bring the files back"))
}

/// The definition in the backup, as text and as the hypervisor reads it.
pub(crate) async fn definition(
    world: &World,
    places: &Places,
    options: &RestoreOptions,
    manifest: &Manifest,
) -> Result<(StoredDefinition, Definition), Fault> {
    let doing = "read the definition";
    let name = manifest.definition.inactive.clone();
    let Some(entry) = manifest.file(&name) else {
        return Err(Fault::permanent(codes::MANIFEST_MISMATCH, doing, name.to_string(), "it is not listed"));
    };
    let stored = StoredDefinition {
        backup: options.backup.clone(),
        outside: options.outside,
        name,
        blake3: entry.blake3,
    };
    let text = stored.read(places).await?;
    let parsed = world
        .hypervisor
        .parse_definition(&text)
        .map_err(|e| Fault::permanent(codes::CANNOT_READ_XML_FILE, doing, &manifest.domain.name, e))?;
    Ok((stored, parsed))
}

/// Whether a definition that lay outside the roots, where anybody may have written it, may be used.
///
/// What a backup below a root says was written by this very program.
pub(crate) fn harmless(
    options: &RestoreOptions,
    definition: &Definition,
    manifest: &Manifest,
) -> Result<(), Fault> {
    if !options.outside || options.trusted {
        return Ok(());
    }
    let doing = "use a definition from outside the roots";
    reaches_nowhere(doing, definition, holds(manifest, &targets(manifest)))
}

/// Whether a definition keeps to its machine: it is a program for whoever runs the hypervisor, and names a binary to start,
/// scripts to run, files of the host to read and to write.
pub(crate) fn reaches_nowhere(doing: &str, definition: &Definition, held: Holds<'_>) -> Result<(), Fault> {
    let mut reaches = definition.devices.reaches.clone();
    for disk in &definition.disks {
        if let DiskSource::File(path) = &disk.source
            && !held.has(disk)
        {
            reaches.push(format!("disk {} is {}", disk.target, path.display()));
        }
    }
    if reaches.is_empty() {
        return Ok(());
    }
    let cause = format!("it reaches into the host: {}", reaches.join("; "));
    Err(Fault::permanent(codes::DEFINITION_NOT_TRUSTED, doing, held.name, cause)
        .remedy("Read it; if you answer for it: `--trust-definition`"))
}

/// Whether name and UUID are free, and libvirt would take the name.
pub(crate) async fn name(world: &World, domain: &DomainRef) -> Result<(), Fault> {
    let doing = "name the new domain";
    let name = &domain.name;
    if name.trim().is_empty() || name.contains(['/', '\n', '\0']) {
        let cause = "libvirt takes no names that are empty, or contain a slash or the end of a line";
        return Err(
            Fault::permanent(codes::USAGE, doing, format!("{name:?}"), cause).remedy("Choose another name")
        );
    }
    if let Some(cause) = taken(world, domain).await.map_err(|e| look_fault(e, doing, name))? {
        return Err(Fault::permanent(codes::DOMAIN_EXISTS, doing, name, cause)
            .remedy("Choose another name: a restore never replaces a domain"));
    }
    Ok(())
}

async fn taken(world: &World, domain: &DomainRef) -> Result<Option<String>, HvError> {
    let all = world.hypervisor.domains().await?;
    let found = all.iter().find(|other| other.name == domain.name || other.id == domain.id);
    Ok(found.map(|other| format!("there is a domain {} ({})", other.name, other.id)))
}

fn look_fault(e: HvError, doing: &str, object: &str) -> Fault {
    e.fault(codes::CANNOT_FIND_MACHINE, doing, object)
}

/// Whether the original is still defined here.
pub(crate) async fn original_exists(world: &World, held: Holds<'_>) -> Result<bool, Fault> {
    let original = DomainRef { id: held.id, name: held.name.to_owned() };
    let found = find(world, &original).await;
    found.map(|found| found.is_some()).map_err(|e| look_fault(e, "look for the original", &original.name))
}

/// What becomes of the disks that the definition has and the backup has not: those that must go, and what to say.
///
/// What only reads stays, if its medium is there. What writes must not be shared with the original.
pub(crate) async fn others(
    definition: &Definition,
    held: Holds<'_>,
) -> Result<(Vec<Target>, Vec<String>), Fault> {
    let (mut without, mut notes) = (Vec::new(), Vec::new());
    for disk in not_in(held, definition) {
        match unfit(disk).await {
            Some(why) => {
                notes.push(format!("Disk {} was left out: {why}.", disk.target));
                without.push(disk.target.clone());
            }
            None if matches!(disk.source, DiskSource::Empty) => {}
            None => notes.push(format!("Disk {} is the same medium that the original has.", disk.target)),
        }
    }
    all_named(held, definition)?;
    Ok((without, notes))
}

/// Whether a guest that goes on from its memory finds all its disks again. By the definition in the memory image, and no
/// other, are they to be counted: the one from which it would have started the next time may have more, or fewer.
async fn finds_its_disks(definition: &Definition, held: Holds<'_>) -> Result<(), Fault> {
    for disk in not_in(held, definition) {
        let Some(why) = unfit(disk).await else { continue };
        let cause =
            format!("the guest's memory expects disk {}, which is not in the backup: {why}", disk.target);
        let doing = "restore the domain with its memory";
        return Err(Fault::permanent(codes::MEMORY_INCOMPATIBLE, doing, held.name, cause).remedy(GO_COLD));
    }
    all_named(held, definition)
}

fn not_in<'a>(held: Holds<'a>, definition: &'a Definition) -> impl Iterator<Item = &'a DiskDef> {
    definition.disks.iter().filter(move |disk| !held.has(disk))
}

fn all_named(held: Holds<'_>, definition: &Definition) -> Result<(), Fault> {
    for disk in held.disks {
        if definition.disk(&Target((*disk).to_owned())).is_none() {
            let cause = format!("the backup holds disk {disk}, which its definition does not have");
            return Err(Fault::permanent(codes::MANIFEST_MISMATCH, "read the backup", held.name, cause));
        }
    }
    Ok(())
}

/// Why a disk that is not in the backup cannot be in the new domain.
async fn unfit(disk: &DiskDef) -> Option<String> {
    let only_reads = disk.read_only || matches!(disk.device, DiskDevice::Cdrom | DiskDevice::Floppy);
    match &disk.source {
        DiskSource::Empty => None,
        DiskSource::File(path) | DiskSource::Block(path) if only_reads => {
            match tokio::fs::metadata(path).await {
                Ok(_) => None,
                Err(e) => Some(format!("its medium {} is not there ({e})", path.display())),
            }
        }
        _ if only_reads => None,
        _ => Some("the original writes to it, and two must not".to_owned()),
    }
}

/// Whether the memory image can be used here at all, and with the disks that the backup has.
pub(crate) async fn memory(
    world: &World,
    places: &Places,
    options: &RestoreOptions,
    manifest: &Manifest,
    saved: &manifest::SavedMemory,
) -> Result<(), Fault> {
    let doing = "look at the memory image";
    let object = options.backup.join(saved.file.as_str()).display().to_string();
    let unknown =
        |cause: String| Fault::permanent(codes::MEMORY_FORMAT_UNKNOWN, doing, &object, cause).remedy(GO_COLD);
    if saved.version != 2 || saved.compression == "unknown" {
        let cause = format!("it is of version {} and compression {:?}", saved.version, saved.compression);
        return Err(unknown(cause));
    }
    let folder = places.open(&options.backup, options.outside);
    let folder = folder.map_err(|e| place_fault(&e, codes::CANNOT_READ_STATE_FILE, doing, &object))?;
    let read = world.hypervisor.memory_image_definition(&folder.path_of(&saved.file)).await;
    let text = read.map_err(|e| match e.trouble {
        Trouble::Unreachable | Trouble::TimedOut => look_fault(e, doing, &object),
        _ => unknown(e.to_string()),
    })?;
    // A guest is loaded with the definition that lies in the image, whatever other one there is.
    let parsed = world.hypervisor.parse_definition(&text).map_err(|e| unknown(e.to_string()))?;
    harmless(options, &parsed, manifest)?;
    finds_its_disks(&parsed, holds(manifest, &targets(manifest))).await?;
    let here = world.hypervisor.environment().await.map_err(|e| look_fault(e, doing, &object))?;
    if let (Some(then), Some(now)) = (&manifest.host.qemu, here.get("qemu"))
        && let (Some(made), Some(present)) = (version(then), version(now))
        && made > present
    {
        let cause = format!("it was written by QEMU {then}, this one is {now}");
        return Err(Fault::permanent(codes::MEMORY_INCOMPATIBLE, doing, object, cause).remedy(GO_COLD));
    }
    Ok(())
}

/// Major and minor number: what counts for whether a memory image is understood.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

/// Room that is needed, and where.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub(crate) folder: PathBuf,
    /// That is the folder of an image of the domain's own.
    pub(crate) own: bool,
    /// The file, which must not be there; nothing for one that gets no name.
    pub(crate) name: Option<Component>,
    pub(crate) bytes: u64,
}

/// The folders that are needed, and what of them is missing; nothing may be where an image goes; and there is room.
pub(crate) async fn room(
    places: &Places,
    settings: RestoreSettings,
    images: &[ImageInput],
    memory: Option<(PathBuf, bool, u64)>,
) -> Result<Vec<PlaceInput>, Fault> {
    let images = images.to_vec();
    room_for(places, settings, move |places| {
        let want = |image: &ImageInput| {
            let (folder, name) = (image.folder.clone(), Some(image.name.clone()));
            Ok(Want { folder, own: image.own, name, bytes: data_of(places, image)? })
        };
        let memory = memory.map(|(folder, own, bytes)| Ok(Want { folder, own, name: None, bytes }));
        images.iter().map(want).chain(memory).collect()
    })
    .await
}

/// The same for whatever is wanted.
pub(crate) async fn room_for(
    places: &Places,
    settings: RestoreSettings,
    wants: impl FnOnce(&Places) -> Result<Vec<Want>, Fault> + Send + 'static,
) -> Result<Vec<PlaceInput>, Fault> {
    let places = places.clone();
    match crate::blocking::run(move || room_now(&places, settings, wants(&places)?)).await {
        Ok(found) => found,
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, "find a place for the disks", String::new(), e)),
    }
}

fn room_now(places: &Places, settings: RestoreSettings, wants: Vec<Want>) -> Result<Vec<PlaceInput>, Fault> {
    let doing = "find a place for the disks";
    let mut found: Vec<PlaceInput> = Vec::new();
    let mut needed: BTreeMap<u64, (u64, Space, PathBuf)> = BTreeMap::new();
    for Want { folder, own, name, bytes } in wants {
        let object = folder.display().to_string();
        let fault = |e: &RootError| place_fault(e, codes::CANNOT_WRITE_TO_BACKUP_LOCATION, doing, &object);
        let (open, missing) = match own {
            true => (places.open(&folder, true).map_err(|e| fault(&e))?, Vec::new()),
            false => nearest(places, &folder).map_err(|e| fault(&e))?,
        };
        open.check_writable().map_err(|e| fault(&e))?;
        if let Some(name) = name
            && missing.is_empty()
            && open.stat(&name).map_err(|e| fault(&e))?.is_some()
        {
            let path = open.path_of(&name).display().to_string();
            return Err(Fault::permanent(codes::BACKUP_EXISTS, doing, path, "something is there already")
                .remedy("Choose another place: nothing is ever overwritten"));
        }
        let stat = rustix::fs::fstat(&open)
            .map_err(|e| Fault::permanent(codes::NO_DISK_SPACE_INFORMATION, doing, &object, e))?;
        let space = open.space().map_err(|e| fault(&e))?;
        let entry = needed.entry(stat.st_dev).or_insert_with(|| (0, space, folder.clone()));
        entry.0 = entry.0.saturating_add(bytes);
        if !own && !found.iter().any(|place| place.folder == folder) {
            found.push(PlaceInput { folder, missing, rights: settings.rights.folder() });
        }
    }
    for (bytes, space, folder) in needed.into_values() {
        if !settings.targets.allows(space, bytes) {
            let cause = format!(
                "{} are needed and {} must stay free, {} are free",
                text::bytes(bytes),
                text::bytes(settings.targets.mark(space.total)),
                text::bytes(space.free)
            );
            return Err(Fault::permanent(
                codes::NOT_ENOUGH_DISK_SPACE,
                doing,
                folder.display().to_string(),
                cause,
            )
            .remedy("Make room there, or choose another place"));
        }
    }
    Ok(found)
}

/// Bytes that the restored image will take.
fn data_of(places: &Places, image: &ImageInput) -> Result<u64, Fault> {
    let doing = "read the backup";
    let object = image.wanted.backup.join(image.wanted.name.as_str()).display().to_string();
    let fault =
        |e: &dyn std::fmt::Display| Fault::permanent(codes::MISSING_NECESSARY_FILES, doing, &object, e);
    let folder = places.open(&image.wanted.backup, image.wanted.outside).map_err(|e| fault(&e))?;
    let file = folder.open_file(&RelPath::from(image.wanted.name.clone())).map_err(|e| fault(&e))?;
    data_bytes(&file).map_err(|e| fault(&e))
}

/// The deepest folder on the way that exists, and those below it that are missing, from the top down.
fn nearest(places: &Places, folder: &Path) -> Result<(Folder, Vec<PathBuf>), RootError> {
    let mut missing = Vec::new();
    let mut at = folder;
    loop {
        match places.roots.open_folder(at) {
            Ok(open) => {
                missing.reverse();
                return Ok((open, missing));
            }
            Err(RootError::Missing { path }) => {
                missing.push(at.to_owned());
                at = at.parent().ok_or(RootError::Missing { path })?;
            }
            Err(e) => return Err(e),
        }
    }
}

impl Facts {
    /// What differs from when the plan was made, if anything does.
    pub(crate) async fn differ(&self, world: &World, places: &Places) -> Result<Option<String>, Fault> {
        let there = read_backup(places, &self.backup, self.outside).await;
        match there {
            Ok(stored) if stored.hash == self.manifest => {}
            Ok(_) => return Ok(Some("the backup's manifest has changed".to_owned())),
            Err(fault) => return Ok(Some(fault.to_string())),
        }
        no_longer_free(world, places, &self.domain, &self.free).await
    }
}

/// What has come to be there since: a domain of that name or UUID, or something at one of these paths.
pub(crate) async fn no_longer_free(
    world: &World,
    places: &Places,
    domain: &DomainRef,
    free: &[PathBuf],
) -> Result<Option<String>, Fault> {
    let doing = "look for the new domain";
    if let Some(cause) = taken(world, domain).await.map_err(|e| look_fault(e, doing, &domain.name))? {
        return Ok(Some(cause));
    }
    let (places, free) = (places.clone(), free.to_vec());
    let looked = crate::blocking::run(move || {
        free.into_iter().find(|path| {
            let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str()))
            else {
                return false;
            };
            let Ok(name) = Component::new(name) else { return false };
            places.roots.open_folder(folder).and_then(|f| f.stat(&name)).is_ok_and(|s| s.is_some())
        })
    });
    match looked.await {
        Ok(found) => Ok(found.map(|path| format!("{} exists now", path.display()))),
        Err(e) => Err(Fault::transient(Code::UNDEFINED, doing, String::new(), e)),
    }
}

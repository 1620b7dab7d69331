//! A backup becomes a new domain in a folder: new name, new UUID, new addresses, and nothing that exists is overwritten.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use vmkeep_steps::hypervisor::{Definition, DomainId, DomainRef, HvError, Target};
use vmkeep_steps::image::name::encode;
use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::root::{Component, Folder};
use vmkeep_steps::restore::from_vault::apart::{self, LARGEST_STATE, MachineState};
use vmkeep_steps::restore::identity::{NewDisk, NewDomain};
use vmkeep_steps::vaults::files::reading_lease;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::index::Index;
use vmkeep_vault::manifest::{Disk, Image, Manifest};
use vmkeep_vault::read::most;
use vmkeep_workflow::{Fault, crash};

use super::define::Hypervisor;
use super::files::{Reader, Wanted};
use super::place::{self, Note, Noted, Place, Taken, begun};
use crate::api::types::ImageFormat;
use crate::cli::args::{Global, OfflineRestore};
use crate::cli::make::whole;
use crate::cli::vault::{Opened, holder, open, refuse_dev};
use crate::cli::{Out, config};
use crate::codes;
use crate::hypervisor::{definition_changes, read_definition, rewrite_definition};
use crate::text::{bytes as size_of, safe};

const DOING: &str = "restore the backup";

/// A machine that was restored.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Restored {
    /// Its name.
    pub(in crate::cli) domain: String,
    /// Its UUID.
    pub(in crate::cli) uuid: String,
    /// Where all of it lies.
    pub(in crate::cli) folder: PathBuf,
    /// Whether the same words had finished it before: then nothing was done, and no files are named.
    pub(in crate::cli) already: bool,
    /// Its definition.
    pub(in crate::cli) definition: PathBuf,
    /// Its disks and other files.
    pub(in crate::cli) files: Vec<RestoredFile>,
    /// Where it was defined.
    pub(in crate::cli) defined: Option<String>,
    /// What its definition has otherwise than the original's.
    pub(in crate::cli) changes: Vec<String>,
    /// What its owner must know.
    pub(in crate::cli) notes: Vec<String>,
}

/// A file of it.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct RestoredFile {
    pub(in crate::cli) file: PathBuf,
    /// A disk's target or a stream's name.
    pub(in crate::cli) what: String,
    /// Bytes that it shows.
    pub(in crate::cli) size: u64,
    /// What proves its content: the manifest holds it, and it was computed from what the file reads as.
    pub(in crate::cli) root: String,
    /// Whether an earlier attempt had written it; then it was read again.
    pub(in crate::cli) before: bool,
}

/// A file that is to be written.
struct Planned<'a> {
    noted: Noted,
    kind: BlobType,
    image: &'a Image,
    format: Format,
}

pub(super) async fn restore(global: &Global, out: &Out, args: OfflineRestore) -> Result<Restored, Fault> {
    name(&args.name)?;
    let config = config(global)?;
    let path = match &args.folder {
        Some(folder) => whole(folder)?,
        None => config.restore_dir.join(encode(&args.name)),
    };
    refuse_dev(&path)?;
    let hypervisor = match &args.define {
        Some(uri) => Some(Hypervisor::connect(uri).await?),
        None => None,
    };
    let opened = open(global, &args.vault.clone().into()).await?;
    let (all, id) = opened.backup(&args.backup).await?;
    let domain = all
        .get(id)
        .map(|backup| backup.domain)
        .ok_or_else(|| Fault::permanent(codes::NO_SUCH_BACKUP, DOING, id.to_string(), "it is gone"))?;
    // Before the backup is looked at: what is found then stays.
    let lease = reading_lease(&opened.vault, &holder("restore")).await;
    let lease = lease.map_err(|error| opened.fault(DOING, &error))?;
    let work = Work { opened: &opened, args: &args, path: &path, hypervisor: hypervisor.as_ref(), out };
    let restored = Box::pin(work.restore((domain, id), lease.is_some())).await;
    if let Some(lease) = lease
        && let Err(error) = lease.end().await
    {
        tracing::warn!(%error, "the vault was not told that nobody reads any more");
    }
    restored
}

fn name(name: &str) -> Result<(), Fault> {
    if !name.trim().is_empty() && !name.contains(['/', '\n', '\0']) {
        return Ok(());
    }
    let cause = "libvirt takes no names that are empty, or contain a slash or the end of a line";
    let fault = Fault::permanent(codes::USAGE, "name the new domain", format!("{name:?}"), cause);
    Err(fault.remedy("Choose another name"))
}

struct Work<'a> {
    opened: &'a Opened,
    args: &'a OfflineRestore,
    path: &'a Path,
    hypervisor: Option<&'a Hypervisor>,
    out: &'a Out,
}

fn unread(error: HvError) -> Fault {
    error.fault(codes::CANNOT_READ_XML_FILE, "read the definition", "")
}

impl Work<'_> {
    async fn restore(
        &self,
        backup: (vmkeep_vault::ids::DomainId, vmkeep_vault::ids::BackupId),
        report: bool,
    ) -> Result<Restored, Fault> {
        let vault = vmkeep_steps::vaults::Opened {
            vault: self.opened.vault.clone(),
            cache: Some(self.opened.cache()),
            host: holder("").host,
        };
        let label = self.opened.settings.label();
        let manifest = apart::manifest(&vault, &label, backup, self.args.unchecked).await?;
        let instead =
            format!("Write it as files: `vmkeep vault export {label} {} --to FOLDER`", manifest.backup);
        if manifest.definition.is_empty() {
            let (object, cause) =
                (manifest.backup.to_string(), "it has no definition, as one of plain images");
            return Err(Fault::permanent(codes::CANNOT_READ_XML_FILE, DOING, object, cause).remedy(instead));
        }
        let definition = read_definition(&manifest.definition);
        let definition = definition.map_err(|error| unread(error).remedy(instead))?;
        let disks = self.chosen(&manifest)?;
        let targets: Vec<&str> = disks.iter().map(|disk| disk.target.as_str()).collect();
        let trusted = self.args.trust_definition;
        let (without, mut notes) = apart::fit(&vault, &manifest, &targets, &definition, trusted).await?;
        let state = apart::state(&manifest, &definition)?;
        notes.extend(state.notes.iter().cloned());
        let planned = self.planned(&disks, &state);

        let files = planned.iter().map(|one| one.noted.clone()).collect();
        let note = Note::new(self.opened.vault.id(), manifest.backup, &self.args.name, files);
        if let Some(hypervisor) = self.hypervisor {
            // A name that is taken is found before anything is made.
            let id = DomainId(begun(self.path).unwrap_or(note.uuid));
            hypervisor.refuse_taken(&DomainRef { id, name: self.args.name.clone() }).await?;
        }
        let taken = Place::take(self.path, note)?;
        let place = match taken {
            Taken::Ours(place) => place,
            Taken::Finished(folder, note) => return self.finished(&folder, &note).await,
        };
        crash::point("offline/note");
        if place.resumed && !self.out.json {
            let _ = writeln!(std::io::stderr(), "going on with what was begun in {}", shown(self.path));
        }

        let index = Box::pin(Index::load(&self.opened.vault, Some(&self.opened.cache()))).await;
        let index = Arc::new(index.map_err(|error| self.opened.fault("read the vault's index", &error))?);
        let ids = self.opened.vault.ids(manifest.domain);
        let cache = Some(self.opened.cache());
        let fetcher = Fetcher::new(&self.opened.vault, ids.clone(), index, cache, report);
        let reader = Reader { opened: self.opened, ids, fetcher };
        self.room(&place, &reader.fetcher, &planned).await?;
        let mut files = Vec::new();
        for one in &planned {
            if !self.out.json {
                let _ = writeln!(std::io::stderr(), "{}  {}", safe(&one.noted.what), size_of(one.image.size));
            }
            let wanted = Wanted { kind: one.kind, image: one.image, noted: &one.noted, format: one.format };
            let before = Box::pin(reader.restore(&place, wanted)).await?;
            files.push(RestoredFile {
                file: place.folder.path_of(&one.noted.file),
                what: one.noted.what.clone(),
                size: one.image.size,
                root: one.image.root.to_string(),
                before,
            });
        }

        let new = self.new_domain(&place, &manifest, &definition, &planned, without, &mut notes).await?;
        let xml = rewrite_definition(&manifest.definition, &new.identity()).map_err(unread)?;
        let changes = definition_changes(&manifest.definition, &xml).map_err(unread)?;
        let file = Component::encoded(&format!("{}.xml", self.args.name));
        place.put(&file, &Component::encoded(&format!("{file}.part")), xml.as_bytes())?;
        crash::point("offline/definition");
        self.tpm(&place, &reader, &state, &new, &mut notes).await?;
        crash::point("offline/tpm");
        let definition = place.folder.path_of(&file);
        match self.hypervisor {
            Some(hypervisor) => hypervisor.define(&new.domain, &xml).await?,
            None => notes.push(format!("To define it: virsh define {}", shown(&definition))),
        }
        crash::point("offline/defined");
        if !place.is_passable() {
            notes.push(format!("QEMU's user must be able to pass: chmod o+x {}", shown(self.path)));
        }
        notes.extend(apart::advice(&manifest, &new));
        place.finish()?;
        crash::point("offline/finished");
        Ok(Restored {
            domain: new.domain.name,
            uuid: new.domain.id.to_string(),
            folder: self.path.to_owned(),
            already: false,
            definition,
            files,
            defined: self.args.define.clone(),
            changes,
            notes,
        })
    }

    /// The same words once more, after all was done: they find it so, and touch nothing.
    async fn finished(&self, folder: &Folder, note: &Note) -> Result<Restored, Fault> {
        let file = Component::encoded(&format!("{}.xml", self.args.name));
        let mut missing = None;
        for name in note.files.iter().map(|noted| &noted.file).chain([&file]) {
            let there = folder.stat(name).map_err(|error| crate::cli::vault::export::place_fault(&error))?;
            if there.is_none() {
                missing = Some(format!("{name} is missing"));
            }
        }
        if let Some(hypervisor) = self.hypervisor
            && !hypervisor.has(&DomainId(note.uuid)).await?
        {
            missing = Some("its domain is not defined there".to_owned());
        }
        if let Some(missing) = missing {
            return Err(place::finished(folder, &Ok(note.clone()), &format!("; {missing}")));
        }
        Ok(Restored {
            domain: note.name.clone(),
            uuid: note.uuid.to_string(),
            folder: self.path.to_owned(),
            already: true,
            definition: folder.path_of(&file),
            files: Vec::new(),
            defined: self.args.define.clone(),
            changes: Vec::new(),
            notes: vec!["Nothing was done, and what it has become since was not looked at.".to_owned()],
        })
    }

    fn chosen<'m>(&self, manifest: &'m Manifest) -> Result<Vec<&'m Disk>, Fault> {
        for wanted in &self.args.disks {
            if manifest.disks.iter().all(|disk| disk.target != *wanted) {
                let has: Vec<&str> = manifest.disks.iter().map(|disk| disk.target.as_str()).collect();
                let cause = "the backup has no such disk";
                return Err(Fault::permanent(codes::NO_SUCH_DISK, DOING, wanted, cause)
                    .remedy(format!("It has {}", has.join(", "))));
            }
        }
        let chosen = |disk: &&Disk| self.args.disks.is_empty() || self.args.disks.contains(&disk.target);
        Ok(manifest.disks.iter().filter(chosen).collect())
    }

    /// The files, each with its place.
    fn planned<'m>(&self, disks: &[&'m Disk], state: &MachineState<'m>) -> Vec<Planned<'m>> {
        let name = &self.args.name;
        let mut planned = Vec::new();
        for disk in disks {
            let format = match self.args.format {
                Some(ImageFormat::Raw) => Format::Raw,
                Some(ImageFormat::Qcow2) => Format::Qcow2,
                None if disk.source_format == Format::Qcow2.as_str() => Format::Qcow2,
                None => Format::Raw,
            };
            let file = Component::encoded(&format!("{name}-{}.{}", disk.target, format.as_str()));
            let noted = noted(file, &disk.target, format, &disk.image);
            planned.push(Planned { noted, kind: BlobType::Data, image: &disk.image, format });
        }
        if let Some((stream, suffix)) = state.variables {
            let file = Component::encoded(&format!("{name}_VARS.{suffix}"));
            // Written as it is, whatever it is.
            let noted = noted(file, &stream.name, Format::Raw, &stream.image);
            planned.push(Planned {
                noted,
                kind: BlobType::Stream,
                image: &stream.image,
                format: Format::Raw,
            });
        }
        planned
    }

    /// Whether what is still missing finds room.
    async fn room(&self, place: &Place, fetcher: &Fetcher, planned: &[Planned<'_>]) -> Result<(), Fault> {
        let failed = |error: VaultError| self.opened.fault("see how much room the disks take", &error);
        let placed = |error| crate::cli::vault::export::place_fault(&error);
        let (mut needed, mut twice) = (0_u64, 0_u64);
        for one in planned {
            if place.folder.stat(&one.noted.file).map_err(placed)?.is_some() {
                continue;
            }
            let weight = match one.kind {
                BlobType::Data => Box::pin(most(fetcher, one.image)).await.map_err(failed)?,
                _ => one.image.size,
            };
            needed = needed.saturating_add(weight);
            if one.format == Format::Qcow2 {
                // While one is converted it is there twice.
                twice = twice.max(weight);
            }
        }
        let needed = needed.saturating_add(twice);
        let free = place.folder.space().map_err(placed)?.free;
        if free >= needed {
            return Ok(());
        }
        let cause = format!("{} are needed and {} are free", size_of(needed), size_of(free));
        let path = self.path.display().to_string();
        Err(Fault::permanent(codes::NOT_ENOUGH_DISK_SPACE, DOING, path, cause)
            .remedy("Make room there and do it again, or take another folder: `--folder`"))
    }

    async fn new_domain(
        &self,
        place: &Place,
        manifest: &Manifest,
        definition: &Definition,
        planned: &[Planned<'_>],
        without: Vec<Target>,
        notes: &mut Vec<String>,
    ) -> Result<NewDomain, Fault> {
        let disks = planned.iter().filter(|one| one.kind == BlobType::Data);
        let disk = |one: &Planned<'_>| NewDisk {
            target: Target(one.noted.what.clone()),
            path: place.folder.path_of(&one.noted.file),
            format: one.format,
        };
        let nvram = planned.iter().find(|one| one.kind == BlobType::Stream);
        let original_there = match self.hypervisor {
            Some(hypervisor) => hypervisor.has(&apart::original(manifest)).await?,
            // Nobody knows.
            None => true,
        };
        let domain = DomainRef { id: DomainId(place.note.uuid), name: self.args.name.clone() };
        let new = NewDomain {
            disks: disks.map(disk).collect(),
            without,
            links_down: original_there && !self.args.connect,
            same: false,
            nvram: nvram.map(|one| place.folder.path_of(&one.noted.file)),
            domain,
        };
        if new.links_down && definition.devices.network_cards > 0 {
            let id = new.domain.id;
            notes.push(format!(
                "Its network links are down, because the original may be running. To put a cable in: \
                 virsh domif-setlink {id} ADDRESS up"
            ));
        }
        Ok(new)
    }

    /// The TPM's state: where libvirt keeps it, or beside the disks.
    async fn tpm(
        &self,
        place: &Place,
        reader: &Reader<'_>,
        state: &MachineState<'_>,
        new: &NewDomain,
        notes: &mut Vec<String>,
    ) -> Result<(), Fault> {
        if state.tpm.is_empty() {
            return Ok(());
        }
        let mut files = Vec::with_capacity(state.tpm.len());
        for (below, name, stream) in &state.tpm {
            let bytes = reader.hold(&stream.name, &stream.image, LARGEST_STATE).await?;
            files.push((below.clone(), name.clone(), bytes));
        }
        if let Some(hypervisor) = self.hypervisor {
            return hypervisor.put_tpm(&new.domain, files).await;
        }
        let folder = place.folder.path_of(&Component::encoded(&format!("{}-tpm", self.args.name)));
        let files: Vec<_> =
            files.iter().map(|(below, name, bytes)| (&**below, &**name, bytes.as_slice())).collect();
        apart::write_tpm(&folder, &files)?;
        notes.push(format!(
            "Its TPM's state is in {}. Before its first start, with libvirt of the system: cp -a {0} \
             /var/lib/libvirt/swtpm/{}",
            shown(&folder),
            new.domain.id
        ));
        Ok(())
    }
}

fn noted(file: Component, what: &str, format: Format, image: &Image) -> Noted {
    Noted { file, what: what.to_owned(), format: format.as_str().to_owned(), root: image.root }
}

fn shown(path: &Path) -> String {
    safe(&path.to_string_lossy())
}

pub(super) fn text(restored: &Restored) -> String {
    let how = if restored.already { "is restored already" } else { "is restored" };
    let mut text = format!("{} ({}) {how}.\n", safe(&restored.domain), restored.uuid);
    for file in &restored.files {
        let root = file.root.get(..16).unwrap_or(&file.root);
        let before = if file.before { ", written before" } else { "" };
        text.push_str(&format!(
            "  {}  {}  {}, root {root}{before}\n",
            safe(&file.what),
            shown(&file.file),
            size_of(file.size)
        ));
    }
    text.push_str(&format!("  definition  {}\n", shown(&restored.definition)));
    if let Some(uri) = &restored.defined {
        text.push_str(&format!("  defined at  {}\n", safe(uri)));
    }
    for change in &restored.changes {
        text.push_str(&format!("  changed: {}\n", safe(change)));
    }
    for note in &restored.notes {
        text.push_str(&format!("  {}\n", safe(note)));
    }
    text
}

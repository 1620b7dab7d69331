//! `vmkeep vault import`: images and backups in folders become backups in a vault, byte for byte.
//!
//! QEMU reads the images ([`vmkeep_steps::vaults::read_back::open_image`]), each with what it stands on: what a guest would see
//! is what the vault gets, in full and without a checkpoint. **Nobody may write to any of it meanwhile.** QEMU's own locks do
//! not see to that: a raw image that a guest uses is opened for reading all the same, and a mount takes no such lock. So who
//! may write to a file of a chain is looked for before it is read and again afterwards ([`mod@super::users`]; of processes of
//! others only by root), and every file is compared with itself, at the end, in its size and times; what has changed is no
//! backup. A device has no such times: whoever has come and gone while it was read is not found.
//!
//! **A backup in a folder** is read against its own hashes before anything of it is believed, and keeps its id, so it is in a
//! vault once, however often it is imported, also after an import that was cut off. Its memory stays where it is: a vault
//! has no place for one yet. **Plain images** are a backup of the instant that is given, or else of the last change to any
//! of them; an import that is repeated is another backup, which stores what is new in it.

use std::io::Write as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use vmkeep_steps::image::chain::{self, Element};
use vmkeep_steps::image::copy::Identity;
use vmkeep_steps::vaults::read_back::open_image;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{BackupId, BlobId, DomainId};
use vmkeep_vault::manifest::{Disk, Host, Image, Manifest, Stream};
use vmkeep_vault::names::MarkKind;
use vmkeep_vault::secrets::secret;
use vmkeep_vault::settle::{Settled, settle};
use vmkeep_vault::source::{DiskReader, DiskSource as _};
use vmkeep_vault::tree::Tree;
use vmkeep_vault::write::{self, Extent, Outcome, Parts, Readiness, Session};
use vmkeep_workflow::{Fault, crash};

use super::classic::classic;
use super::plain::plain;
use super::target::CLAIMED;
use super::users::{Seek, claimed, user};
use super::{Opened, holder, open};
use crate::cli::Out;
use crate::cli::args::{Global, VaultImport};
use crate::codes;
use crate::text::{bytes as size_of, safe};

pub(super) const DOING: &str = "import the backup";
/// How often what is found damaged in the vault meanwhile is written again.
const TRIES: usize = 3;

/// What is to be imported.
pub(super) struct Import {
    /// The backup; one that comes with an id keeps it.
    pub(super) backup: BackupId,
    pub(super) domain: DomainId,
    pub(super) name: String,
    pub(super) taken: Timestamp,
    pub(super) consistency: &'static str,
    pub(super) definition: String,
    pub(super) autostart: bool,
    pub(super) host: Host,
    pub(super) disks: Vec<ImportDisk>,
    /// Names and bytes.
    pub(super) streams: Vec<(String, Vec<u8>)>,
    pub(super) notes: Vec<String>,
}

/// A disk.
pub(super) struct ImportDisk {
    pub(super) target: String,
    /// Its files from the top down, as they were when they were first looked at.
    pub(super) chain: Vec<Element>,
}

/// What became of it.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Imported {
    /// The backup's id in the vault.
    pub(in crate::cli) backup: String,
    /// Its domain's name.
    pub(in crate::cli) domain: String,
    /// Its point in time.
    pub(in crate::cli) at: Timestamp,
    /// Whether it was there already.
    pub(in crate::cli) already: bool,
    /// Its disks.
    pub(in crate::cli) disks: Vec<ImportedDisk>,
    /// What its owner must know.
    pub(in crate::cli) notes: Vec<String>,
}

/// A disk of it.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct ImportedDisk {
    pub(in crate::cli) target: String,
    /// Bytes.
    pub(in crate::cli) size: u64,
    /// Bytes that were put for it.
    pub(in crate::cli) stored: u64,
    /// What proves its content.
    pub(in crate::cli) root: String,
    /// Every file that it was read from, from the top down: a header may name any file of this host.
    pub(in crate::cli) files: Vec<PathBuf>,
}

pub(super) async fn import(global: &Global, out: &Out, args: &VaultImport) -> Result<(), Fault> {
    // All that can be refused without the vault is.
    let import = match &args.from {
        Some(folder) => classic(folder).await?,
        None => plain(args).await?,
    };
    for disk in &import.disks {
        refuse_writers(&disk.chain).await?;
    }
    let opened = open(global, &args.vault).await?;
    let imported = Box::pin(Importer { opened: &opened, args, out }.import(import)).await?;
    out.show(&imported, text)
}

struct Importer<'a> {
    opened: &'a Opened,
    args: &'a VaultImport,
    out: &'a Out,
}

/// How a session ended.
enum End {
    Committed(Manifest),
    /// Put, and its lease revoked: to be settled.
    Unsettled(Manifest),
    Already,
}

impl Importer<'_> {
    fn fault(&self, error: &VaultError) -> Fault {
        self.opened.fault(DOING, error)
    }

    async fn import(&self, import: Import) -> Result<Imported, Fault> {
        let options = write::Options {
            holder: holder("import"),
            folder: Some(self.opened.cache()),
            ..write::Options::default()
        };
        let session = Box::pin(Session::begin(&self.opened.vault, import.domain, options)).await;
        let mut session = session.map_err(|error| self.fault(&error))?;
        let ended = Box::pin(self.write(&mut session, &import)).await;
        // After a put that failed it is not known what is there.
        let source_failed = |fault: &Fault| {
            [codes::CHAIN_UNREADABLE, codes::SOURCE_CHANGED, codes::IMAGE_LOCKED].contains(&fault.code)
        };
        if ended.as_ref().is_err_and(source_failed)
            && let Err(error) = session.keep().await
        {
            tracing::warn!(%error, "what was put of a backup that was not imported waits for a collection");
        }
        if let Err(error) = session.end().await {
            tracing::warn!(%error, "the vault was not told that this writer has ended");
        }
        let (manifest, already) = match ended? {
            End::Committed(manifest) => (Some(manifest), false),
            End::Already => (None, true),
            End::Unsettled(manifest) => {
                self.settle(import.backup).await?;
                (Some(manifest), false)
            }
        };
        let disk = |disk: &Disk| ImportedDisk {
            target: disk.target.clone(),
            size: disk.image.size,
            stored: disk.stored,
            root: disk.image.root.to_string(),
            files: import.disks.iter().filter(|one| one.target == disk.target).flat_map(files_of).collect(),
        };
        Ok(Imported {
            backup: import.backup.to_string(),
            domain: import.name,
            at: import.taken,
            already,
            disks: manifest.iter().flat_map(|manifest| &manifest.disks).map(disk).collect(),
            notes: import.notes,
        })
    }

    async fn settle(&self, backup: BackupId) -> Result<(), Fault> {
        let cache = self.opened.cache();
        let settled = Box::pin(settle(&self.opened.vault, backup, &holder("import"), Some(&cache))).await;
        match settled.map_err(|error| self.fault(&error))? {
            Settled::Checked => Ok(()),
            other => {
                let cause = format!("it is in the vault and nobody answers for it: {other:?}");
                Err(Fault::permanent(codes::BACKUP_NOT_SURE, DOING, backup.to_string(), cause)
                    .remedy("Import it again"))
            }
        }
    }

    async fn write(&self, session: &mut Session, import: &Import) -> Result<End, Fault> {
        let there = session.backups();
        if there.has(import.backup, MarkKind::Prune) {
            let cause = "it was pruned in this vault, which nobody can take back";
            let id = import.backup.to_string();
            return Err(Fault::permanent(codes::VAULT_COPY_REFUSED, DOING, id, cause)
                .remedy("Import its images as plain ones: `--disk`"));
        }
        if there.get(import.backup).is_some() && there.has(import.backup, MarkKind::Checked) {
            return Ok(End::Already);
        }
        let mut manifest = session.manifest(import.backup, import.taken);
        manifest.domain_name.clone_from(&import.name);
        manifest.consistency = import.consistency.to_owned();
        manifest.definition.clone_from(&import.definition);
        manifest.autostart = import.autostart;
        manifest.host = import.host.clone();
        self.refuse_secrets(session, &manifest, import)?;
        for _ in 0..TRIES {
            (manifest.disks, manifest.streams) = (Vec::new(), Vec::new());
            for disk in &import.disks {
                let written = Box::pin(self.disk(session, disk)).await?;
                manifest.disks.push(written);
            }
            for (name, bytes) in &import.streams {
                let mut parts = Parts::new(vec![Extent::Data(bytes.clone().into())]);
                let size = bytes.len() as u64;
                let written = session.write_image(&mut parts, size, BlobType::Stream, None);
                let written = Box::pin(written).await.map_err(|error| self.fault(&error))?;
                manifest.streams.push(Stream { name: name.clone(), image: written.image });
            }
            crash::point("import/written");
            match Box::pin(session.prepare(&manifest)).await.map_err(|error| self.fault(&error))? {
                Readiness::Ready(prepared) => {
                    crash::point("import/prepared");
                    let outcome = session.commit(&prepared).await.map_err(|error| self.fault(&error))?;
                    return Ok(match outcome {
                        Outcome::Checked => End::Committed(manifest),
                        Outcome::Revoked => End::Unsettled(manifest),
                    });
                }
                // What is damaged is missing: writing it all again puts what is.
                Readiness::Damaged(_) => {}
                Readiness::Revoked => {
                    let error = VaultError::Revoked { lease: session.lease() };
                    return Err(self.fault(&error));
                }
            }
        }
        let cause = "what it reuses is found damaged again and again".to_owned();
        let error = VaultError::Damaged { object: manifest.name().to_string(), cause };
        Err(self.fault(&error))
    }

    /// Before anything of it is put: what lies in the open once has been read by whoever wanted to.
    fn refuse_secrets(&self, session: &Session, manifest: &Manifest, import: &Import) -> Result<(), Fault> {
        if session.is_encrypted() || self.args.allow_plain {
            return Ok(());
        }
        let nothing = Image::new(session.ids(), BlobType::Stream, Tree { size: 0, top: BlobId::ZERO });
        let mut whole = manifest.clone();
        let stream = |(name, _): &(String, Vec<u8>)| Stream { name: name.clone(), image: nothing };
        whole.streams = import.streams.iter().map(stream).collect();
        let Some(why) = secret(&whole) else { return Ok(()) };
        Err(Fault::permanent(codes::PLAINTEXT_REFUSED, DOING, &import.name, why)
            .remedy("Import it into an encrypted vault; or, if everybody may read it: `--allow-plain`"))
    }

    async fn disk(&self, session: &mut Session, disk: &ImportDisk) -> Result<Disk, Fault> {
        let Some(top) = disk.chain.first() else {
            return Err(Fault::permanent(codes::NO_SUCH_DISK, DOING, &disk.target, "it has no image"));
        };
        if !self.out.json {
            let said = format!("{}  {}", safe(&disk.target), size_of(top.virtual_size));
            let _ = writeln!(std::io::stderr(), "{said}");
        }
        let unreadable = |error: &VaultError| match error {
            VaultError::Io(error) => {
                Fault::permanent(codes::CHAIN_UNREADABLE, DOING, shown(&top.path), error).remedy(
                    "Shut the guest down that uses it; see whether all files that it stands on are there",
                )
            }
            error => self.fault(error),
        };
        let source = open_image(&top.path, top.format.as_str()).await.map_err(|error| unreadable(&error))?;
        let source = Arc::new(source);
        let size = source.size();
        let mut reader = DiskReader::new(source.clone(), None);
        let written = Box::pin(session.write_image(&mut reader, size, BlobType::Data, None)).await;
        drop(reader);
        // In this order: whoever is not there any more has left another time.
        let free = refuse_writers(&disk.chain).await;
        let same = free.and_then(|()| unchanged(&disk.chain));
        if let Some(source) = Arc::into_inner(source) {
            source.close().await;
        }
        let written = written.map_err(|error| unreadable(&error))?;
        same?;
        Ok(Disk {
            dirty: written.read,
            stored: written.stored,
            ..Disk::new(&disk.target, written.image, top.format.as_str())
        })
    }
}

fn files_of(disk: &ImportDisk) -> impl Iterator<Item = PathBuf> {
    disk.chain.iter().map(|element| element.path.clone())
}

/// Refuses a chain that somebody may write to.
async fn refuse_writers(chain: &[Element]) -> Result<(), Fault> {
    let paths: Vec<PathBuf> = chain.iter().map(|element| element.path.clone()).collect();
    let looked =
        tokio::task::spawn_blocking(move || paths.iter().try_for_each(|path| refuse_writer(path))).await;
    looked.unwrap_or_else(|error| Err(Fault::permanent(codes::UNDEFINED_ERROR, DOING, "", error)))
}

fn refuse_writer(path: &Path) -> Result<(), Fault> {
    // One that is gone is told of by whoever reads it.
    let Ok(meta) = std::fs::metadata(path) else { return Ok(()) };
    let user = match meta.file_type().is_block_device() && claimed(path) {
        true => Some(CLAIMED.to_owned()),
        false => user(path, &meta, Seek::Writers),
    };
    match user {
        None => Ok(()),
        Some(user) => Err(Fault::permanent(codes::IMAGE_LOCKED, DOING, shown(path), user).remedy(
            "Shut the guest down, unmount it, or end what has it open (`fuser -v PATH`); a running guest is backed up by \
             `vmkeep snapshot`",
        )),
    }
}

/// Whether all files of a chain are what they were.
fn unchanged(chain: &[Element]) -> Result<(), Fault> {
    for element in chain {
        let changed = |cause: String| {
            Fault::permanent(codes::SOURCE_CHANGED, DOING, shown(&element.path), cause)
                .remedy("Find out who writes to it, and import it again when nobody does")
        };
        let file = std::fs::File::open(&element.path).map_err(|error| changed(error.to_string()))?;
        let now = Identity::of(&file).map_err(|error| changed(error.to_string()))?;
        if now != element.identity {
            return Err(changed(format!("it was {} and is {now}", element.identity)));
        }
    }
    Ok(())
}

/// The files of an image, from the top down.
pub(super) async fn chain_of(
    path: PathBuf,
    format: vmkeep_steps::image::qcow2::Format,
) -> Result<Vec<Element>, Fault> {
    let shown = shown(&path);
    let probed = tokio::task::spawn_blocking(move || chain::probe(&path, format)).await;
    let unreadable = |cause: &dyn std::fmt::Display| {
        Fault::permanent(codes::CHAIN_UNREADABLE, DOING, &shown, cause)
            .remedy("Name the image and its format; see whether all files that it stands on are there")
    };
    match probed {
        Ok(probed) => probed.map_err(|error| unreadable(&error)),
        Err(error) => Err(unreadable(&error)),
    }
}

pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn text(imported: &Imported) -> String {
    let how = if imported.already { "is in the vault already" } else { "is in the vault" };
    let mut text = format!(
        "{} of {} {how}: {}\n",
        safe(&imported.domain),
        crate::text::local(imported.at),
        imported.backup
    );
    for disk in &imported.disks {
        text.push_str(&format!(
            "  {}  {}, {} stored, root {}\n",
            safe(&disk.target),
            size_of(disk.size),
            size_of(disk.stored),
            disk.root.get(..16).unwrap_or(&disk.root)
        ));
        for file in &disk.files {
            text.push_str(&format!("    read from {}\n", safe(&shown(file))));
        }
    }
    for note in &imported.notes {
        text.push_str(&format!("  {}\n", safe(note)));
    }
    text
}

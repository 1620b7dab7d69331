//! The files of a restore without a daemon: proven on their way, and once more by what can be read afterwards.
//!
//! Each is written under another name, synced, read back from its beginning to its end, and gets its own name only if what
//! was read has the root that the backup names. So a file that bears its name is whole and durable; one that does when the
//! restore is repeated is read once more all the same, since somebody may have used it meanwhile. A name of a file that is
//! not whole is of no use to anybody: whoever repeats the restore removes it.

use std::io::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::root::{Component, RelPath, RootError};
use vmkeep_steps::vaults::files::{Held, Holes};
use vmkeep_steps::vaults::read_back::{root_of_image, root_of_raw};
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::ids::BlobId;
use vmkeep_vault::keys::IdKeys;
use vmkeep_vault::manifest::Image;
use vmkeep_vault::read::read_image;
use vmkeep_workflow::{Fault, crash};

use super::place::{Noted, Place};
use crate::cli::vault::Opened;
use crate::cli::vault::export::{not_converted, place_fault, root_error, to_qcow2_unless_given_up};
use crate::codes;

const DOING: &str = "restore the disk";

/// Where files come from.
pub(super) struct Reader<'a> {
    pub(super) opened: &'a Opened,
    pub(super) ids: IdKeys,
    pub(super) fetcher: Fetcher,
}

/// What is to be written.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) kind: BlobType,
    pub(super) image: &'a Image,
    pub(super) noted: &'a Noted,
    pub(super) format: Format,
}

fn part(file: &Component, what: &str) -> Component {
    Component::encoded(&format!("{file}.{what}"))
}

impl Reader<'_> {
    /// Makes sure that the file is there, whole and durable. Whether it was there already.
    pub(super) async fn restore(&self, place: &Place, wanted: Wanted<'_>) -> Result<bool, Fault> {
        let file = &wanted.noted.file;
        let (raw, last) = (part(file, "part"), part(file, "converted.part"));
        for left in [&raw, &last] {
            place.folder.remove_file(left).map_err(|error| place_fault(&error))?;
        }
        if place.folder.stat(file).map_err(|error| place_fault(&error))?.is_some() {
            self.prove(place, file, wanted).await?;
            return Ok(true);
        }
        self.read(place, &raw, wanted).await?;
        crash::point(&format!("offline/read/{}", wanted.noted.what));
        let made = match wanted.format {
            Format::Raw => raw,
            Format::Qcow2 => {
                // Made here, because `qemu-img` would make it readable for others.
                drop(place.folder.create_file(&last).map_err(|error| place_fault(&error))?);
                let (from, to) = (place.folder.path_of(&raw), place.folder.path_of(&last));
                let converted = to_qcow2_unless_given_up(from, to).await;
                converted.map_err(|cause| not_converted(&place.folder.path_of(file), &cause))?;
                crash::point(&format!("offline/converted/{}", wanted.noted.what));
                place.folder.remove_file(&raw).map_err(|error| place_fault(&error))?;
                last
            }
        };
        self.prove(place, &made, wanted).await?;
        crash::point(&format!("offline/proven/{}", wanted.noted.what));
        let named = place.folder.rename(&made, file).and_then(|()| place.folder.sync());
        named.map_err(|error| place_fault(&error))?;
        crash::point(&format!("offline/placed/{}", wanted.noted.what));
        Ok(false)
    }

    async fn read(&self, place: &Place, aside: &Component, wanted: Wanted<'_>) -> Result<(), Fault> {
        let path = place.folder.path_of(aside);
        let failed = |error: VaultError| self.fault(path.clone(), &error);
        let file = Arc::new(place.folder.create_file(aside).map_err(|error| place_fault(&error))?);
        let mut sink =
            Holes::new(Arc::clone(&file), wanted.image.size).map_err(|error| failed(error.into()))?;
        let vault = &self.opened.vault;
        let read = read_image(vault, &self.ids, &self.fetcher, wanted.kind, wanted.image, &mut sink, false);
        Box::pin(read).await.map_err(failed)?;
        file.sync_all().map_err(|error| failed(error.into()))
    }

    /// Whether what can be read of a file is what the backup holds.
    async fn prove(&self, place: &Place, file: &Component, wanted: Wanted<'_>) -> Result<(), Fault> {
        let (path, size) = (place.folder.path_of(file), wanted.image.size);
        let found = match wanted.format {
            Format::Raw => {
                let opened = place.folder.open_file(&RelPath::from(file.clone()));
                let opened = Arc::new(opened.map_err(|error| place_fault(&error))?);
                let length =
                    opened.metadata().map_err(|error| self.fault(path.clone(), &error.into()))?.len();
                if length == size {
                    Box::pin(root_of_raw(&self.ids, wanted.kind, &opened, size)).await
                } else {
                    Err(Error::other(format!("it has {length} bytes instead of {size}")).into())
                }
            }
            Format::Qcow2 => Box::pin(root_of_image(&self.ids, &path, Format::Qcow2, size)).await,
        };
        let found = found.map_err(|error| self.fault(path.clone(), &error))?;
        if found == wanted.image.root { Ok(()) } else { Err(differs(&path, wanted.image.root, found)) }
    }

    /// A stream that is small enough to be held.
    pub(super) async fn hold(&self, what: &str, image: &Image, most: u64) -> Result<Vec<u8>, Fault> {
        let size = usize::try_from(image.size).ok().filter(|size| *size as u64 <= most);
        let Some(size) = size else {
            let cause = "it is larger than any such file";
            return Err(Fault::permanent(codes::FIRMWARE_STATE_UNSUPPORTED, DOING, what, cause));
        };
        let mut held = Held::new(size);
        let vault = &self.opened.vault;
        let read = read_image(vault, &self.ids, &self.fetcher, BlobType::Stream, image, &mut held, false);
        Box::pin(read).await.map_err(|error| self.fault(what.into(), &error))?;
        Ok(held.0)
    }

    fn fault(&self, path: PathBuf, error: &VaultError) -> Fault {
        match error {
            VaultError::Io(error) => {
                let same = Error::new(error.kind(), error.to_string());
                let error: RootError = root_error("write or read", path, same);
                place_fault(&error)
            }
            error => self.opened.fault(DOING, error),
        }
    }
}

/// What was written does not read back.
pub(in crate::cli) fn differs(path: &Path, wanted: BlobId, found: BlobId) -> Fault {
    let cause = format!("what is read there has the root {found}, and what was to be there has {wanted}");
    Fault::permanent(codes::WRITTEN_DIFFERS, "read back what was written", path.display().to_string(), cause)
        .remedy("Find out what wrote there, and whether the storage is sound; nothing may use it. Then do it again")
}

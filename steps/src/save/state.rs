//! What is known of a saved state, and whether it may be loaded.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmkeep_workflow::{Fault, Outputs};

use super::Saving;
use super::guest::SaveOutput;
use crate::blocking::{self, look as looked};
use crate::hypervisor::{HvError, Storage};
use crate::image::copy::Identity;
use crate::snapshot::memory::WHOLE;
use crate::snapshot::overlay::CreateOverlay;

/// A saved state, as it was right after the save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// The file.
    pub file: PathBuf,
    /// Which file, and how it was.
    pub identity: Identity,
    /// Whether the guest ran when it was saved: then it runs again afterwards.
    pub was_running: bool,
}

/// Reads a state's header; nothing if there is no file, or if it is not whole. Blocks.
///
/// # Errors
/// When it cannot be read.
pub fn look(path: &Path) -> std::io::Result<Option<SavedState>> {
    let mut header = [0; 28];
    let opened = looked("open").map_err(std::io::Error::from).and_then(|()| std::fs::File::open(path));
    let mut file = match opened {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    match file.read_exact(&mut header) {
        Ok(()) if &header[..16] == WHOLE => {}
        Ok(()) => return Ok(None),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    // Version, length of what follows, and whether the guest ran: each four bytes in the host's order.
    let was_running = header[24..28].iter().any(|byte| *byte != 0);
    Ok(Some(SavedState { file: path.to_owned(), identity: Identity::of(&file)?, was_running }))
}

/// Makes a state durable with its name. Blocks.
///
/// # Errors
/// When it cannot be.
pub fn sync(path: &Path) -> std::io::Result<()> {
    blocking::sync(&std::fs::File::open(path)?)?;
    match path.parent() {
        Some(folder) => std::fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// What the bases are like now. Blocks.
///
/// # Errors
/// When one cannot be looked at.
pub fn bases(saving: &Saving) -> std::io::Result<Vec<(PathBuf, Identity)>> {
    saving
        .disks
        .iter()
        .map(|(disk, _)| Ok((disk.base.path.clone(), Identity::at(&disk.base.path)?)))
        .collect()
}

/// Whether a state that was found whole after an interruption is that of the instant at which the disks came to rest.
/// libvirt writes the header's last word while QEMU still holds the guest; should libvirt die right then, its successor
/// lets the guest run on, and a whole but stale state stays behind. The guest's next write to a disk then makes the
/// disk younger than the state.
#[must_use]
pub fn is_of_these(state: &SavedState, bases: &[(PathBuf, Identity)]) -> bool {
    let when = |identity: &Identity| (identity.mtime, identity.mtime_nsec);
    bases.iter().all(|(_, base)| when(base) <= when(&state.identity))
}

/// Whether, and why not, a state may be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Usable {
    /// Memory and disks are of one instant.
    Yes(SavedState),
    /// A guest was started on the overlays since, and has ended. The state is stale; what the guest wrote is the truth,
    /// and that it is off is somebody's wish.
    Stale(String),
    /// The state is not what was saved, or a base is not what it was.
    Lost(String),
}

/// Whether the state that a save left may be loaded now, with the domain off.
///
/// # Errors
/// When somebody who has to be asked did not answer.
pub async fn usable(
    storage: &dyn Storage,
    outputs: &Outputs,
    saving: &Saving,
    saved: &SaveOutput,
) -> Result<Usable, Unasked> {
    for (disk, maker) in &saving.disks {
        let made = outputs.of::<CreateOverlay>(maker).map_err(Unasked::Output)?;
        let image = storage.inspect(&disk.overlay_layer()).await.map_err(Unasked::Storage)?;
        let overlay = disk.overlay.display();
        match image {
            None => return Ok(Usable::Lost(format!("{overlay} is gone"))),
            Some(image) if made.is_some_and(|made| made.id != image.id) => {
                return Ok(Usable::Lost(format!("{overlay} is not the file that this job created")));
            }
            Some(image) if !image.empty && !vmkeep_workflow::mutation::on("stale-memory") => {
                return Ok(Usable::Stale(format!("{overlay} was written to since the guest was saved")));
            }
            Some(_) => {}
        }
    }
    let Some(state) = saved.state.clone() else {
        return Ok(Usable::Lost(saved.unusable.clone().unwrap_or_else(|| "there is no state".to_owned())));
    };
    let (frozen, ram_disk) = (saved.taken.frozen.clone(), saving.ram_disk);
    let looked = crate::blocking::run(move || {
        for (path, was) in &frozen {
            if Identity::at(path)? != *was {
                return Ok(Usable::Lost(format!(
                    "{} was written to since the guest was saved",
                    path.display()
                )));
            }
        }
        let file = state.file.display();
        Ok(match look(&state.file)? {
            Some(now) if now == state => Usable::Yes(state),
            Some(_) => Usable::Lost(format!("{file} is not as it was saved")),
            None if ram_disk => {
                Usable::Lost(format!("{file} is gone, as a RAM disk's files are after a reboot"))
            }
            None => Usable::Lost(format!("{file} is gone or torn")),
        })
    })
    .await;
    match looked {
        Ok(found) => found.map_err(|e: std::io::Error| Unasked::Io(e)),
        Err(e) => Err(Unasked::Io(std::io::Error::other(e))),
    }
}

/// Why it could not be found out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Unasked {
    #[error("{0}")]
    Output(Fault),
    #[error("{0}")]
    Storage(HvError),
    #[error("{0}")]
    Io(std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(folder: &Path, magic: &[u8; 16], ran: u32) -> PathBuf {
        let path = folder.join("state");
        let mut header = magic.to_vec();
        header.extend(2_u32.to_ne_bytes());
        header.extend(100_u32.to_ne_bytes());
        header.extend(ran.to_ne_bytes());
        header.extend([0; 64]);
        std::fs::write(&path, header).unwrap();
        path
    }

    #[test]
    fn a_header_tells_whether_the_state_is_whole_and_whether_the_guest_ran() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(look(&folder.path().join("state")).unwrap(), None);
        let path = written(folder.path(), b"LibvirtQemudPart", 1);
        assert_eq!(look(&path).unwrap(), None);
        let path = written(folder.path(), WHOLE, 1);
        assert!(look(&path).unwrap().unwrap().was_running);
        let path = written(folder.path(), WHOLE, 0);
        assert!(!look(&path).unwrap().unwrap().was_running);
        std::fs::write(&path, b"Libvirt").unwrap();
        assert_eq!(look(&path).unwrap(), None);
    }

    #[test]
    fn a_state_older_than_a_disk_is_not_of_that_disk() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        std::fs::write(&base, b"disk").unwrap();
        let path = written(folder.path(), WHOLE, 1);
        let identity = |path: &Path| Identity::at(path).unwrap();
        let at = |path: &Path, secs: u64| {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(secs);
            std::fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        };
        at(&base, 1000);
        at(&path, 1000);
        let judged = || is_of_these(&look(&path).unwrap().unwrap(), &[(base.clone(), identity(&base))]);
        assert!(judged());
        at(&base, 1001);
        assert!(!judged());
    }
}

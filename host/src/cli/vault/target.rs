//! Where a single disk is written to: a new file, a file that is there, or a block device.
//!
//! What is there may be the only copy of something, so what holds anything but zeroes is refused unless somebody says that it
//! may go. **What is in use is refused always**, and each look has a gap that another one closes: a device that is opened
//! exclusively is not mounted, and no part of a volume, an array or a swap space; whoever merely has it open, as QEMU
//! does, also under another name, in another mount namespace and by way of a device that overlaps with it, is found by its
//! number ([`mod@super::users`]; of processes of others only by root); and QEMU's locks on images are found, and kept from
//! being taken, by a lock of our own, which is held until the disk is proven.
//!
//! **In `/dev` there are devices and nothing else.** A name that is missing there is a volume that is not active, or a mistake;
//! a file of that name would lie in memory, and be gone with the next start. The same holds for folders that are missing above
//! a single disk, wherever they are: whoever names a device names no folder that is to be made.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags, SeekFrom};
use vmkeep_steps::image::root::{RootError, TargetRoot};
use vmkeep_steps::vaults::read_back::RawSource;
use vmkeep_vault::write::{Extent, Source as _};
use vmkeep_workflow::Fault;

use super::export::place_fault;
use super::users::{Number, Seek, is_read_only, user};
use crate::codes;
use crate::text::bytes as size_of;

const DOING: &str = "write the disk";
pub(super) const CLAIMED: &str = "it is mounted, or part of a volume, an array or a swap space";

/// A place for a disk.
pub(super) enum Target {
    /// Nothing is there.
    New(PathBuf),
    /// A file, open for writing.
    File(Open),
    /// A block device, open for writing.
    Device(Open),
}

/// Something that is there and that nobody else uses.
pub(super) struct Open {
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    /// Bytes.
    pub(super) size: u64,
}

fn fault(code: vmkeep_workflow::Code, path: &Path, cause: impl std::fmt::Display) -> Fault {
    Fault::permanent(code, DOING, path.display().to_string(), cause)
}

fn in_use(path: &Path, cause: impl std::fmt::Display) -> Fault {
    let remedy =
        "Shut the guest down, unmount it, or end what has it open (`fuser -v PATH`); or choose another place";
    fault(codes::IMAGE_LOCKED, path, cause).remedy(remedy)
}

/// Refuses a place for files where there are only devices. Blocks.
pub(in crate::cli) fn refuse_dev(path: &Path) -> Result<(), Fault> {
    // For people, who may keep files there knowingly.
    const SHARED_MEMORY: &str = "/dev/shm";
    let Some(there) = path.ancestors().find_map(|above| std::fs::canonicalize(above).ok()) else {
        return Ok(());
    };
    let file_system = |path: &Path| std::fs::metadata(path).ok().map(|meta| meta.dev());
    let (devices, root) = (file_system(Path::new("/dev")), file_system(Path::new("/")));
    let below = there.starts_with("/dev") && !there.starts_with(SHARED_MEMORY);
    if !below && (devices.is_none() || devices == root || file_system(&there) != devices) {
        return Ok(());
    }
    let cause = "there is no such device: is the volume active?";
    Err(fault(codes::UNSAFE_PATH, path, cause)
        .remedy("Activate it (`lvchange -ay VG/LV`, `losetup`, `multipath`), or name a file elsewhere"))
}

/// The folder of a single disk, which must be there. Blocks.
pub(super) fn above(path: &Path) -> Result<TargetRoot, Fault> {
    refuse_dev(path)?;
    let Some(above) = path.parent() else {
        return Err(fault(codes::UNSAFE_PATH, path, "it is not the path of a file"));
    };
    TargetRoot::open(above).map_err(|error| match error {
        RootError::Missing { .. } => {
            let cause = "there is no such folder";
            fault(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, above, cause)
                .remedy("Make the folder, or mount what is to be there")
        }
        error => place_fault(&error),
    })
}

impl Target {
    /// Looks at a place and takes hold of what is there. Blocks.
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        let unsafe_path = |cause: &str| fault(codes::UNSAFE_PATH, path, cause);
        let meta = match std::fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => {
                above(path)?;
                return Ok(Self::New(path.to_owned()));
            }
            Err(error) => return Err(unsafe_path(&error.to_string())),
        };
        let device = meta.file_type().is_block_device();
        if !device && (!meta.is_file() || path.is_symlink()) {
            return Err(unsafe_path("it is neither a file, nor a block device, nor free"));
        }
        if !device {
            refuse_dev(path)?;
        }
        if let Some(user) = user(path, &meta, Seek::Anybody) {
            return Err(in_use(path, user));
        }
        if device && is_read_only(&meta) {
            return Err(fault(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, path, "the device is read-only")
                .remedy("See to its rights (`blockdev --setrw`), or choose another one"));
        }
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        if device {
            // On devices it means: as long as nobody else claims it.
            flags |= OFlags::EXCL;
        }
        let file: File = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => fd.into(),
            Err(rustix::io::Errno::BUSY) => {
                return Err(in_use(path, CLAIMED));
            }
            Err(error) => return Err(fault(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, path, error)),
        };
        let cannot =
            |error: &dyn std::fmt::Display| fault(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, path, error);
        let now = file.metadata().map_err(|error| cannot(&error))?;
        if Number::of(&now) != Number::of(&meta) {
            return Err(unsafe_path("it has changed while it was looked at"));
        }
        if rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(in_use(path, "another process has locked it, as QEMU does"));
        }
        // Whoever came between the first look and the lock.
        if let Some(user) = user(path, &now, Seek::Anybody) {
            return Err(in_use(path, user));
        }
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| cannot(&error))?;
        let open = Open { path: path.to_owned(), file: Arc::new(file), size };
        Ok(if device { Self::Device(open) } else { Self::File(open) })
    }
}

impl Open {
    /// Refuses what holds anything but zeroes where it would be written to.
    pub(super) async fn refuse_content(&self, length: u64) -> Result<(), Fault> {
        let failed = |error: std::io::Error| fault(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, &self.path, error);
        let mut source = RawSource::new(Arc::clone(&self.file), length.min(self.size));
        while let Some((at, extent)) = source.next().await.map_err(failed)? {
            let Extent::Data(bytes) = extent else { continue };
            if let Some(first) = bytes.iter().position(|byte| *byte != 0) {
                let cause = format!("it holds something at byte {}", at + first as u64);
                return Err(fault(codes::TARGET_HOLDS_DATA, &self.path, cause).remedy(
                    "Back it up or choose another place; if nobody needs it, or it is part of this very disk from an \
                     attempt that was cut off: `--overwrite-without-copy`",
                ));
            }
        }
        Ok(())
    }

    /// Refuses a device that the disk does not fit on.
    pub(super) fn refuse_short(&self, length: u64) -> Result<(), Fault> {
        if self.size >= length {
            return Ok(());
        }
        let cause = format!("it has {} and the disk has {}", size_of(self.size), size_of(length));
        Err(fault(codes::NOT_ENOUGH_DISK_SPACE, &self.path, cause).remedy("Choose a larger device"))
    }
}

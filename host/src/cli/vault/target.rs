//! Where a single disk is written to: a new file, a file that is there, or a block device.
//!
//! What is there may be the only copy of something, so what holds anything but zeroes is refused unless somebody says that it
//! may go. **What is in use is refused always**, and each look has a gap that another one closes: a device that is opened
//! exclusively is not mounted, and no part of a volume, an array or a swap space; whoever merely has it open, as QEMU
//! does, also under another name and in another mount namespace, is found in `/proc` by its number (of processes of others
//! only by root); and QEMU's locks on images are found, and kept from being taken, by a lock of our own, which is held until
//! the disk is proven.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags, SeekFrom};
use vmkeep_steps::vaults::read_back::RawSource;
use vmkeep_vault::write::{Extent, Source as _};
use vmkeep_workflow::Fault;

use crate::codes;
use crate::text::{bytes as size_of, safe};

const DOING: &str = "write the disk";

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

/// What is the same under every name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Number {
    Device(u64),
    File(u64, u64),
}

impl Number {
    fn of(meta: &std::fs::Metadata) -> Self {
        match meta.file_type().is_block_device() {
            true => Self::Device(meta.rdev()),
            false => Self::File(meta.dev(), meta.ino()),
        }
    }
}

fn fault(code: vmkeep_workflow::Code, path: &Path, cause: impl std::fmt::Display) -> Fault {
    Fault::permanent(code, DOING, path.display().to_string(), cause)
}

fn in_use(path: &Path, cause: impl std::fmt::Display) -> Fault {
    let remedy =
        "Shut the guest down, unmount it, or end what has it open (`fuser -v PATH`); or choose another place";
    fault(codes::IMAGE_LOCKED, path, cause).remedy(remedy)
}

impl Target {
    /// Looks at a place and takes hold of what is there. Blocks.
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        let unsafe_path = |cause: &str| fault(codes::UNSAFE_PATH, path, cause);
        let meta = match std::fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => {
                return Ok(Self::New(path.to_owned()));
            }
            Err(error) => return Err(unsafe_path(&error.to_string())),
        };
        let device = meta.file_type().is_block_device();
        if !device && (!meta.is_file() || path.is_symlink()) {
            return Err(unsafe_path("it is neither a file, nor a block device, nor free"));
        }
        if let Some(user) = user(path, &meta) {
            return Err(in_use(path, user));
        }
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        if device {
            // On devices it means: as long as nobody else claims it.
            flags |= OFlags::EXCL;
        }
        let file: File = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => fd.into(),
            Err(rustix::io::Errno::BUSY) => {
                return Err(in_use(path, "it is mounted, or part of a volume, an array or a swap space"));
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
        if let Some(user) = user(path, &now) {
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

/// udev looks into every device that somebody has written to, and holds none.
const PASSING_BY: [&str; 3] = ["(udev-worker)", "systemd-udevd", "udevd"];

/// Who has it open, if anybody that can be seen has.
fn user(path: &Path, meta: &std::fs::Metadata) -> Option<String> {
    let number = Number::of(meta);
    let me = std::process::id();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()).filter(|pid| *pid != me)
        else {
            continue;
        };
        // It may end meanwhile, and those of others are not to be seen.
        for open in std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            if std::fs::metadata(open.path()).is_ok_and(|meta| Number::of(&meta) == number) {
                let program = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                let program = program.trim();
                if PASSING_BY.contains(&program) {
                    break;
                }
                return Some(format!("process {pid} ({}) has it open", safe(program)));
            }
        }
    }
    if matches!(number, Number::Device(_)) {
        return None;
    }
    let path = std::fs::canonicalize(path).ok()?;
    let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut loops = devices.map(|device| device.path());
    let shows = |device: &PathBuf| {
        let file = std::fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default();
        Path::new(file.trim_end_matches('\n')) == path
    };
    loops.find(shows).map(|device| format!("the device {} shows it", device.display()))
}

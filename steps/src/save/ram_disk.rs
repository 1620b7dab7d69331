//! Where a saved state goes: to a RAM disk, because the guest is down for as long as the writing takes, or into the
//! backup's folder.

use std::path::{Path, PathBuf};

use rustix::fs::Access;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::Fault;

use crate::codes;
use crate::image::space::Space;

/// What stays free on the RAM disk, and in the host's memory behind it.
const SPARE: u64 = 64 << 20;

/// File systems that live in memory, by their numbers in `statfs`.
const IN_MEMORY: [u32; 2] = [0x0102_1994, 0x8584_58f6];

/// Whether the RAM disk is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UseRamDisk {
    /// If it is there, can be written, and is large enough; else the backup's folder, with a warning.
    #[default]
    Prefer,
    /// Or the job is refused.
    Require,
    /// Not at all.
    Never,
}

/// A place for a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder; nothing for the backup's own.
    pub ram_disk: Option<PathBuf>,
    /// What the owner should know.
    pub warning: Option<String>,
}

/// Decides where a state of at most that many bytes goes. Blocks.
///
/// # Errors
/// When a RAM disk is required: 2 if none is configured, 3 if it cannot be used, 4 if it is too small.
pub fn choose(configured: Option<&Path>, wanted: UseRamDisk, bytes: u64) -> Result<Place, Fault> {
    let folder = Place { ram_disk: None, warning: None };
    let found = match (wanted, configured) {
        (UseRamDisk::Never, _) | (UseRamDisk::Prefer, None) => return Ok(folder),
        (UseRamDisk::Require, None) => Err(Fault::permanent(
            codes::MISSING_PARAMETER_IN_CONFIG_FILE,
            DOING,
            "snapshot.ram_disk",
            "a RAM disk is required, and none is configured",
        )
        .remedy("Name one in the configuration, or let the state go to the target: `--ram-disk prefer`")),
        (_, Some(path)) => examine(path, bytes).map(|()| path.to_owned()),
    };
    match (found, wanted) {
        (Ok(path), _) => Ok(Place { ram_disk: Some(path), warning: None }),
        (Err(fault), UseRamDisk::Require) => Err(fault),
        (Err(fault), _) => {
            let warning = format!(
                "the RAM disk {} was not used ({} {}): {}; the guest is down for longer",
                fault.object,
                fault.code,
                codes::name(fault.code),
                fault.cause
            );
            Ok(Place { warning: Some(warning), ..folder })
        }
    }
}

const DOING: &str = "use the RAM disk";

fn examine(path: &Path, bytes: u64) -> Result<(), Fault> {
    let object = path.display().to_string();
    let invalid = |cause: String| {
        Fault::permanent(codes::CONFIGURED_RAM_DISK_IS_NOT_VALUD, DOING, object.clone(), cause).remedy(
            "Mount a tmpfs there that the user of vmkeepd may write to, or take it out of the configuration",
        )
    };
    let data = std::fs::metadata(path).map_err(|e| invalid(e.to_string()))?;
    if !data.is_dir() {
        return Err(invalid("it is not a folder".to_owned()));
    }
    if !lives_in_memory(path).map_err(|e| invalid(e.to_string()))? {
        return Err(invalid(
            "its file system is neither tmpfs nor ramfs: it does not live in memory".to_owned(),
        ));
    }
    let rights = Access::WRITE_OK | Access::EXEC_OK;
    rustix::fs::access(path, rights).map_err(|e| invalid(format!("it cannot be written: {e}")))?;
    let space = Space::at(path).map_err(|e| invalid(e.to_string()))?;
    // A ramfs has no size. Behind either stands the memory of the host, which is taken only as it is written.
    let room = if space.total == 0 { u64::MAX } else { space.free };
    let room = room.min(memory_left().unwrap_or(u64::MAX));
    if room < bytes.saturating_add(SPARE) {
        return Err(Fault::permanent(
            codes::NOT_ENOUGH_SPACE_ON_RAM_DISK,
            DOING,
            object,
            format!("the state may take {bytes} bytes and {SPARE} must stay free; there is room for {room}"),
        )
        .remedy("Enlarge it, or let the state go to the target: `--ram-disk prefer`"));
    }
    Ok(())
}

/// Whether a folder is on a file system that lives in memory, and ends with the host. `/dev` does too.
pub(crate) fn lives_in_memory(folder: &Path) -> std::io::Result<bool> {
    let system = rustix::fs::statfs(folder)?;
    // The number's type differs between architectures; all of them fit 32 bits.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(IN_MEMORY.contains(&(system.f_type as u32)))
}

/// Memory that the host can still give away, in bytes.
fn memory_left() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHM: &str = "/dev/shm";

    #[test]
    fn a_ram_disk_that_will_do_is_taken() {
        let place = choose(Some(Path::new(SHM)), UseRamDisk::Require, 4096).unwrap();
        assert_eq!(place.ram_disk.as_deref(), Some(Path::new(SHM)));
        assert_eq!(choose(Some(Path::new(SHM)), UseRamDisk::Never, 4096).unwrap().ram_disk, None);
        assert_eq!(choose(None, UseRamDisk::Prefer, 4096).unwrap(), Place { ram_disk: None, warning: None });
    }

    #[test]
    fn one_that_will_not_do_is_refused_with_its_code_or_left_out_with_a_warning() {
        let folder = tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        let missing = folder.path().join("missing");
        let invalid = codes::CONFIGURED_RAM_DISK_IS_NOT_VALUD;
        for (path, bytes, code) in [
            (file.as_path(), 1, invalid),
            (missing.as_path(), 1, invalid),
            // A disk on a drive is no RAM disk.
            (folder.path(), 1, invalid),
            (Path::new(SHM), u64::MAX / 2, codes::NOT_ENOUGH_SPACE_ON_RAM_DISK),
        ] {
            assert_eq!(choose(Some(path), UseRamDisk::Require, bytes).unwrap_err().code, code, "{path:?}");
            let place = choose(Some(path), UseRamDisk::Prefer, bytes).unwrap();
            assert_eq!(place.ram_disk, None);
            assert!(place.warning.unwrap().contains(codes::name(code)), "{path:?}");
        }
        let none = choose(None, UseRamDisk::Require, 1).unwrap_err();
        assert_eq!(none.code, codes::MISSING_PARAMETER_IN_CONFIG_FILE);
    }
}

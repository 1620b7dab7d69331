//! Whether there is room for what a backup writes, before it writes anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vmkeep_workflow::Fault;

use super::plan::{Builder, Common};
use crate::codes;
use crate::image::root::RootError;
use crate::image::space::{LowWater, Space};
use crate::snapshot::memory::IfSlow;
use crate::text;

/// Room that a guest gets for what it writes meanwhile to each disk, at least.
const HEADROOM: u64 = 64 << 20;

impl Builder<'_> {
    /// Makes sure that there is room. Memory that is too large beforehand, for its limit or for the target, is left out if
    /// that is what the caller chose for memory that takes too much.
    pub(super) async fn fit(&self, common: &mut Common, guest_memory: u64) -> Result<(), Fault> {
        let Err(fault) = self.room(common, guest_memory).await else { return Ok(()) };
        let optional = common.memory.as_ref().is_some_and(|m| m.limits.if_slow == IfSlow::DiskOnly);
        let too_large = [codes::MEMORY_TOO_LARGE, codes::NOT_ENOUGH_DISK_SPACE].contains(&fault.code);
        if !optional || !too_large {
            return Err(fault);
        }
        common.memory = None;
        // It may not have been the memory; then what the disks alone need is what there is to say.
        self.room(common, guest_memory).await?;
        common.without_memory = Some(match fault.code {
            codes::MEMORY_TOO_LARGE => fault.cause,
            _ => format!("there is no room for it ({}: {})", fault.object, fault.cause),
        });
        Ok(())
    }

    /// Whether there is room for everything that will be written, on every file system that is written to.
    async fn room(&self, common: &Common, guest_memory: u64) -> Result<(), Fault> {
        let doing = "make sure that there is room";
        let copies: u64 = common.files.iter().chain(&common.saved).map(|file| file.data_bytes).sum();
        let memory = match (&common.saving, &common.memory) {
            // Also what goes to a RAM disk first ends in the backup.
            (Some(_), _) => super::saving::largest(guest_memory),
            (None, memory) => memory.as_ref().map_or(0, |memory| memory.limits.worst(guest_memory)),
        };
        if let Some(memory) = &common.memory
            && memory.limits.bytes < guest_memory / 4
        {
            return Err(Fault::permanent(
                codes::MEMORY_TOO_LARGE,
                "save the guest's memory",
                &common.domain.name,
                format!(
                    "the guest has {}, the image may have {}",
                    text::bytes(guest_memory),
                    text::bytes(memory.limits.bytes)
                ),
            )
            .remedy(
                "Raise the limit (--memory-limit, limits.memory), or let the memory be left out (--on-busy-memory \
                 disk-only)",
            ));
        }
        let target = self.nearest(&self.options.target)?;
        let mut wanted: BTreeMap<u64, Wanted> = BTreeMap::new();
        self.want(&mut wanted, &target, copies + memory, self.settings.targets).await?;
        for disk in &common.disks {
            // Where the overlay grows. A file's lies on the file system of its base.
            let grows = disk.overlay.parent().filter(|_| disk.device).unwrap_or(&disk.base.path);
            self.want(&mut wanted, grows, HEADROOM, self.settings.guests).await?;
        }
        for Wanted { bytes, low, space, at } in wanted.into_values() {
            if !low.allows(space, bytes) {
                return Err(Fault::permanent(
                    codes::NOT_ENOUGH_DISK_SPACE,
                    doing,
                    at.display().to_string(),
                    format!(
                        "{} are needed and {} must stay free, {} are free",
                        text::bytes(bytes),
                        text::bytes(low.mark(space.total)),
                        text::bytes(space.free)
                    ),
                )
                .remedy("Make room there, or choose another target"));
            }
        }
        Ok(())
    }

    async fn want(
        &self,
        wanted: &mut BTreeMap<u64, Wanted>,
        at: &Path,
        bytes: u64,
        low: LowWater,
    ) -> Result<(), Fault> {
        let room = self.world.storage.space(at).await.map_err(|e| {
            Fault::permanent(
                codes::NO_DISK_SPACE_INFORMATION,
                "find out the free room",
                at.display().to_string(),
                e,
            )
        })?;
        let space = Space { total: room.total, free: room.free };
        let entry =
            wanted.entry(room.dev).or_insert_with(|| Wanted { bytes: 0, low, space, at: at.to_owned() });
        entry.bytes = entry.bytes.saturating_add(bytes);
        // Of two policies for one file system the more careful one holds.
        if low.mark(space.total) > entry.low.mark(space.total) {
            entry.low = low;
        }
        Ok(())
    }

    /// The deepest folder on the way to the target that exists.
    fn nearest(&self, target: &Path) -> Result<PathBuf, Fault> {
        let mut at = target;
        loop {
            match self.places.roots.open_folder(at) {
                Ok(folder) => {
                    folder.check_writable().map_err(|e| {
                        let code = codes::CANNOT_WRITE_TO_BACKUP_LOCATION;
                        crate::snapshot::copy::place_fault(
                            &e,
                            code,
                            "use the target",
                            &target.display().to_string(),
                        )
                        .remedy("Mount it for writing, or give the user of vmkeepd the right to write there")
                    })?;
                    return Ok(folder.path().to_owned());
                }
                Err(RootError::Missing { .. }) => match at.parent() {
                    Some(above) => at = above,
                    None => break,
                },
                Err(e) => {
                    return Err(crate::snapshot::copy::place_fault(
                        &e,
                        codes::CANNOT_WRITE_TO_BACKUP_LOCATION,
                        "use the target",
                        &target.display().to_string(),
                    ));
                }
            }
        }
        Err(Fault::permanent(
            codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST,
            "use the target",
            target.display().to_string(),
            "nothing on the way to it exists",
        ))
    }
}

struct Wanted {
    bytes: u64,
    low: LowWater,
    space: Space,
    at: PathBuf,
}

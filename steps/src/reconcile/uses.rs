//! Who needs a file: definitions that name it, images that stand on it, processes that have it open.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::hypervisor::{Backing, Definition, DiskDef, FileId, HvError, Layer, Observation};
use crate::snapshot::World;

/// So long a chain is followed.
const DEEPEST: usize = 64;

/// Files by name, with who needs each.
#[derive(Clone, Debug, Default)]
pub struct Uses {
    of: BTreeMap<PathBuf, BTreeSet<String>>,
}

impl Uses {
    /// All that these domains need, down to the last image of each chain.
    ///
    /// # Errors
    /// When a chain cannot be read: then it is not known what is below.
    pub async fn of(world: &World, domains: &[Observation]) -> Result<Self, HvError> {
        let mut uses = Self::default();
        for seen in domains {
            let name = &seen.domain.name;
            for (which, definition) in [("live", &seen.live), ("persistent", &seen.persistent)] {
                let Some(definition) = definition else { continue };
                let who = format!("the {which} definition of {name}");
                for layer in layers(definition) {
                    uses.follow(world, layer, &who).await?;
                }
            }
            for path in seen.qemu.iter().flat_map(|qemu| &qemu.open) {
                uses.add(path, format!("QEMU of {name}"));
            }
        }
        Ok(uses)
    }

    fn add(&mut self, path: &Path, who: String) {
        self.of.entry(path.to_owned()).or_default().insert(who.clone());
        // The same file by another name.
        if let Ok(real) = path.canonicalize() {
            self.of.entry(real).or_default().insert(who);
        }
    }

    async fn follow(&mut self, world: &World, from: Layer, who: &str) -> Result<(), HvError> {
        let mut next = Some(from);
        for _ in 0..DEEPEST {
            let Some(layer) = next else { return Ok(()) };
            self.add(&layer.path, who.to_owned());
            // Whatever stands below a link in the definition is needed as well.
            let real = layer.path.canonicalize().unwrap_or_else(|_| layer.path.clone());
            if layer.format == "raw" || real.metadata().is_ok_and(|meta| !meta.is_file()) {
                return Ok(());
            }
            let image = world.storage.inspect(&Layer { path: real, format: layer.format }).await?;
            next = image.and_then(|image| image.backing);
        }
        Ok(())
    }

    /// Who needs a file.
    #[must_use]
    pub fn users(&self, path: &Path) -> Vec<String> {
        let real = path.canonicalize().ok();
        let names = [Some(path), real.as_deref()];
        let all = names.into_iter().flatten().filter_map(|path| self.of.get(path)).flatten();
        all.cloned().collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The folders in which files lie that somebody needs.
    #[must_use]
    pub fn folders(&self) -> BTreeSet<PathBuf> {
        self.of.keys().filter_map(|path| path.parent()).map(Path::to_owned).collect()
    }

    /// The domains' own images: those that some definition or some QEMU names at all.
    #[must_use]
    pub fn knows(&self, path: &Path) -> bool {
        !self.users(path).is_empty()
    }
}

/// The images that a definition names.
fn layers(definition: &Definition) -> Vec<Layer> {
    let of = |disk: &DiskDef| {
        let top = disk.source.image().map(|path| Layer {
            path: path.clone(),
            format: disk.format.clone().unwrap_or_else(|| "raw".to_owned()),
        });
        let below = match &disk.backing {
            Backing::Probed => Vec::new(),
            Backing::Explicit(below) => below.clone(),
        };
        top.into_iter().chain(below).collect::<Vec<_>>()
    };
    definition.disks.iter().flat_map(of).collect()
}

/// The processes that have a file open, as far as this user may see them. Blocks.
#[must_use]
pub fn open_by(id: FileId) -> Vec<String> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else {
            continue;
        };
        let mut files = std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let same = |file: &std::fs::DirEntry| {
            std::fs::metadata(file.path()).is_ok_and(|data| FileId::of(&data) == id)
        };
        if files.any(|file| same(&file)) {
            let command = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("process {pid} ({})", command.trim()));
        }
    }
    found
}

/// Whether somebody is connected to a Unix socket, or it cannot be known. Blocks.
#[must_use]
pub fn connected_to(socket: &Path) -> bool {
    /// The state of a socket that has a peer, in the kernel's table.
    const CONNECTED: &str = "03";
    let Ok(table) = std::fs::read("/proc/net/unix") else { return true };
    let named = format!(" {}", socket.display());
    let table = String::from_utf8_lossy(&table);
    // Number, references, protocol, flags, type, state, inode, path: whoever was let in bears the path of the door.
    table
        .lines()
        .any(|line| line.ends_with(&named) && line.split_ascii_whitespace().nth(5) == Some(CONNECTED))
}

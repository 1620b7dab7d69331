//! What this host has learnt about a vault, in `vaults/` of the state folder.
//!
//! The file is written under another name, synced, and gets its own name by a rename; then the folder is synced. Whoever learns
//! a vault for the first time replaces nothing: of two that do so at once the second finds what the first has written, and must
//! have found the same vault. A crash leaves the file as it was before, or the new one, and perhaps one whose name ends in
//! `.new`, which nobody reads.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmkeep_steps::image::root::{Component, Folder, RelPath, RootError, TargetRoot};
use vmkeep_vault::check::Readings;
use vmkeep_vault::collect::Known;
use vmkeep_vault::vault::Remembered;
use vmkeep_workflow::Fault;

use crate::codes;
use crate::config::VaultSettings;

/// The folder in the state folder.
const FOLDER: &str = "vaults";
/// No such file is longer: a vault with ten thousand keys has about 8 MB.
const LONGEST: u64 = 64 << 20;

/// What the file of prunes that were seen is called, after the vault's name.
const PRUNES: &str = "prunes.json";
/// What the file of packs that were read is called, after the vault's name.
const READINGS: &str = "readings.json";

const KEEP: &str = "remember the vault";
const READ: &str = "read what this host knows of the vault";

/// Where what is known of a vault lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    state_dir: PathBuf,
    stem: String,
}

impl Memory {
    /// That of a vault.
    #[must_use]
    pub fn of(settings: &VaultSettings, state_dir: &Path) -> Self {
        // A name has no dot, so no vault can be called as one without a name is.
        let stem = settings.name.as_ref().map_or_else(
            || format!("at.{}", &blake3::hash(settings.url.to_string().as_bytes()).to_hex()[..32]),
            ToString::to_string,
        );
        Self { state_dir: state_dir.to_owned(), stem }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.state_dir.join(FOLDER).join(self.file())
    }

    /// The folder for copies of the vault's index. What is in it proves itself, and may be removed at any time.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.beside("cache")
    }

    fn beside(&self, what: &str) -> PathBuf {
        self.state_dir.join(FOLDER).join(format!("{}.{what}", self.stem))
    }

    fn file(&self) -> String {
        format!("{}.json", self.stem)
    }

    /// What is known; nothing of a vault that this host has never opened.
    ///
    /// # Errors
    /// If it cannot be read, or is damaged: then it is not as if nothing were known.
    pub fn load(&self) -> Result<Option<Remembered>, Fault> {
        let path = self.path();
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.unusable(READ, &error)),
        };
        let mut bytes = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(|error| self.unusable(READ, &error))?;
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Fault::permanent(codes::VAULT_DAMAGED, READ, path.display().to_string(), error).remedy(
                "Put a copy of that file back. Without one: remove it, and look at what `vmkeep vault attach` then says \
                 the vault is",
            )
        })
    }

    /// Keeps what was learnt of a vault for the first time.
    ///
    /// # Errors
    /// If it cannot be written; or if somebody has kept something else meanwhile.
    pub fn keep_new(&self, known: &Remembered) -> Result<(), Fault> {
        if self.write(known, false)? {
            return Ok(());
        }
        match self.load()? {
            Some(other) if other.id == known.id && other.header == known.header => Ok(()),
            _ => Err(self.taken()),
        }
    }

    /// Keeps what was learnt anew of a vault that is known.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn replace(&self, known: &Remembered) -> Result<(), Fault> {
        self.write(known, true).map(drop)
    }

    /// Since when this host has known of which prune of the vault; nothing yet if there is no such file.
    ///
    /// # Errors
    /// If it cannot be read. Whoever goes on without it obeys every prune later than it might.
    pub fn prunes(&self) -> Result<Known, Fault> {
        self.load_beside(
            PRUNES,
            "Remove that file: every prune counts as new from then on, and is obeyed that much later",
        )
    }

    /// Keeps since when this host has known of which prune.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep_prunes(&self, known: &Known) -> Result<(), Fault> {
        self.keep_beside(PRUNES, known)
    }

    /// What this host has read of the vault to verify it; nothing yet if there is no such file.
    ///
    /// # Errors
    /// If it cannot be read. Whoever goes on without it reads everything once more before a backup is verified.
    pub fn readings(&self) -> Result<Readings, Fault> {
        self.load_beside(
            READINGS,
            "Remove that file: everything is read once more before a backup is verified by slices",
        )
    }

    /// Keeps what this host has read of the vault.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep_readings(&self, readings: &Readings) -> Result<(), Fault> {
        self.keep_beside(READINGS, readings)
    }

    fn load_beside<T: Default + DeserializeOwned>(&self, what: &str, remedy: &str) -> Result<T, Fault> {
        let path = self.beside(what);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                Fault::permanent(codes::VAULT_DAMAGED, READ, path.display().to_string(), error).remedy(remedy)
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(T::default()),
            Err(error) => Err(self.unusable(READ, &error)),
        }
    }

    fn keep_beside<T: Serialize>(&self, what: &str, known: &T) -> Result<(), Fault> {
        let bytes = serde_json::to_vec(known)
            .map_err(|error| Fault::permanent(codes::UNDEFINED_ERROR, KEEP, "", error))?;
        let put = self.put(&format!("{}.{what}", self.stem), &bytes, true);
        put.map(drop).map_err(|error| self.refused(KEEP, &error))
    }

    /// Forgets the vault, and removes the copies of its index. Whether it was known.
    ///
    /// # Errors
    /// If something could not be removed.
    pub fn forget(&self) -> Result<bool, Fault> {
        const DOING: &str = "forget the vault";
        match std::fs::remove_dir_all(self.cache()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(self.unusable(DOING, &error));
            }
            _ => {}
        }
        if !self.path().exists() && [PRUNES, READINGS].iter().all(|what| !self.beside(what).exists()) {
            return Ok(false);
        }
        let gone = self.folder().and_then(|folder| {
            for what in [PRUNES, READINGS] {
                folder.remove_file(&Component::new(format!("{}.{what}", self.stem))?)?;
            }
            let was = folder.remove_file(&Component::new(self.file())?)?;
            folder.sync()?;
            Ok(was)
        });
        gone.map_err(|error| self.refused(DOING, &error))
    }

    /// Makes the folder of copies for its owner alone: whoever reads the index learns what a guest's disks hold in common.
    /// Without it everything still works.
    pub(super) fn prepare_cache(&self) {
        let path = self.cache();
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        if let Err(error) = made {
            tracing::warn!(path = %path.display(), %error, "no folder for copies of the vault's index");
        }
    }

    /// That another vault is known by this name.
    fn taken(&self) -> Fault {
        let cause = "this host knows another vault by that name";
        Fault::permanent(codes::VAULT_EXCHANGED, KEEP, self.path().display().to_string(), cause)
            .remedy("Choose another name; or, if that vault is given up: `vmkeep vault forget`")
    }

    /// Whether it was written: without `replace`, nothing is where something is.
    fn write(&self, known: &Remembered, replace: bool) -> Result<bool, Fault> {
        let mut bytes = serde_json::to_vec_pretty(known)
            .map_err(|error| Fault::permanent(codes::UNDEFINED_ERROR, KEEP, "", error))?;
        bytes.push(b'\n');
        self.put(&self.file(), &bytes, replace).map_err(|error| self.refused(KEEP, &error))
    }

    fn put(&self, name: &str, bytes: &[u8], replace: bool) -> Result<bool, RootError> {
        let folder = self.folder()?;
        let name = Component::new(name)?;
        // Nobody else writes to it, also if two do this at once.
        let aside = Component::new(format!("{}.{}.new", self.stem, uuid::Uuid::now_v7().simple()))?;
        let mut file = folder.create_file(&aside)?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        let named = written.map_err(|source| io("write", folder.path_of(&aside), source)).and_then(|()| {
            if replace { folder.replace(&aside, &name) } else { folder.rename(&aside, &name) }
        });
        if named.is_err() {
            let _ = folder.remove_file(&aside);
        }
        match named {
            Ok(()) => folder.sync().map(|()| true),
            Err(RootError::Exists { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The folder, made durably with what is missing above it.
    fn folder(&self) -> Result<Folder, RootError> {
        let whole = self.state_dir.join(FOLDER);
        let there = whole.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
        let root = TargetRoot::open(there)?;
        match whole.strip_prefix(there).ok().and_then(Path::to_str).filter(|rest| !rest.is_empty()) {
            Some(rest) => root.folder().make_folders(&RelPath::new(rest)?),
            None => root.folder().try_clone(),
        }
    }

    fn unusable(&self, doing: &str, error: &std::io::Error) -> Fault {
        self.refused(doing, &io("use", self.path(), std::io::Error::new(error.kind(), error.to_string())))
    }

    fn refused(&self, doing: &str, error: &RootError) -> Fault {
        let code = match error {
            RootError::NoSpace { .. } => codes::NOT_ENOUGH_DISK_SPACE,
            _ => codes::STORE_UNAVAILABLE,
        };
        Fault::permanent(code, doing, self.path().display().to_string(), error)
            .remedy("See to the state folder: it must be there, have room, and belong to the user that asks")
    }
}

fn io(act: &'static str, path: PathBuf, source: std::io::Error) -> RootError {
    match Errno::from_io_error(&source) {
        Some(Errno::NOSPC | Errno::DQUOT) => RootError::NoSpace { act, path },
        _ => RootError::Io { act, path, source },
    }
}

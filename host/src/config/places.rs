//! Where things are when nobody says: the places that the system's conventions name.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::ConfigError;
use super::file::{absolute, impossible};

/// A socket's path must fit into `sun_path` with its terminating zero.
const LONGEST_SOCKET: usize = 107;

/// What the command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// The state folder.
    pub state_dir: Option<PathBuf>,
    /// The API's socket.
    pub socket: Option<PathBuf>,
    /// The hypervisor's URI.
    pub connect: Option<String>,
}

/// What the process finds around itself.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// The environment's variables; empty ones count as unset.
    pub env: HashMap<String, OsString>,
    /// The effective user id.
    pub uid: u32,
}

impl Surroundings {
    /// Those of this process.
    #[must_use]
    pub fn here() -> Self {
        let env =
            std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value))).collect();
        Self { env, uid: rustix::process::geteuid().as_raw() }
    }

    fn root(&self) -> bool {
        self.uid == 0
    }

    fn raw(&self, key: &str) -> Option<&OsString> {
        self.env.get(key).filter(|value| !value.is_empty())
    }

    pub(super) fn path(&self, key: &str) -> Option<PathBuf> {
        self.raw(key).map(PathBuf::from)
    }

    pub(super) fn text(&self, key: &str) -> Option<String> {
        self.raw(key).and_then(|value| value.to_str()).map(str::to_owned)
    }

    /// A folder of the XDG convention, which says that relative ones are to be ignored.
    fn xdg(&self, key: &str) -> Option<PathBuf> {
        self.path(key).filter(|path| path.is_absolute())
    }

    fn home(&self) -> Option<PathBuf> {
        self.xdg("HOME")
    }

    pub(super) fn config_file(&self) -> Option<PathBuf> {
        if self.root() {
            return Some(PathBuf::from("/etc/vmkeep/vmkeep.toml"));
        }
        let base = self.xdg("XDG_CONFIG_HOME").or_else(|| Some(self.home()?.join(".config")))?;
        Some(base.join("vmkeep/vmkeep.toml"))
    }

    pub(super) fn state_dir(
        &self,
        overrides: &Overrides,
        file: Option<PathBuf>,
    ) -> Result<PathBuf, ConfigError> {
        if let Some(dir) = &overrides.state_dir {
            return whole(dir);
        }
        if let Some(dir) = self.path("VMKEEP_STATE_DIR") {
            return absolute("VMKEEP_STATE_DIR", &dir);
        }
        if let Some(dir) = file {
            return absolute("state_dir", &dir);
        }
        if self.root() {
            return Ok(PathBuf::from("/var/lib/vmkeep"));
        }
        self.xdg("XDG_STATE_HOME")
            .or_else(|| Some(self.home()?.join(".local/state")))
            .map(|base| base.join("vmkeep"))
            .ok_or_else(|| {
                ConfigError::Missing("neither XDG_STATE_HOME nor HOME tells where to keep state".to_owned())
            })
    }

    pub(super) fn socket(
        &self,
        overrides: &Overrides,
        file: Option<PathBuf>,
        state_dir: &Path,
    ) -> Result<PathBuf, ConfigError> {
        let path = if let Some(path) = &overrides.socket {
            whole(path)?
        } else if let Some(path) = self.path("VMKEEP_SOCKET") {
            absolute("VMKEEP_SOCKET", &path)?
        } else if let Some(path) = file {
            absolute("socket", &path)?
        } else if self.root() {
            PathBuf::from("/run/vmkeep/vmkeepd.sock")
        } else {
            match self.xdg("XDG_RUNTIME_DIR") {
                Some(dir) => dir.join("vmkeep/vmkeepd.sock"),
                // A daemon started from cron or over `su` has no runtime folder; its state folder is as private.
                None => state_dir.join("run/vmkeepd.sock"),
            }
        };
        if path.as_os_str().as_bytes().len() > LONGEST_SOCKET {
            let why =
                format!("{path:?} is longer than {LONGEST_SOCKET} bytes, which no socket's path may be");
            return Err(impossible("socket", &why));
        }
        Ok(path)
    }

    pub(super) fn default_uri(&self) -> &'static str {
        if self.root() { "qemu:///system" } else { "qemu:///session" }
    }
}

/// A path from the command line may be relative to the present folder.
fn whole(path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path).map_err(|error| impossible(&path.display().to_string(), &error.to_string()))
}

//! What a test bed's folder says about itself, so that another process can go on with it or end it.

use super::{
    error::{Error, IoContext, Result},
    process::ProcessId,
};
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

const FILE: &str = "testbed.json";
const VERSION: u32 = 1;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct State {
    version: u32,
    /// The process whose end ends the test bed; none for one that was asked to stay.
    pub(crate) owner: Option<ProcessId>,
    /// The unprivileged user.
    pub(crate) user: String,
    /// Whether libvirtd is started with `/dev/kvm` covered up.
    pub(crate) hide_kvm: bool,
    /// Whether it is the system's daemon, run by root.
    #[serde(default)]
    pub(crate) system: bool,
}

impl State {
    pub(crate) fn new(owner: Option<ProcessId>, user: &str, hide_kvm: bool, system: bool) -> Self {
        Self { version: VERSION, owner, user: user.to_owned(), hide_kvm, system }
    }

    pub(crate) fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let text = fs::read_to_string(&path).doing("read", &path)?;
        let state: Self = serde_json::from_str(&text)
            .map_err(|e| Error::Unclear { what: path.display().to_string(), answer: e.to_string() })?;
        if state.version != VERSION {
            return Err(Error::Folder { path, why: format!("it is of version {}", state.version) });
        }
        Ok(state)
    }

    /// Replaces the file whole: a reader never sees half of it.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        let (path, new) = (dir.join(FILE), dir.join("testbed.json.new"));
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::Unclear { what: "the state".into(), answer: e.to_string() })?;
        fs::write(&new, text).doing("write", &new)?;
        fs::rename(&new, &path).doing("rename", &path)
    }
}

//! The new domain: who it is, and which definition follows from that.

use std::io::Read as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmkeep_workflow::{Code, Fault};

use crate::codes;
use crate::hypervisor::{DomainRef, Hypervisor, Layer, NewIdentity, Target};
use crate::image::qcow2::Format;
use crate::image::root::{Component, RelPath};
use crate::manifest::Digest;
use crate::snapshot::Places;
use crate::snapshot::copy::place_fault;

/// A disk of the new domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDisk {
    /// Its name in the definition.
    pub target: Target,
    /// Its image.
    pub path: PathBuf,
    /// The image's format.
    pub format: Format,
}

/// The new domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDomain {
    /// Its UUID, which no domain had before this job: whatever bears it is this job's. And its name.
    pub domain: DomainRef,
    /// Its disks.
    pub disks: Vec<NewDisk>,
    /// Disks of the original that it does not get.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<Target>,
    /// Whether the cables of its network cards are out.
    pub links_down: bool,
    /// It takes the place of the original itself, with all that it is but its disks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub same: bool,
    /// The file of its firmware variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<PathBuf>,
}

impl NewDomain {
    /// As the hypervisor takes it.
    #[must_use]
    pub fn identity(&self) -> NewIdentity {
        let mut seed = [0; 8];
        seed.copy_from_slice(&self.domain.id.0.as_bytes()[8..]);
        NewIdentity {
            name: self.domain.name.clone(),
            id: self.domain.id,
            mac_seed: (!self.same).then(|| u64::from_le_bytes(seed)),
            disks: self
                .disks
                .iter()
                .map(|disk| {
                    let format = disk.format.as_str().to_owned();
                    (disk.target.clone(), Layer { path: disk.path.clone(), format })
                })
                .collect(),
            without: self.without.clone(),
            links_down: self.links_down,
            same: self.same,
            nvram: self.nvram.clone(),
        }
    }
}

/// A definition that lies in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDefinition {
    /// The backup's folder.
    pub backup: PathBuf,
    /// That folder lies below no root: its owner has named it himself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside: bool,
    /// The file.
    pub name: Component,
    /// The hash of its content.
    pub blake3: Digest,
}

/// No definition is longer.
const LONGEST: u64 = 16 << 20;

impl StoredDefinition {
    /// Reads it and compares it with its hash.
    ///
    /// # Errors
    /// When it cannot be read, or is not what the manifest says.
    pub async fn read(&self, places: &Places) -> Result<String, Fault> {
        let (wanted, places) = (self.clone(), places.clone());
        match crate::blocking::run(move || wanted.read_now(&places)).await {
            Ok(read) => read,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, "read the definition", self.name.to_string(), e)),
        }
    }

    fn read_now(&self, places: &Places) -> Result<String, Fault> {
        let doing = "read the definition";
        let object = self.backup.join(self.name.as_str()).display().to_string();
        let file = places
            .open(&self.backup, self.outside)
            .and_then(|folder| folder.open_file(&RelPath::from(self.name.clone())))
            .map_err(|e| place_fault(&e, codes::CANNOT_READ_XML_FILE, doing, &object))?;
        let mut text = String::new();
        file.take(LONGEST)
            .read_to_string(&mut text)
            .map_err(|e| Fault::permanent(codes::CANNOT_READ_XML_FILE, doing, &object, e))?;
        if Digest(blake3::hash(text.as_bytes())) != self.blake3 {
            let cause = "it is not the one that the manifest speaks of";
            return Err(Fault::permanent(codes::MANIFEST_MISMATCH, doing, object, cause));
        }
        Ok(text)
    }
}

/// Where the definition of the original is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Original {
    /// In a backup's folder.
    Stored(StoredDefinition),
    /// Here: that of a backup in a vault, which the plan has read with its manifest.
    Text {
        /// The definition.
        definition: String,
    },
}

impl Original {
    pub(super) async fn read(&self, places: &Places) -> Result<String, Fault> {
        match self {
            Self::Stored(stored) => stored.read(places).await,
            Self::Text { definition } => Ok(definition.clone()),
        }
    }
}

/// The new definition, and what it has otherwise than the old one, for people.
///
/// # Errors
/// When the hypervisor cannot read or rewrite it.
pub(super) fn rewrite(
    hypervisor: &dyn Hypervisor,
    text: &str,
    new: &NewDomain,
) -> Result<(String, Vec<String>), Fault> {
    let fail = |e: crate::hypervisor::HvError| {
        e.fault(codes::CANNOT_READ_XML_FILE, "rewrite the definition", &new.domain.name)
    };
    let xml = hypervisor.rewrite_definition(text, &new.identity()).map_err(fail)?;
    let changes = hypervisor.definition_changes(text, &xml).map_err(fail)?;
    Ok((xml, changes))
}

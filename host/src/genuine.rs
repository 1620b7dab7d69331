//! Whether a backup's manifest is still the one that was published.
//!
//! The files of a backup are compared with their hashes in the manifest; nothing in the folder vouches for the manifest
//! itself. Two others can: the definitions beside it, which have their own word on whose backup this is, and the journal
//! of the job that published it, if this host has it. A folder that came from elsewhere has only the former, and that is
//! said instead of being passed over.

use std::io::Read as _;

use vmkeep_libvirt::xml::DomainXml;
use vmkeep_steps::hypervisor::Definition;
use vmkeep_steps::image::root::{Component, Folder, RelPath};
use vmkeep_steps::manifest::{Digest, Manifest, Stored};
use vmkeep_steps::snapshot::publish::{Publish, PublishOutput};
use vmkeep_workflow::engine::JobView;
use vmkeep_workflow::{Engine, JobId, Step};

/// No definition is longer.
const LONGEST: u64 = 16 << 20;

/// What this host's journal says of a backup's manifest: the hash that was published, in hexadecimal. Nothing if it has
/// no history of the job, or one that does not tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journal(pub Option<String>);

impl Journal {
    /// Asks the journal about the job that a manifest names.
    pub async fn of(engine: &Engine, manifest: &Manifest) -> Self {
        match engine.view(JobId::from(manifest.job)).await {
            Ok(view) => Self::told(&view, manifest),
            Err(_) => Self(None),
        }
    }

    fn told(view: &JobView, manifest: &Manifest) -> Self {
        let published = view.steps.iter().filter(|step| step.kind == Publish::KIND.to_string());
        let outputs = published.filter_map(|step| step.output.clone());
        let mut outputs = outputs.filter_map(|output| serde_json::from_value::<PublishOutput>(output).ok());
        Self(outputs.find(|output| output.backup == manifest.backup).map(|output| output.manifest))
    }

    /// What is wrong with a manifest by the journal's word.
    #[must_use]
    pub fn objects(&self, stored: &Stored) -> Option<String> {
        let hash = self.0.as_ref()?;
        (*hash != stored.hash.to_string()).then(|| {
            format!(
                "the manifest was changed after it was published: its hash is {}, the journal of job {} says {hash}",
                stored.hash, stored.manifest.job
            )
        })
    }

    /// What its owner should know if the journal says nothing.
    #[must_use]
    pub fn note(&self) -> Option<String> {
        self.0.is_none().then(|| {
            "this host's journal does not know the job that published it: the manifest was compared only with the \
             files beside it"
                .to_owned()
        })
    }
}

/// What the definitions in a backup's folder say otherwise than its manifest. Blocks.
#[must_use]
pub fn against_definitions(folder: &Folder, stored: &Stored) -> Vec<String> {
    let manifest = &stored.manifest;
    let mut found = Vec::new();
    let inactive = definition(folder, manifest, &manifest.definition.inactive, &mut found);
    let live = manifest.definition.live.as_ref();
    let live = live.and_then(|name| definition(folder, manifest, name, &mut found));
    if let Some(ran) = live.as_ref().or(inactive.as_ref()) {
        let (domain, devices) = (&manifest.domain, &ran.devices);
        let mut differs = |what: &str, ours: Option<String>, theirs: Option<String>| {
            if ours.is_some() && ours != theirs {
                let [ours, theirs] = [ours, theirs].map(|text| text.unwrap_or_else(|| "none".to_owned()));
                found.push(format!("the manifest names the {what} {ours}, the definition {theirs}"));
            }
        };
        differs("machine type", domain.machine.clone(), devices.machine.clone());
        differs("architecture", domain.arch.clone(), devices.arch.clone());
        let theirs = Some(devices.memory.to_string());
        differs("memory in bytes", domain.memory.map(|bytes| bytes.to_string()), theirs);
        let has = |definition: &Definition, target: &str| {
            definition.disks.iter().any(|disk| disk.target.0 == target)
        };
        let disks = manifest.disks.iter().map(|disk| &disk.target).filter(|target| !has(ran, target));
        // A disk that was left out may have been defined only for the next start.
        let any = [&live, &inactive];
        let left_out = manifest.left_out.iter().map(|disk| &disk.target);
        let left_out = left_out.filter(|target| !any.iter().copied().flatten().any(|of| has(of, target)));
        for target in disks.chain(left_out) {
            found.push(format!("the manifest speaks of a disk {target}, the definition has none"));
        }
    }
    found
}

/// A definition of the backup, if it can be read; what it says otherwise than the manifest, and why it cannot be read,
/// goes to the findings.
fn definition(
    folder: &Folder,
    manifest: &Manifest,
    name: &Component,
    found: &mut Vec<String>,
) -> Option<Definition> {
    let (xml, definition) = match read(folder, manifest, name) {
        Ok(read) => read,
        Err(why) => {
            found.push(format!("{name} {why}"));
            return None;
        }
    };
    let domain = &manifest.domain;
    match xml.name() {
        Ok(theirs) if theirs != domain.name => {
            found.push(format!(
                "the manifest says that the domain is called {:?}, {name} {theirs:?}",
                domain.name
            ));
        }
        Ok(_) => {}
        Err(error) => found.push(format!("{name} has no name: {error}")),
    }
    match xml.uuid() {
        Ok(theirs) if theirs != domain.uuid => {
            found.push(format!("the manifest names the UUID {}, {name} {theirs}", domain.uuid));
        }
        Ok(_) => {}
        Err(error) => found.push(format!("{name} has no UUID: {error}")),
    }
    Some(definition)
}

fn read(folder: &Folder, manifest: &Manifest, name: &Component) -> Result<(DomainXml, Definition), String> {
    let entry = manifest.file(name).ok_or("is not among the files")?;
    let file = folder.open_file(&RelPath::from(name.clone())).map_err(|e| format!("cannot be read: {e}"))?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    let hash = Digest::from(blake3::hash(&bytes));
    if hash != entry.blake3 {
        return Err(format!("has the hash {hash}, not {}", entry.blake3));
    }
    let text = String::from_utf8(bytes).map_err(|_| "is not text".to_owned())?;
    let xml = DomainXml::parse(&text).map_err(|e| format!("cannot be understood: {e}"))?;
    let definition = crate::hypervisor::read_definition(&text).map_err(|e| e.message)?;
    Ok((xml, definition))
}

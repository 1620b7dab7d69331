//! Reading a manifest, and publishing one.
//!
//! **Publishing is the commit of a backup**, and is one act: the manifest is written under another name, synced, renamed
//! to `manifest.json` without replacing anything, and the folder is synced. Before the rename there is no backup,
//! after it there is one, whole; nothing in between. Whoever publishes has made every other file durable before.
//!
//! **Reading trusts nothing.** A file that is too long is not read; a newer form is refused by its number before its
//! fields are looked at; then everything that one field says about another is checked.

use std::collections::HashSet;
use std::io::{Read as _, Write as _};

use serde_json::Value;

use super::folder::{MANIFEST, NEW, PROTECTION, WITHDRAWN, fixed};
use super::model::{Digest, FORMAT, FileEntry, Manifest, READER, Role};
use crate::blocking::{self, touch};
use crate::image::qcow2::Format;
use crate::image::root::{Component, Folder, RelPath, RootError};

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The folder or the file cannot be used.
    #[error(transparent)]
    Place(#[from] RootError),
    /// It cannot be read or written.
    #[error("cannot {act} the manifest: {source}")]
    Io {
        /// What was being done.
        act: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Longer than any manifest.
    #[error("the manifest has more than {most} bytes")]
    TooLong {
        /// The limit.
        most: u64,
    },
    /// It is not JSON, or not of this form.
    #[error("the manifest cannot be understood: {0}")]
    Form(serde_json::Error),
    /// JSON, but of something else.
    #[error("that is not a manifest of vmkeep's")]
    Foreign,
    /// A newer form.
    #[error("the manifest needs a reader of version {needed}, this one is of version {READER}")]
    TooNew {
        /// The version that is needed.
        needed: u64,
    },
    /// Its fields contradict each other.
    #[error("the manifest contradicts itself: {0}")]
    Contradiction(String),
    /// There is another backup's manifest in the folder.
    #[error("the folder holds another backup already")]
    Taken,
}

/// No manifest is longer: one with ten thousand files has about 4 MB.
const LONGEST: u64 = 16 << 20;

/// A manifest as it lies in its folder.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// What it says.
    pub manifest: Manifest,
    /// BLAKE3 of the file.
    pub hash: Digest,
}

/// Reads and checks the manifest of a folder. [`RootError::Missing`] if there is none.
pub fn read(folder: &Folder) -> Result<Stored, ManifestError> {
    read_named(folder, MANIFEST)
}

/// The same of a backup that is being deleted.
pub fn read_withdrawn(folder: &Folder) -> Result<Stored, ManifestError> {
    read_named(folder, WITHDRAWN)
}

fn read_named(folder: &Folder, name: &'static str) -> Result<Stored, ManifestError> {
    let file = folder.open_file(&RelPath::from(fixed(name)))?;
    let mut bytes = Vec::new();
    file.take(LONGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| ManifestError::Io { act: "read", source })?;
    let manifest = parse(&bytes)?;
    Ok(Stored { manifest, hash: blake3::hash(&bytes).into() })
}

/// Reads and checks a manifest from its bytes.
pub fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    if bytes.len() as u64 > LONGEST {
        return Err(ManifestError::TooLong { most: LONGEST });
    }
    let value: Value = serde_json::from_slice(bytes).map_err(ManifestError::Form)?;
    if value.get("format").and_then(Value::as_str) != Some(FORMAT) {
        return Err(ManifestError::Foreign);
    }
    match value.get("min_reader").and_then(Value::as_u64) {
        Some(needed) if needed > u64::from(READER) => return Err(ManifestError::TooNew { needed }),
        Some(_) => {}
        None => return Err(ManifestError::Foreign),
    }
    let manifest: Manifest = serde_json::from_value(value).map_err(ManifestError::Form)?;
    check(&manifest).map_err(ManifestError::Contradiction)?;
    Ok(manifest)
}

/// The bytes of a manifest.
pub fn to_bytes(manifest: &Manifest) -> Result<Vec<u8>, ManifestError> {
    check(manifest).map_err(ManifestError::Contradiction)?;
    let mut bytes = serde_json::to_vec_pretty(manifest).map_err(ManifestError::Form)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Makes the folder a backup. Everything else in it is durable already. Harmless to repeat with the same manifest.
pub fn publish(folder: &Folder, manifest: &Manifest) -> Result<Digest, ManifestError> {
    let bytes = to_bytes(manifest)?;
    match read(folder) {
        Ok(there) if there.manifest.backup == manifest.backup => {
            // An earlier attempt of this job came so far; whether its folder was synced is not known.
            folder.sync()?;
            return Ok(there.hash);
        }
        Ok(_) => return Err(ManifestError::Taken),
        Err(ManifestError::Place(RootError::Missing { .. })) => {}
        Err(other) => return Err(other),
    }
    write_durably(folder, MANIFEST, &bytes)?;
    Ok(blake3::hash(&bytes).into())
}

/// Writes a file under another name, syncs it, and gives it its name, which must be free. Durable on return.
pub fn write_durably(folder: &Folder, name: &'static str, bytes: &[u8]) -> Result<(), ManifestError> {
    let io = |act| move |source| ManifestError::Io { act, source };
    let aside = Component::literal(format!("{name}{NEW}"));
    folder.remove_file(&aside)?;
    let mut file = folder.create_file(&aside)?;
    let written = touch("write").map_err(std::io::Error::from).and_then(|()| file.write_all(bytes));
    written.map_err(io("write"))?;
    if !vmkeep_workflow::mutation::on("fsync-left-out") {
        blocking::sync(&file).map_err(io("sync"))?;
    }
    folder.rename(&aside, &fixed(name))?;
    folder.sync()?;
    Ok(())
}

/// Whether the fields agree with each other. The error says which do not.
fn check(m: &Manifest) -> Result<(), String> {
    if m.format != FORMAT || m.min_reader > m.version || m.min_reader == 0 {
        return Err("its versions".to_owned());
    }
    let mut names = HashSet::new();
    for file in &m.files {
        let name = file.name.as_str();
        // On a file system that ignores case they would be one file.
        if !names.insert(name.to_lowercase()) {
            return Err(format!("two files are called {name:?}"));
        }
        let ours = [MANIFEST, WITHDRAWN, PROTECTION].iter().any(|ours| name.eq_ignore_ascii_case(ours));
        if ours || name.ends_with(NEW) {
            return Err(format!("a file is called {name:?}"));
        }
        let image = matches!(file.role, Role::Disk | Role::Base);
        if image != file.format.is_some() || image != file.virtual_size.is_some() {
            return Err(format!("{name:?} is and is not an image"));
        }
        if file.backing.is_some() && file.format != Some(Format::Qcow2) {
            return Err(format!("{name:?} cannot stand on another image"));
        }
    }
    with_role(m, &m.definition.inactive, &[Role::Definition])?;
    if let Some(live) = &m.definition.live {
        with_role(m, live, &[Role::Definition])?;
    }
    if let Some(memory) = m.memory.saved() {
        with_role(m, &memory.file, &[Role::Memory])?;
    }
    super::machine::check(m)?;
    let mut targets = HashSet::new();
    for disk in &m.disks {
        if !targets.insert(disk.target.as_str()) {
            return Err(format!("two disks are called {:?}", disk.target));
        }
        check_chain(m, disk)?;
    }
    for left in &m.left_out {
        if targets.contains(left.target.as_str()) {
            return Err(format!("disk {:?} is and is not in the backup", left.target));
        }
    }
    Ok(())
}

fn with_role<'m>(m: &'m Manifest, name: &Component, roles: &[Role]) -> Result<&'m FileEntry, String> {
    let file = m.file(name).filter(|f| roles.contains(&f.role));
    file.ok_or_else(|| format!("{name} is not among the files"))
}

fn check_chain(m: &Manifest, disk: &super::model::Disk) -> Result<(), String> {
    let target = &disk.target;
    // A file that comes twice would be a loop; none of a chain's files may, so its length is bounded as well.
    let unique: HashSet<_> = disk.chain.iter().collect();
    if disk.chain.is_empty() || unique.len() != disk.chain.len() || disk.chain.len() > m.files.len() {
        return Err(format!("the chain of disk {target:?}"));
    }
    for (i, name) in disk.chain.iter().enumerate() {
        let roles: &[Role] = if i == 0 { &[Role::Disk] } else { &[Role::Base, Role::Disk] };
        let file = with_role(m, name, roles)?;
        if file.backing.as_ref() != disk.chain.get(i + 1) {
            return Err(format!("what {name} of disk {target:?} stands on"));
        }
        if i == 0 && file.virtual_size != Some(disk.virtual_size) {
            return Err(format!("the size of disk {target:?}"));
        }
    }
    Ok(())
}

/// Takes the manifest away: from now on the folder is no backup. Durable on return; harmless to repeat.
pub fn withdraw(folder: &Folder) -> Result<(), RootError> {
    give_way(folder, MANIFEST, WITHDRAWN)
}

/// Puts the manifest back: the folder is a backup again. Durable on return; harmless to repeat.
pub fn reinstate(folder: &Folder) -> Result<(), RootError> {
    give_way(folder, WITHDRAWN, MANIFEST)
}

fn give_way(folder: &Folder, from: &'static str, to: &'static str) -> Result<(), RootError> {
    match folder.rename(&fixed(from), &fixed(to)) {
        // An earlier attempt came so far; whether the folder was synced is not known.
        Err(RootError::Missing { .. }) if folder.stat(&fixed(to))?.is_some() => {}
        renamed => renamed?,
    }
    folder.sync()
}

#[cfg(test)]
#[path = "tests/file.rs"]
mod tests;

//! Whether the files of a backup are what its manifest says.
//!
//! For each file: it is there, a regular file reached without links, of the size and (on a full check) the hash that the
//! manifest names. For images also: the header is read by us first and must be sound and name exactly the neighbour
//! that the manifest names; only then may `qemu-img check` open it. Otherwise a header that somebody put there could
//! make QEMU open any file of the host.
//!
//! All files are looked at, whatever is found on the way: the owner wants to know what is left, not what broke first.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::file::Stored;
use super::folder::{MANIFEST, NEW, PROTECTION};
use super::model::{Digest, FileEntry, Manifest};
use crate::image::copy::{Control, CopyError, Observer, SourceFile, Throttle, hash};
use crate::image::qcow2::{Format, Header};
use crate::image::qemu_img::QemuImg;
use crate::image::root::{Component, Folder, RelPath, RootError};

/// How thoroughly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Depth {
    /// Names, sizes, headers. A moment.
    Quick,
    /// Also every byte, against its hash, and the structure of every image.
    Full,
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "problem", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Problem {
    /// It is not there.
    Missing,
    /// A link, a folder, a device.
    NotAFile,
    /// It cannot be read.
    Unreadable {
        /// Why.
        why: String,
    },
    /// Its size differs.
    Size {
        /// In the manifest.
        expected: u64,
        /// On disk.
        found: u64,
    },
    /// Its content differs.
    Hash {
        /// In the manifest.
        expected: Digest,
        /// Of what is on disk.
        found: Digest,
    },
    /// The image's header is not what the manifest says.
    Header {
        /// In what.
        what: String,
    },
    /// The image's structure is damaged.
    Damaged {
        /// In QEMU's words or counts.
        what: String,
    },
    /// Nothing knows of this file. Harmless by itself.
    Unexpected,
}

impl Problem {
    /// Whether the backup is worth less because of it.
    #[must_use]
    pub fn serious(&self) -> bool {
        !matches!(self, Self::Unexpected)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("is missing"),
            Self::NotAFile => f.write_str("is not a regular file"),
            Self::Unreadable { why } => write!(f, "cannot be read: {why}"),
            Self::Size { expected, found } => write!(f, "has {found} bytes, not {expected}"),
            Self::Hash { expected, found } => write!(f, "has the hash {found}, not {expected}"),
            Self::Header { what } => write!(f, "has another header than it should: {what}"),
            Self::Damaged { what } => write!(f, "is damaged: {what}"),
            Self::Unexpected => f.write_str("does not belong to the backup"),
        }
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// With which file.
    pub file: Component,
    /// What.
    #[serde(flatten)]
    pub problem: Problem,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.file, self.problem)
    }
}

/// Compares a folder with its manifest. Blocks. `Err` only if the observer ended it or the folder itself cannot be read.
pub fn verify(
    folder: &Folder,
    stored: &Stored,
    depth: Depth,
    qemu: &QemuImg,
    throttle: Option<&Throttle>,
    observer: &dyn Observer,
) -> Result<Vec<Finding>, CopyError> {
    let manifest = &stored.manifest;
    let mut found = Vec::new();
    let total = manifest.size();
    let mut done = 0;
    for file in &manifest.files {
        let part = Part { all: observer, done, total };
        let problems = one(folder, manifest, file, depth, throttle, &part)?;
        let header_is_ours = !problems.iter().any(|p| !matches!(p, Problem::Hash { .. }));
        found.extend(problems.into_iter().map(|problem| Finding { file: file.name.clone(), problem }));
        if depth == Depth::Full && header_is_ours {
            let problem = structure(folder, file, qemu);
            found.extend(problem.map(|problem| Finding { file: file.name.clone(), problem }));
        }
        done += file.size;
        observer.progress(done, total);
    }
    found.extend(unexpected(folder, manifest)?);
    Ok(found)
}

/// One file's share of the progress.
struct Part<'a> {
    all: &'a dyn Observer,
    done: u64,
    total: u64,
}

impl Observer for Part<'_> {
    fn control(&self) -> Control {
        self.all.control()
    }
    fn progress(&self, done: u64, _: u64) {
        self.all.progress(self.done.saturating_add(done).min(self.total), self.total);
    }
}

fn one(
    folder: &Folder,
    manifest: &Manifest,
    entry: &FileEntry,
    depth: Depth,
    throttle: Option<&Throttle>,
    observer: &dyn Observer,
) -> Result<Vec<Problem>, CopyError> {
    let source = match open(folder, &entry.name) {
        Ok(source) => source,
        Err(problem) => return Ok(vec![problem]),
    };
    let mut problems = Vec::new();
    let size = source.identity().size;
    if size != entry.size {
        problems.push(Problem::Size { expected: entry.size, found: size });
    }
    problems.extend(header(manifest, entry, &source));
    // With another size the hash differs too: no need to read terabytes to say so.
    if depth == Depth::Full && size == entry.size {
        match hash(&source, throttle.cloned(), observer) {
            Ok(found) if entry.blake3 == Digest(found) => {}
            Ok(found) => problems.push(Problem::Hash { expected: entry.blake3, found: found.into() }),
            Err(e @ (CopyError::Stopped { .. } | CopyError::GaveUp { .. })) => return Err(e),
            Err(e) => problems.push(Problem::Unreadable { why: e.to_string() }),
        }
    }
    Ok(problems)
}

fn open(folder: &Folder, name: &Component) -> Result<SourceFile, Problem> {
    match folder.open_file(&RelPath::from(name.clone())) {
        Ok(file) => SourceFile::from_file(file, folder.path_of(name))
            .map_err(|e| Problem::Unreadable { why: e.to_string() }),
        Err(RootError::Missing { .. }) => Err(Problem::Missing),
        Err(RootError::WrongKind { .. } | RootError::Escapes { .. }) => Err(Problem::NotAFile),
        Err(other) => Err(Problem::Unreadable { why: other.to_string() }),
    }
}

/// What is wrong with an image's header.
fn header(manifest: &Manifest, entry: &FileEntry, source: &SourceFile) -> Option<Problem> {
    let differs = |what: String| Some(Problem::Header { what });
    if entry.format != Some(Format::Qcow2) {
        return None;
    }
    let header = match Header::read(source.file()) {
        Ok(header) => header,
        Err(e) => return differs(e.to_string()),
    };
    let below = entry.backing.as_ref().and_then(|name| manifest.file(name));
    let named = below.and_then(|b| b.format.map(|format| (b.name.as_str(), format)));
    if header.data_file {
        differs("its data lies in another file".to_owned())
    } else if !header.names(named) {
        differs(format!(
            "it stands on {:?} ({:?}) and should stand on {:?}",
            header.backing, header.backing_format, named
        ))
    } else if Some(header.virtual_size) != entry.virtual_size {
        differs(format!("a disk of {} bytes", header.virtual_size))
    } else if header.corrupt {
        differs("it is marked as corrupt".to_owned())
    } else {
        None
    }
}

/// How long `qemu-img check` may take: it reads the metadata of an image, a few hundredths of a percent of it.
const CHECK_LIMIT: Duration = Duration::from_secs(3600);

/// What is wrong with an image's structure. Its header was found to be the right one.
fn structure(folder: &Folder, entry: &FileEntry, qemu: &QemuImg) -> Option<Problem> {
    let format = entry.format?;
    match qemu.check(&folder.path_of(&entry.name), format, CHECK_LIMIT) {
        Ok(report) if report.sound() => None,
        Ok(report) => Some(Problem::Damaged {
            what: format!(
                "{} wrong clusters, {} that could not be checked",
                report.corruptions, report.check_errors
            ),
        }),
        Err(e) => Some(Problem::Damaged { what: e.to_string() }),
    }
}

/// Lets the page cache forget the files of a backup, so that reading them again asks the medium. A page that somebody
/// else has mapped or that was never written back stays; nothing can be done about a disk's own cache.
pub fn forget_cached(folder: &Folder, manifest: &Manifest) {
    for entry in &manifest.files {
        if let Ok(file) = folder.open_file(&RelPath::from(entry.name.clone())) {
            // Dirty pages are not dropped. Those of a published file are durable already; one that somebody wrote to
            // afterwards is synced first, and its hash tells.
            let _ = rustix::fs::fdatasync(&file);
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

fn unexpected(folder: &Folder, manifest: &Manifest) -> Result<Vec<Finding>, CopyError> {
    let known: HashSet<&str> = manifest.files.iter().map(|f| f.name.as_str()).collect();
    let entries = folder.entries()?;
    let strange = entries.into_iter().filter(|(name, _)| {
        let name = name.as_str();
        name != MANIFEST && name != PROTECTION && !known.contains(name) && !name.ends_with(NEW)
    });
    Ok(strange.map(|(file, _)| Finding { file, problem: Problem::Unexpected }).collect())
}

#[cfg(test)]
#[path = "tests/verify.rs"]
mod tests;

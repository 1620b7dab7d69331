//! The files that make up a disk, and what becomes of them in a folder of their own.
//!
//! A disk's image may stand on others: a template, a cloud image, the parent of a linked clone. Such *foreign* chains
//! are normal. In a backup the disk must be complete by itself, so the whole chain is in the folder.
//!
//! **Copied file by file, not flattened.** Each file of the chain is copied byte for byte: cheap to hash, to resume and
//! to compare, sparse as it was, with its clusters, compression and encryption as they were; and a template on which
//! several disks of a backup stand is copied once. Flattening would read and write everything through QEMU, could not
//! be resumed, and would turn a 1 GiB clone of a 40 GiB template into 41 GiB *per disk*. The price is that a copy
//! must name its neighbours. Their names in the folder are relative, and are put into each header *while it is
//! copied* ([`super::qcow2`]); nothing else of a file is changed. The hash that counts is that of the published file.
//!
//! **Which files.** For a running domain that is QEMU's word ([`from_layers`]): a definition may name a chain
//! explicitly, or say that there is none, whatever the headers hold. Where the headers must tell ([`probe`]), a
//! backing name is read as QEMU reads it: relative to the folder of the image that names it, as that image was opened,
//! symbolic links not resolved. A name with a protocol, or a JSON description, is refused: what is behind it is no
//! file that could be copied.

use super::copy::{CopyError, Identity, SourceFile};
use super::qcow2::{Format, Header, Qcow2Error, looks_like_qcow2};
use super::rights::Rights;
use super::root::Component;
use super::space::data_bytes;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Why a chain cannot be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A file of it cannot be opened, or is no file.
    #[error(transparent)]
    File(#[from] CopyError),
    /// A header cannot be read.
    #[error("{path:?}: {source}")]
    Header {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: Qcow2Error,
    },
    /// A format that is neither qcow2 nor raw.
    #[error("{path:?} is of format {format:?}, which is neither qcow2 nor raw")]
    Format {
        /// Which file.
        path: PathBuf,
        /// As it is called.
        format: String,
    },
    /// A backing image whose format nobody recorded, and that looks like qcow2: taking it for that would follow
    /// whatever a guest may have written into it.
    #[error(
        "{path:?} does not say of which format its backing image {backing:?} is; \
         if you know: qemu-img rebase -u -f qcow2 -F FORMAT -b BACKING IMAGE"
    )]
    FormatNotRecorded {
        /// The image that should say so.
        path: PathBuf,
        /// Its backing image.
        backing: PathBuf,
    },
    /// The backing image is reached by a protocol.
    #[error("{path:?} stands on {backing:?}, which is no file")]
    NotAFile {
        /// Which file.
        path: PathBuf,
        /// What it names.
        backing: String,
    },
    /// A file comes twice in its own chain.
    #[error("{path:?} stands, over others, on itself")]
    Loop {
        /// Which file.
        path: PathBuf,
    },
    /// Longer than any sane chain.
    #[error("the chain of {path:?} has more than {most} files")]
    TooLong {
        /// The top.
        path: PathBuf,
        /// The limit.
        most: usize,
    },
    /// There is no file at all.
    #[error("a disk without files")]
    Empty,
}

/// QEMU itself gives up at 200 and libvirt does too.
const LONGEST: usize = 200;

/// One file of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// Its path as whoever named it wrote it, made absolute.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Which file it is, and as of when.
    pub identity: Identity,
    /// Size of the disk that it shows, in bytes.
    pub virtual_size: u64,
    /// Bytes that a copy will write.
    pub data_bytes: u64,
    /// Its header, if it has one.
    pub header: Option<Header>,
    /// Whose it is when no guest uses it; nothing if that cannot be told.
    pub rights: Option<Rights>,
}

impl Element {
    /// Looks at one file. `format` is taken for granted.
    pub fn read(path: &Path, format: Format) -> Result<Self, ChainError> {
        // A format of its own on a device would need to be read otherwise than as a file; raw bytes are raw bytes.
        let file = match format {
            Format::Raw => SourceFile::open_raw(path)?,
            Format::Qcow2 => SourceFile::open(path)?,
        };
        let identity = file.identity();
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(
                Header::read(file.file())
                    .map_err(|source| ChainError::Header { path: path.to_owned(), source })?,
            ),
        };
        if header.as_ref().is_some_and(|h| h.data_file) {
            return Err(ChainError::Header { path: path.to_owned(), source: Qcow2Error::DataFile });
        }
        let data_bytes = data_bytes(file.file()).map_err(|source| CopyError::Source {
            act: "look at",
            path: path.to_owned(),
            source,
        })?;
        // QEMU rounds a raw file up to whole sectors.
        let virtual_size = match &header {
            Some(header) => header.virtual_size,
            None => identity.size.next_multiple_of(512),
        };
        let rights = Rights::at_rest(path).ok();
        Ok(Self { path: path.to_owned(), format, identity, virtual_size, data_bytes, header, rights })
    }
}

/// The chain that these layers make, from the top down, whatever the headers say.
pub fn from_layers<'a>(
    layers: impl IntoIterator<Item = (&'a Path, &'a str)>,
) -> Result<Vec<Element>, ChainError> {
    let mut chain = Vec::new();
    for (path, format) in layers {
        let known = Format::from_name(format)
            .ok_or_else(|| ChainError::Format { path: path.to_owned(), format: format.to_owned() })?;
        chain.push(Element::read(path, known)?);
        // A raw image holds all of its disk; nothing can be under it.
        if known == Format::Raw {
            break;
        }
    }
    checked(chain)
}

/// The chain under an image, as its headers tell it, from the top down.
pub fn probe(top: &Path, format: Format) -> Result<Vec<Element>, ChainError> {
    let mut chain: Vec<Element> = Vec::new();
    let mut next = Some((top.to_owned(), format));
    while let Some((path, format)) = next.take() {
        if chain.len() == LONGEST {
            return Err(ChainError::TooLong { path: top.to_owned(), most: LONGEST });
        }
        let element = Element::read(&path, format)?;
        if chain.iter().any(|e| e.identity.same_file(&element.identity)) {
            return Err(ChainError::Loop { path });
        }
        next = backing_of(&element)?;
        chain.push(element);
    }
    Ok(chain)
}

fn checked(chain: Vec<Element>) -> Result<Vec<Element>, ChainError> {
    let Some(top) = chain.first() else { return Err(ChainError::Empty) };
    if chain.len() > LONGEST {
        return Err(ChainError::TooLong { path: top.path.clone(), most: LONGEST });
    }
    for (i, element) in chain.iter().enumerate() {
        if chain[..i].iter().any(|e| e.identity.same_file(&element.identity)) {
            return Err(ChainError::Loop { path: element.path.clone() });
        }
    }
    Ok(chain)
}

/// Where an image's header says that the next one is.
fn backing_of(element: &Element) -> Result<Option<(PathBuf, Format)>, ChainError> {
    let Some(header) = &element.header else { return Ok(None) };
    let Some(name) = &header.backing else { return Ok(None) };
    let Some(path) = resolve(&element.path, name) else {
        return Err(ChainError::NotAFile { path: element.path.clone(), backing: name.clone() });
    };
    let format = match header.backing_format.as_deref() {
        Some(known) => Format::from_name(known)
            .ok_or_else(|| ChainError::Format { path: path.clone(), format: known.to_owned() })?,
        None => {
            let file = SourceFile::open(&path)?;
            let looks = looks_like_qcow2(file.file())
                .map_err(|e| ChainError::Header { path: path.clone(), source: Qcow2Error::Read(e) })?;
            if looks {
                let path = element.path.clone();
                return Err(ChainError::FormatNotRecorded { path, backing: file.path().to_owned() });
            }
            Format::Raw
        }
    };
    Ok(Some((path, format)))
}

/// A backing name as QEMU reads it; `None` if it is no file name.
pub(crate) fn resolve(image: &Path, name: &str) -> Option<PathBuf> {
    if let Some(path) = name.strip_prefix("file:") {
        // Relative to QEMU's own working folder, which is nobody's wish.
        return path.starts_with('/').then(|| PathBuf::from(path));
    }
    let protocol = name.find([':', '/']).is_some_and(|at| name.as_bytes()[at] == b':');
    if protocol || name.is_empty() {
        return None;
    }
    // `join` keeps an absolute name as it is.
    Some(image.parent()?.join(name))
}

/// A backing image by its name in the same folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its file name.
    pub name: Component,
    /// Its format.
    pub format: Format,
}

/// A file that is to be copied into a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileToCopy {
    /// Where it is now.
    pub source: PathBuf,
    /// Its format.
    pub format: Format,
    /// Which file it is. For the top of a running domain's disk size and time move on until the snapshot.
    pub identity: Identity,
    /// Its name in the folder.
    pub name: Component,
    /// On which of its neighbours it is to stand.
    pub backing: Option<Neighbour>,
    /// Size of the disk that it shows, in bytes.
    pub virtual_size: u64,
    /// Bytes that the copy will write, as of now.
    pub data_bytes: u64,
    /// Whose it is at rest. Seen before the snapshot, which takes libvirt's note of it away from the base for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rights: Option<Rights>,
}

/// Gives every file of several disks' chains a name in one folder. A file that several chains share comes once.
///
/// The result has, for each disk, the indices of its files from the top down. The top of `vda` becomes `vda.qcow2`, the
/// files below it `vda.base1.qcow2`, `vda.base2.raw`, …; a shared file is named after the first disk that needs it.
pub fn lay_out<'a>(
    disks: impl IntoIterator<Item = (&'a str, &'a [Element])>,
) -> (Vec<FileToCopy>, Vec<Vec<usize>>) {
    let mut files: Vec<FileToCopy> = Vec::new();
    let mut taken = HashSet::new();
    let mut chains = Vec::new();
    for (target, elements) in disks {
        let mut chain: Vec<usize> = Vec::new();
        for (depth, element) in elements.iter().enumerate() {
            // The same file may stand on different others only if definitions contradict each other; then it is two.
            let below = elements.get(depth + 1).map(|e| e.identity);
            let shared = files.iter().position(|f| {
                f.identity.same_file(&element.identity)
                    && f.format == element.format
                    && backing_identity(&files, f).is_some_and(|b| same(b, below))
            });
            let at = match shared {
                Some(at) => at,
                None => {
                    let name = free_name(&mut taken, target, depth, element.format);
                    files.push(FileToCopy {
                        source: element.path.clone(),
                        format: element.format,
                        identity: element.identity,
                        name,
                        backing: None,
                        virtual_size: element.virtual_size,
                        data_bytes: element.data_bytes,
                        rights: element.rights.clone(),
                    });
                    files.len() - 1
                }
            };
            if let Some(&above) = chain.last() {
                let below = Neighbour { name: files[at].name.clone(), format: files[at].format };
                files[above].backing = Some(below);
            }
            chain.push(at);
        }
        chains.push(chain);
    }
    (files, chains)
}

/// The identity of what a laid out file stands on; the outer `None` if its neighbour is not known.
fn backing_identity(files: &[FileToCopy], file: &FileToCopy) -> Option<Option<Identity>> {
    match &file.backing {
        None => Some(None),
        Some(n) => files.iter().find(|f| f.name == n.name).map(|f| Some(f.identity)),
    }
}

fn same(a: Option<Identity>, b: Option<Identity>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => a.same_file(&b),
        _ => false,
    }
}

fn free_name(taken: &mut HashSet<String>, target: &str, depth: usize, format: Format) -> Component {
    let mut number = depth;
    loop {
        let stem = if number == 0 { target.to_owned() } else { format!("{target}.base{number}") };
        // Encoded before the suffix, so that a target cannot smuggle one in.
        let name = format!("{}.{format}", super::name::encode(&stem));
        if taken.insert(name.to_lowercase()) {
            return Component::literal(name);
        }
        number += 1;
    }
}

/// The bytes that must replace the beginning of a file so that it stands on its neighbour; empty if it does already.
pub fn header_for(source: &SourceFile, file: &FileToCopy) -> Result<Vec<u8>, ChainError> {
    if file.format == Format::Raw {
        return Ok(Vec::new());
    }
    let fail = |e| ChainError::Header { path: file.source.clone(), source: e };
    let header = Header::read(source.file()).map_err(fail)?;
    let backing = file.backing.as_ref().map(|n| (n.name.as_str(), n.format));
    if header.names(backing) {
        return Ok(Vec::new());
    }
    header.with_backing(backing).map_err(fail)
}

#[cfg(test)]
mod tests;

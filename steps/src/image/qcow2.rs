//! The header of a qcow2 image: reading it, and giving a copy another backing name.
//!
//! `qemu-img` can do both. It is not used for them, for three reasons. `qemu-img info` and `check` open whatever the
//! header names, so a hostile image in a backup folder must be looked at *before* QEMU touches it. `qemu-img rebase
//! -u` opens the copy for writing: it may move persistent bitmaps about, so the whole file would have to be read and
//! hashed again afterwards, a second pass over what may be terabytes. And a header that is rewritten while the first
//! bytes are copied leaves no moment at which a copy exists that names the originals.
//!
//! What is rewritten is exactly what `rebase -u` rewrites in the header: the backing name, its place and length, the
//! extension that names its format. All other fields and extensions are carried over bit by bit. All of that lies in
//! the image's first cluster. Format: `docs/interop/qcow2.txt` of QEMU.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// The formats of image files that vmkeep copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// Plain bytes.
    Raw,
}

impl Format {
    /// As QEMU and libvirt call it; also a good file name extension.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }

    /// From QEMU's or libvirt's name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a header could not be read or rewritten.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2Error {
    /// It does not begin with the magic number.
    #[error("not a qcow2 image")]
    NotQcow2,
    /// A version other than 2 and 3.
    #[error("qcow2 version {0} is not known")]
    Version(u32),
    /// A value that no image can have, or an extension that runs over its end.
    #[error("the qcow2 header is damaged: {0}")]
    Damaged(&'static str),
    /// The guest's data lies in another file that only the header names.
    #[error("the image keeps its data in an external data file")]
    DataFile,
    /// The new backing name does not fit into the first cluster.
    #[error("no room for the backing name in the header cluster ({cluster} bytes)")]
    NoRoom {
        /// Size of a cluster.
        cluster: u64,
    },
    /// The file could not be read.
    #[error("cannot read the header: {0}")]
    Read(#[from] std::io::Error),
}

const MAGIC: &[u8; 4] = b"QFI\xfb";
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xE279_2ACA;
const EXT_FEATURE_NAMES: u32 = 0x6803_F857;
const EXT_BITMAPS: u32 = 0x2385_2875;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const AUTOCLEAR_BITMAPS: u8 = 1;
/// QEMU's own limit for a backing name.
const LONGEST_NAME: usize = 1023;

/// What the header of an image says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of a cluster in bytes.
    pub cluster: u64,
    /// Size of the disk that the guest sees, in bytes.
    pub virtual_size: u64,
    /// The backing name as written; it may be relative, or any of QEMU's pseudo names.
    pub backing: Option<String>,
    /// The format of the backing file as written.
    pub backing_format: Option<String>,
    /// Snapshots inside the image.
    pub snapshots: u32,
    /// Persistent bitmaps, as far as the header says.
    pub bitmaps: u32,
    /// 0 none, 1 AES (historic), 2 LUKS.
    pub encryption: u32,
    /// The image was not closed properly and its reference counts are to be rebuilt.
    pub dirty: bool,
    /// QEMU found it damaged.
    pub corrupt: bool,
    /// The data lies in another file.
    pub data_file: bool,
    head: Vec<u8>,
    extensions: Vec<(u32, Vec<u8>)>,
    /// End of everything known in the first cluster: header, extensions, backing name.
    end: usize,
}

fn be32(bytes: &[u8], at: usize) -> Result<u32, Qcow2Error> {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    field.map(u32::from_be_bytes).ok_or(Qcow2Error::Damaged("it is too short"))
}

fn be64(bytes: &[u8], at: usize) -> Result<u64, Qcow2Error> {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    field.map(u64::from_be_bytes).ok_or(Qcow2Error::Damaged("it is too short"))
}

impl Header {
    /// Reads the header of an open file.
    pub fn read(file: &File) -> Result<Self, Qcow2Error> {
        let mut start = [0; V2_LEN];
        read_some(file, &mut start)?;
        let cluster = cluster_size(&start)?;
        let mut first = vec![0; cluster as usize];
        let got = read_some(file, &mut first)?;
        first.truncate(got);
        Self::parse(&first)
    }

    /// Reads a header from the first cluster of an image, or what there is of it.
    pub fn parse(bytes: &[u8]) -> Result<Self, Qcow2Error> {
        let cluster = cluster_size(bytes)?;
        let bytes = &bytes[..bytes.len().min(cluster as usize)];
        let version = be32(bytes, 4)?;
        let (mut incompatible, mut len) = (0, V2_LEN);
        if version == 3 {
            incompatible = be64(bytes, 72)?;
            len = be32(bytes, 100)? as usize;
            if len < V3_LEN || !len.is_multiple_of(8) {
                return Err(Qcow2Error::Damaged("its length"));
            }
        }
        if len > bytes.len() {
            return Err(Qcow2Error::Damaged("its length"));
        }
        let (name_at, name_len) = (be64(bytes, 8)?, be32(bytes, 16)? as usize);
        let mut end = bytes.len();
        let mut backing = None;
        if name_at != 0 {
            let at = usize::try_from(name_at).unwrap_or(usize::MAX);
            let name = bytes.get(at..at.saturating_add(name_len));
            let (true, Some(name)) = (at >= len && name_len <= LONGEST_NAME, name) else {
                return Err(Qcow2Error::Damaged("the place of the backing name"));
            };
            let name = std::str::from_utf8(name).map_err(|_| Qcow2Error::Damaged("the backing name"))?;
            backing = Some(name.to_owned());
            end = at;
        }
        let (extensions, extensions_end) = extensions(bytes, len, end)?;
        let find = |kind| extensions.iter().find(|(k, _)| *k == kind).map(|(_, data)| data.as_slice());
        let backing_format = match find(EXT_BACKING_FORMAT) {
            Some(data) => Some(
                String::from_utf8(data.to_vec()).map_err(|_| Qcow2Error::Damaged("the backing format"))?,
            ),
            None => None,
        };
        Ok(Self {
            version,
            cluster,
            virtual_size: be64(bytes, 24)?,
            backing_format,
            snapshots: be32(bytes, 60)?,
            bitmaps: find(EXT_BITMAPS).map_or(Ok(0), |data| be32(data, 0))?,
            encryption: be32(bytes, 32)?,
            dirty: incompatible & 1 != 0,
            corrupt: incompatible & 2 != 0,
            data_file: incompatible & INCOMPATIBLE_DATA_FILE != 0,
            head: bytes[..len].to_vec(),
            end: if backing.is_some() { end + name_len } else { extensions_end },
            backing,
            extensions,
        })
    }

    /// Whether the image names exactly this backing file, or none.
    pub fn names(&self, backing: Option<(&str, Format)>) -> bool {
        match (backing, &self.backing) {
            (None, None) => true,
            (Some((name, format)), Some(own)) => {
                name == own && self.backing_format.as_deref() == Some(format.as_str())
            }
            _ => false,
        }
    }

    /// The bytes to put in place of the beginning of the image so that it names this backing file, or none.
    ///
    /// What the image does not hold itself is read from there: whoever calls this knows that the file has the same
    /// content as the one that was named, or that a hypervisor was told to ignore what is named.
    ///
    /// # Errors
    /// When the image keeps its data elsewhere, or the name does not fit.
    pub fn with_backing(&self, backing: Option<(&str, Format)>) -> Result<Vec<u8>, Qcow2Error> {
        self.rewritten(backing, true)
    }

    /// The same, and the image forgets its persistent bitmaps.
    ///
    /// They record what was written to *another* disk since *its* checkpoints, and would come back to life. Their
    /// clusters stay allocated and belong to nothing then, which `qemu-img check` calls leaked: harmless, and what QEMU
    /// itself does with bitmaps that it cannot trust.
    ///
    /// # Errors
    /// As for [`Self::with_backing`].
    pub fn without_bitmaps(&self, backing: Option<(&str, Format)>) -> Result<Vec<u8>, Qcow2Error> {
        self.rewritten(backing, false)
    }

    fn rewritten(&self, backing: Option<(&str, Format)>, bitmaps: bool) -> Result<Vec<u8>, Qcow2Error> {
        if self.data_file {
            return Err(Qcow2Error::DataFile);
        }
        let room = Qcow2Error::NoRoom { cluster: self.cluster };
        if backing.is_some_and(|(name, _)| name.is_empty() || name.len() > LONGEST_NAME) {
            return Err(room);
        }
        // The table of feature names only makes messages nicer. With the smallest clusters there may be no room for it.
        for with_names in [true, false] {
            let new = self.build(backing, with_names, bitmaps);
            if new.len() as u64 <= self.cluster {
                return Ok(new);
            }
        }
        Err(room)
    }

    fn build(&self, backing: Option<(&str, Format)>, with_names: bool, bitmaps: bool) -> Vec<u8> {
        let mut out = self.head.clone();
        if !bitmaps && let Some(autoclear) = out.get_mut(88..96) {
            autoclear[7] &= !AUTOCLEAR_BITMAPS;
        }
        let mut put = |kind: u32, data: &[u8]| {
            out.extend_from_slice(&kind.to_be_bytes());
            out.extend_from_slice(&u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
            out.extend_from_slice(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        // First, where QEMU puts it too.
        if let Some((_, format)) = backing {
            put(EXT_BACKING_FORMAT, format.as_str().as_bytes());
        }
        for (kind, data) in &self.extensions {
            let keep = match *kind {
                EXT_BACKING_FORMAT => false,
                EXT_FEATURE_NAMES => with_names,
                EXT_BITMAPS => bitmaps,
                _ => true,
            };
            if keep {
                put(*kind, data);
            }
        }
        put(EXT_END, &[]);
        let name = backing.map_or("", |(name, _)| name);
        let at = if name.is_empty() { 0 } else { out.len() as u64 };
        out[8..16].copy_from_slice(&at.to_be_bytes());
        out[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(name.as_bytes());
        // Whatever the old name and extensions left behind them.
        out.resize(out.len().max(self.end), 0);
        out
    }
}

/// Whether a file begins like a qcow2 image.
pub fn looks_like_qcow2(file: &File) -> std::io::Result<bool> {
    let mut magic = [0; 4];
    Ok(read_some(file, &mut magic)? == 4 && &magic == MAGIC)
}

fn read_some(file: &File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

fn cluster_size(bytes: &[u8]) -> Result<u64, Qcow2Error> {
    if bytes.get(..4) != Some(MAGIC) {
        return Err(Qcow2Error::NotQcow2);
    }
    match be32(bytes, 4)? {
        2 | 3 => {}
        other => return Err(Qcow2Error::Version(other)),
    }
    match be32(bytes, 20)? {
        bits @ 9..=21 => Ok(1 << bits),
        _ => Err(Qcow2Error::Damaged("the cluster size")),
    }
}

type Extensions = Vec<(u32, Vec<u8>)>;

fn extensions(bytes: &[u8], from: usize, to: usize) -> Result<(Extensions, usize), Qcow2Error> {
    let mut found = Vec::new();
    let mut at = from;
    while at + 8 <= to {
        let (kind, len) = (be32(bytes, at)?, be32(bytes, at + 4)? as usize);
        at += 8;
        if kind == EXT_END {
            return Ok((found, at));
        }
        let data = at.checked_add(len).filter(|end| *end <= to).and_then(|end| bytes.get(at..end));
        let Some(data) = data else { return Err(Qcow2Error::Damaged("an extension")) };
        found.push((kind, data.to_vec()));
        at += len.next_multiple_of(8);
    }
    Ok((found, at.min(to)))
}

#[cfg(test)]
mod tests;

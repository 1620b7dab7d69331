//! A memory image as libvirt writes it, as far as a snapshot needs to know it.
//!
//! The file begins with a magic word of 16 bytes, which libvirt changes from [`PART`] to [`WHOLE`] when QEMU has
//! written everything. A file whose writing was cut off therefore tells so by itself, in whatever state the writer
//! died. How much memory may take, in bytes and in time, is decided here as well.

use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::blocking::{self, look as looked};

/// The magic word of a whole image.
pub const WHOLE: &[u8; 16] = b"LibvirtQemudSave";

/// The magic word of one that is being written, or was cut off.
pub const PART: &[u8; 16] = b"LibvirtQemudPart";

/// What to do when memory takes more room or time than it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IfSlow {
    /// Stop the guest's processors until it is written.
    Pause,
    /// Go on without memory.
    #[default]
    DiskOnly,
    /// No backup then.
    Fail,
}

/// How much memory may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLimits {
    /// Seconds.
    pub seconds: u64,
    /// Bytes of the file. A guest that writes while it is saved is written several times over.
    pub bytes: u64,
    /// What to do then.
    pub if_slow: IfSlow,
}

impl MemoryLimits {
    /// Limits for a guest with so much memory: a quarter more than it has, and ten minutes.
    #[must_use]
    pub fn for_memory(memory: u64, if_slow: IfSlow) -> Self {
        Self { seconds: 600, bytes: memory + memory / 4 + (64 << 20), if_slow }
    }

    /// The most that the file can become. A guest that is stopped adds at most its memory once more.
    #[must_use]
    pub fn worst(&self, memory: u64) -> u64 {
        match self.if_slow {
            IfSlow::Pause => self.bytes.saturating_add(memory),
            IfSlow::DiskOnly | IfSlow::Fail => self.bytes,
        }
    }
}

/// What a memory file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryFile {
    /// There is none.
    Absent,
    /// It is not complete.
    Part,
    /// It is.
    Whole,
}

fn open(path: &Path) -> std::io::Result<std::fs::File> {
    looked("open")?;
    std::fs::File::open(path)
}

/// Looks at a memory file. Blocks.
///
/// # Errors
/// When it cannot be read.
pub fn look(path: &Path) -> std::io::Result<MemoryFile> {
    let mut magic = [0; 16];
    let mut file = match open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(MemoryFile::Absent),
        file => file?,
    };
    match file.read_exact(&mut magic) {
        Ok(()) if &magic == WHOLE => Ok(MemoryFile::Whole),
        Ok(()) => Ok(MemoryFile::Part),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(MemoryFile::Part),
        Err(e) => Err(e),
    }
}

/// What the header of a memory image tells of its form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Form {
    /// The header's version.
    pub version: u32,
    /// How the stream is written.
    pub compression: String,
}

/// Reads the form of a whole image: version and compression stand in the byte order of the host that wrote it.
#[must_use]
pub fn form(header: &[u8; 32]) -> Form {
    let field = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&header[at..at + 4]);
        u32::from_ne_bytes(bytes)
    };
    let compression = match field(28) {
        0 => "raw",
        1 => "gzip",
        2 => "bzip2",
        3 => "xz",
        4 => "lzop",
        5 => "zstd",
        _ => "unknown",
    };
    Form { version: field(16), compression: compression.to_owned() }
}

/// Looks at a memory file and makes it durable, with its name, if it is whole. libvirt syncs what QEMU writes, but
/// neither the header that it changes afterwards nor the folder. Blocks.
///
/// # Errors
/// When it cannot be read or synced.
pub fn settle(path: &Path) -> std::io::Result<MemoryFile> {
    let found = look(path)?;
    if found == MemoryFile::Whole {
        blocking::sync(&std::fs::File::open(path)?)?;
        if let Some(folder) = path.parent() {
            std::fs::File::open(folder)?.sync_all()?;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_header_makes_a_whole_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        assert_eq!(look(&path).unwrap(), MemoryFile::Absent);
        for (bytes, expected) in [
            (&b""[..], MemoryFile::Part),
            (b"LibvirtQemudSav", MemoryFile::Part),
            (b"LibvirtQemudPart and more", MemoryFile::Part),
            (b"something else entirely", MemoryFile::Part),
            (b"LibvirtQemudSave", MemoryFile::Whole),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(look(&path).unwrap(), expected);
        }
    }

    #[test]
    fn the_form_is_read_from_the_header() {
        let mut header = [0; 32];
        header[..16].copy_from_slice(WHOLE);
        header[16..20].copy_from_slice(&2_u32.to_ne_bytes());
        header[28..32].copy_from_slice(&0_u32.to_ne_bytes());
        assert_eq!(form(&header), Form { version: 2, compression: "raw".to_owned() });
    }

    #[test]
    fn a_paused_guest_adds_its_memory_at_most_once() {
        let limits = MemoryLimits::for_memory(1 << 30, IfSlow::Pause);
        assert_eq!(limits.worst(1 << 30), limits.bytes + (1 << 30));
        assert_eq!(MemoryLimits { if_slow: IfSlow::Fail, ..limits }.worst(1 << 30), limits.bytes);
    }
}

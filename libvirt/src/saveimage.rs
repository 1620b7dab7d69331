//! The file in which libvirt keeps a saved guest, read and copied with another definition.
//!
//! A save file and the memory file of an external snapshot have one format (libvirt's
//! `qemu_saveimage.h`; seen in both): a header of 92 bytes in the byte order of the host,
//!
//! | bytes | what |
//! |---|---|
//! | 0–15 | `LibvirtQemudSave`; `LibvirtQemudPart` while it is being written |
//! | 16–19 | version, 2 |
//! | 20–23 | length of the area that follows the header |
//! | 24–27 | whether the guest ran |
//! | 28–31 | format of the stream: raw, gzip, bzip2, xz, lzop, zstd, sparse |
//! | 32–35 | where in the area the cookie begins; 0 for no cookie |
//! | 36–91 | unused, zero |
//!
//! then the area: the definition as text, its NUL, the cookie (what libvirt must know to restore that
//! the definition does not say) as text, its NUL, zeros; then QEMU's migration stream.
//!
//! libvirt itself refuses to restore a state under another name or UUID, or to replace the definition
//! by such a one. Doing it in a *copy* of the file works.
//!
//! Invariants:
//! - a file is read only if every field has a value this module knows; anything else is a typed
//!   refusal, since a stream behind a misread header would be given to a guest as its memory;
//! - the source is never written; the copy is complete and durable, folder included, when
//!   [`copy_with_xml`] returns, and does not exist when it failed. Until the last moment it bears the
//!   magic of an incomplete file, so a torn copy cannot be taken for a whole one;
//! - the stream is copied unchanged. Where the new definition fits into the old area the stream stays
//!   at its offset; a sparse stream, which holds offsets of its own file, is refused otherwise.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 16] = b"LibvirtQemudSave";
const MAGIC_PARTIAL: &[u8; 16] = b"LibvirtQemudPart";
const VERSION: u32 = 2;
/// The length of the header in bytes.
pub const HEADER_LEN: u64 = 92;
/// What libvirt leaves free for a definition that grows.
const ROOM: usize = 64 * 1024;
/// More than any definition with cookie; guards against reading gigabytes because of a broken header.
const MAX_AREA: u32 = 64 << 20;

/// Why a save image is refused or could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum SaveImageError {
    /// Reading or writing failed.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Not a save image.
    #[error("{} is not a save image of libvirt's", path.display())]
    NotASaveImage {
        /// The file.
        path: PathBuf,
    },
    /// The save did not finish.
    #[error("{} is incomplete: the save did not finish", path.display())]
    Incomplete {
        /// The file.
        path: PathBuf,
    },
    /// A version this module does not know, possibly of a host with another byte order.
    #[error("{} has format version {version}, only {VERSION} is known", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A stream format this module does not know.
    #[error("{} has stream format {format}, which is not known", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// The header contradicts itself or the file.
    #[error("the header of {} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In what way.
        reason: &'static str,
    },
    /// The new definition does not fit, and the stream cannot be moved.
    #[error("the new definition needs {need} bytes, {} has room for {room}, and its stream cannot be moved", path.display())]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        room: usize,
    },
    /// The new definition contains a NUL byte.
    #[error("the new definition contains a NUL byte")]
    Nul,
}

/// How the stream is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamFormat {
    /// As QEMU sends it.
    Raw,
    /// Through gzip.
    Gzip,
    /// Through bzip2.
    Bzip2,
    /// Through xz.
    Xz,
    /// Through lzop.
    Lzop,
    /// Through zstd.
    Zstd,
    /// Pages at fixed offsets of the file (QEMU's mapped-ram).
    Sparse,
}

impl StreamFormat {
    fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            0 => Self::Raw,
            1 => Self::Gzip,
            2 => Self::Bzip2,
            3 => Self::Xz,
            4 => Self::Lzop,
            5 => Self::Zstd,
            6 => Self::Sparse,
            _ => return None,
        })
    }

    /// Whether the stream may lie at another offset than the one it was written at.
    fn is_movable(self) -> bool {
        self != Self::Sparse
    }
}

/// What stands before the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveImage {
    /// Whether the guest ran when it was saved.
    pub was_running: bool,
    /// How the stream is written.
    pub format: StreamFormat,
    /// The definition.
    pub xml: String,
    /// libvirt's cookie.
    pub cookie: Option<String>,
    /// Length of the area between header and stream.
    pub area_len: u32,
    /// Length of the stream.
    pub stream_len: u64,
}

impl SaveImage {
    /// Where the stream begins.
    pub fn stream_offset(&self) -> u64 {
        HEADER_LEN + u64::from(self.area_len)
    }
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SaveImageError {
    let path = path.to_path_buf();
    move |source| SaveImageError::Io { doing, path, source }
}

/// Reads and checks what stands before the stream.
///
/// # Errors
/// Every variant of [`SaveImageError`] that is about reading.
pub fn read(path: &Path) -> Result<SaveImage, SaveImageError> {
    let mut file = File::open(path).map_err(io_error("opening", path))?;
    read_from(&mut file, path)
}

fn read_from(file: &mut File, path: &Path) -> Result<SaveImage, SaveImageError> {
    let at = || path.to_path_buf();
    let damaged = |reason| SaveImageError::Damaged { path: path.to_path_buf(), reason };
    let file_len = file.metadata().map_err(io_error("looking at", path))?.len();
    if file_len < HEADER_LEN {
        return Err(SaveImageError::NotASaveImage { path: at() });
    }
    let mut header = [0_u8; HEADER_LEN as usize];
    file.seek(SeekFrom::Start(0)).map_err(io_error("reading", path))?;
    file.read_exact(&mut header).map_err(io_error("reading", path))?;
    if header.starts_with(MAGIC_PARTIAL) {
        return Err(SaveImageError::Incomplete { path: at() });
    }
    if !header.starts_with(MAGIC) {
        return Err(SaveImageError::NotASaveImage { path: at() });
    }
    let [version, area_len, was_running, format, cookie_offset] = fields(&header);
    if version != VERSION {
        return Err(SaveImageError::Version { path: at(), version });
    }
    let format = StreamFormat::from_raw(format).ok_or(SaveImageError::Format { path: at(), format })?;
    if was_running > 1 {
        return Err(damaged("the run state is neither 0 nor 1"));
    }
    if header[36..].iter().any(|b| *b != 0) {
        return Err(damaged("fields that should be unused are in use"));
    }
    if area_len == 0 || area_len > MAX_AREA || HEADER_LEN + u64::from(area_len) > file_len {
        return Err(damaged("the area with the definition does not fit the file"));
    }
    if cookie_offset >= area_len {
        return Err(damaged("the cookie lies outside its area"));
    }
    let mut area = vec![0_u8; area_len as usize];
    file.read_exact(&mut area).map_err(io_error("reading", path))?;
    let (xml_part, cookie_part) = match cookie_offset {
        0 => (area.as_slice(), None),
        n => {
            let (xml, cookie) = area.split_at(n as usize);
            (xml, Some(cookie))
        }
    };
    let text = |part: &[u8]| {
        let end = part.iter().position(|b| *b == 0)?;
        String::from_utf8(part[..end].to_vec()).ok()
    };
    let xml = text(xml_part).ok_or_else(|| damaged("the definition is not a text with an end"))?;
    let cookie = cookie_part
        .map(|c| text(c).ok_or_else(|| damaged("the cookie is not a text with an end")))
        .transpose()?;
    if xml.is_empty() {
        return Err(damaged("there is no definition"));
    }
    let stream_len = file_len - HEADER_LEN - u64::from(area_len);
    if stream_len == 0 {
        return Err(damaged("there is no stream"));
    }
    Ok(SaveImage { was_running: was_running == 1, format, xml, cookie, area_len, stream_len })
}

fn fields(header: &[u8; HEADER_LEN as usize]) -> [u32; 5] {
    let mut out = [0_u32; 5];
    for (field, bytes) in out.iter_mut().zip(header[16..36].chunks_exact(4)) {
        let mut four = [0_u8; 4];
        four.copy_from_slice(bytes);
        *field = u32::from_ne_bytes(four);
    }
    out
}

fn header_and_area(image: &SaveImage, xml: &str, path: &Path) -> Result<(Vec<u8>, u32), SaveImageError> {
    if xml.contains('\0') {
        return Err(SaveImageError::Nul);
    }
    let cookie = image.cookie.as_deref();
    let xml_len = xml.len() + 1;
    let need = xml_len + cookie.map_or(0, |c| c.len() + 1);
    let area_len = if need <= image.area_len as usize {
        image.area_len
    } else {
        let grown = u32::try_from(need + ROOM).ok().filter(|n| *n <= MAX_AREA);
        grown.filter(|_| image.format.is_movable()).ok_or(SaveImageError::NoRoom {
            path: path.to_path_buf(),
            need,
            room: image.area_len as usize,
        })?
    };
    let cookie_offset = cookie.map_or(0, |_| xml_len);
    let fields = [
        VERSION,
        area_len,
        u32::from(image.was_running),
        image.format as u32,
        u32::try_from(cookie_offset).unwrap_or(0),
    ];
    let total = HEADER_LEN as usize + area_len as usize;
    let mut out = Vec::with_capacity(total);
    out.extend_from_slice(MAGIC_PARTIAL);
    for field in fields {
        out.extend_from_slice(&field.to_ne_bytes());
    }
    out.resize(HEADER_LEN as usize, 0);
    out.extend_from_slice(xml.as_bytes());
    out.push(0);
    if let Some(cookie) = cookie {
        out.extend_from_slice(cookie.as_bytes());
        out.push(0);
    }
    out.resize(total, 0);
    Ok((out, area_len))
}

/// The bytes that must replace the beginning of a copy of a save image so that it holds another definition. They end
/// where the stream begins, which stays where it is; cookie and run state stay as well.
///
/// # Errors
/// [`SaveImageError::NoRoom`] when the definition does not fit before the stream.
pub fn head_with_xml(path: &Path, xml: &str) -> Result<Vec<u8>, SaveImageError> {
    let image = read(path)?;
    let (mut head, area_len) = header_and_area(&image, xml, path)?;
    if area_len != image.area_len {
        let need = xml.len() + 1 + image.cookie.as_deref().map_or(0, |c| c.len() + 1);
        return Err(SaveImageError::NoRoom { path: path.to_path_buf(), need, room: image.area_len as usize });
    }
    head[..MAGIC.len()].copy_from_slice(MAGIC);
    Ok(head)
}

/// Copies a save image to a new file, with another definition in it. The cookie, the run state and the
/// stream stay. Returns what stands before the stream of the copy.
///
/// # Errors
/// `AlreadyExists` inside [`SaveImageError::Io`] when the target exists; it is then left alone. After
/// any other error there is no target.
pub fn copy_with_xml(from: &Path, to: &Path, xml: &str) -> Result<SaveImage, SaveImageError> {
    let mut source = File::open(from).map_err(io_error("opening", from))?;
    let image = read_from(&mut source, from)?;
    let (head, area_len) = header_and_area(&image, xml, from)?;
    let mut target = OpenOptions::new()
        .write(true)
        .read(true)
        .create_new(true)
        .open(to)
        .map_err(io_error("making", to))?;
    let copied = (|| {
        target.write_all(&head).map_err(io_error("writing", to))?;
        source.seek(SeekFrom::Start(image.stream_offset())).map_err(io_error("reading", from))?;
        // The standard library copies between files inside the kernel where it can.
        let n = io::copy(&mut (&mut source).take(image.stream_len), &mut target)
            .map_err(io_error("copying the stream to", to))?;
        if n != image.stream_len {
            return Err(SaveImageError::Damaged {
                path: from.to_path_buf(),
                reason: "it shrank while it was read",
            });
        }
        target.sync_all().map_err(io_error("syncing", to))?;
        // Only now that all else is durable does it become a whole image.
        target.seek(SeekFrom::Start(0)).map_err(io_error("writing", to))?;
        target.write_all(MAGIC).map_err(io_error("writing", to))?;
        target.sync_all().map_err(io_error("syncing", to))?;
        sync_folder_of(to)?;
        let copy = read_from(&mut target, to)?;
        let expected = SaveImage { xml: xml.to_owned(), area_len, ..image };
        if copy != expected {
            return Err(SaveImageError::Damaged {
                path: to.to_path_buf(),
                reason: "the copy reads back differently",
            });
        }
        Ok(copy)
    })();
    if copied.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(to);
    }
    copied
}

fn sync_folder_of(path: &Path) -> Result<(), SaveImageError> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|f| f.sync_all()).map_err(io_error("syncing the folder", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='qemu'>\n  <name>t</name>\n</domain>\n";

    struct Made {
        folder: tempfile::TempDir,
    }

    impl Made {
        /// An image as libvirt writes it, with `change` applied to its bytes.
        fn new(cookie: Option<&str>, format: u32, change: impl FnOnce(&mut Vec<u8>)) -> (Self, PathBuf) {
            let mut b = MAGIC.to_vec();
            let used = XML.len() + 1 + cookie.map_or(0, |c| c.len() + 1);
            let area = used + 100;
            let cookie_at = cookie.map_or(0, |_| XML.len() + 1);
            for field in [2, area as u32, 1, format, cookie_at as u32] {
                b.extend_from_slice(&field.to_ne_bytes());
            }
            b.resize(92, 0);
            b.extend_from_slice(XML.as_bytes());
            b.push(0);
            if let Some(c) = cookie {
                b.extend_from_slice(c.as_bytes());
                b.push(0);
            }
            b.resize(92 + area, 0);
            b.extend((0..200_000_u32).flat_map(|i| i.to_le_bytes()));
            change(&mut b);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("state");
            std::fs::write(&path, b).unwrap();
            (Self { folder }, path)
        }

        fn target(&self) -> PathBuf {
            self.folder.path().join("copy")
        }
    }

    fn stream(path: &Path) -> Vec<u8> {
        let image = read(path).unwrap();
        std::fs::read(path).unwrap()[image.stream_offset() as usize..].to_vec()
    }

    #[test]
    fn an_image_is_read_with_and_without_a_cookie() {
        let (_keep, path) = Made::new(Some("<cookie/>"), 0, |_| {});
        let image = read(&path).unwrap();
        assert_eq!((image.xml.as_str(), image.cookie.as_deref()), (XML, Some("<cookie/>")));
        assert_eq!((image.was_running, image.format, image.stream_len), (true, StreamFormat::Raw, 800_000));
        let (_keep, path) = Made::new(None, 5, |_| {});
        let image = read(&path).unwrap();
        assert_eq!((image.cookie, image.format), (None, StreamFormat::Zstd));
    }

    #[test]
    fn a_copy_has_the_new_definition_and_the_same_stream_and_leaves_the_source_alone() {
        let (made, path) = Made::new(Some("<cookie/>"), 0, |_| {});
        let before = std::fs::read(&path).unwrap();
        let new = XML.replace("<name>t</name>", "<name>another name</name>");
        let copy = copy_with_xml(&path, &made.target(), &new).unwrap();
        assert_eq!(copy, read(&made.target()).unwrap());
        assert_eq!((copy.xml, copy.cookie.as_deref(), copy.was_running), (new, Some("<cookie/>"), true));
        assert_eq!(copy.area_len, read(&path).unwrap().area_len, "where it fits the stream keeps its offset");
        assert_eq!(stream(&made.target()), stream(&path));
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_definition_that_has_outgrown_its_area_moves_the_stream() {
        let (made, path) = Made::new(Some("<cookie/>"), 0, |_| {});
        let new = format!("{XML}<!--{}-->", "x".repeat(5000));
        let copy = copy_with_xml(&path, &made.target(), &new).unwrap();
        assert!(copy.area_len > read(&path).unwrap().area_len);
        assert_eq!((copy.xml, copy.cookie.as_deref()), (new, Some("<cookie/>")));
        assert_eq!(stream(&made.target()), stream(&path));
    }

    #[test]
    fn a_sparse_stream_is_never_moved() {
        let (made, path) = Made::new(None, 6, |_| {});
        let small = copy_with_xml(&path, &made.target(), "<domain/>").unwrap();
        assert_eq!(small.format, StreamFormat::Sparse);
        std::fs::remove_file(made.target()).unwrap();
        let big = "x".repeat(5000);
        assert!(matches!(copy_with_xml(&path, &made.target(), &big), Err(SaveImageError::NoRoom { .. })));
        assert!(!made.target().exists());
    }

    #[test]
    fn what_is_not_known_is_refused_by_its_own_name() {
        let set = |at: usize, value: u32| {
            move |b: &mut Vec<u8>| b[at..at + 4].copy_from_slice(&value.to_ne_bytes())
        };
        let fault = |change: &dyn Fn(&mut Vec<u8>)| {
            let (_keep, path) = Made::new(Some("<cookie/>"), 0, |b| change(b));
            read(&path).unwrap_err()
        };
        assert!(matches!(fault(&set(16, 3)), SaveImageError::Version { version: 3, .. }));
        assert!(matches!(fault(&set(16, 1)), SaveImageError::Version { version: 1, .. }));
        assert!(matches!(fault(&set(16, 2_u32.swap_bytes())), SaveImageError::Version { .. }));
        assert!(matches!(fault(&set(28, 7)), SaveImageError::Format { format: 7, .. }));
        assert!(matches!(
            fault(&|b| b[..16].copy_from_slice(MAGIC_PARTIAL)),
            SaveImageError::Incomplete { .. }
        ));
        assert!(matches!(fault(&|b| b[0] = b'l'), SaveImageError::NotASaveImage { .. }));
        assert!(matches!(fault(&|b| b.truncate(50)), SaveImageError::NotASaveImage { .. }));
        for damage in [
            &set(20, 0) as &dyn Fn(&mut Vec<u8>),
            &set(20, u32::MAX),
            &set(24, 2),
            &set(32, 1 << 20),
            &set(36, 1),
            &|b| b.truncate(100),
            &|b| b[92..].fill(b'x'),
            &|b| b[100] = 0xff,
        ] {
            assert!(matches!(fault(damage), SaveImageError::Damaged { .. }));
        }
    }

    #[test]
    fn a_head_with_another_definition_fits_exactly_before_the_stream() {
        let (_keep, path) = Made::new(Some("<cookie/>"), 0, |_| {});
        let other = "<domain type='qemu'>\n  <name>another, longer name</name>\n</domain>\n";
        let head = head_with_xml(&path, other).unwrap();
        let before = read(&path).unwrap();
        assert_eq!(head.len() as u64, before.stream_offset());
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, [head.as_slice(), &bytes[head.len()..]].concat()).unwrap();
        assert_eq!(read(&path).unwrap(), SaveImage { xml: other.to_owned(), ..before });
        let long = "x".repeat(1000);
        assert!(matches!(head_with_xml(&path, &long), Err(SaveImageError::NoRoom { .. })));
    }

    #[test]
    fn an_existing_target_is_left_alone_and_a_failed_copy_leaves_none() {
        let (made, path) = Made::new(None, 0, |_| {});
        std::fs::write(made.target(), "mine").unwrap();
        assert!(matches!(copy_with_xml(&path, &made.target(), XML), Err(SaveImageError::Io { .. })));
        assert_eq!(std::fs::read(made.target()).unwrap(), b"mine");
        std::fs::remove_file(made.target()).unwrap();
        assert!(matches!(copy_with_xml(&path, &made.target(), "a\0b"), Err(SaveImageError::Nul)));
        assert!(!made.target().exists());
    }
}

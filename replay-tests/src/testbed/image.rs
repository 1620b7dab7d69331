//! Disk images: made, measured, compared and searched with `qemu-img` and `qemu-io`.

use super::{
    MIB,
    command::{line_of, run},
    error::{Error, IoContext, Result},
    hypervisor::Hypervisor,
};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs,
    io::{BufWriter, Read, Write},
    path::{Path, PathBuf},
    process::Command,
};

/// Format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// qcow2, version 3.
    Qcow2,
    /// Plain bytes.
    Raw,
}

impl Format {
    /// As QEMU and libvirt spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }

    /// What the image says about itself.
    pub fn probe(image: &Path) -> Result<Self> {
        let mut magic = [0; 4];
        let mut file = fs::File::open(image).doing("open", image)?;
        Ok(if file.read_exact(&mut magic).is_ok() && &magic == b"QFI\xfb" { Self::Qcow2 } else { Self::Raw })
    }
}

/// What `qemu-img info` tells.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// `qcow2`, `raw`, …
    pub format: String,
    /// Size that a guest sees, in bytes.
    pub virtual_size: u64,
    /// Bytes on the host's disk.
    #[serde(default)]
    pub actual_size: u64,
    /// Backing file as the image names it.
    pub backing_filename: Option<PathBuf>,
    /// The backing file's resolved path.
    pub full_backing_filename: Option<PathBuf>,
    /// All that is there, for what is not named above.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, serde_json::Value>,
}

/// Asks `qemu-img info`, also of an image in use.
pub fn image_info(image: &Path) -> Result<ImageInfo> {
    let text = run(Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(image))?;
    serde_json::from_str(&text).map_err(|e| Error::Unclear {
        what: format!("qemu-img info of {}", image.display()),
        answer: e.to_string(),
    })
}

/// Whether two images have the same size for a guest and the same content, byte for byte. `Err(text)` inside
/// tells the difference. (`qemu-img compare` alone calls images equal that differ by zeros at their end.)
pub fn images_equal(a: &Path, b: &Path) -> Result<std::result::Result<(), String>> {
    let (info_a, info_b) = (image_info(a)?, image_info(b)?);
    if info_a.virtual_size != info_b.virtual_size {
        return Ok(Err(format!("{} and {} bytes", info_a.virtual_size, info_b.virtual_size)));
    }
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-U", "-f", &info_a.format, "-F", &info_b.format]).args([a, b]);
    let output =
        command.output().map_err(|source| Error::Spawn { program: "qemu-img compare".to_owned(), source })?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(Ok(())),
        Some(1) => Ok(Err(text)),
        _ => Err(Error::Command {
            command: line_of(&command),
            status: output.status.to_string(),
            output: text,
        }),
    }
}

/// All files below a folder, with their paths relative to it.
pub fn files_in(dir: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).doing("read", &folder)?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                folders.push(entry.path());
            } else if let Ok(inside) = entry.path().strip_prefix(dir) {
                found.insert(inside.to_owned());
            }
        }
    }
    Ok(found)
}

/// Reads `mebibytes` MiB of what a guest would see, from MiB `skip` on (less at the image's end).
pub(crate) fn read_guest_bytes(image: &Path, format: Format, skip: u64, mebibytes: u64) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().doing("make a folder in", std::env::temp_dir())?;
    let raw = folder.path().join("raw");
    let mut command = Command::new("qemu-img");
    command.args(["dd", "-U", "-f", format.name(), "-O", "raw", "bs=1M"]);
    // `count` is counted from the image's beginning, not from `skip`.
    command.args([format!("skip={skip}"), format!("count={}", skip + mebibytes)]);
    // qemu-img splits at the first "=" only: any path may follow.
    command.arg(concat("if=", image)).arg(concat("of=", &raw));
    run(&mut command)?;
    fs::read(&raw).doing("read", raw)
}

fn concat(prefix: &str, path: &Path) -> std::ffi::OsString {
    let mut text = std::ffi::OsString::from(prefix);
    text.push(path);
    text
}

/// splitmix64, as in the guest.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What the guest's `fill DISK OFFSET LENGTH SEED` writes at `offset` (a multiple of 512).
pub(crate) fn pattern(buffer: &mut [u8], offset: u64, seed: u64) {
    for (sector, at) in buffer.chunks_mut(512).zip((offset / 512)..) {
        let mut state = mix(seed ^ mix(at));
        for word in sector.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
}

/// Whether an image holds what `fill … OFFSET LENGTH SEED` wrote; else the offset of the first sector that
/// differs. `offset` and `length` are whole MiB.
pub fn pattern_on(image: &Path, format: Format, offset: u64, length: u64, seed: u64) -> Result<Option<u64>> {
    let bytes = read_guest_bytes(image, format, offset / MIB, length / MIB)?;
    let mut want = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    pattern(&mut want, offset, seed);
    let differs = want.chunks(512).zip(bytes.chunks(512)).position(|(want, is)| want != is);
    let short = (bytes.len() < want.len()).then_some(bytes.len() / 512);
    Ok(differs.or(short).map(|sector| offset + sector as u64 * 512))
}

/// Makes an empty image, over a backing file if one is given.
pub(crate) fn create(
    hypervisor: &Hypervisor,
    path: &Path,
    format: Format,
    size: u64,
    backing: Option<(&Path, Format)>,
) -> Result<()> {
    let mut command = hypervisor.command("qemu-img");
    command.args(["create", "-q", "-f", format.name()]);
    if let Some((file, format)) = backing {
        command.arg("-b").arg(file).args(["-F", format.name()]);
    }
    run(command.arg(path).arg(size.to_string())).map(drop)
}

/// Writes the pattern of `seed` into `length` bytes from `offset` on of a raw file of `size` bytes.
pub(crate) fn write_raw(path: &Path, size: u64, offset: u64, length: u64, seed: u64) -> Result<()> {
    let file = fs::File::create(path).doing("create", path)?;
    file.set_len(size).doing("extend", path)?;
    write_pattern(file, path, offset, length, seed)
}

/// The same on a block device.
pub(crate) fn write_device(path: &Path, offset: u64, length: u64, seed: u64) -> Result<()> {
    let device = fs::File::options().write(true).open(path).doing("open", path)?;
    write_pattern(device, path, offset, length, seed)
}

fn write_pattern(file: fs::File, path: &Path, offset: u64, length: u64, seed: u64) -> Result<()> {
    let mut out = BufWriter::new(file);
    std::io::Seek::seek(&mut out, std::io::SeekFrom::Start(offset)).doing("seek in", path)?;
    let mut buffer = vec![0; MIB as usize];
    for done in (0..length).step_by(MIB as usize) {
        let chunk = &mut buffer[..usize::try_from(MIB.min(length - done)).unwrap_or_default()];
        pattern(chunk, offset + done, seed);
        out.write_all(chunk).doing("write", path)?;
    }
    out.flush().doing("write", path)
}

/// Copies a raw file into an image of the given format and gives it to the hypervisor's user.
pub(crate) fn import_raw(hypervisor: &Hypervisor, raw: &Path, image: &Path, format: Format) -> Result<()> {
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", format.name()]).args([raw, image]))?;
    hypervisor.give_to_user(image, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_that_differ_only_by_zeros_at_the_end_are_not_equal() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        write_raw(&a, 2 * MIB, 0, MIB, 7).unwrap();
        write_raw(&b, 3 * MIB, 0, MIB, 7).unwrap();
        assert!(images_equal(&a, &b).unwrap().is_err());
        fs::File::options().write(true).open(&b).unwrap().set_len(2 * MIB).unwrap();
        assert_eq!(images_equal(&a, &b).unwrap(), Ok(()));
        write_raw(&b, 2 * MIB, 0, MIB, 8).unwrap();
        assert!(images_equal(&a, &b).unwrap().is_err());
    }

    #[test]
    fn a_pattern_is_found_and_a_changed_sector_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("with space = and equals");
        write_raw(&path, 4 * MIB, MIB, 2 * MIB, 7).unwrap();
        assert_eq!(pattern_on(&path, Format::Raw, MIB, 2 * MIB, 7).unwrap(), None);
        assert_eq!(pattern_on(&path, Format::Raw, MIB, 2 * MIB, 8).unwrap(), Some(MIB));
        let file = fs::File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 2 * MIB + 513).unwrap();
        assert_eq!(pattern_on(&path, Format::Raw, MIB, 2 * MIB, 7).unwrap(), Some(2 * MIB + 512));
    }
}

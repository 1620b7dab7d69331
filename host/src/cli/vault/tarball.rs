//! A backup as one tarball: its disks raw, its streams, and the definition.
//!
//! Chunks come in the order of packs and not of the disk, so nothing could be streamed; and nothing needs to be: the sizes of all
//! members are known beforehand, hence their places. The file is made as long as it is to be, the headers are written, and each
//! image goes to its place. What is zero stays a hole *of the tarball's file*; for whoever reads the file a member is whole.
//! (The crates for tarballs write from beginning to end. What is left of the format is one header of 512 bytes: POSIX ustar,
//! with GNU's binary sizes from 8 GiB on, which GNU tar, BSD tar and Python read.)

use std::io::{Error, Result as IoResult};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use vmkeep_steps::vaults::onto::Onto;
use vmkeep_steps::vaults::read_back::root_within;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::read::{Sink, read_image};
use vmkeep_workflow::Fault;

use super::export::{Exported, Source, Wanted, folder, place_fault, root_error};
use super::one::{Aside, From, read_fault, split};
use crate::cli::offline::differs;
use crate::codes;

const BLOCK: u64 = 512;
/// What octal digits can say.
const OCTAL: u64 = 1 << 33;

/// A part of a file that held nothing before.
struct Window {
    file: Onto,
    start: u64,
}

#[async_trait]
impl Sink for Window {
    async fn write(&mut self, offset: u64, bytes: Bytes) -> IoResult<()> {
        self.file.write(self.start + offset, bytes).await
    }

    async fn zero(&mut self, _: u64, _: u64) -> IoResult<()> {
        // The file is new: nothing was written there.
        Ok(())
    }
}

fn size_of(wanted: &Wanted<'_>) -> u64 {
    match wanted.source {
        Source::Image { image, .. } => image.size,
        Source::Definition(text) => text.len() as u64,
    }
}

pub(super) async fn tarball(
    from: &From<'_>,
    wanted: &[Wanted<'_>],
    path: &Path,
    taken: Timestamp,
) -> Result<Vec<Exported>, Fault> {
    let (above, name) = split(path)?;
    let folder = folder(above)?;
    let failed = |error: Error| place_fault(&root_error("write", path.to_owned(), error));
    let aside = Aside::make(&folder)?;
    let places = lay_out(wanted.iter().map(size_of));
    // Two empty blocks end it.
    aside.file.set_len(places.last().map_or(0, |(_, end)| *end) + 2 * BLOCK).map_err(failed)?;
    let mut exported = Vec::new();
    for (one, (start, _)) in wanted.iter().zip(&places) {
        let size = size_of(one);
        let header = header(one.name.as_str(), size, taken).ok_or_else(|| {
            let cause = "its name is too long for a tarball";
            Fault::permanent(codes::UNSAFE_PATH, "write the tarball", one.name.to_string(), cause)
        })?;
        aside.file.write_all_at(&header, start - BLOCK).map_err(failed)?;
        let (what, written, root) = match one.source {
            Source::Definition(text) => {
                aside.file.write_all_at(text.as_bytes(), *start).map_err(failed)?;
                ("definition", size, None)
            }
            Source::Image { kind, image, .. } => {
                let mut window = Window { file: Onto::new(Arc::clone(&aside.file)), start: *start };
                let vault = &from.opened.vault;
                let read = read_image(vault, from.ids, from.fetcher, kind, image, &mut window, false);
                let report = Box::pin(read).await.map_err(|error| read_fault(from, path, &error))?;
                let found = Box::pin(root_within(from.ids, kind, &aside.file, *start, size)).await;
                let found = found.map_err(|error| read_fault(from, path, &error))?;
                if found != image.root {
                    return Err(differs(path, image.root, found));
                }
                let what = if kind == BlobType::Data { "disk" } else { "stream" };
                (what, report.written, Some(image.root.to_string()))
            }
        };
        exported.push(Exported { file: path.join(one.name.as_str()), what, size, written, root });
    }
    aside.file.sync_all().map_err(failed)?;
    let named = folder.rename(&aside.name, &name).and_then(|()| folder.sync());
    named.map_err(|error| place_fault(&error))?;
    Ok(exported)
}

/// Where each member's bytes begin, and where its blocks end; before each there is room for its header.
fn lay_out(sizes: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut at = 0;
    let place = |size: u64| {
        let start = at + BLOCK;
        at = start + size.div_ceil(BLOCK) * BLOCK;
        (start, at)
    };
    sizes.map(place).collect()
}

/// A member's header; nothing if its name is too long.
fn header(name: &str, size: u64, taken: Timestamp) -> Option<[u8; BLOCK as usize]> {
    let mut header = [0; BLOCK as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        header.get_mut(at..at + bytes.len()).map(|place| place.copy_from_slice(bytes))
    };
    put(0, Some(name.as_bytes()).filter(|name| name.len() < 100)?)?;
    put(100, b"0000600\0")?;
    put(108, b"0000000\0")?;
    put(116, b"0000000\0")?;
    if size < OCTAL {
        put(124, format!("{size:011o}\0").as_bytes())?;
    } else {
        // The first bit says that it is a number of 95 bits.
        put(124, &[0x80, 0, 0, 0])?;
        put(128, &size.to_be_bytes())?;
    }
    let seconds = u64::try_from(taken.as_second()).unwrap_or(0).min(OCTAL - 1);
    put(136, format!("{seconds:011o}\0").as_bytes())?;
    // The sum is taken with spaces in its own place.
    put(148, b"        ")?;
    put(156, b"0")?;
    put(257, b"ustar\x0000")?;
    put(265, b"root")?;
    put(297, b"root")?;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header.get_mut(148..156)?.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `tar` lists of an archive with one member of this size, of which nothing but the header is there.
    fn listed(size: u64) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        let places = lay_out(std::iter::once(size));
        file.as_file().set_len(places[0].1 + 2 * BLOCK).unwrap();
        let taken = "2024-02-29T12:00:00Z".parse().unwrap();
        file.as_file().write_all_at(&header("vda.raw", size, taken).unwrap(), 0).unwrap();
        let tar =
            std::process::Command::new("tar").args(["--utc", "-tvf"]).arg(file.path()).output().unwrap();
        assert!(tar.status.success(), "{tar:?}");
        String::from_utf8(tar.stdout).unwrap()
    }

    #[test]
    fn tar_reads_the_sizes_and_times_of_members_small_and_larger_than_octal_digits_can_say() {
        for size in [0, 1, BLOCK, 5 << 30, OCTAL - 1, OCTAL, 3 << 40] {
            let listed = listed(size);
            let words: Vec<&str> = listed.split_whitespace().collect();
            let wanted = ["-rw-------", "root/root", &size.to_string(), "2024-02-29", "12:00", "vda.raw"];
            assert_eq!(words, wanted, "{size}");
        }
        assert!(header(&"x".repeat(100), 1, Timestamp::UNIX_EPOCH).is_none());
    }
}

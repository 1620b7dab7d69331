//! Real image files, as small as can be: raw ones, and qcow2 of the plainest kind, which `qemu-img check` finds in order.
//!
//! Clusters of 4 KiB: header, first-level table (one entry), table and block of reference counts, then second-level table
//! and data as they come. A disk is at most 2 MiB.

use std::borrow::Borrow;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::SystemTime;

use crate::hypervisor::Layer;

pub(super) const CLUSTER: u64 = 4096;
const L1: u64 = CLUSTER;
const BLOCK: u64 = 3 * CLUSTER;
const FIRST_FREE: u64 = 4;
/// Set in a table's entry: the cluster belongs to this image alone.
const COPIED: u64 = 1 << 63;
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

fn be64(file: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    match file.read_exact_at(&mut bytes, at) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        done => done.map(|()| u64::from_be_bytes(bytes)),
    }
}

/// Makes an image: raw, or qcow2 on a backing image or none.
pub(super) fn create(path: &Path, format: &str, size: u64, backing: Option<&Layer>) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    if format == "raw" {
        return file.set_len(size);
    }
    let mut header = vec![0_u8; 112];
    header[..4].copy_from_slice(b"QFI\xfb");
    let put32 =
        |header: &mut Vec<u8>, at: usize, n: u32| header[at..at + 4].copy_from_slice(&n.to_be_bytes());
    let put64 =
        |header: &mut Vec<u8>, at: usize, n: u64| header[at..at + 8].copy_from_slice(&n.to_be_bytes());
    put32(&mut header, 4, 3);
    put32(&mut header, 20, 12);
    put64(&mut header, 24, size);
    put32(&mut header, 36, 1);
    put64(&mut header, 40, L1);
    put64(&mut header, 48, 2 * CLUSTER);
    put32(&mut header, 56, 1);
    put32(&mut header, 96, 4);
    put32(&mut header, 100, 112);
    if let Some(below) = backing {
        let name = below.path.as_os_str().as_encoded_bytes();
        header.extend_from_slice(&0xE279_2ACA_u32.to_be_bytes());
        header.extend_from_slice(&u32::try_from(below.format.len()).unwrap_or(0).to_be_bytes());
        header.extend_from_slice(below.format.as_bytes());
        header.resize(header.len().next_multiple_of(8) + 8, 0);
        let at = header.len() as u64;
        put64(&mut header, 8, at);
        put32(&mut header, 16, u32::try_from(name.len()).unwrap_or(0));
        header.extend_from_slice(name);
    }
    file.write_all_at(&header, 0)?;
    file.write_all_at(&BLOCK.to_be_bytes(), 2 * CLUSTER)?;
    file.write_all_at(&1_u16.to_be_bytes().repeat(FIRST_FREE as usize), BLOCK)?;
    file.set_len(FIRST_FREE * CLUSTER)
}

/// Takes a new cluster at the end.
fn allocate(file: &File) -> io::Result<u64> {
    let at = file.metadata()?.len().next_multiple_of(CLUSTER);
    file.set_len(at + CLUSTER)?;
    file.write_all_at(&1_u16.to_be_bytes(), BLOCK + at / CLUSTER * 2)?;
    Ok(at)
}

/// Where the second-level table of a qcow2 file lies, if it has one.
fn table(file: &File) -> io::Result<Option<u64>> {
    let at = be64(file, L1)? & PLACE;
    Ok((at != 0).then_some(at))
}

/// Where a cluster of the disk lies, by that table, if it does.
fn find(file: &File, table: u64, number: u64) -> io::Result<Option<u64>> {
    let at = be64(file, table + number * 8)? & PLACE;
    Ok((at != 0).then_some(at))
}

/// Reads a cluster of a disk through its chain, from the top down.
pub(super) fn read(chain: &[Layer], number: u64) -> io::Result<Vec<u8>> {
    for layer in chain {
        if let Some(bytes) = get(&File::open(&layer.path)?, &layer.format, number)? {
            return Ok(bytes);
        }
    }
    Ok(vec![0; CLUSTER as usize])
}

/// The same through files that are open, in the order of the chain.
pub(super) fn read_open(chain: &[Layer], files: &[impl Borrow<File>], number: u64) -> io::Result<Vec<u8>> {
    for (layer, file) in chain.iter().zip(files) {
        if let Some(bytes) = get(file.borrow(), &layer.format, number)? {
            return Ok(bytes);
        }
    }
    Ok(vec![0; CLUSTER as usize])
}

/// Reads a cluster of one image, if it has it.
fn get(file: &File, format: &str, number: u64) -> io::Result<Option<Vec<u8>>> {
    let at = match format {
        "raw" => Some(number * CLUSTER),
        _ => match table(file)? {
            Some(table) => find(file, table, number)?,
            None => None,
        },
    };
    let Some(at) = at else { return Ok(None) };
    let (mut bytes, mut done) = (vec![0; CLUSTER as usize], 0);
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(Some(bytes))
}

/// Writes a cluster to an image, which is younger afterwards by all appearances: `when` is later than any time before.
pub(super) fn write(top: &Layer, number: u64, bytes: &[u8], when: SystemTime) -> io::Result<()> {
    put(&open(&top.path)?, &top.format, number, bytes, when)
}

/// Opens an image for writing.
pub(super) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// See [`write`].
pub(super) fn put(file: &File, format: &str, number: u64, bytes: &[u8], when: SystemTime) -> io::Result<()> {
    place(file, format, number, bytes)?;
    file.set_modified(when)
}

fn place(file: &File, format: &str, number: u64, bytes: &[u8]) -> io::Result<()> {
    if format == "raw" {
        return file.write_all_at(bytes, number * CLUSTER);
    }
    let (table, found) = match table(file)? {
        Some(table) => (table, find(file, table, number)?),
        None => {
            let table = allocate(file)?;
            file.write_all_at(&(table | COPIED).to_be_bytes(), L1)?;
            (table, None)
        }
    };
    let at = match found {
        Some(at) => at,
        None => {
            let at = allocate(file)?;
            file.write_all_at(&(at | COPIED).to_be_bytes(), table + number * 8)?;
            at
        }
    };
    file.write_all_at(bytes, at)
}

/// Bytes of data in a qcow2 file.
pub(super) fn allocated(overlay: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(overlay)?.len().saturating_sub(FIRST_FREE * CLUSTER))
}

/// Writes what an overlay holds into the image under it; the clusters that were written.
pub(super) fn commit(overlay: &Path, base: &Layer, when: SystemTime) -> io::Result<Vec<u64>> {
    let file = File::open(overlay)?;
    let Some(table) = table(&file)? else { return Ok(Vec::new()) };
    let mut entries = vec![0; CLUSTER as usize];
    file.read_exact_at(&mut entries, table)?;
    let places = entries.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry) & PLACE);
    let held: Vec<_> = (0..).zip(places).filter(|(_, at)| *at != 0).collect();
    if held.is_empty() {
        return Ok(Vec::new());
    }
    let into = open(&base.path)?;
    let mut bytes = vec![0; CLUSTER as usize];
    for (number, at) in &held {
        file.read_exact_at(&mut bytes, *at)?;
        place(&into, &base.format, *number, &bytes)?;
    }
    into.set_modified(when)?;
    Ok(held.into_iter().map(|(number, _)| number).collect())
}

/// Lets an overlay forget all that it holds, as `qemu-img commit` does in the end.
pub(super) fn empty(overlay: &Path, when: SystemTime) -> io::Result<()> {
    let file = open(overlay)?;
    file.write_all_at(&0_u64.to_be_bytes(), L1)?;
    let clusters = file.metadata()?.len() / CLUSTER;
    let taken = usize::try_from(clusters.saturating_sub(FIRST_FREE)).unwrap_or(0);
    file.write_all_at(&vec![0; taken * 2], BLOCK + FIRST_FREE * 2)?;
    file.set_len(FIRST_FREE * CLUSTER)?;
    file.set_modified(when)
}

//! Backups for tests: real files, and the manifest that fits them.

use std::path::Path;

use super::file::publish;
use super::folder::{DEFINITION, MEMORY, fixed};
use super::*;
use crate::image::chain::{self, header_for, lay_out};
use crate::image::copy::{Options, SourceFile, Start, copy};
use crate::image::qcow2::Format;
use crate::image::qemu_img::QemuImg;
use crate::image::root::{Component, Folder};

pub(crate) fn c(name: &str) -> Component {
    Component::new(name).unwrap()
}

pub(crate) fn entry(folder: &Folder, name: &str, role: Role) -> FileEntry {
    let bytes = std::fs::read(folder.path().join(name)).unwrap();
    FileEntry {
        name: c(name),
        role,
        size: bytes.len() as u64,
        blake3: blake3::hash(&bytes).into(),
        source_blake3: None,
        format: None,
        virtual_size: None,
        backing: None,
        source: Some(format!("/var/lib/libvirt/images/{name}")),
        rights: None,
        unknown: Unknown::new(),
    }
}

/// Two disks (`vda`: qcow2 on a raw base; `vdb`: raw), a definition and a memory image, in `folder`.
pub(crate) fn unpublished(folder: &Folder) -> Manifest {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base"), vec![7; 2 << 20]).unwrap();
    std::fs::write(at("b"), vec![9; 1 << 20]).unwrap();
    QemuImg::default().create_overlay(&at("a"), &at("base"), Format::Raw, 2 << 20).unwrap();
    let chains =
        [chain::probe(&at("a"), Format::Qcow2).unwrap(), chain::probe(&at("b"), Format::Raw).unwrap()];
    let (files, per_disk) = lay_out([("vda", chains[0].as_slice()), ("vdb", chains[1].as_slice())]);
    let mut entries = Vec::new();
    for file in &files {
        let source = SourceFile::open(&file.source).unwrap();
        let options = Options { header: header_for(&source, file).unwrap(), ..Options::default() };
        copy(&source, folder, &file.name, Start::Fresh, &options, &()).unwrap();
        let role =
            if per_disk.iter().any(|d| files[d[0]].name == file.name) { Role::Disk } else { Role::Base };
        entries.push(FileEntry {
            format: Some(file.format),
            virtual_size: Some(file.virtual_size),
            backing: file.backing.as_ref().map(|n| n.name.clone()),
            ..entry(folder, file.name.as_str(), role)
        });
    }
    write(folder, DEFINITION, b"<domain/>");
    write(folder, MEMORY, b"LibvirtQemudSave");
    entries.push(entry(folder, DEFINITION, Role::Definition));
    entries.push(entry(folder, MEMORY, Role::Memory));
    let disk = |i: usize, target: &str| Disk {
        target: target.to_owned(),
        virtual_size: files[per_disk[i][0]].virtual_size,
        chain: per_disk[i].iter().map(|at| files[*at].name.clone()).collect(),
        unknown: Unknown::new(),
    };
    Manifest {
        format: FORMAT.to_owned(),
        version: VERSION,
        min_reader: MIN_READER,
        backup: BackupId(uuid::Uuid::now_v7()),
        job: uuid::Uuid::now_v7(),
        tool: "vmkeep 0.1.0".to_owned(),
        point_in_time: "2026-01-31T23:59:59Z".parse().unwrap(),
        finished: "2026-02-01T00:00:59Z".parse().unwrap(),
        domain: Domain {
            uuid: uuid::Uuid::now_v7(),
            name: "web 01".to_owned(),
            machine: Some("pc-q35-7.2".to_owned()),
            arch: Some("x86_64".to_owned()),
            memory: Some(1 << 30),
            unknown: Unknown::new(),
        },
        host: Host::default(),
        definition: Definition { inactive: fixed(DEFINITION), live: None },
        consistency: Consistency::MemoryAndDisks,
        disks: vec![disk(0, "vda"), disk(1, "vdb")],
        memory: Memory::Saved(SavedMemory {
            file: fixed(MEMORY),
            version: 2,
            compression: "raw".to_owned(),
            downtime_ms: None,
            unknown: Unknown::new(),
        }),
        nvram: None,
        tpm: None,
        autostart: None,
        left_out: vec![LeftOut { target: "sda".to_owned(), reason: "a CD drive".to_owned() }],
        files: entries,
        warnings: Vec::new(),
        unknown: Unknown::new(),
    }
}

pub(crate) fn backup(folder: &Folder) -> Manifest {
    let manifest = unpublished(folder);
    publish(folder, &manifest).unwrap();
    manifest
}

pub(crate) fn write(folder: &Folder, name: &str, bytes: &[u8]) {
    std::fs::write(folder.path().join(name), bytes).unwrap();
}

pub(crate) fn folder(path: &Path) -> Folder {
    crate::image::root::Roots::open([path]).unwrap().open_folder(path).unwrap()
}

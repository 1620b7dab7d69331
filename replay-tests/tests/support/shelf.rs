//! Backup folders made by hand, from the manifest's specification alone.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Host;
use super::bed::give;

/// The UUID of a domain that backups made by hand are of.
pub const DOMAIN: &str = "7d3f1c52-0a1b-4c2d-8e3f-0123456789ab";

/// A backup made by hand.
#[derive(Clone, Debug)]
pub struct Made {
    pub id: String,
    pub folder: PathBuf,
}

/// The files of a backup made by hand.
pub const FILES: [&str; 3] = ["vda.raw", "vdb.raw", "domain.xml"];

/// A backup of two raw disks that holds this minute of an hour, in a folder of its own below a root.
pub fn make(host: &Host, root: &Path, minute: usize) -> Made {
    make_of(host, root, minute, DOMAIN, "shelf")
}

pub fn make_of(host: &Host, root: &Path, minute: usize, domain: &str, name: &str) -> Made {
    // Digits that no other backup of this test bears.
    let digits = format!("{minute:04x}{:08x}", rand());
    let id = format!("019c1a2b-3c4d-7e5f-8a9b-{digits}");
    let folder = root.join(name).join(format!("20260101T00{:02}00Z-{digits}", minute % 60));
    fs::create_dir_all(&folder).unwrap();
    give(host, &root.join(name));
    give(host, &folder);
    let mut files = Vec::new();
    let definition = definition(name, domain);
    for (file, role, bytes) in [
        ("vda.raw", "disk", vec![1_u8; 64 << 10]),
        ("vdb.raw", "disk", vec![2_u8; 32 << 10]),
        ("domain.xml", "definition", definition.into_bytes()),
    ] {
        fs::write(folder.join(file), &bytes).unwrap();
        give(host, &folder.join(file));
        let mut entry = json!({
            "name": file, "role": role, "size": bytes.len(), "blake3": blake3::hash(&bytes).to_hex().to_string(),
        });
        if role == "disk" {
            entry["format"] = json!("raw");
            entry["virtual_size"] = json!(bytes.len());
        }
        files.push(entry);
    }
    let at = format!("2026-01-01T{:02}:{:02}:00Z", minute / 60, minute % 60);
    let manifest = json!({
        "format": "vmkeep-backup", "version": 1, "min_reader": 1, "backup": id, "job": id, "tool": "by hand",
        "point_in_time": at, "finished": at, "domain": { "uuid": domain, "name": name },
        "definition": { "inactive": "domain.xml" }, "consistency": "crash",
        "disks": [
            { "target": "vda", "virtual_size": 64 << 10, "chain": ["vda.raw"] },
            { "target": "vdb", "virtual_size": 32 << 10, "chain": ["vdb.raw"] },
        ],
        "memory": { "none": { "reason": "there was none" } }, "left_out": [], "files": files, "warnings": [],
    });
    fs::write(folder.join("manifest.json"), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    give(host, &folder.join("manifest.json"));
    Made { id, folder }
}

fn definition(name: &str, domain: &str) -> String {
    let name = name.replace('&', "&amp;").replace('<', "&lt;");
    let disk = |target: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/nowhere/{target}.raw'/>\
             <target dev='{target}' bus='virtio'/></disk>"
        )
    };
    format!(
        "<domain type='qemu'><name>{name}</name><uuid>{domain}</uuid><memory>65536</memory><vcpu>1</vcpu>\
         <os><type>hvm</type></os><devices>{}{}</devices></domain>",
        disk("vda"),
        disk("vdb")
    )
}

fn rand() -> u32 {
    use std::hash::{BuildHasher, Hasher};
    let hash = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (hash & 0xffff_ffff) as u32
}

/// No folder below a root looks like a backup and lacks a byte of what its manifest names. Judged by the files alone.
pub fn assert_no_half(case: &str, root: &Path) {
    for path in super::files_below(root).iter().filter(|path| path.ends_with("manifest.json")) {
        let manifest: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        for file in manifest["files"].as_array().unwrap() {
            let at = path.with_file_name(file["name"].as_str().unwrap());
            let bytes = fs::read(&at).unwrap_or_else(|e| panic!("{case}: {}: {e}", at.display()));
            let hash = blake3::hash(&bytes).to_hex().to_string();
            assert_eq!(file["blake3"], hash.as_str(), "{case}: {}", at.display());
        }
    }
}

//! A backup's folder: it is a backup if its manifest is there, and then it is whole.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::Path;

use fastrand::Rng;
use replay_tests::powercut::disk::Disk;
use replay_tests::powercut::trace;
use serde_json::json;
use vmkeep_steps::image::copy::{Options, SourceFile, Start, copy};
use vmkeep_steps::image::qemu_img::QemuImg;
use vmkeep_steps::image::root::{Component, RelPath, TargetRoot};
use vmkeep_steps::manifest::{self, Depth, Manifest};

use crate::stores::{number, workshop};
use crate::workload::{Act, program, say};

const IMAGE: &str = "vda.raw";
const DEFINITION: &str = "domain.xml";

fn component(name: &str) -> Component {
    Component::new(name).unwrap()
}

fn manifest(size: u64, hash: &str) -> Manifest {
    let id = "0197e3a0-0000-7000-8000-000000000001";
    let definition = b"<domain/>";
    let manifest = json!({
        "format": "vmkeep-backup", "version": 1, "min_reader": 1, "backup": id, "job": id, "tool": "vmkeep",
        "point_in_time": "2026-01-31T23:59:59Z", "finished": "2026-02-01T00:00:59Z",
        "domain": { "uuid": id, "name": "web1" }, "definition": { "inactive": DEFINITION }, "consistency": "crash",
        "disks": [{ "target": "vda", "virtual_size": size, "chain": [IMAGE] }],
        "memory": { "none": { "reason": "not asked for" } },
        "files": [
            { "name": IMAGE, "role": "disk", "size": size, "blake3": hash, "format": "raw", "virtual_size": size },
            { "name": DEFINITION, "role": "definition", "size": definition.len(),
              "blake3": blake3::hash(definition).to_hex().as_str() },
        ],
    });
    serde_json::from_value(manifest).unwrap()
}

/// What is recorded: an image is copied, the backup is published, and withdrawn again.
pub(crate) fn publish_and_withdraw(root: &Path) {
    let target = TargetRoot::open(root).unwrap();
    let folder = target.folder().make_folders(&RelPath::new("web1/backup").unwrap()).unwrap();
    let source = SourceFile::open(&root.with_file_name("source")).unwrap();
    let options = Options { checkpoint_bytes: 64 << 10, hashers: 1, ..Options::default() };
    let copied = copy(&source, &folder, &component(IMAGE), Start::Fresh, &options, &()).unwrap();
    manifest::file::write_durably(&folder, DEFINITION, b"<domain/>").unwrap();
    manifest::publish(&folder, &manifest(copied.copy.size, copied.hash.to_hex().as_str())).unwrap();
    say("published");
    manifest::file::withdraw(&folder).unwrap();
    say("withdrawn");
    for name in [IMAGE, DEFINITION] {
        folder.remove_file(&component(name)).unwrap();
    }
    std::io::stdout().flush().unwrap();
}

fn record() -> Disk {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    fs::create_dir(&root).unwrap();
    let mut rng = Rng::with_seed(1);
    // Data, a hole, data.
    let mut content: Vec<u8> = (0..256 << 10).map(|_| rng.u8(..)).collect();
    content[64 << 10..192 << 10].fill(0);
    fs::write(place.path().join("source"), content).unwrap();
    let (program, arguments, environment) = program("none", Act::Publish, &root);
    let environment = environment.iter().map(|(name, value)| (*name, OsStr::new(value)));
    Disk::of(&trace::record(&program, &arguments, environment), &root, None).unwrap()
}

/// Builds what a cut leaves, and says what is wrong with it; else whether there is a backup.
fn cut(disk: &Disk, seed: u64) -> Result<bool, String> {
    let mut rng = Rng::with_seed(seed);
    let at = disk.instant(&mut rng);
    let image = disk.cut(at, &mut rng);
    let workshop = workshop();
    image.write(workshop.path()).unwrap();
    let said = |word: &str| image.said().any(|line| line == word);
    let why = |what: String| format!("VMKEEP_SEED={seed}, at {at}: {what}");
    let path = workshop.path().join("web1/backup");
    let found = TargetRoot::open(&path).ok().map(|root| (manifest::read(root.folder()), root));
    match found {
        Some((Ok(stored), root)) => {
            if said("withdrawn") {
                return Err(why("it was withdrawn, and is back".to_owned()));
            }
            let found = manifest::verify(root.folder(), &stored, Depth::Full, &QemuImg::default(), None, &());
            match found.map_err(|e| why(e.to_string()))?.first() {
                Some(finding) => Err(why(format!("it is a backup, and {finding}"))),
                None => Ok(true),
            }
        }
        _ if path.join(manifest::FILE_NAME).exists() => Err(why("its manifest is torn".to_owned())),
        _ if said("published") && !said("withdrawn") && !path.join("manifest.withdrawn.json").exists() => {
            // Being withdrawn it may have lost its name already, but only to the other one.
            Err(why("it was published, and is gone".to_owned()))
        }
        _ => Ok(false),
    }
}

#[test]
fn a_power_cut_leaves_a_backup_whole_or_none_at_all() {
    let disk = record();
    let (seed, images) = (number("VMKEEP_SEED", fastrand::u64(..)), number("VMKEEP_IMAGES", 300));
    let whole = (0..images)
        .filter(|n| cut(&disk, seed.wrapping_add(*n)).unwrap_or_else(|why| panic!("{why}")))
        .count();
    println!("{images} images of {} instants, {whole} of them with a backup, each whole", disk.instants());
    assert!(whole > 0, "no cut came after the publication");
}

#[test]
fn a_sync_of_a_backups_files_that_is_left_out_is_found_out() {
    for name in [IMAGE, DEFINITION, "backup", "web1"] {
        let mut disk = record();
        disk.without_syncs_of(name);
        let found = (0..3000).position(|seed| cut(&disk, seed).is_err());
        println!("without the syncs of {name}: the first cut that costs something is {found:?}");
        assert!(found.is_some(), "nobody misses the syncs of {name}");
    }
}

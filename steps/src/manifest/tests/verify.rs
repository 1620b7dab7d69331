use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::symlink;

use super::*;
use crate::manifest::read;
use crate::manifest::samples::{backup, c, folder};

struct Case {
    dir: tempfile::TempDir,
    folder: Folder,
    stored: Stored,
}

fn case() -> Case {
    let dir = tempfile::tempdir().unwrap();
    let folder = folder(dir.path());
    backup(&folder);
    let stored = read(&folder).unwrap();
    Case { dir, folder, stored }
}

impl Case {
    fn verify(&self, depth: Depth) -> Vec<Finding> {
        verify(&self.folder, &self.stored, depth, &QemuImg::default(), None, &()).unwrap()
    }

    fn problems_of(&self, name: &str, depth: Depth) -> Vec<Problem> {
        let found = self.verify(depth);
        assert!(found.iter().all(|f| f.file == c(name)), "{found:?}");
        found.into_iter().map(|f| f.problem).collect()
    }

    fn poke(&self, name: &str, offset: u64, bytes: &[u8]) {
        let file = std::fs::File::options().write(true).open(self.dir.path().join(name)).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }
}

#[test]
fn a_good_backup_has_no_findings() {
    let case = case();
    assert_eq!(case.verify(Depth::Quick), []);
    assert_eq!(case.verify(Depth::Full), []);
}

#[test]
fn one_changed_byte_in_any_file_is_found_and_named() {
    for (name, at) in [("vda.base1.raw", 1 << 20), ("vdb.raw", 0), ("domain.xml", 3), ("memory.save", 5)] {
        let case = case();
        case.poke(name, at, b"!");
        let problems = case.problems_of(name, Depth::Full);
        assert!(matches!(problems.as_slice(), [Problem::Hash { .. }]), "{problems:?}");
        // A quick look does not see it, and does not claim to.
        assert_eq!(case.verify(Depth::Quick), []);
    }
}

#[test]
fn all_that_is_wrong_is_found_not_only_the_first() {
    let case = case();
    std::fs::remove_file(case.dir.path().join("vda.base1.raw")).unwrap();
    std::fs::File::options().write(true).open(case.dir.path().join("vdb.raw")).unwrap().set_len(7).unwrap();
    std::fs::remove_file(case.dir.path().join("domain.xml")).unwrap();
    symlink("vdb.raw", case.dir.path().join("domain.xml")).unwrap();
    std::fs::remove_file(case.dir.path().join("memory.save")).unwrap();
    std::fs::create_dir(case.dir.path().join("memory.save")).unwrap();
    std::fs::write(case.dir.path().join("stranger"), "").unwrap();
    let found = case.verify(Depth::Quick);
    let of = |name: &str| found.iter().find(|f| f.file == c(name)).map(|f| f.problem.clone());
    assert_eq!(of("vda.base1.raw"), Some(Problem::Missing));
    assert_eq!(of("vdb.raw"), Some(Problem::Size { expected: 1 << 20, found: 7 }));
    assert_eq!(of("domain.xml"), Some(Problem::NotAFile));
    assert_eq!(of("memory.save"), Some(Problem::NotAFile));
    assert_eq!(of("stranger"), Some(Problem::Unexpected));
    assert_eq!(found.len(), 5);
    assert_eq!(found.iter().filter(|f| f.problem.serious()).count(), 4);
}

#[test]
fn a_header_that_names_a_file_of_the_host_is_found_before_qemu_sees_it() {
    let case = case();
    let path = case.dir.path().join("vda.qcow2");
    let header = Header::read(&std::fs::File::open(&path).unwrap()).unwrap();
    for evil in ["/etc/shadow", "../../x", "nbd://localhost/x", "json:{\"driver\":\"null-co\"}"] {
        let bytes = header.with_backing(Some((evil, Format::Raw))).unwrap();
        case.poke("vda.qcow2", 0, &bytes);
        for depth in [Depth::Quick, Depth::Full] {
            let problems = case.problems_of("vda.qcow2", depth);
            assert!(
                problems.iter().any(|p| matches!(p, Problem::Header { what } if what.contains("stands on")))
            );
            assert!(!problems.iter().any(|p| matches!(p, Problem::Damaged { .. })), "{problems:?}");
        }
    }
}

#[test]
fn damage_inside_an_image_is_found_also_when_the_hash_was_made_after_it() {
    let mut case = case();
    // The reference count table points to nowhere.
    case.poke("vda.qcow2", 48, &0x00ff_0000u64.to_be_bytes());
    let bytes = std::fs::read(case.dir.path().join("vda.qcow2")).unwrap();
    let entry = case.stored.manifest.files.iter_mut().find(|f| f.name == c("vda.qcow2")).unwrap();
    entry.blake3 = blake3::hash(&bytes).into();
    let problems = case.problems_of("vda.qcow2", Depth::Full);
    assert!(matches!(problems.as_slice(), [Problem::Damaged { .. }]), "{problems:?}");
}

struct StopAtOnce;
impl Observer for StopAtOnce {
    fn control(&self) -> Control {
        Control::Stop
    }
}

#[test]
fn it_can_be_stopped() {
    let case = case();
    let got = verify(&case.folder, &case.stored, Depth::Full, &QemuImg::default(), None, &StopAtOnce);
    assert!(matches!(got, Err(CopyError::Stopped { .. })), "{got:?}");
}

#[test]
fn findings_are_readable_for_programs() {
    let finding = Finding { file: c("vda.qcow2"), problem: Problem::Size { expected: 1, found: 2 } };
    let json = serde_json::to_value(&finding).unwrap();
    assert_eq!(json, serde_json::json!({"file": "vda.qcow2", "problem": "size", "expected": 1, "found": 2}));
    assert_eq!(finding.to_string(), "vda.qcow2 has 2 bytes, not 1");
}

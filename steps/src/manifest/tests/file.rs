use serde_json::json;

use super::*;
use crate::manifest::model::*;
use crate::manifest::samples::{c, folder, unpublished};

fn sample() -> (tempfile::TempDir, Manifest) {
    let dir = tempfile::tempdir().unwrap();
    let manifest = unpublished(&folder(dir.path()));
    (dir, manifest)
}

fn value(manifest: &Manifest) -> Value {
    serde_json::from_slice(&to_bytes(manifest).unwrap()).unwrap()
}

fn refused(value: &Value) -> String {
    match parse(value.to_string().as_bytes()) {
        Err(e) => e.to_string(),
        Ok(_) => panic!("accepted: {value:#}"),
    }
}

#[test]
fn what_is_written_is_what_is_read() {
    let (dir, manifest) = sample();
    let folder = folder(dir.path());
    let hash = publish(&folder, &manifest).unwrap();
    let stored = read(&folder).unwrap();
    assert_eq!(stored.manifest, manifest);
    assert_eq!(stored.hash, hash);
    assert_eq!(hash, blake3::hash(&std::fs::read(dir.path().join(MANIFEST)).unwrap()).into());
}

#[test]
fn the_stored_form_is_the_documented_one() {
    // The example in MANIFEST.md. It must be readable for ever.
    let doc = include_str!("../../../MANIFEST.md");
    let examples: Vec<&str> =
        doc.split("```json\n").skip(1).map(|text| text.split("```").next().unwrap()).collect();
    let json = examples.iter().find(|text| text.contains("\"vmkeep-backup\"")).unwrap();
    let note = examples.iter().find(|text| text.contains("\"vmkeep-protection\"")).unwrap();
    let read: crate::manifest::protection::Protection = serde_json::from_str(note).unwrap();
    assert!(read.unknown.is_empty());
    assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::from_str::<Value>(note).unwrap());
    let manifest = parse(json.as_bytes()).unwrap();
    let again: Value = serde_json::from_slice(&to_bytes(&manifest).unwrap()).unwrap();
    let original: Value = serde_json::from_str(json).unwrap();
    assert_eq!(again, original, "the example is not what this program writes");
    assert!(
        manifest.unknown.is_empty() && manifest.domain.unknown.is_empty() && manifest.host.unknown.is_empty()
    );
    assert!(
        manifest.files.iter().all(|f| f.unknown.is_empty())
            && manifest.disks.iter().all(|d| d.unknown.is_empty())
    );
}

#[test]
fn fields_of_newer_versions_are_kept() {
    let (_dir, manifest) = sample();
    let mut v = value(&manifest);
    v["version"] = json!(7);
    v["protected_until"] = json!("2030-01-01");
    v["domain"]["firmware"] = json!({"nvram": "x"});
    v["files"][0]["pack"] = json!([1, 2]);
    v["disks"][0]["serial"] = json!("abc");
    let read = parse(v.to_string().as_bytes()).unwrap();
    assert_eq!(value(&read), v);
}

#[test]
fn a_newer_form_is_refused_by_its_number_alone() {
    let (_dir, manifest) = sample();
    let mut v = value(&manifest);
    v["min_reader"] = json!(READER + 1);
    v["version"] = json!(READER + 1);
    // Nothing else of it need be understood.
    v["files"] = json!("packed");
    let got = parse(v.to_string().as_bytes());
    let newer = u64::from(READER) + 1;
    assert!(matches!(&got, Err(ManifestError::TooNew { needed }) if *needed == newer), "{got:?}");
}

#[test]
fn what_is_no_manifest_is_refused() {
    for text in
        ["", "{", "[]", "null", "{}", r#"{"format":"other","min_reader":1}"#, r#"{"format":"vmkeep-backup"}"#]
    {
        assert!(parse(text.as_bytes()).is_err(), "{text}");
    }
    let huge = vec![b' '; (LONGEST + 1) as usize];
    assert!(matches!(parse(&huge), Err(ManifestError::TooLong { .. })));
    // A bomb of brackets must not take the stack with it.
    assert!(parse("[".repeat(1 << 20).as_bytes()).is_err());
}

#[test]
fn names_that_are_paths_are_refused_wherever_they_stand() {
    let (_dir, manifest) = sample();
    for bad in ["../x", "/etc/shadow", "a/b", "..", ".", "", "a\u{0}b"] {
        for pointer in [
            "/files/0/name",
            "/files/0/backing",
            "/disks/0/chain/0",
            "/definition/inactive",
            "/memory/saved/file",
        ] {
            let mut v = value(&manifest);
            *v.pointer_mut(pointer).unwrap() = json!(bad);
            assert!(!refused(&v).is_empty(), "{pointer} {bad:?}");
        }
    }
}

#[test]
fn contradictions_are_refused() {
    let (_dir, manifest) = sample();
    let base = value(&manifest);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut v = base.clone();
        change(&mut v);
        refused(&v)
    };
    // Two files of one name, also on a file system that ignores case.
    with(&|v| v["files"][2]["name"] = json!("VDA.qcow2"));
    with(&|v| v["files"][2]["name"] = json!("manifest.json"));
    with(&|v| v["files"][2]["name"] = json!("manifest.json.new"));
    // Chains: empty, missing, in a loop, other than the files say, of another size.
    with(&|v| v["disks"][0]["chain"] = json!([]));
    with(&|v| v["disks"][0]["chain"] = json!(["gone.qcow2"]));
    with(&|v| v["disks"][0]["chain"] = json!(["vda.qcow2"]));
    with(&|v| v["disks"][0]["chain"] = json!(["vda.qcow2", "vda.base1.raw", "vda.qcow2"]));
    with(&|v| {
        v["disks"][0]["chain"] = json!(["vda.qcow2", "vda.qcow2"]);
        v["files"][0]["backing"] = json!("vda.qcow2");
    });
    with(&|v| v["disks"][0]["virtual_size"] = json!(1));
    with(&|v| v["disks"][1]["target"] = json!("vda"));
    with(&|v| v["left_out"][0]["target"] = json!("vda"));
    // A raw image stands on nothing.
    with(&|v| v["files"][1]["backing"] = json!("vdb.raw"));
    // Roles.
    with(&|v| v["files"][0]["format"] = Value::Null);
    with(&|v| v["files"][3]["format"] = json!("raw"));
    with(&|v| v["definition"]["inactive"] = json!("vda.qcow2"));
    with(&|v| v["definition"]["live"] = json!("gone.xml"));
    with(&|v| v["memory"]["saved"]["file"] = json!("vdb.raw"));
    // Numbers and hashes that are none.
    with(&|v| v["files"][0]["size"] = json!(-1));
    with(&|v| v["files"][0]["size"] = json!(1e300));
    with(&|v| v["files"][0]["blake3"] = json!("abc"));
    with(&|v| v["files"][0]["format"] = json!("vmdk"));
    with(&|v| v["version"] = json!(0));
    with(&|v| v["min_reader"] = json!(0));
    with(&|v| v["consistency"] = json!("perfect"));
}

#[test]
fn a_manifest_that_contradicts_itself_is_not_published() {
    let (dir, mut manifest) = sample();
    manifest.files.pop();
    let got = publish(&folder(dir.path()), &manifest);
    assert!(matches!(got, Err(ManifestError::Contradiction(_))), "{got:?}");
    assert!(!dir.path().join(MANIFEST).exists());
}

#[test]
fn publishing_is_repeatable_and_never_replaces_another_backup() {
    let (dir, manifest) = sample();
    let folder = folder(dir.path());
    // What a crash between write and rename leaves.
    std::fs::write(dir.path().join("manifest.json.new"), "torn").unwrap();
    let first = publish(&folder, &manifest).unwrap();
    let again = Manifest { finished: "2027-01-01T00:00:00Z".parse().unwrap(), ..manifest.clone() };
    assert_eq!(publish(&folder, &again).unwrap(), first);
    assert_eq!(read(&folder).unwrap().manifest, manifest);
    assert!(!dir.path().join("manifest.json.new").exists());
    let other = Manifest { backup: BackupId(uuid::Uuid::now_v7()), ..manifest };
    assert!(matches!(publish(&folder, &other), Err(ManifestError::Taken)));
    // Nor one that cannot be read.
    std::fs::write(dir.path().join(MANIFEST), "?").unwrap();
    assert!(matches!(publish(&folder, &other), Err(ManifestError::Form(_))));
    assert_eq!(std::fs::read(dir.path().join(MANIFEST)).unwrap(), b"?");
}

#[test]
fn a_manifest_behind_a_link_is_not_read() {
    let (dir, manifest) = sample();
    let other = tempfile::tempdir().unwrap();
    publish(&folder(dir.path()), &manifest).unwrap();
    std::os::unix::fs::symlink(dir.path().join(MANIFEST), other.path().join(MANIFEST)).unwrap();
    let got = read(&folder(other.path()));
    assert!(matches!(got, Err(ManifestError::Place(RootError::Escapes { .. }))), "{got:?}");
}

#[test]
fn an_empty_folder_has_none() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(read(&folder(dir.path())), Err(ManifestError::Place(RootError::Missing { .. }))));
    let _ = c("x");
}

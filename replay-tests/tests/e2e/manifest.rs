//! A backup's folder that is not what its manifest says.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use replay_tests::testbed::MIB;
use serde_json::Value;

use crate::support::bed::*;
use crate::support::run;

#[test]
fn a_backup_that_is_not_what_its_manifest_says_is_refused() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    let id = backup["id"].as_str().unwrap();
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    let manifest = folder.join("manifest.json");
    let (vda, vdb) = (image(&backup, "vda"), image(&backup, "vdb"));
    let outside = host.hypervisor.dir().join("secret");
    fs::write(&outside, "secret").unwrap();
    give(host, &outside);

    // Images.
    let flip = |path: &Path, at: u64| {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    let middle = fs::metadata(&vda).unwrap().len() / 2;
    flip(&vda, middle);
    refused(host, &["verify", id], 38, &["CORRUPT_DISK_IMAGE_FOUND", "vda.qcow2"]);
    flip(&vda, middle);
    flip(&vdb, 20 * MIB + 5);
    refused(host, &["verify", id], 38, &["CORRUPT_DISK_IMAGE_FOUND", "vdb.raw"]);
    flip(&vdb, 20 * MIB + 5);
    host.ok(&["verify", id]);
    fs::OpenOptions::new().append(true).open(&vdb).unwrap().set_len(32 * MIB + 512).unwrap();
    refused(host, &["verify", id], 107, &["MANIFEST_MISMATCH", "vdb.raw"]);
    fs::OpenOptions::new().append(true).open(&vdb).unwrap().set_len(32 * MIB).unwrap();
    fs::rename(&vdb, folder.join("aside")).unwrap();
    refused(host, &["verify", id], 37, &["MISSING_NECESSARY_FILES", "vdb.raw is missing"]);
    // A link to the very same bytes is no file of the backup either.
    std::os::unix::fs::symlink(folder.join("aside"), &vdb).unwrap();
    refused(host, &["verify", id], 37, &["MISSING_NECESSARY_FILES", "vdb.raw is not a regular file"]);
    fs::remove_file(&vdb).unwrap();
    fs::rename(folder.join("aside"), &vdb).unwrap();
    // An image that somebody made lean on a file of the host.
    let kept = fs::read(&vda).unwrap();
    run("qemu-img", &["rebase", "-u", "-F", "raw", "-b", outside.to_str().unwrap(), vda.to_str().unwrap()]);
    let words = &["MANIFEST_MISMATCH", "vda.qcow2 has another header"];
    let output = host.vmkeep(&["verify", id]);
    assert!([38, 107].contains(&output.status.code().unwrap()), "{output:?}, {words:?}");
    fs::write(&vda, &kept).unwrap();
    host.ok(&["verify", id]);

    // The manifest.
    let text = fs::read_to_string(&manifest).unwrap();
    let edited = |what: &str, by: &dyn Fn(&str) -> String| {
        fs::write(&manifest, by(&text)).unwrap();
        println!("{what}");
        for verb in ["show", "verify"] {
            refused(host, &[verb, folder.to_str().unwrap()], 107, &["MANIFEST_MISMATCH"]);
        }
        let list = host.ok(&["list"]);
        assert!(list.contains("cannot be read"), "{what}: it vanished from the list: {list}");
    };
    let replaced = |from: &'static str, to: &'static str| {
        move |text: &str| {
            assert!(text.contains(from), "{from}: {text}");
            text.replace(from, to)
        }
    };
    edited("a name that climbs", &replaced("\"vdb.raw\"", "\"../../secret\""));
    edited("an absolute name", &replaced("\"vdb.raw\"", "\"/etc/passwd\""));
    edited("half of it", &|text| text[..text.len() / 2].to_owned());
    edited("nothing", &|_| String::new());
    // Readable, but of other bytes.
    let parsed: Value = serde_json::from_str(&text).unwrap();
    for file in parsed["files"].as_array().unwrap() {
        let (name, hash) = (file["name"].as_str().unwrap(), file["blake3"].as_str().unwrap());
        let other: String = hash.chars().map(|c| if c == '0' { '1' } else { '0' }).collect();
        fs::write(&manifest, text.replace(hash, &other)).unwrap();
        refused(host, &["verify", id], 38, &["CORRUPT_DISK_IMAGE_FOUND", name]);
    }
    fs::write(&manifest, &text).unwrap();
    host.ok(&["verify", id]);
    // Fields that no file's hash contradicts.
    let uuid = parsed["domain"]["uuid"].as_str().unwrap();
    let memory = format!("\"memory\": {}", parsed["domain"]["memory"]);
    let fields = [
        ("\"name\": \"web1\"", "\"name\": \"web9\"", "is called \"web9\""),
        (uuid, "00000000-0000-4000-8000-000000000009", "names the UUID 00000000"),
        (memory.as_str(), "\"memory\": 5", "the memory in bytes 5"),
        ("\"tool\": \"vmkeep", "\"tool\": \"vmkeeq", "was changed after it was published"),
    ];
    let change = |(from, to, word): (&str, &str, &'static str)| {
        assert!(text.contains(from), "{from}: {text}");
        fs::write(&manifest, text.replacen(from, to, 1)).unwrap();
        word
    };
    for field in fields {
        let word = change(field);
        refused(host, &["verify", id], 107, &["MANIFEST_MISMATCH", word]);
        let shown = host.ok(&["show", id]);
        assert!(shown.contains("WRONG") && shown.contains(word), "{shown}");
    }
    fs::write(&manifest, &text).unwrap();
    let shown = host.ok(&["show", id]);
    assert!(!shown.contains("WRONG") && !shown.contains("journal does not know"), "{shown}");
    // On another host nobody remembers what was published, and that is said.
    daemon.end();
    let store = host.hypervisor.dir().join("state/vmkeep/store");
    fs::rename(&store, store.with_extension("aside")).unwrap();
    let daemon = host.daemon();
    let word = change(fields[0]);
    refused(host, &["verify", id], 107, &["MANIFEST_MISMATCH", word]);
    change(fields[3]);
    assert!(host.ok(&["verify", id]).contains("journal does not know"));
    fs::write(&manifest, &text).unwrap();
    daemon.end();
    fs::remove_dir_all(&store).unwrap();
    fs::rename(store.with_extension("aside"), &store).unwrap();
    let _daemon = host.daemon();
    host.ok(&["verify", id]);
    let plan = host.ok(&["verify", id, "--dry-run"]);
    assert!(plan.contains("read every file"), "{plan}");
    // A newer form is named as such, and left alone.
    let newer = text.replacen("\"min_reader\": 1", "\"min_reader\": 99", 1);
    assert_ne!(newer, text);
    fs::write(&manifest, newer).unwrap();
    refused(host, &["show", folder.to_str().unwrap()], 108, &["MANIFEST_TOO_NEW"]);
    // A manifest that is a link.
    fs::write(&manifest, &text).unwrap();
    fs::rename(&manifest, host.hypervisor.dir().join("manifest.json")).unwrap();
    std::os::unix::fs::symlink(host.hypervisor.dir().join("manifest.json"), &manifest).unwrap();
    refused(host, &["show", folder.to_str().unwrap()], 107, &["MANIFEST_MISMATCH"]);
    bed.assert_back_home();
}

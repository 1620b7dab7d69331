//! Restores that cannot be: refused, or taken back when they fail in the middle, and nothing is left of them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use replay_tests::testbed::MIB;

use crate::support::bed::*;
use crate::support::mount::Mount;
use crate::support::shelf::make;
use crate::support::{Host, files_below, until};

/// Neither a domain nor a file of a new one; the original and its backup are as they were.
fn assert_nothing_restored(bed: &Bed, places: &[&Path]) {
    assert_eq!(bed.host.hypervisor.domains().unwrap(), [bed.guest.name()]);
    for place in places {
        assert_eq!(files_below(place), Vec::<PathBuf>::new());
    }
    bed.assert_back_home();
}

#[test]
fn a_restore_that_cannot_be_is_refused_and_leaves_nothing() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    host.ok(&["snapshot", "web1"]);
    let backup = host.backups().remove(0);
    let id = backup["id"].as_str().unwrap();
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    let (restored, root) = (host.restored(), default_root(host));
    let elsewhere = folder_of_user(host, "elsewhere");
    let link = restored.join("link");
    std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
    let to = |path: &Path| path.to_str().unwrap().to_owned();
    let as_disk = |path: &Path| format!("vda={}", path.display());
    let refuses = |args: &[&str], code: i32, words: &[&str]| {
        for mode in [&[][..], &["--cold", "--start"], &["--dry-run"]] {
            refused(host, &[&["restore"][..], args, mode].concat(), code, words);
        }
        let places: Vec<_> = files_below(&restored).into_iter().filter(|path| *path != link).collect();
        assert_eq!(places, Vec::<PathBuf>::new(), "{args:?}");
        assert_nothing_restored(&bed, &[&elsewhere]);
    };
    refuses(&["ffffffff", "--as", "copy"], 109, &["NO_SUCH_BACKUP", "ffffffff"]);
    refuses(&[&to(&root.join("web1")), "--as", "copy"], 109, &["NO_SUCH_BACKUP"]);
    refuses(&[&to(&elsewhere), "--as", "copy"], 105, &["TARGET_OUTSIDE_ROOTS"]);
    refuses(&[id, "--as", "web1"], 111, &["DOMAIN_EXISTS", "web1", "another name"]);
    refuses(&[id, "--as", "copy", "--disk", "vdz=/tmp/x"], 92, &["NO_SUCH_DISK", "vdz", "vda, vdb"]);
    for outside in [elsewhere.as_path(), Path::new("/tmp/elsewhere")] {
        refuses(&[id, "--as", "copy", "--folder", &to(outside)], 105, &["TARGET_OUTSIDE_ROOTS"]);
        let file = outside.join("vda.qcow2");
        refuses(&[id, "--as", "copy", "--disk", &as_disk(&file)], 105, &["TARGET_OUTSIDE_ROOTS"]);
    }
    for detour in [restored.join("../../elsewhere"), link.clone(), link.join("deeper")] {
        refuses(&[id, "--as", "copy", "--folder", &to(&detour)], 106, &["UNSAFE_PATH"]);
    }
    // What is there is never replaced: an image of the very backup, say.
    let taken = image(&backup, "vda");
    refuses(&[id, "--as", "copy", "--disk", &as_disk(&taken)], 110, &["BACKUP_EXISTS", "vda.qcow2"]);
    let same = format!("vdb={}", restored.join("one").display());
    let args = [id, "--as", "copy", "--disk", &as_disk(&restored.join("one")), "--disk", &same];
    refuses(&args, 110, &["BACKUP_EXISTS"]);

    // A backup that is not whole any more.
    let aside = folder.join("aside");
    fs::rename(&taken, &aside).unwrap();
    refuses(&[id, "--as", "copy"], 37, &["MISSING_NECESSARY_FILES", "vda.qcow2"]);
    fs::rename(&aside, &taken).unwrap();
    let manifest = folder.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replacen("\"min_reader\": 1", "\"min_reader\": 99", 1)).unwrap();
    refuses(&[&to(&folder), "--as", "copy"], 108, &["MANIFEST_TOO_NEW"]);
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    refuses(&[&to(&folder), "--as", "copy"], 107, &["MANIFEST_MISMATCH"]);
    fs::write(&manifest, &text).unwrap();

    // Bytes of an image show only when they are read: then all of it is taken back.
    let file = fs::File::options().read(true).write(true).open(&taken).unwrap();
    let (mut byte, middle) = ([0], fs::metadata(&taken).unwrap().len() / 2);
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    for mode in [&[][..], &["--cold", "--start"]] {
        let args = [&["restore", id, "--as", "copy"][..], mode].concat();
        refused(host, &args, 38, &["CORRUPT_DISK_IMAGE_FOUND", "vda.qcow2"]);
        assert_eq!(host.jobs()[0]["status"], "rolled_back");
        assert_nothing_restored(&bed, &[&restored.join("copy")]);
    }
    file.write_all_at(&byte, middle).unwrap();
    host.ok(&["verify", id]);
    host.ok(&["restore", id, "--as", "copy"]);
}

#[test]
fn a_restore_without_room_is_refused_and_one_that_runs_out_of_it_is_taken_back() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "small", 256) else { return };
    let roots = [default_root(&host), mount.0.clone()];
    configure(&host, &format!("[targets]\nroots = {roots:?}\n"));
    folder_of_user(&host, "state/vmkeep");
    folder_of_user(&host, "state/vmkeep/backups");
    let bed = Bed::boot_on(host, Some(mount), &large("web1"));
    let (host, mount) = (&bed.host, bed.mount());
    let _daemon = host.daemon();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    let backup = host.backups().remove(0);
    let to = mount.0.join("copy");
    let args = ["restore", backup["id"].as_str().unwrap(), "--as", "copy", "--folder", to.to_str().unwrap()];
    mount.fill(8 * MIB);
    let words = &["NOT_ENOUGH_DISK_SPACE", "are needed", "are free", mount.0.to_str().unwrap()];
    refused(host, &args, 47, words);
    mount.clear();
    assert_nothing_restored(&bed, &[&mount.0]);

    let job = host.begin(&[&args[..], &["--bandwidth", "8M"]].concat());
    until("some of it to be there", || {
        let files = files_below(&mount.0);
        let size = |path: &PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
        files.iter().any(|path| size(path) > 4 * MIB).then_some(())
    });
    mount.fill(0);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 47), "{}", host.ok(&["job", "explain", &job]));
    mount.clear();
    assert_nothing_restored(&bed, &[&mount.0]);
    host.ok(&args);
}

#[test]
fn a_definition_that_is_none_and_a_folder_that_is_not_there_are_told_before_anything_is_made() {
    let host = Host::new();
    let (root, gone) = (folder_of_user(&host, "shelf"), host.hypervisor.dir().join("gone"));
    configure(&host, &format!("[targets]\nroots = [{root:?}]\nrestore = {gone:?}\n"));
    let made = make(&host, &root, 1);
    let _daemon = host.daemon();
    let words = &["RETAIN_ROOT_DIRECTORY_DOES_NOT_EXIST", gone.to_str().unwrap()];
    refused(&host, &["restore", &made.id, "--as", "x"], 25, words);
    assert!(!gone.exists());
    // Torn, under a hash that says nothing of it.
    let [definition, manifest] = ["domain.xml", "manifest.json"].map(|name| made.folder.join(name));
    let was = fs::read(&definition).unwrap();
    let torn = &was[..was.len() / 2];
    fs::write(&definition, torn).unwrap();
    let mut text: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    for file in text["files"].as_array_mut().unwrap().iter_mut().filter(|file| file["role"] == "definition") {
        file["size"] = torn.len().into();
        file["blake3"] = blake3::hash(torn).to_hex().to_string().into();
    }
    fs::write(&manifest, serde_json::to_vec_pretty(&text).unwrap()).unwrap();
    let to = root.join("restored");
    let args = ["restore", &made.id, "--as", "x", "--folder", to.to_str().unwrap()];
    refused(&host, &args, 45, &["CANNOT_READ_XML_FILE", "vmkeep list"]);
    assert!(!to.exists() && host.hypervisor.domains().unwrap().is_empty());
}

fn folder_of_user(host: &Host, name: &str) -> PathBuf {
    folder(host, &host.hypervisor.dir().join(name))
}

//! Owners and modes that cannot be given: told with their codes, and nothing is left of the attempt.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::bed::*;
use crate::support::mount::Refusing;
use crate::support::{Host, files_below};

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root can own what vmkeepd's user may not give away");
    }
    root
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn backup(host: &Host) -> Value {
    host.ok(&["snapshot", "web1", "--disk-only"]);
    host.backups().remove(0)
}

/// A restore of a backup that fails with this code, and is taken back.
fn fails(bed: &Bed, toml: &str, to: &Path, code: i32, words: &[&str]) {
    let host = &bed.host;
    configure(host, toml);
    let _daemon = host.daemon();
    let id = host.backups().remove(0)["id"].as_str().unwrap().to_owned();
    let there = to.exists();
    refused(host, &["restore", &id, "--as", "copy", "--folder", text(to)], code, words);
    assert_eq!(host.jobs()[0]["status"], "rolled_back");
    assert_eq!(host.hypervisor.domains().unwrap(), ["web1"]);
    assert_eq!(files_below(to), Vec::<PathBuf>::new(), "left of {toml}");
    assert_eq!(to.exists(), there, "left of {toml}");
    // In place it fails before the machine that is there is touched.
    if there {
        refused(host, &["restore", &id, "--in-place", "--destroy", "--folder", text(to)], code, words);
        assert_eq!(files_below(to), Vec::<PathBuf>::new(), "left of {toml}");
    }
    bed.assert_back_home();
}

#[test]
fn what_is_configured_and_cannot_be_given_fails_with_its_code_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    backup(host);
    daemon.end();
    let restored = host.restored();
    let there = folder(host, &restored.join("there"));
    let owner = "[restore]\nowner = \"root\"\n";
    let words = &["CANNOT_SET_DISK_IMAGE_OWNERSHIP", "restore.owner", "Operation not permitted"];
    fails(&bed, owner, &there, 19, words);
    let group = "[restore]\ngroup = 0\n";
    fails(&bed, group, &there, 19, &["CANNOT_SET_DISK_IMAGE_OWNERSHIP", "restore.group"]);
    fails(&bed, owner, &restored.join("new/deeper"), 30, &["CANNOT_SET_DIRECTORY_OWNERSHIP", "restored/new"]);
    assert!(!restored.join("new").exists());
    // A group that vmkeepd is not in: the system takes such a bit away without a word.
    let shared = folder(host, &restored.join("shared"));
    chown(&shared, None, Some(0)).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o2777)).unwrap();
    let words =
        &["CANNOT_SET_DIRECTORY_PERMISSION", "restore.directory_mode", "accepted it without doing it"];
    fails(&bed, "[restore]\ndirectory_mode = \"2771\"\n", &shared.join("new"), 31, words);

    let refusing = Refusing::new(host, "refusing").unwrap();
    let roots = [default_root(host), restored.clone(), refusing.0.clone()];
    let mode = format!("[targets]\nroots = {roots:?}\n[restore]\nmode = \"0660\"\n");
    fails(&bed, &mode, &refusing.0, 20, &["CANNOT_SET_DISK_IMAGE_PERMISSION", "restore.mode", "0660"]);

    // A name that nobody has is found out about at the start.
    configure(host, "[restore]\ngroup = \"no such group\"\n");
    let vmkeepd = host.hypervisor.dir().join("bin/vmkeepd");
    let output = host.hypervisor.command(vmkeepd).output().unwrap();
    assert_eq!(output.status.code(), Some(39), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("restore.group") && said.contains("no such group"), "{said}");
}

#[test]
fn an_image_whose_owner_its_overlay_cannot_have_is_not_backed_up_and_stays_as_it_is() {
    if !is_root() {
        return;
    }
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let vda = &bed.own["vda"];
    chown(vda, Some(0), None).unwrap();
    fs::set_permissions(vda, fs::Permissions::from_mode(0o666)).unwrap();
    let _daemon = host.daemon();
    refused(host, &["snapshot", "web1"], 19, &["CANNOT_SET_DISK_IMAGE_OWNERSHIP", text(vda), "owner"]);
    assert_eq!(host.jobs()[0]["status"], "rolled_back");
    bed.assert_back_home();
    assert_eq!(files_below(&default_root(host)), Vec::<PathBuf>::new());
    let meta = fs::metadata(vda).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o666));
}

#[test]
fn without_roots_rights_restored_files_are_as_the_originals_were_as_far_as_that_goes() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let [vda, vdb] = ["vda", "vdb"].map(|disk| &bed.own[disk]);
    fs::set_permissions(vda, fs::Permissions::from_mode(0o664)).unwrap();
    fs::set_permissions(vdb, fs::Permissions::from_mode(0o600)).unwrap();
    let daemon = host.daemon();
    let backup = backup(host);
    let recorded = |name: &str| {
        let files = manifest_of(&backup)["files"].as_array().unwrap().clone();
        files.into_iter().find(|file| file["name"] == name).unwrap()["rights"].clone()
    };
    let user = host.hypervisor.user();
    assert_eq!(recorded("vda.qcow2")["mode"], "0664");
    assert_eq!(
        (&recorded("vda.qcow2")["uid"], &recorded("vda.qcow2")["user"]),
        (&user.uid.into(), &user.name.as_str().into())
    );
    assert_eq!(recorded("vdb.raw")["mode"], "0600");
    assert_eq!(recorded("domain.xml"), Value::Null);
    let id = backup["id"].as_str().unwrap();
    host.ok(&["restore", id, "--as", "copy"]);
    let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o7777;
    let copies = |name: &str| {
        ["vda.qcow2", "vdb.raw"].map(|disk| mode(host.restored().join(format!("{name}/{name}-{disk}"))))
    };
    assert_eq!(copies("copy"), [0o660, 0o600]);
    assert_eq!(mode(host.restored().join("copy")), 0o711);
    daemon.end();
    configure(host, "[restore]\nmode = \"0640\"\ndirectory_mode = \"0750\"\n");
    let _daemon = host.daemon();
    host.ok(&["restore", id, "--as", "other"]);
    assert_eq!(copies("other"), [0o640; 2]);
    assert_eq!(mode(host.restored().join("other")), 0o750);
    // In place: the one that comes back is as it was, the one that is kept aside stays as it is.
    fs::set_permissions(vda, fs::Permissions::from_mode(0o644)).unwrap();
    host.ok(&["restore", id, "--in-place", "--disks", "vdb", "--destroy", "--shutdown-time", "1s"]);
    let now = crate::support::disks(&bed.guest);
    assert_ne!(now["vdb"], *vdb);
    assert_eq!([mode(now["vdb"].clone()), mode(vdb.clone()), mode(vda.clone())], [0o640, 0o600, 0o644]);
}

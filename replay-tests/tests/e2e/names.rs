//! Names with spaces, quotes, `$()`, newlines and letters of other scripts, through every command.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};

use crate::support::bed::*;
use crate::support::{Host, assert_ticks, disks, files_below};

/// A restored domain ticks on both of its disks; where these are. It is ended.
fn comes_up(host: &Host, name: &str) -> BTreeMap<String, PathBuf> {
    let copy = Guest::attach(&host.hypervisor, name).unwrap();
    copy.wait_more(10).unwrap();
    copy.destroy().unwrap();
    let disks = disks(&copy);
    assert_ticks(&disks["vda"], &disks["vdb"]);
    disks
}

#[test]
fn nasty_names_pass_through_everything_unharmed() {
    let name = "web 'one' \"two\" $(touch pwned) `id` ; & \\ %41 ~ ü ß 日本 -x";
    let host = Host::new();
    let newline = GuestSpec::new("with\nnewline").disk(DiskSpec::new(8 * MIB).plain());
    assert!(Guest::define(&host.hypervisor, &newline).is_err(), "libvirt lets no newline into a name");
    let images = folder(&host, &host.hypervisor.images().join("Bilder $(touch pwned) 'ä' \"b\" ;\\"));
    let spec = GuestSpec::new(name)
        .disk(DiskSpec::new(64 * MIB).data(2 * MIB).at(&images.join("disk 'ö' $(id).qcow2")))
        .disk(DiskSpec::new(32 * MIB).raw().at(&images.join("-o raw\"ß\".raw")));
    let bed = Bed::boot_on(host, None, &spec);
    let host = &bed.host;
    let _daemon = host.daemon();
    let root = default_root(host);
    let target = root.join("Ziel $(touch pwned)\nzweite Zeile 'ä' \"b\" ;\\ -rf");
    let to = target.to_str().unwrap();
    host.ok(&["snapshot", name, "--to", to, "--reason", "weil's \"so\" $(ist)\nüberall"]);
    bed.assert_back_home();
    let backup = host.backups().remove(0);
    assert_eq!(backup["domain"], name);
    assert!(backup["folder"].as_str().unwrap().starts_with(to), "{backup:#}");
    judge_backup(host, &backup);
    assert_eq!(host.json(&["list", name])["backups"].as_array().unwrap().len(), 1);
    assert!(host.json(&["list", "web"])["backups"].as_array().unwrap().is_empty());
    for by in [backup["id"].as_str().unwrap(), backup["folder"].as_str().unwrap()] {
        let shown = host.ok(&["show", by]);
        // Printed so that it cannot be mistaken for anything else.
        assert!(shown.contains(&name.replace('\\', "\\\\")), "{shown}");
        host.ok(&["verify", by]);
    }
    for verb in [&["status"][..], &["domains"], &["jobs"], &["jobs", "--domain", name]] {
        let text = host.ok(verb);
        assert!(text.contains("日本"), "{verb:?}: {text}");
        assert!(!text.contains("$(touch pwned)\nzweite"), "a newline of a name breaks the line: {text}");
    }
    // Onto the host's own terminal nothing gets through that would move its cursor.
    let escape = host.vmkeep(&["snapshot", "\u{1b}[2J\u{7}bell"]);
    assert_eq!(escape.status.code(), Some(23));
    assert!(!escape.stderr.contains(&0x1b) && !escape.stderr.contains(&7), "{escape:?}");
    host.ok(&["snapshot", bed.guest.uuid(), "--disk-only", "--to", to]);
    bed.assert_back_home();
    assert_eq!(host.json(&["list", name])["backups"].as_array().unwrap().len(), 2);

    // Back under names that are no better, with memory into the default folder, and cold to places of their own.
    let id = backup["id"].as_str().unwrap();
    for refused_name in ["", " ", "a/b", "two\nlines"] {
        refused(host, &["restore", id, "--as", refused_name], 64, &["USAGE"]);
    }
    let copy = "copy 'one' \"two\" $(touch pwned) `id` ; & \\ %41 ~ ü 日本 -x";
    host.ok(&["restore", id, "--as", copy, "--start", "--reason", "weil's \"so\" $(ist)\nüberall"]);
    let of_copy = comes_up(host, copy);
    for path in of_copy.values() {
        let folder = path.parent().unwrap();
        assert_eq!(folder.parent(), Some(host.restored().as_path()), "{path:?}");
    }
    // Without a newline: libvirt prints one unescaped in an attribute, where whoever reads it back finds a space.
    let places = root.join("Ort $(touch pwned) 'ü' \"c\" ;\\ -rf");
    let [vda, vdb] = ["a 'ö' $(id).qcow2", "-o raw\"ß\".raw"].map(|name| places.join(name));
    let disk = |target: &str, path: &Path| format!("{target}={}", path.display());
    let (a, b) = (disk("vda", &vda), disk("vdb", &vdb));
    host.ok(&[
        "restore",
        backup["folder"].as_str().unwrap(),
        "--as=-x",
        "--cold",
        "--start",
        "--disk",
        &a,
        "--disk",
        &b,
    ]);
    assert_eq!(comes_up(host, "-x"), BTreeMap::from([("vda".to_owned(), vda), ("vdb".to_owned(), vdb)]));
    let text = host.ok(&["jobs", "--domain", copy]);
    assert!(text.contains("日本") && text.lines().count() == 2, "{text}");
    for job in host.jobs() {
        for verb in ["show", "explain", "history"] {
            let text = host.ok(&["job", verb, job["id"].as_str().unwrap()]);
            assert!(!text.contains("\nzweite") && !text.contains("\nüberall"), "{verb}: {text}");
        }
    }
    bed.assert_back_home();
    let pwned: Vec<_> = files_below(host.hypervisor.dir())
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|file| file == OsStr::new("pwned")))
        .collect();
    assert!(pwned.is_empty(), "{pwned:?}");
}

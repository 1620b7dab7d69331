//! Names with spaces, quotes, `$()`, newlines and letters of other scripts, through every command.

use std::ffi::OsStr;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};

use crate::support::bed::*;
use crate::support::{Host, files_below};

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
    let pwned: Vec<_> = files_below(host.hypervisor.dir())
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|file| file == OsStr::new("pwned")))
        .collect();
    assert!(pwned.is_empty(), "{pwned:?}");
}

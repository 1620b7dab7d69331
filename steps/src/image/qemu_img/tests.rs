use super::*;
use std::os::unix::fs::FileExt as _;

/// As hostile as names of files get.
const NASTY: &[&str] = &[
    "-f",
    "--help",
    "json:{\"driver\":\"null-co\"}",
    "nbd:localhost:10809",
    "fat:rw:x",
    "a b",
    "a,b=c,,d",
    "quote'\"`",
    "$(touch pwned)",
    "new\nline",
    "Büro 東京",
    "%s%n",
    "file:x",
    "a\\b",
    "driver=raw",
];

fn qemu() -> QemuImg {
    QemuImg::default()
}

fn raw(path: &Path, size: u64) {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
}

#[test]
fn nasty_names_are_file_names_and_nothing_else() {
    for name in NASTY {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(format!("d {name}"));
        std::fs::create_dir(&folder).unwrap();
        let (base, top) = (folder.join(format!("base {name}")), folder.join(name));
        raw(&base, 1 << 20);
        let q = qemu();
        q.create_overlay(&top, &base, Format::Raw, 1 << 20).unwrap();
        let chain = q.chain(&top, Format::Qcow2, false).unwrap();
        assert_eq!(chain.len(), 2, "{name:?}");
        assert_eq!(chain[0].backing_filename.as_deref(), base.to_str(), "{name:?}");
        assert_eq!(chain[1].format, "raw");
        q.add_bitmap(&top, name, 65536).unwrap();
        let info = q.info(&top, Format::Qcow2, false).unwrap();
        assert_eq!(info.bitmaps()[0].name, *name);
        q.remove_bitmap(&top, name).unwrap();
        assert!(q.info(&top, Format::Qcow2, false).unwrap().bitmaps().is_empty());
        assert!(q.check(&top, Format::Qcow2, Duration::from_secs(60)).unwrap().sound());
        let flat = folder.join(format!("{name}.flat"));
        q.convert((&top, Format::Qcow2), (&flat, Format::Raw), Duration::from_secs(60), &never).unwrap();
        assert_eq!(std::fs::metadata(&flat).unwrap().len(), 1 << 20);
        q.commit(&top, &base, Duration::from_secs(60), &never).unwrap();
        let relative = Component::encoded(&format!("b{name}"));
        std::fs::rename(&base, folder.join(relative.as_str())).unwrap();
        q.rebase_unsafe(&top, &relative, Format::Raw).unwrap();
        assert_eq!(q.chain(&top, Format::Qcow2, false).unwrap().len(), 2, "{name:?}");
        // Nothing but what was asked for: base, top, flat copy.
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 3, "{name:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{name:?}");
    }
}

#[test]
fn a_relative_name_is_refused() {
    for name in NASTY {
        let got = qemu().info(Path::new(name), Format::Raw, false);
        assert!(matches!(got, Err(QemuImgError::NotAbsolute { .. })), "{name:?}");
        let got = qemu().create_overlay(Path::new("/nowhere/x"), Path::new(name), Format::Raw, 1);
        assert!(matches!(got, Err(QemuImgError::NotAbsolute { .. })), "{name:?}");
    }
}

#[test]
fn a_backing_name_that_qemu_would_misread_is_refused() {
    for name in ["nbd:x", "json:{}", "a:b", "-b"] {
        let got = qemu().rebase_unsafe(Path::new("/nowhere"), &Component::new(name).unwrap(), Format::Raw);
        assert!(matches!(got, Err(QemuImgError::BadBackingName { .. })), "{name}");
    }
}

#[test]
fn a_guests_header_in_a_raw_disk_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, inner, disk) = (dir.path().join("secret"), dir.path().join("i"), dir.path().join("disk"));
    raw(&secret, 1 << 20);
    qemu().create_overlay(&inner, &secret, Format::Raw, 1 << 20).unwrap();
    std::fs::copy(&inner, &disk).unwrap();
    let chain = qemu().chain(&disk, Format::Raw, false).unwrap();
    assert_eq!((chain.len(), chain[0].backing_filename.as_deref()), (1, None));
}

#[test]
fn an_overlay_never_replaces_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base"), dir.path().join("top"));
    raw(&base, 1 << 20);
    std::fs::write(&top, "precious").unwrap();
    let got = qemu().create_overlay(&top, &base, Format::Raw, 1 << 20);
    assert!(matches!(got, Err(QemuImgError::Failed { act: "make", .. })), "{got:?}");
    assert_eq!(std::fs::read(&top).unwrap(), b"precious");
}

#[test]
fn damage_is_reported_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a");
    let base = dir.path().join("base");
    raw(&base, 4 << 20);
    qemu().create_overlay(&image, &base, Format::Raw, 4 << 20).unwrap();
    assert!(qemu().check(&image, Format::Qcow2, Duration::from_secs(60)).unwrap().sound());
    // The first entry of the L1 table (at 0x30000 in an empty image) points to a cluster that does not exist.
    let file = std::fs::File::options().read(true).write(true).open(&image).unwrap();
    let mut l1 = [0; 8];
    file.read_exact_at(&mut l1, 40).unwrap();
    file.write_all_at(&0x8000_0000_00ff_0000u64.to_be_bytes(), u64::from_be_bytes(l1)).unwrap();
    let report = qemu().check(&image, Format::Qcow2, Duration::from_secs(60));
    assert!(report.as_ref().is_ok_and(|r| !r.sound()) || report.is_err(), "{report:?}");
    std::fs::write(&image, "no image at all").unwrap();
    let got = qemu().check(&image, Format::Qcow2, Duration::from_secs(60));
    assert!(matches!(got, Err(QemuImgError::Failed { act: "check", .. })), "{got:?}");
}

#[test]
fn a_missing_image_or_program_is_an_error_with_its_reason() {
    let got = qemu().info(Path::new("/no/such/image"), Format::Raw, false);
    assert!(
        matches!(&got, Err(QemuImgError::Failed { complaint, .. }) if complaint.contains("No such file")),
        "{got:?}"
    );
    let got = QemuImg::new("/no/qemu-img", Duration::from_secs(5)).version();
    assert!(got.is_err());
    assert!(qemu().version().unwrap().starts_with(|c: char| c.is_ascii_digit()));
}

#[test]
fn a_check_opens_nothing_but_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let (base, image) = (dir.path().join("base"), dir.path().join("a"));
    raw(&base, 4 << 20);
    qemu().create_overlay(&image, &base, Format::Raw, 4 << 20).unwrap();
    std::fs::remove_file(&base).unwrap();
    assert!(qemu().check(&image, Format::Qcow2, Duration::from_secs(60)).unwrap().sound());
}

#[test]
fn leaked_clusters_do_not_make_an_image_unsound() {
    assert!(CheckReport { leaks: 3, ..CheckReport::default() }.sound());
    assert!(!CheckReport { corruptions: 1, ..CheckReport::default() }.sound());
    let report: CheckReport =
        serde_json::from_str(r#"{"leaks": 2, "check-errors": 0, "filename": "x", "total-clusters": 4}"#)
            .unwrap();
    assert_eq!(report, CheckReport { leaks: 2, ..CheckReport::default() });
}

use super::*;
use proptest::prelude::*;
use std::path::Path;
use std::process::Command;

fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("qemu-img").current_dir(dir).args(args).env("LC_ALL", "C").output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn header(path: &Path) -> Header {
    Header::read(&File::open(path).unwrap()).unwrap()
}

fn patch(path: &Path, name: &str, format: Format) {
    let bytes = header(path).with_backing(Some((name, format))).unwrap();
    File::options().write(true).open(path).unwrap().write_all_at(&bytes, 0).unwrap();
}

#[test]
fn reads_what_qemu_img_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    qemu_img(dir.path(), &["create", "-q", "-f", "raw", "base.raw", "8M"]);
    for (options, version, cluster) in [
        ("compat=1.1,cluster_size=64k", 3, 64 << 10),
        ("compat=0.10", 2, 64 << 10),
        ("cluster_size=2M", 3, 2 << 20),
        ("cluster_size=512", 3, 512),
        ("extended_l2=on,cluster_size=128k", 3, 128 << 10),
        ("compression_type=zstd", 3, 64 << 10),
    ] {
        qemu_img(
            dir.path(),
            &["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", "a", "9M"],
        );
        let h = header(&at("a"));
        assert_eq!((h.version, h.cluster, h.virtual_size), (version, cluster, 9 << 20), "{options}");
        assert_eq!(
            (h.backing.as_deref(), h.backing_format.as_deref()),
            (Some("base.raw"), Some("raw")),
            "{options}"
        );
        assert!(!h.dirty && !h.corrupt && !h.data_file && h.encryption == 0);
    }
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "plain", "1M"]);
    qemu_img(dir.path(), &["snapshot", "-c", "s1", "plain"]);
    qemu_img(dir.path(), &["bitmap", "--add", "plain", "b1"]);
    let h = header(&at("plain"));
    assert_eq!((h.backing, h.snapshots, h.bitmaps), (None, 1, 1));
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "data_file=d", "ext", "1M"]);
    assert!(header(&at("ext")).data_file);
}

/// The content as a guest would read it.
fn content(dir: &Path, image: &str) -> Vec<u8> {
    qemu_img(dir, &["convert", "-O", "raw", image, "content.raw"]);
    std::fs::read(dir.join("content.raw")).unwrap()
}

#[test]
fn a_renamed_backing_file_is_found_and_nothing_else_changed() {
    for options in
        ["compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2M", "compression_type=zstd"]
    {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::create_dir(dir.join("far")).unwrap();
        qemu_img(dir, &["create", "-q", "-f", "raw", "far/base.raw", "4M"]);
        std::fs::write(dir.join("far/base.raw"), vec![0x5a; 4 << 20]).unwrap();
        let old = dir.join("far/base.raw").to_str().unwrap().to_owned();
        qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", options, "-b", &old, "-F", "raw", "a", "4M"]);
        Command::new("qemu-io")
            .current_dir(dir)
            .args(["-f", "qcow2", "-c", "write -P 7 1M 64k", "a"])
            .output()
            .unwrap();
        if options != "compat=0.10" {
            qemu_img(dir, &["bitmap", "--add", "a", "kept"]);
        }
        let before = content(dir, "a");
        std::fs::rename(dir.join("far/base.raw"), dir.join("b")).unwrap();
        for (name, on_disk) in [("b", "b"), ("a-much-longer-name-for-the-same-base.raw", ""), ("./b", "b")] {
            if on_disk.is_empty() {
                std::fs::copy(dir.join("b"), dir.join(name)).unwrap();
            }
            patch(&dir.join("a"), name, Format::Raw);
            let info = qemu_img(dir, &["info", "--output=json", "a"]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["backing-filename"], name, "{options}");
            assert_eq!(info["backing-filename-format"], "raw");
            qemu_img(dir, &["check", "-q", "-f", "qcow2", "a"]);
            assert!(content(dir, "a") == before, "{options} {name}");
            // QEMU itself finds no fault with it when it rewrites the header once more.
            qemu_img(dir, &["rebase", "-u", "-f", "qcow2", "-b", "b", "-F", "raw", "a"]);
            assert!(content(dir, "a") == before, "{options} {name}");
        }
        if options != "compat=0.10" {
            assert!(qemu_img(dir, &["info", "a"]).contains("kept"), "{options}");
        }
    }
}

#[test]
fn a_header_that_already_says_so_is_rewritten_to_itself_by_qemu_and_by_us_alike() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "b", "4M"]);
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-b", "b", "-F", "qcow2", "a", "4M"]);
    let h = header(&dir.join("a"));
    let ours = h.with_backing(Some(("b", Format::Qcow2))).unwrap();
    let theirs = std::fs::read(dir.join("a")).unwrap();
    assert_eq!(ours, theirs[..ours.len()]);
}

#[test]
fn a_name_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "raw", "b", "1M"]);
    qemu_img(
        dir,
        &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", "b", "-F", "raw", "a", "1M"],
    );
    let h = header(&dir.join("a"));
    assert!(matches!(
        h.with_backing(Some((&"x".repeat(400), Format::Raw))),
        Err(Qcow2Error::NoRoom { cluster: 512 })
    ));
    assert!(matches!(h.with_backing(Some((&"x".repeat(1024), Format::Raw))), Err(Qcow2Error::NoRoom { .. })));
    // 200 bytes do, at the price of the table of feature names.
    patch(&dir.join("a"), &"y".repeat(200), Format::Raw);
    std::fs::rename(dir.join("b"), dir.join("y".repeat(200))).unwrap();
    qemu_img(dir, &["check", "-q", "-f", "qcow2", "a"]);
}

#[test]
fn a_backing_file_can_be_taken_away_and_given_when_the_hypervisor_was_told_to_ignore_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("b"), vec![0x5a; 1 << 20]).unwrap();
    for options in ["compat=1.1", "compat=0.10"] {
        qemu_img(dir, &["create", "-q", "-f", "qcow2", "-o", options, "-b", "b", "-F", "raw", "a", "1M"]);
        let original = std::fs::read(dir.join("a")).unwrap();
        let write = |backing: Option<(&str, Format)>| {
            let bytes = header(&dir.join("a")).with_backing(backing).unwrap();
            File::options().write(true).open(dir.join("a")).unwrap().write_all_at(&bytes, 0).unwrap();
            qemu_img(dir, &["check", "-q", "-f", "qcow2", "a"]);
            assert!(header(&dir.join("a")).names(backing));
        };
        write(None);
        assert!(content(dir, "a").iter().all(|b| *b == 0), "{options}");
        write(Some(("b", Format::Raw)));
        assert!(content(dir, "a").iter().all(|b| *b == 0x5a), "{options}");
        assert!(std::fs::read(dir.join("a")).unwrap() == original, "{options}");
    }
}

#[test]
fn bitmaps_are_forgotten_and_the_image_stays_sound() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("b"), vec![0x5a; 1 << 20]).unwrap();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "-b", "b", "-F", "raw", "a", "1M"]);
    qemu_img(dir, &["bitmap", "--add", "a", "old"]);
    let before = content(dir, "a");
    let bytes = header(&dir.join("a")).without_bitmaps(Some(("b", Format::Raw))).unwrap();
    File::options().write(true).open(dir.join("a")).unwrap().write_all_at(&bytes, 0).unwrap();
    assert_eq!(header(&dir.join("a")).bitmaps, 0);
    assert!(!qemu_img(dir, &["info", "a"]).contains("old"));
    assert!(content(dir, "a") == before);
    // The same name is free again, and QEMU writes to the image without complaint.
    qemu_img(dir, &["bitmap", "--add", "a", "old"]);
    let checked =
        Command::new("qemu-img").current_dir(dir).args(["check", "-f", "qcow2", "a"]).output().unwrap();
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
}

#[test]
fn data_in_another_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    qemu_img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", "data_file=d", "ext", "1M"]);
    assert!(matches!(header(&dir.path().join("ext")).with_backing(None), Err(Qcow2Error::DataFile)));
}

#[test]
fn what_is_no_qcow2_is_said_to_be_none() {
    assert!(matches!(Header::parse(&[0; 512]), Err(Qcow2Error::NotQcow2)));
    assert!(matches!(Header::parse(b""), Err(Qcow2Error::NotQcow2)));
    assert!(matches!(Header::parse(b"QFI\xfb\0\0\0\x01"), Err(Qcow2Error::Version(1))));
    assert!(matches!(Header::parse(b"QFI\xfb\0\0\0\x03"), Err(Qcow2Error::Damaged(_))));
}

#[test]
fn an_image_that_ends_within_its_header_is_refused() {
    for (version, len) in [(2, V2_LEN), (3, V3_LEN)] {
        let mut bytes = vec![0u8; len];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\0");
        bytes[7] = version;
        bytes[23] = 16;
        bytes[100.min(len - 4)..][..4].copy_from_slice(&104u32.to_be_bytes());
        assert!(Header::parse(&bytes).is_ok(), "version {version}");
        for end in 4..len {
            assert!(Header::parse(&bytes[..end]).is_err(), "version {version}, {end} bytes");
        }
    }
}

proptest! {
    #[test]
    fn no_header_however_mangled_makes_us_panic_or_write_beyond_the_first_cluster(
        changes in prop::collection::vec((0..600usize, any::<u8>()), 0..24),
        cut in 0..600usize,
    ) {
        // As `qemu-img create -b base.raw -F raw` writes it, in essence.
        let mut bytes = vec![0u8; 600];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        bytes[8..16].copy_from_slice(&136u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&8u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&16u32.to_be_bytes());
        bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
        bytes[104..108].copy_from_slice(&EXT_BACKING_FORMAT.to_be_bytes());
        bytes[108..112].copy_from_slice(&3u32.to_be_bytes());
        bytes[112..115].copy_from_slice(b"raw");
        bytes[136..144].copy_from_slice(b"base.raw");
        prop_assert!(Header::parse(&bytes).is_ok());
        for (at, value) in changes {
            bytes[at] = value;
        }
        bytes.truncate(600 - cut);
        if let Ok(header) = Header::parse(&bytes)
            && let Ok(new) = header.with_backing(Some(("other", Format::Qcow2)))
        {
            prop_assert!(new.len() as u64 <= header.cluster);
            let again = Header::parse(&new).unwrap();
            prop_assert_eq!(again.backing.as_deref(), Some("other"));
        }
    }
}

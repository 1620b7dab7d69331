use super::*;
use crate::image::copy::{Options, Start, copy};
use crate::image::qemu_img::QemuImg;
use crate::image::root::Roots;
use std::os::unix::fs::FileExt as _;
use std::process::Command;

fn shell(dir: &Path, program: &str, args: &[&str]) {
    let out = Command::new(program).current_dir(dir).args(args).env("LC_ALL", "C").output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn fill(dir: &Path, image: &str, what: &str) {
    shell(dir, "qemu-io", &["-f", "qcow2", "-c", what, image]);
}

/// `templates/os.raw` ← `mid.qcow2` ← `vda` and `vdb`; `vdc` is plain. Relative and absolute names mixed.
fn linked_clones(dir: &Path) {
    std::fs::create_dir_all(dir.join("templates")).unwrap();
    std::fs::create_dir_all(dir.join("images of $(x)")).unwrap();
    std::fs::write(dir.join("templates/os.raw"), vec![0x11; 4 << 20]).unwrap();
    let t = dir.join("templates");
    shell(&t, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "os.raw", "-F", "raw", "mid.qcow2", "8M"]);
    fill(&t, "mid.qcow2", "write -P 0x22 1M 1M");
    let i = dir.join("images of $(x)");
    let absolute = t.join("mid.qcow2").to_str().unwrap().to_owned();
    shell(&i, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", &absolute, "-F", "qcow2", "a", "8M"]);
    shell(
        &i,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", "../templates/mid.qcow2", "-F", "qcow2", "b", "16M"],
    );
    shell(&i, "qemu-img", &["create", "-q", "-f", "qcow2", "c", "8M"]);
    fill(&i, "a", "write -P 0x33 2M 1M");
    fill(&i, "b", "write -P 0x44 5M 1M");
    fill(&i, "c", "write -P 0x55 0 1M");
}

fn content(q: &QemuImg, image: &Path, format: Format) -> Vec<u8> {
    let flat = image.with_file_name("content of an image");
    q.convert((image, format), (&flat, Format::Raw), std::time::Duration::from_secs(60), &|| false).unwrap();
    let bytes = std::fs::read(&flat).unwrap();
    std::fs::remove_file(flat).unwrap();
    bytes
}

fn backup(dir: &Path, files: &[FileToCopy]) -> PathBuf {
    let to = dir.join("backup");
    std::fs::create_dir(&to).unwrap();
    let roots = Roots::open([&to]).unwrap();
    let folder = roots.open_folder(&to).unwrap();
    for file in files {
        let source = SourceFile::open(&file.source).unwrap();
        let options = Options { header: header_for(&source, file).unwrap(), ..Options::default() };
        let copied = copy(&source, &folder, &file.name, Start::Fresh, &options, &()).unwrap();
        let published = std::fs::read(to.join(file.name.as_str())).unwrap();
        assert_eq!(copied.hash, blake3::hash(&published));
    }
    to
}

#[test]
fn linked_clones_are_copied_whole_and_open_without_their_originals() {
    let dir = tempfile::tempdir().unwrap();
    linked_clones(dir.path());
    let q = QemuImg::default();
    let images = dir.path().join("images of $(x)");
    let chains: Vec<_> = ["a", "b", "c"].map(|n| probe(&images.join(n), Format::Qcow2).unwrap()).into();
    assert_eq!(chains.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1]);
    // QEMU follows the same way.
    for (name, chain) in ["a", "b", "c"].iter().zip(&chains) {
        let theirs = q.chain(&images.join(name), Format::Qcow2, false).unwrap();
        for (ours, theirs) in chain.iter().zip(&theirs) {
            assert_eq!(ours.identity, Identity::at(Path::new(&theirs.filename)).unwrap());
            assert_eq!(
                (ours.format.as_str(), ours.virtual_size),
                (theirs.format.as_str(), theirs.virtual_size)
            );
        }
        assert_eq!(chain.len(), theirs.len());
    }
    let before: Vec<_> = ["a", "b", "c"].map(|n| content(&q, &images.join(n), Format::Qcow2)).into();

    let disks = ["vda", "vdb", "vdc"].into_iter().zip(chains.iter().map(Vec::as_slice));
    let (files, per_disk) = lay_out(disks);
    let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["vda.qcow2", "vda.base1.qcow2", "vda.base2.raw", "vdb.qcow2", "vdc.qcow2"]);
    assert_eq!(per_disk, [vec![0, 1, 2], vec![3, 1, 2], vec![4]]);
    let folder = backup(dir.path(), &files);

    // The originals are gone, and the folder may go anywhere.
    std::fs::rename(dir.path().join("templates"), dir.path().join("elsewhere")).unwrap();
    std::fs::remove_dir_all(&images).unwrap();
    let moved = dir.path().join("moved: to, another place");
    std::fs::rename(folder, &moved).unwrap();
    for (name, before) in ["vda", "vdb", "vdc"].iter().zip(&before) {
        let image = moved.join(format!("{name}.qcow2"));
        assert!(q.check(&image, Format::Qcow2, std::time::Duration::from_secs(60)).unwrap().sound());
        assert!(content(&q, &image, Format::Qcow2) == *before, "{name}");
    }
}

#[test]
fn files_that_need_no_other_name_are_copied_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    linked_clones(dir.path());
    let t = dir.path().join("templates");
    // A raw image may hold anything a guest wrote there, also what looks like a header.
    std::fs::copy(t.join("mid.qcow2"), t.join("disguised.raw")).unwrap();
    for (path, format) in [("templates/disguised.raw", Format::Raw), ("images of $(x)/c", Format::Qcow2)] {
        let chain = probe(&dir.path().join(path), format).unwrap();
        assert_eq!(chain.len(), 1);
        let (files, _) = lay_out([("vda", chain.as_slice())]);
        let source = SourceFile::open(&files[0].source).unwrap();
        assert!(header_for(&source, &files[0]).unwrap().is_empty(), "{path}");
    }
}

#[test]
fn a_chain_that_the_hypervisor_was_told_wins_over_the_headers() {
    let dir = tempfile::tempdir().unwrap();
    linked_clones(dir.path());
    let q = QemuImg::default();
    let a = dir.path().join("images of $(x)/a");
    // `<backingStore/>`: what `a` does not hold itself reads as zeroes, whatever its header names.
    let chain = from_layers([(a.as_path(), "qcow2")]).unwrap();
    let (files, _) = lay_out([("vda", chain.as_slice())]);
    let folder = backup(dir.path(), &files);
    let bytes = content(&q, &folder.join("vda.qcow2"), Format::Qcow2);
    assert!(bytes[..2 << 20].iter().all(|b| *b == 0) && bytes[2 << 20..3 << 20].iter().all(|b| *b == 0x33));
}

#[test]
fn what_is_no_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let image = dir.join("a");
    let with = |name: &str, format: Option<&str>| {
        let mut args = vec!["create", "-q", "-u", "-f", "qcow2", "-b", name];
        args.extend(format.into_iter().flat_map(|f| ["-F", f]));
        args.extend(["a", "1M"]);
        shell(dir, "qemu-img", &args);
        probe(&image, Format::Qcow2)
    };
    for name in ["nbd://localhost/x", "json:{\"driver\":\"null-co\"}", "fat:rw:x", "rbd:pool/image"] {
        assert!(matches!(with(name, Some("raw")), Err(ChainError::NotAFile { .. })), "{name}");
    }
    assert!(matches!(with("gone", Some("raw")), Err(ChainError::File(CopyError::Source { .. }))));
    assert!(matches!(with("x", Some("vmdk")), Err(ChainError::Format { .. })));
    std::fs::create_dir(dir.join("folder")).unwrap();
    assert!(matches!(with("folder", Some("raw")), Err(ChainError::File(CopyError::NotAFile { .. }))));
    // A colon after a slash is part of a name, and `file:` says so itself.
    std::fs::write(dir.join("b:c"), [0; 512]).unwrap();
    for name in ["./b:c".to_owned(), format!("file:{}/b:c", dir.display())] {
        assert_eq!(with(&name, Some("raw")).unwrap().len(), 2, "{name}");
    }
    assert!(matches!(with("file:b:c", Some("raw")), Err(ChainError::NotAFile { .. })));
    assert!(matches!(from_layers([]), Err(ChainError::Empty)));
    assert!(matches!(from_layers([(image.as_path(), "vmdk")]), Err(ChainError::Format { .. })));
}

#[test]
fn a_backing_format_that_nobody_recorded_is_raw_unless_it_looks_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("b"), [0; 4096]).unwrap();
    // Today's qemu-img insists on a format; older ones did not. The extension's kind is changed to an unknown one.
    shell(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "b", "-F", "raw", "a", "1M"]);
    let file = std::fs::File::options().read(true).write(true).open(dir.join("a")).unwrap();
    let mut first = vec![0; 512];
    file.read_exact_at(&mut first, 0).unwrap();
    let at = first.windows(4).position(|w| w == 0xE279_2ACAu32.to_be_bytes()).unwrap();
    file.write_all_at(&0x7fff_0000u32.to_be_bytes(), at as u64).unwrap();
    assert_eq!(probe(&dir.join("a"), Format::Qcow2).unwrap()[1].format, Format::Raw);
    shell(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "b", "1M"]);
    assert!(matches!(probe(&dir.join("a"), Format::Qcow2), Err(ChainError::FormatNotRecorded { .. })));
}

#[test]
fn a_loop_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    shell(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "a", "1M"]);
    shell(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "b", "1M"]);
    shell(dir, "qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "b", "-F", "qcow2", "a"]);
    assert!(matches!(probe(&dir.join("a"), Format::Qcow2), Err(ChainError::Loop { .. })));
    let (a, b) = (dir.join("a"), dir.join("b"));
    let twice = [(a.as_path(), "qcow2"), (b.as_path(), "qcow2"), (a.as_path(), "qcow2")];
    assert!(matches!(from_layers(twice), Err(ChainError::Loop { .. })));
}

#[test]
fn names_in_the_folder_never_collide() {
    let identity = |ino| Identity { dev: 1, ino, size: 0, mtime: 0, mtime_nsec: 0 };
    let element = |ino, format| Element {
        path: PathBuf::from("/x"),
        format,
        identity: identity(ino),
        virtual_size: 0,
        data_bytes: 0,
        header: None,
        rights: None,
    };
    let q = Format::Qcow2;
    let a = [element(1, q), element(2, q)];
    let b = [element(3, q)];
    let c = [element(4, q)];
    let d = [element(5, Format::Raw)];
    let (files, _) = lay_out([("sda", &a[..]), ("sda.base1", &b[..]), ("SDA", &c[..]), ("../x y", &d[..])]);
    let names: HashSet<_> = files.iter().map(|f| f.name.as_str().to_lowercase()).collect();
    assert_eq!(names.len(), files.len());
    assert!(names.contains("%2e.%2fx%20y.raw"), "{names:?}");
}

#[test]
fn one_file_under_two_different_stacks_is_two_files() {
    // Two definitions that contradict each other about what `1` stands on.
    let identity = |ino| Identity { dev: 1, ino, size: 0, mtime: 0, mtime_nsec: 0 };
    let element = |ino| Element {
        path: PathBuf::from("/x"),
        format: Format::Qcow2,
        identity: identity(ino),
        virtual_size: 0,
        data_bytes: 0,
        header: None,
        rights: None,
    };
    let (a, b) = ([element(1), element(2)], [element(3), element(1)]);
    let (files, chains) = lay_out([("a", &a[..]), ("b", &b[..])]);
    assert_eq!(files.len(), 4);
    assert_ne!(chains[0][0], chains[1][1]);
}

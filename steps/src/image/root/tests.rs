use super::*;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};

fn c(name: &str) -> Component {
    Component::new(name).unwrap()
}

fn rel(path: &str) -> RelPath {
    RelPath::new(path).unwrap()
}

struct Place {
    dir: tempfile::TempDir,
    roots: Roots,
}

/// `outside/secret` next to `root/`, which is the only configured root.
fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("root")).unwrap();
    std::fs::create_dir(dir.path().join("outside")).unwrap();
    std::fs::write(dir.path().join("outside/secret"), "s").unwrap();
    let roots = Roots::open([dir.path().join("root")]).unwrap();
    Place { dir, roots }
}

#[test]
fn plain_names_only() {
    for bad in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        assert!(Component::new(bad).is_err(), "{bad:?}");
    }
    for bad in ["", "/", "/etc", "a//b", "a/../b", "../a", "a/..", "./a", "a/"] {
        assert!(RelPath::new(bad).is_err(), "{bad:?}");
    }
    assert!(serde_json::from_str::<RelPath>("\"../x\"").is_err());
    assert!(serde_json::from_str::<Component>("\"a/b\"").is_err());
}

#[test]
fn paths_outside_or_climbing_are_refused_before_anything_is_opened() {
    let p = place();
    let root = p.dir.path().join("root");
    for bad in [p.dir.path().join("outside"), p.dir.path().join("root2"), PathBuf::from("/")] {
        assert!(matches!(p.roots.make_folder(&bad), Err(RootError::Outside { .. })), "{bad:?}");
    }
    for bad in [root.join("../outside"), root.join("a/../../outside"), root.join("a/../b")] {
        assert!(matches!(p.roots.make_folder(&bad), Err(RootError::Escapes { .. })), "{bad:?}");
    }
    assert!(matches!(p.roots.locate(Path::new("root/a")), Err(RootError::NotAbsolute { .. })));
    p.roots.make_folder(&root.join("a/b")).unwrap();
    p.roots.open_folder(&root).unwrap();
}

#[test]
fn a_link_on_the_way_is_refused_also_when_it_stays_inside() {
    let p = place();
    let root = p.dir.path().join("root");
    symlink("../outside", root.join("out")).unwrap();
    std::fs::create_dir(root.join("inside")).unwrap();
    symlink("inside", root.join("in")).unwrap();
    for link in ["out", "in", "out/secret", "in/x"] {
        let got = p.roots.make_folder(&root.join(link));
        assert!(
            matches!(got, Err(RootError::Escapes { .. } | RootError::WrongKind { .. })),
            "{link}: {got:?}"
        );
    }
    let folder = p.roots.open_folder(&root).unwrap();
    let got = folder.open_file(&rel("out/secret"));
    assert!(matches!(got, Err(RootError::Escapes { .. })), "{got:?}");
    assert_eq!(std::fs::read_dir(p.dir.path().join("outside")).unwrap().count(), 1);
}

#[test]
fn a_link_in_place_of_a_file_is_neither_followed_nor_replaced() {
    let p = place();
    let root = p.dir.path().join("root");
    let folder = p.roots.open_folder(&root).unwrap();
    symlink(p.dir.path().join("outside/secret"), root.join("disk")).unwrap();
    symlink(p.dir.path().join("outside/new"), root.join("dangling")).unwrap();
    assert!(matches!(folder.create_file(&c("disk")), Err(RootError::Exists { .. })));
    assert!(matches!(folder.create_file(&c("dangling")), Err(RootError::Exists { .. })));
    assert!(matches!(folder.open_file(&rel("disk")), Err(RootError::Escapes { .. })));
    assert!(matches!(folder.open_file_for_writing(&c("disk")), Err(RootError::Escapes { .. })));
    // Removing takes the link, not what it names.
    assert!(folder.remove_file(&c("disk")).unwrap());
    assert!(!folder.remove_file(&c("disk")).unwrap());
    assert_eq!(std::fs::read(p.dir.path().join("outside/secret")).unwrap(), b"s");
    assert!(!p.dir.path().join("outside/new").exists());
}

#[test]
fn a_root_may_be_configured_through_a_link() {
    let p = place();
    let link = p.dir.path().join("link");
    symlink(p.dir.path().join("root"), &link).unwrap();
    let roots = Roots::open([&link]).unwrap();
    let folder = roots.make_folder(&link.join("x")).unwrap();
    assert_eq!(folder.path(), std::fs::canonicalize(p.dir.path()).unwrap().join("root/x"));
    // The resolved name of the same place counts as well.
    roots.open_folder(folder.path()).unwrap();
}

#[test]
fn files_and_folders_are_private() {
    let p = place();
    let folder = p.roots.make_folder(&p.dir.path().join("root/a")).unwrap();
    folder.create_file(&c("f")).unwrap();
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(folder.path().join("f")), 0o600);
    assert_eq!(mode(folder.path().to_owned()), 0o700);
}

#[test]
fn names_made_of_anything_stay_in_their_folder() {
    let p = place();
    let folder = p.roots.open_folder(&p.dir.path().join("root")).unwrap();
    for nasty in ["../x", "/etc/x", "..", ".", "$(id)", "a\nb", "", "-o", "ü"] {
        let name = Component::encoded(nasty);
        folder.create_file(&name).unwrap().write_all(b"x").unwrap();
        assert!(folder.path_of(&name).parent() == Some(folder.path()), "{nasty:?}");
        folder.open_file(&RelPath::from(name)).unwrap();
    }
    assert_eq!(folder.entries().unwrap().len(), 9);
}

#[test]
fn a_fifo_does_not_hang_and_is_not_a_file() {
    let p = place();
    let folder = p.roots.open_folder(&p.dir.path().join("root")).unwrap();
    rustix::fs::mknodat(&folder, "pipe", FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    assert!(matches!(folder.open_file(&rel("pipe")), Err(RootError::WrongKind { .. })));
}

#[test]
fn rename_never_replaces() {
    let p = place();
    let folder = p.roots.open_folder(&p.dir.path().join("root")).unwrap();
    folder.create_folder(&c("a.partial")).unwrap();
    folder.create_folder(&c("b")).unwrap();
    assert!(matches!(folder.rename(&c("a.partial"), &c("b")), Err(RootError::Exists { .. })));
    folder.rename(&c("a.partial"), &c("a")).unwrap();
    assert!(matches!(folder.rename(&c("gone"), &c("x")), Err(RootError::Missing { .. })));
    assert!(matches!(folder.create_folder(&c("a")), Err(RootError::Exists { .. })));
}

#[test]
fn a_root_must_be_there_and_absolute() {
    assert!(matches!(TargetRoot::open(Path::new("/no/such/root")), Err(RootError::Missing { .. })));
    assert!(matches!(TargetRoot::open(Path::new("tmp")), Err(RootError::NotAbsolute { .. })));
}

//! The rules for AppArmor that are shipped: they can be compiled, and they fit the names that files really get.

use std::path::{Path, PathBuf};
use std::process::Command;

use vmkeep_workflow::JobId;

use crate::hypervisor::Target;
use crate::manifest::folder::MEMORY;
use crate::restore::place::aside;
use crate::snapshot::disk::{overlay_path, state_path};

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/apparmor").join(name)
}

/// Whether a path is what a rule names. `**` is anything, `*` and `?` are anything but a slash, `[0-9a-f]` is a digit,
/// `{a,b}` is one or the other.
fn fits(rule: &str, path: &str) -> bool {
    if let Some(rest) = rule.strip_prefix("**") {
        return (0..=path.len()).any(|at| path.is_char_boundary(at) && fits(rest, &path[at..]));
    }
    if let Some(rest) = rule.strip_prefix('*') {
        let most = path.find('/').unwrap_or(path.len());
        return (0..=most).any(|at| path.is_char_boundary(at) && fits(rest, &path[at..]));
    }
    if let Some(rest) = rule.strip_prefix("[0-9a-f]") {
        let digit = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        return path.strip_prefix(digit).is_some_and(|path| fits(rest, path));
    }
    if let Some((choices, rest)) = rule.strip_prefix('{').and_then(|rule| rule.split_once('}')) {
        return choices.split(',').any(|choice| fits(&format!("{choice}{rest}"), path));
    }
    match (rule.chars().next(), path.chars().next()) {
        (None, None) => true,
        (Some(wanted), Some(is)) if wanted == is => fits(&rule[wanted.len_utf8()..], &path[is.len_utf8()..]),
        _ => false,
    }
}

/// What the rules of a file let one do with a path.
fn allowed(rules: &str, path: &Path) -> String {
    let text = std::fs::read_to_string(shipped(rules)).unwrap();
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#') && line.ends_with(','));
    let rules = lines.filter_map(|line| {
        let (path, rights) = line.trim_end_matches(',').trim_start_matches("owner ").rsplit_once(' ')?;
        Some((path, rights))
    });
    let fitting = rules.filter(|(rule, _)| fits(rule, path.to_str().unwrap()));
    fitting.map(|(_, rights)| rights).collect()
}

#[test]
fn the_rules_for_apparmor_fit_the_names_that_files_get() {
    let job = JobId::new();
    let images = Path::new("/srv/vm/web 1");
    let overlay = overlay_path(&images.join("disk.raw"), job, &Target::from("vda"));
    let state = state_path(Path::new("/mnt/ramdisk"), job, "web/1");
    let memory = images.join(aside(job, "memory.save").as_str());
    let saved = Path::new("/var/lib/vmkeep/backups/web1/20261121T132159Z-658130490418").join(MEMORY);
    let restored = PathBuf::from("/var/lib/vmkeep/restored/copy/copy-vda.raw");
    let variables = images.join("copy_VARS.fd");
    for path in [&overlay, &state, &memory, &saved, &restored, &variables] {
        let rights = allowed("usr.lib.libvirt.virt-aa-helper", path);
        assert!(rights.contains('r') && !rights.contains('w'), "{}: {rights:?}", path.display());
    }
    for (path, wanted) in
        [(&overlay, "rwk"), (&state, "rw"), (&memory, "r"), (&saved, "rw"), (&restored, "rwk")]
    {
        let rights = allowed("libvirt-qemu", path);
        assert!(wanted.chars().all(|right| rights.contains(right)), "{}: {rights:?}", path.display());
    }
    // Nothing else: neither other people's images nor the rest of a backup.
    for path in ["/srv/vm/web 1/disk.raw", "/srv/vm/vmkeep-manual-vda.qcow2", "/etc/shadow"] {
        assert_eq!(allowed("libvirt-qemu", Path::new(path)), "", "{path}");
    }
    assert_eq!(allowed("libvirt-qemu", &saved.with_file_name("vda.qcow2")), "");
    let text = std::fs::read_to_string(shipped("libvirt-qemu")).unwrap();
    let rules = text.lines().map(str::trim).filter(|line| line.ends_with(',') && !line.starts_with('#'));
    assert!(rules.clone().count() > 0 && rules.clone().all(|rule| rule.starts_with("owner ")), "{text}");
}

#[test]
fn the_rules_for_apparmor_can_be_compiled() {
    let there =
        Command::new("apparmor_parser").arg("--version").output().is_ok_and(|out| out.status.success());
    if !there {
        println!("SKIPPED: apparmor_parser is not installed");
        return;
    }
    let check = |folder: &Path| Command::new(shipped("check")).arg(folder).output().unwrap();
    let done = check(&shipped(""));
    assert!(done.status.success(), "{done:?}");
    // And it would be noticed if they could not.
    let dir = tempfile::tempdir().unwrap();
    for name in ["libvirt-qemu", "usr.lib.libvirt.virt-aa-helper"] {
        std::fs::copy(shipped(name), dir.path().join(name)).unwrap();
    }
    assert!(check(dir.path()).status.success());
    let mut text = std::fs::read_to_string(shipped("libvirt-qemu")).unwrap();
    text.push_str("  owner /var/lib/x rwkq,\n");
    std::fs::write(dir.path().join("libvirt-qemu"), text).unwrap();
    assert!(!check(dir.path()).status.success());
}
